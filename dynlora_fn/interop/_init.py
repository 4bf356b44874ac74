"""Create low-rank parameters from a model."""

from collections.abc import Mapping
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from dynlora_fn._core._check import check_choice, check_integer
from dynlora_fn._core._progress import Progress, check_progress, reporter
from dynlora_fn._core._stacking import Stack, find_stacks
from dynlora_fn._core._tree import inner_tensors
from dynlora_fn._core._types import Param
from dynlora_fn.bases._residual import Device, ResidualKind, check_residual
from dynlora_fn.bases._torchao_tensors import is_torchao
from dynlora_fn.interop._arguments import (
    check_fused,
    check_model,
    check_settings,
    check_targets,
    check_weights,
)
from dynlora_fn.interop._make import Settings, Task, make, together
from dynlora_fn.interop._parameters import Parameters, changed_buffers, is_opaque, parameters_of, read_weight
from dynlora_fn.interop._targets import Alphas, Rank, Targets, select
from dynlora_fn.parallel._group import Group
from dynlora_fn.switching._weight import Start, Vectors

Trained: TypeAlias = Literal["both", "b"]


def init(
    model: nn.Module | Mapping[str, Tensor],
    *,
    rank: Rank,
    alpha: Alphas = 1,
    seed: int,
    targets: Targets,
    start: Start = "switchlora",
    trained: Trained = "both",
    fused: Mapping[str, int | tuple[int, int]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
    base_dtype: torch.dtype | None = None,
    base: object = None,
    residual: ResidualKind = "bfloat16",
    residual_device: Device = None,
    dtype: torch.dtype = torch.float32,
    stack: bool = True,
    group: "Group | None" = None,
    copy: bool = True,
    progress: Progress | None = None,
) -> dict[str, Param]:
    """Create parameters whose weights equal the model's.

    Every weight stays the same to the precision of its base::

        base = weight - alpha / rank * b @ a

    By default both factors are drawn from the basis, as in arXiv:2406.06564, section 3.

    With ``trained="b"`` only `b` is trained, as in RSO (arXiv:2502.07222), and starts with zeros. The rows of `a` are
    orthogonal and come from the basis seed. Only a switch replaces them, so `partition` puts them into the frozen tree,
    and gradients and optimizer state do not contain them. At twice the rank, gradients and state are about as large as
    with both sides. For a positive alpha, with orthonormal rows of Q::

        a = sqrt(rank / alpha) * Q,     alpha / rank * b @ a = sqrt(alpha / rank) * b @ Q
        adamw:  weight -= lr * sqrt(alpha / rank) * direction_b @ Q,     entries of direction_b near 1 or -1
        muon:   weight -= lr * sqrt(max(out, in)) * orthogonalize(direction_b) @ Q

    A step of `adamw` therefore has a Frobenius norm near ``lr * sqrt(alpha * out)`` at every rank. With ``rank = in``,
    `muon` takes its step for the dense weight.

    A target is a matrix (out, in). A target with more axes is a stack of matrices (experts), or the weight of a
    convolution, which becomes a matrix (out, in * prod(kernel)).

    A parameter with ``requires_grad=False`` that is not a target stays frozen, as in `torch.optim`, and so do integers.
    To train one, call its `requires_grad_` first. A frozen parameter that is a target becomes low-rank, as in PEFT.

    Args:
        model: The module, or its parameters by name. It is not changed. Targets may be torchao's tensors, as its
            ``quantize_`` creates them. They stay in their format, and with ``start="lora"`` their codes do not change.
            Torchao's tensors that are not targets become dense.
        rank: The rank of the factors, from 1 to min(out, in) of every target. A dict maps names or globs to ranks, and
            the first entry that matches a target counts. A function maps the name and the shape (out, in) of a target
            to its rank: ``lambda name, shape: min(16, *shape)`` clips it.
        alpha: The alpha of the weights, which scales their products as in PEFT: a number that is not 0, or a dict or
            function, as for `rank`. With an alpha other than 1 the factors are `ScaledFactors`, and at the same rate an
            optimizer such as AdamW moves the weight alpha times as far. With ``start="lora"`` and PEFT's rank and
            alpha, training equals PEFT's. Vectors of "switchlora" are divided by ``sqrt(alpha)`` on both sides, so the
            product has the same size for every alpha.
        seed: The seed of the bases. Each weight derives its basis seed from this seed and its name.
        targets: The parameters that become low-rank. All others are full-rank. Pass names, globs, types of modules, or
            a predicate of name and tensor. A type selects the matrices that are direct parameters of its modules. A
            tied parameter is a target under any of its names. Each entry must select a parameter. An empty list selects
            none.
        start: "switchlora" draws both factors, with the bounds of `basis_bounds`. "lora" draws `a` as `nn.Linear` does
            and sets ``b = 0`` (arXiv:2106.09685). With ``trained="b"`` it has no effect.
        trained: The factors that are trained, "both" or only "b". With "b" they are `OneSidedFactors`, and
            `shard_factors`, `init_pool` and states of other libraries are not supported.
        fused: The number of equal parts in a fused target, by name or glob. The parts become a stack with factors for
            each. Write 3 for queries, keys and values above each other (3 * out, in), and ``(3, -1)`` for columns
            side by side. Default None means that no target is fused.
        weights: The weights by name, to use instead of those in the module, which may then be on the meta device. They
            are read one stack at a time, in the dtypes of the module. Saved buffers among them, such as running
            statistics, are in the result if they differ from those in the module. Default None uses those in the
            module.
        base_dtype: The dtype of the bases. Default None means the dtype of each weight.
        base: The format of bases in low precision, as in `quantize`. Default None means dense bases.
        residual: The residual of a base in low precision, as in `quantize`.
        residual_device: The device of the residuals, as in `quantize`.
        dtype: The dtype of the factors.
        stack: Whether weights that repeat over layers become one parameter, such as ``layers.*.q.weight``.
        group: The process group that shards the bases, as in `shard`. Each weight is sharded before the next is read,
            so a process stores only its rows and one more base. Default None means that bases are not sharded.
        copy: Whether all values are copied. False shares memory with the model, or with `weights`, where a tensor
            already has the values and the dtype: for full-rank parameters, and with ``start="lora"`` or ``trained="b"``
            for dense bases. Stacks are always copied. Writing into shared memory, as `compile_step` does with
            ``donate=True``, changes the model.
        progress: A function that is called as ``progress(done, total)`` with the bytes of the model that are done and
            in total. Default None means no reports.

    Returns:
        A dict by name: a `LowRank` for each target, and a tensor for every other parameter, or a `FrozenTensor` for one
        that is not trained. No tensor requires a gradient. A buffer that `weights` changes is a `FrozenTensor` too,
        which `call` uses in place of the buffer of the module.

    Raises:
        TypeError: If an argument has a wrong type or dtype, such as a rank or seed that is not an integer.
        ValueError: If an entry of `targets` selects nothing, or another pattern matches nothing. If a module of a type
            in `targets` computes its weight by a parametrization. If a target is not a matrix, or is not finite in low
            precision. If a rank, alpha or format does not fit. If a weight is missing from `weights`, has another
            shape, or has a name that the model lacks. If both `base` and `base_dtype` are passed. If a tensor is not a
            leaf of autograd, or has a tangent.

    Numerics: The base is rounded once. A base in low precision is quantized from the difference in the widest dtype.
        The row `padding_idx` of an embedding starts with zeros in `b`. It gets no gradient and does not move, until a
        switch replaces vectors of `b`. With ``trained="b"`` the rows of `a` are orthogonal to the precision of `dtype`.

    Example:
        >>> import dynlora_fn as dl
        >>> model = nn.Linear(6, 4)
        >>> params = init(model, rank=2, seed=0, targets=["weight"])
        >>> params["weight"].factors.b.shape, params["weight"].factors.a.shape, params["bias"].shape
        (torch.Size([4, 2]), torch.Size([2, 6]), torch.Size([4]))
        >>> torch.allclose(dl.materialize(params["weight"]), model.weight, atol=1e-6)
        True
    """
    if base is not None and base_dtype is not None:
        raise ValueError(f"`base` is {base!r} and `base_dtype` is {base_dtype}; pass only one of them")
    check_settings(start, base_dtype, dtype, stack=stack, copy=copy)
    check_choice("trained", trained, get_args(Trained))
    check_progress(progress)
    check_residual(residual, residual_device)
    check_model(model)
    check_weights(weights, model)
    seed = check_integer("seed", seed)
    check_targets(targets)
    check_fused(fused)
    module = model if isinstance(model, nn.Module) else None
    parameters = parameters_of(model)
    tensors = parameters.tensors
    selected = select(module, parameters, targets, rank, alpha, fused or {})
    read = tensors.__getitem__ if weights is None else partial(read_weight, weights, parameters)
    vectors: Vectors = "orthonormal" if trained == "b" else start
    settings = Settings(seed, vectors, base_dtype, base, residual, residual_device, dtype, copy, group)
    keys = {name: (selected.get(name), *_kind(name, parameters)) for name in tensors}
    stacks = {name: Stack([name], ()) for name in tensors}
    if stack:
        stacks = find_stacks(keys, {name: _owner(module, name) for name in tensors})
    tasks = [
        Task(name, layers, tensors[first], selected.get(first), first in parameters.frozen)
        for name, layers in together(stacks, keys, tensors, selected, settings).items()
        for first in layers.members[:1]
    ]
    params = dict(make(tasks, read, settings, reporter(progress, sum(task.bytes for task in tasks))))
    params = {name: params[name] for name in stacks}
    if module is None or weights is None:
        return params
    return params | changed_buffers(module, weights)


def _kind(name: str, parameters: Parameters) -> list[object]:
    """Return the properties that all members of a stack must share."""
    tensor, is_frozen = parameters.tensors[name], name in parameters.frozen
    if type(tensor) is Tensor:
        return [tensor.shape, tensor.dtype, tensor.device, is_frozen]
    alone = name if is_frozen and is_opaque(tensor) else ""
    inner = [(leaf.shape, leaf.dtype, leaf.device) for leaf in inner_tensors(tensor)]
    return [type(tensor).__name__ if is_torchao(tensor) else "", tensor.shape, tensor.dtype, is_frozen, alone, *inner]


def _owner(module: nn.Module | None, name: str) -> object:
    """Return the type of the module that has a parameter, or None."""
    return type(module.get_submodule(name.rpartition(".")[0])) if module is not None else None
