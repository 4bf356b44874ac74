"""Errors in one line, and output for any terminal, in the smaller programs."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What torchao logs when `transformers` or PEFT import it, by the name of the logger: kernels for other devices,
# and types that it registers in a way that torch deprecates.
_MESSAGES = {"torchao": "Failed to load ", "torch.utils._pytree": "%s is an Enum subclass "}


def hide_import_messages() -> None:
    """Let torchao's messages at its import not precede the output of this process.

    It is for programs.
    """
    for name in _MESSAGES:
        logging.getLogger(name).addFilter(_is_for_the_user)


def _is_for_the_user(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_MESSAGES[record.name])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report bad input in one line on stderr and exit with code 2.

    `models.pretrain` does the same. An interrupt exits with code 130.
    """
    hide_import_messages()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed, as `head` does after its lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def print_text(text: str) -> None:
    """Print a text. Characters that the encoding of stdout lacks are replaced."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
