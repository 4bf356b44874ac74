"""Files are written one tensor at a time, as `safetensors` writes them, and stay open while they are read."""

import copy
import json
import os
import pickle
import weakref
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from dynlora_fn import init, state_dict
from dynlora_fn.interop import _safetensors as reading
from dynlora_fn.interop import load_adapter, open_weights, save_adapter, save_merged, save_weights
from dynlora_fn.interop._lazy import LazyTensor
from dynlora_fn.interop._save import write
from dynlora_fn.interop._state_dict import lazy_state_dict
from dynlora_fn.testing import assert_same, normal

safetensors = pytest.importorskip("safetensors.torch")
DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool,
]  # fmt: skip


def of_every_dtype() -> dict[str, Tensor]:
    shapes = {"matrix": (3, 4), "scalar": (), "empty": (0, 2), "vector of \"ä\"\n": (5,)}  # fmt: skip
    return {
        f"{name} {dtype}": (torch.arange(len(torch.empty(shape).flatten())) % 2).to(dtype).reshape(shape)
        for dtype in DTYPES
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_a_file_equals_that_of_safetensors(metadata: dict[str, str], tmp_path: Path):
    weights = of_every_dtype()
    safetensors.save_file(weights, tmp_path / "theirs", metadata=metadata)
    save_weights(weights, tmp_path / "ours", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    got = open_weights(tmp_path / "ours")
    assert_same(dict(sorted(got.items())), dict(sorted(weights.items())))
    assert {name: got.shape(name) for name in got} == {name: tuple(weight.shape) for name, weight in weights.items()}


def test_tensors_in_any_layout_are_written_by_value(tmp_path: Path):
    matrix = normal(0, 3, 4)
    weights = {
        "turned": matrix.mT,
        "repeated": matrix[:1].expand(5, 4),
        "conjugated": torch.complex(matrix, matrix).to(torch.complex64).conj(),
        "negated": torch.complex(matrix, matrix).to(torch.complex64).conj().imag,
    }
    save_weights(weights, tmp_path / "file")
    expected = {name: weights[name].clone().resolve_conj().resolve_neg().contiguous() for name in sorted(weights)}
    assert_same(dict(sorted(open_weights(tmp_path / "file").items())), expected)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.eye(3).to_sparse(), "`weights` has 'w' of layout torch.sparse_coo"),
        (torch.empty(3, device="meta"), "`weights` has 'w' on the meta device"),
        (TwoTensor(torch.ones(2), torch.ones(2)), "`weights` has 'w' of type TwoTensor"),
    ],
)
def test_what_has_no_bytes_is_refused_and_the_file_stays(weight: Tensor, message: str, tmp_path: Path):
    save_weights({"w": torch.ones(2)}, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(ValueError, match=message):
        save_weights({"v": torch.ones(9), "w": weight}, tmp_path / "file")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": before}


def test_progress_is_reported_in_bytes_and_can_stop_the_work(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    weights = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8), "c": torch.ones(5)}
    save_weights(weights, tmp_path / "file", progress=lambda done, total: calls.append((done, total)))
    assert calls[0] == (0, 34)
    assert calls[-1] == (34, 34)
    assert sorted(calls) == calls
    assert len(calls) == 4

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    before = (tmp_path / "file").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        save_weights(weights, tmp_path / "file", progress=stop)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": before}
    with pytest.raises(TypeError, match="`progress` is 3"):
        save_weights(weights, tmp_path / "file", progress=3)  # type: ignore[arg-type]


def test_progress_of_models_and_adapters_goes_from_none_to_all(tmp_path: Path):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    params = init(model, rank=2, seed=0, targets=["*.weight"])
    changed = {name: param + 1 if isinstance(param, Tensor) else param for name, param in params.items()}
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))

    for work in (
        lambda: save_merged(model, params, tmp_path, progress=progress),
        lambda: save_adapter(model, params, tmp_path / "with-base", progress=progress),
        lambda: save_adapter(model, changed, tmp_path, original=model.state_dict(), progress=progress),
        lambda: load_adapter(model, tmp_path, seed=0, progress=progress),
    ):
        calls.clear()
        work()
        total = calls[0][1]
        assert calls[0] == (0, total)
        assert calls[-1] == (total, total)
        assert calls == sorted(calls)
        assert {total for _, total in calls} == {total}
        assert total > 0


def test_a_merged_module_is_written_one_dense_weight_at_a_time(tmp_path: Path):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    params = init(model, rank=2, seed=0, targets=["*.weight"])
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    counts = []

    def watched(weight: LazyTensor) -> LazyTensor:
        def read() -> Tensor:
            tensor = weight.read()
            if tensor.ndim > 1:  # biases are not formed
                alive.add(tensor)
                counts.append(len(alive))
            return tensor

        return weight._replace(read=read)

    write({name: watched(weight) for name, weight in lazy_state_dict(model, params).items()}, tmp_path / "file")
    save_merged(model, params, tmp_path)
    assert counts == [1] * 6
    assert (tmp_path / "file").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert_same(dict(sorted(open_weights(tmp_path).items())), dict(sorted(state_dict(model, params).items())))


class Opened:
    """Counts the files that are opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.count, self.open = 0, reading._open
        monkeypatch.setattr(reading, "_open", self)

    def __call__(self, file: Path) -> Any:
        self.count += 1
        return self.open(file)


def test_a_file_is_opened_once_for_all_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = Opened(monkeypatch)
    weights = {f"layers.{layer}.weight": torch.full((2,), layer) for layer in range(50)}
    for shard in range(2):
        part = dict(list(weights.items())[shard::2])
        save_weights(part, tmp_path / f"{shard}.safetensors")
    where = {name: f"{layer % 2}.safetensors" for layer, name in enumerate(weights)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    read = open_weights(tmp_path)
    assert opened.count == 2  # for the names
    assert_same(dict(read), weights)
    assert all(name in read for name in weights)
    assert opened.count == 4


def test_closed_weights_and_copies_open_the_files_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_weights({"w": torch.ones(2)}, tmp_path / "file")
    with open_weights(tmp_path / "file") as weights:
        tensor = weights["w"]
        assert len(weights._open) == 1
    assert len(weights._open) == 0
    assert torch.equal(tensor, torch.ones(2))
    opened = Opened(monkeypatch)
    copies = copy.copy(weights), copy.deepcopy(weights), pickle.loads(pickle.dumps(weights))
    for read in (weights, *copies):
        assert torch.equal(read["w"], torch.ones(2))
    assert opened.count == 4


def test_no_more_files_stay_open_than_a_process_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reading, "MOST_OPEN_FILES", 3)
    files = {f"w{index}": tmp_path / f"{index}.safetensors" for index in range(5)}
    for name, file in files.items():
        save_weights({name: torch.ones(1)}, file)
    weights = reading.Weights(files)
    for name in [*files, *files]:
        assert torch.equal(weights[name], torch.ones(1))
        assert len(weights._open) <= 3


def test_a_replaced_file_is_read_again_and_never_mixed_with_the_old_one(tmp_path: Path):
    file = tmp_path / "file"
    save_weights({"w": torch.ones(2), "v": torch.zeros(3)}, file)
    weights = open_weights(file)
    assert torch.equal(weights["w"], torch.ones(2))
    save_weights({"a": torch.full((7,), 5.0), "w": torch.full((4,), 2.0)}, file)
    assert torch.equal(weights["w"], torch.full((4,), 2.0))
    with pytest.raises(ValueError, match="`path` has a damaged tensor 'v'"):
        weights["v"]
    content = bytearray(file.read_bytes())
    content[-4:] = torch.tensor([9.0]).numpy().tobytes()  # in place
    file.write_bytes(content)
    assert weights["w"][-1] == 9
    file.unlink()
    with pytest.raises(FileNotFoundError):
        weights["w"]


def test_weights_are_written_over_the_file_that_they_are_read_from(tmp_path: Path):
    file = tmp_path / "file"
    save_weights({"w": torch.ones(2), "v": torch.zeros(3)}, file)
    weights = open_weights(file)
    save_weights(weights, file)
    assert_same(dict(sorted(weights.items())), {"v": torch.zeros(3), "w": torch.ones(2)})


def test_only_regular_files_are_replaced(tmp_path: Path):
    save_weights({"w": torch.ones(2)}, tmp_path / "file")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    save_weights({"w": torch.zeros(2)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert torch.equal(open_weights(tmp_path / "file")["w"], torch.zeros(2))
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="which exists and is not a regular file"):
            save_weights({"w": torch.ones(2)}, path)


def test_a_change_that_is_not_finite_is_refused_by_name(tmp_path: Path):
    model = nn.Sequential(nn.Linear(6, 4))
    params = init(model, rank=2, seed=0, targets=["0.weight"])
    original = model.state_dict() | {"0.weight": torch.full((4, 6), float("nan"))}
    with pytest.raises(ValueError, match=r"`params` or `original` has '0.weight' with entries that are not finite"):
        save_adapter(model, params, tmp_path, original=original)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (
            {"a": torch.ones(2), "w": torch.ones(2, dtype=torch.complex128)},
            TypeError,
            "has 'w' of dtype torch.complex128",
        ),
        ({"__metadata__": torch.ones(2)}, ValueError, "has the name '__metadata__'"),
        (MappingProxyType({"w": 1.0}), TypeError, "has 1.0 for 'w'; use a tensor"),
    ],
)
def test_what_a_file_cannot_have_is_refused_by_name(weights: Any, error: type, message: str, tmp_path: Path):
    with pytest.raises(error, match=f"`weights` {message}"):
        save_weights(weights, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_a_transform_is_not_written(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"`weights` has 'w' inside of a transform of `torch\.func`, which has no bytes"
    ):
        torch.vmap(lambda w: save_weights({"w": w}, tmp_path / "file"))(torch.ones(2, 3))
    assert not list(tmp_path.iterdir())
