"""Train dense weights at full rank, with AdamW or Muon, or with GaLore or APOLLO.

The optimizers of GaLore and APOLLO come from the packages of their authors. Muon comes from the library or from torch.
"""

from typing import Any

import torch
from torch import Tensor, nn

import dynlora_fn as dl
from bench.quality.job import CLIP, Job, is_inner, optimizer_of, rounded
from bench.quality.runs import Run
from bench.support.process_memory import count_bytes


class FullRank:
    """A run that trains every weight with AdamW, or the inner matrices with Muon.

    The learning rate of inner matrices is `lr`, and `lr * dense_lr` is the rate of embedding, head and norms. If `base`
    is a format in low precision, the inner matrices are stored in this format between steps.
    """

    def __init__(self, job: Job, run: Run):
        self._run, self._update = run, job.update(run.settings())
        trainable = dl.init(job.initial(run.seed), rank=1, seed=run.seed, targets=[])
        self._state = (trainable, optimizer_of(run.settings()).init(trainable))
        self._seen, self._bases = trainable, {}
        self._store(trainable)

    def weights(self) -> dict[str, Tensor]:
        return self._seen

    def update(self, step: int, grads: dict[str, Tensor], tokens: Tensor, scale: float) -> None:
        lr = torch.tensor(self._run.lr * scale)
        rates = {name: lr if is_inner(name) else lr * self._run.dense_lr for name in grads}
        if self._run.weight_decay:
            decays = {name: rate * self._run.weight_decay * is_inner(name) for name, rate in rates.items()}
            self._state = (dl.optim.decay(self._state[0], decays), self._state[1])
        (weights, opt_state), _ = self._update(self._state, rounded(grads, self._run.gradients), rates)
        self._state = (weights, opt_state)
        self._store(weights)

    def _store(self, weights: dict[str, Tensor]) -> None:
        """Round the inner matrices to their format.

        Products use only the codes, and updates also use the residuals.
        """
        self._seen = weights
        if not self._run.codes():
            return
        kept, self._seen = dict(weights), dict(weights)
        for name in filter(is_inner, weights):
            self._bases[name], self._seen[name] = quantized(weights[name], self._run)
            kept[name] = self._seen[name] + self._bases[name].residual.to(weights[name].dtype)
        self._state = (kept, self._state[1])

    def bytes(self) -> dict[str, int]:
        inner = {name: leaf for name, leaf in self._state[0].items() if is_inner(name)}
        bases = [(base.codes, base.residual) for base in self._bases.values()] or inner
        return {"state": count_bytes(self._state[1]), "bases": count_bytes(bases)}

    def measures(self) -> dict[str, Any]:
        return {}


def quantized(weight: Tensor, run: Run) -> tuple[Any, Tensor]:
    """Return a matrix in the format of a base, and the matrix that products use."""
    *stack, rows, columns = weight.shape
    factors = dl.Factors(b=weight.new_zeros(*stack, rows, 1), a=weight.new_zeros(*stack, 1, columns))
    seed = torch.zeros(stack, dtype=torch.int64, device=weight.device)
    low_rank = dl.bases.quantize(dl.LowRank(weight, factors, seed), run.codes(), residual=run.residual())
    return low_rank.base, dl.materialize(low_rank)


def packaged(
    method: str, low: list[nn.Parameter], rest: list[nn.Parameter], *, lr: float, rank: int, gap: int = 200
) -> torch.optim.Optimizer:
    """Build the optimizer of `method` with the settings of its README.

    GaLore and APOLLO project the gradients of `low`, and replace projections every `gap` steps.
    """
    if method == "torch_muon":
        return MuonOfTorch(low, rest, lr=lr)
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "no_deprecation_warning": True}
    low_rank = {"params": low, "rank": rank, "update_proj_gap": gap, "proj_type": "std", "kind": "low"}
    dense = {"params": rest, "kind": "dense"}
    if method == "galore":
        from galore_torch import GaLoreAdamW  # noqa: PLC0415, an optional extra

        return GaLoreAdamW([dense, low_rank | {"scale": 0.25}], **options)
    from apollo_torch import APOLLOAdamW  # noqa: PLC0415, an optional extra

    return APOLLOAdamW([dense, low_rank | {"proj": "random", "scale_type": "channel", "scale": 1}], **options)


class MuonOfTorch(torch.optim.Optimizer):
    """`torch.optim.Muon` for matrices and AdamW elsewhere, without weight decay."""

    def __init__(self, matrices: list[nn.Parameter], rest: list[nn.Parameter], *, lr: float):
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, fused=True)
        self.parts = {"low": muon, "dense": adamw}
        for kind, part in self.parts.items():
            part.param_groups[0]["kind"] = kind
        self.param_groups = [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:  # type: ignore[override]
        """The state of both optimizers."""
        return {parameter: state for part in self.parts.values() for parameter, state in part.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none)


class Packaged:
    """A run that trains dense weights with an optimizer of another package.

    Each matrix of a stack is one parameter of this optimizer.
    """

    def __init__(self, job: Job, run: Run):
        self._run = run
        self._weights = dl.init(job.initial(run.seed), rank=1, seed=run.seed, targets=[])
        low, rest = [], []
        self._members: list[tuple[nn.Parameter, str, int | None]] = []
        for name, leaf in self._weights.items():
            is_low = is_inner(name)
            for index in range(len(leaf)) if is_low else [None]:
                parameter = nn.Parameter(leaf if index is None else leaf[index])  # shares the leaf's memory
                self._members.append((parameter, name, index))
                (low if is_low else rest).append(parameter)
        self._optimizer = packaged(run.method, low, rest, lr=run.lr, rank=run.rank())

    def weights(self) -> dict[str, Tensor]:
        return self._weights

    def update(self, step: int, grads: dict[str, Tensor], tokens: Tensor, scale: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._run.lr * scale * (self._run.dense_lr if group["kind"] == "dense" else 1.0)
        for parameter, name, index in self._members:
            parameter.grad = grads[name] if index is None else grads[name][index]
        nn.utils.clip_grad_norm_([parameter for parameter, *_ in self._members], CLIP)
        self._optimizer.step()

    def bytes(self) -> dict[str, int]:
        states = self._optimizer.state.values()
        projectors = [vars(state["projector"]) for state in states if "projector" in state]
        moments = [{key: leaf for key, leaf in state.items() if isinstance(leaf, Tensor)} for state in states]
        return {"state": count_bytes([projectors, moments])}

    def measures(self) -> dict[str, Any]:
        return {}
