"""A SentencePiece model as the ``tokenizer.json`` of the tokenizers library, with the same ids.

transformers 5 reads ``tokenizer.json``; what it makes of a bare ``tokenizer.model`` depends on the model type and
is not what SentencePiece does (no word-initial space, for one). So an export converts once, and compares.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as spm_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from monet_train.errors import UserError

SPACE = "▁"  # how SentencePiece writes a space inside a piece
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type

# What conversions get wrong: runs of spaces, line breaks, leading and trailing spaces, digits, rare characters.
PROBES = (
    "Hello world", " two  spaces   and\ttabs\t\t", "def f(x):\n    if x:\n        return 0\n\n\n", "x" * 40,
    "3.14159 + 2,718 = 1234567890", "naïve café, ½ ﬁne Ⅳ, Übergröße", "日本語とрусский язык",
    "🙂👩‍👩‍👧‍👦 \u200b\u00a0 e\u0301", "=" * 79, " " * 23 + "}", "\n\n  \n", "", " ", "a", "▁",
)  # fmt: skip


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
