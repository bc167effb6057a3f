"""Errors that a user can mend: one line that names the key or the file and the remedy, exit status 2."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input. The message is one line: what is wrong (key or file named) and how to mend it."""


def one_line_errors(main: Callable[[], None], is_main: bool = True) -> Callable[[], None]:
    """Decorate a console entry point: a :class:`UserError` becomes one line and exit status 2, Ctrl-C 130.

    So does a name that is too long for any file system, wherever it is first tried.

    Of several processes only the main one prints; all of them end with the same status.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            if is_main:
                print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
            raise SystemExit(EXIT_BAD_INPUT) from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            if is_main:
                print(
                    f"error: {error.filename}: no file can have so long a name: shorten it", file=sys.stderr, flush=True
                )
            raise SystemExit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt:
            if is_main:
                print("interrupted", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_INTERRUPTED) from None

    return wrapped
