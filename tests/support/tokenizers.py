"""Small tokenizers that are known."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.support.corpora import text_of


def byte_level(folder: Path, special: str, marked: bool = True) -> Path:
    """A tokenizer.json of bytes, frequent words and a special token at the end, which is marked as such or not."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator([text_of(i) for i in range(50)], trainer)
    inner.add_tokens([tokenizers.AddedToken(special, special=marked)])
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return folder
