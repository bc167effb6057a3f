"""SentencePiece models as tokenizer.json: the same ids and the same text, in our hands and in transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as spm_pb2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer

from monet_train.checkpoints.load import load_pretrained
from monet_train.errors import UserError
from monet_train.interop.export import save_pretrained
from monet_train.tokenizers import convert_sentencepiece as conversion
from monet_train.tokenizers import load_tokenizer
from monet_train.tokenizers.convert_sentencepiece import convert_sentencepiece, equally_probable
from monet_train.tokenizers.probes import PROBES, probe_texts
from tests.support import GOLDEN
from tests.support.corpora import real_texts

CODE = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
KINDS: dict[str, dict[str, object]] = {
    "bpe-code": {"model_type": "bpe", "split_digits": True, **CODE},
    "bpe-default": {"model_type": "bpe", "byte_fallback": True},
    "bpe-no-bytes": {"model_type": "bpe", "character_coverage": 0.98},
    "bpe-no-prefix": {"model_type": "bpe", "add_dummy_prefix": False, **CODE},
    "bpe-no-spaces": {"model_type": "bpe", **CODE, "remove_extra_whitespaces": True},
    "bpe-symbols": {
        "model_type": "bpe", "user_defined_symbols": ["\n", "\t", "▁▁", "▁▁▁▁", "<|code|>"], "pad_id": 3, **CODE
    },
    "unigram-code": {"model_type": "unigram", **CODE},
    "unigram-default": {"model_type": "unigram"},
    "unigram-symbols": {"model_type": "unigram", "user_defined_symbols": ["\n", "<|code|>"], **CODE},
}  # fmt: skip

# What reads like a space, or nearly, and other characters.
ODD = [
    " ", " ", "▁", "\n", "\t", "\r", "\x1c", "\x85", "\xa0", "\u200b", "\u2028", "\u3000", "\ufeff", "a", "the",
    "e\u0301", "ﬁ", "<s>",
]  # fmt: skip
TEXTS = real_texts()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A SentencePiece model of each kind, trained on half of the lines."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = "\n".join(TEXTS).split("\n")[::2]
    for name, options in KINDS.items():
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(folder / name), vocab_size=1000, minloglevel=2, **options
        )
    return {name: folder / f"{name}.model" for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_sentencepiece(models: dict[str, Path], kind: str) -> None:
    original = SentencePieceProcessor(model_file=str(models[kind]))
    converted = convert_sentencepiece(models[kind])
    converted.encode_special_tokens = True
    assert converted.get_vocab_size() == original.get_piece_size()
    runs = [char * n for char in " \n=-a" for n in range(1, 40)]
    random = Random(0)
    spaces = ["".join(random.choices(ODD, k=random.randint(1, 8))) for _ in range(1000)]
    for text in [*probe_texts(["<s>", "</s>", "<unk>", "<0x0A>", "<|code|>"]), *TEXTS, *runs, *spaces]:
        expected, ids = original.encode(text), converted.encode(text).ids
        assert ids == expected or (kind.startswith("unigram") and equally_probable(original, ids, expected)), text[:80]


def test_merges_follow_the_scores_and_not_the_order_of_pieces(models: dict[str, Path], tmp_path: Path) -> None:
    proto = spm_pb2.ModelProto()
    proto.ParseFromString(models["bpe-code"].read_bytes())
    normal = [index for index, piece in enumerate(proto.pieces) if piece.type == 1]
    turned = [(proto.pieces[index].piece, proto.pieces[index].score) for index in reversed(normal)]
    for index, (piece, score) in zip(normal, turned, strict=True):
        proto.pieces[index].piece, proto.pieces[index].score = piece, score
    (tmp_path / "turned.model").write_bytes(proto.SerializeToString())
    original = SentencePieceProcessor(model_file=str(tmp_path / "turned.model"))
    assert convert_sentencepiece(tmp_path / "turned.model").encode(TEXTS[0]).ids == original.encode(TEXTS[0])


@pytest.mark.parametrize("kind", [kind for kind, options in KINDS.items() if "byte_fallback" in options])
def test_text_survives_the_round_trip(models: dict[str, Path], kind: str) -> None:
    original = SentencePieceProcessor(model_file=str(models[kind]))
    converted = convert_sentencepiece(models[kind])
    for text in [*PROBES, *TEXTS]:
        decoded = converted.decode(converted.encode(text).ids)
        assert decoded == original.decode(original.encode(text))
        if KINDS[kind].items() >= CODE.items() and "▁" not in text:
            assert decoded == text


@pytest.mark.parametrize("kind", ["bpe-code", "bpe-symbols", "unigram-default"])
def test_transformers_reads_the_exported_tokenizer(models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    model = load_pretrained(GOLDEN / "tiny_vertical")
    model.config.vocab_size = 1000  # of the configuration only: this test reads no weights
    folder = save_pretrained(model, tmp_path / "export", models[kind])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    original = SentencePieceProcessor(model_file=str(models[kind]))
    assert len(tokenizer) == original.get_piece_size()
    texts = [*PROBES, TEXTS[0]]
    for text, expected in zip(texts, load_tokenizer(models[kind]).encode(texts), strict=True):
        assert tokenizer(text)["input_ids"] == expected
        if kind.startswith("bpe"):
            assert original.encode(text) == expected
            assert tokenizer.decode(expected) == original.decode(expected)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    assert (folder / "tokenizer.model").read_bytes() == models[kind].read_bytes()


def test_the_special_ids_of_the_tokenizer_go_into_the_export(tmp_path: Path) -> None:
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")), model_prefix=str(tmp_path / "own"), vocab_size=200,
        model_type="bpe", bos_id=-1, eos_id=0, unk_id=1, minloglevel=2,
    )  # fmt: skip
    model = load_pretrained(GOLDEN / "tiny_vertical")
    file = tmp_path / "own.model"
    record = load_tokenizer(file).record
    assert (record.bos_id, record.eos_id, record.unk_id) == (None, 0, 1)
    folder = save_pretrained(model, tmp_path / "export", file)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == 0
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).eos_token_id == 0
    assert load_pretrained(folder).config.eos_token_id == 0


def test_a_tokenizer_json_is_taken_over_with_its_companions(models: dict[str, Path], tmp_path: Path) -> None:
    model = load_pretrained(GOLDEN / "tiny_vertical")
    model.config.vocab_size = 1000
    first = save_pretrained(model, tmp_path / "first", models["bpe-code"])
    (first / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "model_max_length": 7})
    )
    second = save_pretrained(model, tmp_path / "second", first / "tokenizer.json")
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    given, taken = (json.loads((folder / "tokenizer_config.json").read_text()) for folder in (first, second))
    assert taken.items() >= given.items()


def test_a_tokenizer_json_without_companions_keeps_its_own_end_token(tmp_path: Path) -> None:
    words = {"<|endoftext|>": 0, "one": 1, "two": 2, "<unk>": 3}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    model = load_pretrained(GOLDEN / "tiny_vertical")
    folder = save_pretrained(model, tmp_path / "export", tmp_path / "tokenizer.json")
    assert load_pretrained(folder).config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).eos_token == "<|endoftext|>"


def test_a_tokenizer_of_another_model_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    model = load_pretrained(GOLDEN / "tiny_vertical")
    with pytest.raises(UserError, match=r"bpe-code\.model has 1000 entries, the model only vocab_size=256"):
        save_pretrained(model, tmp_path / "export", models["bpe-code"])
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_tokenizers_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{}")
    (tmp_path / "broken.model").write_bytes(models["bpe-code"].read_bytes()[:500])
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")), model_prefix=str(tmp_path / "char"), model_type="char",
        vocab_size=60, minloglevel=2,
    )  # fmt: skip
    for name, message in (
        ("broken.json", "is not a tokenizer.json"),
        ("broken.model", "is not a SentencePiece model"),
        ("char.model", "only BPE and unigram"),
        ("absent.model", "is not a file"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            load_tokenizer(tmp_path / name).to_json()
        assert name in str(refused.value) and "\n" not in str(refused.value)


def test_where_sentencepiece_rounds_otherwise_everyone_has_the_ids_of_the_export(
    models: dict[str, Path], tmp_path: Path
) -> None:
    file = models["unigram-code"]
    texts = [char * n for char in " \n=-" for n in range(1, 60)]
    texts += ["\n".join(TEXTS), *TEXTS]
    model = load_pretrained(GOLDEN / "tiny_vertical")
    model.config.vocab_size = 1000
    folder = save_pretrained(model, tmp_path / "export", file)
    ids = load_tokenizer(file).encode(texts)
    assert ids != SentencePieceProcessor(model_file=str(file)).encode(texts), "there is nothing to agree on"
    for one in (folder, folder / "tokenizer.json"):  # what monet-generate loads, and what transformers does
        assert load_tokenizer(one).encode(texts) == ids
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert [tokenizer(text, verbose=False)["input_ids"] for text in texts] == ids


@pytest.mark.parametrize("options", [{"treat_whitespace_as_suffix": True}, {"user_defined_symbols": ["▁▁"], **CODE}])
def test_a_unigram_model_that_cannot_be_converted_keeps_sentencepiece_and_is_not_exported(
    options: dict[str, object], tmp_path: Path
) -> None:
    lines = iter("\n".join(TEXTS).split("\n"))
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(tmp_path / "other"), model_type="unigram", vocab_size=500,
        minloglevel=2, **options,
    )  # fmt: skip
    file = tmp_path / "other.model"
    assert load_tokenizer(file).encode(TEXTS) == SentencePieceProcessor(model_file=str(file)).encode(TEXTS)
    model = load_pretrained(GOLDEN / "tiny_vertical")
    model.config.vocab_size = 500
    with pytest.raises(UserError, match=r"other\.model: transformers encodes '.*' as .*, the shards have"):
        save_pretrained(model, tmp_path / "export", file)


def test_only_ties_are_equally_probable(models: dict[str, Path]) -> None:
    original = SentencePieceProcessor(model_file=str(models["unigram-code"]))
    best, letters = original.encode("return self"), original.encode("r e t u r n")
    assert equally_probable(original, best, best[::-1])
    assert not equally_probable(original, best, letters)


def test_a_conversion_that_is_not_exact_is_not_exported(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    merges = conversion._merges
    monkeypatch.setattr(conversion, "_merges", lambda proto: merges(proto)[::-1])
    model = load_pretrained(GOLDEN / "tiny_vertical")
    model.config.vocab_size = 1000
    with pytest.raises(UserError, match=r"bpe-code\.model: transformers encodes '.*' as .*, the shards have"):
        save_pretrained(model, tmp_path / "export", models["bpe-code"])
    assert list(tmp_path.iterdir()) == []
