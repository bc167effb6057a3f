"""The package fastokens: several times as fast as the tokenizers' own libraries, and used where its ids are theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monet_train.errors import UserError
from monet_train.tokenizers.convert_sentencepiece import BPE, USER_DEFINED, convert_sentencepiece, read_model
from monet_train.tokenizers.probes import probe_texts

COMPARED_CALLS = 16  # one call in this many is compared with the tokenizer's own library
COMPARED_CHARS = 200  # of its first text

Encode = Callable[[list[str]], list[list[int]]]


class FlatIds(NamedTuple):
    """Token ids of some texts, one after the other."""

    ids: np.ndarray  # uint32 [sum of lengths]
    ends: np.ndarray  # int64 [texts], where each text's ids end

    @classmethod
    def from_lists(cls, lists: list[list[int]]) -> FlatIds:
        """From the ids of each text."""
        ends = np.cumsum([len(ids) for ids in lists], dtype=np.int64)
        return cls(np.fromiter(chain.from_iterable(lists), np.uint32), ends)

    def lists(self) -> list[list[int]]:
        """The ids of each text."""
        return [part.tolist() for part in np.split(self.ids, self.ends[:-1])] if len(self.ends) else []


class FastEncoder:
    """Encodes in this thread, without special tokens: the name of one in a text is text."""

    def __init__(self, inner: Any, by_library: Encode) -> None:
        self._inner, self._by_library, self._calls = inner, by_library, count()

    @classmethod
    def for_json(cls, description: str, by_library: Encode, names: Iterable[str]) -> FastEncoder | None:
        """The encoder of a tokenizer.json's content, or None where it does not serve.

        Args:
            by_library: encodes with the tokenizer's own library.
            names: how special and added tokens are written; see ``probe_texts``, on which the ids have to be the same.
        """
        os.environ.setdefault("FASTOKENS_BPE_THREADS", "1")  # the worker processes are the parallelism
        probes = probe_texts(names)  # where a model has no `<` or `x`, this package reads `<0x0A>` as the byte
        try:
            import fastokens

            encoder = cls(fastokens.Tokenizer.from_json_str(description), by_library)
            same = encoder._flat(probes).lists() == by_library(probes)
        except (ImportError, ValueError, RuntimeError):  # not installed, or the tokenizer has unknown parts
            return None
        return encoder if same else None

    @classmethod
    def for_sentencepiece(cls, path: Path, by_library: Encode, special: Iterable[str]) -> FastEncoder | None:
        """The encoder of a SentencePiece model: for BPE with byte fallback and without user-defined symbols."""
        model = read_model(path)
        if model.trainer_spec.model_type != BPE or not model.trainer_spec.byte_fallback:
            return None
        if any(piece.type == USER_DEFINED for piece in model.pieces):
            return None
        description = convert_sentencepiece(path).to_str()
        return cls.for_json(description, by_library, special)

    def compare_next(self) -> None:
        """A process starts encoding: its first call is compared, then every COMPARED_CALLS-th."""
        self._calls = count()

    def encode(self, texts: list[str]) -> FlatIds:
        """Token ids of some texts.

        Raises:
            UserError: they are not those of the tokenizer's own library, as far as they are compared.
        """
        if texts and next(self._calls) % COMPARED_CALLS == 0:
            start = [texts[0][:COMPARED_CHARS]]
            if self._flat(start).lists() != self._by_library(start):
                raise UserError(
                    f"the package fastokens encodes {start[0][:40]!r} differently from the tokenizer's own library: "
                    "uninstall it (pip uninstall fastokens), delete the shards that it made, and run the command again"
                )
        return self._flat(texts)

    def _flat(self, texts: list[str]) -> FlatIds:
        ids, offsets = self._inner.encode_batch_flat(texts, split_special_tokens=True)
        return FlatIds(np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64)[1:].astype(np.int64))
