"""Text in, tokens out: deterministic splits and batches, and a clear error for what is not text."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from models import corpus
from models.corpus import Document, Split


def write_files(folder: Path, count: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = [folder / f"file{index}.txt" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_text(f"text of file {index}\n" * (index + 3))
    return paths


def byte_corpus(train: str, validation: str) -> corpus.Corpus:
    documents = Split([Document("train", train)], [Document("validation", validation)])
    return corpus.tokenize(documents, corpus.byte_tokenizer(), window=2)


def test_standard_library_is_there():
    documents = corpus.standard_library()
    assert "argparse.py" in {document.name for document in documents}
    assert not any({"site-packages", "test"} & set(Path(document.name).parts) for document in documents)


def names(parts: Split) -> list[list[str]]:
    return [[document.name for document in part] for part in parts]


def test_split_is_by_file_and_by_name_alone(tmp_path: Path):
    paths = write_files(tmp_path / "a", 40)
    documents = corpus.text_files([tmp_path / "a"])
    parts = corpus.split(documents)
    assert {document.name for document in parts.train}.isdisjoint(document.name for document in parts.validation)
    assert sorted([*parts.train, *parts.validation]) == sorted(documents)
    share = sum(len(d.text) for d in parts.validation) / sum(len(d.text) for d in documents)
    assert corpus.VALIDATION_FRACTION <= share < 2 * corpus.VALIDATION_FRACTION
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = [[tmp_path / "moved"], [tmp_path / "moved" / path.name for path in reversed(paths)]]
    for again in moved:
        assert names(corpus.split(corpus.text_files(again))) == names(parts)


def validation_share(parts: Split) -> float:
    lengths = [sum(document.characters for document in part) for part in parts]
    return lengths[1] / sum(lengths)


def joined(parts: Split) -> dict[str, str]:
    texts: dict[str, str] = {}
    for document in [*parts.train, *parts.validation]:
        texts[document.name] = texts.get(document.name, "") + document.text
    return texts


@pytest.mark.parametrize("sizes", [(1, 1), (1, 50), (50, 1), (1, 2, 3), (400, 1, 1, 1), (30,) * 5])
def test_files_that_are_large_beside_the_text_are_cut_at_a_line(tmp_path: Path, sizes: tuple[int, ...]):
    """Else a folder with a small and a large file would be trained on one of them, and validated on the other."""
    for index, size in enumerate(sizes):
        (tmp_path / f"{index}.txt").write_text("".join(f"line {k} of file {index}, äöü\n" for k in range(60 * size)))
    documents = corpus.text_files([tmp_path])
    for given in (documents, [Document(document.name, document.text) for document in documents]):
        parts = corpus.split(given)
        assert corpus.VALIDATION_FRACTION / 2 < validation_share(parts) <= 2 * corpus.VALIDATION_FRACTION
        assert joined(parts) == {document.name: document.text for document in documents}
        assert all(document.text.endswith("\n") for document in [*parts.train, *parts.validation])


@pytest.mark.parametrize("count", [1, 2])
def test_a_text_without_lines_is_cut_all_the_same(tmp_path: Path, count: int):
    for index in range(count):
        (tmp_path / f"{index}.txt").write_text("first line\n" + f"{index}ä" * 4000)
    parts = corpus.split(corpus.text_files([tmp_path]))
    assert 0.04 < validation_share(parts) <= 0.11
    assert joined(parts) == {document.name: document.text for document in corpus.text_files([tmp_path])}


def test_one_file_is_cut_at_a_line(tmp_path: Path):
    path = tmp_path / "only.txt"
    path.write_text("".join(f"line {index}\n" for index in range(100)))
    (train,), (validation,) = corpus.split(corpus.text_files([path]))
    assert train.text + validation.text == path.read_text()
    assert train.text.endswith("\n")
    assert len(train.text) == pytest.approx(0.9 * len(path.read_text()), abs=10)


def test_folders_pass_over_what_is_not_text(tmp_path: Path):
    write_files(tmp_path, 2)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert [document.name for document in corpus.text_files([tmp_path])] == ["file0.txt", "file1.txt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x01\x02", "must be UTF-8 text, got the binary file"),
        (b"\xff\xfea\0", "UTF-16 file"),
        (b"caf\xe9", "not UTF-8 file"),
        (b" \n", "some text"),
    ],
)
def test_a_file_that_is_not_text(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "given"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"`text` .*{message}.*given"):
        corpus.text_files([path])


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_json_lines_are_no_text(tmp_path: Path, name: str):
    path = tmp_path / name
    path.write_text('\ufeff{"text": "a"}\n {"text": "b"}\n')
    with pytest.raises(ValueError, match=rf"`text` must be plain text, got JSON lines in '.*{name}'; --dataset reads"):
        corpus.text_files([path])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{\n "name": "one object"\n}\n'),
        ("a.json", '{"name": "one object"}\n'),
        ("a.jsonl", "lines of text\n"),
        ("a.txt", '{"text": "a"}\n{"text": "b"}\n'),
    ],
)
def test_other_files_are_text_whatever_their_names(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    for path in (tmp_path, tmp_path / name):
        assert [document.text for document in corpus.text_files([path])] == [content]


def test_a_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"`text` must name files or folders, got .*nowhere"):
        corpus.text_files([tmp_path / "nowhere"])


def test_too_short():
    with pytest.raises(ValueError, match=r"at least 9 tokens for validation, one more than `seq_len`, got 3"):
        corpus.tokenize(
            Split([Document("a", "long enough")], [Document("b", "not")]), corpus.byte_tokenizer(), window=9
        )


def test_bytes_round_trip():
    tokens = byte_corpus("naïve\nfile", "ok").train
    assert bytes(tokens.tolist()).decode() == "naïve\nfile"
    joined = corpus.byte_tokenizer().encode([Document("a", "x"), Document("b", "y")])
    assert joined.tolist() == [ord("x"), 0, ord("y")]


def test_batch_is_a_function_of_seed_and_step():
    tokens = torch.arange(200, dtype=torch.uint8)
    first = corpus.batch(tokens, (2, 3), window=5, seed=1, step=7)
    assert first.shape == (2, 3, 5)
    assert first.dtype == torch.int64
    assert torch.equal(first[..., 1:] - first[..., :-1], torch.ones(2, 3, 4, dtype=torch.int64))  # windows of the text
    assert torch.equal(first, corpus.batch(tokens, (2, 3), window=5, seed=1, step=7))
    assert not torch.equal(first, corpus.batch(tokens, (2, 3), window=5, seed=1, step=8))
    assert not torch.equal(first, corpus.batch(tokens, (2, 3), window=5, seed=2, step=7))


def test_batch_reaches_both_ends():
    tokens = torch.arange(6, dtype=torch.uint8)
    starts = corpus.batch(tokens, (200,), window=4, seed=0, step=0)[:, 0]
    assert set(starts.tolist()) == {0, 1, 2}


def test_validation_batches_span_the_text():
    tokens = torch.arange(100, dtype=torch.uint8)
    windows = corpus.validation_batches(tokens, 2, 3, window=10)
    assert windows.shape == (2, 3, 10)
    assert windows[0, 0, 0] == 0
    assert windows[-1, -1, -1] == 99


def test_unigram_loss_is_the_cross_entropy_of_counts():
    counts = np.ones(256)
    counts[[ord("a"), ord("b")]] += [3, 1]
    expected = -np.log(counts[[ord("b"), ord("b"), ord("c")]] / counts.sum()).mean()
    assert corpus.unigram_loss(byte_corpus("aaab", "bbc")) == pytest.approx(expected)


def test_digest_tells_corpora_apart():
    assert byte_corpus("aaab", "bb").digest() == byte_corpus("aaab", "bb").digest()
    assert len({byte_corpus(*parts).digest() for parts in (("aaab", "bb"), ("aaa", "bbb"), ("aaab", "bc"))}) == 3


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        ["low rank factors"] * 9, trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"])
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_pretrained_tokenizer(tokenizer_file: Path):
    tokenizer = corpus.pretrained_tokenizer(str(tokenizer_file))
    tokens = tokenizer.encode([Document("a", "low rank"), Document("b", "factors")])
    assert tokenizer.vocabulary == Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()
    assert tokens.max() < tokenizer.vocabulary
    alone = tokenizer.encode([Document("a", "low rank")])
    assert tokens[: len(alone)].tolist() == alone.tolist()


def test_a_tokenizer_that_is_none(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"`tokenizer` must be a tokenizer's name, folder or file, got"):
        corpus.pretrained_tokenizer(str(path))


def write_dataset(folder: Path, **splits: list[str]) -> str:
    folder.mkdir()
    for name, texts in splits.items():
        lines = (json.dumps({"text": text, "number": index}) for index, text in enumerate(texts))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_dataset_with_a_validation_split(tmp_path: Path):
    name = write_dataset(tmp_path / "data", train=["one", "two", "three"], validation=["held", "out"])
    parts = corpus.dataset(name, config=None, column="text", characters=80)
    assert [document.text for document in parts.train] == ["one", "two", "three"]
    assert [document.text for document in parts.validation] == ["held"]  # enough for a twentieth of the characters


def test_dataset_without_one_and_with_a_limit(tmp_path: Path):
    name = write_dataset(tmp_path / "data", train=[f"{index:04d}" for index in range(100)])
    parts = corpus.dataset(name, config=None, column="text", characters=160)
    assert [document.text for document in parts.validation] == ["0000", "0001"]
    assert [document.text for document in parts.train] == [f"{index:04d}" for index in range(2, 40)]


def test_dataset_without_the_column(tmp_path: Path):
    name = write_dataset(tmp_path / "data", train=["one"])
    with pytest.raises(ValueError, match=r"`text_column` must be one of \['number', 'text'\], got 'body'"):
        corpus.dataset(name, config=None, column="body", characters=10)


def test_a_dataset_that_is_not_there(tmp_path: Path):
    with pytest.raises(ValueError, match=r"`dataset` must be one that `datasets` can load, got '.*nowhere'"):
        corpus.dataset(str(tmp_path / "nowhere"), config=None, column="text", characters=10)


def test_files_that_are_skipped_are_named_with_the_reason(tmp_path: Path):
    write_files(tmp_path, 2)
    (tmp_path / "wide.txt").write_text("text of file 0\n", encoding="utf-16")
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "copy.txt").write_text((tmp_path / "file1.txt").read_text())
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # whose reader would wait forever
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    lines: list[str] = []
    documents = corpus.text_files([tmp_path], lines.append)
    assert [document.name for document in documents] == ["copy.txt", "file0.txt"]
    assert sorted(lines) == [
        "skipped 1 file (.git): hidden",
        "skipped 1 file (file1.txt): the same text as another",
        "skipped 1 file (folder): a link to a folder",
        "skipped 1 file (latin.txt): not UTF-8",
        "skipped 1 file (link): a link to nothing",
        "skipped 1 file (picture.png): binary",
        "skipped 1 file (pipe): a pipe or a device",
        "skipped 1 file (rows.jsonl): JSON lines, which --dataset reads",
        "skipped 1 file (wide.txt): UTF-16",
    ]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"`text` must name files or folders, got .*which is a pipe or a device"):
        corpus.text_files([tmp_path / "pipe"])


def test_a_byte_order_mark_is_no_text(tmp_path: Path):
    (tmp_path / "marked.txt").write_text("some text\n", encoding="utf-8-sig")
    (document,) = corpus.text_files([tmp_path])
    assert (document.text, document.characters) == ("some text\n", 10)
    assert corpus.byte_tokenizer().encode([document]).tolist() == list(b"some text\n")


def test_a_file_that_changes_after_it_was_found_is_named(tmp_path: Path):
    path = tmp_path / "log.txt"
    path.write_text("a line\n" * 100)
    documents = corpus.text_files([path])
    with path.open("a") as file:
        file.write("another line\n")
    assert documents[0].text == "a line\n" * 100  # what was there
    for content in (b"shorter", b"\xff" * 700):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"must not change while it is read, got another in .*log.txt"):
            corpus.byte_tokenizer().encode(documents)


def test_validation_texts_are_not_trained_on(tmp_path: Path):
    paths = write_files(tmp_path, 3)
    documents = corpus.text_files(paths)
    remaining = corpus.without(documents, corpus.text_files(paths[1:2]))
    assert [file.name for file in remaining] == ["file0.txt", "file2.txt"]


def test_tokens_in_files_are_those_in_memory(tmp_path: Path):
    documents = corpus.split([Document(str(index), f"text {index}, äöü\n" * 50) for index in range(40)])
    in_memory = corpus.tokenize(documents, corpus.byte_tokenizer(), window=9)
    in_files = corpus.tokenize(documents, corpus.byte_tokenizer(), window=9, folder=tmp_path)
    assert in_files.digest() == in_memory.digest()
    assert (tmp_path / "train.bin").read_bytes() == np.asarray(in_memory.train).tobytes()
    assert [len(in_files.train), len(in_files.validation)] == [len(in_memory.train), len(in_memory.validation)]
    (tmp_path / "train.bin").rename(tmp_path / "moved.bin")  # an open file
    draws = [corpus.batch(given.train, (2, 3), window=9, seed=0, step=1) for given in (in_files, in_memory)]
    assert torch.equal(*draws)
    evaluated = [corpus.validation_batches(given.validation, 2, 2, window=9) for given in (in_files, in_memory)]
    assert torch.equal(*evaluated)
    assert corpus.unigram_loss(in_files) == corpus.unigram_loss(in_memory)


def test_the_smallest_integer_type_stores_the_tokens():
    types = {2: np.uint8, 256: np.uint8, 257: np.uint16, 65536: np.uint16, 65537: np.uint32}
    for vocabulary, dtype in types.items():
        tokenizer = corpus.Tokenizer(lambda texts: [[vocabulary - 1] for _ in texts], vocabulary)  # noqa: B023
        tokens = tokenizer.encode([Document("a", "x")])
        assert (tokens.dtype, tokens.tolist()) == (dtype, [vocabulary - 1])
        assert corpus.batch(tokens, (1,), window=1, seed=0, step=0).tolist() == [[vocabulary - 1]]


def test_a_token_beyond_the_vocabulary_is_named():
    tokenizer = corpus.Tokenizer(lambda texts: [[7] for _ in texts], 7)
    with pytest.raises(ValueError, match=r"`tokenizer` must give tokens below its length, 7, got the token 7"):
        tokenizer.encode([Document("a", "x")])


def test_long_documents_are_encoded_in_pieces_and_end_once():
    lengths: list[int] = []

    def encode(texts: list[str]) -> list[list[int]]:
        lengths.extend(map(len, texts))
        return [[1] * len(text) for text in texts]

    tokenizer = corpus.Tokenizer(encode, 9, between=(2,), after=(3,))
    long, lines = "x" * 1_000_000, "word " * 10 + "\n"
    documents = [Document("a", long), Document("b", ""), Document("c", lines * 10_000), Document("d", "end")]
    tokens = tokenizer.encode(documents)
    assert max(lengths) < 300_000
    assert [(tokens == token).sum() for token in (1, 2, 3)] == [sum(len(text) for _, text in documents), 3, 4]
    assert tokens[-5:].tolist() == [2, 1, 1, 1, 3]
    assert len(corpus.byte_tokenizer().encode(documents)) == sum(len(text) for _, text in documents) + 3


def test_bits_per_byte_are_of_the_bytes_of_the_text():
    documents = Split([Document("train", "äö")], [Document("validation", "äöü")])
    tokenizer = corpus.Tokenizer(lambda texts: [[1] * len(text) for text in texts], 2)
    counted = corpus.tokenize(documents, tokenizer, window=1)
    assert counted.bits_per_byte(np.log(2)) == pytest.approx(3 / 6)  # three tokens for six bytes, at a bit each
    assert counted.bits_per_byte(2 * np.log(2), "train") == pytest.approx(1)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv", ".jsonl.gz"])
def test_a_file_is_a_dataset(tmp_path: Path, suffix: str):
    datasets = pytest.importorskip("datasets")
    rows, path = datasets.Dataset.from_dict({"text": [f"text {index}" for index in range(40)]}), tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        rows.to_parquet(path)
    elif suffix == ".csv":
        rows.to_csv(path)
    else:
        content = "".join(json.dumps({"text": text}) + "\n" for text in rows["text"]).encode()
        path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    parts = corpus.dataset(str(path), config=None, column="text", characters=10**6)
    assert [document.text for document in parts.validation] == ["text 0", "text 1"]
    assert [document.text for document in parts.train] == [f"text {index}" for index in range(2, 40)]
    assert parts.train[-1] == Document("39", "text 39")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text"', "`dataset` .* got .*a.jsonl"),
        ('{"text": 3}\n', "`text_column` must contain texts, got 3 in row 0"),
        ('{"text": "a"}\n{"text": null}\n', "`text_column` must contain texts, got None in row 1"),
    ],
)
def test_a_damaged_dataset_is_named(tmp_path: Path, content: str, message: str):
    pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        corpus.dataset(str(tmp_path / "a.jsonl"), config=None, column="text", characters=10**6)


def test_a_file_that_no_loader_reads_is_no_dataset(tmp_path: Path):
    pytest.importorskip("datasets")
    (tmp_path / "a.bin").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"`dataset` must be one .* its name must end in one of .jsonl"):
        corpus.dataset(str(tmp_path / "a.bin"), config=None, column="text", characters=10)
