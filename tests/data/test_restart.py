"""Stopped, killed, out of disk, out of sources: finished work stays whole, and the same command resumes."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep.encode
import data_prep.shard_writer
import data_prep.shards
from data_prep.journal import exclusive
from data_prep.pipeline import ShardOptions
from data_prep.recipe import Source, recipe_from
from data_prep.sources import FileEntry, _group
from data_prep.verify import verify
from monet_train.data.labels import document_labels
from monet_train.data.manifest import Manifest
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer
from tests.data.conftest import killed_at_sync
from tests.support import REPOSITORY
from tests.support.corpora import text_of
from tests.support.files import contents


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    jsonl: Path, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    """The rejects file and its counts are compared too: every 13th line is bad."""
    lines = [line for name in ("part-0", "part-1") for line in (jsonl / f"{name}.jsonl").read_text().splitlines()]
    source = tmp_path / "mixed.jsonl"
    source.write_text("".join(f"{line}\n" + "{bad\n" * (i % 13 == 0) for i, line in enumerate(lines)))

    def run(at: int, out: Path) -> int:
        """Small chunks, so that shards end within them and between them."""
        return killed_at_sync(at, lambda: prepare(out, [str(source)], max_bad_share=0.5, chunk_bytes=5000))

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
        status, _, err = data("tokenizer", jsonl / "*.jsonl", "--vocab-size", 400, "--out", tmp_path / "out")
        assert status == 2 and "being written by another run" in err
    finally:
        holder.kill()
        holder.wait()


def test_tasks_that_end_at_the_same_moment_do_not_disturb_each_other(
    data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task 1 runs from start to end while task 0 has its copy of the tokenizer under a temporary name."""
    fsync, nested = os.fsync, []

    def run(task: int) -> int:
        return data("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path / "out",
                    "--workers", 1, "--task", task, "--tasks", 2)[0]  # fmt: skip

    def interrupted(descriptor: int) -> None:
        fsync(descriptor)
        if not nested and Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith(".tokenizer.model"):
            nested.append(None)
            nested[0] = run(1)

    monkeypatch.setattr(os, "fsync", interrupted)
    assert run(0) == 0 and nested == [0]
    assert data("merge", tmp_path / "out")[0] == 0 and data("verify", tmp_path / "out")[0] == 0


def test_a_disk_that_is_full_from_the_start_leaves_nothing_in_the_way(
    data, jsonl: Path, shards: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path / "out",
                 "--workers", 1, "--tokens-per-shard", 4000)  # fmt: skip

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as first_time:
        first_time.setattr(os, "fsync", full)
        assert "No space left" in data(*arguments)[2]
    assert data(*arguments)[0] == 0 and contents(tmp_path / "out") == contents(shards)


def test_where_no_document_was_left_another_attempt_is_free(
    data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = tmp_path / "corpus.jsonl"
    source.write_text("{bad\n" + (jsonl / "part-0.jsonl").read_text())
    arguments = ("shards", source, "--tokenizer", tokenizer.path, "--out", tmp_path / "out", "--workers", 1)
    status, _, err = data(*arguments, "--min-chars", 100_000, "--max-bad-share", 0.5)
    assert status == 2 and "hold no document" in err
    assert data(*arguments)[0] == 0


def test_a_journal_that_outlived_its_run_goes(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Killed between the manifest and the journal's removal."""
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path, "--workers", 1)
    assert data(*arguments)[0] == 0
    before = contents(tmp_path)
    (tmp_path / "progress.jsonl").write_text("{}\n")
    assert data(*arguments)[0] == 0 and contents(tmp_path) == before


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

    def vanish_after_listing(recipe, outside):
        parts = listed(recipe, outside)
        (sources / "part-1.jsonl").rename(tmp_path / "away.jsonl")
        return parts

    with monkeypatch.context() as patch:
        patch.setattr(data_prep.shards, "list_parts", vanish_after_listing)
        status, _, err = data(*arguments)
    assert status == 2 and err.count("\n") == 1 and "part-1.jsonl cannot be read (No such file" in err
    (tmp_path / "away.jsonl").rename(sources / "part-1.jsonl")
    assert data(*arguments)[0] == 0
    assert contents(tmp_path / "out") == contents(shards)


def test_a_source_cut_short_is_repaired_and_a_shard_that_went_is_made_again(
    data, jsonl: Path, shards: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sources = shutil.copytree(jsonl, tmp_path / "sources")
    second = sources / "part-1.jsonl.gz"
    whole = gzip.compress((sources / "part-1.jsonl").read_bytes())
    (sources / "part-1.jsonl").unlink()
    arguments = ("shards", sources / "*.jsonl*", "--tokenizer", tokenizer.path, "--out", tmp_path / "out",
                 "--tokens-per-shard", 4000, "--workers", 1)  # fmt: skip
    for cut in (0, 10):
        second.write_bytes(whole[:cut])
        status, _, err = data(*arguments)
        assert status == 2 and err.count("\n") == 1 and "part-1.jsonl.gz cannot be read (cut short or damaged" in err
    first = tmp_path / "out" / "shard-00000.bin"
    before = first.read_bytes()
    first.unlink()
    second.write_bytes(whole)
    assert data(*arguments)[0] == 0
    assert first.read_bytes() == before and verify(tmp_path / "out")[1] == []
    assert {name: at for name, at in contents(tmp_path / "out").items() if name.endswith((".bin", ".idx"))} == {
        name: at for name, at in contents(shards).items() if name.endswith((".bin", ".idx"))
    }
    (sources / "part-0.jsonl").write_text('{"text": "another"}\n')  # of which there are shards
    (tmp_path / "out" / "manifest.json").unlink()
    assert data(*arguments)[0] == 2


def test_files_of_a_folder_that_changed_places_are_another_corpus(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.py").write_text(f"x = {number}\n")
    arguments = ("shards", folder, "--tokenizer", tokenizer.path, "--out", tmp_path / "out", "--workers", 1)
    assert data(*arguments)[0] == 0
    (folder / "2.py").rename(folder / "00.py")
    status, _, err = data(*arguments)
    assert status == 2 and "differs in: files" in err


@pytest.mark.parametrize("name", ["installed python", "{root}"], ids=["installation", "folder"])
def test_the_place_of_files_on_the_machine_does_not_matter(name: str, tmp_path: Path) -> None:
    identities = []
    for place in ("one", "another"):
        file = tmp_path / place / "module.py"
        file.parent.mkdir()
        file.write_text("x = 1\n")
        entry = FileEntry(str(file), ())
        (part,) = _group(Source("python"), name.format(root=file.parent), [entry])
        identities.append(part.identity()[1:])  # behind the folder's name
    assert identities[0] == identities[1]


def test_a_run_of_all_tasks_and_a_task_do_not_share_a_folder(
    data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    whole = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", out, "--workers", 1)
    task = (*whole, "--task", 0, "--tasks", 2)
    recipe = recipe_from([str(jsonl / "*.jsonl")], {}, {})
    with exclusive(out), pytest.raises(UserError, match="being written by another run"):
        data_prep.shards.prepare(recipe, tokenizer, out, ShardOptions(task=0, tasks=2), wait_seconds=0)
    assert data(*task)[0] == 0
    for path in out.glob("shard-*"):  # as if it had only begun
        path.unlink()
    (out / "tokenizer.model").unlink()
    status, _, err = data(*whole)
    assert status == 2 and "is not empty (progress-0000.jsonl)" in err


def test_a_shard_that_went_is_not_merged_over(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", out, "--workers", 1)
    for task in (0, 1):
        assert data(*whole, "--task", task, "--tasks", 2)[0] == 0
    (out / "shard-0001-00000.idx").unlink()
    for _ in range(2):
        status, _, err = data("merge", out)
        assert status == 2 and "has lost shard-0001-00000" in err and "--task 1 --tasks 2" in err
    (out / "tokenizer.model").unlink()
    assert data(*whole, "--task", 1, "--tasks", 2)[0] == 0
    assert data("merge", out)[0] == 0 and verify(out)[1] == []
    assert (out / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()


def test_an_output_folder_may_have_a_colon(
    data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", "s3:out", "--workers", 1)
    assert data(*arguments)[0] == 0 and verify(Path("s3:out"))[1] == []
    assert document_labels(Path("s3:out/shard-00000"), 299)["bytes"] == len(text_of(299).encode())


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


@pytest.mark.parametrize("emptied", [True, False], ids=["nothing left", "another text"])
def test_what_is_there_stays_where_a_shard_comes_out_differently(
    emptied: bool, data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sources, out = shutil.copytree(jsonl, tmp_path / "sources"), tmp_path / "out"
    arguments = ("shards", sources / "*.jsonl", "--tokenizer", tokenizer.path, "--out", out, "--workers", 1,
                 "--tokens-per-shard", 4000)  # fmt: skip
    assert data(*arguments)[0] == 0
    for source in sources.iterdir():  # of the same size
        text = source.read_bytes()
        source.write_bytes(b"\0" * len(text) if emptied else text.replace(b"Document", b"Dokument"))
    (out / "shard-00001.idx").unlink()
    before = contents(out)
    status, _, err = data(*arguments)
    assert status == 2 and err.count("\n") == 1 and "shard-00001.bin came out differently" in err
    assert contents(out) == before


@pytest.mark.parametrize("damage", [b"", b"{bad\n", b"\0\0\n", b"[]\n", b'{"recipe": {}}\n', b'%s{"totals": 5}\n'])
def test_a_damaged_journal_is_one_line(damage: bytes, data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", out, "--workers", 1, "--tasks", 2)
    for task in (0, 1):
        assert data(*arguments, "--task", task)[0] == 0
    journal = out / "progress-0001.jsonl"
    first = journal.read_bytes().splitlines(keepends=True)[0]
    journal.write_bytes(damage.replace(b"%s", first))
    for again in (("merge", out), (*arguments, "--task", 1)):
        status, _, err = data(*again)
        assert status == 2 and err.count("\n") == 1 and "progress-0001.jsonl cannot be read (" in err
        assert "delete it and run `monet-data shards ... --task 1`" in err
    journal.unlink()
    assert data(*arguments, "--task", 1)[0] == 0
    assert data("merge", out)[0] == 0 and verify(out)[1] == []


def test_damaged_labels_are_named_before_the_merge_and_the_shard_is_made_again(
    data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source, out = tmp_path / "source.jsonl", tmp_path / "out"
    source.write_text("".join(json.dumps({"text": text_of(i), "id": f"id {i}"}) + "\n" for i in range(50)))
    arguments = ("shards", source, jsonl / "part-0.jsonl", "--tokenizer", tokenizer.path, "--out", out, "--workers", 1,
                 "--id-field", "id", "--max-bad-share", 1, "--tasks", 2)  # fmt: skip
    for task in (0, 1):
        assert data(*arguments, "--task", task)[0] == 0
    labels = min(out.glob("*.labels.parquet"))
    labels.write_bytes(b"\0" * labels.stat().st_size)
    status, _, err = data("merge", out)
    assert status == 2 and err.count("\n") == 1 and f"{labels} cannot be read (" in err
    for path in out.glob(re.search(r"delete (\S+) and run", err)[1].split("/")[-1]):
        path.unlink()
    assert data(*arguments, "--task", 0)[0] == 0
    assert data("merge", out)[0] == 0 and verify(out)[1] == []


def test_an_unreadable_journal_is_one_line_at_the_merge(
    data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path, "--workers", 1)
    assert data(*arguments, "--task", 0, "--tasks", 2)[0] == 0
    (tmp_path / "progress-0001.jsonl").mkdir()
    status, _, err = data("merge", tmp_path)
    assert status == 2 and err.count("\n") == 1 and "progress-0001.jsonl cannot be read (Is a directory)" in err


def test_the_tasks_are_merged_in_the_order_of_their_numbers(
    data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Which is not that of their names as text, from 10,000 tasks on."""
    for number in range(3):
        shutil.copy(jsonl / "part-0.jsonl", tmp_path / f"{number}.jsonl")
    out = tmp_path / "out"
    arguments = ("shards", tmp_path / "*.jsonl", "--tokenizer", tokenizer.path, "--out", out, "--workers", 1)
    for task in range(3):
        assert data(*arguments, "--task", task, "--tasks", 3)[0] == 0
    (out / "progress-0002.jsonl").rename(out / "progress-00002.jsonl")
    assert data("merge", out)[0] == 0
    assert [shard.start.part for shard in Manifest.read(out).shards] == [0, 1, 2]


def kill_self(*_: object) -> None:
    """What the kernel does to a worker that needs too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(data_prep.encode, "_work", kill_self)
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
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if the tests run in the background
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
    """Process ids of a process's workers."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    return children.read_text().split() if children.exists() else []


def wait_for(condition: Callable[[], object], seconds: float = 60) -> bool:
    """Whether a condition becomes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(condition())
