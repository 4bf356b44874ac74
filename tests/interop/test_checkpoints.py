"""Checkpoints bring back every leaf of a state bit for bit."""

import itertools
import json
from collections.abc import Iterator
from enum import Enum, IntEnum
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from dynlora_fn.interop._checkpoint_read import Chunk, read_into
from dynlora_fn.interop._checkpoint_state import Piece
from dynlora_fn.interop._checksums import join_sums, record_sum
from dynlora_fn.testing import assert_same, normal
from tests.support.checkpoints import other, params_of, trained
from tests.support.optimizer_states import filled
from tests.support.optimizer_table import OPTIMIZERS

load, save = dl.interop.load_checkpoint, dl.interop.save_checkpoint

BASES = {
    "float32": {},
    "int8": {"base": "int8", "residual": "int8"},
    "float8": {"base": "float8", "residual": "bfloat16"},
    "nf4": {"base": "nf4", "residual": None},
    "bfloat16": {"base": "bfloat16", "residual": "bfloat16"},
}


@pytest.mark.parametrize("settings", BASES.values(), ids=BASES)
def test_parameters_of_every_base_come_back(settings: dict[str, Any], tmp_path: Path):
    params = params_of(**settings)
    save(params, tmp_path, step=1)
    loaded = load(tmp_path, tree_map(other, params))
    assert loaded is not None
    assert_same(loaded.state, params)


def test_a_deferred_base_comes_back_and_another_divisor_is_refused(tmp_path: Path):
    params = dl.bases.defer(params_of(), vectors=3)
    params = tree_map(lambda leaf: leaf + 1, params)
    save(params, tmp_path, step=1)
    loaded = load(tmp_path, tree_map(other, params))
    assert loaded is not None
    assert_same(loaded.state, params)
    name = next(name for name, param in params.items() if isinstance(param, dl.LowRank))
    divisor = params[name].base.divisor
    changed = params | {name: params[name]._replace(base=params[name].base._replace(divisor=type(divisor)(7.0)))}
    with pytest.raises(ValueError, match=r"base\.divisor is Divisor\(value=32.0\) instead of Divisor\(value=7.0\)"):
        load(tmp_path, changed)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "8bit"])
def test_states_of_every_optimizer_come_back(name: str, tmp_path: Path):
    transform = dl.optim.adamw(moments="8bit") if name == "8bit" else OPTIMIZERS[name].transform
    trainable = dl.partition(params_of()).trainable
    _, opt_state = transform.update(filled(trainable), transform.init(trainable), trainable, lr=0.1)
    save(opt_state, tmp_path, step=1)
    loaded = load(tmp_path, transform.init(trainable))
    assert loaded is not None
    assert_same(loaded.state, opt_state)


@pytest.mark.parametrize("alpha", [16, 0.3])
def test_factors_with_an_alpha_come_back_and_another_alpha_is_refused(alpha: float, tmp_path: Path):
    state = trained(alpha=alpha)
    save(state, tmp_path, step=1)
    loaded = load(tmp_path, tree_map(other, state))
    assert loaded is not None
    assert_same(loaded.state, state)
    assert load(tmp_path, trained(alpha=float(alpha))) is not None
    for template in (trained(alpha=2), trained()):
        with pytest.raises(ValueError, match=r"factors\.alpha.*Alpha\(value="):
            load(tmp_path, template)
    save(trained(), tmp_path, step=2)
    with pytest.raises(ValueError, match=r"factors\.alpha, Alpha\(value=.*\), is missing"):
        load(tmp_path, state, step=2)


def test_numbers_texts_and_generators_come_back(tmp_path: Path):
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    state = {
        "step": 2**70,
        "rate": 0.1,
        "loss": float("inf"),
        "is_last": True,
        "name": "Müller\n\"'",
        "best": None,
        "random": generator.get_state(),
        "list": [torch.ones(2, 0), (torch.tensor(True), torch.tensor(1 + 2j))],
        "pool": dl.switching.init_pool(params_of()),
        3: torch.tensor([1, 2, 65535], dtype=torch.uint16),
        "": torch.ones(3, dtype=torch.float8_e4m3fn),
    }
    save(state, tmp_path, step=0)
    loaded = load(tmp_path, tree_map(other, state))
    assert loaded is not None
    assert loaded.step == 0
    assert_same(tree_map(str, loaded.state), tree_map(str, state))
    tensors = {"1": state["random"], "3": state[3]}
    assert_same({"1": loaded.state["random"], "3": loaded.state[3]}, tensors)
    values = [(type(loaded.state[name]), loaded.state[name]) for name in ("step", "rate", "loss", "is_last", "best")]
    assert values == [(type(state[name]), state[name]) for name in ("step", "rate", "loss", "is_last", "best")]


def test_a_single_tensor_and_an_empty_state_come_back(tmp_path: Path):
    for step, state in enumerate((torch.arange(4.0), {}, (), None, 3.5)):
        save(state, tmp_path / str(step), step=step)
        loaded = load(tmp_path / str(step), tree_map(other, state))
        assert loaded is not None
        assert_same(loaded.state, state)


def test_a_number_or_a_text_may_have_been_none(tmp_path: Path):
    save({"best": None}, tmp_path, step=1)
    save({"best": 0.5}, tmp_path, step=2)
    for step, best in ((1, None), (2, 0.5)):
        for template in (None, 0.0):
            loaded = load(tmp_path, {"best": template}, step=step)
            assert loaded is not None
            assert loaded.state == {"best": best}


def test_checkpoints_without_a_description_are_read(tmp_path: Path):
    """Those of before they had one: tensors and offsets only."""
    state = {"w": torch.arange(6.0).reshape(2, 3), "none": None}
    folder = tmp_path / "step-00000004"
    metadata = {"DCP_SHARDING_INFO": json.dumps({"['w']": {"saved_offsets": [0, 0]}})}
    dl.interop.save_weights({"['w']": state["w"]}, folder / "state.safetensors", metadata=metadata)
    record_sum(folder / "state.safetensors")
    join_sums(folder)
    loaded = load(tmp_path, {"w": torch.zeros(2, 3), "none": None}, settings={"seed": 0})
    assert loaded is not None
    assert loaded.step == 4
    assert_same(loaded.state, state)


def test_older_names_of_leaves_are_mapped(tmp_path: Path):
    save({"old": {"w": torch.ones(2), "t": 5}}, tmp_path, step=1)
    loaded = load(tmp_path, {"new": {"w": torch.zeros(2), "t": 0}}, rename=lambda path: path.replace("new", "old"))
    assert loaded is not None
    assert_same(loaded.state, {"new": {"w": torch.ones(2), "t": 5}})


def test_a_donated_template_is_the_memory_of_the_state(tmp_path: Path):
    values = {"x": normal(0, 4, 6).float(), "y": torch.ones(4, 6), "t": torch.tensor(3), "z": torch.ones(2, 3), "n": 4}
    zeros = torch.zeros(4, 6)
    template = {"x": zeros, "y": zeros, "t": torch.tensor(0), "z": torch.zeros(3).expand(2, 3), "n": 0}
    assert load(tmp_path, template, donate=True) is None
    save(values, tmp_path, step=1)
    loaded = load(tmp_path, template, donate=True)
    assert loaded is not None
    assert_same(loaded.state, values)
    assert loaded.state["x"].data_ptr() == zeros.data_ptr()
    assert loaded.state["t"].data_ptr() == template["t"].data_ptr()
    again = load(tmp_path, loaded.state)
    assert again is not None
    assert again.state["x"].data_ptr() != zeros.data_ptr()


def test_tensors_of_one_entry_are_read_into_whatever_their_strides_are(tmp_path: Path):
    """Torch calls such a tensor contiguous, but does not view its bytes."""
    template = {"w": torch.zeros(4)[::2][:1]}
    assert template["w"].stride() == (2,)
    save({"w": torch.full((4,), 3.0)[1::2][:1]}, tmp_path, step=1)
    assert load(tmp_path, template, donate=True).state["w"].tolist() == [3.0]


@pytest.mark.parametrize("seed", range(30))
def test_pieces_are_read_from_chunks_that_are_split_in_any_way(seed: int, tmp_path: Path):
    """As by another number of processes, along one axis or several."""
    random = Random(seed)
    shape = tuple(random.randint(1, 6) for _ in range(random.randint(0, 4)))
    dtype = random.choice([torch.float32, torch.int8, torch.bfloat16, torch.bool])
    whole = normal(seed, *shape).mul(10).to(dtype)
    chunks, axis = [], random.randrange(max(1, len(shape)))
    for index, (start, part) in enumerate(split(random, whole, axis)):
        file = tmp_path / str(index)
        file.write_bytes(b"header" + part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        offsets = tuple(start if at == axis else 0 for at in range(len(shape)))
        chunks.append(Chunk(file, 6, offsets, tuple(part.shape), dtype))
    axis = random.randrange(max(1, len(shape)))
    for start, part in split(random, whole, axis):
        target = (
            torch.zeros_like(part) if random.random() < 0.5 else torch.zeros_like(part.mT if part.ndim > 1 else part)
        )
        target = target.mT if target.shape != part.shape else target
        offsets = tuple(start if at == axis else 0 for at in range(len(shape)))
        read_into(Piece(target, shape, offsets, True), chunks)
        assert torch.equal(target, part)


def split(random: Random, tensor: Tensor, axis: int) -> list[tuple[int, Tensor]]:
    """Return contiguous parts along an axis, some of them empty, with their starts."""
    if tensor.ndim == 0:
        return [(0, tensor)]
    length = tensor.shape[axis]
    cuts = sorted([0, *(random.randint(0, length) for _ in range(random.randrange(4))), length])
    return [(start, tensor.narrow(axis, start, end - start)) for start, end in itertools.pairwise(cuts)]


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("base", [None, "int8", "nf4"])
def test_sharded_states_come_back(base: str | None, group: dist.ProcessGroup, tmp_path: Path):
    params = dl.parallel.shard_factors(dl.parallel.shard(params_of(base=base), group))
    state = {"params": params, "optimizer": dl.optim.adamw().init(dl.partition(params).trainable), "rate": 0.5}
    save(state, tmp_path, step=1, group=group)
    loaded = load(tmp_path, tree_map(other, state), group=group)
    assert loaded is not None
    assert_same(loaded.state, state)


class Phase(str, Enum):  # noqa: UP042, the `str` of a member is not its value
    WARM = "warm"
    COOL = "cool"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


def test_members_of_enumerations_come_back(tmp_path: Path):
    save({"phase": Phase.WARM, "level": Level.HIGH, "text": Phase.COOL}, tmp_path, step=1)
    loaded = load(tmp_path, {"phase": Phase.COOL, "level": Level.LOW, "text": ""})
    assert loaded is not None
    assert loaded.state == {"phase": Phase.WARM, "level": Level.HIGH, "text": "cool"}
    assert isinstance(loaded.state["phase"], Phase)
    assert isinstance(loaded.state["level"], Level)
