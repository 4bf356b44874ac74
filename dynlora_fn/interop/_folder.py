"""Fill a folder with files that appear complete."""

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SAFETENSORS = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """Yield an empty folder whose files move into `folder` once the block ends.

    After an error nothing moves. Weights of an earlier model under the same name are removed: a single file, shards and
    their index. Otherwise a reader could open them instead of the new weights. An existing README.md is not replaced.

    Raises:
        ValueError: If `folder` exists and is not a folder, or a file would replace something that is not a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`folder` is {str(folder)!r}, which exists and is not a folder; pass the name of a folder")
    existed = folder.exists()
    aside = folder / f".writing-{secrets.token_hex(8)}"
    aside.mkdir(parents=True)
    try:
        yield aside
        _move(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if not existed:
            with suppress(OSError):  # the folder has files, so it stays
                folder.rmdir()


def _move(aside: Path, folder: Path) -> None:
    files = [path.relative_to(aside) for path in sorted(aside.rglob("*")) if path.is_file()]
    for file in files:
        if (folder / file).exists() and not (folder / file).is_file():
            raise ValueError(
                f"`folder` has {str(file)!r}, which exists and is not a regular file, in {str(folder)!r}; remove it"
            )
    stale = _weights_of_earlier_models(folder, files)
    for file in files:
        if file.name == "README.md" and (folder / file).exists():
            continue
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (aside / file).replace(folder / file)
    for path in stale:
        path.unlink(missing_ok=True)  # another process that writes the same model may have removed it


def _weights_of_earlier_models(folder: Path, files: list[Path]) -> list[Path]:
    """Return the old shards, indices and single files of the models in `files`.

    A reader could open them instead of the new weights.
    """
    models = {(file.parent, match[1]) for file in files if (match := _SAFETENSORS.fullmatch(file.name))}
    return [
        path
        for parent in {parent for parent, _ in models}
        if (folder / parent).is_dir()
        for path in (folder / parent).iterdir()
        if (match := _SAFETENSORS.fullmatch(path.name))
        and (parent, match[1]) in models
        and parent / path.name not in files
        and path.is_file()
    ]
