"""Find texts: Python's sources, files and folders, or a Hugging Face dataset."""

import os
import sysconfig
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

from models.corpus.documents import Document, TextFile, scan
from models.corpus.split import VALIDATION_FRACTION, Split

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_HIDDEN, _DUPLICATE, _JSON_LINES = "hidden", "the same text as another", "JSON lines, which --dataset reads"
_HEAD = 1 << 16  # bytes by which a file of JSON lines is recognized
_CONVERT = "; convert it with `iconv -f ENCODING -t UTF-8`"


def standard_library() -> list[TextFile]:
    """Return the sources of Python's standard library, without its tests.

    They need no download, because they come with Python.
    """
    return python_sources(Path(sysconfig.get_paths()["stdlib"]))


def python_sources(root: Path) -> list[TextFile]:
    """Return the Python files in a folder, except tests and installed packages."""
    paths = (path for path in root.rglob("*.py") if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts))
    found = (scan(path, path.relative_to(root).as_posix()) for path in sorted(paths) if path.is_file())
    return [file for file in found if isinstance(file, TextFile) and file.characters]


def text_files(paths: Sequence[Path], warn: Callable[[str], None] = lambda _: None) -> list[TextFile]:
    """Return the texts of files, and of all text files in folders.

    In folders, hidden files, JSON lines and files that are not UTF-8 text are skipped. Of several equal texts, only the
    first is returned.

    Args:
        paths: The files and folders.
        warn: A function that is called once for each reason to skip files, with a line that names them.

    Raises:
        ValueError: If a path does not exist, or is a file of JSON lines or without UTF-8 text, or if all texts are
            empty.
        OSError: If a file or a folder cannot be read.
    """
    skipped: dict[str, list[str]] = {}
    documents: dict[bytes, TextFile] = {}
    for path in paths:
        for file in _in_folder(path, skipped) if path.is_dir() else [_named_file(path)]:
            if file.digest in documents:
                skipped.setdefault(_DUPLICATE, []).append(file.name)
            documents.setdefault(file.digest, file)
    for reason, names in skipped.items():
        warn(f"skipped {_listed(names)}: {reason}")
    if not any(text.strip() for file in documents.values() for text in file.pieces()):
        raise ValueError(f"`text` must contain some text, got none in {', '.join(map(str, paths))}")
    return list(documents.values())


def _in_folder(folder: Path, skipped: dict[str, list[str]]) -> Iterator[TextFile]:
    for path in sorted(_entries(folder)):
        name = path.relative_to(folder).as_posix()
        found: TextFile | str
        if path.name.startswith("."):
            found = _HIDDEN
        elif path.is_dir():
            found = "a link to a folder"
        elif path.is_file():
            found = scan(path, name)
            found = _JSON_LINES if isinstance(found, TextFile) and _is_json_lines(found) else found
        else:
            found = "a link to nothing" if path.is_symlink() else "a pipe or a device"
        if isinstance(found, str):
            skipped.setdefault(found, []).append(name)
        elif found.characters:
            yield found


def _entries(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and in the folders inside it.

    A hidden folder and a link to a folder are yielded themselves, without the files in them.

    Raises:
        OSError: If a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        closed = [name for name in folders if name.startswith(".") or (Path(parent) / name).is_symlink()]
        yield from (Path(parent) / name for name in (*files, *closed))
        folders[:] = [name for name in folders if name not in closed]


def _named_file(path: Path) -> TextFile:
    if not path.exists():
        raise ValueError(f"`text` must name files or folders, got {str(path)!r}, which does not exist")
    if not path.is_file():
        raise ValueError(f"`text` must name files or folders, got {str(path)!r}, which is a pipe or a device")
    file = scan(path, path.name)
    if isinstance(file, str):
        advice = "" if file == "binary" else _CONVERT
        hint = "; --dataset reads it" if _suffix(path) in _BUILDERS else advice
        raise ValueError(f"`text` must be UTF-8 text, got the {file} file {str(path)!r}{hint}")
    if _is_json_lines(file):
        raise ValueError(
            f"`text` must be plain text, got JSON lines in {str(path)!r}; --dataset reads their texts, and a name that "
            "ends in .txt makes the JSON itself the text"
        )
    return file


def _is_json_lines(file: TextFile) -> bool:
    """Return whether a file is named as JSON and its first lines are JSON objects.

    A .json file needs two such lines, because one line may be a single JSON document.
    """
    least = _OBJECTS.get(file.path.suffix)
    if least is None:
        return False
    with file.path.open("rb") as stream:
        stream.seek(file.start)
        lines = stream.read(_HEAD).split(b"\n")[:2]
    starts = [line[:1] for line in map(bytes.strip, lines) if line]
    return len(starts) >= least and set(starts) == {b"{"}


def _listed(names: list[str], most: int = 5) -> str:
    count = f"{len(names)} files" if len(names) > 1 else "1 file"
    return f"{count} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"


# The loader of `datasets` for each suffix of a file.
_BUILDERS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".arrow": "arrow",
}
_OBJECTS = {".jsonl": 1, ".ndjson": 1, ".json": 2}  # the least number of lines that start an object
_COMPRESSIONS = {".gz", ".xz", ".bz2", ".zst"}


def dataset(name: str, *, config: str | None, column: str, characters: int, folder: Path | None = None) -> Split:
    """Read the documents of a Hugging Face dataset from its name, folder or file.

    The split "validation" of the dataset becomes the validation text. If there is none, the first twentieth of the
    documents of the split "train" becomes the validation text.

    Args:
        name: The name or folder, as in `datasets.load_dataset`, or a file in JSON lines, Parquet or CSV.
        config: The configuration of the dataset. None means its default configuration.
        column: The column that contains the text.
        characters: The number of training characters after which reading stops.
        folder: The folder for a temporary file with the texts. Default None means the temporary folder of the system.

    Raises:
        ValueError: If `datasets` is missing, or the dataset cannot be loaded, has no split "train", or has no column
            of this name with texts.
    """
    try:
        import datasets  # noqa: PLC0415, an optional extra
    except ImportError as error:
        raise ValueError("`dataset` needs the extra `data`: pip install 'dynlora-fn[data]'") from error
    try:
        streams = _load(datasets, name, config)
    except Exception as error:  # of many types: not found, no connection, unknown configuration, unreadable files
        raise ValueError(
            f"`dataset` must be one that `datasets` can load, got {name!r}: {_first_line(error)}"
        ) from error
    if "train" not in streams:
        raise ValueError(f"`dataset` must have a split called 'train', got {name!r} with {sorted(streams)}")
    train = Rows(_texts(streams["train"], name, column, characters), folder)
    if "validation" in streams:
        most = int(characters * VALIDATION_FRACTION)
        return Split(train, Rows(_texts(streams["validation"], name, column, most), folder))
    count = max(1, int(len(train) * VALIDATION_FRACTION))
    return Split(train[count:], train[:count])


def _load(datasets: Any, name: str, config: str | None) -> Any:
    path = Path(name)
    if not path.is_file():
        return datasets.load_dataset(name, config, streaming=True)
    suffix = _suffix(path)
    if suffix not in _BUILDERS:
        raise ValueError(f"its name must end in one of {', '.join(_BUILDERS)}")
    return datasets.load_dataset(_BUILDERS[suffix], data_files={"train": [str(path)]}, streaming=True)


def _suffix(path: Path) -> str:
    """Return the suffix of a file, without the suffix of a compression."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix


def _texts(stream: Iterable[dict[str, Any]], name: str, column: str, characters: int) -> Iterator[str]:
    rows = enumerate(stream)
    while True:
        try:
            index, row = next(rows, (0, None))
        except Exception as error:  # of many types: damaged lines or pages, no connection
            raise ValueError(f"`dataset` could not be read, got an error in {name!r}: {_first_line(error)}") from error
        if row is None:
            return
        if column not in row:
            raise ValueError(f"`text_column` must be one of {sorted(row)}, got {column!r}")
        text = row[column]
        if not isinstance(text, str):
            raise ValueError(f"`text_column` must contain texts, got {text!r:.60} in row {index} of {name!r}")
        yield text
        characters -= len(text)
        if characters <= 0:
            return


class Rows(Sequence[Document]):
    """Documents, one after the other, in a temporary file that removes itself."""

    def __init__(self, texts: Iterable[str] = (), folder: Path | None = None):
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115, lives as long as the rows
        self._ends = array("q", [0])
        self._first = 0
        for text in texts:
            self._ends.append(self._ends[-1] + self._file.write(_encoded(text, len(self))))
        self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> "Rows": ...
    def __getitem__(self, index: int | slice) -> "Document | Rows":
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            part = Rows.__new__(Rows)
            part._file, part._ends, part._first = self._file, self._ends[start : stop + 1], self._first + start
            return part
        index = range(len(self))[index]  # raises IndexError
        self._file.seek(self._ends[index])
        text = self._file.read(self._ends[index + 1] - self._ends[index]).decode()
        return Document(str(self._first + index), text)


def _encoded(text: str, index: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`dataset` must contain Unicode texts, got half a character in row {index}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
