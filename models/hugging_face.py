"""Convert the weights and the configuration of `models.llama` for `transformers`.

`LlamaForCausalLM` computes the same function as `models.llama.Llama`, so the weights are only renamed.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from models.llama import LlamaConfig

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}
_OTHER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a `Llama` under the names of `LlamaForCausalLM`."""
    return {_renamed(name): weight for name, weight in weights.items()}


def _renamed(name: str) -> str:
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    _, layer, rest = name.split(".", 2)  # layers.0.attention.query.weight
    return f"model.layers.{layer}.{_LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def save_config(config: LlamaConfig, folder: Path, *, seq_len: int, end: int | None) -> None:
    """Write config.json and generation_config.json.

    Args:
        config: The configuration of the model.
        folder: The folder. It must exist.
        seq_len: The number of tokens in a training sequence, which becomes the largest number of positions.
        end: The token that ends a document, or None if there is none.
    """
    tokens = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    model = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "hidden_act": "silu",
        "max_position_embeddings": seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **tokens,
    }
    for name, content in (("config.json", model), ("generation_config.json", tokens)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
