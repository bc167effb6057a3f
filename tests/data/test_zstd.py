"""zstd: windows of any size, several frames, and files that are cut short."""

from __future__ import annotations

import io
import json
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.zstd import ZstdError, ZstdReader, window_bytes, zstd
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer
from tests.support import REPOSITORY
from tests.support.corpora import documents_of, text_of

BLOCK = 1 << 17  # the largest block of a frame
SKIPPABLE = struct.pack("<II", 0x184D2A50, 7) + b"skipped"


def frame(data: bytes, window_log: int, eighths: int = 0) -> bytes:
    """A frame of raw blocks, as `zstd --long=N` writes one from a pipe: it says its window and not its size."""
    blocks = [data[begin : begin + BLOCK] for begin in range(0, len(data), BLOCK)] or [b""]
    header = struct.pack("<IBB", 0xFD2FB528, 0, (window_log - 10) << 3 | eighths)
    last = len(blocks) - 1
    return header + b"".join(
        struct.pack("<I", len(block) << 3 | (number == last))[:3] + block for number, block in enumerate(blocks)
    )


def read(data: bytes) -> bytes:
    return ZstdReader(io.BytesIO(data), "a.zst").read()


@pytest.mark.parametrize("window_log", [27, 28, 31])
@pytest.mark.parametrize("kind", ["jsonl.zst", "parquet.zst", "txt.zst", "hf"])
def test_windows_of_any_size_are_read(
    window_log: int, kind: str, prepare: Callable[..., Path], tokenizer: Tokenizer, data, tmp_path: Path
) -> None:
    texts = [text_of(i) for i in range(40)]
    if kind == "parquet.zst":
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink, compression="zstd")
        content = sink.getvalue().to_pybytes()
    elif kind == "txt.zst":
        texts, content = ["".join(texts)], "".join(texts).encode()
    else:
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    cut = len(content) // 2
    folder = tmp_path / "dataset"
    folder.mkdir()
    file = folder / f"train.{kind if kind != 'hf' else 'jsonl.zst'}"
    file.write_bytes(frame(content[:cut], window_log) + SKIPPABLE + zstd.compress(content[cut:]))
    source = f"hf:{folder}" if kind == "hf" else str(file)
    assert documents_of(prepare(tmp_path / "out", [source]), tokenizer) == texts
    if kind == "jsonl.zst":
        status, _, err = data("tokenizer", file, "--vocab-size", 360, "--out", tmp_path / "tokenizer")
        assert status == 0, err


def test_frames_follow_each_other() -> None:
    one, other = b"one" * 100_000, b"other" * 100_000
    packed = [zstd.compress(one), frame(other, 28), zstd.compress(b""), frame(b"", 31)]
    assert read(SKIPPABLE.join([b"", *packed, b""])) == one + other
    assert read(SKIPPABLE) == b""
    stream = ZstdReader(io.BytesIO(packed[0] + packed[1]), "a.zst")
    assert [len(stream.read(n)) for n in (1, 300_000, 499_999, 1)] == [1, 300_000, 499_999, 0]


@pytest.mark.parametrize("window_log", [20, 31])
def test_what_is_cut_short_or_damaged_is_told(window_log: int, data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    whole = frame(b'{"text": "some text"}\n' * 20_000, window_log)
    for cut in (3, 5, 9, 1000, len(whole) - 1):
        with pytest.raises(EOFError, match="within a frame"):
            read(whole + whole[:cut])
    with pytest.raises(EOFError, match="within a frame"):
        read(whole + SKIPPABLE[:-1])
    with pytest.raises(ZstdError):
        read(whole + b"\0" * 30)
    (tmp_path / "a.jsonl.zst").write_bytes(whole[:-5])
    arguments = ("shards", tmp_path / "a.jsonl.zst", "--tokenizer", tokenizer.path, "--out", tmp_path / "out")
    status, _, err = data(*arguments, "--workers", 1)
    assert status == 2 and err.count("\n") == 1 and "a.jsonl.zst cannot be read (cut short or damaged" in err


def test_a_window_beyond_the_bound_is_refused_with_the_bound() -> None:
    packed = frame(b"text", 31, eighths=1)
    assert window_bytes(packed) == (1 << 31) * 9 // 8
    with pytest.raises(UserError, match=r"window of 2\.25 GiB, 2 GiB are read at most: .*`zstd --long=27`"):
        read(packed)
    assert read(frame(b"text", 30, eighths=7)) == b"text"


def test_a_window_that_the_memory_does_not_hold_is_refused_with_what_is_left(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(frame(b'{"text": "some text"}\n', 31))
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "shards", tmp_path / "a.jsonl.zst", "--tokenizer", tokenizer.path,
         "--out", tmp_path / "out", "--workers", "1"], capture_output=True, text=True, cwd=REPOSITORY,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30)),
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "a window of 2.00 GiB, which reading it keeps in memory, and 1." in done.stderr
    assert "zstd -dc --long=31" in done.stderr and "| zstd --long=27 -o" in done.stderr


def test_a_frame_that_tells_its_size_needs_no_more_than_that() -> None:
    for size in (0, 100, 1000, 100_000, 1 << 20):
        assert window_bytes(zstd.compress(b"x" * size)) == size
    assert window_bytes(SKIPPABLE) == 0
