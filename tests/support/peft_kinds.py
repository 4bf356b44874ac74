"""The kinds of LoRA adapters that PEFT's tests build, on small models.

It says what loads, and what is refused.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dynlora_fn.testing import normal
from tests.support.zoo import TOKENS, of_transformers


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu())


class Parameters(nn.Module):
    """Layers that are no `nn.Linear`."""

    class Layer(nn.Module):
        def __init__(self, rows: int, columns: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(rows, columns))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = self.Layer(20, 10), self.Layer(2, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu())


class EmbeddingAndConv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D  # noqa: PLC0415, takes seconds

        self.emb, self.conv1d, self.lin0 = nn.Embedding(40, 5), Conv1D(6, 5), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv1d(self.emb(x)).relu())


class Convolution(nn.Module):
    """One convolution of some dimensions and groups, and a linear layer."""

    def __init__(self, dimensions: int, **options: Any) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.conv, self.lin0 = kind(4, 6, 3, **options), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.conv(x).relu().flatten(2).mean(2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.norm, self.lin1 = nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.norm(self.lin0(x)).relu())


class Kind(NamedTuple):
    """An adapter on a model."""

    make: Callable[[], nn.Module]  # in float64
    inputs: tuple[Any, ...]  # of the model
    settings: dict[str, Any]
    refused: str = ""  # what the error names, a regular expression; empty if the adapter loads
    is_wide: bool = True  # whether PEFT makes it in float64 too
    since: tuple[int, int] = (0, 0)  # the version of PEFT that introduced it


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().double().eval()

    return build


def eager_experts(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a model whose experts run one by one, which float64 needs."""

    def build() -> nn.Module:
        model = make()
        model.set_experts_implementation("eager")
        return model

    return build


ROWS, IMAGES = normal(0, 5, 10), {n: normal(n, 2, 4, *[5] * n) for n in (1, 2, 3)}
SEQUENCE, INDICES = normal(4, 5, 3, 10), torch.arange(12).reshape(3, 4) * 3
SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}
HEADS = {"intermediate_size": 24, "num_key_value_heads": 2}
LLAMA = of_transformers("LlamaForCausalLM", **SIZES, **HEADS)
TIED = of_transformers("LlamaForCausalLM", **SIZES, **HEADS, tie_word_embeddings=True)
DECODERS = {
    "OPT": of_transformers(
        "OPTForCausalLM",
        **SIZES,
        ffn_dim=24,
        word_embed_proj_dim=16,
        max_position_embeddings=32,
        do_layer_norm_before=True,
    ),
    "GPT2": of_transformers("GPT2LMHeadModel", vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=2),
    "GPTJ": of_transformers(
        "GPTJForCausalLM", vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, rotary_dim=4
    ),
    "Mistral": of_transformers("MistralForCausalLM", **SIZES, **HEADS),
    "Qwen2": of_transformers("Qwen2ForCausalLM", **SIZES, **HEADS),
    "Gemma3": of_transformers(
        "Gemma3ForCausalLM", **SIZES, **HEADS, head_dim=8, layer_types=["full_attention", "sliding_attention"]
    ),
}
ENCODER = {"intermediate_size": 24, "max_position_embeddings": 32}
ENCODERS = {
    "Bert": of_transformers("BertModel", **{**SIZES, **ENCODER}),
    "Roberta": of_transformers("RobertaModel", **{**SIZES, **ENCODER}, pad_token_id=0),
    "Deberta": of_transformers("DebertaModel", **{**SIZES, **ENCODER}),
    "DebertaV2": of_transformers("DebertaV2Model", **{**SIZES, **ENCODER}),
}
ENCODER_DECODERS = {
    "T5": of_transformers(
        "T5ForConditionalGeneration", vocab_size=31, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4
    ),
    "Bart": of_transformers(
        "BartForConditionalGeneration",
        vocab_size=31,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=0,
    ),
}
CLASSIFIERS = {
    "Bert": of_transformers("BertForSequenceClassification", **{**SIZES, **ENCODER}),
    "Roberta": of_transformers("RobertaForSequenceClassification", **{**SIZES, **ENCODER}, pad_token_id=0),
    "Llama": of_transformers("LlamaForSequenceClassification", **SIZES, **HEADS, pad_token_id=0),
}
EXPERTS = {
    "Mixtral": eager_experts(of_transformers("MixtralForCausalLM", **SIZES, **HEADS, num_local_experts=3)),
    "gpt-oss": eager_experts(
        of_transformers("GptOssForCausalLM", **SIZES, **HEADS, head_dim=8, num_local_experts=3, num_experts_per_tok=2)
    ),
}
DEEPSEEK = eager_experts(
    of_transformers(
        "DeepseekV3ForCausalLM",
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        head_dim=4,
        first_k_dense_replace=1,
    )
)
RESNET = of_transformers(
    "ResNetForImageClassification", embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"
)


def mlp(refused: str = "", make: Callable[[], nn.Module] = Mlp, **settings: Any) -> Kind:
    return Kind(seeded(make), (ROWS,), {"target_modules": ["lin0"], **settings}, refused)


def embedded(refused: str = "", **settings: Any) -> Kind:
    return Kind(seeded(EmbeddingAndConv1D), (INDICES,), settings, refused)


def convolved(dimensions: int, refused: str = "", targets: tuple[str, ...] = ("conv",), **settings: Any) -> Kind:
    options = settings.pop("options", {})
    make = seeded(lambda: Convolution(dimensions, **options))
    return Kind(make, (IMAGES[dimensions],), {"target_modules": list(targets), **settings}, refused)


def narrow(kind: Kind) -> Kind:
    return kind._replace(is_wide=False)


def new(kind: Kind) -> Kind:
    return kind._replace(since=(0, 21))


def tokens(make: Callable[[], nn.Module], refused: str = "", **settings: Any) -> Kind:
    return Kind(make, (TOKENS,), settings, refused)


def kinds() -> dict[str, Kind]:
    """Return the kinds by name. PEFT is imported here, which takes seconds."""
    from peft.tuners.lora import config  # noqa: PLC0415

    def part(name: str, **settings: Any) -> Any:
        """Return a part of a configuration, or its settings if this PEFT does not have it."""
        return getattr(config, name, dict)(**settings)

    both = ["lin0", "lin1"]
    usual = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.05}
    found = {
        "linear layer, by a regular expression": mlp(target_modules="lin0"),
        "linear layer": mlp(),
        "classifier, rank above its size": mlp(target_modules=["lin1"]),
        "two linear layers": mlp(target_modules=both),
        "linear layer, another stored whole": mlp(modules_to_save=["lin1"]),
        "linear layer, with alpha and dropout": mlp(lora_alpha=4, lora_dropout=0.1),
        "rslora": mlp(target_modules=both, use_rslora=True, lora_alpha=3),
        "ranks and alphas by pattern": mlp(
            target_modules=both, rank_pattern={"lin1": 2}, alpha_pattern={"^lin0": 5, "n1": 7}
        ),
        "biases of all layers": mlp(bias="all", modules_to_save=["lin1"]),
        "biases of adapted layers": mlp(bias="lora_only"),
        "DoRA, linear layer": mlp("use_dora", use_dora=True),
        "KaSA": new(mlp("kasa_config", kasa_config=part("KasaConfig"), r=4)),
        "MiCA": new(narrow(mlp(init_lora_weights="mica", r=4))),
        "PiSSA": narrow(mlp("init_lora_weights", init_lora_weights="pissa", r=4)),
        "OLoRA": narrow(mlp("init_lora_weights", init_lora_weights="olora", r=4)),
        "orthogonal start": mlp(init_lora_weights="orthogonal", r=4),
        "Gaussian start": mlp(init_lora_weights="gaussian"),
        "VeLoRA": new(mlp("velora_config", velora_config=part("VeloraConfig", num_groups=2, init_type="random"))),
        "MonteCLoRA": new(mlp("monteclora_config", monteclora_config=part("MontecloraConfig", num_samples=2))),
        "BD-LoRA": mlp(
            "use_bdlora",
            target_modules=both,
            use_bdlora=part("BdLoraConfig", target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2),
        ),
        "bias of the factors, linear layer": mlp("lora_bias", target_modules=both, lora_bias=True, lora_alpha=32),
        "parameter of any module": mlp(make=Parameters, target_modules=[], target_parameters=["lin0.weight"]),
        "linear layer, and a parameter": mlp(target_parameters=["lin1.weight"]),
        "linear layer, batch norm stored whole": mlp(make=BatchNorm, modules_to_save=["norm"]),
        "Conv1D of transformers": embedded(target_modules=["conv1d"]),
        "embedding": embedded(target_modules=["emb"]),
        "embedding and Conv1D": embedded(target_modules=["emb", "conv1d"]),
        "DoRA, embedding and Conv1D": embedded("use_dora", target_modules=["emb", "conv1d"], use_dora=True),
        "trainable tokens": embedded(
            "trainable_token_indices", target_modules=["conv1d"], trainable_token_indices={"emb": [0, 10]}
        ),
        **{f"convolution, {n} dimensions": convolved(n) for n in (1, 2, 3)},
        **{f"convolution, {n} dimensions, and a linear layer": convolved(n, targets=("conv", "lin0")) for n in (2, 3)},
        "convolution in groups": convolved(2, "in groups", options={"groups": 2}),
        "dilated convolution": convolved(2, "dilation", options={"dilation": 2, "padding": "same"}),
        "convolution with other padding": convolved(
            1, "padding_mode", options={"padding": 1, "padding_mode": "circular"}
        ),
        **{f"DoRA, convolution, {n} dimensions": convolved(n, "use_dora", use_dora=True) for n in (1, 2, 3)},
        **{
            f"bias of the factors, convolution, {n} dimensions": convolved(n, "lora_bias", lora_bias=True)
            for n in (2, 3)
        },
        "MultiheadAttention": Kind(seeded(Attention), (SEQUENCE,), {"target_modules": ["mha"]}),
        "MultiheadAttention and a linear layer": Kind(
            seeded(Attention), (SEQUENCE,), {"target_modules": ["mha", "lin0"], "alpha_pattern": {"mha": 3}}
        ),
        "`out_proj` of MultiheadAttention": Kind(
            seeded(Attention), (SEQUENCE,), {"target_modules": ["out_proj"]}, "out_proj"
        ),
        "aLoRA": tokens(LLAMA, "alora_invocation_tokens", **usual, alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        "trainable tokens of a decoder": tokens(
            LLAMA, "trainable_token_indices", **usual, trainable_token_indices=[0, 1, 3], task_type="CAUSAL_LM"
        ),
        "replicated layers": tokens(LLAMA, "layer_replication", **usual, layer_replication=[[0, 2], [0, 2]]),
        "all linear layers": tokens(LLAMA, **usual, target_modules="all-linear"),
        "some layers": tokens(LLAMA, **usual, target_modules=["q_proj", "down_proj"], layers_to_transform=[1]),
        "layers except some": tokens(LLAMA, **usual, target_modules=["q_proj"], exclude_modules=["0.self_attn.q_proj"]),
        "embedding of a decoder": tokens(LLAMA, r=4, target_modules=["embed_tokens", "q_proj"]),
        "tied embedding": tokens(TIED, "tied", r=4, target_modules=["embed_tokens"]),
        "tied embedding, `ensure_weight_tying`": tokens(
            TIED, r=4, target_modules=["embed_tokens"], ensure_weight_tying=True
        ),
        "tied head stored whole": tokens(TIED, "tied", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "tied embedding stored whole, `ensure_weight_tying`": tokens(
            TIED, r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
        ),
        "scaled embedding of Gemma3": tokens(DECODERS["Gemma3"], "tied", r=4, target_modules=["embed_tokens"]),
        "decoder: Llama": tokens(LLAMA, **usual, task_type="CAUSAL_LM"),
        **{f"decoder: {name}": tokens(make, **usual, task_type="CAUSAL_LM") for name, make in DECODERS.items()},
        **{f"encoder: {name}": tokens(make, **usual) for name, make in ENCODERS.items()},
        **{
            f"encoder-decoder: {name}": Kind(make, (TOKENS, None, TOKENS), {**usual, "task_type": "SEQ_2_SEQ_LM"})
            for name, make in ENCODER_DECODERS.items()
        },
        **{f"classifier: {name}": tokens(make, **usual, task_type="SEQ_CLS") for name, make in CLASSIFIERS.items()},
        "vision: ResNet": Kind(
            RESNET, (normal(5, 2, 3, 16, 16),), {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}
        ),
        "shared experts that PEFT rewrites": tokens(
            DEEPSEEK, r=4, target_modules=["gate_proj", "up_proj", "down_proj"]
        ),
    }
    for name, make in EXPERTS.items():
        for parameters in (["down_proj"], ["gate_up_proj"], ["down_proj", "gate_up_proj"]):
            targets = [f"mlp.experts.{parameter}" for parameter in parameters]
            settings = {"r": 4, "target_modules": [], "target_parameters": targets}
            found[f"experts: {name}, {' and '.join(parameters)}"] = tokens(make, **settings)
        found[f"experts: {name}, one in each layer, and queries"] = tokens(
            make,
            target_modules=["q_proj"],
            target_parameters=["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"],
        )
    return found


def table() -> str:
    """Return the kinds as a table of Markdown."""
    rows = [
        f"| {name} | {f'refused, naming `{kind.refused}`' if kind.refused else 'yes'} |"
        for name, kind in kinds().items()
    ]
    return "\n".join(["| adapter | loads |", "|---|---|", *rows])
