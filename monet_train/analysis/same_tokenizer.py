"""Whether text was made into tokens by the tokenizer of the model that is to read it."""

from __future__ import annotations

from pathlib import Path

from monet_train.data.shards import ShardSet
from monet_train.errors import UserError
from monet_train.fingerprint import sha256_file
from monet_train.tokenizers import find_tokenizer, load_tokenizer
from monet_train.tokenizers.probes import PROBES


def check_same_tokenizer(model: Path, shards: ShardSet) -> None:
    """Compare the tokenizer of a model's folder with that of shards: the files, or else their ids of probe texts.

    Raises:
        UserError: the model has none, or another one.
    """
    remedy = f"prepare the text with the model's: monet-data shards ... --tokenizer {model}"
    file, stored = find_tokenizer(model), shards.tokenizer
    if file is None or stored is None:
        raise UserError(f"{model} holds no tokenizer, so that its tokens may not be those of {shards.path}: {remedy}")
    if sha256_file(file) == stored.record.sha256:
        return
    ours, theirs = (load_tokenizer(path).encode(list(PROBES)) for path in (file, stored.path))
    if [list(ids) for ids in ours] != [list(ids) for ids in theirs]:
        raise UserError(f"{shards.path} was not made with the tokenizer of {model}: {remedy}")
