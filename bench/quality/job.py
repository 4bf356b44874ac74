"""Share text, model and compiled functions between the runs of one size.

Every method starts from the gradients of dense weights. Low-rank methods project them onto their factors. One compiled
function can therefore compute the gradients for all methods, ranks and settings, with the same rounding.
"""

from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from bench.quality.runs import HeldOut, OptimizerSettings, RunSize
from models import corpus as text
from models.llama import Llama, init_weights

WINDOWS: dict[HeldOut, int] = {"validation": 128, "test": 512}
CLIP = 1.0
_HEAD_MOMENTUM = 0.9  # of SCALE, as in arXiv:2506.16659


def is_inner(name: str) -> bool:
    """Return whether the low-rank methods train factors of this weight."""
    return ".attention." in name or ".feed_forward." in name


@cache
def optimizer_of(settings: OptimizerSettings) -> dl.optim.Transform:
    """Build the optimizer of a run.

    Norms always have AdamW with float32 moments. Embedding and head have it too, or SCALE (arXiv:2506.16659).
    """
    options = {"betas": (0.9, settings.beta2)}
    rest = dl.optim.adamw(**options)
    if settings.optimizer == "adamw" and settings.moments == "float32" and settings.dense_optimizer == "adamw":
        return rest
    muon = {"coefficients": settings.coefficients, "coupled": settings.coupled}
    is_muon = settings.optimizer == "muon"
    inner = (dl.optim.muon if is_muon else dl.optim.adamw)(**(muon if is_muon else options), moments=settings.moments)
    transforms, labels = {"inner": inner, "rest": rest}, {}
    if settings.dense_optimizer == "scale":
        transforms["embedding"] = dl.optim.normalized_sgd(axis=-2)
        transforms["head"] = dl.optim.normalized_sgd(momentum=_HEAD_MOMENTUM)
        labels = {"embedding.weight": "embedding", "head.weight": "head"}
    return dl.optim.multi_transform(transforms, lambda name, _: "inner" if is_inner(name) else labels.get(name, "rest"))


class Job:
    """The data, model and compiled functions of one size."""

    def __init__(self, size: RunSize, corpus: text.Corpus, *, backend: str = "inductor", device: str = "cpu"):
        self.size, self.corpus, self._backend, self.device = size, corpus, backend, device
        self.model = Llama(size.config()).to(device)
        self._updates: dict[tuple[OptimizerSettings, int | None, str, str], Callable[..., Any]] = {}

    def initial(self, seed: int) -> Llama:
        """Build a model with initial weights from a seed."""
        return init_weights(Llama(self.size.config()), seed).to(self.device)

    def batch(self, seed: int, step: int) -> Tensor:
        """Return the tokens of a step, which are the same for every method."""
        window = self.size.length + 1
        return text.batch(self.corpus.train, (self.size.batch,), window=window, seed=seed, step=step).to(self.device)

    def loss(self, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Return the cross entropy of the next tokens."""
        logits = dl.call(self.model, weights, tokens[:, :-1])
        return cross_entropy(logits.flatten(0, -2), tokens[:, 1:].flatten())

    @cached_property
    def gradients(self) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """The compiled function of loss and gradients.

        Its arguments are the dense weights by name, and the tokens.
        """
        value_and_grad = dl.value_and_grad(self.loss)

        def gradients(weights: Any, tokens: Tensor) -> tuple[Tensor, Any]:
            return tuple(value_and_grad(weights, tokens))  # type: ignore[return-value]

        return torch.compile(gradients, fullgraph=True, dynamic=False, backend=self._backend)

    def held_out(self, kind: HeldOut) -> Tensor:
        """Return the tokens of the validation text or of the test text.

        The test text, which is not used for tuning, is the sources of torch.
        """
        return self.corpus.validation if kind == "validation" else self._sources_of_torch

    @cached_property
    def _sources_of_torch(self) -> Tensor:
        documents = text.python_sources(Path(torch.__file__).parent)
        return torch.from_numpy(text.byte_tokenizer().encode(documents).copy())

    @torch.no_grad()
    def held_out_loss(self, weights: Mapping[str, Tensor], kind: HeldOut) -> float:
        """Return the mean loss on a held-out text."""
        window, batches = self.size.length + 1, WINDOWS[kind] // 16
        windows = text.validation_batches(self.held_out(kind), batches, 16, window=window)
        return torch.stack([self.loss(weights, tokens.to(self.device)) for tokens in windows]).mean().item()

    def update(
        self, settings: OptimizerSettings, rank: int | None = None, trained: str = "both", factors: str = "float32"
    ) -> Callable[..., Any]:
        """Return the compiled function that clips gradients and updates weights.

        Its signature is ((trainable, opt_state), grads, rates) -> ((trainable, opt_state), norm). `rates` has for each
        name one rate, a tensor with a rate for each matrix of a stack, or `Factors` with a rate for each side.
        """
        key = settings, rank, trained, factors
        if key not in self._updates:
            self._updates[key] = self._updater(optimizer_of(settings))
        return self._updates[key]

    def _updater(self, optimizer: dl.optim.Transform) -> Callable[..., Any]:
        def update(state: Any, grads: Any, rates: Any) -> tuple[Any, Tensor]:
            trainable, opt_state = state
            grads, norm = dl.optim.clip_by_global_norm(grads, CLIP)
            several = {name: rate for name, rate in rates.items() if isinstance(rate, dl.Factors) or rate.ndim}
            lr = {name: 1.0 if name in several else rate for name, rate in rates.items()}
            updates, opt_state = optimizer.update(grads, opt_state, trainable, lr=lr)
            updates |= {name: tree_map(torch.mul, updates[name], rate) for name, rate in several.items()}
            return (dl.apply_updates(trainable, updates), opt_state), norm

        return dl.compile_step(update, backend=self._backend)


def rounded(grads: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Round gradients as an all-reduce in another dtype does."""
    to = getattr(torch, dtype)
    return tree_map(lambda leaf: leaf.to(to).to(leaf.dtype), grads)
