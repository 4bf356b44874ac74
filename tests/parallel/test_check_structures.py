"""`check_replicas` names the first difference in the structure of the states."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import register_constant

import dynlora_fn as dl
from dynlora_fn.bases import Sharded
from dynlora_fn.parallel import Sharding
from dynlora_fn.parallel._describe import describe
from tests.support.processes import in_processes


class Pair(NamedTuple):
    """A node with the fields of factors."""

    b: torch.Tensor
    a: torch.Tensor


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# For each way to differ: the state of most processes, the state of one, and the first difference in the error.
STRUCTURES = {
    "a number": ({"step": 3}, {"step": 4}, "['step']: int 4 in dict instead of ['step']: int 3"),
    "a bool and a number": ({"x": 1}, {"x": True}, "['x']: bool True in dict instead of ['x']: int 1"),
    "a number of another type": ([1], [1.0], "[0]: float 1.0 in list instead of [0]: int 1"),
    "the sign of zero": ([0.0], [-0.0], "[0]: float -0.0 in list instead of [0]: float 0.0"),
    "a text": (
        {"rule": "reset"},
        {"rule": "a: b\nc"},
        r"['rule']: str 'a: b\nc' in dict instead of ['rule']: str 'reset'",
    ),
    "a dtype": (
        [torch.float32],
        [torch.float64],
        "[0]: dtype torch.float64 in list instead of [0]: dtype torch.float32",
    ),
    "a name": ({"v": _tensor(3)}, {"w": _tensor(3)}, "['w']: torch.float32 (3,) in dict instead of ['v']: "),
    "the type of a key": ({1: _tensor(3)}, {"1": _tensor(3)}, "['1']: torch.float32 (3,) in dict instead of [1]: "),
    "the order of keys": (
        {"v": _tensor(3), "w": _tensor(3)},
        {"w": _tensor(3), "v": _tensor(3)},
        "['w']: torch.float32 (3,) in dict instead of ['v']: ",
    ),
    "a shape": (
        [_tensor(2, 3)],
        [_tensor(3, 2)],
        "[0]: torch.float32 (3, 2) in list instead of [0]: torch.float32 (2, 3)",
    ),
    "a shape with one more axis": ([_tensor(3)], [_tensor(3, 1)], "[0]: torch.float32 (3, 1) in list instead of [0]: "),
    "the dtype of a tensor": (
        [_tensor(2, dtype=torch.float16)],
        [_tensor(2, dtype=torch.bfloat16)],
        "[0]: torch.bfloat16 (2,) in list instead of [0]: torch.float16 (2,)",
    ),
    "one leaf more": ([_tensor(2)], [_tensor(2), _tensor(2)], "[1]: torch.float32 (2,) in list instead of nothing"),
    "one leaf less": ([_tensor(2), 1], [_tensor(2)], "nothing instead of [1]: int 1 in list"),
    "nothing": ([_tensor(2)], [], "its root: empty list in no node instead of [0]: torch.float32 (2,)"),
    "None": (
        {"pool": _tensor(2)},
        {"pool": None},
        "['pool']: NoneType None in dict instead of ['pool']: torch.float32",
    ),
    "a number and a tensor": ([torch.tensor(1)], [1], "[0]: int 1 in list instead of [0]: torch.int64 ()"),
    "a list and a tuple": ([_tensor(2)], (_tensor(2),), "[0]: torch.float32 (2,) in tuple instead of [0]: "),
    "an empty list and a tuple": ({"r": []}, {"r": ()}, "['r']: empty tuple in dict instead of ['r']: empty list"),
    "the type of a node": (
        Pair(_tensor(2), _tensor(3)),
        dl.Factors(_tensor(2), _tensor(3)),
        ".b: torch.float32 (2,) in Factors instead of .b: torch.float32 (2,) in Pair",
    ),
    "the type of a dict": ({"x": 1}, OrderedDict(x=1), "['x']: int 1 in OrderedDict instead of ['x']: int 1 in dict"),
    "an object": ({"x": 1}, {"x": object()}, "['x']: object in dict instead of ['x']: int 1"),
}


def _other_structures() -> list[str]:
    group, is_drifted, messages = torch.distributed.group.WORLD, torch.distributed.get_rank() == 1, []
    for common, drifted, _ in STRUCTURES.values():
        dl.parallel.check_replicas(common, group)
        with pytest.raises(dl.parallel.DriftedError) as error:
            dl.parallel.check_replicas(drifted if is_drifted else common, group)
        messages.append(str(error.value))
    return messages


def test_every_other_structure_is_named_on_every_process():
    messages = in_processes(3, _other_structures)
    assert messages[0] == messages[1] == messages[2]
    for message, (_, _, first) in zip(messages[0], STRUCTURES.values(), strict=True):
        assert message.startswith(f"`state` of processes [1] differs from the majority, first at {first}"), message
        assert message.endswith("; pass the same state on every process, or resume from a checkpoint")


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")
def test_a_tensor_of_quantized_numbers_cannot_be_compared():
    tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert describe({"w": tensor}).refused == ("it has a Tensor at ['w']",)  # its bits ended the process


@dataclass(frozen=True)
class InTurn(Sharding):
    """A sharding of another mode."""

    is_in_turn: bool = False


register_constant(InTurn)


def test_the_settings_of_a_sharding_are_compared():
    shards, place = torch.zeros(2, 3), {"group": "0", "world_size": 2, "process": 0, "rows": 4}
    usual, other = ({"w": Sharded(shards, InTurn(**place, is_in_turn=flag))} for flag in (False, True))
    assert describe(usual) == describe({"w": Sharded(shards, Sharding(**place))})
    assert "Sharded over 2 of is_in_turn True" in describe(other).lines[0]
