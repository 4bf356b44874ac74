"""How many small faults in the core do the tests notice?

Each mutant changes one expression of one module, in memory. A process that has imported torch, but not the package,
forks for each mutant. The child imports the package with the mutant, and runs the tests of the module until one fails.
Mutants whose tests take too long are counted separately.
"""

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bench.support.mutations import ROOT, Mutant, mutants_of, mutated, path_of

# The test files of each module, with fast files first.
TESTS = {
    "switching._basis": [
        "switching/test_basis", "switching/test_weight", "interop/test_init", "switching/test_alpha",
    ],
    "bases._fold": [
        "bases/test_base", "bases/test_fold_in_blocks", "switching/test_switch", "switching/test_weight",
        "testing/test_promises", "compile/test_donated_subclasses",
    ],
    "switching._schedule": [
        "switching/test_schedule", "switching/test_every", "switching/test_every_schedule", "switching/test_dithered",
        "switching/test_one_side",
    ],
    "switching._weight": [
        "switching/test_weight", "switching/test_basis", "interop/test_init", "switching/test_switch",
        "testing/test_promises",
    ],
    "switching._candidates": ["switching/test_switch", "switching/test_plan_mistakes", "switching/test_one_side"],
    "switching._switch": [
        "switching/test_plan_mistakes", "switching/test_switch", "testing/test_promises", "switching/test_pool",
        "parallel/test_derivatives",
    ],
    "optim._adamw": [
        "optim/test_adamw", "optim/test_every_optimizer", "optim/test_freeze", "optim/test_eight_bit",
        "optim/test_project_state", "optim/test_project_rules", "optim/test_arguments",
        "optim/test_decay",
    ],
    "optim._freeze": ["optim/test_freeze", "optim/test_every_optimizer", "optim/test_project_rules"],
    "optim._transform": ["optim/test_arguments", "optim/test_every_optimizer"],
    "optim._roles": ["optim/test_declared_roles", "optim/test_undeclared_state"],
    "optim._containers": ["optim/test_state_containers", "optim/test_undeclared_state"],
    "optim._search_state": [
        "optim/test_undeclared_state", "optim/test_declared_roles", "optim/test_state_containers",
        "interop/test_resize_state",
    ],
    "optim._project_factors": [
        "optim/test_declared_roles", "optim/test_undeclared_state", "optim/test_project_state",
        "optim/test_project_rules", "optim/test_eight_bit", "switching/test_plan_mistakes",
        "optim/test_foreign_states",
    ],
    "optim._torch_optim": ["optim/test_foreign_states", "optim/test_project_rules"],
    "optim._torchopt": ["optim/test_foreign_states", "optim/test_project_rules"],
    "optim._clip": ["optim/test_clip"],
    "bases._base": [
        "testing/test_promises", "bases/test_deferred", "bases/test_quantize", "bases/test_quantized_steps",
        "bases/test_drift",
    ],
    "bases._pending": ["bases/test_deferred", "testing/test_promises"],
    "_core._check": ["core/test_check"],
    "_core._check_trees": ["core/test_check_trees", "optim/test_arguments"],
    "_core._distinct": ["core/test_distinct"],
    "_core._check_plan": ["switching/test_plan_mistakes"],
    "_core._stacking": ["core/test_stacking"],
    "_core._tree": ["core/test_tree"],
    "optim._check_state": ["optim/test_arguments", "optim/test_every_optimizer"],
    "optim._complex": ["optim/test_complex"],
    "optim._roots": ["optim/test_derivatives"],
    "nn._swap": ["nn/test_swap", "nn/test_threads"],
    "nn._turns": ["nn/test_threads"],
    "nn._fallback": ["nn/test_fallback", "nn/test_weight", "nn/test_uses"],
    "nn._indexing": ["nn/test_uses", "nn/test_rules"],
    "nn._contractions": ["nn/test_uses", "nn/test_rules"],
    "nn._value_and_grad": ["nn/test_value_and_grad", "nn/test_func_by_autograd"],
    "interop._targets": ["interop/test_targets", "interop/test_init"],
    "interop._arguments": ["interop/test_arguments"],
    "interop._parameters": ["interop/test_init", "interop/test_arguments"],
    "compile._arguments": ["compile/test_arguments"],
    "compile._donation": ["compile/test_donation", "compile/test_metrics", "compile/test_donated_subclasses"],
    "compile._memory": ["compile/test_metrics"],
    "testing._compare": ["testing/test_comparing", "testing/test_new_factors"],
    "testing._projection": ["testing/test_shared_statistics", "testing/test_checkers"],
    "testing._promises": ["testing/test_checkers", "testing/test_new_factors"],
}  # fmt: skip
# Tests with these words in their names take too long for a mutant.
SLOW = ("inductor", "donated", "growing", "llama", "one_graph", "compiled_equals")
READ_EXAMPLES = {"testing/test_checkers", "testing/test_new_factors"}  # files that need hypothesis to shrink examples
SKIPPED = " and ".join(f"not {name}" for name in SLOW)
PRELOADED = (
    "hypothesis", "hypothesis.stateful", "jaxtyping", "numpy", "opt_einsum", "pytest", "torch", "torch._dynamo",
    "torch._functorch.aot_autograd", "torch._inductor", "torch.distributed", "torch.distributed.tensor", "torchao",
    "torchao.quantization", "torchao.prototype.mx_formats.inference_workflow", "torchao.optim",
)  # fmt: skip


class Outcome(NamedTuple):
    """The result of the tests of a mutant."""

    mutant: Mutant
    how: str  # "killed", "timeout" or "survived"
    seconds: float


# --- one mutant in a forked process


class _Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An importer that loads the mutant in place of its module."""

    def __init__(self, mutant: Mutant):
        self.name, self.source = f"dynlora_fn.{mutant.module}", mutated(mutant)
        self.path = str(path_of(mutant.module))

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self, origin=self.path) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.path
        exec(compile(self.source, self.path, "exec"), module.__dict__)


def _run_tests(mutant: Mutant | None, files: list[str], skipped: str) -> int:
    import pytest  # noqa: PLC0415, preloaded
    from hypothesis import Phase, settings  # noqa: PLC0415

    if mutant is not None:
        sys.meta_path.insert(0, _Loader(mutant))
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if READ_EXAMPLES.intersection(files) else [])]
    settings.register_profile("mutants", deadline=None, max_examples=15, derandomize=True, database=None, phases=phases)
    paths = [str(ROOT / "tests" / f"{name}.py") for name in files]
    options = ["-x", "-q", "-n0", "-k", skipped, "-p", "no:cacheprovider", "--hypothesis-profile", "mutants", "--tb=no"]
    return int(pytest.main([*options, *paths]))


def run(mutant: Mutant | None, files: list[str], skipped: str, seconds: float) -> tuple[str, float]:
    """Run the tests in a fork, and return their outcome and the seconds they took.

    Args:
        mutant: The mutant. None runs the tests without a mutant.
        files: The test files.
        skipped: The expression for the option ``-k`` of pytest.
        seconds: The time after which the tests are stopped.
    """
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            os._exit(_run_tests(mutant, files, skipped))
        os._exit(1)
    while time.monotonic() - start < seconds:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            how = "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
            return how, time.monotonic() - start
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "timeout", time.monotonic() - start


# --- all mutants


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", default=[*TESTS], choices=[*TESTS])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run every N-th mutant")
    parser.add_argument("--timeout", type=float, default=90, help="seconds for one mutant")
    parser.add_argument("--again", type=Path, metavar="FILE", help="run only the mutants that survived in this file")
    parser.add_argument("--slow", action="store_true", help="also run tests that take long")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file, written after every mutant")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    os.chdir(ROOT)
    os.environ |= {"CI": "1", "OMP_NUM_THREADS": "1"}
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    mutants = [mutant for module in args.modules for mutant in mutants_of(module)][:: args.every]
    if args.again:
        before = json.loads(args.again.read_text())["survived"]
        survivors = {(entry["module"], entry["line"], entry["before"], entry["after"]) for entry in before}
        mutants = [m for m in mutants if (m.module, m.line, m.before, m.after) in survivors]
    skipped = "not inductor" if args.slow else SKIPPED
    for module in {mutant.module for mutant in mutants}:
        how, seconds = run(None, TESTS[module], skipped, 20 * args.timeout)
        print(f"{module}: without a mutant its tests take {seconds:.1f} s", flush=True)
        if how != "survived":
            raise SystemExit(f"the tests of {module} fail without a mutant; fix them first")
    outcomes = []
    for index, mutant in enumerate(mutants):
        outcomes.append(Outcome(mutant, *run(mutant, TESTS[mutant.module], skipped, args.timeout)))
        if outcomes[-1].how != "killed":
            change = f"{mutant.module}:{mutant.line}: {mutant.before} -> {mutant.after}"
            print(index, outcomes[-1].how, change, flush=True)
        if args.out:
            args.out.write_text(json.dumps(summary(outcomes), indent=1) + "\n")
    print(json.dumps(summary(outcomes)["modules"], indent=1))


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the counts of each module and the mutants that were not killed."""
    modules: dict[str, dict[str, int]] = {}
    for mutant, how, _ in outcomes:
        counts = modules.setdefault(mutant.module, {"killed": 0, "timeout": 0, "survived": 0})
        counts[how] += 1
    return {
        "command": " ".join(sys.argv),
        "seconds": round(sum(outcome.seconds for outcome in outcomes)),
        "modules": modules,
        **{
            how: [outcome.mutant._asdict() for outcome in outcomes if outcome.how == how]
            for how in ("survived", "timeout")
        },
    }


if __name__ == "__main__":
    main()
