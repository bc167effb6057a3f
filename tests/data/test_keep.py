"""Further labels (`--keep`): strings and numbers of the records, beside lang, domain and source."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data_prep.bad_documents import BadDocument, checked_number, checked_string
from data_prep.recipe import load_recipe, recipe_from
from data_prep.verify import verify
from monet_train.data.index_file import read_index
from monet_train.data.labels import document_labels, label_columns, read_labels
from monet_train.data.manifest import Manifest, NumberCounts
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer
from tests.data.conftest import killed_at_sync
from tests.support import REPOSITORY
from tests.support.corpora import documents_of, text_of
from tests.support.files import contents

TOXICITY = REPOSITORY.parent / "shared" / "corpora" / "toxicity.jsonl.zst"
KEEP = {"keep": {"topic": "string", "toxicity": "number"}}


def topic_of(i: int) -> str | None:
    return None if i % 5 == 0 else f"topic {i % 3}"


def toxicity_of(i: int) -> float | None:
    return None if i % 7 == 0 else i / 100 - 1


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """300 documents with two more fields: in a parquet file, and in a jsonl file without the fields that are null."""
    folder = tmp_path_factory.mktemp("scored")
    rows: list[dict[str, Any]] = [
        {"text": text_of(i), "lang": "en", "topic": topic_of(i), "toxicity": toxicity_of(i)} for i in range(300)
    ]
    lines = [json.dumps({key: value for key, value in row.items() if value is not None}) for row in rows[:150]]
    (folder / "a.jsonl").write_text("".join(f"{line}\n" for line in lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[150:]), folder / "b.parquet")
    return [str(folder / "a.jsonl"), str(folder / "b.parquet")]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The labels of all documents, in order."""
    return [row for shard in Manifest.read(folder).shards for row in read_labels(folder / shard.name).to_pylist()]


def test_kept_fields_lie_beside_the_shards(scored: list[str], prepare: Callable[..., Path], tmp_path: Path) -> None:
    out = prepare(tmp_path / "out", scored, **KEEP)
    rows = rows_of(out)
    assert [(row["topic"], row["toxicity"]) for row in rows] == [(topic_of(i), toxicity_of(i)) for i in range(300)]
    assert list(rows[0]) == ["lang", "domain", "source", "topic", "toxicity", "bytes"]
    manifest, problems = verify(out)
    assert problems == [] and len(manifest.shards) > 3
    for shard in manifest.shards:
        assert label_columns(out / shard.name) == (("lang", "domain", "source", "topic"), ("toxicity",))
        assert document_labels(out / shard.name, 1)["lang"] == "en"
        assert sum(counts[1] for counts in shard.labels["topic"].values()) == shard.tokens
    assert manifest.label_counts["topic"]["(none)"][0] == 60
    lengths = [length for shard in manifest.shards for length in read_index(out / shard.name).lengths.tolist()]
    tokens = sum(length for i, length in enumerate(lengths) if toxicity_of(i) is not None)
    assert manifest.number_counts["toxicity"] == NumberCounts(257, tokens, toxicity_of(1), toxicity_of(299))


def test_a_kept_field_changes_nothing_of_the_tokens(
    scored: list[str], prepare: Callable[..., Path], tmp_path: Path
) -> None:
    with_, without = prepare(tmp_path / "with", scored, **KEEP), prepare(tmp_path / "without", scored)
    assert Manifest.read(with_).fingerprint == Manifest.read(without).fingerprint


def test_without_it_the_folder_is_as_before(shards: Path) -> None:
    """Folders that were prepared before are resumed and restored: their recipe and their records must stay equal."""
    values = json.loads((shards / "manifest.json").read_text())
    assert list(values["recipe"]["sources"][0]) == [
        "source", "text", "id", "fields", "labels", "where", "min_chars", "max_chars", "txt", "config", "data_dir",
        "split", "revision",
    ]  # fmt: skip
    assert list(values["shards"][0]) == [
        "name", "documents", "tokens", "text_bytes", "start", "end", "files", "labels",
    ]  # fmt: skip
    table = pyarrow.parquet.read_table(shards / "shard-00000.labels.parquet")
    assert table.column_names == ["lang", "domain", "source", "bytes"]
    assert Manifest.read(shards).number_counts == {}


def test_workers_and_the_order_of_names_do_not_change_a_byte(
    scored: list[str], prepare: Callable[..., Path], tmp_path: Path
) -> None:
    alone = contents(prepare(tmp_path / "one", scored, chunk_bytes=600, **KEEP))
    turned = {"keep": dict(reversed(KEEP["keep"].items()))}
    assert contents(prepare(tmp_path / "three", scored, workers=3, chunk_bytes=600, **turned)) == alone


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    scored: list[str], prepare: Callable[..., Path], tmp_path: Path
) -> None:
    def run(at: int, out: Path) -> int:
        return killed_at_sync(at, lambda: prepare(out, scored, chunk_bytes=5000, **KEEP))

    out, whole = tmp_path / "killed", tmp_path / "whole"
    assert run(0, whole) == 0
    for at in (1, 6, 8, 7):
        assert run(at, out) == -signal.SIGKILL and not (out / "manifest.json").exists()
    assert run(0, out) == 0
    assert contents(out) == contents(whole)
    (out / "shard-00001.labels.parquet").unlink()
    prepare(out, scored, chunk_bytes=5000, **KEEP)
    assert contents(out) == contents(whole), "a lost shard is made again"


def test_tasks_and_merge(data, scored: list[str], tokenizer: Tokenizer, prepare, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("shards", *scored, "--tokenizer", tokenizer.path, "--tokens-per-shard", 4000, "--workers", 1,
               "--out", out, "--tasks", 2)  # fmt: skip
    assert data(*command, "--keep", "toxicity:number", "topic", "--task", 1)[0] == 0
    status, _, err = data(*command, "--keep", "topic", "--task", 0)
    assert status == 2 and "belongs to another corpus (differs in: sources)" in err
    assert data(*command, "--keep", "topic:string", "--keep", "toxicity:number", "--task", 0)[0] == 0
    assert data("merge", out)[0] == 0 and data("verify", out)[0] == 0
    assert rows_of(out) == rows_of(prepare(tmp_path / "whole", scored, **KEEP))
    status, shown, _ = data("info", out, "--samples", 0)
    line = next(line.split() for line in shown.splitlines() if line.startswith("    toxicity"))
    assert status == 0 and (line[1], *line[3:]) == ("257", "-0.99", "1.99") and "    topic 1 " in shown


def test_a_source_without_the_label_has_none_of_it(
    scored: list[str], jsonl: Path, prepare: Callable[..., Path], tmp_path: Path
) -> None:
    """All shards have all columns: also those of other sources' documents alone."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"sources: [{{source: {jsonl}/*.jsonl}}, {{source: {scored[0]}, keep: {{toxicity: number}}}}, "
        f"{{source: {scored[1]}, keep: {{topic: string}}}}]"
    )
    out = prepare(tmp_path / "out", [str(recipe)])
    rows = rows_of(out)
    assert [row["topic"] for row in rows] == [None] * 450 + [topic_of(i) for i in range(150, 300)]
    assert [row["toxicity"] for row in rows] == [None] * 300 + [toxicity_of(i) for i in range(150)] + [None] * 150
    manifest, problems = verify(out)
    assert problems == []
    assert manifest.shards[0].numbers == {"toxicity": NumberCounts(0, 0, None, None)}
    assert {label_columns(out / shard.name) for shard in manifest.shards} == {
        (("lang", "domain", "source", "topic"), ("toxicity",))
    }


def test_a_recipe_renames_chooses_and_gives_kept_labels(
    scored: list[str], prepare: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"sources: [{{source: {scored[1]}, keep: {{subject: string, set: string, score: number, language: string}}, "
        "fields: {subject: topic, score: toxicity, language: lang}, labels: {set: second}, "
        "where: {subject: [topic 1]}}]"
    )
    out = prepare(tmp_path / "out", [str(recipe)])
    chosen = [i for i in range(150, 300) if topic_of(i) == "topic 1"]
    rows = rows_of(out)
    assert [row["score"] for row in rows] == [toxicity_of(i) for i in chosen]
    assert {(row["subject"], row["set"], row["language"], row["lang"]) for row in rows} == {
        ("topic 1", "second", "en", None)
    }
    assert Manifest.read(out).filtered == {"subject": 150 - len(chosen)}


def test_kept_fields_of_a_hub_dataset(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    columns = {"text": [text_of(i) for i in range(20)], "score": np.arange(20, dtype=np.float32), "stars": range(20)}
    pyarrow.parquet.write_table(pyarrow.table(columns), hub / "a.parquet")
    out = tmp_path / "out"
    status, _, err = data("shards", f"hf:{hub}", "--keep", "score:number", "stars", "--where", "stars=3,4",
                          "--tokenizer", tokenizer.path, "--out", out, "--workers", 2)  # fmt: skip
    assert (status, err) == (0, "")
    assert [(row["score"], row["stars"]) for row in rows_of(out)] == [(3.0, "3"), (4.0, "4")]
    assert documents_of(out, tokenizer) == [text_of(3), text_of(4)]


@pytest.mark.parametrize(
    ("value", "text", "number"),
    [
        ("x", "x", "s is a str, not a number"),
        ("0.5", "0.5", "s is a str, not a number"),
        ("", "", "s is a str, not a number"),
        (3, "3", 3.0),
        (0.5, "s is a float, not a string: keep it as a number", 0.5),
        (True, "true", 1.0),
        (False, "false", 0.0),
        (math.nan, "s is a float, not a string: keep it as a number", "s is not a finite number"),
        (-math.inf, "s is a float, not a string: keep it as a number", "s is not a finite number"),
        (10**400, str(10**400), "s is not a finite number"),
        ([1], "s is a list, not a string", "s is a list, not a number"),
        ({}, "s is a dict, not a string", "s is a dict, not a number"),
        ("\ud800", "invalid UTF-8", "s is a str, not a number"),
    ],
)
def test_values_of_another_kind_are_bad(value: Any, text: str, number: Any) -> None:
    for check, expected in ((checked_string, text), (checked_number, number)):
        try:
            found: Any = check(value, "s")
        except BadDocument as bad:
            found = str(bad)
        assert found == expected and type(found) is type(expected)


def test_bad_values_cost_their_document(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    values = ["0.5", "null", "NaN", "1e999", '"high"', "true", "[0]", "-2"]
    lines = [f'{{"text": "Text {i}.", "toxicity": {value}}}\n' for i, value in enumerate(values)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    command = ("shards", tmp_path / "a.jsonl", "--keep", "toxicity:number", "--tokenizer", tokenizer.path,
               "--out", tmp_path / "out", "--workers", 1)  # fmt: skip
    status, _, err = data(*command)
    assert status == 2 and "4 of 8 documents are bad (toxicity is not a finite number, toxicity is a str" in err
    assert data(*command, "--max-bad-share", 1)[0] == 0
    assert [row["toxicity"] for row in rows_of(tmp_path / "out")] == [0.5, None, 1.0, -2.0]
    assert Manifest.read(tmp_path / "out").rejected == {
        "toxicity is a list, not a number": 1, "toxicity is a str, not a number": 1,
        "toxicity is not a finite number": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (["bytes"], "keep: the name 'bytes' is taken"),
        (["id"], "keep: the name 'id' is taken"),
        (["text"], "keep: the name 'text' is taken"),
        (["lang:string"], "fields: {NAME: lang}"),
        (["a.b"], "'a.b' is not a name of letters, digits, _ and -"),
        ([""], "'' is not a name of letters"),
        (["a:float"], "'a:float' is not FIELD, FIELD:string or FIELD:number"),
        (["a", "a:number"], "--keep a as a string and as a number"),
        (["content"], "content would be the field 'content', which is the text"),
        (["a", "--where", "b=1"], "where: unknown label 'b': choose from lang, domain, source, a"),
        (["a:number", "--where", "a=1"], "where: a is kept as a number"),
        (["a:number", "--label", "a=1"], "labels: a is kept as a number"),
    ],
)
def test_clashes_are_one_line(keep: list[str], words: str, data, jsonl: Path, tmp_path: Path) -> None:
    command = ("shards", jsonl / "*.jsonl", "--text-field", "content", "--out", tmp_path, "--tokenizer")
    (tmp_path / "t").mkdir()
    status, _, err = data(*command, tmp_path / "t", "--keep", *keep)
    assert status == 2 and err.count("\n") == 1 and words in err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("keep: {a: float}", "keep: a: unknown kind 'float': choose string or number"),
        ("keep: {3: string}", "keep: 3 is not a name"),
        ("keep: [a]", "is not of type dict"),
        ("fields: {a: b}", "fields: unknown label 'a'"),
        ("keep: {a: number}, labels: {a: '1'}", "labels: a is kept as a number"),
    ],
)
def test_a_recipe_with_a_wrong_keep_is_refused(keys: str, words: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{{source: x.jsonl, {keys}}}]")
    with pytest.raises(UserError, match=words):
        load_recipe(recipe)


def test_a_label_has_one_kind_in_all_sources(tmp_path: Path) -> None:
    for name, kind in (("a", "string"), ("b", "number")):
        (tmp_path / f"{name}.yaml").write_text(f"sources: [{{source: {name}.jsonl, keep: {{score: {kind}}}}}]")
    with pytest.raises(UserError, match="keep 'score' as a string and as a number"):
        recipe_from([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], {}, {})


def test_a_field_that_no_record_has_is_told(data, scored: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    command = ("shards", *scored, "--keep", "topic", "topci", "toxcity:number", "--tokenizer", tokenizer.path,
               "--out", tmp_path / "out", "--workers", 1)  # fmt: skip
    for _ in range(2):  # also when there is nothing left to do
        status, _, err = data(*command)
        assert status == 0 and err.splitlines() == [
            f"warning: no document has a value for {name!r}: check the name of the field"
            for name in ("topci", "toxcity")
        ]


@pytest.mark.parametrize(("key", "value"), [("documents", 1), ("tokens", 1), ("min", -5.0), ("max", 5.0)])
def test_verify_counts_numbers_again(
    key: str, value: float, data, scored: list[str], prepare: Callable[..., Path], tmp_path: Path
) -> None:
    out = prepare(tmp_path / "out", scored, **KEEP)
    values = json.loads((out / "manifest.json").read_text())
    values["shards"][1]["numbers"]["toxicity"][key] = value
    (out / "manifest.json").write_text(json.dumps(values))
    status, _, err = data("verify", out)
    assert status == 2 and err.count("\n") == 1 and "`numbers` of shard-00001 is not what" in err


def test_a_manifest_with_impossible_counts_is_refused(
    data, scored: list[str], prepare: Callable[..., Path], tmp_path: Path
) -> None:
    out = prepare(tmp_path / "out", scored, **KEEP)
    values = json.loads((out / "manifest.json").read_text())
    values["shards"][1]["numbers"]["toxicity"]["min"] = None
    (out / "manifest.json").write_text(json.dumps(values))
    status, _, err = data("verify", out)
    assert status == 2 and err.count("\n") == 1 and "the counts of a number are not" in err


@pytest.mark.skipif(not TOXICITY.is_file(), reason="../shared/corpora/toxicity.jsonl.zst is not there")
def test_real_scores(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("shards", TOXICITY, "--keep", "toxicity:number", "--tokens-per-shard", 20_000, "--out", out)
    assert data(*command, "--tokenizer", tokenizer.path, "--workers", 2)[0] == 0
    raw = pyarrow.input_stream(str(TOXICITY), compression="zstd").read().splitlines()
    assert [row["toxicity"] for row in rows_of(out)] == [json.loads(line)["toxicity"] for line in raw]
    manifest, problems = verify(out)
    assert problems == [] and len(manifest.shards) > 1
    counts = manifest.number_counts["toxicity"]
    assert counts.documents == manifest.documents == len(raw) and 0 <= counts.min < counts.max <= 1
