"""Tokenizers: one record, one loader, one place that knows file names and what a tokenizer adds to a text.

A text becomes the same ids everywhere, in shards, in ``monet-generate`` and in an export: those of its characters
alone. Nothing is added before or after it, nothing is cut off, no merges are dropped at random, and the name
of a special token in a text is text.
"""

from monet_train.tokenizers.files import StoredTokenizer, find_tokenizer
from monet_train.tokenizers.load import load_tokenizer
from monet_train.tokenizers.record import TokenizerRecord
from monet_train.tokenizers.tokenizer import Tokenizer

__all__ = ["StoredTokenizer", "Tokenizer", "TokenizerRecord", "find_tokenizer", "load_tokenizer"]
