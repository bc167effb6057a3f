"""Megatron's ``.bin``/``.idx`` format: an index is read and written here without importing Megatron.

Its ``IndexedDatasetBuilder`` is the reference, and a test compares the two byte for byte. But importing it costs five
seconds of processor time and 370 MB (transformer layers, inference, compilers). In that time two processes tokenize
fifty megabytes, and nothing hides it: all cores are busy until the last shard.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monet_train.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<QBQQ")  # after the magic: version, dtype code, number of sequences, of document borders
HEADER_BYTES = len(MAGIC) + HEADER.size
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # Megatron's DType codes
UINT16_VOCABULARY = 65_500  # below this Megatron stores tokens in two bytes
CHECKED_AT_ONCE = 1 << 20  # sequences
REBUILD = "run the same `monet-data shards` command again to rebuild it"


class IndexHeader(NamedTuple):
    """What an ``.idx`` file says about its ``.bin``."""

    dtype: Any
    sequences: int
    documents: int
    bin_bytes: int


class Index(NamedTuple):
    """The arrays of an ``.idx`` file, mapped into memory."""

    lengths: np.ndarray  # int32 [sequences], in tokens
    pointers: np.ndarray  # int64 [sequences], byte offsets in the .bin
    borders: np.ndarray  # int64 [documents + 1], the first sequence of every document, and the end


def token_dtype(vocabulary_size: int) -> type[np.number]:
    """The type of stored tokens: Megatron's choice for a vocabulary."""
    return np.uint16 if vocabulary_size < UINT16_VOCABULARY else np.int32


def write_index(path: Path, dtype: type[np.number], lengths: np.ndarray) -> None:
    """Write an ``.idx`` file of documents that are one sequence each.

    Args:
        lengths: int32 [documents], in tokens.
    """
    code = next(code for code, known in DTYPES.items() if known is dtype)
    pointers = np.cumsum(lengths, dtype=np.int64) - lengths
    pointers *= np.dtype(dtype).itemsize
    with path.open("wb") as stream:
        stream.write(MAGIC + HEADER.pack(VERSION, code, len(lengths), len(lengths) + 1))
        for array in (lengths.astype(np.int32), pointers, np.arange(len(lengths) + 1, dtype=np.int64)):
            stream.write(array.data)


def read_index_header(prefix: Path) -> IndexHeader:
    """Read and check the header of ``prefix.idx`` against both files' sizes, without reading their contents.

    Raises:
        UserError: a file of the pair is missing, is not an index, or is shorter or longer than it says.
    """
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (bin_, idx):
        if not path.is_file():
            raise UserError(f"shard file {path} is missing: {REBUILD}, or correct data.path")
    with idx.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
        if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
            raise UserError(f"{idx} is not a Megatron index: {REBUILD}, or correct data.path")
        version, code, sequences, borders = HEADER.unpack(head[len(MAGIC) :])
        if version != VERSION or code not in DTYPES:
            raise UserError(f"{idx} has version {version} and type code {code}, which cannot be read: {REBUILD}")
        dtype = DTYPES[code]
        lengths, pointers = HEADER_BYTES, HEADER_BYTES + 4 * sequences
        expected = pointers + 8 * sequences + 8 * borders
        # A multimodal index has one more byte per sequence.
        if idx.stat().st_size not in (expected, expected + sequences):
            raise UserError(f"{idx} has {idx.stat().st_size} bytes instead of {expected} (truncated?): {REBUILD}")
        bin_bytes = 0
        if sequences:
            stream.seek(lengths + 4 * (sequences - 1))
            (length,) = struct.unpack("<i", stream.read(4))
            stream.seek(pointers + 8 * (sequences - 1))
            (pointer,) = struct.unpack("<q", stream.read(8))
            bin_bytes = pointer + length * np.dtype(dtype).itemsize
    if bin_.stat().st_size != bin_bytes:
        raise UserError(
            f"{bin_} has {bin_.stat().st_size} bytes, its index {idx.name} says {bin_bytes} "
            f"(truncated, or an index from elsewhere): {REBUILD}"
        )
    return IndexHeader(dtype, sequences, borders - 1, bin_bytes)


def read_index(prefix: Path) -> Index:
    """The arrays of a pair.

    Raises:
        UserError: as ``read_index_header``.
    """
    header = read_index_header(prefix)
    raw = np.memmap(f"{prefix}.idx", dtype=np.uint8, mode="r", offset=HEADER_BYTES)
    lengths, rest = np.split(raw, [4 * header.sequences])
    pointers, rest = np.split(rest, [8 * header.sequences])
    borders = rest[: 8 * (header.documents + 1)]  # in a multimodal index the modes follow
    return Index(lengths.view(np.int32), pointers.view(np.int64), borders.view(np.int64))


def check_index(prefix: Path, block: int = CHECKED_AT_ONCE) -> None:
    """Check everything in an index, in one pass: the sequences fill the ``.bin`` one after the other.

    Args:
        block: sequences checked at a time, which bounds the memory.

    Raises:
        UserError: as ``read_index_header``; a length is negative, a pointer is not the sum of the lengths before it, or
            the documents' borders do not go up from 0 to the number of sequences.
    """
    index, token_bytes = read_index(prefix), np.dtype(read_index_header(prefix).dtype).itemsize
    if not (_are_gapless(index, token_bytes, block) and _are_borders(index.borders, len(index.lengths), block)):
        raise UserError(
            f"{prefix}.idx is damaged, its lengths, pointers and borders do not fit together: restore it, or delete it "
            f"and {REBUILD}"
        )


def _are_gapless(index: Index, token_bytes: int, block: int) -> bool:
    end = 0
    for begin in range(0, len(index.lengths), block):
        lengths = index.lengths[begin : begin + block]
        ends = np.cumsum(lengths, dtype=np.int64) + end
        pointers = index.pointers[begin : begin + block]
        if lengths.min() < 0 or (pointers != (ends - lengths) * token_bytes).any():
            return False
        end = int(ends[-1])
    return True


def _are_borders(borders: np.ndarray, sequences: int, block: int) -> bool:
    blocks = (borders[begin : begin + block + 1] for begin in range(0, len(borders), block))
    ends = borders[[0, -1]].tolist() if len(borders) else []
    return ends == [0, sequences] and all((part[1:] >= part[:-1]).all() for part in blocks)
