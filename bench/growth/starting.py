"""Rows of `init`, draws from the basis, folds and switches."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dynlora_fn as dl
from bench.growth.models import fresh, in_peft, llama
from bench.growth.row import Contender, Row, at_most_times, grows_at_most, result_of
from models.llama import TARGETS

_STARTS = ("switchlora", "lora")
_RANKS = (8, 32)
_COUNTS = (8, 32, 33)
_STACK = 4  # number of weights in the stack that is folded into
_LENGTH = 4096  # length of a drawn vector


def init(rank: int, start: dl.switching.Start, dtype: torch.dtype = torch.float32) -> Callable[[int], Contender]:
    def make(millions: int) -> Contender:
        model = llama(millions, dtype)
        return Contender(partial(dl.init, model, rank=rank, seed=0, targets=TARGETS, start=start))

    return make


def init_without_copies(rank: int) -> Callable[[int], Contender]:
    """Measure `init` in the model's memory, with the start and the form that PEFT has."""

    def make(millions: int) -> Contender:
        model = llama(millions)
        settings = {"targets": TARGETS, "start": "lora", "stack": False, "copy": False}
        return Contender(partial(dl.init, rank=rank, seed=0, **settings), lambda: (fresh(model),))

    return make


def peft_init(rank: int, dtype: torch.dtype = torch.float32) -> Callable[[int], Contender]:
    def make(millions: int) -> Contender:
        model = llama(millions, dtype)
        return Contender(partial(in_peft, rank=rank), lambda: (fresh(model),))

    return make


def draw(numbers: int) -> Contender:
    seed, none, indices = torch.tensor(0), torch.arange(0), torch.arange(numbers // _LENGTH)
    part = dl.switching.BasisSlice(seed, none, indices, (8, _LENGTH), 8, "switchlora", torch.float32)
    return Contender(partial(dl.switching.basis_vectors, [part]))


def rand(numbers: int) -> Contender:
    return Contender(partial(torch.rand, numbers // _LENGTH, _LENGTH))


def low_rank(width: int, rank: int) -> dict[str, Any]:
    """Return a stack of square weights."""
    return dl.init({"w": torch.randn(_STACK, width, width)}, rank=rank, seed=0, targets=["w"])


def factors(width: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(_STACK, width, count), torch.randn(_STACK, count, width)


def fold(count: int) -> Callable[[int], Contender]:
    def make(width: int) -> Contender:
        return Contender(partial(dl.switching.fold, low_rank(width, count)["w"], *factors(width, count)))

    return make


def switch(count: int) -> Callable[[int], Contender]:
    def make(width: int) -> Contender:
        params = low_rank(width, count)
        plan = dl.schedules.every(1)(1, params)
        return Contender(partial(dl.switch, params, plan, incoming=dl.candidates(params, plan)))

    return make


def baddbmm(count: int) -> Callable[[int], Contender]:
    def make(width: int) -> Contender:
        base = torch.randn(_STACK, width, width)
        return Contender(partial(torch.baddbmm, base, *factors(width, count), alpha=1 / count))

    return make


_INIT = {f"{start}, rank {rank}": init(rank, start) for start in _STARTS for rank in _RANKS}
_IN_PLACE = {f"lora, rank {rank}, without copies": init_without_copies(rank) for rank in _RANKS}
_INIT_PEAKS = {
    f"{start}, {name}": init(8, start, dtype)
    for start in _STARTS
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
}
ROWS = {
    "init": Row(
        "init of a llama",
        "million parameters",
        (8, 100, 290),
        (1, 2),
        {**_INIT, **_IN_PLACE, **{f"PEFT, rank {rank}": peft_init(rank) for rank in _RANKS}},
        goals=(
            *(at_most_times(3, f"{start}, rank {rank}", f"PEFT, rank {rank}") for start in _STARTS for rank in _RANKS),
            *(at_most_times(3, f"lora, rank {rank}, without copies", f"PEFT, rank {rank}") for rank in _RANKS),
            *(grows_at_most(1.1, name) for name in _INIT),
        ),
        rounds=3,
    ),
    "init_memory": Row(
        "peak of init of a llama, rank 8, beyond the model",
        "million parameters",
        (8, 100, 290),
        (1, 2),
        {**_INIT_PEAKS, "PEFT, float32": peft_init(8), "PEFT, bfloat16": peft_init(8, torch.bfloat16)},
        kind="peak",
        goals=tuple(at_most_times(1.1, name, result_of(name)) for name in _INIT_PEAKS),
    ),
    "draws": Row(
        "vectors from a basis",
        "numbers",
        (2**20, 2**22, 2**24),
        (2**14, 2**16),
        {"basis_vectors": draw, "torch.rand": rand},
        goals=(at_most_times(3, "basis_vectors", "torch.rand"), grows_at_most(1.1, "basis_vectors")),
    ),
    "fold": Row(
        f"vectors folded into {_STACK} weights",
        "width",
        (512, 1024, 2048),
        (64, 128),
        {
            **{f"fold {count}": fold(count) for count in _COUNTS},
            **{f"switch {count} on each side": switch(count) for count in _COUNTS},
            **{f"baddbmm {count}": baddbmm(count) for count in (*_COUNTS, *(2 * count for count in _COUNTS))},
        },
        goals=(
            *(at_most_times(2, f"fold {count}", f"baddbmm {count}") for count in _COUNTS),
            *(at_most_times(2, f"switch {count} on each side", f"baddbmm {2 * count}") for count in _COUNTS),
        ),
    ),
}
