"""Read the text of a run, and encode it into files beside the run."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from models import corpus as text
from models.corpus.tokens import TokenFile
from models.pretrain.config import Config, Data
from models.pretrain.folder import ENCODING
from models.pretrain.processes import SINGLE_PROCESS, Processes
from models.pretrain.stopping import naming

_LARGE = 50_000_000  # characters, above which a line says that the text is being encoded


@contextmanager
def tokens_beside(folder: Path, processes: Processes = SINGLE_PROCESS) -> Iterator[Path]:
    """Yield the path of a temporary folder for tokens.

    At the end, a folder that contains tokens becomes the folder `tokens` of the run. After an error it is removed, so
    that bad input leaves no files. It is inside the output folder if that exists, since only this folder may be
    writable, or be on another disk.
    """
    parent = next(path for path in folder.absolute().parents if path.is_dir())
    temporary = folder / ENCODING if folder.is_dir() else parent / f".{folder.name}{ENCODING}"
    if processes.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        if processes.is_first and any(temporary.glob("*.bin")):
            shutil.rmtree(folder / "tokens", ignore_errors=True)
            temporary.rename(folder / "tokens")
    finally:
        if processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)


def tokens_of_resumed(config: Config, folder: Path) -> Path | None:
    """Return the folder with the tokens of a resumed run, or None for a new run."""
    return folder / "tokens" if config.output.resume else None


def load_corpus(
    data: Data,
    folder: Path | None = None,
    console: Console | None = None,
    processes: Processes = SINGLE_PROCESS,
    *,
    stored: Path | None = None,
) -> text.Corpus:
    """Return the tokens of the text that the options name.

    Collective: call it on every process.

    Args:
        data: The options of the text.
        folder: The folder that the first process creates and writes the tokens to. Default None stores the tokens in
            the memory of each process.
        console: The console that shows skipped files and progress. Default None shows nothing.
        processes: The processes that read the tokens.
        stored: The folder with the tokens of a resumed run. They are used if text and tokenizer have not changed.
            Default None encodes the text.

    Raises:
        ValueError: On every process, if the text or the tokenizer is invalid.
        OSError: On every process, if a file cannot be read or written.
    """
    console = console or Console(quiet=True)
    if folder is None:
        return _encode(data, None, console)[0]

    def encode() -> tuple[text.Corpus, Path]:
        corpus, used = _encode(data, folder, console, stored)
        return corpus._replace(train=(), validation=()), used  # open files cannot be sent to other processes

    corpus, folder = processes.do_on_first(encode)
    dtype = np.min_scalar_type(corpus.vocabulary - 1)

    def open_files() -> dict[str, TokenFile]:
        return {part: TokenFile(folder / f"{part}.bin", dtype) for part in ("train", "validation")}

    # All have opened the files before any process goes on: later the first one renames or removes their folder.
    return corpus._replace(**processes.do_on_every(open_files))


def _encode(
    data: Data, folder: Path | None, console: Console, stored: Path | None = None
) -> tuple[text.Corpus, Path | None]:
    """Return the tokens, and the folder that contains them."""
    if folder is not None:
        folder.mkdir()
    documents, window = _documents(data, folder, console), data.seq_len + 1
    tokenizer = text.pretrained_tokenizer(data.tokenizer) if data.tokenizer else text.byte_tokenizer()
    if stored is not None and (found := text.stored_corpus(documents, tokenizer, window=window, folder=stored)):
        return found, stored
    total = sum(map(_characters, documents))
    with naming(folder or Path(".")), _progress(total, console) as progress:
        corpus = text.tokenize(documents, tokenizer, window=window, folder=folder, progress=progress)
        if folder is not None:
            text.write_record(corpus, documents, tokenizer, folder)
    return corpus, folder


def _documents(data: Data, folder: Path | None, console: Console) -> text.Split:
    def warn(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    if data.dataset:
        column, characters = data.text_column, data.dataset_characters
        with naming(folder or Path(".")), console.status(Text(f"reading {data.dataset}")):
            parts = text.dataset(
                data.dataset, config=data.dataset_config, column=column, characters=characters, folder=folder
            )
        return text.Split(parts.train, text.text_files(data.validation, warn)) if data.validation else parts
    found = text.text_files(data.text, warn) if data.text else text.standard_library()
    if not data.validation:
        return text.split(found)
    validation = text.text_files(data.validation, warn)
    train = text.without(found, validation)
    if len(train) < len(found):
        warn(f"skipped {len(found) - len(train)} training texts: they are also validation texts")
    return text.Split(train, validation)


def _characters(documents: Sequence[text.Document | text.TextFile]) -> int:
    count = getattr(documents, "characters", None)
    return sum(document.characters for document in documents) if count is None else count


@contextmanager
def _progress(total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Yield a function that adds a number of characters to a progress bar."""
    if total > _LARGE and not console.is_terminal:
        console.print(f"encoding {total:,} characters", highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("encoding the text", total=total)
        yield lambda characters: bar.advance(task, characters)
