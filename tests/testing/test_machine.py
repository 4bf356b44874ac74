"""Transforms in any order: few sequences here, and thousands with ``--hypothesis-profile sequences``."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import precondition, rule, run_state_machine_as_test

import dynlora_fn as dl
from dynlora_fn.bases._base import as_base
from dynlora_fn.testing import PLAIN, STORAGES, Storage, TransformMachine
from dynlora_fn.testing._small_model import is_sharded
from tests.support.processes import in_processes

FEW = settings(max_examples=15, stateful_step_count=15, deadline=None)
QUANTIZED = tuple(storage for storage in STORAGES if storage not in PLAIN)
CURRENT = settings() if settings.get_current_profile_name() == "sequences" else FEW


def test_transforms_in_any_order_keep_the_weights():
    run_state_machine_as_test(TransformMachine, settings=CURRENT)


@pytest.mark.slow
@pytest.mark.parametrize(("storages", "kind"), [(PLAIN, "Tensor"), (QUANTIZED, "Quantized")])
def test_two_processes_go_through_the_same_sequences(storages, kind):
    """Both processes have shards, of plain bases and of codes."""
    first, second = in_processes(2, _sequences, storages)
    assert first == second
    assert kind in first  # and others, if a plain base is quantized before it is sharded


def _sequences(drawn_from: tuple[Storage, ...]) -> set[str]:
    kinds = set()

    class OfTwo(TransformMachine):
        storages = drawn_from

        # Matrices of 32 x 32 have one run of nf4's factors of scales, and one scale for all of nvfp4: not two.
        @precondition(lambda self: self.every(lambda param: not is_sharded(param) and codes_of(param) not in WHOLE))
        @rule()
        def shard(self):
            super().shard()
            kinds.update(type(as_base(param.base).folded.base).__name__ for param in self.weights().values())

    alike = settings(FEW, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(OfTwo, settings=alike)
    return kinds


WHOLE = (dl.bases.NF4Codes, dl.bases.NVFP4Codes)


def codes_of(param: dl.LowRank) -> type | None:
    base = as_base(param.base).folded
    return type(base.codes) if isinstance(base, dl.bases.Quantized) else None


class WithABug(TransformMachine):
    @rule()
    def forget_the_fold(self):
        head = self.params["head.weight"]
        self.keeps({**self.params, "head.weight": dl.merge(head)._replace(base=head.base)})


def test_a_bug_is_found_and_the_sequence_is_short():
    phases = [Phase.generate, Phase.shrink]
    few = settings(FEW, stateful_step_count=3, phases=phases, database=None, report_multiple_bugs=False)
    with pytest.raises(AssertionError, match="off by up to") as caught:
        run_state_machine_as_test(WithABug, settings=few)
    notes = "\n".join(caught.value.__notes__)
    assert "state.forget_the_fold()" in notes
    rules = [line.split(".")[1].split("(")[0] for line in notes.splitlines() if line.startswith("state.")]
    rules = [name for name in rules if name != "compare"]
    assert rules[-2:] == ["forget_the_fold", "teardown"]
    assert len(rules) <= 4
    assert not torch.distributed.is_initialized()
