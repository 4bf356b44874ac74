"""The checks behind ``--shapes``: a tensor that does not match its annotation raises an error."""

import pytest
import torch
from jaxtyping import Float, Int, TypeCheckError, jaxtyped
from torch import Tensor

from dynlora_fn import LowRank, SidePlan
from dynlora_fn.testing import Shape, low_rank, side_plan
from tests.support.shapes import checked

PARAM = low_rank(Shape(4, 6, 2), (3,))


@jaxtyped(typechecker=checked)
def product(
    left: Float[Tensor, "*stack out rank"], right: Float[Tensor, "*stack rank in"]
) -> Float[Tensor, "*stack out in"]:
    return left @ right if left.shape[-2] < 5 else left


@jaxtyped(typechecker=checked)
def take(weight: LowRank | dict, plan: SidePlan, index: Int[Tensor, "*#stack count"] | None = None) -> None:
    """Of tuples."""


def test_what_fits_passes():
    b, a = PARAM.factors
    assert product(b, a).shape == (3, 4, 6)
    take(PARAM, side_plan(2, 1), torch.zeros(2, dtype=torch.int64))
    take({"w": PARAM}, side_plan(2, 1, (3,)))
    take(low_rank(Shape(4, 32, 2), waiting=2), side_plan(2, 0))


@pytest.mark.parametrize(
    "call",
    [
        lambda b, a: product(b, a.mT),
        lambda b, a: product(b[0], a),
        lambda b, a: product(b.long(), a),
        lambda b, a: product(torch.zeros(3, 5, 2), a),  # the result has the wrong shape
        lambda b, a: take(PARAM._replace(base=PARAM.base[0]), side_plan(2, 1)),
        lambda b, a: take(PARAM._replace(seed=PARAM.seed[:2]), side_plan(2, 1)),
        lambda b, a: take({"w": PARAM._replace(factors=PARAM.factors._replace(a=a[..., :1, :]))}, side_plan(2, 1)),
        lambda b, a: take(PARAM, side_plan(2, 1)._replace(active=torch.ones(2).bool())),
        lambda b, a: take(PARAM, side_plan(2, 1)._replace(slots=torch.ones(1))),
        lambda b, a: take(PARAM, side_plan(2, 1), torch.zeros(2)),
    ],
)
def test_what_does_not_fit_is_told(call):
    with pytest.raises(TypeCheckError, match=r"must be|problem arose|checking the return value"):
        call(*PARAM.factors)
