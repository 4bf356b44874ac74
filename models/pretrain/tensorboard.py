"""Write scalars for TensorBoard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

_SCALARS = ("loss", "grad_norm", "lr", "switched", "validation_loss", "drift")


def summary_writer() -> Callable[..., Any]:
    """Return the class `torch.utils.tensorboard.SummaryWriter`.

    Raises:
        ValueError: If TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ValueError(
            "`tensorboard` needs the extra `tensorboard`: pip install 'dynlora-fn[tensorboard]'"
        ) from error
    return SummaryWriter


class Scalars:
    """A writer of the lines of metrics.jsonl for TensorBoard.

    A resumed run replaces the steps after `first_step`.
    """

    def __init__(self, folder: Path, first_step: int):
        self._writer = summary_writer()(str(folder), purge_step=first_step + 1)

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Append the scalars of some lines."""
        for line in lines:
            for name in _SCALARS:
                if name in line:
                    self._writer.add_scalar(name, line[name], line["step"])
        self._writer.flush()
