"""Transforms in any order: few sequences here, and thousands with ``--hypothesis-profile sequences``."""

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import rule, run_state_machine_as_test

import dynlora_fn as dl
from dynlora_fn.testing import TransformMachine

FEW = settings(max_examples=15, stateful_step_count=15, deadline=None)
CURRENT = settings() if settings.get_current_profile_name() == "sequences" else FEW


def test_transforms_in_any_order_keep_the_weights():
    run_state_machine_as_test(TransformMachine, settings=CURRENT)


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
