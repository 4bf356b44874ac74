"""`call` with low-rank weights equals the dense model, and refuses operations without a rule on request."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from dynlora_fn import LowRank, call, combine, init, linear, materialize, partition, value_and_grad
from dynlora_fn.testing import Storage, assert_same, assert_within, eps, normal, seeds, untouched
from tests.support import reference
from tests.support.network import EPS, TARGETS, TOLERANCE, network
from tests.support.strategies import plain_params


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def test_call_equals_the_dense_model():
    model, x = network(), normal(3, 5, 6)
    params = init(model, rank=2, seed=0, targets=TARGETS, dtype=torch.float64)
    got, wanted = call(model, params, x), functional_call(model, materialize(params), (x,))
    torch.testing.assert_close(got, wanted, **TOLERANCE)
    torch.testing.assert_close(got, model(x), **TOLERANCE)


@pytest.mark.parametrize("via", ["func", "autograd"])
def test_gradients_are_the_dense_gradient_projected(via):
    model, x = network(), normal(3, 5, 6)
    params = init(model, rank=2, seed=0, targets=TARGETS, dtype=torch.float64)
    trainable, frozen = partition(params)
    grads = value_and_grad(lambda tree: mean_square(call(model, combine(tree, frozen), x)), via=via)(trainable).grads
    leaves = {name: weight.requires_grad_() for name, weight in materialize(params).items()}
    mean_square(functional_call(model, leaves, (x,))).backward()
    for name, param in params.items():
        if isinstance(param, LowRank):
            (b, a), gradient = param.factors, leaves[name].grad
            torch.testing.assert_close(grads[name].b, gradient @ a.T / 2, **TOLERANCE)
            torch.testing.assert_close(grads[name].a, b.T @ gradient / 2, **TOLERANCE)
        else:
            torch.testing.assert_close(grads[name], leaves[name].grad, **TOLERANCE)


def test_bases_and_factors_get_gradients_where_they_require_them():
    model, x = network(), normal(3, 5, 6)
    params = init(model, rank=2, seed=0, targets=TARGETS, dtype=torch.float64)
    bases = [param.base.requires_grad_() for param in params.values() if isinstance(param, LowRank)]
    factors = [
        leaf.requires_grad_() for param in params.values() if isinstance(param, LowRank) for leaf in param.factors
    ]
    grads = torch.autograd.grad(mean_square(call(model, params, x)), bases + factors)
    assert all(grad.any() for grad in grads)


def test_call_leaves_the_model_as_it_is():
    model = network()
    params = init(model, rank=2, seed=0, targets=TARGETS, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    with untouched(params, list(model.parameters()), list(model.buffers())):
        call(model, params, normal(3, 5, 6))
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_call_takes_keyword_arguments():
    class Scaled(nn.Linear):
        def forward(self, x, *, scale):
            return super().forward(x) * scale

    model, x = Scaled(3, 2).double(), normal(0, 4, 3)
    params = init(model, rank=1, seed=0, targets=["weight"])
    assert_same(call(model, params, x, scale=2.0), call(model, params, x, scale=1.0) * 2)


def test_names_are_strict():
    model, x = network(), normal(3, 5, 6)
    params = init(model, rank=2, seed=0, targets=TARGETS, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*3\.wieght"):
        call(model, {**params, "3.wieght": params["3.weight"]}, x)
    with pytest.raises(RuntimeError, match=r"Missing key.*3\.weight"):
        call(model, {name: param for name, param in params.items() if name != "3.weight"}, x)


class Uses(nn.Module):
    """A module that uses its weight in some other way than `nn.Linear`."""

    def __init__(self, use):
        super().__init__()
        self.use, self.weight = use, nn.Parameter(normal(0, 3, 3))

    def forward(self, x):
        return self.use(x, self.weight)


@pytest.mark.parametrize(
    ("operation", "use"),
    [
        ("add", lambda x, w: x[:, :, None] + w),
        ("mul", lambda x, w: w * x[0]),
        ("div", lambda x, w: w / 0),
        ("clone", lambda x, w: w.clone()),
        ("to", lambda x, w: w.to(torch.int64)),
        ("cumsum", lambda x, w: w.cumsum(0)),
        ("getitem", lambda x, w: w[:, None, 1]),
        ("getitem", lambda x, w: w[w[0] > 0, 1]),
        ("view", lambda x, w: w.view(9)),
        ("permute", lambda x, w: w.view(3, 1, 3).transpose(0, 2)),
        ("conv1d", nn.functional.conv1d),
        ("mm", lambda x, w: torch.mm(x, w, out=torch.empty(5, 3))),
        ("cat", lambda x, w: torch.cat([x, w])),
        ("stack", lambda x, w: torch.stack(tensors=(x[:3], w))),
        ("sum", lambda x, w: x + w.sum()),
        ("einsum", lambda x, w: torch.einsum("bi,...i->b", x, w)),
        ("einsum", lambda x, w: torch.einsum("oi,io->o", w, w)),
        ("matmul", lambda x, w: w @ w),
        ("scale_grad_by_freq", lambda x, w: nn.functional.embedding(x.long() % 3, w, scale_grad_by_freq=True)),
        ("input", lambda x, w: nn.functional.linear(w, x)),
        ("bias", lambda x, w: nn.functional.linear(x, x[:3], bias=w)),
    ],
)
def test_an_operation_without_a_rule_is_refused_by_name(operation, use):
    model = Uses(use)
    params = init(model, rank=1, seed=0, targets=["weight"], dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=f"'weight'.*{operation}"):
        call(model, params, normal(1, 5, 3), fallback="raise")


def test_a_module_may_look_at_its_weight():
    attributes = {}

    def use(x, w):
        attributes.update(shape=w.shape, size=w.size(1), ndim=w.dim(), numel=w.numel(), dtype=w.dtype, device=w.device)
        return nn.functional.linear(x.to(w.dtype), w)

    model = Uses(use)
    call(model, init(model, rank=1, seed=0, targets=["weight"], dtype=torch.float64), normal(1, 5, 3))
    assert attributes.pop("dtype") == torch.float64
    assert attributes.pop("device") == torch.device("cpu")
    assert attributes == {"shape": (3, 3), "size": 3, "ndim": 2, "numel": 9}


def compiled_gradients(loss_fn, trainable, x):
    return torch.compile(value_and_grad(loss_fn), backend="aot_eager", fullgraph=True)(trainable, x)


@pytest.mark.slow
def test_sequential_compiled_equals_eager():
    model, x = network(), normal(3, 5, 6)
    trainable, frozen = partition(init(model, rank=2, seed=0, targets=TARGETS, dtype=torch.float64))

    def loss_fn(trainable, x):
        return mean_square(call(model, combine(trainable, frozen), x))

    got, wanted = compiled_gradients(loss_fn, trainable, x), value_and_grad(loss_fn)(trainable, x)
    torch.testing.assert_close(got, wanted, **TOLERANCE)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).double().eval()


def test_an_unmodified_llama_trains_its_low_rank_weights(llama):
    tokens = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(0))
    params = init(llama, rank=4, seed=0, targets=["model.layers.*_proj.weight"], dtype=torch.float64)
    assert sum(isinstance(param, LowRank) for param in params.values()) == 7
    trainable, frozen = partition(params)

    def loss_fn(trainable, tokens):
        return call(llama, combine(trainable, frozen), tokens, labels=tokens).loss

    loss, grads = value_and_grad(loss_fn)(trainable, tokens)
    wanted = llama(tokens, labels=tokens).loss
    # A dozen matrix products of up to 24 terms and as many norms follow one another, with values of about 1.
    tolerance = {"rtol": 0, "atol": 12 * 24 * 16 * EPS}
    torch.testing.assert_close(loss, wanted.detach(), **tolerance)
    gradient = torch.autograd.grad(wanted, [layer.self_attn.q_proj.weight for layer in llama.model.layers])
    name = "model.layers.*.self_attn.q_proj.weight"
    b, a = params[name].factors
    torch.testing.assert_close(grads[name].b, torch.stack(gradient) @ a.mT / 4, **tolerance)
    torch.testing.assert_close(grads[name].a, b.mT @ torch.stack(gradient) / 4, **tolerance)


@given(plain_params(stacks=st.just(()), storages=[Storage("float32")], factor_dtypes=st.just(torch.float32)), seeds)
def test_autocast_runs_in_bfloat16_and_stays_close(param, seed):
    x = normal(seed, 5, param.base.shape[1], dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear(x, param)
    assert got.dtype == torch.bfloat16
    # In a row: x and a rounded, their product, the quotient, b rounded, the product, the sum: 7 of half an eps each.
    bound = 4 * eps(torch.bfloat16) * (x.double().abs() @ reference.magnitude(param).T)
    assert_within(got, x.double() @ reference.weight(param).T, bound)


def test_a_model_trains_under_autocast():
    model, x = network(torch.float32), normal(3, 5, 6, dtype=torch.float32)
    trainable, frozen = partition(init(model, rank=2, seed=0, targets=TARGETS))

    def loss_fn(trainable):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return mean_square(call(model, combine(trainable, frozen), x).float())

    loss, grads = value_and_grad(loss_fn)(trainable)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in tree_leaves(grads))
    # The square of outputs after three layers of 7 roundings of half an eps, as above.
    torch.testing.assert_close(loss, mean_square(model(x)).detach(), rtol=2 * 3 * 7 * eps(torch.bfloat16) / 2, atol=0)


class BreaksGraph(nn.Module):
    """A model inside which Dynamo stops tracing, and which fails after it on request."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, is_failing):
        hidden = self.first(x)
        torch._dynamo.graph_break()
        if is_failing:
            raise ValueError("failed")
        return self.second(hidden)


@pytest.mark.filterwarnings("ignore:low-rank weight")
def test_a_model_that_is_not_one_graph_has_its_parameters_again():
    model, x = BreaksGraph(), torch.ones(3, 4)
    params, before = init(model, rank=2, seed=0, targets=["*.weight"]), dict(model.named_parameters())
    compiled = torch.compile(lambda params, is_failing: call(model, params, x, is_failing), backend="eager")
    assert_same(compiled(params, False), call(model, params, x, False))
    with pytest.raises(ValueError, match="failed"):
        compiled(params, True)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert type(model.first._parameters["weight"]) is nn.Parameter
