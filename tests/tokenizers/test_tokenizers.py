"""Tokenizers: trained, copied, and their fast encoder."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from data_prep.chunks import read_chunks
from data_prep.encode import Encoder
from data_prep.recipe import recipe_from
from data_prep.sources import list_parts
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer, load_tokenizer
from monet_train.tokenizers.convert_sentencepiece import convert_sentencepiece
from monet_train.tokenizers.fast_encoder import FastEncoder
from monet_train.tokenizers.sentencepiece_model import SentencePieceTokenizer
from tests.support.corpora import documents_of, text_of
from tests.support.tokenizers import byte_level


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
    pytest.importorskip("fastokens")
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
    assert tokenizer.fast is not None, "BPE with byte fallback is encoded fast"
    assert tokenizer.encode(texts) == tokenizer.encode_by_library(texts)


def test_an_encoder_that_differs_is_refused(jsonl: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that differs on the probes is not used at all; one that differs later stops the run."""
    description = convert_sentencepiece(tokenizer.path).to_str()
    assert FastEncoder.for_json(description, lambda texts: [[5] for _ in texts], ()) is None
    assert tokenizer.fast is not None
    wrong = FastEncoder(tokenizer.fast._inner, lambda texts: [[5] for _ in texts])
    monkeypatch.setattr(tokenizer, "fast", wrong)
    with pytest.raises(UserError, match=r"fastokens encodes 'some text' differently"):
        tokenizer.encode(["some text"])


def test_the_first_call_of_every_process_is_compared(jsonl: Path, tokenizer: Tokenizer) -> None:
    """Even in a run so short that no worker reaches its 16th chunk."""
    pytest.importorskip("fastokens")
    wrong = load_tokenizer(tokenizer.path)
    assert wrong.fast is not None
    wrong.fast._by_library = lambda texts: [[5] for _ in texts]
    for workers in (1, 2):
        (part,) = list_parts(recipe_from([str(jsonl / "part-0.jsonl")], {}, {}))
        with Encoder(wrong, workers) as encoder, pytest.raises(UserError, match="the package fastokens encodes"):
            list(encoder.encode(read_chunks(part)))


def test_a_trained_unigram_model_brings_text_back(jsonl: Path, data, tmp_path: Path) -> None:
    source = (jsonl / "*.jsonl", "--vocab-size", 326, "--model-type", "unigram", "--out", tmp_path)
    assert data("tokenizer", *source)[0] == 0
    unigram = load_tokenizer(tmp_path)
    assert isinstance(unigram, SentencePieceTokenizer) and unigram.fast is None
    assert unigram.decode(unigram.encode([text_of(2)])[0]) == text_of(2)


def test_a_tokenizer_of_an_installed_package() -> None:
    pytest.importorskip("mistral_common", reason="needs the extra [bench]")
    assert load_tokenizer(Path("mistral_common:data/tokenizer.model.v1")).record.vocabulary_size == 32000
    with pytest.raises(UserError, match="no installed package 'nowhere'"):
        load_tokenizer(Path("nowhere:model"))


def test_a_hugging_face_tokenizer_serves_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path, "<|endoftext|>"))
    assert tokenizer.record.eos_id == 380 and tokenizer.record.kind == "huggingface"
    texts = [*map(text_of, range(100)), "a<|endoftext|>b", "", "<|endoftext|>", "🦔 \n\n e\u0301"]
    assert tokenizer.fast is not None, "it is encoded fast"
    assert tokenizer.encode(texts) == tokenizer.encode_by_library(texts)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts


def test_an_added_token_that_is_not_special_is_found_in_text(tmp_path: Path) -> None:
    """Whichever encoder serves: the ids are those of the package tokenizers."""
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(byte_level(tmp_path, "<|endoftext|>") / "tokenizer.json"))
    inner.add_tokens(["<|code|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    texts = ["a<|code|>b <|code|>", "<|code|><|endoftext|>", *map(text_of, range(20))]
    assert tokenizer.encode(texts) == tokenizer.encode_by_library(texts)
    assert inner.token_to_id("<|code|>") in tokenizer.encode(texts)[0]


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "BPE", "Unigram", "none"])
def test_the_share_of_unknown_tokens_is_that_of_the_model(kind: str, data, tmp_path: Path) -> None:
    """Whatever the unknown token is called; `none` where the model has none."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    words = {"</s>": 0, "[UNK]": 1, "a": 2}
    model = {
        "WordPiece": lambda: models.WordPiece(words, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel(words, unk_token="[UNK]"),
        "BPE": lambda: models.BPE(words, [], unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram([("a", -1.0), ("[UNK]", 0.0)], 1, False),
        "none": lambda: models.BPE({"</s>": 0, "a": 1}, []),
    }[kind]()
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b a c")
    status, out, _ = data(
        "tokenizer", tmp_path / "text.txt", "--existing", tmp_path / "tokenizer.json", "--out", tmp_path / "out"
    )
    (row,) = json.loads((tmp_path / "out" / "report.json").read_text())["sources"].values()
    assert status == 0 and row["unknown_rate"] == (None if kind == "none" else 0.5)
    assert (" none " if kind == "none" else " 50.00% ") in out


def test_merges_are_not_left_out_at_random(tmp_path: Path) -> None:
    """BPE dropout is for training; every run has to make the same shards."""
    import tokenizers

    path = byte_level(tmp_path, "<|endoftext|>") / "tokenizer.json"
    texts = [text_of(i) for i in range(20)]
    expected = load_tokenizer(path).encode_by_library(texts)
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.model.dropout = 0.5  # type: ignore[attr-defined]
    inner.save(str(path))
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode_by_library(texts) == expected == tokenizer.encode(texts)


def test_special_tokens_are_known_and_no_text_makes_them(
    data, tokenizer: Tokenizer, jsonl: Path, tmp_path: Path
) -> None:
    """A text with `</s>` in it does not end there: a document in the shard has one end-of-text token, its last."""
    folder = byte_level(tmp_path / "t", "<|fin|>")
    status, _, err = data("shards", jsonl / "*.jsonl", "--tokenizer", folder, "--out", tmp_path / "o", "--workers", 1)
    assert status == 2 and "none of the end-of-text tokens" in err and "tokenizer_config.json" in err
    names = {"eos_token": "<|fin|>", "bos_token": {"content": "<|fin|>"}, "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    source = tmp_path / "odd.jsonl"
    for model, text in ((folder, "a<|fin|>b <|fin|>"), (tokenizer.path, "a</s>b <s> </s><unk>")):
        source.write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "more"}) + "\n")
        out = tmp_path / f"from {model.name}"
        assert data("shards", source, "--tokenizer", model, "--out", out, "--workers", 1)[0] == 0
        assert documents_of(out, load_tokenizer(model)) == [text, "more"]
        assert data("verify", out)[0] == 0 and repr(text) in data("info", out)[1], "the copied tokenizer is whole"
    record = load_tokenizer(folder).record
    assert (record.eos_id, record.bos_id, record.unk_id, record.pad_id) == (380, 380, None, None)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ('{"eos_token": ', r"cannot be read: .*: restore the file"),
        ('["</s>"]', r"is not a JSON object: restore the file"),
        ('{"eos_token": {"x": 1}}', r'eos_token: \{"x": 1\} does not name a token: write the token'),
        ('{"pad_token": "<pad>"}', r"pad_token: '<pad>' is not in the vocabulary of .*tokenizer\.json: correct it"),
        ('{"eos_token": ["</s>"]}', r'eos_token: \["</s>"\] does not name a token: write the token'),
    ],
)
def test_a_broken_tokenizer_config_is_refused(written: str, words: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path, "</s>")
    (folder / "tokenizer_config.json").write_text(written)
    with pytest.raises(UserError, match=rf"tokenizer_config\.json:? {words}"):
        load_tokenizer(folder)


def test_a_tokenizer_that_ends_documents_by_their_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"makes its special token '</s>' from the plain text '</s>'"):
        load_tokenizer(byte_level(tmp_path, "</s>", marked=False))


def test_a_unigram_tokenizer_json_whose_end_token_is_a_piece_is_refused_truthfully(tmp_path: Path) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)], 0, False))
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"its model has that as a piece too.*use its SentencePiece \.model"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_in_a_closed_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)  # root, which tests may run as, is refused nothing
    with pytest.raises(UserError, match=r"closed/t cannot be read \(.*Permission denied\)"):
        load_tokenizer(tmp_path / "closed" / "t")


def test_another_end_token_is_another_corpus(data, jsonl: Path, tmp_path: Path) -> None:
    """tokenizer_config.json names it; the tokenizer.json is the same."""
    import tokenizers

    path = byte_level(tmp_path / "t", "<A>") / "tokenizer.json"
    inner = tokenizers.Tokenizer.from_file(str(path))
    inner.add_special_tokens(["<B>"])
    inner.save(str(path))
    arguments = ("shards", jsonl / "*.jsonl", "--tokenizer", path, "--out", tmp_path / "out", "--workers", 1)
    for name, status in (("<A>", 0), ("<B>", 2)):
        path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        found, _, err = data(*arguments)
        assert found == status, err
    assert "differs in: tokenizer" in err


def test_an_existing_tokenizer_is_reported_on(data, tokenizer: Tokenizer, jsonl: Path, tmp_path: Path) -> None:
    source = ("tokenizer", jsonl / "*.jsonl", "--out")
    status, out, _ = data(*source, tmp_path / "new", "--existing", tokenizer.path)
    assert status == 0 and "400 pieces" in out and "made up" in out
    reports = [json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "new", tokenizer.path.parent)]
    assert reports[0]["sources"] == reports[1]["sources"] and reports[0]["tokenizer"] == reports[1]["tokenizer"]
    assert (tmp_path / "new" / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    assert data(*source, tmp_path / "new", "--existing", tokenizer.path)[0] == 0
    assert "has another tokenizer" in data(*source, tmp_path / "new", "--vocab-size", 400)[2]
    for damaged in ("{", "[]"):
        (tmp_path / "new" / "report.json").write_text(damaged)
        assert "no whole report.json" in data(*source, tmp_path / "new", "--existing", tokenizer.path)[2]
    assert "one of the arguments --vocab-size --existing is required" in data(*source, tmp_path / "none")[2]
