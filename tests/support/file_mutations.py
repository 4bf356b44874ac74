"""Changes of files that are drawn from a seed.

They say whether a reader can tell the result from a valid file.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.damage import Payload


class Mutation(NamedTuple):
    """A change that was made."""

    story: str
    may_differ: bool = False  # the file is another valid one, so that what is read may differ
    name: str = "?"  # of a tensor that an error may name


# --- of any file
def cut(random: Random, file: Path) -> Mutation:
    content = file.read_bytes()
    file.write_bytes(content[: random.randrange(max(1, len(content)))])
    return Mutation("cut")


def flip(random: Random, file: Path) -> Mutation:
    content = bytearray(file.read_bytes())
    at = random.randrange(min(len(content), random.choice([9, 300, len(content)])))
    content[at] ^= 1 << random.randrange(8)
    file.write_bytes(content)
    return Mutation(f"flip at {at}", may_differ=True)


def empty(random: Random, file: Path) -> Mutation:
    file.write_bytes(b"")
    return Mutation("empty")


def remove(random: Random, file: Path) -> Mutation:
    file.unlink()
    return Mutation("remove")


def pipe(random: Random, file: Path) -> Mutation:
    file.unlink()
    os.mkfifo(file)
    return Mutation("pipe")


def folder(random: Random, file: Path) -> Mutation:
    file.unlink()
    file.mkdir()
    return Mutation("folder")


def dangling_link(random: Random, file: Path) -> Mutation:
    file.unlink()
    file.symlink_to(random.choice(["nowhere", file.name]))
    return Mutation("link to nothing")


def pickled(random: Random, file: Path) -> Mutation:
    content = file.read_bytes()
    file.write_bytes(random.choice([pickle.dumps(Payload()), pickle.dumps(Payload()) + content]))
    return Mutation("pickle")


def noise(random: Random, file: Path) -> Mutation:
    file.write_bytes(random.randbytes(random.choice([1, 8, 9, 100])))
    return Mutation("noise")


def two_files(random: Random, file: Path) -> Mutation:
    """Exchange the contents of two files."""
    others = sorted(path for path in file.parent.iterdir() if path != file and path.is_file())
    if not others:
        return Mutation("nothing")
    other = random.choice(others)
    first, second = file.read_bytes(), other.read_bytes()
    file.write_bytes(second)
    other.write_bytes(first)
    return Mutation(f"exchange with {other.name}")


# --- of safetensors files
def _rewritten(file: Path, change: Callable[[dict[str, Tensor]], Mutation]) -> Mutation:
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(file)
    mutation = change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return mutation


def drop_tensor(random: Random, file: Path) -> Mutation:
    def change(tensors: dict[str, Tensor]) -> Mutation:
        name = random.choice(sorted(tensors))
        del tensors[name]
        return Mutation(f"drop {name}")

    return _rewritten(file, change)


def rename_tensor(random: Random, file: Path) -> Mutation:
    def change(tensors: dict[str, Tensor]) -> Mutation:
        name = random.choice(sorted(tensors))
        names = [name + ".x", "x." + name, name[:-1], name.upper(), name.replace("lora_", "lore_"), "", "x"]
        new = random.choice([new for new in names if new not in tensors])
        tensors[new] = tensors.pop(name)
        return Mutation(f"rename {name} to {new}", name=repr(new))

    return _rewritten(file, change)


def extra_tensor(random: Random, file: Path) -> Mutation:
    def change(tensors: dict[str, Tensor]) -> Mutation:
        name = random.choice(sorted(tensors))
        new = random.choice(["x", name + "_2", name.replace("0", "7") + "x", name.replace("lora_A", "lora_C") + "x"])
        tensors[new] = random.choice([tensors[name].clone(), torch.zeros(0), torch.ones(())])
        return Mutation(f"add {new}", name=repr(new))

    return _rewritten(file, change)


def swap_tensors(random: Random, file: Path) -> Mutation:
    def change(tensors: dict[str, Tensor]) -> Mutation:
        if len(tensors) < 2:
            return Mutation("nothing")
        first, second = random.sample(sorted(tensors), 2)
        tensors[first], tensors[second] = tensors[second], tensors[first]
        return Mutation(f"swap {first}, {second}", may_differ=tensors[first].shape == tensors[second].shape)

    return _rewritten(file, change)


def other_dtype(random: Random, file: Path) -> Mutation:
    def change(tensors: dict[str, Tensor]) -> Mutation:
        name = random.choice(sorted(tensors))
        dtypes = [torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float64, torch.bfloat16, torch.float16]
        dtype = random.choice([dtype for dtype in dtypes if dtype != tensors[name].dtype])
        tensors[name] = tensors[name].to(dtype)
        return Mutation(f"{name} in {dtype}", may_differ=dtype.is_floating_point)

    return _rewritten(file, change)


def other_shape(random: Random, file: Path) -> Mutation:
    def change(tensors: dict[str, Tensor]) -> Mutation:
        name = random.choice(sorted(tensors))
        tensor = tensors[name]
        shapes = [
            tensor[None],
            tensor.reshape(-1, 1),
            torch.cat([tensor.reshape(-1)] * 2),
            torch.zeros(0),
            torch.ones(()),
        ]
        if tensor.ndim > 1:
            shapes += [tensor.mT, tensor[1:], tensor[:, 1:], tensor.reshape(-1)]
        changed = random.choice([changed for changed in shapes if changed.shape != tensor.shape])
        tensors[name] = changed.clone()
        return Mutation(f"{name} of shape {tuple(changed.shape)}")

    return _rewritten(file, change)


# --- of JSON files
def _json(file: Path, change: Callable[[Any], Mutation]) -> Mutation:
    tree = json.loads(file.read_text())
    mutation = change(tree)
    file.write_text(json.dumps(tree))
    return mutation


def other_file_in_index(random: Random, file: Path) -> Mutation:
    """Point outside of the folder, where a file with the tensor lies, or at nothing."""

    def change(tree: Any) -> Mutation:
        names = tree["weight_map"]
        name = random.choice(sorted(names))
        outside = file.parent.parent / "outside"
        outside.mkdir(exist_ok=True)
        (outside / names[name]).write_bytes((file.parent / names[name]).read_bytes())
        paths = [f"../outside/{names[name]}", str(outside / names[name]), f"./../outside/{names[name]}"]
        names[name] = random.choice([*paths, "", ".", "..", "/", "a/b", "nowhere", None, 3, [], {}, "x\0y"])
        return Mutation(f"{name} in {names[name]!r}")

    return _json(file, change)


def names_in_index(random: Random, file: Path) -> Mutation:
    def change(tree: Any) -> Mutation:
        names = tree["weight_map"]
        name = random.choice(sorted(names))
        way = random.choice(["drop", "rename", "add", "swap", "all"])
        where = names[name]
        if way in ("drop", "rename"):
            del names[name]
        if way in ("rename", "add"):
            names[name + "x"] = where
        if way == "swap":
            names[name] = next((other for other in names.values() if other != where), where)
        if way == "all":
            tree["weight_map"] = random.choice([{}, None, [], "x", 3])
        return Mutation(f"{way} {name} in the index")

    return _json(file, change)


def other_json(random: Random, file: Path) -> Mutation:
    texts = ["null", "[]", "3", '"x"', "{}", "{", "[" * 10**5, '{"a": NaN}', "\xe9"]
    file.write_text(random.choice(texts), encoding="latin-1")
    return Mutation(f"JSON {file.read_bytes()[:9]!r}")


ANY = (cut, flip, empty, remove, pipe, folder, dangling_link, pickled, noise, two_files)
TENSORS = (drop_tensor, rename_tensor, extra_tensor, swap_tensors, other_dtype, other_shape)
INDEX = (other_file_in_index, names_in_index, other_json)


def mutate(random: Random, file: Path) -> Mutation:
    """Change a file in a way that is drawn for its kind."""
    ways: list[Callable[[Random, Path], Mutation]] = [*ANY]
    if file.suffix == ".safetensors":
        ways += TENSORS * 2
    if file.name.endswith(".index.json"):
        ways += INDEX * 4
    elif file.suffix == ".json":
        ways += [other_json] * 2
    mutation = random.choice(ways)(random, file)
    return mutation._replace(story=f"{file.name}: {mutation.story}")
