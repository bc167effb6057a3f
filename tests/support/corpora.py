"""Small corpora whose documents are known."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

import numpy as np

from monet_train.data.manifest import Manifest
from monet_train.data.megatron import IndexedDataset, IndexedDatasetBuilder
from monet_train.tokenizers import Tokenizer

SENTENCES = (
    "The cat sat on the mat.\nЁжик в тумане, 北京欢迎你 — naïve café.\n"
    "\tdef f(x):\n        return x + 1\n# </ABCDEF> ok\n"
)


def text_of(number: int) -> str:
    """A document whose text contains its number."""
    return f"Document {number}.\n" + SENTENCES[number % 7 :] * (1 + number % 5)


def write_megatron(prefix: Path, documents: list[list[list[int]]]) -> Path:
    """A pair as Megatron's tools make it: documents of one or more sequences, no manifest."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(np.concatenate(document), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


def documents_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The decoded documents, with a check that each ends with the end-of-text token once."""
    texts = []
    for record in Manifest.read(folder).shards:
        shard = IndexedDataset(str(folder / record.name))
        for i in range(len(shard)):
            tokens = shard[i].tolist()
            assert tokens[-1] == tokenizer.record.eos_id and tokens.count(tokenizer.record.eos_id) == 1
            texts.append(tokenizer.decode(tokens[:-1]))
    return texts


def real_texts() -> list[str]:
    """Real text that every Python has: the sources of some standard modules."""
    import argparse
    import ast
    import difflib
    import email.message
    import encodings.idna
    import json.decoder
    import locale
    import statistics
    import this
    import unicodedata

    modules = (argparse, ast, difflib, email.message, encodings.idna, json.decoder, locale, statistics, this, textwrap)
    names = " ".join(unicodedata.lookup(f"CYRILLIC SMALL LETTER {n}") for n in ("A", "BE", "VE", "YA"))
    return [*(inspect.getsource(module) for module in modules), names, "数学と言語", "<|code|>x = 1\n\n<|code|> end"]
