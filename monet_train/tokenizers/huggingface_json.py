"""Hugging Face ``tokenizer.json`` files."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from monet_train.errors import UserError
from monet_train.fingerprint import sha256_file
from monet_train.tokenizers.fast_encoder import FastEncoder
from monet_train.tokenizers.files import TOKENIZER_CONFIG, TOKENIZER_JSON
from monet_train.tokenizers.record import TokenizerRecord
from monet_train.tokenizers.special_tokens import named_tokens
from monet_train.tokenizers.tokenizer import Tokenizer, refuse_special_tokens_of_text

END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>")
BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
PADDING_TOKENS = ("<pad>", "<|pad|>")
OTHER_ROLES = ("sep_token", "cls_token", "mask_token")  # which documents do not need, but an export names


def text_alone(description: dict[str, Any]) -> dict[str, Any]:
    """What a ``tokenizer.json`` says, without anything that it does to a text besides turning it into ids.

    Left out are the template that puts tokens around a text, truncation, padding, and BPE's dropout, which leaves out
    merges at random.
    """
    model = description["model"]
    if model.get("dropout") is not None:
        model = {**model, "dropout": None}
    return {
        **description,
        "model": model,
        "truncation": None,
        "padding": None,
        "post_processor": _offsets_alone(description.get("post_processor")),
    }


def _offsets_alone(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """The parts of a post-processor that change offsets but no ids."""
    if processor is not None and processor["type"] == "Sequence":
        kept = [inner for inner in map(_offsets_alone, processor["processors"]) if inner is not None]
        return {**processor, "processors": kept} if kept else None
    return processor if processor is not None and processor["type"] == "ByteLevel" else None


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises plain Exception
            raise UserError(
                f"tokenizer {path} is not a {TOKENIZER_JSON} ({error}): restore it, or give another tokenizer"
            ) from None
        original = json.loads(self.inner.to_str())
        self._description = text_alone(original)
        self._is_changed = self._description != original
        if self._is_changed:
            self.inner = tokenizers.Tokenizer.from_str(json.dumps(self._description))
        self.inner.encode_special_tokens = True  # the name of a special token in a text is text
        self._vocabulary = self.inner.get_vocab(with_added_tokens=True)
        super().__init__(path, self._make_record(path, self._vocabulary))
        added = {token.content: token for token in self.inner.get_added_tokens_decoder().values()}
        self.fast = FastEncoder.for_json(json.dumps(self._description), self.encode_by_library, added)
        special = {text: i for text, i in self._vocabulary.items() if i in self.record.special_ids}
        refuse_special_tokens_of_text(self, special, [name for name, token in added.items() if token.special])

    def _make_record(self, path: Path, vocabulary: dict[str, int]) -> TokenizerRecord:
        named = named_tokens(path.parent)
        for role, token in named.items():
            if token.text not in vocabulary:
                raise UserError(
                    f"{token.source}: {role}: {token.text!r} is not in the vocabulary of {path}: correct it, or "
                    "restore the two files that belong together"
                )

        def find(role: str, usual: tuple[str, ...]) -> int | None:
            texts = (named[role].text, *usual) if role in named else usual
            return next((vocabulary[text] for text in texts if text in vocabulary), None)

        eos = find("eos_token", END_TOKENS)
        if eos is None:
            raise UserError(
                f"tokenizer {path} has none of the end-of-text tokens {', '.join(END_TOKENS)}: name it as eos_token "
                f"in {TOKENIZER_CONFIG} beside the file"
            )
        model = self._description["model"]  # has the unknown token or, for Unigram, its id
        unknown = vocabulary.get(model.get("unk_token"), model.get("unk_id"))
        return TokenizerRecord(
            file=TOKENIZER_JSON,
            kind="huggingface",
            sha256=sha256_file(path),
            vocabulary_size=max(vocabulary.values()) + 1,
            eos_id=eos,
            bos_id=find("bos_token", BEGIN_TOKENS),
            unk_id=find("unk_token", ("<unk>",)) if unknown is None else unknown,
            pad_id=find("pad_token", PADDING_TOKENS),
        )

    def encode_by_library(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text by the package tokenizers."""
        return [item.ids for item in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of some ids, without special tokens."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_json(self) -> bytes:
        """The file as it is, without what it would add to a text."""
        if not self._is_changed:
            return self.path.read_bytes()
        return json.dumps(self._description, ensure_ascii=False).encode()

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """How the special tokens are written, by their names in ``tokenizer_config.json``."""
        record = self.record
        ids = {"bos": record.bos_id, "eos": record.eos_id, "unk": record.unk_id, "pad": record.pad_id}
        texts = {number: text for text, number in self._vocabulary.items()}
        others = named_tokens(self.path.parent, OTHER_ROLES)
        return {
            **{f"{name}_token": texts[i] for name, i in ids.items() if i is not None},
            **{role: token.text for role, token in others.items() if token.text in self._vocabulary},
        }
