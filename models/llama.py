"""A LLaMA-style decoder in one file (arXiv:2302.13971).

It has RMSNorm, rotary positions, SwiGLU and no biases. The configurations have the names and sizes from the experiments
of ReLoRA (arXiv:2307.05695) and SwitchLoRA (arXiv:2406.06564).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

# The weights that become low-rank. Embedding, norms and head are trained full-rank.
TARGETS = ("layers.*.attention.*.weight", "layers.*.feed_forward.*.weight")


@dataclass(frozen=True)
class LlamaConfig:
    width: int
    hidden: int  # of the feed-forward layers
    layers: int
    heads: int
    vocabulary: int = 32_100  # T5-base's tokenizer
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0


CONFIGS = {
    "llama-tiny": LlamaConfig(width=32, hidden=88, layers=2, heads=2),
    "llama-9m": LlamaConfig(width=128, hidden=352, layers=4, heads=4),
    "llama-20m": LlamaConfig(width=256, hidden=688, layers=4, heads=4),
    "llama-35m": LlamaConfig(width=384, hidden=1024, layers=6, heads=8),
    "llama-40m": LlamaConfig(width=416, hidden=1024, layers=8, heads=8),
    "llama-60m": LlamaConfig(width=512, hidden=1376, layers=8, heads=8),
    "llama-71m": LlamaConfig(width=512, hidden=1368, layers=12, heads=8),
    "llama-100m": LlamaConfig(width=512, hidden=1368, layers=21, heads=16),
    "llama-130m": LlamaConfig(width=768, hidden=2048, layers=12, heads=12),
    "llama-250m": LlamaConfig(width=768, hidden=2560, layers=24, heads=16),
    "llama-350m": LlamaConfig(width=1024, hidden=2736, layers=24, heads=16),
    "llama-1b": LlamaConfig(width=2048, hidden=5461, layers=24, heads=32),
    "llama-3b": LlamaConfig(width=2560, hidden=6848, layers=32, heads=32),
    "llama-7b": LlamaConfig(width=4096, hidden=11008, layers=32, heads=32),
}


def config(name: str, vocabulary: int | None = None) -> LlamaConfig:
    """Return a configuration by its name. Default None means T5-base's vocabulary.

    Raises:
        ValueError: If no configuration has that name.
    """
    if name not in CONFIGS:
        raise ValueError(f"`model` must be one of {', '.join(CONFIGS)}, got {name!r}")
    return replace(CONFIGS[name], vocabulary=vocabulary or CONFIGS[name].vocabulary)


class LayerCache:
    """The keys and values of one layer for all tokens so far.

    Their shape is (batch, heads, length, width / heads). Attention appends the keys and values of each call.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.key is None else self.key.shape[-2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens, and return the tensors of all tokens."""
        self.key = key if self.key is None else torch.cat([self.key, key], dim=-2)
        self.value = value if self.value is None else torch.cat([self.value, value], dim=-2)
        return self.key, self.value


class Attention(nn.Module):
    """Causal self-attention with rotary positions (arXiv:2104.09864)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.heads = config.heads
        for name in ("query", "key", "value", "output"):
            self.add_module(name, nn.Linear(config.width, config.width, bias=False))

    def forward(self, x: Tensor, rotation: Tensor, cache: LayerCache | None = None) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )  # (batch, heads, length, width / heads)
        query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is None:
            mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            key, value = cache.append(key, value)
            mixed = scaled_dot_product_attention(query, key, value, attn_mask=causal_mask(query, key))
        return self.output(mixed.transpose(1, 2).flatten(-2))


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Return which keys each query may attend to, as flags (queries, keys).

    The queries and the last keys belong to the same tokens.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    return torch.ones(queries, keys, dtype=torch.bool, device=key.device).tril(keys - queries)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + half]) by the angle of its position.

    `rotation` has the cosines and sines of the angles, (2, length, half).
    """
    cos, sin = rotation.to(x.dtype)
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rotation: Tensor, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotation, cache)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Llama(nn.Module):
    """A decoder from tokens (batch, length) to logits (batch, length, vocabulary).

    With a cache, the tokens follow the tokens of earlier calls with the same cache.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        x = self.embedding(tokens)
        if cache is None:
            rotation = self.rotation(tokens.shape[-1], tokens.device)
            for block in self.layers:
                x = block(x, rotation)
        else:
            before = cache[0].length
            rotation = self.rotation(before + tokens.shape[-1], tokens.device)[:, before:]
            for block, layer_cache in zip(self.layers, cache, strict=True):
                x = block(x, rotation, layer_cache)
        return self.head(self.norm(x))

    def new_cache(self) -> list[LayerCache]:
        """Return an empty cache, one entry for each layer."""
        return [LayerCache() for _ in self.layers]

    def rotation(self, length: int, device: torch.device) -> Tensor:
        """Return cosines and sines of the angles, (2, length, width / heads / 2)."""
        half = self.config.width // self.config.heads // 2
        frequency = self.config.rope_base ** (-torch.arange(half, device=device) / half)
        angle = torch.arange(length, device=device)[:, None] * frequency
        return torch.stack([angle.cos(), angle.sin()])


def init_weights(model: Llama, seed: int) -> Llama:
    """Draw all matrices from N(0, 0.02**2) in place, and return the model.

    This is the initialization of the experiments named at the top. The weights of norms stay 1.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return model
