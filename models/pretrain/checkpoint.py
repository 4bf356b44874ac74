"""Write the checkpoints of a run in the background, and load them."""

import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_map

import dynlora_fn as dl
from models.pretrain.processes import Processes

_FREEZE_STATE = re.compile(r"(\.opt_state\['\w+'\])\.inner\.")


class SaveError(ValueError):
    """An error of writing a checkpoint or the model.

    Older checkpoints are unchanged.
    """


class Saver:
    """A writer of checkpoints that lets training continue meanwhile.

    It writes one checkpoint at a time.
    """

    def __init__(self, folder: Path, processes: Processes, *, keep: int, settings: Mapping[str, Any] | None = None):
        self._folder, self._settings, self._keep = folder, settings, keep
        self._group: ProcessGroup | None = processes.background_group()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: tuple[int, Future[None]] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the pending checkpoint, except after an error of this process only.

        Writing is collective, so every process must finish it or none. A ValueError or a DriftedError is raised on
        every process. Any other error may be raised on this process only.
        """
        if kind is None or issubclass(kind, ValueError | dl.parallel.DriftedError):
            self.finish()

    def start(self, step: int, state: Any) -> None:
        """Start to write a copy of the state to ``folder/step-NNNNNNNN``.

        The copy is in memory until it is written, because training changes the state meanwhile. Writing needs no
        further memory, and does not keep the interpreter's lock. Afterwards all checkpoints except the newest `keep`
        are deleted.

        Args:
            step: The number of steps that are done.
            state: The state, a tree of tensors.

        Raises:
            SaveError: If the previous checkpoint could not be written.
        """
        self.finish()
        future = self._thread.submit(
            dl.interop.save_checkpoint,
            tree_map(_copied, state),
            self._folder,
            step=step,
            settings=self._settings,
            keep=self._keep,
            group=self._group,
        )
        self._pending = step, future

    def finish(self) -> None:
        """Wait until the pending checkpoint is on the disk.

        Raises:
            SaveError: On every process, if it could not be written.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except (OSError, ValueError) as error:
            raise SaveError(f"the checkpoint of step {step} could not be written: {error}") from error


def _copied(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else leaf


def load_checkpoint(
    folder: Path,
    template: Any,
    processes: Processes,
    *,
    settings: Mapping[str, Any] | None = None,
    donate: bool = False,
) -> dl.interop.Checkpoint | None:
    """Return the newest undamaged checkpoint of the run, or None if there is none.

    Collective: call it on every process. Older checkpoints, whose optimizer states are not inside a `FreezeState`, can
    be loaded too: their ``.opt_state['rest'].mu`` becomes ``.opt_state['rest'].inner.mu``.

    Args:
        folder: The folder of all checkpoints.
        template: A state of the same structure, shapes and dtypes. Its values are not used.
        processes: The processes that read the checkpoint. Their number may differ from when it was saved.
        settings: The settings of the run. Checkpoints with other settings are refused.
        donate: Whether to read the checkpoint into the memory of `template`, which must not be used afterwards.

    Raises:
        ValueError: If all checkpoints are refused. The message names them.
    """
    return dl.interop.load_checkpoint(
        folder,
        template,
        settings=settings,
        group=processes.group,
        donate=donate,
        rename=lambda path: _FREEZE_STATE.sub(r"\1.", path),
    )
