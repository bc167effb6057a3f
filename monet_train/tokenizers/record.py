"""What a manifest says about the tokenizer of its shards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made some shards; ``file`` is beside them."""

    file: str
    kind: str  # sentencepiece | huggingface
    sha256: str
    vocabulary_size: int
    eos_id: int
    bos_id: int | None
    unk_id: int | None
    pad_id: int | None = None

    @property
    def special_ids(self) -> set[int]:
        """Ids that no text may become: end, begin, and padding unless it is the unknown token."""
        padding = None if self.pad_id == self.unk_id else self.pad_id
        return {i for i in (self.eos_id, self.bos_id, padding) if i is not None}

    @property
    def config_ids(self) -> dict[str, int | None]:
        """The fields of a model's ``config.json`` that are the tokenizer's; null where it has no such token."""
        return {"bos_token_id": self.bos_id, "eos_token_id": self.eos_id}
