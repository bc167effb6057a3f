"""The tokenizer of an exported model, from a ``tokenizer.json`` or a SentencePiece model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from monet_train.errors import UserError
from monet_train.interop.convert_sentencepiece import convert_sentencepiece
from monet_train.model.config import MonetConfig

TOKENIZER_JSON = "tokenizer.json"
SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What may stand beside a tokenizer.json and belongs to it.
COMPANIONS = (TOKENIZER_CONFIG, "special_tokens_map.json", SENTENCEPIECE_MODEL)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a checkpoint folder, if it has one."""
    return next((folder / n for n in (TOKENIZER_JSON, SENTENCEPIECE_MODEL) if (folder / n).is_file()), None)


def load_tokenizer(file: Path) -> Tokenizer:
    """Read a ``tokenizer.json`` or a SentencePiece model.

    Raises:
        UserError: names a file that is missing or neither.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file; give a {TOKENIZER_JSON} or a SentencePiece model")
    if file.suffix != ".json":
        return convert_sentencepiece(file)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{file} is not a {TOKENIZER_JSON}: {error}") from None


def write_tokenizer(file: Path, config: MonetConfig, folder: Path) -> dict[str, int]:
    """Write the files from which ``AutoTokenizer.from_pretrained(folder)`` makes the tokenizer of ``file``.

    Args:
        file: a ``tokenizer.json`` (what stands beside it in COMPANIONS is taken along) or a SentencePiece model.

    Returns:
        ``bos_token_id`` and ``eos_token_id`` of the tokenizer, as far as it has them.

    Raises:
        UserError: the file cannot be read, or the tokenizer has more entries than the model has embeddings.
    """
    tokenizer = load_tokenizer(file)
    size = tokenizer.get_vocab_size()
    if size > config.vocab_size:
        raise UserError(
            f"{file} has {size} entries, the model only vocab_size={config.vocab_size}; give the model's own tokenizer"
        )
    if file.suffix == ".json":
        shutil.copyfile(file, folder / TOKENIZER_JSON)
        for name in COMPANIONS:
            if (file.parent / name).is_file():
                shutil.copyfile(file.parent / name, folder / name)
    else:
        tokenizer.save(str(folder / TOKENIZER_JSON))
        shutil.copyfile(file, folder / SENTENCEPIECE_MODEL)
    special = special_token_ids(file)
    if not (folder / TOKENIZER_CONFIG).is_file():
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            **{f"{name}_token": tokenizer.id_to_token(token_id) for name, token_id in special.items()},
        }
        (folder / TOKENIZER_CONFIG).write_text(
            json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return {f"{name}_token_id": special[name] for name in ("bos", "eos") if name in special}


def special_token_ids(file: Path) -> dict[str, int]:
    """Ids of ``bos``, ``eos`` and ``unk``, as far as the tokenizer has them: those that the shards were made with.

    Raises:
        UserError: the file cannot be read, or has no end-of-text token.
    """
    from data_prep.tokenizers import load_tokenizer as load_for_data  # here, because it imports this package

    record = load_for_data(file).record
    ids = {"bos": record.bos_id, "eos": record.eos_id, "unk": record.unk_id}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}
