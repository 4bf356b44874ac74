"""The table of combinations that are not supported, with their error messages.

`README.md` prints this table.
"""

from typing import Any, NamedTuple, Never

from torch import Tensor

from dynlora_fn._core._attached import is_attached
from dynlora_fn._core._torch import is_mapped


class Refusal(NamedTuple):
    """One combination that is not supported."""

    what: str  # the combination
    by: str  # the functions that refuse it
    message: str  # what is wrong, with names and values, then what to do
    error: type[Exception] = ValueError


_SHARDED_FACTORS = "`params` has sharded factors, which {transform} does not support; gather them with `unshard`"

REFUSALS = {
    "nf4, shape": Refusal(
        "nf4 for a weight whose number of entries is not a multiple of 64, or whose `in` is odd",
        "`quantize`, `init`",
        "weight {name!r} of shape {shape} does not fit nf4, which needs a multiple of {block} entries and an even `in`;"
        " use another format for it",
    ),
    "float4, shape": Refusal(
        "nvfp4 or mxfp4 for a weight whose `in` is not a multiple of 16 or 32",
        "`quantize`, `init`",
        "weight {name!r} of shape {shape} does not fit {kind}, a prototype in torchao, which needs a multiple of"
        " {block} as `in`; use another format for it",
    ),
    "quantize, deferred": Refusal(
        "quantizing a deferred base",
        "`quantize`",
        "the base of {name!r} in `params` is deferred; call `quantize` before `defer`",
    ),
    "quantize, sharded": Refusal(
        "quantizing a sharded base",
        "`quantize`",
        "the base of {name!r} in `params` is sharded; call `quantize` before `shard`",
    ),
    "defer, deferred": Refusal(
        "deferring a deferred base",
        "`defer`",
        "the base of {name!r} in `params` is deferred already; call `defer` once",
    ),
    "defer, sharded factors": Refusal(
        "deferring a weight with sharded factors",
        "`defer`",
        "{name!r} in `params` must have whole factors to be deferred, but its factors are sharded; use `shard` without"
        " `shard_factors`",
    ),
    "fold, deferred": Refusal(
        "a fold of more vectors than a deferred base has room for",
        "`switch`",
        "`vectors` = {room} of deferred {name!r} is less than the {count} vectors of one fold; pass `vectors` of at"
        " least {count} to `defer`",
    ),
    "gradient, fold": Refusal(
        "derivatives through a change of codes, by the change or by the codes",
        "`switch`, `merge`, `fold`, `compensate`, `decay`, `average`, `resize`, `fold_pending`, `to_torchao`",
        "the base of {name!r} is in low precision, and the base or the difference that changes it requires a gradient"
        " or has a tangent, which does not pass through rounding; detach it, call the function under"
        " `torch.no_grad()`, or use a plain tensor as the base",
        NotImplementedError,
    ),
    "gradient, quantize": Refusal(
        "derivatives through quantization",
        "`quantize`, `init`, `from_torchao`",
        "the base of {name!r} requires a gradient or has a tangent, which does not pass through quantization; detach"
        " it, or call the function under `torch.no_grad()`",
        NotImplementedError,
    ),
    "shard, sharded": Refusal(
        "sharding a sharded base",
        "`shard`",
        "the base of {name!r} in `params` is sharded already; call `unshard` first",
    ),
    "shard, nf4": Refusal(
        "sharding nf4 where rows of two processes share a factor",
        "`shard`, `init`",
        "the base of {name!r} in `params`, in nf4 and of shape {shape}, cannot be sharded over {processes} processes:"
        " each must store a multiple of the {entries} entries that share a factor; use another format or another number"
        " of processes",
    ),
    "shard_factors, base": Refusal(
        "sharding the factors of a base that is deferred or not sharded, or sharding them twice",
        "`shard_factors`",
        "the factors of {name!r} in `params` cannot be sharded: its base must be sharded and not deferred, and its"
        " factors must not be sharded already; call `shard` first, and `shard_factors` once",
    ),
    "pool, sharded factors": Refusal(
        "a pool of candidates for sharded factors",
        "`init_pool`",
        "{name!r} in `params` must have whole factors to have a pool, but its factors are sharded; shard only the base",
    ),
    "shard_factors, one side": Refusal(
        "sharding the factors of a weight that trains only `b`",
        "`shard_factors`",
        "only `b` of {name!r} in `params` is trained, and such factors cannot be sharded; shard only the base, or call"
        " `init` with trained='both'",
    ),
    "pool, one side": Refusal(
        "a pool of candidates for a weight that trains only `b`",
        "`init_pool`",
        "only `b` of {name!r} in `params` is trained, and vectors of a pool would not be orthogonal; leave out the"
        " pool, or call `init` with trained='both'",
    ),
    "dense gradients, sharded factors": Refusal(
        "projecting gradients of dense weights onto sharded factors",
        "`project_gradients`, `compensate`",
        "{name!r} must have whole factors for gradients of dense weights, but its factors are sharded; shard only the"
        " base",
    ),
    "vmap, sharded base": Refusal(
        "`torch.vmap` over a stack of weights with sharded bases, where products read all rows",
        "`linear`, `call`, `materialize`",
        "`params` has sharded bases, which `torch.vmap` over the weights does not support; gather them with `unshard`,"
        " or `unstack` the weights",
        NotImplementedError,
    ),
    "vmap, sharded factors": Refusal(
        "sharded factors under `torch.vmap`, except on the factored path",
        "`linear`, `call`",
        _SHARDED_FACTORS.format(transform="`torch.vmap`"),
        NotImplementedError,
    ),
    "forward mode, sharded factors": Refusal(
        "sharded factors in forward mode, except on the factored path",
        "`linear`, `call`",
        _SHARDED_FACTORS.format(transform="forward-mode differentiation"),
        NotImplementedError,
    ),
    "gradient, sharded factors": Refusal(
        "derivatives through a switch of sharded factors",
        "`switch`",
        "the factors of {name!r} are sharded and require a gradient or have a tangent, which does not pass through the"
        " all-gather of a switch; gather them with `unshard`, or detach them",
        NotImplementedError,
    ),
    "gradient, codes": Refusal(
        "derivatives by codes, which are rounded",
        "`linear`, `call`, `materialize`",
        "derivatives by codes are not supported, but {what} in {kind} requires a gradient or has a tangent; detach it,"
        " or use a plain tensor as the base",
        NotImplementedError,
    ),
    "gradient, sharded base": Refusal(
        "derivatives by a sharded base",
        "`linear`, `call`, `materialize`",
        "derivatives by a sharded base are not supported, but {what} requires a gradient or has a tangent; detach it,"
        " or gather it with `unshard`",
        NotImplementedError,
    ),
    "torchao, stack": Refusal(
        "a stack as one tensor of torchao",
        "`to_torchao`",
        "`params` is a stack of shape {shape}, which torchao does not support; call `unstack` first",
    ),
    "torchao, nvfp4 by row": Refusal(
        "nvfp4 codes with a factor for each row, because of a fold while they were sharded",
        "`to_torchao`",
        "`params` in nvfp4 have scaling factors of shape {shape}, one for each row, because of a fold while they were"
        " sharded; torchao needs one factor for the weight, so call `quantize` first",
    ),
}


def refuse(key: str, **values: Any) -> Never:
    """Raise the error of a combination in `REFUSALS`, with values in its message."""
    refusal = REFUSALS[key]
    raise refusal.error(refusal.message.format(**values))


def refuse_mapped(key: str, tensor: Tensor) -> None:
    """Refuse a tensor that `torch.vmap` maps over, before a collective.

    `torch.vmap` would call the collective for each slice, and read its results before they have arrived.
    """
    if is_mapped(tensor):
        refuse(key)


def refuse_attached(key: str, tree: Any, **values: Any) -> None:
    """Refuse tensors that require a gradient or have a tangent.

    Call this before an operation that would drop the gradient or tangent silently.
    """
    if is_attached(tree):
        refuse(key, **values)
