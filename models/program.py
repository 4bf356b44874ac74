"""Errors in one line, and output for any terminal, for the smaller programs."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The beginnings of what torchao logs when `transformers` or PEFT import it, by the name of the logger: kernels for
# other devices, and types that it registers in a way that torch deprecates.
_MESSAGES = {"torchao": "Failed to load ", "torch.utils._pytree": "%s is an Enum subclass "}


def hide_import_messages() -> None:
    """Drop the messages that torchao logs when it is imported.

    Programs call it, so that the messages do not precede their output.
    """
    for name in _MESSAGES:
        logging.getLogger(name).addFilter(_is_for_the_user)


def _is_for_the_user(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_MESSAGES[record.name])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report bad input in one line on stderr and exit with code 2.

    An interrupt exits with code 130. `models.pretrain` behaves in the same way.
    """
    hide_import_messages()
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def print_text(text: str) -> None:
    """Print a text, with a replacement for characters that stdout cannot encode."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding))
