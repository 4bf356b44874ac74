"""Print which features work together, from trying every cell.

A refusal is named by the library's table. ``python -m tests.support.feature_matrix`` writes the page, and a test
compares it with what happens.
"""

import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import dynlora_fn as dl
from dynlora_fn.bases._refusals import REFUSALS
from dynlora_fn.testing import Shape, low_rank, normal
from tests.support.paths import ROOT

PAGE = ROOT / "dynlora_fn" / "bases" / "FEATURES.md"
FORMATS = ("plain", "bfloat16", "int8", "float8", "nf4", "nvfp4", "mxfp4")
STORAGES = (("plain", None), *((base, "bfloat16") for base in FORMATS[1:]), ("int8", None))
LAYOUTS = ("whole", "deferred", "sharded", "sharded, deferred", "sharded with factors", "only `b` trained")
STACKS = ((), (2,))
X = normal(0, 2, 3, 64, dtype=torch.float32)
Params = dict[str, Any]


@cache
def params_of(base: str, residual: str | None, layout: str, stack: tuple[int, ...]) -> Params:
    """Return one weight by name. The group has one process, so a shard has all rows."""
    shape = Shape(64, 64, 4)
    params: Params = {"weight": low_rank(shape, stack, base_dtype=torch.float32, factor_dtype=torch.float32)}
    if layout == LAYOUTS[-1]:
        params = dl.init({"weight": params["weight"].base}, rank=4, seed=0, targets=["weight"], trained="b")
    if base != "plain":
        params = dl.bases.quantize(params, base, residual=residual)
    if "sharded" in layout:
        params = dl.parallel.shard(params, dist.group.WORLD)
    if "deferred" in layout:
        params = dl.bases.defer(params, vectors=8)
    return dl.parallel.shard_factors(params) if "factors" in layout else params


class Product(nn.Module):
    """Multiply by a weight, or by its transpose."""

    def __init__(self, weight: Tensor, *, is_transposed: bool):
        super().__init__()
        self.weight, self.is_transposed = nn.Parameter(weight), is_transposed

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT if self.is_transposed else x @ self.weight


def product_with(params: Params, *, is_transposed: bool) -> nn.Module:
    """Return a model with a weight of the shape of the parameter."""
    return Product(torch.zeros(params["weight"].shape), is_transposed=is_transposed)


def gradients(params: Params, model: nn.Module | None = None) -> Any:
    """Return the gradients of a product by the factors.

    Default None means a linear layer.
    """
    model = product_with(params, is_transposed=True) if model is None else model
    trainable, frozen = dl.partition(params)
    return dl.value_and_grad(lambda tree: dl.call(model, dl.combine(tree, frozen), X).square().mean())(trainable).grads


def gradients_of_transposed(params: Params) -> Any:
    """Return the gradients of a product with the transposed weight."""
    return gradients(params, product_with(params, is_transposed=False))


def switched(params: Params) -> Params:
    """Return the weight after a switch of one vector of each side."""
    return dl.switch(params, dl.schedules.every(1, count=1)(0, params)).params


def compiled(params: Params) -> None:
    """Compile a switch and gradients into one graph."""
    model = product_with(params, is_transposed=True)
    step = dl.compile_step(lambda tree: (gradients(switched(tree), model), None), donate=False, backend="aot_eager")
    step(params)


def mapped(params: Params) -> None:
    """Map over the members of a stack, or over inputs."""
    if params["weight"].seed.ndim:
        torch.vmap(lambda param, x: dl.linear(x, param))(params["weight"], X)
    else:
        torch.vmap(partial(dl.linear, param=params["weight"]))(X)


def tangent(params: Params) -> None:
    """Differentiate a product by its input in forward mode."""
    model = product_with(params, is_transposed=True)
    torch.func.jvp(lambda x: dl.call(model, params, x), (X,), (X,))


def updated(make: Callable[[], dl.optim.Transform], params: Params) -> None:
    """Update by an optimizer, whose state is projected."""
    optimizer, grads = make(), gradients(params)
    trainable, _ = dl.partition(params)
    opt_state = dl.project_optimizer_state(optimizer.init(trainable), dl.schedules.every(1, count=1)(0, params))
    dl.apply_updates(trainable, optimizer.update(grads, opt_state, trainable, lr=0.1).updates)


OPTIMIZERS: dict[str, Callable[[Params], Any]] = {
    "`optim.adamw`": partial(updated, dl.optim.adamw),
    "`optim.adamw` with 8-bit moments": partial(updated, partial(dl.optim.adamw, moments="8bit")),
    "`optim.sgd`": partial(updated, dl.optim.sgd),
    "`optim.lion`": partial(updated, dl.optim.lion),
    "`optim.muon`": partial(updated, dl.optim.muon),
}
FEATURES: dict[str, Callable[[Params], Any]] = {
    "gradients of a linear layer": gradients,
    "gradients of `x @ weight`": gradients_of_transposed,
    "`torch.vmap` over inputs, or over a stack": mapped,
    "`torch.func.jvp` by inputs": tangent,
    "`switch`": switched,
    "`merge`": dl.merge,
    "`decay`": lambda params: dl.decay(params, 0.1),
    "`optim.average`": lambda params: dl.optim.average(params, params, decay=0.9),
    "`optim.compensate`": lambda params: dl.optim.compensate(
        params, dict.fromkeys(params, torch.ones(params["weight"].shape)), lr=0.1
    ),
    "`switching.init_pool`": dl.switching.init_pool,
    "`resize`": lambda params: dl.resize(params, rank=2),
    "`bases.to_torchao`": dl.bases.to_torchao,
    "a compiled step": compiled,
    **OPTIMIZERS,
}
COMPILED = "a compiled step"


def reason(error: Exception) -> str:
    """Return the refusal that an error comes from, or its message.

    Refusals are rows of the library's table.
    """
    for refusal in REFUSALS.values():
        pattern = re.sub(r"\\\{.*?\\\}", ".*", re.escape(refusal.message))
        if re.fullmatch(pattern, str(error), re.DOTALL):
            return refusal.what
    return str(error)


def outcome(feature: str, *storage: Any) -> str:
    """Return "yes", or why a feature is refused for a weight.

    The weight is stored in some way.
    """
    try:
        params = params_of(*storage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FEATURES[feature](params)
    except (ValueError, NotImplementedError) as error:
        return reason(error)
    return "yes"


def outcomes(feature: str, layout: str) -> dict[tuple[Any, ...], str]:
    """Return the outcome for each format, residual and stack of one layout.

    Optimizers do not read bases, and compiling takes seconds. So both are tried with few of them.
    """
    few = {("plain", None), ("int8", "bfloat16"), *([("nf4", "bfloat16")] if feature == COMPILED else [])}
    storages = few if feature == COMPILED or feature in OPTIMIZERS else STORAGES
    return {
        (*storage, stack): outcome(feature, *storage, layout, stack)
        for storage, stack in product(storages, STACKS[:1] if feature == COMPILED else STACKS)
    }


def cell(found: dict[tuple[Any, ...], str], notes: list[str]) -> str:
    """Return the text of a cell, with the numbers of its notes.

    They are appended to `notes`.
    """
    reasons = sorted({why for why in found.values() if why != "yes"})
    if not reasons:
        return "yes"
    notes += [why for why in reasons if why not in notes]
    numbers = ", ".join(str(notes.index(why) + 1) for why in reasons)
    if "yes" not in found.values():
        return f"no ({numbers})"
    bad = {storage for storage, why in found.items() if why != "yes"}
    formats = [base for base in FORMATS if any(storage[0] == base for storage in bad)]
    stacks = {storage[2] for storage in bad}
    of_stacks = {(2,): "stacks of ", (): "single "}[next(iter(stacks))] if len(stacks) == 1 else ""
    is_all = len(formats) == len({storage[0] for storage in found})
    is_low_precision = formats == list(FORMATS[1:])
    which = "weights" if is_all else "low precision" if is_low_precision else ", ".join(formats)
    return f"not {of_stacks}{which} ({numbers})"


def rows(features: list[str], notes: list[str]) -> list[str]:
    """Return the rows of the table for some features."""
    return [
        f"| {feature} | {' | '.join(cell(outcomes(feature, layout), notes) for layout in LAYOUTS)} |"
        for feature in features
    ]


def page(features: list[str]) -> str:
    """Return the page, with the rows of some features."""
    notes: list[str] = []
    head = [f"| | {' | '.join(LAYOUTS)} |", f"|---|{'---|' * len(LAYOUTS)}"]
    table = [*head, *rows(features, notes)]
    return "\n".join([*INTRODUCTION, *table, "", *NOTES, *(f"{n}. {note}" for n, note in enumerate(notes, 1)), ""])


INTRODUCTION = [
    "# What works together",
    "",
    "`python -m tests.support.feature_matrix` generates this page. It tries every cell with all storage formats, for",
    "one weight and for a stack, in a group of one process. Optimizers and compiled steps are tried with few formats.",
    'A cell that is not "yes" says what is refused. The number in it leads to a note with the reason.',
    "",
]
NOTES = ["## Notes", ""]


def main() -> None:
    """Write the page."""
    dist.init_process_group(dl.parallel.register_gloo(), store=dist.HashStore(), rank=0, world_size=1)
    PAGE.write_text(page(list(FEATURES)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
