"""`monet-data verify` and `info`."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep.encode
import data_prep.info
import data_prep.verify
from data_prep.chunks import Chunk
from data_prep.encode import Encoded
from data_prep.shard_writer import MANY_VALUES
from data_prep.verify import verify
from monet_train.data.index_file import HEADER_BYTES
from monet_train.tokenizers import Tokenizer
from tests.support import REPOSITORY
from tests.support.corpora import text_of
from tests.support.files import contents
from tests.support.tokenizers import byte_level


@pytest.mark.parametrize("damage", ["token", "order", "labels", "tokenizer", "extra"])
def test_verify_finds_damage(damage: str, data, prepare: Callable[..., Path], tmp_path: Path) -> None:
    out = prepare(tmp_path / "out")
    assert data("verify", out)[0] == 0
    file = out / {"token": "shard-00001.bin", "order": "shard-00001.idx", "labels": "shard-00000.labels.parquet",
                  "tokenizer": "tokenizer.model", "extra": "shard-99999.bin"}[damage]  # fmt: skip
    content = bytearray(file.read_bytes() if file.exists() else b"?")
    content[-1] ^= 1
    file.write_bytes(content)
    status, _, err = data("verify", out)
    assert status == 2 and err.count("\n") == 1 and file.name in err


def test_what_cannot_be_read_is_a_finding_and_the_rest_is_checked(
    data, prepare: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prepare(tmp_path / "out")
    (out / "shard-00002.bin").write_bytes(b"broken")
    sha256 = data_prep.verify.sha256_file

    def worn(path: Path) -> str:
        if path.name in ("tokenizer.model", "shard-00001.idx"):
            raise OSError(errno.EIO, "Input/output error")
        return sha256(path)

    monkeypatch.setattr(data_prep.verify, "sha256_file", worn)
    status, _, err = data("verify", out)
    assert status == 2 and err.count("\n") == 3 and "shard-00002.bin has 6 bytes" in err
    assert err.count("cannot be read (Input/output error)") == 2
    assert "tokenizer.model cannot" in err and "shard-00001 cannot" in err


@pytest.mark.parametrize("changed", ["labels", "text_bytes"])
def test_verify_counts_the_labels_again(changed: str, data, prepare: Callable[..., Path], tmp_path: Path) -> None:
    out = prepare(tmp_path / "out")
    values = json.loads((out / "manifest.json").read_text())
    if changed == "labels":
        values["shards"][1]["labels"]["lang"]["ru"][1] += 1
    else:
        values["text_bytes"] += 1
        values["shards"][1]["text_bytes"] += 1
    (out / "manifest.json").write_text(json.dumps(values))
    status, _, err = data("verify", out)
    assert status == 2 and err.count("\n") == 1 and f"`{changed}` of shard-00001" in err


def test_the_rarest_of_very_many_labels_are_summed_up_and_counted_again(
    prepare: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source.jsonl"
    languages = 2 * MANY_VALUES
    lines = [{"text": f"Text {i}.", "lang": f"language {i % languages}" if i % 3 else None} for i in range(9000)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest, problems = verify(prepare(tmp_path / "out", [str(source)], tokens_per_shard=60_000))
    assert problems == [] and len(manifest.shards) > 1
    for shard in manifest.shards:
        assert len(shard.labels["lang"]) == MANY_VALUES + 1 and "(others)" in shard.labels["lang"]
        assert sum(counts[1] for counts in shard.labels["lang"].values()) == shard.tokens


@pytest.mark.parametrize("lost", ["tokenizer.json", "tokenizer_config.json"])
def test_verify_misses_the_files_of_the_tokenizer(lost: str, data, jsonl: Path, tmp_path: Path) -> None:
    folder, out = byte_level(tmp_path / "t", "<|fin|>"), tmp_path / "out"
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|fin|>"}')
    arguments = ("--tokenizer", folder, "--out", out, "--workers", 1, "--max-documents", 20)
    assert data("shards", jsonl / "*.jsonl", *arguments)[0] == 0
    assert data("verify", out)[0] == 0
    (out / lost).unlink()
    status, _, err = data("verify", out)
    assert status == 2 and err.count("\n") == 1 and f"{out / lost} is missing" in err


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_bad_shard_is_rebuilt_alone_by_doing_what_verify_says(
    tasks: int, data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", out, "--workers", 1,
                 "--tokens-per-shard", 4000, "--tasks", tasks)  # fmt: skip
    for task in range(tasks):
        assert data(*arguments, "--task", task)[0] == 0
    if tasks > 1:
        assert data("merge", out)[0] == 0
    before = contents(out)
    bad = sorted(out.glob("*.bin"))[-2]
    content = bytearray(bad.read_bytes())
    content[100] ^= 1  # the size stays
    bad.write_bytes(content)
    status, _, err = data("verify", out)
    assert status == 2 and err.count("\n") == 1 and f"{bad} has another checksum" in err
    for path in out.glob(re.search(r"rebuild it alone: delete (\S+) and run the same", err)[1].split("/")[-1]):
        path.unlink()
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    for task in range(tasks):
        assert data(*arguments, "--task", task)[0] == 0
    assert contents(out) == before and data("verify", out)[0] == 0
    changed = {path.name for path in out.iterdir() if path.stat().st_mtime_ns != times.get(path.name)}
    assert changed == {f"{bad.stem}.{suffix}" for suffix in ("bin", "idx", "labels.parquet")}


def test_a_lost_shard_is_rebuilt_alone(prepare: Callable[..., Path], shards: Path, tmp_path: Path) -> None:
    out = prepare(tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "shard-00002.bin").write_bytes(b"broken")
    _, problems = verify(out)
    assert len(problems) == 1 and "shard-00002.bin has 6 bytes" in problems[0] and "rebuild it alone" in problems[0]
    prepare(out)  # a file cut short is as good as none
    assert contents(out) == contents(shards)
    changed = {path.name for path in out.iterdir() if path.stat().st_mtime_ns != before[path.name]}
    assert changed == {f"shard-00002.{suffix}" for suffix in ("bin", "idx", "labels.parquet")}


def test_several_lost_shards_are_rebuilt_by_several_workers(
    prepare: Callable[..., Path], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that rebuilding a shard has read ahead do not end up in the memory of the next one."""
    encode_chunk = data_prep.encode.encode_chunk

    def slowly(tokenizer: Tokenizer, chunk: Chunk) -> Encoded:
        time.sleep(0.01)  # so that much is left
        return encode_chunk(tokenizer, chunk)

    monkeypatch.setattr(data_prep.encode, "encode_chunk", slowly)
    small_chunks = {"workers": 2, "chunk_bytes": 1000}
    out = prepare(tmp_path / "out", **small_chunks)
    before = contents(out)
    for number in (0, 2, 4):
        (out / f"shard-{number:05d}.bin").unlink()
    prepare(out, **small_chunks)
    assert contents(out) == before


def test_info_shows_counts_labels_lengths_and_samples(data, shards: Path) -> None:
    status, out, _ = data("info", shards, "--samples", 10)
    assert status == 0
    assert "documents    300" in out and " ru " in out and "####" in out
    assert out.count("\n  document ") == 10 and repr(text_of(0)[:40])[1:-1] in out


def test_info_of_damaged_shards_is_one_line(data, prepare: Callable[..., Path], tmp_path: Path) -> None:
    out = prepare(tmp_path / "out")
    whole = (out / "shard-00001.bin").read_bytes()
    (out / "shard-00001.bin").write_bytes(b"\xff" * len(whole))
    status, _, err = data("info", out, "--samples", 300)
    assert status == 2 and err.count("\n") == 1 and "shard-00001.bin: document 0 has a token outside" in err
    assert f"monet-data verify {out}" in err
    (out / "shard-00001.bin").write_bytes(whole)
    index = bytearray((out / "shard-00001.idx").read_bytes())
    index[HEADER_BYTES + 3] = 0xFF  # the first length is negative
    (out / "shard-00001.idx").write_bytes(index)
    status, _, err = data("info", out)
    assert status == 2 and err.count("\n") == 1 and "shard-00001.idx is damaged" in err


def test_info_of_an_unreadable_shard_is_one_line(data, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worn(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(data_prep.info.np, "fromfile", worn)
    status, _, err = data("info", shards)
    assert status == 2 and err.count("\n") == 1 and f"{shards} cannot be read (Input/output error)" in err


def test_info_draws_the_lengths(data, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert data("info", shards, "--png", tmp_path / "lengths.png")[0] == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = data("info", shards, "--png", tmp_path / "lengths.nonsense")
    assert status == 2 and err.count("\n") == 1 and "lengths.nonsense cannot be written" in err


def test_info_stops_when_nobody_reads_on(shards: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    info = subprocess.run(
        [sys.executable, "-m", "data_prep", "info", shards], stdout=writer, stderr=subprocess.PIPE, cwd=REPOSITORY
    )
    os.close(writer)
    assert (info.returncode, info.stderr) == (141, b"")  # as of a program that SIGPIPE ended
