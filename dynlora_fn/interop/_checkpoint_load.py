"""Load checkpoints of a training state, after every file has been verified."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynlora_fn._core._check import check_callable, check_flag, check_path, described
from dynlora_fn._core._torch import tree_map
from dynlora_fn.interop._agree import Members, members_of
from dynlora_fn.interop._checkpoint_folder import (
    CHECKPOINT,
    checked_settings,
    checked_step,
    newest_first,
    restore_replaced,
    step_of,
)
from dynlora_fn.interop._checkpoint_read import find_mismatch, read_headers, read_into
from dynlora_fn.interop._checkpoint_state import Contents, contents_of, with_values
from dynlora_fn.interop._checksums import find_damage
from dynlora_fn.parallel._group import Group


class Refused(NamedTuple):
    """A checkpoint that was not loaded."""

    path: Path
    reason: str
    is_damaged: bool  # False: it is undamaged, but of another step, run or structure


class Checkpoint(NamedTuple):
    """A state that was loaded."""

    state: Any
    step: int
    refused: list[Refused]  # newer checkpoints, which do not fit or are damaged


def load_checkpoint(
    folder: Path | str,
    template: Any,
    *,
    step: int | None = None,
    settings: Mapping[str, Any] | None = None,
    group: "Group | None" = None,
    donate: bool = False,
    rename: Callable[[str], str] | None = None,
) -> Checkpoint | None:
    """Return the newest undamaged checkpoint that fits, or None if there is none.

    The state is the saved one, bit for bit. Each file is verified before a tensor is read from it. A checkpoint is
    refused if it is damaged, in the folder of another step, of a run with other settings, or of a state with other
    leaves, shapes or dtypes. The checkpoint before it is then tried. Refused checkpoints are returned with the reasons.
    Only folders named ``step-NNNNNNNN`` are checkpoints. Tensors are read one at a time into the memory of the result.
    Collective with a group: call it on every process.

    Args:
        folder: The folder of all checkpoints.
        template: A state of the same structure, such as the initial state of a run. Its values are not used.
        step: The step to load. Default None means the newest one.
        settings: Values by name, as for `save_checkpoint`. A name that the checkpoint has too must have an equal value.
            Default None compares no setting.
        group: The process group, or a mesh of one dimension. It may have more or fewer processes than saved the
            checkpoint. Default None means that only this process reads.
        donate: Whether to read into the memory of `template`, which must not be used afterwards. Tensors that share
            memory with another, or are not contiguous, are replaced. Without a checkpoint, `template` does not change.
        rename: A function from the path of a leaf in `template` to its path in the checkpoints of an older program. It
            applies to a checkpoint that has exactly the renamed paths. Default None keeps all paths.

    Returns:
        A `Checkpoint` with the state, its step and the checkpoints that were refused, or None if there is none.

    Raises:
        TypeError: If an argument has a wrong type, or a leaf of the template cannot be in a checkpoint.
        ValueError: If there are checkpoints and all are refused, or none has the step `step`. The message gives each
            reason.
        OSError: If the folder cannot be read.
        ImportError: If the extra `files` is not installed.

    Numerics: Different optimizers can have states of the same structure, such as `sgd` with momentum and `lion`. Put
        the name of the optimizer into `settings`, so that a checkpoint of another one is refused.

    Example:
        >>> import tempfile
        >>> import torch
        >>> import dynlora_fn as dl
        >>> folder = tempfile.mkdtemp()
        >>> load_checkpoint(folder, {"w": torch.zeros(2)}) is None
        True
        >>> dl.interop.save_checkpoint({"w": torch.ones(2)}, folder, step=3, settings={"seed": 0})
        >>> state, step, _ = load_checkpoint(folder, {"w": torch.zeros(2)}, settings={"seed": 0})
        >>> state["w"], step
        (tensor([1., 1.]), 3)
    """
    check_path("folder", folder)
    check_flag("donate", donate)
    if rename is not None:
        check_callable("rename", rename)
    step, settings = None if step is None else checked_step(step), checked_settings(settings)
    members = members_of(group)
    wanted = members.agree(lambda: contents_of("template", template, members))
    paths = members.gather(members.agree(lambda: _candidates(Path(folder), step), first_only=True))[0]
    assert wanted is not None
    refused: list[Refused] = []
    for path in paths:
        damage = _first(members, find_damage(path, process=members.process, world_size=members.world_size))
        problem = damage or _first(members, _find_problem(path, wanted, settings, rename))
        if problem:
            refused.append(Refused(path, problem, bool(damage)))
        else:
            state = members.agree(lambda: _read(path, template, members, rename, donate=donate))  # noqa: B023
            return Checkpoint(state, step_of(path), refused)
    if refused:
        reasons = "; ".join(f"{path}: {reason}" for path, reason, _ in refused)
        raise ValueError(f"`folder` has no checkpoint that fits: {reasons}")
    return None


def _candidates(folder: Path, step: int | None) -> list[Path]:
    """Return the checkpoints to try, the newest first.

    Raises:
        ValueError: If `folder` is one checkpoint or a file, or there is none of the step.
    """
    if CHECKPOINT.fullmatch(folder.name) and list(folder.glob("*.safetensors")):
        raise ValueError(f"`folder` is {str(folder)!r}, which is one checkpoint; pass the folder that it is in")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, which is not a folder; pass the folder of all checkpoints")
    with suppress(OSError):  # the folder may be readable only
        restore_replaced(folder)
    paths = newest_first(folder)
    if step is None:
        return paths
    if chosen := [path for path in paths if step_of(path) == step]:
        return chosen
    raise ValueError(
        f"`folder` has no checkpoint of step {step}, but of {sorted(map(step_of, paths))}; use one of them"
    )


def _first(members: Members, problem: str | None) -> str | None:
    """Return the problem of the first process that has one.

    Collective: call it on every process.
    """
    return next((other for other in members.gather(problem) if other is not None), None)


def _find_problem(
    path: Path, wanted: Contents, settings: dict[str, Any], rename: Callable[[str], str] | None
) -> str | None:
    """Return why an undamaged checkpoint does not fit, or None."""
    try:
        stored = read_headers(path)
    except (OSError, ValueError) as error:
        return str(error)
    step, saved = stored.description.get("step", step_of(path)), stored.description.get("settings", {})
    if step != step_of(path):
        return f"it is of step {step}, but its name has another step"
    for name in sorted(settings.keys() & saved.keys()):
        if settings[name] != saved[name]:
            return f"it has the setting {name} {described(saved[name])} instead of {described(settings[name])}"
    return find_mismatch(stored, _renamed(wanted, stored.chunks.keys(), rename))


def _renamed(contents: Contents, names: Any, rename: Callable[[str], str] | None) -> Contents:
    """Return contents under renamed paths, if a checkpoint has exactly those tensors."""
    if rename is None:
        return contents
    pieces = {rename(path): piece for path, piece in contents.pieces.items()}
    if pieces.keys() != names:
        return contents
    values = {rename(path): value for path, value in contents.values.items()}
    return Contents(pieces, values, {rename(path): text for path, text in contents.constants.items()})


def _read(path: Path, template: Any, members: Members, rename: Callable[[str], str] | None, *, donate: bool) -> Any:
    state = _distinct(template) if donate else tree_map(_fresh, template)
    stored, contents = read_headers(path), contents_of("template", state, members)
    renamed, values = _renamed(contents, stored.chunks.keys(), rename), stored.description.get("values", {})
    for name, piece in renamed.pieces.items():
        read_into(piece, stored.chunks[name])
    return with_values(
        state, {path: values.get(old) for path, old in zip(contents.values, renamed.values, strict=True)}
    )


def _fresh(leaf: Any) -> Any:
    """Return a new tensor of the same shape. Any other leaf is returned unchanged."""
    return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, Tensor) else leaf


def _distinct(tree: Any) -> Any:
    """Return a tree whose tensors are contiguous and share no memory.

    A tensor that is not contiguous, or shares memory with an earlier tensor, is replaced by a new tensor.
    """
    addresses: set[int] = set()

    def distinct(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        address = leaf.untyped_storage().data_ptr()
        is_plain = leaf.is_contiguous() and not leaf.is_conj() and not leaf.is_neg() and address not in addresses
        addresses.add(address)
        return leaf.detach() if is_plain else _fresh(leaf)

    return tree_map(distinct, tree)
