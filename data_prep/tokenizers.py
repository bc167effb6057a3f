"""One face for SentencePiece models and Hugging Face tokenizer.json files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.files import sha256_file
from monet_train.data.manifest import TokenizerRecord
from monet_train.errors import UserError

END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>")
BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")


class Tokenizer(Protocol):
    """What preparation needs of a tokenizer."""

    path: Path
    record: TokenizerRecord

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` (LLaMA's, Mistral's, or one of ``monet-data tokenizer``)."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"tokenizer {path} is no SentencePiece model: {error}") from None
        if self.processor.eos_id() < 0:
            raise UserError(f"tokenizer {path} has no end-of-text token (eos), which ends every document: use another")
        self.record = TokenizerRecord(
            file="tokenizer.model",
            kind="sentencepiece",
            sha256=sha256_file(path),
            vocabulary_size=self.processor.get_piece_size(),
            eos_id=self.processor.eos_id(),
            bos_id=self.processor.bos_id() if self.processor.bos_id() >= 0 else None,
            unk_id=self.processor.unk_id() if self.processor.unk_id() >= 0 else None,
        )

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens."""
        return self.processor.encode(texts, return_type="numpy", num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return self.processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A Hugging Face ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises plain Exception
            raise UserError(f"tokenizer {path} is no Hugging Face tokenizer: {error}") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        named = _named_tokens(path.with_name("tokenizer_config.json"))
        eos = next((t for t in (named.get("eos_token"), *END_TOKENS) if t in vocabulary), None)
        bos = next((t for t in (named.get("bos_token"), *BEGIN_TOKENS) if t in vocabulary), None)
        if eos is None:
            raise UserError(
                f"tokenizer {path} has none of the end-of-text tokens {', '.join(END_TOKENS)}: name it as eos_token "
                "in tokenizer_config.json beside the file"
            )
        unk = next((vocabulary[t] for t in (named.get("unk_token"), "<unk>") if t in vocabulary), None)
        self.record = TokenizerRecord(
            file="tokenizer.json",
            kind="huggingface",
            sha256=sha256_file(path),
            vocabulary_size=max(vocabulary.values()) + 1,
            eos_id=vocabulary[eos],
            bos_id=vocabulary[bos] if bos else None,
            unk_id=unk,
        )

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens."""
        encoded = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(item.ids, dtype=np.int32) for item in encoded]

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from its file, or from the folder that holds it.

    Raises:
        UserError: there is none, it cannot be read, or it has no end-of-text token.
    """
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise UserError(
                f"tokenizer {path} holds neither tokenizer.model nor tokenizer.json: train one with "
                "`monet-data tokenizer`"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist: train one with `monet-data tokenizer`, or correct the path")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _named_tokens(config: Path) -> dict[str, str]:
    """Special tokens by role from tokenizer_config.json, if there is one."""
    if not config.is_file():
        return {}
    values = json.loads(config.read_text(encoding="utf-8"))
    tokens = {key: value for key, value in values.items() if key.endswith("_token")}
    return {key: v["content"] if isinstance(v, dict) else v for key, v in tokens.items() if v}
