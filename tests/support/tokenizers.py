"""Small tokenizers that are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.corpora import real_texts, text_of


def byte_level(folder: Path, special: str, marked: bool = True) -> Path:
    """A tokenizer.json of bytes, frequent words and a last special token, which may be marked as special or not."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator([text_of(i) for i in range(50)], trainer)
    inner.add_tokens([tokenizers.AddedToken(special, special=marked)])
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return folder


LLAMA3 = "|".join(
    [r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
     r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]
)  # fmt: skip


def _bytes(words: list[str], split: pre_tokenizers.PreTokenizer, *special: str, **options: Any) -> tokenizers.Tokenizer:
    """A byte-level BPE of 600 entries."""
    inner = tokenizers.Tokenizer(models.BPE(**options))
    inner.pre_tokenizer = split
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    inner.train_from_iterator(words, trainer)
    return inner


def _around(inner: tokenizers.Tokenizer, single: str) -> processors.PostProcessor:
    """A template that puts special tokens around a text."""
    names = [(name, inner.token_to_id(name)) for name in single.split() if name != "$A"]
    return processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=names)


def _gpt2_of_another_split(words: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    inner = _bytes(words, split, "<|endoftext|>")
    return inner, {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}


def _llama3(words: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    inner = _bytes(words, split, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", ignore_merges=True)
    inner.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _around(inner, "<|begin_of_text|> $A")]
    )
    return inner, {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>",
        "add_bos_token": True, "clean_up_tokenization_spaces": True, "model_max_length": 4000,
        "chat_template": "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}",
    }  # fmt: skip


def _bert(words: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner.train_from_iterator(
        words, trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    )
    inner.post_processor = _around(inner, "[CLS] $A [SEP]")
    inner.enable_truncation(16)
    inner.enable_padding(pad_id=0, pad_token="[PAD]", length=16)
    names = {"eos": "[SEP]", "sep": "[SEP]", "cls": "[CLS]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}
    return inner, {
        "tokenizer_class": "BertTokenizer", "do_lower_case": False, **{f"{k}_token": v for k, v in names.items()}
    }  # fmt: skip


def _unigram_of_bytes(words: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(words, trainers.UnigramTrainer(vocab_size=400, show_progress=False))
    pieces = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    fallback = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    inner = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *fallback, *pieces], 0, True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = _around(inner, "<s> $A </s>")
    return inner, {"tokenizer_class": "XLMRobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}


def _roberta_with_dropout(words: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    inner = _bytes(words, pre_tokenizers.ByteLevel(True), "<s>", "</s>", "<mask>", dropout=0.5)
    inner.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    inner.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return inner, {
        "tokenizer_class": "RobertaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>",
        "add_prefix_space": False,
    }  # fmt: skip


def _llama2_by_merges(words: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    inner.train_from_iterator(
        [word for text in words for word in text.split()],
        trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False),
    )
    inner.post_processor = _around(inner, "<s> $A")
    return inner, {
        "tokenizer_class": "LlamaTokenizer", "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True},
        "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True, "legacy": True,
    }  # fmt: skip


def _added_tokens(words: list[str]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Added tokens about which the settings contradict the file."""
    inner = _bytes(words, pre_tokenizers.ByteLevel(False), "<|endoftext|>")
    inner.add_tokens(
        [
            tokenizers.AddedToken("<|code|>", lstrip=True, rstrip=True),
            tokenizers.AddedToken("<|x|>", single_word=True),
            tokenizers.AddedToken("Über", normalized=True),
        ]
    )
    inner.add_special_tokens([tokenizers.AddedToken("<|tool|>", rstrip=True)])
    ghost = {"content": "<|ghost|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return inner, {
        "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|code|>",
        "additional_special_tokens": ["<|code|>", "<|tool|>", "<|absent|>"],
        "added_tokens_decoder": {"900": ghost}, "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]},
    }  # fmt: skip


# Tokenizers that do something to a text on their own, or that their settings would rebuild otherwise, by name.
SELF_WILLED: dict[str, Callable[[list[str]], tuple[tokenizers.Tokenizer, dict[str, Any]]]] = {
    "gpt2 of another split": _gpt2_of_another_split,
    "llama 3": _llama3,
    "bert": _bert,
    "unigram of bytes": _unigram_of_bytes,
    "roberta with dropout": _roberta_with_dropout,
    "llama 2 by merges": _llama2_by_merges,
    "added tokens": _added_tokens,
}


def self_willed(name: str, folder: Path) -> Path:
    """Put one of SELF_WILLED into a folder with its settings; its file."""
    inner, settings = SELF_WILLED[name](real_texts())
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"
