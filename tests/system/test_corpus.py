"""Text in, tokens out: deterministic splits and batches, and a clear error for what is not text."""

import json
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


def test_split_is_by_file_and_by_name_alone(tmp_path: Path):
    paths = write_files(tmp_path / "a", 40)
    documents = corpus.text_files([tmp_path / "a"])
    parts = corpus.split(documents)
    assert {document.name for document in parts.train}.isdisjoint(document.name for document in parts.validation)
    assert sorted(parts.train + parts.validation) == sorted(documents)
    share = sum(len(d.text) for d in parts.validation) / sum(len(d.text) for d in documents)
    assert corpus.VALIDATION_FRACTION <= share < 2 * corpus.VALIDATION_FRACTION
    (tmp_path / "a").rename(tmp_path / "moved")
    assert corpus.split(corpus.text_files([tmp_path / "moved"])) == parts
    assert corpus.split(corpus.text_files([tmp_path / "moved" / path.name for path in reversed(paths)])) == parts


def test_two_files_leave_one_for_each_part(tmp_path: Path):
    write_files(tmp_path, 2)
    assert [len(part) for part in corpus.split(corpus.text_files([tmp_path]))] == [1, 1]


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
    [(b"\x00\x01\x02", "must be UTF-8 text, got the binary file"), (b"\xff\xfe", "binary file"), (b" \n", "some text")],
)
def test_a_file_that_is_not_text(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "given"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"`text` .*{message}.*given"):
        corpus.text_files([path])


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
