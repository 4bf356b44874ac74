"""Turn files, folders, Python's sources or a Hugging Face dataset into tokens.

Everything is deterministic. The split depends on the names and lengths of the documents, and a batch on the seed and
the step. A text may be larger than memory, because it is read in pieces and its tokens can be stored in files.
"""

from models.corpus.documents import Document, TextFile
from models.corpus.sources import dataset, python_sources, standard_library, text_files
from models.corpus.split import VALIDATION_FRACTION, Split, split, without
from models.corpus.stored import read_record, stored_corpus, write_record
from models.corpus.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, pretrained_tokenizer
from models.corpus.tokens import Corpus, Tokens, batch, tokenize, unigram_loss, validation_batches

__all__ = [
    "VALIDATION_FRACTION",
    "Corpus",
    "Document",
    "Split",
    "TextFile",
    "Tokenizer",
    "Tokens",
    "batch",
    "byte_tokenizer",
    "dataset",
    "load_tokenizer",
    "pretrained_tokenizer",
    "python_sources",
    "read_record",
    "split",
    "standard_library",
    "stored_corpus",
    "text_files",
    "tokenize",
    "unigram_loss",
    "validation_batches",
    "without",
    "write_record",
]
