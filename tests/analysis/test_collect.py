"""Collection against brute force over dense scores, and the same bytes for any workers, order and interruption."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.parquet
import pytest
import torch

from monet_train.analysis.atlas import Atlas
from monet_train.analysis.cli import main
from monet_train.analysis.collect import collect
from monet_train.analysis.collector import Collector
from monet_train.analysis.plan import Plan, Request, make_plan
from monet_train.checkpoints.weights import write_model
from monet_train.errors import UserError
from monet_train.model.transformer import MonetForCausalLM
from tests.support.commands import exit_status
from tests.support.files import contents
from tests.support.processes import run_ranks
from tests.support.worker import collect as collect_process


@pytest.fixture(scope="session")
def dense(model: MonetForCausalLM, plan: Plan) -> list[dict[str, np.ndarray]]:
    """By routing group: scores [T, E, E] and gates of half-experts [T, 2E] of every token, fp64, by brute force."""
    scores, halves = [[], []], [[], []]
    with torch.no_grad():
        for document in range(len(plan.documents)):
            tokens = plan.read(document)
            for _, begin, end in plan.units(document):
                probs = model(torch.from_numpy(tokens[begin:end])[None], output_router_probs=True).router_probs
                for group in (0, 1):
                    g1, g2 = (g[0].double() for g in probs[2 * group])
                    scores[group].append(torch.einsum("thi,thj->tij", g1, g2).numpy())
                    halves[group].append(torch.cat([g1.sum(1), g2.sum(1)], 1).numpy())
    return [
        {"score": np.concatenate(s), "half": np.concatenate(h)} for s, h in zip(scores, halves, strict=True)
    ]  # fmt: skip


@pytest.fixture(scope="session")
def documents(plan: Plan) -> np.ndarray:
    """The document of every token, [T]."""
    return np.repeat(np.arange(len(plan.documents)), plan.documents.tokens)


def test_sums_are_those_of_brute_force(
    atlas: Atlas, plan: Plan, dense: list[dict[str, np.ndarray]], documents: np.ndarray
) -> None:
    for group in (0, 1):
        for halves in (False, True):
            score = dense[group]["half" if halves else "score"].reshape(len(documents), -1)
            compare = np.testing.assert_allclose
            compare(atlas.column(group, "mean", halves), score.mean(0), rtol=1e-6, atol=1e-9)
            compare(atlas.column(group, "second_moment", halves), (score**2).mean(0), rtol=1e-6, atol=1e-9)
            np.testing.assert_array_equal(atlas.column(group, "firings", halves), (score > 0).sum(0))
            for column, labels in (("lang", ("en", "ru", "zh")), ("source", ("a", "b"))):
                sums = atlas.sums(group, column, halves)
                assert atlas.values(column) == labels
                cells = plan.documents.cell[[c.name for c in plan.schema.columns].index(column)]
                first = plan.schema.cells_of(column).start
                for value in range(len(labels)):
                    rows = cells[documents] == first + value
                    np.testing.assert_array_equal(sums.firings[value], (score[rows] > 0).sum(0))
                    for half in (0, 1):
                        kept = rows & (plan.half[documents] == half)
                        mean, error = ratio_estimator(score[kept], documents[kept])
                        found = sums.half(half)
                        compare(found.mean[value], mean, rtol=1e-6, atol=1e-9)
                        compare(found.standard_error[value], error, rtol=1e-4, atol=1e-7)
                        assert found.tokens[value] == kept.sum()
                        assert found.documents[value] == len(np.unique(documents[kept]))


def test_correlations_are_those_over_tokens_where_the_number_is_known(
    atlas: Atlas, plan: Plan, dense: list[dict[str, np.ndarray]], documents: np.ndarray
) -> None:
    number = plan.documents.value[0][documents]
    known = ~np.isnan(number)
    assert 0 < known.sum() < len(known)
    for group in (0, 1):
        score = dense[group]["score"].reshape(len(documents), -1)[known]
        used = score.std(0) > 0
        expected = np.corrcoef(score[:, used].T, number[known])[-1, :-1]
        np.testing.assert_allclose(atlas.column(group, "toxicity.r")[used], expected, rtol=1e-5, atol=1e-7)
    values = plan.documents.value[0] * plan.schema.numeric[0].scale
    assert set(values[~np.isnan(values)]) == {number - 2.5 for number in range(7)}


def test_contributions_are_the_norms_of_what_experts_put_out(atlas: Atlas, plan: Plan, model: MonetForCausalLM) -> None:
    """Against each layer with every other expert masked, on what it reads in an unmasked pass."""
    rows = {
        (int(s), int(n)): d
        for d, (s, n) in enumerate(zip(plan.documents.shard, plan.documents.number, strict=True))
    }  # fmt: skip
    for group, i, j in [(0, 1, 2), (1, 3, 9)]:
        for context in atlas.expert(group, i, j).contexts[::9]:
            tokens = plan.read(rows[context.shard, context.document])
            begin = context.position - context.place
            only = torch.zeros(1, 16, 16)
            only[0, i, j] = 1
            with torch.no_grad():
                inputs, gates = pass_of(model, torch.from_numpy(tokens[begin : begin + 32])[None], group)
                outputs = [
                    layer.moe(x, layer.moe.routing(*gates, only))[context.place]
                    for layer, x in zip(model.model.groups()[group], inputs, strict=True)
                ]
            assert context.contribution == pytest.approx(float(torch.cat(outputs).norm()), rel=1e-4)


def pass_of(model: MonetForCausalLM, ids: torch.Tensor, group: int) -> tuple[list[torch.Tensor], tuple[Any, Any]]:
    """What the expert layers of a routing group read, and the group's gates."""
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.moe.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
        for layer in model.model.groups()[group]
    ]
    gates = model(ids, output_gates=True).gates[group]
    for hook in hooks:
        hook.remove()
    return inputs, gates


def test_sampled_tokens_have_their_strongest_experts(
    atlas: Atlas, plan: Plan, dense: list[dict[str, np.ndarray]]
) -> None:
    """The first 4,096 tokens by hash or so: of this corpus all, or most."""
    starts = np.concatenate([[0], np.cumsum(plan.documents.tokens)])
    for group in (0, 1):
        table = pyarrow.parquet.read_table(atlas.folder / f"coactive-{group:03d}.parquet").to_pylist()
        assert len(table) > min(4096, plan.tokens) * 0.9
        for row in table[::97]:
            document = int(np.searchsorted(plan.first_unit, row["unit"], side="right")) - 1
            token = starts[document] + 32 * (row["unit"] - plan.first_unit[document]) + row["position"]
            score = dense[group]["score"][token].flatten()
            strongest = np.sort(score[score > 0])[::-1][:64]
            np.testing.assert_allclose(row["score"], strongest, rtol=1e-5)
            np.testing.assert_allclose(score[row["expert"]], strongest, rtol=1e-5)


def ratio_estimator(score: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over tokens and its standard error over documents, as in the books."""
    names = np.unique(document)
    sums = np.stack([score[document == name].sum(0) for name in names])
    lengths = np.array([(document == name).sum() for name in names])[:, None]
    mean = score.mean(0)
    variance = ((sums - mean * lengths) ** 2).sum(0) * len(names) / (len(names) - 1)
    return mean, np.sqrt(variance) / len(score)


def test_contexts_are_the_strongest_tokens(atlas: Atlas, plan: Plan, dense: list[dict[str, np.ndarray]]) -> None:
    """Of every expert of both groups; their places, scores and neighbours."""
    starts = np.concatenate([[0], np.cumsum(plan.documents.tokens)])
    row = {
        (int(s), int(n)): d
        for d, (s, n) in enumerate(zip(plan.documents.shard, plan.documents.number, strict=True))
    }  # fmt: skip
    lang = [column.name for column in plan.schema.columns].index("lang")
    seen = 0
    for group, i, j in [(0, 1, 2), (0, 7, 7), (1, 3, 9), (1, 15, 0)]:
        score = dense[group]["score"][:, i, j]
        page = atlas.expert(group, i, j)
        assert page.firings == (score > 0).sum() == sum(page.histogram)
        strongest = np.sort(score[score > 0])[::-1][:20]
        np.testing.assert_allclose([c.score for c in page.strongest], strongest, rtol=1e-5)
        sample = [c for c in page.contexts if c.quantile >= 0]
        assert len(sample) == min(25, page.firings)
        if len(sample) == 25:
            assert [c.quantile for c in sample] == np.repeat(np.arange(5), 5).tolist()
            assert [c.score for c in sample] == sorted(c.score for c in sample)
        for context in page.contexts:
            document = row[context.shard, context.document]
            token = starts[document] + context.position
            assert context.score == pytest.approx(score[token], rel=1e-5)
            assert plan.read(document)[context.position] == context.tokens[context.place]
            first = plan.schema.cells_of("lang").start
            assert context.labels["lang"] == ("en", "ru", "zh")[plan.documents.cell[lang, document] - first]
            near = slice(max(0, context.place - 24), context.place + 8)
            begin = token - context.place
            expected = score[begin : begin + len(context.tokens)][near]
            np.testing.assert_allclose(context.scores[near], expected, rtol=1e-3, atol=1e-6)
            seen += 1
    assert seen > 100


@pytest.mark.distributed
def test_the_same_bytes_for_any_workers_and_after_a_kill(
    model_folder: Path, labelled: Callable[..., Path], tmp_path: Path
) -> None:
    """One process; two; and two that are killed, after which one goes on alone."""
    given = [str(model_folder), str(labelled("corpus")), "--window", "32", "--tokens-per-label", "all"]

    def run(name: str, ranks: int = 1, killed_after: int | None = None) -> Path:
        out = tmp_path / name
        saves = ["--save-minutes", "0"] if killed_after else []
        for done in run_ranks(collect_process, [*given, *saves, "--out", str(out)], killed_after, ranks=ranks):
            assert (done.returncode != 0) == (killed_after is not None), done.stderr
        return out

    expected = contents(run("one"))
    assert "manifest.json" in expected and "parts" not in expected
    assert contents(run("two", ranks=2)) == expected

    killed = tmp_path / "killed"
    run("killed", ranks=2, killed_after=10)
    with pytest.raises(UserError, match="unfinished"):
        Atlas(killed)
    assert contents(run("killed")) == expected


@pytest.mark.slow
def test_a_collection_goes_on_with_what_was_saved(
    model: MonetForCausalLM, plan: Plan, atlas: Atlas, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read, add = tmp_path / "atlas", [], Collector.add

    def stop_at(number: int) -> None:
        def add_or_stop(collector: Collector, document: int) -> None:
            if len(read) == number:
                raise KeyboardInterrupt
            read.append(document)
            add(collector, document)

        monkeypatch.setattr(Collector, "add", add_or_stop)

    for number in (25, 40):
        stop_at(number)
        with pytest.raises(KeyboardInterrupt):
            collect(model, plan, out, [0, 1], save_seconds=0)
    stop_at(1000)
    collect(model, plan, out, [0, 1])
    assert sorted(read) == list(range(len(plan.documents))), "no document is read twice"
    assert contents(out) == contents(atlas.folder)


def test_another_collection_in_the_same_folder_is_refused(
    model: MonetForCausalLM, plan: Plan, atlas: Atlas, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has an atlas already"):
        collect(model, plan, atlas.folder, [0, 1])
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "identity").write_text("{}")
    with pytest.raises(UserError, match="another model, other data or other options"):
        collect(model, plan, tmp_path, [0, 1])


REFUSED = {
    "a source that is not there": (["nowhere"], "no shards at nowhere"),
    "a label that is not there": (
        ["--labels", "language"],
        "--labels language",
        "they have domain, lang, source, toxicity",
    ),
    "a group that is not there": (["--groups", "7"], "--groups 7 is not a routing group; use some of 0 to 1"),
    "a window beyond the context": (["--window", "1000"], "use 1 to 128"),
    "the same source twice": (["TWICE"], "give each source once"),
    "no tokens": (["--max-tokens", "0"], "at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(
    case: str, model_folder: Path, labelled: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, *fragments = REFUSED[case]
    source = str(labelled("corpus"))
    arguments = [source if argument == "TWICE" else argument for argument in arguments]
    out = tmp_path / "atlas"
    with mock.patch.dict(os.environ):
        status = exit_status(main, "monet-experts", "collect", model_folder, source, *arguments, "--out", out)
    said = capsys.readouterr().err
    assert status == 2 and not out.exists()
    for fragment in fragments:
        assert fragment in said


def test_text_of_another_tokenizer_is_refused(
    model: MonetForCausalLM, labelled: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path, model.state_dict(), model.config, None)
    with mock.patch.dict(os.environ):
        arguments = ["collect", tmp_path, labelled("corpus"), "--out", tmp_path / "atlas"]
        assert exit_status(main, "monet-experts", *arguments) == 2
    assert "holds no tokenizer" in capsys.readouterr().err


def test_documents_are_chosen_by_what_they_say(labelled: Callable[..., Path]) -> None:
    """Other shards in another order give the same documents in the same order and halves; only their places differ."""
    order = list(range(60))[::-1]
    one = make_plan([labelled("corpus")], Request(tokens_per_label=500, window=32), 400)
    two = make_plan([labelled("reversed", order, 1000)], Request(tokens_per_label=500, window=32), 400)
    assert len(one.documents) < 60
    for name in ("hash", "tokens", "cell"):
        assert np.array_equal(getattr(one.documents, name), getattr(two.documents, name)), name
    assert np.array_equal(one.half, two.half) and np.array_equal(one.first_unit, two.first_unit)
    assert len(set(two.documents.shard)) > len(set(one.documents.shard)) >= 1
    for cell in range(one.schema.cells):
        tokens = one.documents.tokens[(one.documents.cell == cell).any(0)]
        assert tokens.sum() >= 500
