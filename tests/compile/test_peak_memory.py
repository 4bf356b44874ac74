"""`peak_memory` traces what `compile_step` compiles.

What it computes is tested beside `explain`.
"""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from dynlora_fn import call, combine, init, partition, peak_memory, value_and_grad
from dynlora_fn.testing import normal

N = 1000  # numbers of 8 bytes
TOKENS = torch.zeros(2, 7, dtype=torch.int64)
DECODER = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "use_cache": False}
# Name, configuration, and arguments beside the tokens.
MODELS = {
    "LlamaForCausalLM": ({**DECODER, "num_attention_heads": 4}, {}),
    "MistralForCausalLM": (
        {**DECODER, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 4},
        {},
    ),
    "GPT2LMHeadModel": (
        {"vocab_size": 31, "n_positions": 16, "n_embd": 12, "n_layer": 2, "n_head": 2, "use_cache": False},
        {},
    ),
    "BertForMaskedLM": (
        {
            "vocab_size": 31,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        {},
    ),
    "T5ForConditionalGeneration": (
        {"vocab_size": 31, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "use_cache": False},
        {"decoder_input_ids": TOKENS},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("padding", [{}, {"attention_mask": torch.ones_like(TOKENS)}], ids=["tokens", "mask"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_is_traced_as_users_call_it(name, padding):
    transformers = pytest.importorskip("transformers")
    config, arguments = MODELS[name]
    model = getattr(transformers, name)(getattr(transformers, name).config_class(**config)).eval()
    trainable, frozen = partition(init(model, rank=2, seed=0, targets=lambda _, tensor: tensor.ndim == 2))

    def gradients(trainable, **inputs):
        def loss_fn(tree):
            return call(model, combine(tree, frozen), **inputs).logits.square().mean()

        return value_and_grad(loss_fn)(trainable).grads

    peak = peak_memory(gradients, trainable, input_ids=TOKENS, **arguments, **padding)
    assert peak.step > sum(leaf.nbytes for leaf in tree_leaves(trainable)) / 2


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * x.sum().item(),
        lambda x: x * 2 if x.sum() > 0 else x,
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
    ],
    ids=["item", "if", "mask", "nonzero", "unique"],
)
def test_a_step_that_depends_on_values_is_refused_by_the_operation(step):
    with pytest.raises(ValueError, match=r"`step` calls aten\.\w+\.\w+, whose result depends on values of tensors"):
        peak_memory(step, normal(0, 4))
    assert not torch.compiler.is_compiling()


def test_a_step_takes_keyword_arguments():
    x = normal(0, N)
    peak = peak_memory(lambda x, *, batch: torch.cumsum(x, 0) + batch["y"], x, batch={"y": x})
    assert peak == peak_memory(lambda x, y: torch.cumsum(x, 0) + y, x, x)
    assert peak.state == 2 * 8 * N


def test_a_model_takes_the_branch_of_the_compiled_step():
    peak = peak_memory(lambda x: torch.cumsum(x.sin(), 0) if torch.compiler.is_compiling() else x, normal(0, N))
    assert peak == peak_memory(lambda x: torch.cumsum(x.sin(), 0), normal(0, N))
    assert not torch.compiler.is_compiling()
