"""Errors that a user can correct: one line that names the key or the file and the remedy, exit status 2."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TextIO, TypeVar

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_OUTPUT_CLOSED = 128 + signal.SIGPIPE  # what a shell reports for a program that SIGPIPE ended
FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class UserError(Exception):
    """Bad input. The message is one line: what is wrong (key or file named) and how to correct it.

    ``alone``: other processes of the run may not have it, so this one prints it whatever its rank.
    """

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


def one_line(error: Exception | str) -> str:
    """The line that a user sees for an error."""
    return "error: " + " ".join(str(error).split())


def one_line_errors(main: Callable[[], T], rank: int = 0) -> Callable[[], T]:
    """Decorate a console entry point: a :class:`UserError` becomes one line and exit status 2, Ctrl-C 130.

    So do a full disk and a name that is too long for any file system, wherever they occur. An output that is closed
    before everything is written (``| head``) ends the command silently, status 141, as SIGPIPE would.

    Of several processes, rank 0 prints, and any that has an error of its own; all end with the same status.
    """

    def end(status: int, message: str, prints: bool = True) -> NoReturn:
        if prints or rank == 0:
            with contextlib.suppress(OSError):  # standard error may be closed too
                print(message if rank == 0 else f"rank {rank}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(status) from None

    @functools.wraps(main)
    def wrapped() -> T:
        try:
            return _flushed(main)
        except UserError as error:
            end(EXIT_BAD_INPUT, one_line(error), prints=error.alone)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and any(map(_closed, (sys.stdout, sys.stderr))):
                raise SystemExit(EXIT_OUTPUT_CLOSED) from None
            if error.errno in FULL:
                where = "" if error.filename is None else f"{error.filename}: "
                end(EXIT_BAD_INPUT, f"error: {where}{error.strerror}: make room and run the same command again")
            if error.errno == errno.ENAMETOOLONG:
                end(EXIT_BAD_INPUT, f"error: {error.filename}: the name is too long for a file", prints=False)
            raise
        except KeyboardInterrupt:
            end(EXIT_INTERRUPTED, "interrupted", prints=False)

    return wrapped


def unwritable_output(error: OSError) -> UserError:
    """The error of a standard output that cannot be written, but for one that is closed. All further output is lost."""
    _discard(sys.stdout)
    return UserError(f"standard output cannot be written ({error.strerror}): redirect it elsewhere")


def _flushed(main: Callable[[], T]) -> T:
    """Call ``main`` and write what it printed, so that an output that fails is met here and not as Python exits."""
    try:
        result = main()
    except SystemExit as exit:
        _flush()
        if not exit.code and _closed(sys.stdout):  # argparse keeps the failure of its --help to itself
            raise SystemExit(EXIT_OUTPUT_CLOSED) from None
        raise
    _flush()
    return result


def _flush() -> None:
    try:
        if sys.stdout is not None:  # Python starts without one where the file descriptor is closed
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise unwritable_output(error) from None


def _closed(stream: TextIO | None) -> bool:
    """Whether ``stream`` is a pipe without a reader. If so, whatever is still to be written to it is discarded."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)  # type: ignore[union-attr]
        closed = any(events & select.POLLERR for _, events in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no stream, or one without a file descriptor
        return False
    if closed:
        _discard(stream)
    return closed


def _discard(stream: TextIO | None) -> None:
    """Send what is written to ``stream`` from now on nowhere: Python flushes once more as it exits."""
    if stream is not None:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
