"""Errors that a user can mend: one line that names the key or the file and the remedy, exit status 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Bad input. The message is one line: what is wrong (key or file named) and how to mend it."""


def fail(message: str) -> NoReturn:
    """Print ``error: message`` on one line of standard error and end with exit status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    raise SystemExit(EXIT_BAD_INPUT)


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a console entry point: :class:`UserError` becomes one line and exit status 2, Ctrl-C 130."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            fail(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(130) from None

    return wrapped
