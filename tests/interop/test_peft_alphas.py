"""A layer has the alpha of the first pattern of PEFT's configuration that matches the end of its name."""

import re
from itertools import permutations

import pytest

from dynlora_fn.interop._peft_alphas import alphas

LAYERS = ["q", "layers.0.q", "layers.1.q", "layers.10.q", "layers.0.kq", "a.0.q", "layersx0.q", "v", "o.odd(name"]
PATTERNS = ["q", r"layers\.0\.q", "layers.0.q", r"layers\.\d+\.q", "0.q", r"o\.odd\(name", "k?q", "layers.1.q|v"]


def by_matching_each(config, layer):
    """Return the alpha as PEFT finds it."""
    patterns = config["alpha_pattern"] or {}
    found = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    return next(found, config["lora_alpha"])


def test_it_is_that_which_peft_finds():
    for patterns in permutations(PATTERNS, 3):
        config = {"lora_alpha": 7, "alpha_pattern": {pattern: index for index, pattern in enumerate(patterns)}}
        alpha_of = alphas(config)
        assert [alpha_of(layer) for layer in LAYERS] == [by_matching_each(config, layer) for layer in LAYERS], patterns
    assert alphas({"lora_alpha": 7, "alpha_pattern": None})("q") == 7


def test_a_pattern_for_each_layer_is_not_matched_with_each_layer(monkeypatch: pytest.MonkeyPatch):
    names = [f"model.layers.{layer}.q_proj" for layer in range(1000)]
    compiled = []
    monkeypatch.setattr(re, "compile", compiled.append)
    alpha_of = alphas({"lora_alpha": 1, "alpha_pattern": {re.escape(name): at for at, name in enumerate(names)}})
    assert [alpha_of(name) for name in names] == list(range(1000))
    assert not compiled
