"""Models from their packages, small and unmodified.

It says which of their weights become low-rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dynlora_fn import LowRank, init
from dynlora_fn.testing import normal


class Case(NamedTuple):
    """One weight kind of one model."""

    make: Callable[[], nn.Module]
    loss: Callable[[Callable[..., Any]], Tensor]  # of the model, given as a function
    targets: Any
    fused: dict[str, Any] = {}  # noqa: RUF012, a NamedTuple's defaults are shared and never written
    dtype: torch.dtype = torch.float64
    tied: tuple[tuple[str, str], ...] = ()  # pairs of names of one tensor


TOKENS = torch.randint(31, (2, 7), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])
IMAGES, SEQUENCES, VOLUMES = (
    normal(seed, *shape) for seed, shape in enumerate([(2, 3, 8, 8), (2, 5, 12), (2, 2, 3, 6, 6)])
)


def of_transformers(name: str, **config: Any) -> Callable[[], nn.Module]:
    """Return a small model of `transformers` with random weights.

    It has a small configuration.
    """

    def make() -> nn.Module:
        import transformers  # noqa: PLC0415, takes seconds

        torch.manual_seed(0)
        kind = getattr(transformers, name)
        return kind(kind.config_class(**config)).double().eval()

    return make


def next_token_loss(model: Callable[..., Any]) -> Tensor:
    return cross_entropy(model(TOKENS[:, :-1]).logits.flatten(0, 1), TOKENS[:, 1:].flatten())


def image_loss(model: Callable[..., Any]) -> Tensor:
    return cross_entropy(model(IMAGES).logits, LABELS)


LLAMA = of_transformers(
    "LlamaForCausalLM",
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    use_cache=False,
)
GPT2 = of_transformers(
    "GPT2LMHeadModel", vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=2, use_cache=False
)
VIT = of_transformers(
    "ViTForImageClassification",
    image_size=8,
    patch_size=4,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
)


def mixtral(implementation: str) -> Callable[[], nn.Module]:
    make = of_transformers(
        "MixtralForCausalLM",
        vocab_size=31,
        hidden_size=12,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        use_cache=False,
    )

    def build() -> nn.Module:
        model = make()
        model.set_experts_implementation(implementation)
        return model

    return build


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double()


def convolutions() -> nn.Module:
    """Return convolutions of one, two and three dimensions.

    They have groups, strides and dilation.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv3d(2, 4, (1, 3, 3), padding="same"),
        nn.GELU(),
        nn.Flatten(1, 2),
        nn.Conv2d(12, 6, 3, stride=2, padding=1, groups=3),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.Flatten(2),
        nn.Conv1d(6, 4, 3, dilation=2, padding_mode="circular", padding=2),
    )
    return model.double().eval()  # running statistics, which `torch.func` does not allow to be written


def encoder_loss(model: Callable[..., Any]) -> Tensor:
    return (model(SEQUENCES) - 1).square().mean()


def convolution_loss(model: Callable[..., Any]) -> Tensor:
    return (model(VOLUMES) - 1).square().mean()


# By model and weight kind. The README has a table of these.
CASES = {
    "Llama: linear, grouped heads": Case(LLAMA, next_token_loss, ["model.layers.*_proj.weight"]),
    "Llama: tied embedding and head": Case(
        LLAMA,
        next_token_loss,
        ["model.embed_tokens.weight"],
        tied=(("model.embed_tokens.weight", "lm_head.weight"),),
    ),
    "GPT-2: Conv1D": Case(GPT2, next_token_loss, ["*.c_*.weight"]),
    "GPT-2: Conv1D, fused QKV as a stack": Case(
        GPT2, next_token_loss, ["*.c_attn.weight"], fused={"*.c_attn.weight": (3, -1)}
    ),
    "GPT-2: embeddings, the head tied to one": Case(
        GPT2, next_token_loss, [nn.Embedding], tied=(("transformer.wte.weight", "lm_head.weight"),)
    ),
    "Mixtral: experts, batched": Case(mixtral("batched_mm"), next_token_loss, ["*.experts.*"]),
    "Mixtral: experts, grouped": Case(mixtral("grouped_mm"), next_token_loss, ["*.experts.*"], dtype=torch.float32),
    "Mixtral: experts, one by one": Case(mixtral("eager"), next_token_loss, ["*.experts.*"]),
    "Mixtral: experts, fused gate and up as a stack": Case(
        mixtral("eager"), next_token_loss, ["*.gate_up_proj"], fused={"*.gate_up_proj": 2}
    ),
    "ViT: linear": Case(VIT, image_loss, [nn.Linear]),
    "ViT: patch convolution": Case(VIT, image_loss, [nn.Conv2d]),
    "TransformerEncoder: linear": Case(encoder, encoder_loss, ["*.linear?.weight", "*.out_proj.weight"]),
    "TransformerEncoder: fused QKV": Case(encoder, encoder_loss, ["*.in_proj_weight"]),
    "TransformerEncoder: fused QKV as a stack": Case(
        encoder, encoder_loss, ["*.in_proj_weight"], fused={"*.in_proj_weight": 3}
    ),
    "convolutions: 1d, 2d, 3d": Case(convolutions, convolution_loss, [nn.Conv1d, nn.Conv2d, nn.Conv3d]),
}

# Loops over the chosen experts and transformers' operator for grouped products give no single graph.
EAGER_ONLY = {name for name in CASES if "Mixtral" in name and "batched" not in name}


def model_and_params(case: Case) -> tuple[nn.Module, dict[str, Any]]:
    model = case.make().to(case.dtype)
    params = init(model, rank=2, seed=0, targets=case.targets, fused=case.fused, dtype=case.dtype)
    assert any(isinstance(param, LowRank) for param in params.values())
    return model, params
