"""Every private name of torch that the library uses, checked on the version in `CHECKED`.

No other module imports a private name of torch, so a new version needs changes only here.
`tests/core/test_torch_names.py` fails with each name that has moved.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import FakeTensorMode as FakeTensorMode
from torch.distributed import _functional_collectives
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
from torch.utils._pytree import MappingKey as MappingKey
from torch.utils._pytree import keystr as keystr
from torch.utils._pytree import register_constant as register_constant
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_with_path as tree_map_with_path
from torch.utils._pytree import tree_unflatten as tree_unflatten

if TYPE_CHECKING:
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
    from torch._inductor.custom_graph_pass import get_hash_for_files as get_hash_for_files
    from torch._inductor.decomposition import select_decomp_table as select_decomp_table

CHECKED = "2.13.0"
# Imported at their first use: Inductor takes a second to import.
LAZY = {
    "CustomGraphPass": "torch._inductor.custom_graph_pass",
    "get_hash_for_files": "torch._inductor.custom_graph_pass",
    "select_decomp_table": "torch._inductor.decomposition",
}
# Looked up at their first use, by their full names.
USED = (
    "torch._C._distributed_c10d.ProcessGroup._device_types",
    "torch._C._distributed_c10d._resolve_process_group",
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch.get_unwrapped",
    "torch._C._functorch.is_batchedtensor",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._dynamo.config.trace_autograd_ops",
    "torch._grouped_mm",
    "torch._inductor.list_mode_options",
    "torch._ops.OpOverload",
    "torch._ops.OpOverloadPacket",
    "torch.Tensor._make_wrapper_subclass",
    "torch.distributed.ProcessGroupGloo._Options._devices",
    "torch.distributed.ProcessGroupGloo._Options._threads",
    "torch.distributed.ProcessGroupGloo._Options._timeout",
    "torch.ops._c10d_functional.all_gather_into_tensor",
    "torch.ops._c10d_functional.all_reduce",
    "torch.ops._c10d_functional.reduce_scatter_tensor",
    "torch.ops._c10d_functional.wait_tensor",
    "torch.ops.aten._unsafe_view",
)


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


ConvNd = _ConvNd
functional_collectives = _functional_collectives
# Functional collectives. The operations are called directly because torch's wrappers fail under `torch.func`.
C10D: Any = torch.ops._c10d_functional
OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
grouped_mm: Callable[..., Any] = torch._grouped_mm
make_wrapper_subclass: Callable[..., Any] = torch.Tensor._make_wrapper_subclass
are_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
is_functorch_wrapped: Callable[[torch.Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def resolve_process_group(name: str) -> "torch.distributed.ProcessGroup":
    """Return the process group with this name."""
    group: torch.distributed.ProcessGroup = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    return group


def device_of_collectives(group: "torch.distributed.ProcessGroup") -> torch.device:
    """Return a device whose tensors a group can send: the CPU if it can, else the current one of its kind."""
    devices: list[torch.device] = group._device_types
    return torch.device("cpu") if torch.device("cpu") in devices else devices[0]


def gloo_with_one_thread(
    store: Any, process: int, world_size: int, timeout: timedelta
) -> "torch.distributed.ProcessGroupGloo":
    """Return a gloo backend with one worker thread, on the interfaces that torch uses by default."""
    gloo: Any = torch.distributed.ProcessGroupGloo
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]
    options._threads, options._timeout = 1, timeout
    backend: torch.distributed.ProcessGroupGloo = gloo(store, process, world_size, options)
    return backend


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether `torch.vmap` maps over a tensor, below other transforms too.

    Dynamo cannot trace the question. While it traces, the answer is False.
    """
    functorch = torch._C._functorch
    if torch.compiler.is_dynamo_compiling():
        return False
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def trace_autograd_ops() -> AbstractContextManager[Any]:
    """Let Dynamo trace `torch.autograd.grad` inside a compiled function."""
    patch: AbstractContextManager[Any] = torch._dynamo.config.patch(trace_autograd_ops=True)
    return patch


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """Return the Inductor options that a mode of `torch.compile` sets."""
    options: dict[str, Any] = torch._inductor.list_mode_options(mode)
    return options
