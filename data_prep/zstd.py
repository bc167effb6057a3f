"""Reading zstd, whatever the window that a file was compressed with: large dumps are often made with `zstd --long=31`.

A window is the part of a text that the decompressor has to hold in memory. The usual bound is 128 MiB, and a frame
that needs more is refused as if it were damaged. Here windows up to 2 GiB are read, the most that `zstd` itself makes,
if the machine has the memory: one file is read at a time, so reading never takes more than that.
"""

from __future__ import annotations

import io
import resource
import struct
import sys
from pathlib import Path
from typing import Any

from monet_train.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ZstdError = zstd.ZstdError
WINDOW_LOG_MAX = 31
READ_BYTES = 1 << 19  # compressed bytes read at a time
BLOCK_BYTES = 1 << 20  # decompressed at a time
MAGIC = 0xFD2FB528
HEADER_BYTES = 18  # the longest header of a frame
GIB = 1 << 30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class ZstdReader(io.RawIOBase):
    """The bytes that a stream of zstd frames holds.

    Reading raises EOFError where the stream ends within a frame, ZstdError where it is damaged, and UserError where a
    frame needs more memory than there is.

    Args:
        raw: a binary stream of compressed bytes.
        path: the name to use in errors.
    """

    def __init__(self, raw: Any, path: str) -> None:
        super().__init__()
        self._raw, self._path = raw, path
        self._frame: Any = None  # the decompressor of the frame that is being read
        self._window = 0  # its bytes
        self._data = b""  # read and not decompressed yet

    def readable(self) -> bool:
        """True: it can be read."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """``size`` bytes, or what is left; everything if ``size`` is negative or None."""
        left = sys.maxsize if size is None or size < 0 else size
        blocks: list[bytes] = []
        while left and (block := self._decompress(min(left, BLOCK_BYTES))):
            blocks.append(block)
            left -= len(block)
        return blocks[0] if len(blocks) == 1 else b"".join(blocks)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the data goes; return the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the stream below as well."""
        self._raw.close()
        super().close()

    def _decompress(self, most: int) -> bytes:
        """At least one byte and at most ``most``; none at the end."""
        while self._frame or self._begin_frame():
            if self._frame.needs_input and not (self._data or self._fetch()):
                raise EOFError("it ends within a frame of zstd")
            try:
                block = self._frame.decompress(self._data, most)
            except (MemoryError, ZstdError) as error:
                if isinstance(error, MemoryError) or "Allocation error" in str(error):
                    raise _too_large(self._path, self._window) from None
                raise
            self._data = b""
            if self._frame.eof:
                self._data, self._frame = self._frame.unused_data, None
            if block:
                return block
        return b""

    def _begin_frame(self) -> bool:
        """Start on the next frame; return whether there is one."""
        while len(self._data) < HEADER_BYTES and self._fetch():
            pass
        if not self._data:
            return False
        self._window = window_bytes(self._data)
        if self._window > min(1 << WINDOW_LOG_MAX, available_memory()):
            raise _too_large(self._path, self._window)
        self._frame = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG_MAX})
        return True

    def _fetch(self) -> bool:
        """Read some compressed bytes; return whether there were any."""
        more = self._raw.read(READ_BYTES)
        self._data += more
        return bool(more)


def window_bytes(header: bytes) -> int:
    """The memory that a frame needs for its window, from the frame's first bytes; 0 if it is not a data frame."""
    if len(header) < 6 or struct.unpack_from("<I", header)[0] != MAGIC:
        return 0
    descriptor = header[4]
    single_segment = bool(descriptor & 0x20)
    at = 5 if single_segment else 6
    window = None if single_segment else (1 << (10 + (header[5] >> 3))) * (8 + (header[5] & 7)) // 8
    at += (0, 1, 2, 4)[descriptor & 3]  # the number of a dictionary
    size = (1 if single_segment else 0, 2, 4, 8)[descriptor >> 6]
    content = int.from_bytes(header[at : at + size], "little") + (256 if size == 2 else 0) if size else None
    return min(value for value in (window, content) if value is not None)


def available_memory() -> int:
    """Bytes that this process may still allocate, as far as the machine says."""
    limits = [1 << 62]
    address_space, proc = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if address_space != resource.RLIM_INFINITY:
        used = int(proc.read_text().split()[0]) * resource.getpagesize() if proc.is_file() else 0
        limits.append(address_space - used)
    for path in map(Path, CGROUP_LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            limits.append(int(text))
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        limits += [int(words[1]) << 10 for words in lines if words[0] == "MemAvailable:"]
    return min(limits)


def _too_large(path: str, needed: int) -> UserError:
    window = f"source {path} was compressed with a window of {needed / GIB:.2f} GiB"
    if needed > 1 << WINDOW_LOG_MAX:
        return UserError(f"{window}, 2 GiB are read at most: compress the original again with `zstd --long=27`")
    return UserError(
        f"{window}, which reading it keeps in memory, and {available_memory() / GIB:.2f} GiB are left: give the job "
        "more memory, or compress it again with a smaller window: "
        f"zstd -dc --long={WINDOW_LOG_MAX} {path} | zstd --long=27 -o NEW.zst"
    )
