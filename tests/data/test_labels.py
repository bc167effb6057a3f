"""Labels of documents: one, some in any order, or a range."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from monet_train.data.labels import RowGroups, document_labels, label_columns, read_labels
from monet_train.errors import UserError

COUNT = 1000
LANGUAGES = ["en", "ru", "日本", None]
SCORES = [None if i % 7 == 0 else i / 2 for i in range(COUNT)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Labels of COUNT documents in row groups of 90, whose dictionaries differ."""
    prefix = tmp_path / "shard-00000"
    columns = {
        "lang": [LANGUAGES[i // 90 % 4] for i in range(COUNT)],
        "domain": [f"domain {i // 100}" for i in range(COUNT)],
        "source": [None] * COUNT,
        "id": [f"id {i}" for i in range(COUNT)],
    }
    table = pyarrow.table(
        {name: pyarrow.array(values, pyarrow.large_string()).dictionary_encode() for name, values in columns.items()}
        | {"score": pyarrow.array(SCORES, pyarrow.float64())}
        | {"bytes": pyarrow.array(range(COUNT), pyarrow.int64()), "id": columns["id"]}
    )
    pyarrow.parquet.write_table(table, f"{prefix}.labels.parquet", row_group_size=90)
    return prefix


@pytest.mark.parametrize(
    "documents",
    [
        None, slice(None), slice(50, 700), slice(900, 5000), slice(-3, None), slice(10, 900, 37), slice(5, 5),
        [999, 0, 500, 500, 89, 90], np.array([7]), np.arange(400)[::-1], [], range(85, 95),
    ],
)  # fmt: skip
def test_rows_are_those_of_the_documents(documents, shard: Path) -> None:
    everything = list(range(COUNT))
    if documents is None:
        numbers = everything
    else:
        numbers = everything[documents] if isinstance(documents, slice) else [int(i) for i in documents]
    table = read_labels(shard, documents)
    assert table.column_names == ["lang", "domain", "source", "id", "score", "bytes"]
    assert table.to_pylist() == [
        {
            "lang": LANGUAGES[i // 90 % 4],
            "domain": f"domain {i // 100}",
            "source": None,
            "id": f"id {i}",
            "score": SCORES[i],
            "bytes": i,
        }
        for i in numbers
    ]
    assert [document_labels(shard, i) for i in numbers[:5]] == table.to_pylist()[:5]


def test_a_column_is_one_array_of_codes(shard: Path) -> None:
    table = read_labels(shard, slice(80, 300), ["domain", "bytes"])
    assert table.column_names == ["domain", "bytes"]
    (column,) = table["domain"].chunks
    values, codes = column.dictionary.to_pylist(), column.indices.to_numpy()
    counts = np.bincount(codes, minlength=len(values))
    assert dict(zip(values, counts.tolist(), strict=True)).items() >= {"domain 0": 20, "domain 2": 100}.items()
    sums = np.bincount(codes, table["bytes"].to_numpy(), len(values))
    assert sums[values.index("domain 1")] == sum(range(100, 200))


def test_the_columns_tell_their_kind(shard: Path) -> None:
    assert label_columns(shard) == (("lang", "domain", "source"), ("score",))  # neither ids nor bytes


@pytest.mark.parametrize(
    ("documents", "columns", "words"),
    [
        ([COUNT], None, f"there is no document {COUNT}: the shard has {COUNT}"),
        ([0, -1], None, f"there is no document -1: the shard has {COUNT}"),
        ([0], ["language"], "there is no column 'language': choose from lang, domain, source, id, score, bytes"),
    ],
)
def test_what_is_not_there_is_refused(documents, columns, words: str, shard: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_labels(shard, documents, columns)


def test_damaged_labels_are_one_line(shard: Path) -> None:
    assert document_labels(shard, 3)["bytes"] == 3
    file = Path(f"{shard}.labels.parquet")
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"labels .*shard-00000\.labels\.parquet: the file cannot be read \("):
        document_labels(shard, 3)


def test_the_labels_of_a_shard_that_was_made_again_are_the_new_ones(shard: Path) -> None:
    assert document_labels(shard, 3)["bytes"] == 3
    table = pyarrow.parquet.read_table(f"{shard}.labels.parquet").slice(10)
    pyarrow.parquet.write_table(table, f"{shard}.labels.parquet")
    assert document_labels(shard, 3)["bytes"] == 13 and read_labels(shard).num_rows == COUNT - 10


def test_memory_is_bounded(shard: Path) -> None:
    """What is kept for single documents is at most the limit, or one row group."""
    one = read_labels(shard, slice(0, 90), ["bytes"]).nbytes
    groups = RowGroups(limit=3 * one)
    for _ in range(2):
        for number in range(COUNT // 90):
            assert groups.get(shard, number, ("bytes",))["bytes"].to_pylist()[0] == number * 90
            assert 0 < groups.nbytes <= 3 * one
    smallest = RowGroups(limit=1)
    assert smallest.get(shard, 2, ("bytes",)).num_rows == smallest.get(shard, 3, ("bytes",)).num_rows == 90
    assert smallest.nbytes == one
