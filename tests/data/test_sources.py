"""What a source may be: formats, folders, object storage, the hub; filters and bad documents."""

from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from data_prep import sources
from data_prep.recipe import ENORMOUS_BYTES, LABELS, load_recipe, recipe_from
from data_prep.verify import verify
from monet_train.data.manifest import Manifest
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer
from tests.support import REPOSITORY
from tests.support.corpora import documents_of, text_of
from tests.support.files import contents

CORPORA = REPOSITORY.parent / "shared" / "corpora"


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


def test_links_are_followed_once(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("project/src", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere" / "a.py").write_text("x = 1\n")
    (tmp_path / "elsewhere" / "b.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "project" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "project" / "src" / "loop").symlink_to(tmp_path / "project")
    for source, warning in ((tmp_path / "project", "1 data file"), (f"{tmp_path}/project/**/*.jsonl", "read once")):
        out = tmp_path / f"out {warning}"
        status, _, err = data("shards", source, "--tokenizer", tokenizer.path, "--out", out, "--workers", 1)
        assert status == 0 and warning in err
        assert Manifest.read(out).documents == 1


def test_what_is_made_is_no_source(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "text.parquet")
    command = ("shards", f"{tmp_path}/**/*.parquet", "--tokenizer", tokenizer.path, "--out", tmp_path / "out",
               "--workers", 1)  # fmt: skip
    assert data(*command)[0] == 0
    before = contents(tmp_path / "out")
    assert data(*command)[0] == 0 and contents(tmp_path / "out") == before


def test_marks_of_editors_are_no_text(prepare: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo\r\n\r\nthree\r\n")
    out = prepare(tmp_path / "out", [str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], txt="line")
    assert documents_of(out, tokenizer) == ["one", "two", "three"]


@pytest.mark.parametrize("dictionary", [False, True])
def test_values_that_python_cannot_hold_cost_a_document_at_most(
    dictionary: bool, data, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    texts = pyarrow.array([b"one", b"\xff", b"three"]).view(pyarrow.string())
    dates = pyarrow.array([0, 0, 10**7], pyarrow.int32()).cast(pyarrow.date32())  # the last is beyond the year 9999
    table = pyarrow.table({"text": texts.dictionary_encode() if dictionary else texts, "source": dates})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    out = tmp_path / "out"
    status, _, err = data("shards", tmp_path / "a.parquet", "--tokenizer", tokenizer.path, "--out", out,
                          "--workers", 1, "--max-bad-share", 1)  # fmt: skip
    assert status == 0, err
    assert documents_of(out, tokenizer) == ["one", "three"]
    assert "invalid UTF-8" in (out / "rejects.jsonl").read_text()


def test_an_id_is_a_string_or_a_whole_number(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = ["a", 7, 2**64 + 1, 2**64 + 2, True, [1]]
    lines = [json.dumps({"text": "x", "key": key}) + "\n" for key in ids]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    out = tmp_path / "out"
    status, _, err = data("shards", tmp_path / "a.jsonl", "--id-field", "key", "--tokenizer", tokenizer.path,
                          "--out", out, "--workers", 1, "--max-bad-share", 1)  # fmt: skip
    assert status == 0, err
    (record,) = Manifest.read(out).shards
    assert pyarrow.parquet.read_table(out / f"{record.name}.labels.parquet")["id"].to_pylist() == ["a", "7"]


def test_a_label_that_is_called_as_none_is(prepare: Callable[..., Path], tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x", "lang": lang}) + "\n" for lang in ("(none)", None, "de")]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (record,) = Manifest.read(prepare(tmp_path / "out", [str(tmp_path / "a.jsonl")])).shards
    assert {value: counts[0] for value, counts in record.labels["lang"].items()} == {"(none)": 2, "de": 1}


def test_data_files_among_source_code_are_told(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    code = tmp_path / "project"
    (code / "sub").mkdir(parents=True)
    (code / "a.py").write_text("x = 1\n")
    (code / "package.json").write_text("{}")
    for name in ("b.jsonl", "sub/c.jsonl", "sub/d.parquet.zst"):
        (code / name).write_bytes(b"?")
    status, _, err = data("shards", code, "--tokenizer", tokenizer.path, "--out", tmp_path / "out", "--workers", 1)
    told = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert status == 0 and len(told) == 1 and "leaving out 3 data files" in told[0]
    assert told[0].endswith(f"to read them too, add '{code}/**/*.jsonl' '{code}/**/*.parquet.zst'")


@pytest.mark.parametrize("other", ["more.jsonl", "second.yaml"])
def test_the_bound_of_one_recipe_among_several_sources_is_refused(other: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("{sources: [{source: a.jsonl}], max_documents: 5}")
    second.write_text("{sources: [{source: b.jsonl}], max_bytes: 9}")
    with pytest.raises(UserError, match=r"first.yaml: max_documents: 5 would bound .* --max-documents"):
        recipe_from([str(first), str(tmp_path / other)], {}, {"max_documents": None, "max_bytes": 100})
    assert recipe_from([str(first)], {}, {}).max_documents == 5
    both = recipe_from([str(first), str(second)], {}, {"max_documents": 7, "max_bytes": 100})
    assert (both.max_documents, both.max_bytes) == (7, 100)


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
    manifest = Manifest.read(prepare(tmp_path / "out", where={"lang": ["ru"]}, min_chars=130))
    assert list(manifest.shards[0].labels["lang"]) == ["ru"]
    assert manifest.filtered["lang"] == 150
    assert manifest.documents + sum(manifest.filtered.values()) == 300 and manifest.filtered["length"] > 0


def test_the_values_of_where_are_joined(data, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    where = ("--where", "lang=ru", "--where", "lang=en,de", "--where", "source=made up")
    arguments = ("shards", jsonl / "*.jsonl", *where, "--tokenizer", tokenizer.path, "--out", tmp_path, "--workers", 1)
    assert data(*arguments)[0] == 0 and Manifest.read(tmp_path).documents == 300


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("where: {lang: en}", "where: lang: 'en' is not a list: write lang: [A, B]"),
        (
            "where: {lang: [no, en]}",
            "where: lang: YAML reads this value as False, which is not a string: put it in quotes",
        ),
        ("labels: {lang: no}", "labels: lang: YAML reads this value as False, which is not a string: put it in quotes"),
        ("fields: {lang: 3}", "fields: lang: YAML reads this value as 3, which is not a string: put it in quotes"),
    ],
)
def test_a_recipe_with_values_that_are_no_strings_is_refused(keys: str, words: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sources: [{{source: x.jsonl, {keys}}}]")
    with pytest.raises(UserError, match=re.escape(words)):
        load_recipe(recipe)


def test_a_recipe_keeps_a_language_in_quotes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sources: [{source: x.jsonl, where: {lang: ['no', en]}}]")
    assert load_recipe(recipe).sources[0].where == {"lang": ["no", "en"]}


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
        10: (b'{"text": "hi", "lang": "\\ud800"}', "invalid UTF-8"),
    }
    file = tmp_path / "mixed.jsonl"
    file.write_bytes(b"\n".join(bad.get(n, (good,))[0] for n in range(1, 31)) + b"\n\n")
    arguments = ("shards", file, "--tokenizer", tokenizer.path, "--out", tmp_path / "out", "--workers", 1)
    status, _, err = data(*arguments)
    assert status == 2 and "9 of 30 documents are bad" in err and "--max-bad-share" in err
    status, out, _ = data(*arguments, "--max-bad-share", 0.5)
    assert status == 0 and "9 bad documents" in out
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {r["line"]: r["reason"] for r in rejects} == {n: reason for n, (_, reason) in bad.items()}
    assert {r["file"] for r in rejects} == {str(file)}
    assert Manifest.read(tmp_path / "out").documents == 21


def test_a_string_of_parquet_that_is_no_utf8_costs_its_document(prepare: Callable[..., Path], tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [b"\xff\xfe", "schön".encode(), b"good", *[b"good"] * 300]
    labels = [b"en", b"de", b"\xff", *[b"en"] * 300]
    columns = {"text": texts, "lang": labels}
    strings = {name: pyarrow.array(values, pyarrow.binary()).view(pyarrow.string()) for name, values in columns.items()}
    pyarrow.parquet.write_table(pyarrow.table({**strings, "n": range(303)}), tmp_path / "bad.parquet")
    manifest = Manifest.read(prepare(tmp_path / "out", [str(tmp_path / "bad.parquet")]))
    assert manifest.rejected == {"invalid UTF-8": 2} and manifest.documents == 301
    assert manifest.shards[0].labels["lang"].keys() == {"en", "de"}


def test_an_enormous_line_costs_one_document(
    prepare: Callable[..., Path], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    lines = [json.dumps({"text": text}) for text in [text_of(n) for n in range(300)]]
    lines.insert(100, json.dumps({"text": "x" * (ENORMOUS_BYTES + 5_000_000)}))
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    out = prepare(tmp_path / "out", [str(tmp_path / "c.jsonl")])
    assert documents_of(out, tokenizer) == [text_of(i) for i in range(300)]
    assert json.loads((out / "rejects.jsonl").read_text()) == {
        "file": str(tmp_path / "c.jsonl"), "line": 101, "reason": "enormous"
    }  # fmt: skip
    assert Manifest.read(out).rejected == {"enormous": 1}


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


def test_the_recipe_of_fineweb_edu_reads_a_dataset_laid_out_like_it(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The dataset's reader, configuration and split on a local folder; the hub itself is not asked."""
    hub = tmp_path / "fineweb-edu"
    for folder, first in (("data/CC-MAIN-2013-20", 100), ("sample/100BT", 0), ("sample/100BT", 20)):
        (hub / folder).mkdir(parents=True, exist_ok=True)
        texts = [text_of(first + i) for i in range(20)]
        columns = {"text": texts, "id": [f"<urn:{i}>" for i in range(20)], "dump": ["CC-MAIN-2013-20"] * 20,
                   "language": ["en"] * 20, "score": [2.5] * 20}  # fmt: skip
        pyarrow.parquet.write_table(pyarrow.table(columns), hub / folder / f"{first:03d}_00000.parquet")
    configs = [{"config_name": name, "data_files": [{"split": "train", "path": path}]}
               for name, path in (("default", "data/*/*"), ("sample-100BT", "sample/100BT/*"))]  # fmt: skip
    (hub / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    recipe = yaml.safe_load((REPOSITORY / "conf/data_prep/fineweb_edu.yaml").read_text())
    assert recipe["sources"][0]["source"] == "hf:HuggingFaceFW/fineweb-edu"
    recipe["sources"][0]["source"] = f"hf:{hub}"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    by_name = f"hf:{hub}:sample-100BT:train"
    for out, source in ((tmp_path / "a", tmp_path / "recipe.yaml"), (tmp_path / "b", by_name)):
        assert data("shards", source, "--tokenizer", tokenizer.path, "--out", out, "--workers", 2)[0] == 0
        assert documents_of(out, tokenizer) == [text_of(i) for i in range(40)]
    labels = Manifest.read(tmp_path / "a").shards[0].labels
    assert [list(labels[name]) for name in LABELS] == [["en"], ["web"], ["CC-MAIN-2013-20"]]
    other = pyarrow.table({"text": ["another"], "id": ["a"], "dump": ["b"], "language": ["en"], "score": [1.0]})
    pyarrow.parquet.write_table(other, hub / "sample/100BT/000_00000.parquet")
    sources._load_hub.cache_clear()
    status, _, err = data("shards", by_name, "--tokenizer", tokenizer.path, "--out", tmp_path / "b")
    assert status == 2 and "source files were added, removed or changed since" in err
    status, _, err = data("shards", f"hf:{hub}:sample-10BT", "--tokenizer", tokenizer.path, "--out", tmp_path / "c")
    assert status == 2 and err.count("\n") == 1 and "sample-10BT" in err and "cannot be opened" in err


def test_a_hub_dataset_that_moved_on(data, tokenizer: Tokenizer, tmp_path: Path, monkeypatch) -> None:
    """Its new commit is not mixed with the old one, and the message says how to resume with the old one."""
    old, new = "a" * 40, "b" * 40
    addresses = [f"hf://datasets/owner/name@{old}/data/{number}.parquet" for number in range(2)]
    assert sources._version(addresses) == f"commit {old}"
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "data.jsonl").write_text('{"text": "a text"}\n')
    load, head = sources._load_hub, [""]

    def at_commit(name: str, config: str, data_dir: str, split: str, revision: str | None) -> sources.HubDataset:
        return load(name, config, data_dir, split, None)._replace(version=f"commit {revision or head[-1]}")

    monkeypatch.setattr(sources, "_load_hub", at_commit)
    recipe = tmp_path / "recipe.yaml"
    entry = {"source": f"hf:{tmp_path / 'hub'}"}
    command = ("shards", recipe, "--tokenizer", tokenizer.path, "--out", tmp_path / "out", "--workers", 1)
    for newest, revision, status in ((old, None, 0), (new, None, 2), (new, old, 0), (new, new, 2)):
        head.append(newest)
        recipe.write_text(yaml.safe_dump({"sources": [entry | ({"revision": revision} if revision else {})]}))
        found, _, err = data(*command)
        assert found == status, err
        assert status == 0 or (f"`revision: {old}` in the recipe to resume" in err and err.count("\n") == 1)


def test_a_folder_of_save_to_disk_is_refused(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a text"]}).save_to_disk(tmp_path / "saved")
    status, _, err = data("shards", f"hf:{tmp_path / 'saved'}", "--tokenizer", tokenizer.path, "--out", tmp_path / "o")
    assert status == 2 and "write the dataset with to_parquet" in err.splitlines()[-1]


def test_the_recipe_of_starcoder_reads_a_dataset_laid_out_like_it(data, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One folder per language, and one with other columns that is not read."""
    hub = tmp_path / "starcoderdata"
    recipe = yaml.safe_load((REPOSITORY / "conf/data_prep/starcoder.yaml").read_text())
    assert {source["source"] for source in recipe["sources"]} == {"hf:bigcode/starcoderdata"}
    languages = [source["data_dir"] for source in recipe["sources"]]
    assert languages == [source["labels"]["lang"] for source in recipe["sources"]] and "python" in languages
    for number, language in enumerate(languages):
        columns = {"content": [text_of(2 * number), text_of(2 * number + 1)], "max_stars_repo_name": ["owner/name"] * 2,
                   "max_stars_repo_path": ["a", "b"], "id": ["0", "1"]}  # fmt: skip
        (hub / language).mkdir(parents=True)
        pyarrow.parquet.write_table(pyarrow.table(columns), hub / language / "train-00000-of-00001.parquet")
    (hub / "git-commits-cleaned").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"commits": [1]}), hub / "git-commits-cleaned" / "train-0.parquet")
    for source in recipe["sources"]:
        source["source"] = f"hf:{hub}"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("shards", tmp_path / "recipe.yaml", "--tokenizer", tokenizer.path, "--out", tmp_path / "out")
    assert data(*arguments, "--workers", 1)[0] == 0
    assert documents_of(tmp_path / "out", tokenizer) == [text_of(i) for i in range(2 * len(languages))]
    labels = Manifest.read(tmp_path / "out").shards[0].labels
    assert {name: counts[0] for name, counts in labels["lang"].items()} == dict.fromkeys(sorted(languages), 2)
    assert labels["source"].keys() == {"owner/name"} and labels["domain"].keys() == {"code"}


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
