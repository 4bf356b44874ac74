"""Find tensors that share memory, also inside a function that Dynamo traces."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dynlora_fn._core._torch import storage_key
from dynlora_fn._core._tree import inner_tensors


def sharing() -> Callable[[list[Tensor], list[Tensor]], Sequence[bool]]:
    """Return a function that finds tensors that share memory with others.

    ``share(tensors, others)`` returns a flag for each of `tensors`. Storages are compared, because `detach`, an index,
    a transposition and `unbind` return new tensors in the same memory. While Dynamo traces the function, it compares
    the fake tensors and adds nothing to the graph.
    """
    from dynlora_fn._core._torch import comptime  # noqa: PLC0415 (Dynamo takes a second to import)

    found: list[bool] = []  # passes the result from `compare`, which Dynamo calls, to `answer`

    def compare(context: Any) -> None:
        tensors, others = (
            [proxy.node.meta["example_value"] for proxy in context.get_local(name).as_proxy()]
            for name in ("tensors", "others")
        )
        found[:] = _share(tensors, others)

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def answer() -> tuple[bool, ...]:
        return tuple(found)

    def share(tensors: list[Tensor], others: list[Tensor]) -> Sequence[bool]:
        if not torch.compiler.is_dynamo_compiling():
            return _share(tensors, others)
        comptime(compare)
        result: tuple[bool, ...] = answer()
        return result

    return share


def _share(tensors: list[Tensor], others: list[Tensor]) -> list[bool]:
    keys = {storage_key(inner) for tensor in others for inner in inner_tensors(tensor)}
    return [any(storage_key(inner) in keys for inner in inner_tensors(tensor)) for tensor in tensors]
