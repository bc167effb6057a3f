"""Errors that a user can mend: one line that names the key or the file and the remedy, exit status 2."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class UserError(Exception):
    """Bad input. The message is one line: what is wrong (key or file named) and how to mend it.

    ``alone``: other processes of the run may not have it, so that this one prints it whatever its rank.
    """

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


def one_line_errors(main: Callable[[], T], rank: int = 0) -> Callable[[], T]:
    """Decorate a console entry point: a :class:`UserError` becomes one line and exit status 2, Ctrl-C 130.

    So does a full disk, and a name that is too long for any file system, wherever they are first met.

    Of several processes the one of rank 0 prints, and whichever has an error of its own; all end with the same status.
    """

    def end(status: int, message: str, prints: bool = True) -> NoReturn:
        if prints or rank == 0:
            print(message if rank == 0 else f"rank {rank}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(status) from None

    @functools.wraps(main)
    def wrapped() -> T:
        try:
            return main()
        except UserError as error:
            end(EXIT_BAD_INPUT, "error: " + " ".join(str(error).split()), prints=error.alone)
        except OSError as error:
            if error.errno in FULL:
                where = "" if error.filename is None else f"{error.filename}: "
                end(EXIT_BAD_INPUT, f"error: {where}{error.strerror}: make room and run the same command again")
            if error.errno == errno.ENAMETOOLONG:
                end(
                    EXIT_BAD_INPUT,
                    f"error: {error.filename}: no file can have so long a name: shorten it",
                    prints=False,
                )
            raise
        except KeyboardInterrupt:
            end(EXIT_INTERRUPTED, "interrupted", prints=False)

    return wrapped
