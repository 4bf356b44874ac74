"""Adapters of experts and of fused attention weights go out with PEFT's outputs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynlora_fn import LowRank, call, init
from dynlora_fn.interop import load_adapter, open_weights, save_adapter
from dynlora_fn.testing import normal
from tests.support.zoo import TOKENS, mixtral

peft = pytest.importorskip("peft")


class Experts(nn.Module):
    """Experts that are stored as (stack, out, in), or transposed."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shape = (3, 6, 8) if is_transposed else (3, 8, 6)
        self.up, self.down = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(3, shape[2], shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return ((x @ up).relu() @ down).sum(0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def seeded(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make().float().eval()


X = normal(0, 2, 5, 6, dtype=torch.float32)
# By kind: the model, the targets, the fused weights, and the input.
KINDS = {
    "experts": (lambda: nn.Sequential(Experts(False), nn.Linear(6, 4)), ["0.up", "0.down", "1.weight"], {}, X[0]),
    "one parameter of experts": (lambda: nn.Sequential(Experts(False)), ["0.up"], {}, X[0]),
    "transposed experts": (lambda: nn.Sequential(Experts(True)), ["0.up", "0.down"], {}, X[0]),
    "fused experts": (lambda: nn.Sequential(Experts(False)), ["0.up", "0.down"], {"0.up": 2}, X[0]),
    "attention": (Attention, ["attention.in_proj_weight", "head.weight"], {}, X),
    "attention, fused": (Attention, ["attention.in_proj_weight"], {"attention.in_proj_weight": 3}, X),
    "Mixtral": (mixtral("eager"), ["*.experts.*", "*.q_proj.weight"], {}, TOKENS),
    "Mixtral, fused": (mixtral("eager"), ["*.experts.*"], {"*.gate_up_proj": 2}, TOKENS),
}


def trained(model: nn.Module, targets: list[str], fused: dict[str, int]) -> dict[str, Any]:
    params = init(model, rank=2, seed=0, targets=targets, fused=fused, start="lora")
    return {
        name: param._replace(factors=param.factors._replace(b=normal(1, *param.factors.b.shape, dtype=torch.float32)))
        if isinstance(param, LowRank)
        else param
        for name, param in params.items()
    }


def assert_read_alike(model: nn.Module, base: nn.Module, params: dict[str, Any], folder: Path, x: Tensor) -> None:
    with torch.no_grad():
        expected = call(model, params, x)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x)
        ours = call(base, load_adapter(base, folder, seed=0), x)
    for output in (theirs, ours):
        torch.testing.assert_close(
            getattr(output, "logits", output), getattr(expected, "logits", expected), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_go_out_with_the_outputs_of_peft(kind: str, tmp_path: Path):
    make, targets, fused, x = KINDS[kind]
    model = seeded(make)
    params = trained(model, targets, fused)
    errors = save_adapter(model, params, tmp_path, original=model.state_dict(), rank=6)
    assert max(errors.values()) < 1e-6
    assert_read_alike(model, model, params, tmp_path, x)
    save_adapter(model, params, tmp_path / "with")
    base = copy.deepcopy(model)
    weights = dict(open_weights(tmp_path / "with" / "base"))
    if "Mixtral" in kind:
        base = type(model).from_pretrained(tmp_path / "with" / "base")
        base.set_experts_implementation("eager")
    else:
        base.load_state_dict(weights)
    assert_read_alike(model, base, params, tmp_path / "with", x)


def test_a_name_that_ends_another_is_refused(tmp_path: Path):
    model = seeded(lambda: nn.Sequential(Experts(False), nn.Sequential(Experts(False))))
    params = trained(model, ["0.up"], {})
    with pytest.raises(ValueError, match=r"`params` has a low-rank '0.up', for which PEFT would take '1.0.up' too"):
        save_adapter(model, params, tmp_path, original=model.state_dict())
    params = trained(model, ["0.up", "1.0.up"], {})
    save_adapter(model, params, tmp_path, original=model.state_dict())
    assert_read_alike(model, model, params, tmp_path, X[0])


def test_the_error_of_experts_is_that_of_the_stack(tmp_path: Path):
    model = seeded(lambda: nn.Sequential(Experts(False)))
    params = trained(model, ["0.up"], {})
    errors = save_adapter(model, params, tmp_path, original=model.state_dict(), rank=1)
    again = load_adapter(model, tmp_path, seed=0)
    x, exact, cut = X[0], *(param["0.up"] for param in (params, again))
    change = exact.factors.b @ exact.factors.a / 2
    error = (change - cut.factors.b @ cut.factors.a * cut.alpha).norm() / change.norm()
    assert errors["0.up"] == pytest.approx(error.item(), rel=1e-4)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_parameters"] == ["0.up"]
    assert call(model, again, x).shape == (5, 6)
