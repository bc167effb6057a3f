"""One interface for SentencePiece models and Hugging Face ``tokenizer.json`` files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

import numpy as np

from monet_train.errors import UserError
from monet_train.tokenizers.fast_encoder import FastEncoder, FlatIds
from monet_train.tokenizers.files import StoredTokenizer
from monet_train.tokenizers.record import TokenizerRecord

UNSEEN = "\U0010fffd\x01"  # characters that no tokenizer was trained on


class Tokenizer(StoredTokenizer, ABC):
    """A loaded tokenizer. Its ids are those of the text alone: see the package's docstring."""

    def __init__(self, path: Path, record: TokenizerRecord) -> None:
        super().__init__(path, record)
        self.fast: FastEncoder | None = None

    @abstractmethod
    def encode_by_library(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text by the tokenizer's own library, which ``fast`` is compared with."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of some ids, without special tokens."""

    @abstractmethod
    def to_json(self) -> bytes:
        """A ``tokenizer.json`` with the same ids.

        Raises:
            UserError: there is none for a tokenizer of this kind.
        """

    @property
    @abstractmethod
    def named_tokens(self) -> dict[str, str]:
        """How the special tokens are written, by their names in ``tokenizer_config.json`` (``eos_token``, ...)."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text."""
        return self._flat_ids(texts).lists()

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All texts one after the other, each with the end-of-text token: tokens uint32 [sum], lengths int32 [n]."""
        ids, ends = self._flat_ids(texts)
        tokens = np.insert(ids, ends, self.record.eos_id)
        return tokens, np.diff(ends, prepend=0).astype(np.int32) + np.int32(1)

    def _flat_ids(self, texts: list[str]) -> FlatIds:
        return self.fast.encode(texts) if self.fast else FlatIds.from_lists(self.encode_by_library(texts))


def refuse_special_tokens_of_text(tokenizer: Tokenizer, names: dict[str, int], marked: Collection[str] = ()) -> None:
    """Refuse a tokenizer that turns plain text into a special token: no document may end in its middle.

    Args:
        names: how the special tokens are written, and their ids.
        marked: those that the file marks as special.

    Raises:
        UserError: one is made from its own name, or from characters that are in no text.
    """
    for text in (*names, UNSEEN):
        made = set(tokenizer.encode([f"a{text} {text}"])[0])
        for name, number in names.items():
            if number in made:
                remedy = (
                    "its model has that as a piece too, and such a tokenizer.json is not supported: use its "
                    "SentencePiece .model, or another tokenizer"
                    if name in marked
                    else "mark it as special in the file, or use another tokenizer"
                )
                raise UserError(
                    f"tokenizer {tokenizer.path} makes its special token {name!r} from the plain text {text!r}: "
                    f"{remedy}"
                )
