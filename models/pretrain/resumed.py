"""What a resumed run needs: a checkpoint of the same options, and the metrics up to it."""

import json
from collections.abc import Mapping
from pathlib import Path

from models.pretrain.config import Config
from models.pretrain.progress import read_metrics

# Options that say where a run computes and reports, what it is named, or where its text is, whose digest counts.
_NOT_IN_CHECKPOINTS = (
    *("out", "resume", "config", "json", "compare", "eager", "device", "compile"),
    *("text", "dataset", "dataset_config", "text_column", "dataset_characters", "tokenizer"),
    *("eval_every", "eval_batches", "save_every"),
)


def checkpoint_settings(config: Config, digests: Mapping[str, str]) -> dict[str, object]:
    """Return the options that a checkpoint must share with the run that resumes from it.

    Options that a resumed run may change are not among them. `digests` are hashes of the files that some options name.
    """
    excluded = {*_NOT_IN_CHECKPOINTS, *config.free_to_change}
    options = {name: value for name, value in config.options().items() if name not in excluded}
    settings: dict[str, object] = json.loads(json.dumps(options | digests, default=str))
    return settings


def check_metrics(path: Path, step: int, steps: int) -> None:
    """Check that a metrics file has what a run of `steps` that resumes after `step` needs at its end.

    Raises:
        ValueError: If it does not have all steps up to this one. It names the file and what is missing.
    """
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise ValueError(f"metrics must be in a regular file, got {str(path)!r}; move it away")
    lines = read_metrics(path, up_to=step)
    for expected, line in enumerate(lines, start=1):
        if line["step"] != expected or not all(_is_number(line.get(name)) for name in ("loss", "switched")):
            raise ValueError(f"metrics must have loss and switched of step {expected}, got {str(path)!r} without")
    if len(lines) < step:
        raise ValueError(
            f"metrics must have the steps up to {step} of the checkpoint, got {str(path)!r} with {len(lines)}; "
            "restore the file, or resume from an older checkpoint"
        )
    if 0 < step == steps and not _is_number(lines[-1].get("validation_loss")):
        raise ValueError(f"metrics must have the last validation loss, got {str(path)!r} without it at step {step}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
