"""Threads that call one model do not mix their parameters."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import nn

from dynlora_fn import call, remat, value_and_grad
from dynlora_fn.nn._turns import taking_turns
from dynlora_fn.testing import assert_same, normal
from tests.support.modules import assert_restored, state_of


class Waits(nn.Module):
    """A model that waits in the middle of its forward pass, so that another thread could come between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
        self.barrier = threading.Barrier(2)

    def forward(self, x):
        x = self.first(x)
        try:
            self.barrier.wait(timeout=0.05)
        except threading.BrokenBarrierError:
            self.barrier.reset()
        return self.second(x)


def test_threads_do_not_mix_their_parameters():
    model, x = Waits(), normal(1, 3, 4)
    before = state_of(model)
    scales = [1.0, 2.0, 3.0, 4.0]
    params = [{name: tensor.detach() * scale for name, tensor in model.named_parameters()} for scale in scales]
    wanted = [call(model, each, x) for each in params]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda each: call(model, each, x), params))
    for left, right in zip(got, wanted, strict=True):
        assert_same(left, right)
    assert_restored(model, before)


def test_threads_do_not_mix_in_recomputation():
    model, x = nn.Sequential(Waits()), normal(1, 3, 4)
    params = [{name: tensor.detach() * scale for name, tensor in model.named_parameters()} for scale in (1.0, 2.0)]

    def grads(net, each):
        return value_and_grad(lambda tree: call(net, tree, x).square().sum(), via="autograd")(each).grads

    wanted = [grads(model, each) for each in params]
    net = remat(model, ["0"])
    grads(net, params[0])  # the first call of a block is checked, which is not to be done by two threads at once
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda each: grads(net, each), params))
    assert_same(got, wanted)


def test_a_nested_call_of_a_model_in_another_thread_is_refused():
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 4)
    entered, leave = threading.Event(), threading.Event()

    def occupy():
        with taking_turns(inner):
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=occupy)
    thread.start()
    entered.wait(5)
    try:
        with (
            pytest.raises(RuntimeError, match=r"another thread calls the same Linear, which is called inside"),
            taking_turns(outer),
            taking_turns(inner),
        ):
            pass
    finally:
        leave.set()
        thread.join()
    with taking_turns(outer), taking_turns(inner):  # both are free again
        pass
