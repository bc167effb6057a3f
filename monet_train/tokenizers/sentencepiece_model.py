"""SentencePiece models: LLaMA's, Mistral's, and those of ``monet-data tokenizer``."""

from __future__ import annotations

from pathlib import Path

from monet_train.errors import UserError
from monet_train.fingerprint import sha256_file
from monet_train.tokenizers.convert_sentencepiece import convert_sentencepiece, convert_unigram
from monet_train.tokenizers.fast_encoder import FastEncoder
from monet_train.tokenizers.files import SENTENCEPIECE_MODEL, TOKENIZER_JSON
from monet_train.tokenizers.record import TokenizerRecord
from monet_train.tokenizers.tokenizer import Tokenizer, refuse_special_tokens_of_text


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model``.

    BPE models are encoded by SentencePiece, unigram models by their conversion, as their exports are: see
    :func:`convert_unigram`.
    """

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            beside = path.with_name(TOKENIZER_JSON)
            raise UserError(
                f"tokenizer {path} is not a SentencePiece model ({error}): "
                + (f"give {beside}" if beside.is_file() else f"give a .model of SentencePiece or a {TOKENIZER_JSON}")
            ) from None
        if self.processor.eos_id() < 0:
            raise UserError(f"tokenizer {path} has no end-of-text token (eos), which ends every document: use another")
        record = TokenizerRecord(
            file=SENTENCEPIECE_MODEL,
            kind="sentencepiece",
            sha256=sha256_file(path),
            vocabulary_size=self.processor.get_piece_size(),
            eos_id=self.processor.eos_id(),
            bos_id=_id_or_none(self.processor.bos_id()),
            unk_id=_id_or_none(self.processor.unk_id()),
            pad_id=_id_or_none(self.processor.pad_id()),
        )
        super().__init__(path, record)
        special = {self.processor.id_to_piece(i): i for i in record.special_ids}
        self._unigram = convert_unigram(path, self.processor, special)
        self.fast = FastEncoder.for_sentencepiece(path, self.encode_by_library, special)
        refuse_special_tokens_of_text(self, special)

    def encode_by_library(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text by SentencePiece, or by the conversion of a unigram model."""
        if self._unigram:
            return [item.ids for item in self._unigram.encode_batch_fast(texts, add_special_tokens=False)]
        return self.processor.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids, without special tokens."""
        return self.processor.decode([int(i) for i in ids])

    def to_json(self) -> bytes:
        """The conversion to a ``tokenizer.json``.

        Raises:
            UserError: the model is neither BPE nor unigram.
        """
        return convert_sentencepiece(self.path).to_str(pretty=True).encode()

    @property
    def named_tokens(self) -> dict[str, str]:
        """How the special tokens are written, by their names in ``tokenizer_config.json``."""
        record = self.record
        ids = {"bos": record.bos_id, "eos": record.eos_id, "unk": record.unk_id, "pad": record.pad_id}
        return {f"{name}_token": self.processor.id_to_piece(i) for name, i in ids.items() if i is not None}


def _id_or_none(number: int) -> int | None:
    """The id of a special token; SentencePiece gives -1 where there is none."""
    return number if number >= 0 else None
