"""The example models: the same function as the reference implementations, and the sizes that the papers state."""

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

import dynlora_fn as dl
from models import llama, mlp


def small_llama() -> llama.Llama:
    return llama.init_weights(llama.Llama(llama.config("llama-tiny", vocabulary=50)), seed=0)


def test_llama_is_hugging_faces():
    """Two independent implementations of rotary positions, RMSNorm and SwiGLU give the same logits."""
    model = small_llama()
    config = model.config
    other = LlamaForCausalLM(
        HFConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            rms_norm_eps=config.norm_eps,
            attention_bias=False,
            tie_word_embeddings=False,
        )
    )
    renamed = {
        name.replace("attention_norm", "input_layernorm")
        .replace("feed_forward_norm", "post_attention_layernorm")
        .replace("attention.query", "self_attn.q_proj")
        .replace("attention.key", "self_attn.k_proj")
        .replace("attention.value", "self_attn.v_proj")
        .replace("attention.output", "self_attn.o_proj")
        .replace("feed_forward.", "mlp.")
        .replace("gate.", "gate_proj.")
        .replace("up.", "up_proj.")
        .replace("down.", "down_proj."): tensor
        for name, tensor in model.state_dict().items()
    }
    renamed = {
        "lm_head.weight" if name == "head.weight" else f"model.{name.replace('embedding', 'embed_tokens')}": tensor
        for name, tensor in renamed.items()
    }
    other.load_state_dict(renamed)
    tokens = torch.arange(60).reshape(2, 30) % 50
    torch.testing.assert_close(model(tokens), other(tokens).logits, atol=1e-5, rtol=1e-5)


def test_llama_is_causal():
    model, tokens = small_llama(), torch.arange(20)[None]
    changed = tokens.clone()
    changed[0, 12:] = 3
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_weights_are_drawn_from_the_seed():
    first, again = small_llama().state_dict(), small_llama().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = llama.init_weights(llama.Llama(llama.config("llama-tiny", 50)), seed=1)
    assert not torch.equal(first["head.weight"], other.state_dict()["head.weight"])


# Sizes in millions. The first is in the name; those of 1.3B, full and trainable, are of arXiv:2406.06564, table 3.
@pytest.mark.parametrize(
    ("name", "millions"),
    [("llama-9m", 9.0), ("llama-60m", 58.2), ("llama-130m", 134.3), ("llama-350m", 368.2), ("llama-1b", 1339.5)],
)
def test_sizes(name: str, millions: float):
    with torch.device("meta"):
        model = llama.Llama(llama.config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(("rank", "millions"), [(512, 609.7), (256, 370.7)])
def test_trainable_share_of_the_paper(rank: int, millions: float):
    with torch.device("meta"):
        model = llama.Llama(llama.config("llama-1b"))
    trainable, _ = dl.partition(dl.init(model, rank=rank, seed=0, targets=llama.TARGETS))
    assert sum(leaf.numel() for leaf in tree_leaves(trainable)) / 1e6 == pytest.approx(millions, abs=0.05)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"`model` must be one of llama-tiny, .* got 'llama-2m'"):
        llama.config("llama-2m")


def test_mlp_stacks_its_hidden_layers():
    model = mlp.MLP([6, 6, 6, 3])
    params = dl.init(model, rank=2, seed=0, targets=mlp.TARGETS)
    assert set(params) == {"layers.*.weight", "layers.*.bias", "layers.2.weight", "layers.2.bias"}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dl.call(model, params, x), model(x))
