"""Tokenizers: a SentencePiece model as the ``tokenizer.json`` of the tokenizers library, with the same ids.

transformers 5 reads ``tokenizer.json``; what it makes of a bare ``tokenizer.model`` depends on the model type and
is not what SentencePiece does (no word-initial space, for one). So an export converts once, and compares.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as spm_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from monet_train.errors import UserError
from monet_train.model.config import MonetConfig

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What may stand beside a tokenizer.json and belongs to it.
COMPANIONS = (TOKENIZER_CONFIG, "special_tokens_map.json", SENTENCEPIECE_MODEL)

SPACE = "▁"  # how SentencePiece writes a space inside a piece
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type

# What conversions get wrong: runs of spaces, line breaks, leading and trailing spaces, digits, rare characters.
PROBES = (
    "Hello world", " two  spaces   and\ttabs\t\t", "def f(x):\n    if x:\n        return 0\n\n\n", "x" * 40,
    "3.14159 + 2,718 = 1234567890", "naïve café, ½ ﬁne Ⅳ, Übergröße", "日本語とрусский язык",
    "🙂👩‍👩‍👧‍👦 \u200b\u00a0 e\u0301", "=" * 79, " " * 23 + "}", "\n\n  \n", "", " ", "a", "▁",
)  # fmt: skip


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a checkpoint folder, if it has one."""
    return next((folder / n for n in (TOKENIZER_JSON, SENTENCEPIECE_MODEL) if (folder / n).is_file()), None)


def load_tokenizer(file: Path) -> Tokenizer:
    """Read a ``tokenizer.json`` or a SentencePiece model.

    Raises:
        UserError: names a file that is missing or neither.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file; give a {TOKENIZER_JSON} or a SentencePiece model")
    if file.suffix != ".json":
        return convert_sentencepiece(file)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{file} is not a {TOKENIZER_JSON}: {error}") from None


def write_tokenizer(file: Path, config: MonetConfig, folder: Path) -> dict[str, int]:
    """Write the files from which ``AutoTokenizer.from_pretrained(folder)`` makes the tokenizer of ``file``.

    Args:
        file: a ``tokenizer.json`` (what stands beside it in COMPANIONS is taken along) or a SentencePiece model.

    Returns:
        ``bos_token_id`` and ``eos_token_id`` of the tokenizer, as far as it has them.

    Raises:
        UserError: the file cannot be read, or the tokenizer has more entries than the model has embeddings.
    """
    tokenizer = load_tokenizer(file)
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        raise UserError(
            f"{file} has {size} entries, the model only vocab_size={config.vocab_size}; give the model's own tokenizer"
        )
    if file.suffix == ".json":
        shutil.copyfile(file, folder / TOKENIZER_JSON)
        for name in COMPANIONS:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
    else:
        tokenizer.save(str(folder / TOKENIZER_JSON))
        shutil.copyfile(file, folder / SENTENCEPIECE_MODEL)
    special = special_token_ids(file)
    if not (folder / TOKENIZER_CONFIG).is_file():
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": tokenizer.id_to_token(token_id) for name, token_id in special.items()},
        }
        (folder / TOKENIZER_CONFIG).write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return {f"{name}_token_id": special[name] for name in ("bos", "eos") if name in special}


def special_token_ids(file: Path) -> dict[str, int]:
    """Ids of ``bos``, ``eos`` and ``unk``, as far as the tokenizer has them: those that the shards were made with.

    Raises:
        UserError: the file cannot be read, or has no end-of-text token.
    """
    from data_prep.tokenizers import load_tokenizer as load_for_data  # here, because it imports this package

    record = load_for_data(file).record
    ids = {"bos": record.bos_id, "eos": record.eos_id, "unk": record.unk_id}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def convert_sentencepiece(file: Path) -> Tokenizer:
    """A SentencePiece model (BPE or unigram) as a tokenizer of the tokenizers library.

    The ids are those of SentencePiece: always for BPE; for unigram except where two segmentations are equally
    probable. Control symbols (<s>, </s>, ...) become special tokens, which unlike in SentencePiece are recognised in
    a text. Nothing is added to a text on encoding.

    Raises:
        UserError: the file is no SentencePiece model, or of a kind that cannot be converted.
    """
    proto: Any = spm_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    try:
        proto.ParseFromString(file.read_bytes())
        original = SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # protobuf's DecodeError, SentencePiece's RuntimeError
        raise UserError(f"{file} is not a SentencePiece model: {error}") from None
    tokenizer = Tokenizer(_model(proto, file))
    tokenizer.normalizer = _normalizer(proto)
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    if symbols:
        # SentencePiece takes user-defined symbols out of the text first, the longest at each place
        pattern = "|".join(re.escape(symbol) for symbol in sorted(symbols, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = _decoder(proto)
    tokenizer.add_special_tokens(
        [AddedToken(p.piece, special=True, normalized=False) for p in proto.pieces if p.type in (UNKNOWN, CONTROL)]
    )
    tolerant = proto.trainer_spec.model_type == UNIGRAM
    for text in PROBES:
        ids, expected = tokenizer.encode(text).ids, original.encode(text)
        if ids != expected and not (tolerant and equally_probable(original, ids, expected)):
            warnings.warn(f"{file}: the converted tokenizer cuts {text!r} differently", stacklevel=2)
            break
    return tokenizer


def equally_probable(model: SentencePieceProcessor, one: list[int], other: list[int]) -> bool:
    """Whether a unigram model gives two segmentations the same probability, up to rounding."""
    return math.isclose(sum(map(model.get_score, one)), sum(map(model.get_score, other)), abs_tol=1e-3)


def _model(proto: Any, file: Path) -> models.Model:
    trainer = proto.trainer_spec
    if trainer.model_type == UNIGRAM:
        return models.Unigram(
            [(piece.piece, piece.score) for piece in proto.pieces],
            unk_id=trainer.unk_id,
            byte_fallback=trainer.byte_fallback,
        )
    if trainer.model_type == BPE:
        return models.BPE(
            {piece.piece: index for index, piece in enumerate(proto.pieces)},
            _merges(proto),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            # a piece that stands alone between user-defined symbols is taken whole
            ignore_merges=any(piece.type == USER_DEFINED for piece in proto.pieces),
        )
    raise UserError(
        f"{file} is a SentencePiece model of type {trainer.model_type}; only BPE and unigram can be exported"
    )


def _merges(proto: Any) -> list[tuple[str, str]]:
    """The merges that SentencePiece's BPE makes, best first: any two neighbours whose union is a piece."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    mergeable = scores.keys()
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]


def _normalizer(proto: Any) -> normalizers.Normalizer:
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
