"""A SentencePiece model as the ``tokenizer.json`` of the tokenizers library, with the same ids.

transformers 5 reads ``tokenizer.json``; what it makes of a bare ``tokenizer.model`` depends on the model type and
is not what SentencePiece does (no word-initial space, for one). So an export converts once, and compares.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as spm_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from monet_train.errors import UserError
from monet_train.tokenizers.probes import probe_texts

SPACE = "▁"  # how SentencePiece writes a space inside a piece
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type


def read_model(file: Path) -> Any:
    """A SentencePiece model as its protocol buffer.

    Raises:
        UserError: the file is not a SentencePiece model.
    """
    model: Any = spm_pb2.ModelProto()  # type: ignore[attr-defined]  # generated at run time
    try:
        model.ParseFromString(file.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise UserError(f"{file} is not a SentencePiece model: {error}") from None
    return model


def convert_sentencepiece(file: Path) -> Tokenizer:
    """A SentencePiece model (BPE or unigram) as a tokenizer of the tokenizers library.

    The ids are those of SentencePiece for BPE; for unigram see :func:`convert_unigram`. Control symbols (<s>, </s>,
    ...) become special tokens. Like SentencePiece it reads them in a text as characters, if it is told to
    (``encode_special_tokens``). Nothing is added to a text on encoding.

    Raises:
        UserError: the file is not a SentencePiece model, or of a kind that cannot be converted.
    """
    proto = read_model(file)
    tokenizer = Tokenizer(_model(proto, file))
    tokenizer.normalizer = _normalizer(proto)
    if symbols := [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]:
        tokenizer.pre_tokenizer = _isolate(symbols, proto)
    tokenizer.decoder = _decoder(proto)
    tokenizer.add_special_tokens(
        [AddedToken(p.piece, special=True, normalized=False) for p in proto.pieces if p.type in (UNKNOWN, CONTROL)]
    )
    return tokenizer


def convert_unigram(file: Path, original: SentencePieceProcessor, names: Iterable[str]) -> Tokenizer | None:
    """The conversion of a unigram model, to encode in the place of SentencePiece; None where SentencePiece has to.

    Both libraries search for the most probable segmentation, and of equals take the one whose last piece is longest.
    But SentencePiece adds up the scores of a whole text in fp32, the tokenizers library in fp64. So rounding decides
    between equals, and in a text of a million characters also between segmentations that differ by a tenth. No scores
    make them agree, and transformers has the second one only: shards and generation take it too.

    Args:
        original: the same model in SentencePiece.
        names: how special tokens are written; see ``probe_texts``, on which the conversion has to be as good.
    """
    proto = read_model(file)
    if proto.trainer_spec.model_type != UNIGRAM:
        return None
    converted = convert_sentencepiece(file)
    converted.encode_special_tokens = True
    symbols = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    for text in probe_texts([*names, *symbols]):
        ids, expected = converted.encode(text, add_special_tokens=False).ids, original.encode(text)
        if ids != expected and not equally_probable(original, ids, expected):
            return None
    return converted


def equally_probable(model: SentencePieceProcessor, one: list[int], other: list[int]) -> bool:
    """Whether a unigram model gives two segmentations of a short text the same probability, up to rounding."""
    return math.isclose(sum(map(model.get_score, one)), sum(map(model.get_score, other)), abs_tol=1e-3)


def _model(proto: Any, file: Path) -> models.Model:
    trainer = proto.trainer_spec
    if trainer.model_type == UNIGRAM:
        return models.Unigram(
            list(zip((piece.piece for piece in proto.pieces), _scores(proto), strict=True)),
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
            # a piece alone between user-defined symbols is taken whole
            ignore_merges=any(piece.type == USER_DEFINED for piece in proto.pieces),
        )
    raise UserError(
        f"{file} is a SentencePiece model of type {trainer.model_type}; only BPE and unigram can be exported"
    )


def _scores(proto: Any) -> list[float]:
    """The scores of a unigram model's pieces; those that no text may spell out are so low that no text does.

    SentencePiece never looks for a control symbol or a byte piece in a text, the tokenizers library does. The score of
    an unknown character goes down with them: as long as no piece has a character that is not a piece too, such a
    character is unknown in every segmentation, and what it costs decides nothing.
    """
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)}
    scores = [piece.score for piece in proto.pieces]
    spelled = "".join(piece.piece for piece in proto.pieces if piece.type == NORMAL)  # the user's symbols stand alone
    if not set(spelled) <= normal.keys():
        return scores
    longest = max(len(piece.piece) for piece in proto.pieces)
    lowest = (min(normal.values()) - 10) * (longest + 1)  # below that of any spelling; 10: SentencePiece's penalty
    return [score if piece.piece in normal else lowest for piece, score in zip(proto.pieces, scores, strict=True)]


def _isolate(symbols: list[str], proto: Any) -> pre_tokenizers.PreTokenizer:
    """SentencePiece takes user-defined symbols out of the text first, the longest at each place.

    What is then alone is looked up whole (see ``ignore_merges``), as SentencePiece's merges would have it, but for
    the name of a control symbol or of a byte, which SentencePiece spells: it is cut where its first piece ends.
    """
    longest_first = sorted(symbols, key=len, reverse=True)
    steps = [pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")]
    processor, border = SentencePieceProcessor(model_proto=proto.SerializeToString()), symbols[0]
    cuts = []
    for name in (piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, BYTE)):
        pieces = processor.encode(f"{border}{name}{border}", out_type=str)
        spelled = pieces[pieces.index(border) + 1 : -1]
        if len(spelled) > 1 and "".join(spelled) == name:
            cuts.append(rf"{re.escape(spelled[0])}(?={re.escape(name[len(spelled[0]) :])}\z)")
    if cuts:
        steps.append(pre_tokenizers.Split(Regex(rf"\A(?:{'|'.join(cuts)})"), "isolated"))
    return pre_tokenizers.Sequence(steps)


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
        # spaces alone, and at the end what reads like one: Strip() would take line breaks and the like too
        ends = Regex(rf"\A +|[ {SPACE}]+\z")
        steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(proto: Any) -> decoders.Decoder:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
