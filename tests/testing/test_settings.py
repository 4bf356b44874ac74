"""Settings of checkers that cannot be right are named, and are not blamed on the transform."""

from functools import partial
from typing import Any

import pytest
import torch

import dynlora_fn as dl
from dynlora_fn import testing
from dynlora_fn.testing import Shape, low_rank

PARAM = low_rank(Shape(4, 4, 2))
WEIGHT, PROJECTION = testing.check_preserves_weight, testing.check_state_projection


def run() -> Any:
    return torch.zeros(2), lambda state, t: (state + t, None)


# A call that must be refused, and a part of the message.
MISTAKES = {
    "no function": (partial(WEIGHT, None), TypeError, "`transform` is None; pass a function"),
    "no examples": (partial(WEIGHT, dl.merge, examples=0), ValueError, "`examples` is 0; use an integer"),
    "part of an example": (partial(WEIGHT, dl.merge, examples=2.5), TypeError, "`examples` is 2.5"),
    "negative folds": (partial(WEIGHT, dl.merge, folds=-1), ValueError, "`folds` is -1; use an integer"),
    "folds that are no number": (partial(WEIGHT, dl.merge, folds=float("nan")), TypeError, "`folds` is nan"),
    "a word for a flag": (partial(WEIGHT, dl.merge, exact_factors="no"), TypeError, "`exact_factors` is 'no'"),
    "a list of arguments": (partial(WEIGHT, dl.merge, arguments=[PARAM]), TypeError, "`arguments` is"),
    "no weight": (partial(testing.check_pure, dl.merge, arguments={}), ValueError, "nothing would be checked"),
    "negative tolerance": (
        partial(testing.check_compiles, dl.merge, tolerance=-1),
        ValueError,
        "`tolerance` is -1; use a number",
    ),
    "tolerance that is no number": (
        partial(testing.check_vmap, dl.merge, tolerance=float("nan")),
        ValueError,
        "`tolerance` is nan",
    ),
    "no function for vmap": (partial(testing.check_vmap, 3, arguments=PARAM), TypeError, "`transform` is 3"),
    "no projection": (partial(PROJECTION, None), TypeError, "`project` is None; pass a function"),
    "an optimizer without a call": (
        partial(PROJECTION, dl.project_optimizer_state, optimizer=dl.optim.adamw),
        TypeError,
        "`optimizer` is .*; pass a Transform",
    ),
    "an unknown role": (
        partial(PROJECTION, dl.project_optimizer_state, roles={"mu": "same"}),
        ValueError,
        "`roles` must be some of .*, got 'same' for 'mu'",
    ),
    "a number for a flag": (
        partial(PROJECTION, dl.project_optimizer_state, is_reset=1),
        TypeError,
        "`is_reset` is 1; use True or False",
    ),
    "parameters of another kind": (
        partial(PROJECTION, dl.project_optimizer_state, trainable={"w": 3}),
        TypeError,
        "`trainable` has 3",
    ),
    "negative steps": (partial(testing.check_resumes, run, steps=-1), ValueError, "`steps` is -1; use an integer"),
    "no interruptions": (partial(testing.check_resumes, run, examples=0), ValueError, "`examples` is 0"),
    "no run": (partial(testing.check_resumes, None), TypeError, "`make` is None; pass a function"),
    "an unknown side": (partial(low_rank, Shape(4, 4, 2), trained="a"), ValueError, "`trained` must be 'both' or 'b'"),
    "a share above 1": (
        partial(testing.side_plan, 2, 2, share_active=2),
        ValueError,
        "`share_active` is 2; use a number from 0 to 1",
    ),
}


@pytest.mark.parametrize(("call", "error", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_a_tensor_can_be_the_only_argument():
    testing.check_pure(lambda tensor: tensor + 1, arguments=torch.ones(2))
