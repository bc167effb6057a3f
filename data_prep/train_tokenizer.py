"""``monet-data tokenizer``: train a SentencePiece model, or copy an existing one, and report how well it fits."""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.chunks import read_chunks
from data_prep.documents import Document, parse
from data_prep.journal import exclusive
from data_prep.recipe import LABELS, Recipe
from data_prep.sources import Part, list_parts
from monet_train.durable import write_atomically
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer, find_tokenizer, load_tokenizer
from monet_train.tokenizers.files import SENTENCEPIECE_MODEL

PIECE_CHARS = 2000  # documents are cut into pieces of this length for the trainer
REPORT_BYTES = 1_000_000  # of each source, for the report
REPORT_NAME = "report.json"
NO_DOCUMENT = "the sources hold no document: check the paths, --text-field and the filters"


@dataclass(frozen=True)
class TokenizerOptions:
    """Settings of the training."""

    vocab_size: int | None  # None: do not train, but use ``existing``
    model_type: str = "bpe"  # bpe | unigram
    sample_bytes: int = 100_000_000  # of text to learn from
    normalization: str = "identity"  # SentencePiece's rule: identity | nfkc | nmt_nfkc ...
    existing: Path | None = None  # a tokenizer to report on


def make_tokenizer(recipe: Recipe, options: TokenizerOptions, folder: Path) -> dict[str, Any]:
    """Train a tokenizer into ``folder``, or copy the existing one, and write report.json, which is returned.

    Raises:
        UserError: the folder has another tokenizer, there is no text, or the vocabulary does not fit the text.
    """
    parts = list_parts(recipe)
    existing = load_tokenizer(options.existing) if options.existing else None
    asked = {
        **asdict(options),
        "existing": existing.record.sha256 if existing else None,
        "sources": [source.describe() for source in recipe.sources],
        "files": [part.identity() for part in parts],
        "max_documents": recipe.max_documents,
        "max_bytes": recipe.max_bytes,
    }
    with exclusive(folder):
        if find_tokenizer(folder):
            return _existing_report(folder, asked)
        return _make_tokenizer(recipe, options, folder, parts, existing, asked)


def _make_tokenizer(
    recipe: Recipe, options: TokenizerOptions, folder: Path, parts: list[Part], existing: Tokenizer | None,
    asked: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    budget = min(options.sample_bytes, recipe.max_bytes or options.sample_bytes)
    texts = _Sample(parts, budget, recipe.max_documents)
    model = folder / f".{SENTENCEPIECE_MODEL}"
    try:
        if existing is None:
            write_atomically(model, _train(texts, options))
        else:
            deque(texts, maxlen=0)  # reading fills texts.kept
        if not texts.kept:
            raise UserError(NO_DOCUMENT)
        tokenizer = existing or load_tokenizer(model)
        report = {"asked": asked, "sampled_bytes": texts.bytes, **tokenizer_report(tokenizer, texts.kept)}
        write_atomically(folder / REPORT_NAME, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
        tokenizer.copy_to(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): make room or choose another --out") from None
    finally:
        model.unlink(missing_ok=True)
    return report


def _existing_report(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    path = folder / REPORT_NAME
    try:
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get("asked") != asked:
        raise UserError(
            f"{folder} has another tokenizer (other options, source files that changed since, or no whole "
            f"{REPORT_NAME}): choose another --out, or delete it (rm -r {folder}) and run the command again"
        )
    return report


class _Sample:
    """Pieces of text for the trainer: the same number of bytes from every part, from its start.

    Iterating fills ``bytes`` and ``kept`` (documents for the report, by source).
    """

    def __init__(self, parts: list[Part], budget: int, max_documents: int | None) -> None:
        self.bytes = 0
        self.kept: dict[str, list[str]] = {}
        self._parts, self._budget, self._max_documents = parts, budget, max_documents
        self._kept_bytes: dict[str, int] = {}

    def __iter__(self) -> Iterator[str]:
        documents = 0
        with tqdm(total=self._budget, unit="B", unit_scale=True, desc="reading text", disable=None) as progress:
            for number, part in enumerate(self._parts):
                share = (self._budget - self.bytes) // (len(self._parts) - number)
                taken = 0
                for document in _documents(part):
                    if taken >= share or documents == self._max_documents:
                        break
                    size = document.size
                    taken += size
                    documents += 1
                    self._keep(part, document, size)
                    progress.update(size)
                    yield from cut(document.text)
                self.bytes += taken

    def _keep(self, part: Part, document: Document, size: int) -> None:
        name = document.labels[LABELS.index("source")] or Path(part.path).name
        if self._kept_bytes.get(name, 0) < REPORT_BYTES:
            self._kept_bytes[name] = self._kept_bytes.get(name, 0) + size
            self.kept.setdefault(name, []).append(document.text)


def _documents(part: Part) -> Iterator[Document]:
    for chunk in read_chunks(part):
        yield from parse(chunk).documents


def cut(text: str) -> Iterator[str]:
    """Pieces of at most PIECE_CHARS, at line ends where there are some."""
    begin = 0
    while begin < len(text):
        end = begin + PIECE_CHARS
        if end < len(text):
            end = max(text.rfind("\n", begin, end) + 1, 0) or end
            end = end if end > begin else begin + PIECE_CHARS
        yield text[begin:end]
        begin = end


def _train(texts: _Sample, options: TokenizerOptions) -> bytes:
    import sentencepiece

    buffer = io.BytesIO()
    pieces = (piece for piece in texts if "\0" not in piece)
    first = next(pieces, None)
    if first is None:
        raise UserError(NO_DOCUMENT)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain([first], pieces),
            model_writer=buffer,
            vocab_size=options.vocab_size,
            model_type=options.model_type,
            normalization_rule_name=options.normalization,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,  # as LLaMA's: a word is the same piece at the start of a text and after a space
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9995,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * PIECE_CHARS + 4,
            num_threads=1,  # with more, the sums of unigram's training change, and so does the model
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        reason = reason.split("] ")[-1].split(" or decrease character_coverage")[0]
        raise UserError(f"--vocab-size {options.vocab_size} does not fit the text ({reason})") from None
    return buffer.getvalue()


def tokenizer_report(tokenizer: Tokenizer, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Vocabulary size and, by source: documents, bytes per token, share of unknown tokens, round-trip failures.

    The share is None where the tokenizer has no unknown token.
    """
    unknown_id = tokenizer.record.unk_id
    rows = {}
    for name, documents in sorted(texts.items()):
        encoded = tokenizer.encode(documents)
        tokens = sum(len(ids) for ids in encoded)
        unknown = None if unknown_id is None else sum(ids.count(unknown_id) for ids in encoded)
        failures = sum(tokenizer.decode(ids) != text for ids, text in zip(encoded, documents, strict=True))
        rows[name] = {
            "documents": len(documents),
            "bytes_per_token": round(sum(len(text.encode()) for text in documents) / max(tokens, 1), 3),
            "unknown_rate": None if unknown is None else unknown / max(tokens, 1),
            "round_trip_failures": failures,
        }
    return {"tokenizer": asdict(tokenizer.record), "sources": rows}
