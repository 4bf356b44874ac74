"""Split documents into training and validation text."""

import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

from models.corpus.documents import AnyDocument

VALIDATION_FRACTION = 0.05


class Split(NamedTuple):
    train: Sequence[AnyDocument]
    validation: Sequence[AnyDocument]


def split(documents: Sequence[AnyDocument]) -> Split:
    """Split documents into training and validation text.

    Documents are taken in the order of the hashes of their names, until they make up a twentieth of the text. These are
    the validation text. If a document would bring it above a tenth, this document is cut at the end of a line: its end
    completes the twentieth, and its beginning is training text. Of a single document, the last tenth is validation
    text.
    """
    if len(documents) == 1:
        train, validation = documents[0].cut(documents[0].characters * 9 // 10)
        return Split([train], [validation])
    shuffled = sorted(documents, key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest())
    total = sum(document.characters for document in shuffled)
    taken = 0
    for index, document in enumerate(shuffled):
        taken += document.characters
        if taken > 2 * VALIDATION_FRACTION * total:
            train, validation = document.cut(int(taken - VALIDATION_FRACTION * total))
            return Split([train, *shuffled[index + 1 :]], [*shuffled[:index], validation])
        if taken >= VALIDATION_FRACTION * total:
            return Split(shuffled[index + 1 :], shuffled[: index + 1])
    return Split(shuffled, [])


def without(documents: Sequence[AnyDocument], others: Sequence[AnyDocument]) -> list[AnyDocument]:
    """Return the documents whose texts are not among the texts of `others`."""
    digests = {document.digest for document in others}
    return [document for document in documents if document.digest not in digests]
