"""Checkpoints bring back every leaf of a state bit for bit, and what does not fit is refused by name."""

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
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
from tests.support.damage import damage_by_a_bit, damage_by_truncation
from tests.support.optimizer_states import filled
from tests.support.optimizer_table import OPTIMIZERS

load, save = dl.interop.load_checkpoint, dl.interop.save_checkpoint
# Of a size from which moments in 8 bit are.
DENSE = {"layers.0.w": normal(0, 64, 64), "layers.1.w": normal(1, 64, 64), "norm": normal(2, 64)}
BASES = {
    "float32": {},
    "int8": {"base": "int8", "residual": "int8"},
    "float8": {"base": "float8", "residual": "bfloat16"},
    "nf4": {"base": "nf4", "residual": None},
    "bfloat16": {"base": "bfloat16", "residual": "bfloat16"},
}


def params_of(rank: int = 32, **settings: Any) -> dict[str, Any]:
    return dl.init(DENSE, rank=rank, seed=0, targets=["*.w"], **settings)


def other(leaf: Any) -> Any:
    """Return a leaf of the same kind with another value."""
    if isinstance(leaf, Tensor):
        return torch.zeros_like(leaf)
    return leaf if leaf is None else type(leaf)()


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


class Unknown:
    def __repr__(self) -> str:
        return "an object"


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (Unknown(), r"`state` has an object at \['x'\], which a checkpoint cannot store"),
        (torch.Generator(), r"at \['x'\], which a checkpoint cannot store; .*`generator.get_state\(\)`"),
        (torch.empty(2, device="meta"), r"`state` has a tensor on the meta device at \['x'\]"),
        (torch.eye(2).to_sparse(), r"`state` has a tensor of layout torch.sparse_coo at \['x'\]"),
        (torch.ones(2, dtype=torch.complex128), r"dtype torch.complex128 at \['x'\], which safetensors cannot store"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(leaf: Any, message: str, tmp_path: Path):
    for call in (lambda: save({"x": leaf}, tmp_path / "new", step=1), lambda: load(tmp_path, {"x": leaf})):
        with pytest.raises(TypeError, match=message.replace("`state`", "`(state|template)`")):
            call()
    assert not (tmp_path / "new").exists()


def trained(rank: int = 32, optimizer: Any = None, **settings: Any) -> dict[str, Any]:
    params = params_of(rank, **settings)
    return {"params": params, "optimizer": (optimizer or dl.optim.adamw()).init(dl.partition(params).trainable)}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (lambda: trained(rank=3), r"\['params'\]\['layers.\*.w'\].factors.b is \(2, 64, 32\) torch.float32 instead of"),
        (lambda: trained(base="int8"), r"holds other tensors: \['params'\]\['layers.\*.w'\].base.codes.* is missing"),
        (lambda: trained(dtype=torch.bfloat16), r"factors.b is .* torch.float32 instead of .* torch.bfloat16"),
        (lambda: trained(optimizer=dl.optim.lion()), r"it holds other tensors: \['optimizer'\]"),
        (lambda: trained(optimizer=dl.optim.adamw(moments="8bit")), r"\['optimizer'\].*mu.*codes.* is missing"),
        (lambda: trained() | {"t": torch.tensor(0)}, r"it holds other tensors: \['t'\], \(\) torch.int64, is missing"),
        (lambda: trained() | {"t": 0}, r"it holds other tensors: \['t'\], a number, is missing"),
        (lambda: {"params": trained()["params"]}, r"\['optimizer'\].*, \(.*\) torch\..*, has no place"),
        (lambda: trained() | {"optimizer": 3}, r"\['optimizer'\], a number, is missing"),
    ],
)
def test_another_state_is_refused_by_its_first_leaf(template: Callable[[], Any], message: str, tmp_path: Path):
    save(trained(), tmp_path, step=1)
    with pytest.raises(ValueError, match=rf"^`folder` has no checkpoint that fits: .*step-00000001: .*{message}"):
        load(tmp_path, template())


def test_values_of_other_kinds_are_refused(tmp_path: Path):
    save({"x": 1}, tmp_path, step=1)
    for value, kind in ((True, "a flag"), ("1", "a text"), (torch.tensor(1), r"\(\) torch.int64")):
        with pytest.raises(ValueError, match=rf"\['x'\] is a number instead of {kind}"):
            load(tmp_path, {"x": value})


STATE = {"w": torch.arange(1000.0), "t": 3}
TEMPLATE = {"w": torch.zeros(1000), "t": 0}


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_link(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to(path.parent.parent / "moved")


DAMAGES = (damage_by_truncation, damage_by_a_bit, remove, empty, into_pipe, into_folder, into_link)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["state.safetensors", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(
    damage: Callable[[Path], None], file: str, tmp_path: Path
):
    save({**STATE, "t": 1}, tmp_path, step=1)
    save(STATE, tmp_path, step=2)
    damage(tmp_path / "step-00000002" / file)
    loaded = load(tmp_path, TEMPLATE)
    assert loaded is not None
    assert (loaded.step, loaded.state["t"]) == (1, 1)
    ((path, reason, is_damaged),) = loaded.refused
    assert path == tmp_path / "step-00000002"
    assert is_damaged
    assert "state.safetensors" in reason or "SHA256SUMS" in reason
    with pytest.raises(ValueError, match=r"has no checkpoint that fits: .*step-00000002: "):
        load(tmp_path, TEMPLATE, step=2)


@pytest.mark.parametrize("change", [into_pipe, remove, into_link])
def test_what_is_no_folder_is_no_checkpoint(change: Callable[[Path], None], tmp_path: Path):
    save({**STATE, "t": 1}, tmp_path, step=1)
    (tmp_path / "step-00000002").write_text("")
    change(tmp_path / "step-00000002")
    loaded = load(tmp_path, TEMPLATE)
    assert loaded is not None
    assert loaded.step == 1
    assert [str(reason) for _, reason, _ in loaded.refused] == ["it is no folder"] * (change is not remove)
    if change is not remove:
        with pytest.raises(OSError, match="step-00000002' is no folder; move it away"):
            save(STATE, tmp_path, step=2)
    assert sorted(path.name for path in tmp_path.glob("[.s]*"))[:1] == ["step-00000001"]


def test_a_checkpoint_in_the_folder_of_another_step_is_refused(tmp_path: Path):
    for step in (1, 2):
        save({**STATE, "t": step}, tmp_path, step=step)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003")
    loaded = load(tmp_path, TEMPLATE)
    assert loaded is not None
    assert (loaded.step, loaded.state["t"]) == (2, 2)
    assert loaded.refused == [(tmp_path / "step-00000003", "it is of step 1, and not of that in its name", False)]


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path):
    settings = {"seed": 0, "lr": 0.1, "targets": ("a", "b"), "decay": None}
    save(STATE, tmp_path, step=1, settings=settings)
    save(STATE, tmp_path, step=2, settings=settings | {"seed": 1})
    loaded = load(tmp_path, TEMPLATE, settings={**settings, "new": 3, "targets": ["a", "b"]})
    assert loaded is not None
    assert loaded.step == 1
    assert loaded.refused == [(tmp_path / "step-00000002", "it has the setting seed 1 instead of 0", False)]
    assert (load(tmp_path, TEMPLATE) or loaded).step == 2
    for wrong in ({"x": object()}, ["seed"], {1: 2}, "seed"):
        with pytest.raises(TypeError, match=r"`settings` (is|has) "):
            save(STATE, tmp_path, step=3, settings=wrong)  # type: ignore[arg-type]


COPIES = ("step-best", "step-last", "step-00000010.bak", "step-0000002", "step-٠٠٠٠٠٠٠٢", "other")


def test_folders_of_other_names_are_left_alone(tmp_path: Path):
    save(STATE, tmp_path, step=1)
    for name in COPIES:
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    for step in (2, 3, 4):
        save({**STATE, "t": step}, tmp_path, step=step, keep=2)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "step-00000004", *COPIES}
    loaded = load(tmp_path, TEMPLATE)
    assert loaded is not None
    assert (loaded.step, loaded.state["t"], loaded.refused) == (4, 4, [])


def test_a_later_checkpoint_does_not_displace_new_ones(tmp_path: Path):
    """It may be damaged, so that the run went on from an older one."""
    for step in (1, 2, 9):
        save(STATE, tmp_path, step=step)
    (tmp_path / "step-00000009" / "state.safetensors").write_bytes(b"")
    save(STATE, tmp_path, step=3, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000009"]
    save({**STATE, "t": 8}, tmp_path, step=9, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]
    assert (load(tmp_path, TEMPLATE) or pytest.fail("none")).state["t"] == 8


def test_what_a_killed_process_has_left_is_removed_and_user_files_are_not(tmp_path: Path):
    for name in (".writing-00000007", ".replaced-00000007", ".writing-mine"):
        (tmp_path / name).mkdir()
    save(STATE, tmp_path, step=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", ".writing-mine"}


def test_an_error_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(STATE, tmp_path, step=1)
    before = sorted(path for path in tmp_path.rglob("*"))

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynlora_fn.interop._checkpoint_save.record_sum", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save(STATE, tmp_path, step=2)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_files_are_safetensors_with_sums_and_equal_states_make_equal_files(tmp_path: Path):
    for name in ("a", "b"):
        save(trained() | {"rate": 0.1}, tmp_path / name, step=7, settings={"seed": 0, "lr": 1})
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "step-00000007").iterdir()} for name in "ab"
    )
    assert first == second
    assert sorted(first) == ["SHA256SUMS", "state.safetensors"]
    folder = tmp_path / "a" / "step-00000007"
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    names = set(dl.interop.open_weights(folder / "state.safetensors"))
    assert names == set(dl.parallel.as_dtensors(trained()))


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


def test_arguments_are_refused_by_name(tmp_path: Path):
    for step in (-1, 0.5, 10**8, True, "1"):
        with pytest.raises((TypeError, ValueError), match="`step` is "):
            save(STATE, tmp_path, step=step)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`keep` is 0"):
        save(STATE, tmp_path, step=1, keep=0)
    save(STATE, tmp_path, step=1)
    with pytest.raises(ValueError, match=r"`folder` is '.*step-00000001', which is one checkpoint"):
        load(tmp_path / "step-00000001", TEMPLATE)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`folder` is '.*file', which is no folder"):
        load(tmp_path / "file", TEMPLATE)
    with pytest.raises(ValueError, match=r"has no checkpoint of step 5, but of \[1\]"):
        load(tmp_path, TEMPLATE, step=5)
    with pytest.raises(TypeError, match="`group` is 3"):
        save(STATE, tmp_path, step=1, group=3)  # type: ignore[arg-type]
    assert load(tmp_path / "none", TEMPLATE) is None


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
