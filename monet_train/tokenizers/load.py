"""The one loader of tokenizers."""

from __future__ import annotations

from pathlib import Path

from monet_train.tokenizers.files import resolve_tokenizer
from monet_train.tokenizers.huggingface_json import HuggingFaceTokenizer
from monet_train.tokenizers.sentencepiece_model import SentencePieceTokenizer
from monet_train.tokenizers.tokenizer import Tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from its file, from the folder that holds it, or from ``PACKAGE:FILE`` of a Python package.

    Raises:
        UserError: there is none, it cannot be read, it has no end-of-text token, or plain text can become one.
    """
    file = resolve_tokenizer(Path(path))
    tokenizer = HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
    if tokenizer.fast:
        tokenizer.fast.compare_next()
    return tokenizer
