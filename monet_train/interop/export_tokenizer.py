"""The tokenizer of an export: ``AutoTokenizer`` gives the ids of the shards, or the export is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer, load_tokenizer
from monet_train.tokenizers.files import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    SENTENCEPIECE_MODEL,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    companions,
)
from monet_train.tokenizers.probes import PROBES, probe_texts
from monet_train.tokenizers.special_tokens import read_companion

# Settings that an export takes over from the tokenizer's own tokenizer_config.json. The others rebuild the tokenizer
# (its class, `add_prefix_space`), add something to a text (`add_bos_token`) or are made below.
KEPT_SETTINGS = (
    "model_max_length", "padding_side", "truncation_side", "chat_template", "chat_control_tokens", "response_template",
)  # fmt: skip


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, vocab_size: int, context: int) -> None:
    """Write the files from which ``AutoTokenizer.from_pretrained(folder)`` makes the tokenizer.

    Args:
        folder: of the export; it gets ``tokenizer.json``, ``tokenizer_config.json`` and what belongs to them.
        vocab_size: number of the model's embeddings.
        context: tokens that the model reads; the tokenizer's own limit comes first.

    Raises:
        UserError: the tokenizer has more entries than the model has embeddings, cannot be written as a
            ``tokenizer.json``, or transformers makes other ids of a text than the shards have.
    """
    size = tokenizer.record.vocabulary_size
    if size > vocab_size:
        raise UserError(
            f"{tokenizer.path} has {size} entries, the model only vocab_size={vocab_size}; give the model's own "
            "tokenizer"
        )
    content = tokenizer.to_json()
    (folder / TOKENIZER_JSON).write_bytes(content)
    if model := _sentencepiece_model(tokenizer):
        shutil.copyfile(model, folder / SENTENCEPIECE_MODEL)
    added: list[dict[str, Any]] = json.loads(content)["added_tokens"]
    _write_settings(tokenizer, folder, context, {token["content"]: token["special"] for token in added})
    _compare(tokenizer, folder, [token["content"] for token in added])


def _sentencepiece_model(tokenizer: Tokenizer) -> Path | None:
    """The SentencePiece model to export too: the tokenizer itself, or one beside a ``tokenizer.json`` of the same ids.

    With other ids it would be found in place of the ``tokenizer.json``.
    """
    if tokenizer.record.file == SENTENCEPIECE_MODEL:
        return tokenizer.path
    beside = tokenizer.path.with_name(SENTENCEPIECE_MODEL)
    if not beside.is_file():
        return None
    try:
        other = load_tokenizer(beside)
    except UserError:  # some are not SentencePiece's
        return None
    same = other.record.config_ids == tokenizer.record.config_ids
    return beside if same and other.encode([*PROBES]) == tokenizer.encode([*PROBES]) else None


def _write_settings(tokenizer: Tokenizer, folder: Path, context: int, is_special: dict[str, bool]) -> None:
    """Write ``tokenizer_config.json`` and copy the chat templates.

    Args:
        is_special: for each added token, whether ``tokenizer.json`` marks it as special. One that is not is found in a
            text; to name it would make it special, and then it would not be.
    """
    source = tokenizer.path.parent
    given = read_companion(source / TOKENIZER_CONFIG)
    names = {role: text for role, text in tokenizer.named_tokens.items() if is_special.get(text, True)}
    extra = given.get("extra_special_tokens") or given.get("additional_special_tokens") or []
    extra = [token.get("content") if isinstance(token, dict) else token for token in extra]
    settings = {
        "model_max_length": context,
        **{key: given[key] for key in KEPT_SETTINGS if key in given},
        **names,
        "extra_special_tokens": [token for token in extra if is_special.get(token, False)],
        "tokenizer_class": "PreTrainedTokenizerFast",  # reads tokenizer.json as it is; others rebuild parts of it
        "split_special_tokens": True,  # the name of a special token in a text is text
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(folder / TOKENIZER_CONFIG, settings)
    if (source / SPECIAL_TOKENS_MAP).is_file():
        _write_json(folder / SPECIAL_TOKENS_MAP, names)
    for name, file in companions(source).items():
        if name == CHAT_TEMPLATE or name.startswith(f"{CHAT_TEMPLATES}/"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer of an export has a chat template, whose special tokens are to be read as such."""
    return (folder / CHAT_TEMPLATE).is_file() or "chat_template" in read_companion(folder / TOKENIZER_CONFIG)


def _compare(tokenizer: Tokenizer, folder: Path, added: list[str]) -> None:
    """Refuse an export whose ``AutoTokenizer`` makes other ids than the shards have."""
    from transformers import AutoTokenizer, PretrainedConfig

    # A configuration given here keeps it from running the export's own, which is remote code to it.
    rebuilt = AutoTokenizer.from_pretrained(folder, config=PretrainedConfig())
    texts = probe_texts(dict.fromkeys([*tokenizer.named_tokens.values(), *added]))
    for text, expected in zip(texts, tokenizer.encode(texts), strict=True):
        ids = rebuilt(text, verbose=False)["input_ids"]
        if ids != expected:
            raise UserError(
                f"{tokenizer.path}: transformers encodes {text[:40]!r} as {ids[:8]}, the shards have {expected[:8]}: "
                "such a tokenizer cannot be exported; move it out of the checkpoint to export the model alone"
            )
    for role, number in (("bos", tokenizer.record.bos_id), ("eos", tokenizer.record.eos_id)):
        found = getattr(rebuilt, f"{role}_token_id")
        if found != number:
            raise UserError(
                f"{tokenizer.path}: transformers takes {found} for {role}_token_id, the shards have {number}: mark "
                "the token as special in the file"
            )
