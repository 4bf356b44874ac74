"""Each kind of LoRA adapter that PEFT's tests build gives PEFT's outputs, or is refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import dynlora_fn as dl
from dynlora_fn.testing import normal
from tests.support.peft_kinds import kinds, table

peft = pytest.importorskip("peft")
KINDS = kinds()
README = Path(dl.__file__).parent / "interop" / "README.md"


def saved(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Write an adapter that is far from zero, and return PEFT's model that has read it."""
    model = kind.make().to(dtype)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**kind.settings)).eval()
    with torch.no_grad():
        for seed, parameter in enumerate(filter(lambda parameter: parameter.requires_grad, theirs.parameters())):
            parameter.add_(0.2 * normal(seed, *parameter.shape, dtype=parameter.dtype))
    theirs.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(model, folder).eval().get_base_model()


def outputs(result: Any) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_it_gives_the_outputs_of_peft_or_is_refused(kind, dtype, tmp_path):
    if dtype == torch.float64 and not kind.is_wide:
        pytest.skip("PEFT makes it in float32 only")
    if tuple(map(int, peft.__version__.split(".")[:2])) < kind.since:
        pytest.skip(f"PEFT {peft.__version__} does not have it")
    theirs = saved(kind, tmp_path, dtype)
    model = kind.make().to(dtype)
    inputs = [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in kind.inputs]
    if kind.refused:
        with pytest.raises(ValueError, match=kind.refused):
            dl.interop.load_adapter(model, tmp_path, seed=0)
        return
    params = dl.interop.load_adapter(model, tmp_path, seed=0, dtype=dtype)
    with torch.no_grad():
        wanted, before = outputs(theirs(*inputs)), outputs(model(*inputs))
        got = outputs(dl.call(model, params, *inputs))
    tolerance = 1000 * torch.finfo(dtype).eps * wanted.abs().max()
    assert (got - wanted).abs().max() <= tolerance
    assert (before - wanted).abs().max() > 100 * tolerance


def test_the_table_in_the_readme_is_that_of_these_tests():
    assert table() in README.read_text()
