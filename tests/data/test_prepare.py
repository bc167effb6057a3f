"""`monet-data`: sources, shards, restart, what is refused."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import data_prep.documents
import data_prep.encode
import data_prep.ids
import data_prep.shard_writer
import data_prep.shards
from data_prep.__main__ import main
from data_prep.encode import Encoded
from data_prep.recipe import LABELS, load_recipe
from data_prep.shard_writer import ShardWriter
from data_prep.tokenizers import SentencePieceTokenizer, Tokenizer, load_tokenizer
from data_prep.verify import verify
from monet_train.data.index_file import read_index, token_dtype
from monet_train.data.manifest import Manifest, Position
from monet_train.data.megatron import DType, IndexedDataset, IndexedDatasetBuilder
from monet_train.errors import UserError
from tests.data import kill
from tests.data.conftest import REPOSITORY, text_of

CORPORA = REPOSITORY.parent / "shared" / "corpora"


def command(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run ``monet-data`` in this process; the exit status."""
    monkeypatch.setattr(sys, "argv", ["monet-data", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``data(arguments...)`` -> exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = command(*arguments, monkeypatch=monkeypatch)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def documents_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The decoded documents, with a check that each ends with the end-of-text token once."""
    texts = []
    for record in Manifest.read(folder).shards:
        shard = IndexedDataset(str(folder / record.name))
        for i in range(len(shard)):
            tokens = shard[i].tolist()
            assert tokens[-1] == tokenizer.record.eos_id and tokens.count(tokenizer.record.eos_id) == 1
            texts.append(tokenizer.decode(tokens[:-1]))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_the_documents_in_order(shards: Path, tokenizer: Tokenizer) -> None:
    assert documents_of(shards, tokenizer) == [text_of(i) for i in range(300)]
    manifest, problems = verify(shards)
    assert problems == [] and manifest.documents == 300 and len(manifest.shards) > 3
    assert manifest.text_bytes == sum(len(text_of(i).encode()) for i in range(300))
    assert all(record.tokens >= 4000 for record in manifest.shards[:-1])


@pytest.mark.parametrize("vocabulary", [400, 70_000])
def test_shards_are_what_megatrons_builder_writes(vocabulary: int, tmp_path: Path) -> None:
    """Byte for byte, and the choice of the dtype too."""
    random = np.random.default_rng(0)
    texts = [random.integers(0, vocabulary, random.integers(1, 50)).astype(np.int32) for _ in range(30)]
    dtype = token_dtype(vocabulary)
    assert dtype is DType.optimal_dtype(vocabulary)
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=dtype)
    for tokens in texts:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    writer = ShardWriter(tmp_path, "ours", dtype, Position(0, 0, 0))
    for group in (texts[:10], texts[10:]):  # two chunks, of which the last is cut
        unlabelled: list[str | None] = [None] * len(group)
        lengths = np.array([len(tokens) for tokens in group], dtype=np.int32)
        encoded = Encoded(
            np.concatenate(group), lengths, lengths.astype(np.int64), [unlabelled] * len(LABELS), unlabelled, [], {}
        )
        writer.add(encoded, 0, len(group) // 2, Position(0, 0, len(group) // 2))
        writer.add(encoded, len(group) // 2, len(group), Position(0, 1, 0))
    writer.finish()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"megatron.{suffix}").read_bytes()
    index, reference = read_index(tmp_path / "ours"), IndexedDataset(str(tmp_path / "ours"))
    assert np.array_equal(index.lengths, reference.sequence_lengths)
    assert np.array_equal(index.borders, reference.document_indices)
    assert np.array_equal(index.pointers, reference.index.sequence_pointers)


def test_preparing_does_not_import_torch() -> None:
    """Its import, and Megatron's, take longer than to tokenize a hundred megabytes."""
    program = (
        "import sys, data_prep.__main__, data_prep.shards, data_prep.verify, data_prep.info\n"
        "sys.exit(bool({'torch', 'megatron', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


def test_labels_lie_beside_the_shards(shards: Path) -> None:
    manifest = Manifest.read(shards)
    rows = [
        row
        for record in manifest.shards
        for row in pyarrow.parquet.read_table(shards / f"{record.name}.labels.parquet").to_pylist()
    ]
    assert [row["lang"] for row in rows] == [("en", "ru")[i % 2] for i in range(300)]
    assert {(row["domain"], row["source"]) for row in rows} == {(None, "made up")}
    assert [row["bytes"] for row in rows] == [len(text_of(i).encode()) for i in range(300)]
    assert sum(record.labels["lang"]["ru"][0] for record in manifest.shards) == 150


def test_the_number_of_workers_does_not_change_a_byte(
    prepare: Callable[..., Path], shards: Path, tmp_path: Path
) -> None:
    assert contents(prepare(tmp_path / "three", workers=3)) == contents(shards)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.xz", "jsonl.zst", "parquet", "parquet.zst", "txt"])
def test_formats_give_the_same_documents(
    kind: str, prepare: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = [text_of(i) for i in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    file = tmp_path / f"corpus.{kind}"
    options = {}
    if kind == "jsonl.gz":
        file.write_bytes(gzip.compress(lines[:1000]) + gzip.compress(lines[1000:]))  # members, as cat makes them
    elif kind == "jsonl.xz":
        file.write_bytes(lzma.compress(lines))
    elif kind == "jsonl.zst":
        file.write_bytes(
            pyarrow.compress(lines[:1000], "zstd", asbytes=True) + pyarrow.compress(lines[1000:], "zstd", asbytes=True)
        )
    elif kind == "txt":
        texts = [text.split("\n")[0] for text in texts]
        file.write_text("\n".join(texts), encoding="utf-8")
        options = {"txt": "line"}
    else:
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": range(40)}), sink, row_group_size=7)
        raw = sink.getvalue()
        file.write_bytes(pyarrow.compress(raw, "zstd", asbytes=True) if kind.endswith("zst") else raw)
    assert documents_of(prepare(tmp_path / "out", [str(file)], **options), tokenizer) == texts


def test_a_folder_of_source_code(prepare: Callable[..., Path], tmp_path: Path) -> None:
    code = tmp_path / "project"
    (code / "src").mkdir(parents=True)
    (code / ".git").mkdir()
    (code / "src" / "a.py").write_text("x = 1\n")
    (code / "b.rs").write_text("fn main() {}\n")
    (code / ".git" / "c.py").write_text("hidden = True\n")
    (code / "picture.png").write_bytes(b"\x89PNG")
    manifest = Manifest.read(prepare(tmp_path / "out", [str(code)]))
    (record,) = manifest.shards
    assert {value: counts[0] for value, counts in record.labels["lang"].items()} == {"python": 1, "rust": 1}
    assert list(record.labels["source"]) == ["project"]


def test_the_installed_python_is_a_corpus(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    arguments = ("shards", "python", "--max-bytes", "300k", "--tokenizer", tokenizer.path, "--workers", 1)
    assert data(*arguments, "--out", tmp_path / "a")[0] == 0
    assert data(*arguments, "--out", tmp_path / "b")[0] == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    manifest = Manifest.read(tmp_path / "a")
    assert 200_000 < manifest.text_bytes <= 300_000
    assert "python-stdlib" in manifest.shards[0].labels["source"]
    assert b"def " in " ".join(documents_of(tmp_path / "a", tokenizer)).encode()


def test_filters_leave_documents_out_and_count_them(prepare: Callable[..., Path], tmp_path: Path) -> None:
    manifest = Manifest.read(prepare(tmp_path / "out", where={"lang": ["ru"]}, min_chars=100))
    assert list(manifest.shards[0].labels["lang"]) == ["ru"]
    assert manifest.filtered["lang"] == 150
    assert manifest.documents + sum(manifest.filtered.values()) == 300 and manifest.filtered["length"] > 0


def test_bad_documents_are_reported_with_file_and_line(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    good = json.dumps({"text": "good"}).encode()
    bad = {
        2: (b"{not json", "not JSON"),
        3: (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
        4: (b'{"text": ""}', "empty"),
        5: (b'{"text": 3}', "the text is a int"),
        6: (b'{"title": "x"}', "no field 'text'"),
        7: (b"[1, 2]", "a record is a list, not an object"),
        8: (b'{"text": "\\ud800"}', "invalid UTF-8"),
        9: (b'"only a string"', "a record is a str, not an object"),
    }
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(b"\n".join(bad.get(n, (good,))[0] for n in range(1, 31)) + b"\n\n")
    arguments = ("shards", file, "--tokenizer", tokenizer.path, "--out", tmp_path / "out", "--workers", 1)
    status, _, err = data(*arguments)
    assert status == 2 and "8 of 30 documents are bad" in err and "--max-bad-share" in err
    status, out, _ = data(*arguments, "--max-bad-share", 0.5)
    assert status == 0 and "8 bad documents" in out
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {r["line"]: r["reason"] for r in rejects} == {n: reason for n, (_, reason) in bad.items()}
    assert {r["file"] for r in rejects} == {str(file)}
    assert Manifest.read(tmp_path / "out").documents == 22


def test_killed_at_any_moment_it_ends_with_the_same_bytes(jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Also the rejects file and its counts: every 13th line is bad."""
    lines = [line for name in ("part-0", "part-1") for line in (jsonl / f"{name}.jsonl").read_text().splitlines()]
    source = tmp_path / "mixed.jsonl"
    source.write_text("".join(f"{line}\n" + "{bad\n" * (i % 13 == 0) for i, line in enumerate(lines)))
    options = ["shards", str(source), "--tokenizer", str(tokenizer.path), "--workers", "1",
               "--tokens-per-shard", "4000", "--max-bad-share", "0.5", "--out"]  # fmt: skip

    def run(at: int, out: Path) -> int:
        """Status of a forked process that kills itself at the n-th fsync of a shard's file: no timing decides.

        Small chunks, so that shards end within them and between them.
        """
        child = os.fork()
        if child == 0:
            inner, count = data_prep.shard_writer.sync, itertools.count(1)

            def sync(path: Path) -> None:
                if next(count) == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                inner(path)

            data_prep.shard_writer.sync = sync
            data_prep.documents.CHUNK_BYTES = 5000
            sys.argv = ["monet-data", *options, str(out)]
            try:
                main()
            except BaseException:
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    out, whole = tmp_path / "killed", tmp_path / "whole"
    assert run(0, whole) == 0
    for at in (1, 6, 8, 7, 9):
        assert run(at, out) == -signal.SIGKILL
        assert not (out / "manifest.json").exists()
    left = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.bin")}
    assert len(left) >= 2
    assert run(0, out) == 0
    assert contents(out) == contents(whole)
    assert (out / "shard-00000.bin").stat().st_mtime_ns == left["shard-00000.bin"], "finished shards stay"
    assert Manifest.read(out).rejected == {"not JSON": 24}
    assert len((out / "rejects.jsonl").read_text().splitlines()) == 24


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


def test_the_same_command_again_does_nothing_another_is_refused(
    data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path / "out", "--workers", 1)
    assert data(*arguments)[0] == 0
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "out").iterdir()}
    assert data(*arguments)[0] == 0
    status, _, err = data(*arguments, "--min-chars", 100)
    assert status == 2 and "belongs to another corpus (differs in: sources)" in err
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "out").iterdir()} == before


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


def test_info_shows_counts_labels_lengths_and_samples(data, shards: Path) -> None:
    status, out, _ = data("info", shards, "--samples", 10)
    assert status == 0
    assert "documents    300" in out and " ru " in out and "####" in out
    assert out.count("\n  document ") == 10 and repr(text_of(0)[:40])[1:-1] in out


def test_info_draws_the_lengths(data, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert data("info", shards, "--png", tmp_path / "lengths.png")[0] == 0
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = data("info", shards, "--png", tmp_path / "lengths.nonsense")
    assert status == 2 and err.count("\n") == 1 and "lengths.nonsense cannot be written" in err


def test_two_runs_do_not_write_into_one_folder(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time, pathlib; from data_prep.journal import exclusive\n"
         "with exclusive(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)", str(tmp_path / "out")],
        stdout=subprocess.PIPE, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        status, _, err = data("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path / "out")
        assert status == 2 and "being written by another run" in err
    finally:
        holder.kill()
        holder.wait()


def bad_inputs(folder: Path, jsonl: Path, model: Path) -> dict[str, tuple[list[object], str]]:
    """Arguments and the words of the one line that answers them."""
    lines = (jsonl / "part-0.jsonl").read_bytes()
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    (folder / "cut.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True)[:-100])
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "notes.docx").write_bytes(b"?")
    (folder / "recipe.yaml").write_text("sources: [{source: x.jsonl, min_char: 3}]")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("precious")
    (folder / "bad.model").write_text("no model")
    shards = ["--tokenizer", model, "--out", folder / "out", "--workers", 1]
    good = jsonl / "*.jsonl"
    return {
        "misspelt command": (["shard"], "no command 'shard': did you mean shards?"),
        "misspelt option": (["shards", "x", *shards, "--min-charz", "3"], "did you mean --min-chars?"),
        "no source": (["shards", folder / "nothing*.jsonl", *shards], "matches no file"),
        "no format": (["shards", folder / "notes.docx", *shards], "no known format"),
        "empty corpus": (["shards", folder / "empty.jsonl", *shards], "hold no document"),
        "gzip cut short": (["shards", folder / "cut.jsonl.gz", *shards], "cut.jsonl.gz cannot be read (cut short"),
        "zstd cut short": (["shards", folder / "cut.jsonl.zst", *shards], "cut.jsonl.zst cannot be read (cut short"),
        "wrong field": (["shards", good, *shards, "--text-field", "body"], "no field 'body'"),
        "bad recipe": (
            ["shards", folder / "recipe.yaml", *shards], "'min_char': did you mean min_chars?"),
        "someone's folder": (
            ["shards", good, *shards, "--out", folder / "full"], "full is not empty"),
        "no tokenizer": (["shards", good, "--tokenizer", folder / "no", *shards[2:]], "does not exist"),
        "bad tokenizer": (["shards", good, "--tokenizer", folder / "bad.model", *shards[2:]], "is no Sent"),
        "vocabulary too large": (
            ["tokenizer", jsonl / "*.jsonl", "--vocab-size", 50000, "--out", folder / "t"], "Vocabulary size too high"),
        "bad number": (["tokenizer", "x", "--vocab-size", "many", "--out", folder / "t"], "'many' is no number"),
        "verify nothing": (["verify", folder / "nowhere"], "manifest.json is missing"),
        "info nothing": (["info", folder / "nowhere"], "manifest.json is missing"),
    }  # fmt: skip


@pytest.mark.parametrize("case", [
    "misspelt command", "misspelt option", "no source", "no format", "empty corpus", "gzip cut short",
    "zstd cut short", "wrong field", "bad recipe", "someone's folder", "no tokenizer", "bad tokenizer",
    "vocabulary too large", "bad number", "verify nothing", "info nothing",
])  # fmt: skip
def test_bad_input_is_one_line(case: str, data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    arguments, words = bad_inputs(tmp_path, jsonl, tokenizer.path)[case]
    before = contents(tmp_path / "full")
    status, _, err = data(*arguments)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert contents(tmp_path / "full") == before
    assert not list(tmp_path.glob("out/*.bin")) and not list(tmp_path.glob("out/.shard*"))


def test_tasks_and_merge_give_the_documents_in_order(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--tokens-per-shard", 4000, "--workers", 1)
    assert data(*source, "--out", out, "--task", 2, "--tasks", 3)[0] == 0
    journal, writing = out / "progress-0002.jsonl", out / ".shard-0002-00009.bin.tmp"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-9])  # task 2 is at this moment writing a line, and a shard
    writing.touch()
    assert data(*source, "--out", out, "--task", 0, "--tasks", 3)[0] == 0
    assert journal.read_bytes() == whole[:-9] and writing.exists(), "tasks leave each other alone"
    journal.write_bytes(whole)
    writing.unlink()
    status, _, err = data("merge", out)
    assert status == 2 and "1 of 3 tasks are not finished (first: 1)" in err and not (out / "manifest.json").exists()
    assert "belongs to another corpus" in data(*source, "--out", out, "--task", 1, "--tasks", 3, "--min-chars", 9)[2]
    assert data(*source, "--out", out, "--task", 1, "--tasks", 3)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard*")}
    assert data("merge", out)[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("shard*")} == before
    assert documents_of(out, tokenizer) == [text_of(i) for i in range(300)]
    assert verify(out)[1] == [] and not list(out.glob("progress*"))
    lost = sorted(out.glob("shard-*-00001.bin"))[0]
    content = lost.read_bytes()
    lost.unlink()
    for task in range(3):
        assert data(*source, "--out", out, "--task", task, "--tasks", 3)[0] == 0
    assert lost.read_bytes() == content
    assert "give 0 to 2" in data(*source, "--out", out, "--task", 3, "--tasks", 3)[2]


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    data, jsonl: Path, shards: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        out = disk / "out"
        arguments = (
            "shards",
            jsonl / "*.jsonl",
            "--tokenizer",
            tokenizer.path,
            "--out",
            out,
            "--tokens-per-shard",
            4000,
        )
        status, _, err = data(*arguments, "--workers", 1)
        assert status == 2 and err.count("\n") == 1 and "cannot be written (No space left on device)" in err
        names = {path.name for path in out.iterdir()}
        assert "manifest.json" not in names and not [name for name in names if name.endswith(".tmp")]
        for path in out.glob("shard-*.bin"):
            assert path.read_bytes() == (shards / path.name).read_bytes(), "what has a final name is whole"
        subprocess.run(["mount", "-o", "remount,size=10M", disk], check=True)
        assert data(*arguments, "--workers", 1)[0] == 0
        assert contents(out) == contents(shards)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_source_that_vanishes_is_named_and_the_run_goes_on_later(
    data, jsonl: Path, shards: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = shutil.copytree(jsonl, tmp_path / "sources")
    arguments = ("shards", sources / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path / "out",
                 "--tokens-per-shard", 4000, "--workers", 1)  # fmt: skip
    listed = data_prep.shards.list_parts

    def vanish_after_listing(recipe):
        parts = listed(recipe)
        (sources / "part-1.jsonl").rename(tmp_path / "away.jsonl")
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(data_prep.shards, "list_parts", vanish_after_listing)
        status, _, err = data(*arguments)
    assert status == 2 and err.count("\n") == 1 and "part-1.jsonl cannot be read (No such file" in err
    (tmp_path / "away.jsonl").rename(sources / "part-1.jsonl")
    assert data(*arguments)[0] == 0
    assert contents(tmp_path / "out") == contents(shards)


def test_a_changed_source_does_not_continue_another_corpus(
    data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sources = shutil.copytree(jsonl, tmp_path / "sources")
    arguments = (
        "shards",
        sources / "*.jsonl",
        "--tokenizer",
        tokenizer.path,
        "--out",
        tmp_path / "out",
        "--workers",
        1,
    )
    assert data(*arguments)[0] == 0
    with (sources / "part-0.jsonl").open("a") as stream:
        stream.write('{"text": "one more"}\n')
    status, _, err = data(*arguments)
    assert status == 2 and "differs in: files" in err


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_document_id_that_stands_twice_is_refused(
    tasks: int, data, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_prep.ids, "AT_ONCE", 50)  # several passes
    plain = tmp_path / "plain.txt"
    plain.write_text("a text without a name")

    def write(last: int) -> None:
        for part, names in enumerate(([*range(150)], [*range(150, 299), last])):
            lines = [json.dumps({"text": text_of(i), "key": f"d{name}"}) + "\n" for i, name in enumerate(names)]
            (tmp_path / f"part-{part}.jsonl").write_text("".join(lines))

    def run(out: Path) -> tuple[int, str, str]:
        arguments = ("shards", tmp_path / "part-*.jsonl", plain, "--id-field", "key", "--tokenizer", tokenizer.path,
                     "--tokens-per-shard", 4000, "--workers", 1, "--out", out)  # fmt: skip
        if tasks == 1:
            return data(*arguments)
        assert all(data(*arguments, "--task", task, "--tasks", tasks)[0] == 0 for task in range(tasks))
        return data("merge", out)

    write(299)
    assert run(tmp_path / "good")[0] == 0 and verify(tmp_path / "good")[1] == []
    assert Manifest.read(tmp_path / "good").documents == 301
    write(5)
    for _ in range(2):  # the same command again does not let it pass
        status, _, err = run(tmp_path / "bad")
        assert status == 2 and err.count("\n") == 1 and not (tmp_path / "bad" / "manifest.json").exists()
        assert "document id 'd5' stands twice, in shard-" in err and "document 5 and shard-" in err


def test_a_document_without_the_id_is_bad(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path, "--workers", 1)
    assert "no field 'key'" in data(*arguments, "--id-field", "key")[2]


def test_a_killed_worker_is_one_line(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(data_prep.encode, "_work", kill.kill_self)
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path / "out", "--workers", 2)
    status, _, err = data(*arguments)
    assert status == 2 and err.count("\n") == 1 and "a worker process was killed (out of memory?)" in err
    assert not list((tmp_path / "out").glob("shard*"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(how: int, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "long.jsonl"
    source.write_text((jsonl / "part-0.jsonl").read_text() * 1000)
    parent = subprocess.Popen(
        [sys.executable, "-m", "data_prep", "shards", source, "--tokenizer", tokenizer.path, "--out", tmp_path / "out",
         "--workers", "2"], stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True,
    )  # fmt: skip
    try:
        assert wait_for(lambda: len(worker_ids(parent.pid)) == 2 and list((tmp_path / "out").glob(".shard*")))
        workers = list(worker_ids(parent.pid))
        os.killpg(parent.pid, how) if how == signal.SIGINT else parent.kill()
        _, err = parent.communicate(timeout=60)
        assert wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    finally:
        parent.kill()
    if how == signal.SIGINT:
        assert parent.returncode == 130 and err.strip() == "interrupted"
        assert not list((tmp_path / "out").glob("*shard*"))


def worker_ids(parent: int) -> list[str]:
    """Process ids of a process's workers (its other child tracks resources)."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    found = children.read_text().split() if children.exists() else []
    return [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())


def test_object_storage_is_read_and_not_written(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for path in jsonl.glob("*.jsonl"):
        store.pipe(f"/bucket/{path.name}.gz", gzip.compress(path.read_bytes()))
    arguments = ("shards", "memory://bucket/*.jsonl.gz", "--tokenizer", tokenizer.path, "--workers", 1, "--out")
    assert data(*arguments, tmp_path / "out")[0] == 0
    assert documents_of(tmp_path / "out", tokenizer) == [text_of(i) for i in range(300)]
    status, _, err = data(*arguments, "memory://bucket/out")
    assert status == 2 and "memory://bucket/out is not on a file system" in err and err.count("\n") == 1
    assert not (Path.cwd() / "memory:").exists()
    assert "cannot be listed" in data("shards", "nosuch://bucket/x.jsonl", *arguments[2:], tmp_path / "o")[2]


def test_an_enormous_line_costs_one_document(
    prepare: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(data_prep.documents, "ENORMOUS_BYTES", 1 << 20)
    monkeypatch.setattr(data_prep.documents, "CHUNK_BYTES", 1 << 16)
    lines = [json.dumps({"text": text}) for text in [text_of(n) for n in range(300)]]
    lines.insert(100, json.dumps({"text": "x" * (5 << 20)}))
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    out = prepare(tmp_path / "out", [str(tmp_path / "c.jsonl")])
    assert documents_of(out, tokenizer) == [text_of(i) for i in range(300)]
    assert json.loads((out / "rejects.jsonl").read_text()) == {
        "file": str(tmp_path / "c.jsonl"), "line": 101, "reason": "enormous"
    }  # fmt: skip
    assert Manifest.read(out).rejected == {"enormous": 1}


def test_a_hub_dataset_is_streamed(
    prepare: Callable[..., Path], tokenizer: Tokenizer, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's reader over local files: the same streaming classes, without a network."""
    import datasets

    real = datasets.load_dataset
    calls = []

    def local(name: str, config: str | None, **options: object) -> object:
        calls.append((name, config, options["split"]))
        return real("json", data_files=str(jsonl / "*.jsonl"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    out = prepare(tmp_path / "out", ["hf:owner/name:sample"])
    assert sorted(documents_of(out, tokenizer)) == sorted(text_of(i) for i in range(300))
    assert set(calls) == {("owner/name", "sample", "train")}
    assert Manifest.read(out).shards[0].labels["lang"].keys() == {"en", "ru"}


def test_a_trained_tokenizer_brings_text_back(tokenizer: Tokenizer, jsonl: Path, data, tmp_path: Path) -> None:
    record = tokenizer.record
    assert (record.vocabulary_size, record.unk_id, record.bos_id, record.eos_id) == (400, 0, 1, 2)
    for text in ("  two  spaces\n\n\ttab", "🦔 unseen ∮ characters", " leading", "trailing \n"):
        (ids,) = tokenizer.encode([text])
        assert tokenizer.decode(ids) == text and record.unk_id not in ids
    report = json.loads((tokenizer.path.parent / "report.json").read_text())
    (row,) = report["sources"].values()
    assert row["documents"] == 300 and row["round_trip_failures"] == 0 and row["unknown_rate"] == 0
    assert 1.5 < row["bytes_per_token"] < 10
    again = ["tokenizer", jsonl / "*.jsonl", "--vocab-size"]
    assert data(*again, 410, "--out", tokenizer.path.parent)[2].startswith("error: ")


def test_the_fast_encoder_gives_the_ids_of_sentencepiece(tokenizer: Tokenizer) -> None:
    pytest.importorskip("kitoken")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    odd = [
        "",
        "</s>",
        "a<s>b",
        "<0x0A>",
        "\0",
        "  \n\n\t",
        "▁▁",
        "e\u0301",
        "\ufeffx",
        "🦔" * 30,
        " " * 500,
        "0123456789",
    ]
    texts = [text_of(i) for i in range(300)] + odd + [a + b for a in odd for b in odd]
    assert tokenizer._fast is not None, "BPE with byte fallback is encoded fast"
    assert tokenizer.encode(texts) == tokenizer.encode_plainly(texts)


def test_an_encoder_that_differs_is_refused(jsonl: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def encode(self, text: str) -> list[int]:
            return [5]

    monkeypatch.setattr(tokenizer, "_fast", Wrong())
    with pytest.raises(UserError, match=r"kitoken encodes .* differently"):
        tokenizer.encode(["some text"])


def test_a_unigram_model_is_encoded_by_sentencepiece(jsonl: Path, data, tmp_path: Path) -> None:
    source = (jsonl / "*.jsonl", "--vocab-size", 316, "--model-type", "unigram", "--out", tmp_path)
    assert data("tokenizer", *source)[0] == 0
    unigram = load_tokenizer(tmp_path)
    assert isinstance(unigram, SentencePieceTokenizer) and unigram._fast is None
    assert unigram.decode(unigram.encode([text_of(2)])[0]) == text_of(2)


def test_a_tokenizer_of_an_installed_package() -> None:
    pytest.importorskip("mistral_common", reason="needs the extra [bench]")
    assert load_tokenizer(Path("mistral_common:data/tokenizer.model.v1")).record.vocabulary_size == 32000
    with pytest.raises(UserError, match="no installed package 'nowhere'"):
        load_tokenizer(Path("nowhere:model"))


def test_a_hugging_face_tokenizer_serves_too(jsonl: Path, prepare, tmp_path: Path) -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([text_of(i) for i in range(50)], trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.record.eos_id == 0 and tokenizer.record.kind == "huggingface"
    (ids,) = tokenizer.encode([text_of(3)])
    assert tokenizer.decode(ids) == text_of(3)


@pytest.mark.skipif(not CORPORA.is_dir(), reason="../shared/corpora is not there")
def test_real_corpora_with_labels(data, tmp_path: Path) -> None:
    source = str(CORPORA / "wiki_*.jsonl.zst")
    assert data("tokenizer", source, "--sample-bytes", "1M", "--vocab-size", 2000, "--out", tmp_path / "t")[0] == 0
    arguments = ("shards", source, "--where", "lang=es,fr", "--max-documents", 500, "--tokenizer", tmp_path / "t")
    assert data(*arguments, "--out", tmp_path / "out", "--workers", 1)[0] == 0
    manifest, problems = verify(tmp_path / "out")
    assert problems == [] and manifest.documents == 500
    assert set(manifest.shards[0].labels["lang"]) <= {"es", "fr"} and len(manifest.shards[0].labels["domain"]) > 3
    assert np.dtype(manifest.dtype) == np.uint16
    assert load_recipe(REPOSITORY / "conf/data_prep/labelled_jsonl.yaml").sources[0].fields.keys() == set(LABELS)
