"""Private names of torch that the library uses, checked on `CHECKED`.

Only this module imports private names of torch, so a new version needs changes only here.
`tests/core/test_torch_names.py` fails with each name that has moved.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from importlib import import_module
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import DynamicOutputShapeException as DynamicOutputShapeException
from torch._subclasses import FakeTensor as FakeTensor
from torch._subclasses import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException
from torch.distributed import _functional_collectives
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass
from torch.utils._pytree import MappingKey as MappingKey
from torch.utils._pytree import is_constant_class as is_constant_class
from torch.utils._pytree import keystr as keystr
from torch.utils._pytree import register_constant as register_pytree_constant
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_with_path as tree_map_with_path
from torch.utils._pytree import tree_unflatten as tree_unflatten

if TYPE_CHECKING:
    from torch._dynamo.comptime import comptime as comptime
    from torch._dynamo.exc import FailOnRecompileLimitHit as FailOnRecompileLimitHit
    from torch._inductor.custom_graph_pass import CustomGraphPass as CustomGraphPass
    from torch._inductor.custom_graph_pass import get_hash_for_files as get_hash_for_files
    from torch._inductor.decomposition import select_decomp_table as select_decomp_table

CHECKED = "2.13.0"


def is_older_than(major: int, minor: int) -> bool:
    """Return whether the installed torch is older than a version.

    Every difference between versions that the library handles is at a call of this function.
    """
    return tuple(map(int, torch.__version__.split(".")[:2])) < (major, minor)


# Imported at their first use: Dynamo and Inductor take a second each to import.
LAZY = {
    "comptime": "torch._dynamo.comptime",
    "FailOnRecompileLimitHit": "torch._dynamo.exc",
    "CustomGraphPass": "torch._inductor.custom_graph_pass",
    "get_hash_for_files": "torch._inductor.custom_graph_pass",
    "select_decomp_table": "torch._inductor.decomposition",
}
# Looked up at their first use, by their full names.
USED = (
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._after_autograd_keyset",
    "torch._C._distributed_c10d.ProcessGroup._device_types",
    "torch._C._distributed_c10d._resolve_process_group",
    "torch._C._are_functorch_transforms_active",
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "torch._C._functorch.TransformType",
    "torch._C._functorch.get_interpreter_stack",
    "torch._C._functorch.get_unwrapped",
    "torch._C._functorch.is_batchedtensor",
    "torch._C._functorch.is_dead_tensor_wrapper",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch._C._functorch.maybe_get_level",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._is_fwd_grad_enabled",
    "torch._C._nn.flatten_dense_tensors",
    "torch._C._nn.unflatten_dense_tensors",
    "torch._dynamo.config.trace_autograd_ops",
    "torch._foreach_add",
    "torch._foreach_add_",
    "torch._foreach_clamp_min",
    "torch._foreach_div",
    "torch._foreach_div_",
    "torch._foreach_mul",
    "torch._foreach_mul_",
    "torch._foreach_neg",
    "torch._foreach_sign",
    "torch._foreach_sqrt",
    "torch._foreach_sub",
    "torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter",
    "torch._functorch.utils.unwrap_dead_wrappers",
    "torch._guards.CompileContext.try_get",
    "torch._grouped_mm",
    "torch._inductor.list_mode_options",
    "torch._inductor.loop_body.LoopBody.get_read_expr",
    "torch._ops.OpOverload",
    "torch._ops.OpOverloadPacket",
    "torch.Tensor._make_wrapper_subclass",
    "torch.UntypedStorage._cdata",
    "torch.autograd.forward_ad._current_level",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch.compiler._is_compiling_flag",
    "torch.distributed.ProcessGroupGloo._Options._devices",
    "torch.distributed.ProcessGroupGloo._Options._threads",
    "torch.distributed.ProcessGroupGloo._Options._timeout",
    "torch.nn.utils.parametrize._cache",
    "torch.nn.utils.parametrize._cache_enabled",
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
NormBase = _NormBase
functional_collectives = _functional_collectives
# Functional collectives. The library calls these operations because torch's wrappers fail under `torch.func`.
C10D: Any = torch.ops._c10d_functional
OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
# Each applies one operation to every tensor of a list. The bits are the same as from one call for each tensor.
foreach_add: Callable[..., Sequence[torch.Tensor]] = torch._foreach_add
foreach_add_: Callable[..., None] = torch._foreach_add_
foreach_clamp_min: Callable[..., Sequence[torch.Tensor]] = torch._foreach_clamp_min
foreach_div: Callable[..., Sequence[torch.Tensor]] = torch._foreach_div
foreach_div_: Callable[..., None] = torch._foreach_div_
foreach_mul: Callable[..., Sequence[torch.Tensor]] = torch._foreach_mul
foreach_mul_: Callable[..., None] = torch._foreach_mul_
foreach_neg: Callable[..., Sequence[torch.Tensor]] = torch._foreach_neg
foreach_sign: Callable[..., Sequence[torch.Tensor]] = torch._foreach_sign
foreach_sqrt: Callable[..., Sequence[torch.Tensor]] = torch._foreach_sqrt
foreach_sub: Callable[..., Sequence[torch.Tensor]] = torch._foreach_sub
flatten_tensors: Callable[[list[torch.Tensor]], torch.Tensor] = torch._C._nn.flatten_dense_tensors
unflatten_tensors: Callable[..., Sequence[torch.Tensor]] = torch._C._nn.unflatten_dense_tensors
grouped_mm: Callable[..., Any] = torch._grouped_mm
make_wrapper_subclass: Callable[..., Any] = torch.Tensor._make_wrapper_subclass
unsafe_view: Callable[..., Any] = torch.ops.aten._unsafe_view
are_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
set_forward_enabled: Callable[[bool], AbstractContextManager[None]] = torch.autograd.forward_ad._set_fwd_grad_enabled
is_forward_enabled: Callable[[], bool] = torch._C._is_fwd_grad_enabled
is_batched_gradient: Callable[[torch.Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
is_functorch_wrapped: Callable[[torch.Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor


def register_constant(kind: type) -> None:
    """Register a type as a pytree node without leaves.

    ``torch.load(weights_only=True)`` then accepts the type too.
    """
    register_pytree_constant(kind)
    torch.serialization.add_safe_globals([kind])


def let_dynamo_replace() -> None:
    """Let Dynamo of torch before 2.13 trace `_replace` of the library's tuples.

    `_replace` calls `_make`, which calls ``tuple.__new__``. From that call Dynamo of torch 2.11 returns an empty tuple,
    and cannot pass it to a function in the graph. So `_make` calls the class instead, which Dynamo traces correctly.
    Tuples of other packages are not changed.
    """
    if is_older_than(2, 13):
        for kind in tuple.__subclasses__():
            if kind.__module__.startswith("dynlora_fn.") and hasattr(kind, "_make"):
                kind._make = classmethod(lambda cls, values: cls(*values))


def resolve_process_group(name: str) -> "torch.distributed.ProcessGroup":
    """Return the process group with this name."""
    group: torch.distributed.ProcessGroup = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    return group


def device_of_collectives(group: "torch.distributed.ProcessGroup") -> torch.device:
    """Return a device whose tensors a process group can send.

    This is the CPU if the group can send from it. Otherwise it is the current device of the group's device type.
    """
    devices: list[torch.device] = group._device_types
    return torch.device("cpu") if torch.device("cpu") in devices else devices[0]


def gloo_with_one_thread(
    store: Any, process: int, world_size: int, timeout: timedelta
) -> "torch.distributed.ProcessGroupGloo":
    """Return a gloo backend with one worker thread, on torch's default interfaces.

    The environment variable ``GLOO_SOCKET_IFNAME`` selects other interfaces, as in torch.
    """
    gloo: Any = torch.distributed.ProcessGroupGloo
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options = gloo._Options()
    options._devices = [gloo.create_device(interface=name) for name in interfaces] or [gloo.create_default_device()]
    options._threads, options._timeout = 1, timeout
    backend: torch.distributed.ProcessGroupGloo = gloo(store, process, world_size, options)
    return backend


def is_mapped(tensor: torch.Tensor) -> bool:
    """Return whether `torch.vmap` maps over a tensor, at any level of transforms.

    While Dynamo traces, the result is False, because Dynamo cannot trace this check.
    """
    functorch = torch._C._functorch
    if torch.compiler.is_dynamo_compiling():
        return False
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def is_of_transform(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is wrapped by a transform of `torch.func`.

    A wrapped tensor must not be used after the transform.
    """
    is_wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return is_wrapped


def can_read(tensor: torch.Tensor) -> bool:
    """Return whether the values of a tensor can be read without waiting.

    They cannot be read inside a trace or a transform. On another device than the CPU, the host would have to wait.
    """
    return can_read_all([tensor])


def can_read_all(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether `can_read` is true for every tensor."""
    if torch.compiler.is_compiling() or not set(map(type, tensors)) <= {torch.Tensor}:
        return False
    if not all(map(attrgetter("is_cpu"), tensors)) or any(map(is_functorch_wrapped, tensors)):
        return False
    return _get_current_dispatch_mode() is None


def is_in_dynamo() -> bool:
    """Return whether this code runs inside Dynamo, while it compiles a function."""
    return torch._guards.CompileContext.try_get() is not None


@contextmanager
def own_parametrization_cache() -> Iterator[None]:
    """Replace the cache of `parametrize.cached()`, which belongs to other calls."""
    if not parametrize._cache_enabled:
        yield
        return
    outside, parametrize._cache = parametrize._cache, {}
    try:
        yield
    finally:
        parametrize._cache = outside


def running_checkpoint() -> Any:
    """Return the hook of the innermost running `torch.utils.checkpoint`, or None."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    is_checkpoint = hooks is not None and hooks[0].__qualname__.startswith("_checkpoint_hook.")
    return hooks[0] if is_checkpoint else None


def are_immediate(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether operations on the tensors run at once.

    Then nothing traces, records, maps or differentiates them, and a function may compute its result block by block in
    newly allocated memory. The result is False for tensor subclasses, and on devices other than the CPU and CUDA.
    """
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    if is_transformed() or forward_levels() > 0 or not set(map(type, tensors)) <= {torch.Tensor, torch.nn.Parameter}:
        return False
    if torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), tensors)):
        return False
    if not all(map(attrgetter("is_cpu"), tensors)) and not all(tensor.is_cpu or tensor.is_cuda for tensor in tensors):
        return False
    return set(map(attrgetter("layout"), tensors)) <= {torch.strided} and not any(map(is_functorch_wrapped, tensors))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def forward_levels() -> int:
    """Return how many levels of forward mode are active.

    Each nested call of `torch.func.jvp` is a level, and so is a dual level of `torch.autograd.forward_ad`.
    """
    functorch = torch._C._functorch
    levels = functorch.get_interpreter_stack()
    nested = sum(level.key() == functorch.TransformType.Jvp for level in levels) if levels else 0
    return max(nested, torch.autograd.forward_ad._current_level + 1)


def is_tracked(tensor: torch.Tensor) -> bool:
    """Return whether a tensor requires a gradient or has a tangent.

    All levels of nested transforms are checked. While Dynamo traces, only gradients of the innermost level are.
    """
    if torch.compiler.is_dynamo_compiling():
        return tensor.requires_grad and torch.is_grad_enabled()
    if torch.is_grad_enabled() and _requires_grad(tensor):
        return True
    return forward_levels() > 0 and torch._C._is_fwd_grad_enabled() and _has_tangent(tensor)


def _requires_grad(tensor: torch.Tensor) -> bool:
    functorch = torch._C._functorch
    tensor = without_dead_levels(tensor)
    if tensor.requires_grad or not functorch.is_functorch_wrapped_tensor(tensor):
        return tensor.requires_grad
    return _requires_grad(functorch.get_unwrapped(tensor))


def _has_tangent(tensor: torch.Tensor) -> bool:
    functorch = torch._C._functorch
    tensor = without_dead_levels(tensor)
    if functorch.peek_interpreter_stack() is None:
        return _is_dual(tensor)
    # A level sees only the tangents of that level, so the lower levels are checked one after the other.
    interpreter = torch._functorch.pyfunctorch.retrieve_current_functorch_interpreter()
    if interpreter.key() == functorch.TransformType.Jvp and _is_dual(tensor):
        return True
    if functorch.maybe_get_level(tensor) == interpreter.level():
        tensor = functorch.get_unwrapped(tensor)
    with interpreter.lower():
        return _has_tangent(tensor)


def _is_dual(tensor: torch.Tensor) -> bool:
    dual: Any = torch.autograd.forward_ad.unpack_dual(tensor, level=0)  # type: ignore[no-untyped-call]
    return dual.tangent is not None


def without_dead_levels(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without the wrappers of transforms that have ended.

    The tensors that a pullback has saved may have such wrappers.
    """
    functorch: Any = torch._C._functorch
    while functorch.is_dead_tensor_wrapper(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """Return whether a transform of `torch.func` is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_traced() -> bool:
    """Return whether Dynamo, `torch.export` or `make_fx` is tracing."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None


def apply_function(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call ``function.apply(*args)``, faster. Pass all arguments of `forward`.

    `apply` reads the signature of `forward` at each call to fill in defaults, which takes as long as a small product.
    Outside transforms this function skips that.
    """
    if are_transforms_active():
        return function.apply(*args)  # type: ignore[no-untyped-call]
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def is_differentiated(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Return whether an operation on these tensors may be differentiated or mapped."""
    if are_transforms_active() or forward_levels() > 0:
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_recorded(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether the current level of differentiation records an operation.

    Call this in the autograd kernel of the operation, with its tensors. Every level of reverse and forward mode calls
    that kernel.
    """
    is_forward = torch._C._is_fwd_grad_enabled()
    return any(
        (torch.is_grad_enabled() and tensor.requires_grad)
        or (is_forward and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None)  # type: ignore[no-untyped-call]
        for tensor in tensors
    )


def call_below_autograd(operation: Any, keys: Any, *args: Any) -> Any:
    """Call an operation from its autograd kernel, without recording it.

    `keys` are the dispatch keys that the kernel received.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operation.redispatch(keys & torch._C._after_autograd_keyset, *args)


def trace_autograd_ops() -> AbstractContextManager[Any]:
    """Let Dynamo trace `torch.autograd.grad` inside a compiled function."""
    patch: AbstractContextManager[Any] = torch._dynamo.config.patch(trace_autograd_ops=True)
    return patch


@contextmanager
def reads_of_mutated_buffers() -> Iterator[None]:
    """Let Inductor compile loops that read a tensor after it was written in place.

    For CPUs, torch 2.13 and 2.14 raise a KeyError instead (pytorch#196570). They look for the buffer under the name of
    the write, to store it in a local buffer. The loops read it under another name, and without an index it stays where
    it is.
    """
    loop_body = import_module("torch._inductor.loop_body").LoopBody
    get_read_expr = loop_body.get_read_expr

    def expression_or_none(self: Any, buffer: str) -> Any:
        try:
            return get_read_expr(self, buffer)
        except KeyError:
            return None

    loop_body.get_read_expr = expression_or_none
    try:
        yield
    finally:
        loop_body.get_read_expr = get_read_expr


@contextmanager
def compiling() -> Iterator[None]:
    """Let `torch.compiler.is_compiling` return True, as it does while Dynamo traces."""
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def storage_key(tensor: torch.Tensor) -> int:
    """Return an integer that is equal for two tensors if they share a storage.

    The address of the storage would not do, since fake tensors have none.
    """
    key: int = tensor.untyped_storage()._cdata
    return key


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """Return the Inductor options that a mode of `torch.compile` sets."""
    options: dict[str, Any] = torch._inductor.list_mode_options(mode)
    return options
