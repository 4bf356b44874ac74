"""The parameters and buffers of a module, to show that they are left as they were."""

from dynlora_fn.testing import assert_same


def state_of(model):
    return {name: (tensor, tensor.detach().clone()) for name, tensor in model.state_dict(keep_vars=True).items()}


def assert_restored(model, before):
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, values) in before.items():
        assert after[name] is tensor
        assert_same(after[name].detach(), values)
