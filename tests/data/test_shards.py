"""What `monet-data shards` and `merge` write, and what they refuse."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.encode import Column, Encoded
from data_prep.ids import find_duplicates
from data_prep.journal import Journal
from data_prep.recipe import LABELS, Recipe
from data_prep.shard_writer import ShardWriter
from data_prep.verify import verify
from monet_train.data.index_file import read_index, token_dtype
from monet_train.data.manifest import Manifest, Position
from monet_train.data.megatron import DType, IndexedDataset, IndexedDatasetBuilder
from monet_train.data.shards import find_shards
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer
from tests.support import REPOSITORY
from tests.support.corpora import documents_of, text_of
from tests.support.files import contents


def test_shards_hold_the_documents_in_order(shards: Path, tokenizer: Tokenizer) -> None:
    assert documents_of(shards, tokenizer) == [text_of(i) for i in range(300)]
    manifest, problems = verify(shards)
    assert problems == [] and manifest.documents == 300 and len(manifest.shards) > 3
    assert manifest.text_bytes == sum(len(text_of(i).encode()) for i in range(300))
    assert all(record.tokens >= 4000 for record in manifest.shards[:-1])


@pytest.mark.parametrize("vocabulary", [400, 70_000])
def test_shards_are_what_megatrons_builder_writes(vocabulary: int, tmp_path: Path) -> None:
    """Byte for byte, including the choice of the dtype."""
    random = np.random.default_rng(0)
    texts = [random.integers(0, vocabulary, random.integers(1, 50)).astype(np.int32) for _ in range(30)]
    dtype = token_dtype(vocabulary)
    assert dtype is DType.optimal_dtype(vocabulary)
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=dtype)
    for tokens in texts:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "megatron.idx"))
    writer = ShardWriter(tmp_path, "ours", dtype, Position(0, 0, 0), Recipe([]))
    for group in (texts[:10], texts[10:]):  # two chunks, of which the last is cut
        unlabelled: list[str | None] = [None] * len(group)
        lengths = np.array([len(tokens) for tokens in group], dtype=np.int32)
        encoded = Encoded(
            np.concatenate(group),
            lengths,
            lengths.astype(np.int64),
            {name: Column.from_labels(unlabelled) for name in LABELS},
            {},
            unlabelled,
            [],
            {},
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


@pytest.mark.parametrize("command", ["verify", "info"])
def test_who_closes_the_output_gets_no_traceback(command: str, shards: Path) -> None:
    """As with ``| true``: the status is that of SIGPIPE. Any other failure to write is an error."""
    arguments = [sys.executable, "-m", "data_prep", command, str(shards)]
    reader, closed = os.pipe()
    os.close(reader)
    for output, expected in ((closed, (141, "")), (os.open("/dev/full", os.O_WRONLY), (2, "error: standard output"))):
        run = subprocess.run(arguments, stdout=output, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
        os.close(output)
        assert (run.returncode, run.stderr[:22]) == expected and run.stderr.count("\n") <= 1


def test_preparing_does_not_import_torch(jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Importing it and Megatron takes longer than tokenizing a hundred megabytes; importing pandas, than ten."""
    program = (
        "import sys, data_prep.verify, data_prep.info\n"
        "from data_prep.__main__ import main\n"
        "main()\n"
        "sys.exit(bool({'torch', 'megatron', 'datasets', 'transformers', 'pandas'} & set(sys.modules)))"
    )
    arguments = ["shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path / "out"]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    assert subprocess.run(command, cwd=REPOSITORY).returncode == 0


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


@pytest.mark.parametrize("slot_bytes", [1, 500, 4 << 20], ids=["by pipe", "some by pipe", "shared memory"])
def test_the_number_of_workers_does_not_change_a_byte(
    slot_bytes: int, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    """With more chunks than slots, so that each slot serves several; some texts do not fit into a slot."""
    alone = contents(prepare(tmp_path / "one", chunk_bytes=600))
    assert contents(prepare(tmp_path / "three", workers=3, chunk_bytes=600, slot_bytes=slot_bytes)) == alone


def test_tasks_and_merge_give_the_documents_in_order(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--tokens-per-shard", 4000, "--workers", 1)
    assert data(*source, "--out", out, "--task", 2, "--tasks", 3)[0] == 0
    journal, writing = out / "progress-0002.jsonl", out / ".shard-0002-00009.bin.tmp"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-9])  # task 2 is at this moment writing a line, and a shard
    writing.touch()
    assert data(*source, "--out", out, "--task", 0, "--tasks", 3)[0] == 0
    assert data("merge", out)[0] == 2
    assert journal.read_bytes() == whole[:-9] and writing.exists(), "merge and tasks leave a task's files alone"
    with pytest.raises(UserError, match=r"is unfinished.*monet-data merge"):
        find_shards(out)
    journal.write_bytes(whole)
    writing.unlink()
    status, _, err = data("merge", out)
    assert status == 2 and "1 of 3 tasks are not finished (first: 1)" in err and not (out / "manifest.json").exists()
    assert "belongs to another corpus" in data(*source, "--out", out, "--task", 1, "--tasks", 3, "--min-chars", 9)[2]
    assert data(*source, "--out", out, "--task", 1, "--tasks", 3)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard*")}
    recipe, _, *others = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join([recipe, *others]))  # a shard is not recorded
    status, _, err = data("merge", out)
    assert status == 2 and "progress-0002.jsonl does not record every shard" in err
    assert not (out / "manifest.json").exists()
    journal.write_bytes(whole)
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


@pytest.mark.parametrize("tasks", [1, 2])
def test_a_document_id_that_stands_twice_is_refused(tasks: int, data, tokenizer: Tokenizer, tmp_path: Path) -> None:
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
    manifest = Manifest.read(tmp_path / "good")
    assert manifest.documents == 301 and find_duplicates(tmp_path / "good", manifest.shards, at_once=50) is None
    write(5)
    for _ in range(2):  # the same command again does not let it pass
        status, _, err = run(tmp_path / "bad")
        assert status == 2 and err.count("\n") == 1 and not (tmp_path / "bad" / "manifest.json").exists()
        assert "document id 'd5' occurs twice, in shard-" in err and "document 5 and shard-" in err
    journals = [Journal(path) for path in sorted((tmp_path / "bad").glob("progress*.jsonl"))]
    for journal in journals:
        journal.open(None)
    shards = [shard for journal in journals for shard in journal.shards]
    in_passes = find_duplicates(tmp_path / "bad", shards, at_once=50)
    assert in_passes is not None and in_passes == find_duplicates(tmp_path / "bad", shards)
    assert in_passes.id == "d5" and in_passes.repeats == 1


def test_a_document_without_the_id_is_bad(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", tmp_path, "--workers", 1)
    assert "no field 'key'" in data(*arguments, "--id-field", "key")[2]


def write_bad_files(folder: Path, jsonl: Path) -> None:
    """What `bad_inputs` names."""
    lines = (jsonl / "part-0.jsonl").read_bytes()
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-100])
    (folder / "cut.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True)[:-100])
    (folder / "cut.jsonl.xz").write_bytes(lzma.compress(lines)[:-100])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 1000}), folder / "cut.parquet")
    (folder / "cut.parquet").write_bytes((folder / "cut.parquet").read_bytes()[:-100])
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"some text" * 1000)[:-10])
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "hub").mkdir()
    (folder / "hub" / "data.jsonl").write_bytes(b'{"text": "a"}\n' * 300 + b'{"text": "b')
    (folder / "notes.docx").write_bytes(b"?")
    (folder / "recipe.yaml").write_text("sources: [{source: x.jsonl, min_char: 3}]")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("precious")
    (folder / "bad.model").write_text("no model")
    (folder / "gone.jsonl").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.jsonl")
    os.mkfifo(folder / "pipe.yaml")
    (folder / "na\udcefme.jsonl").write_bytes(lines)


def bad_inputs(folder: Path, jsonl: Path, model: Path) -> dict[str, tuple[list[object], str]]:
    """Arguments, and words of the one line that refuses them."""
    shards = ["--tokenizer", model, "--out", folder / "out", "--workers", 1]
    good = jsonl / "*.jsonl"
    return {
        "misspelt command": (["shard"], "no command 'shard': did you mean shards?"),
        "misspelt option": (["shards", "x", *shards, "--min-charz", "3"], "did you mean --min-chars?"),
        "option of another command": (
            ["tokenizer", good, "--id-field", "key", "--vocab-size", 300, "--out", folder / "t"],
            "--id-field is an option of another command"),
        "misspelt choice": (
            ["tokenizer", good, "--model-type", "foo", "--vocab-size", 300, "--out", folder / "t"],
            "error: --model-type 'foo': choose bpe, unigram"),
        "part of a worker": (["shards", good, *shards, "--workers", "1.7"], "--workers: '1.7' is not a number"),
        "very many workers": (["shards", good, *shards, "--workers", "1M"], "--workers: 1M is more than 1024"),
        "empty name of a source": (["shards", "", *shards], "SOURCE: it is empty"),
        "empty name of a folder": (["shards", good, *shards, "--out", ""], "--out: it is empty"),
        "two values of a label": (
            ["shards", good, *shards, "--label", "lang=de", "--label", "lang=fr"], "--label lang=de and lang=fr: "),
        "no source": (["shards", folder / "nothing*.jsonl", *shards], "matches no file"),
        "no format": (["shards", folder / "notes.docx", *shards], "no known format"),
        "empty corpus": (["shards", folder / "empty.jsonl", *shards], "hold no document"),
        "dangling link": (["shards", folder / "g*.jsonl", *shards], "gone.jsonl is a dangling link"),
        "pipe": (["shards", folder / "pipe.jsonl", *shards], "pipe.jsonl is not a regular file"),
        "pipe for a recipe": (["shards", folder / "pipe.yaml", *shards], "pipe.yaml is not a regular file"),
        "name that is not UTF-8": (["shards", folder / "na*me.jsonl", *shards], "is not valid UTF-8: rename it"),
        "label that is not UTF-8": (["shards", good, *shards, "--label", "lang=\udcff"], "is not valid UTF-8"),
        "hub dataset with too many parts": (["shards", "hf:a:b:c:d", *shards], "write hf:NAME"),
        "gzip cut short": (["shards", folder / "cut.jsonl.gz", *shards], "cut.jsonl.gz cannot be read (cut short"),
        "text in a gzip cut short": (["shards", folder / "cut.txt.gz", *shards], "cut.txt.gz cannot be read (cut"),
        "hub dataset cut short": (["shards", f"hf:{folder / 'hub'}", *shards], "cannot be read ("),
        "zstd cut short": (["shards", folder / "cut.jsonl.zst", *shards], "cut.jsonl.zst cannot be read (cut short"),
        "xz cut short": (["shards", folder / "cut.jsonl.xz", *shards], "cut.jsonl.xz cannot be read (cut short"),
        "parquet cut short": (["shards", folder / "cut.parquet", *shards], "cut.parquet cannot be read ("),
        "wrong field": (["shards", good, *shards, "--text-field", "body"], "no field 'body'"),
        "bad recipe": (
            ["shards", folder / "recipe.yaml", *shards], "'min_char': did you mean min_chars?"),
        "someone's folder": (
            ["shards", good, *shards, "--out", folder / "full"], "full is not empty"),
        "no tokenizer": (["shards", good, "--tokenizer", folder / "no", *shards[2:]], "no is not a file"),
        "bad tokenizer": (["shards", good, "--tokenizer", folder / "bad.model", *shards[2:]], "is not a Sent"),
        "vocabulary too large": (
            ["tokenizer", jsonl / "*.jsonl", "--vocab-size", 50000, "--out", folder / "t"], "Vocabulary size too high"),
        "bad share": (["shards", good, *shards, "--max-bad-share", "nan"], "'nan' is not a number from 0 to 1"),
        "bad number": (["tokenizer", "x", "--vocab-size", "many", "--out", folder / "t"], "'many' is not a number"),
        "address of a tokenizer": (
            ["shards", good, "--tokenizer", "s3://b/t.model", *shards[2:]], "s3://b/t.model is not on a file system"),
        "address of a tokenizer to write": (
            ["tokenizer", good, "--vocab-size", 300, "--out", "memory://b/t"], "memory://b/t is not on a file system"),
        "address to merge": (["merge", "memory://b/out"], "memory://b/out is not on a file system"),
        "address to verify": (["verify", "memory://b/out"], "memory://b/out is not on a file system"),
        "address to tell about": (["info", "memory://b/out"], "memory://b/out is not on a file system"),
        "long name of a source": (["shards", folder / ("x" * 300), *shards], "xxx: the name is too long for a file"),
        "long name of a tokenizer": (
            ["shards", good, "--tokenizer", folder / ("x" * 300), *shards[2:]], "xxx: the name is too long for a file"),
        "long name of a folder": (["info", folder / ("x" * 300)], "File name too long"),
        "merge nothing": (["merge", folder / "nowhere"], "nowhere is not a folder"),
        "verify nothing": (["verify", folder / "nowhere"], "manifest.json is missing"),
        "info nothing": (["info", folder / "nowhere"], "manifest.json is missing"),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_inputs(Path(), Path(), Path()))
def test_bad_input_is_one_line(case: str, data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_bad_files(tmp_path, jsonl)
    arguments, words = bad_inputs(tmp_path, jsonl, tokenizer.path)[case]
    before = contents(tmp_path / "full")
    status, _, err = data(*arguments)
    assert status == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert contents(tmp_path / "full") == before
    assert not (tmp_path / "nowhere").exists() and not Path("memory:").exists()
    assert not list(tmp_path.glob("out/*.bin")) and not list(tmp_path.glob("out/.shard*"))
