"""The table of rules: how each operation computes with a low-rank weight.

An operation without a rule gets the dense weight from `_fallback.py`. Each module of rules ends with a table of its
rules. Only the rule for attention is here, since it calls rules of other modules.

A rule gets a `View` and not the tensor that replaces a weight in a module. Inside `__torch_function__` Dynamo does not
dispatch to overrides, and would treat that tensor as a plain tensor.
"""

from collections.abc import Callable, Collection, Sequence
from inspect import Parameter, signature
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.nn import functional

from dynlora_fn.nn._attributes import ATTRIBUTE_RULES
from dynlora_fn.nn._contractions import CONTRACTION_RULES
from dynlora_fn.nn._embedding import EMBEDDING_RULES
from dynlora_fn.nn._indexing import INDEXING_RULES, chunk
from dynlora_fn.nn._products import PRODUCT_RULES, linear
from dynlora_fn.nn._register import REGISTERED
from dynlora_fn.nn._reshaping import RESHAPING_RULES
from dynlora_fn.nn._view import View

# `F.multi_head_attention_forward` uses its weights only in `linear`, if the fused weight of queries, keys and values is
# split before the product. So its rule runs the code of that function, with the functions below in place of the globals
# that it calls.


# Not `functional.linear` in `_any_linear`: Dynamo finds globals by their module and name, and would find `_any_linear`.
_torch_linear = functional.linear


def _any_linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    return linear(x, weight, bias) if isinstance(weight, View) else _torch_linear(x, weight, bias)


def _project_fused(q: Tensor, k: Tensor, v: Tensor, weight: Any, bias: Tensor | None = None) -> Sequence[Tensor]:
    if q is k and k is v:
        return [projection.contiguous() for projection in _any_linear(q, weight, bias).chunk(3, dim=-1)]
    weights = chunk(weight, 3) if isinstance(weight, View) else weight.chunk(3)
    return _project(q, k, v, *weights, *(bias.chunk(3) if bias is not None else (None, None, None)))


def _project(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Any, k_weight: Any, v_weight: Any, *biases: Any
) -> list[Tensor]:
    weights = (q_weight, k_weight, v_weight)
    arguments = zip((q, k, v), weights, biases or (None, None, None), strict=True)
    return [_any_linear(x, weight, bias) for x, weight, bias in arguments]


def _has_no_torch_function(_: Any) -> bool:
    return False


def _attention() -> Callable[..., Any]:
    body: Any = functional.multi_head_attention_forward
    replacements = {
        "linear": _any_linear,
        "_in_projection_packed": _project_fused,
        "_in_projection": _project,
        "has_torch_function": _has_no_torch_function,
    }
    return FunctionType(body.__code__, {**body.__globals__, **replacements}, body.__name__, body.__defaults__)


RULES: dict[Any, Callable[..., Any]] = {
    **ATTRIBUTE_RULES,
    **PRODUCT_RULES,
    **CONTRACTION_RULES,
    **EMBEDDING_RULES,
    **RESHAPING_RULES,
    **INDEXING_RULES,
    functional.multi_head_attention_forward: _attention(),
}


def _keywords_of(rule: Callable[..., Any]) -> frozenset[str] | None:
    parameters = signature(rule).parameters
    takes_all = any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [name for name, parameter in parameters.items() if parameter.kind != Parameter.VAR_POSITIONAL]
    return None if takes_all else frozenset(names)


# The keywords that a rule takes, or None for all. A call with another keyword, such as `out`, has no rule.
_KEYWORDS = {operation: _keywords_of(rule) for operation, rule in RULES.items()}


def find_rule(operation: Any, keywords: Collection[str]) -> Callable[..., Any] | None:
    """Return the rule of an operation that is called with these keywords, or None."""
    if operation in REGISTERED:
        return REGISTERED[operation]
    if operation not in RULES:
        return None
    accepted = _KEYWORDS[operation]
    if accepted is None or not keywords:
        return RULES[operation]
    return RULES[operation] if all(name in accepted for name in keywords) else None
