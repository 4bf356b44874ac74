"""Train dense weights by full rank, GaLore and APOLLO.

Full rank has AdamW or Muon. The others are from their packages.
"""

from typing import Any

import torch
from torch import Tensor, nn

import dynlora_fn as dl
from bench.quality.job import CLIP, OPTIMIZERS, Job, is_inner
from bench.quality.runs import Run
from bench.support.process_memory import count_bytes


class FullRank:
    """Train every weight with AdamW, or the inner matrices with Muon.

    Inner matrices have rate `lr`. Embedding, head and norms have `lr * dense_lr`.
    """

    def __init__(self, job: Job, run: Run):
        self._run, self._update = run, job.update(run.optimizer)
        trainable = dl.init(job.initial(run.seed), rank=1, seed=run.seed, targets=[])
        self._state = (trainable, OPTIMIZERS[run.optimizer].init(trainable))

    def weights(self) -> dict[str, Tensor]:
        return self._state[0]

    def update(self, step: int, grads: dict[str, Tensor], tokens: Tensor, scale: float) -> None:
        lr = torch.tensor(self._run.lr * scale)
        rates = {name: lr if is_inner(name) else lr * self._run.dense_lr for name in grads}
        self._state, _ = self._update(self._state, grads, rates)

    def bytes(self) -> dict[str, int]:
        return {"state": count_bytes(self._state[1])}

    def measures(self) -> dict[str, Any]:
        return {}


def packaged(
    method: str, low: list[nn.Parameter], rest: list[nn.Parameter], *, lr: float, rank: int, gap: int = 200
) -> torch.optim.Optimizer:
    """Return the optimizer of `method` with the settings of its README.

    The gradients of `low` are projected, with `gap` steps between new projections.
    """
    options: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "no_deprecation_warning": True}
    low_rank = {"params": low, "rank": rank, "update_proj_gap": gap, "proj_type": "std", "kind": "low"}
    dense = {"params": rest, "kind": "dense"}
    if method == "galore":
        from galore_torch import GaLoreAdamW  # noqa: PLC0415, an optional extra

        return GaLoreAdamW([dense, low_rank | {"scale": 0.25}], **options)
    from apollo_torch import APOLLOAdamW  # noqa: PLC0415, an optional extra

    return APOLLOAdamW([dense, low_rank | {"proj": "random", "scale_type": "channel", "scale": 1}], **options)


class Packaged:
    """Train the same weights with an optimizer of another package.

    Each matrix of a stack is one parameter there.
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
