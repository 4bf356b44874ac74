"""Test a transform of your own with the checkers of the library.

A checker draws weights of every kind: stacked or not, in every precision, with plans and optimizer states. If the
transform breaks its promise, the error gives the promise, what happened and the smallest example.
"""

import torch

import dynlora_fn as dl
from dynlora_fn import Factors, testing


def balance(param):
    """Give `b[:, k]` and `a[k]` of each slot equal norms, which keeps the weight."""
    b, a = param.factors
    norms = b.norm(dim=-2), a.norm(dim=-1)
    ratio = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[1] / norms[0]).sqrt(), 1)
    return param._replace(factors=Factors(b=b * ratio[..., None, :], a=a / ratio[..., :, None]))


def rotate(param):
    """Rotate the slots, which should keep the weight. The bug: side a is off by one."""
    b, a = param.factors
    return param._replace(factors=Factors(b=b.roll(1, -1), a=a.roll(2, -2)))


def restart(opt_state, plan):
    """Reset the state of the counterparts of switched vectors.

    The bug: the first moments stay.
    """
    new = dl.project_optimizer_state(opt_state, plan)
    return new._replace(inner=new.inner._replace(mu=opt_state.inner.mu))


# A correct transform passes. `examples` limits the search, which otherwise takes a few seconds.
testing.check_preserves_weight(balance, examples=20)
testing.check_pure(balance, examples=20)
testing.check_keeps_structure(balance, examples=20)

# These two bugs would not show in a loss. The checkers find them, and print the smallest example.
for check, function in ((testing.check_preserves_weight, rotate), (testing.check_state_projection, restart)):
    try:
        check(function)
    except testing.BrokenPromiseError as error:
        print(error)  # promised: the weight does not change. happened: off by up to ... smallest example: rank=2, ...
    else:
        raise AssertionError(f"the bug in {function.__name__} was not found")
