"""One face for SentencePiece models and Hugging Face tokenizer.json files."""

from __future__ import annotations

import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

import numpy as np

from data_prep.fast_encoder import FastEncoder, Flat
from data_prep.files import sha256_file
from monet_train.data.manifest import TokenizerRecord
from monet_train.durable import write_atomically
from monet_train.errors import UserError

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
CONFIG_NAME = "tokenizer_config.json"  # names the special tokens of a tokenizer.json
ROLES = ("eos_token", "bos_token", "unk_token", "pad_token")
END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>")
BEGIN_TOKENS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>")
UNHEARD_OF = "\U0010fffd\x01"  # characters that no tokenizer was trained on


class Tokenizer(ABC):
    """What preparation needs of a tokenizer."""

    path: Path
    record: TokenizerRecord
    fast: FastEncoder | None

    @abstractmethod
    def encode_plainly(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, by the tokenizer's own library."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return self._flat(texts).lists()

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""

    def copy_to(self, folder: Path, writer: str = "") -> None:
        """Put the tokenizer into a folder, durably, so that ``load_tokenizer`` finds it there."""
        write_atomically(folder / self.record.file, self.path.read_bytes(), writer)

    def check_special_tokens(self, names: dict[str, int], marked: Collection[str] = ()) -> None:
        """Refuse a tokenizer that makes a special token out of plain text: a document must not end within itself.

        Args:
            names: how the special tokens are written, and their ids.
            marked: those that the file marks as special.

        Raises:
            UserError: one is made of its own name, or of characters that are in no text.
        """
        for text in (*names, UNHEARD_OF):
            made = set(self.encode([f"a{text} {text}"])[0])
            for name, number in names.items():
                if number in made:
                    remedy = (
                        "its model has that as a piece too, and such a tokenizer.json is not supported: use its "
                        "SentencePiece .model, or another tokenizer"
                        if name in marked
                        else "mark it as special in the file, or use another tokenizer"
                    )
                    raise UserError(
                        f"tokenizer {self.path} makes its special token {name!r} out of the plain text {text!r}: "
                        + remedy
                    )

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """All texts one after the other, each with the end-of-text token: tokens uint32 [sum], lengths int32 [n]."""
        ids, ends = self._flat(texts)
        tokens = np.insert(ids, ends, self.record.eos_id)
        return tokens, np.diff(ends, prepend=0).astype(np.int32) + np.int32(1)

    def _flat(self, texts: list[str]) -> Flat:
        return self.fast.encode(texts) if self.fast else Flat.of(self.encode_plainly(texts))


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` (LLaMA's, Mistral's, or one of ``monet-data tokenizer``)."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self.path = path
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"tokenizer {path} is no SentencePiece model: {error}") from None
        if self.processor.eos_id() < 0:
            raise UserError(f"tokenizer {path} has no end-of-text token (eos), which ends every document: use another")
        self.record = TokenizerRecord(
            file="tokenizer.model",
            kind="sentencepiece",
            sha256=sha256_file(path),
            vocabulary_size=self.processor.get_piece_size(),
            eos_id=self.processor.eos_id(),
            bos_id=_known(self.processor.bos_id()),
            unk_id=_known(self.processor.unk_id()),
            pad_id=_known(self.processor.pad_id()),
        )
        special = {self.processor.id_to_piece(i): i for i in self.record.special_ids}
        self.fast = FastEncoder.of_sentencepiece(path, self.encode_plainly, special)
        self.check_special_tokens(special)

    def encode_plainly(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, by SentencePiece."""
        return self.processor.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return self.processor.decode([int(i) for i in ids])


def _known(number: int) -> int | None:
    """SentencePiece's number of a special token, of which -1 says that there is none."""
    return number if number >= 0 else None


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        try:
            self.inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises plain Exception
            raise UserError(f"tokenizer {path} is no Hugging Face tokenizer: {error}") from None
        self.inner.no_truncation()
        self.inner.no_padding()
        if getattr(self.inner.model, "dropout", None):  # merges left out at random: other shards from every run
            self.inner.model.dropout = None
        self.inner.encode_special_tokens = True  # the name of a special token in a text is text
        vocabulary = self.inner.get_vocab(with_added_tokens=True)
        description = self.inner.to_str()
        model = json.loads(description)["model"]  # with its unknown token or, Unigram, the id of that
        unknown_id = vocabulary.get(model.get("unk_token"), model.get("unk_id"))
        config = path.with_name(CONFIG_NAME)
        named = _named_tokens(config)
        for role, name in named.items():
            if name not in vocabulary:
                raise UserError(
                    f"{config}: {role}: {name!r} is not in the vocabulary of {path}: correct it, or restore the two "
                    "files that belong together"
                )

        def find(role: str, usual: tuple[str, ...]) -> int | None:
            return next((vocabulary[t] for t in (named.get(role), *usual) if t in vocabulary), None)

        eos = find("eos_token", END_TOKENS)
        if eos is None:
            raise UserError(
                f"tokenizer {path} has none of the end-of-text tokens {', '.join(END_TOKENS)}: name it as eos_token "
                f"in {CONFIG_NAME} beside the file"
            )
        self.record = TokenizerRecord(
            file="tokenizer.json",
            kind="huggingface",
            sha256=sha256_file(path),
            vocabulary_size=max(vocabulary.values()) + 1,
            eos_id=eos,
            bos_id=find("bos_token", BEGIN_TOKENS),
            unk_id=find("unk_token", ("<unk>",)) if unknown_id is None else unknown_id,
            pad_id=find("pad_token", ("<pad>", "<|pad|>")),
        )
        special = {text: i for text, i in vocabulary.items() if i in self.record.special_ids}
        added = {token.content: token for token in self.inner.get_added_tokens_decoder().values()}
        self.fast = FastEncoder.of(description, self.encode_plainly, added)
        self.check_special_tokens(special, [name for name, token in added.items() if token.special])

    def copy_to(self, folder: Path, writer: str = "") -> None:
        """Put the tokenizer into a folder, with the file that names its special tokens."""
        config = self.path.with_name(CONFIG_NAME)
        if config.is_file():
            write_atomically(folder / CONFIG_NAME, config.read_bytes(), writer)
        super().copy_to(folder, writer)

    def encode_plainly(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens, by the package tokenizers."""
        return [item.ids for item in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from its file, from the folder that holds it, or from ``PACKAGE:FILE`` of a Python package.

    Raises:
        UserError: there is none, it cannot be read, or it has no end-of-text token.
    """
    try:
        file = _find_file(path)
    except PermissionError as error:
        raise UserError(
            f"tokenizer {path} cannot be read ({error.filename}: {error.strerror}): get the right to read it, or copy "
            "it to where you have that"
        ) from None
    tokenizer = HuggingFaceTokenizer(file) if file.suffix == ".json" else SentencePieceTokenizer(file)
    if tokenizer.fast:
        tokenizer.fast.compare_next()
    return tokenizer


def _find_file(path: Path) -> Path:
    """The file of a tokenizer."""
    package, _, inside = str(path).partition(":")
    if inside and not path.exists():
        specification = importlib.util.find_spec(package) if package.isidentifier() else None
        if specification is None or specification.origin is None:
            raise UserError(f"tokenizer {path}: there is no installed package {package!r}: pip install it")
        path = Path(specification.origin).parent / inside
    if path.is_dir():
        found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        if not found:
            raise UserError(
                f"tokenizer {path} holds neither tokenizer.model nor tokenizer.json: train one with "
                "`monet-data tokenizer`"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist: train one with `monet-data tokenizer`, or correct the path")
    return path


def _named_tokens(config: Path) -> dict[str, str]:
    """Special tokens by role from tokenizer_config.json, if there is one."""
    if not config.is_file():
        return {}
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config} cannot be read: {error}: restore the file that came with the tokenizer") from None
    if not isinstance(values, dict):
        raise UserError(f"{config} is no JSON object: restore the file that came with the tokenizer")
    named: dict[str, str] = {}
    for role in ROLES:
        token = values.get(role) or ""
        name = token.get("content") if isinstance(token, dict) else token
        if not isinstance(name, str):
            raise UserError(
                f'{config}: {role}: {json.dumps(token)} names no token: write the token, as in "</s>", or '
                '{"content": "</s>"}'
            )
        if name:
            named[role] = name
    return named
