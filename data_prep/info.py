"""``monet-data info``: what is in a shard folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.folder_refusals import cannot_read
from monet_train.data.index_file import check_index, read_index
from monet_train.data.manifest import Manifest
from monet_train.errors import UserError
from monet_train.tokenizers import load_tokenizer

BAR = 40  # characters of the longest bar
SAMPLE_CHARS = 160


def describe(folder: Path, samples: int) -> Iterator[str]:
    """The lines of the report: counts, labels, lengths, decoded samples.

    Raises:
        UserError: there is no readable manifest, or a shard is missing or cannot be read.
    """
    try:
        yield from _describe(folder, samples)
    except OSError as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{cannot_read(folder, error)}: see what else is damaged with `monet-data verify {folder}`")


def _describe(folder: Path, samples: int) -> Iterator[str]:
    manifest = Manifest.read(folder)
    lengths = document_lengths(folder, manifest)
    yield f"{folder}"
    yield f"  fingerprint  {manifest.fingerprint}"
    yield f"  tokenizer    {manifest.tokenizer.kind}, {manifest.tokenizer.vocabulary_size} pieces"
    yield f"  shards       {len(manifest.shards)}, tokens stored as {manifest.dtype}"
    yield f"  documents    {manifest.documents:,}"
    yield f"  tokens       {manifest.tokens:,}"
    yield f"  text         {manifest.text_bytes:,} bytes, {manifest.text_bytes / manifest.tokens:.2f} per token"
    for name, reasons in (("filtered", manifest.filtered), ("rejected", manifest.rejected)):
        if reasons:
            yield f"  {name:<12} " + ", ".join(f"{reason}: {count:,}" for reason, count in reasons.items())
    yield from _labels(manifest)
    yield from _histogram(lengths)
    yield from _samples(folder, manifest, samples)


def document_lengths(folder: Path, manifest: Manifest) -> np.ndarray:
    """Tokens of every document, int32 [documents]."""
    for record in manifest.shards:
        check_index(folder / record.name)
    return np.concatenate([read_index(folder / record.name).lengths for record in manifest.shards])


def _labels(manifest: Manifest) -> Iterator[str]:
    for column, values in manifest.label_counts.items():
        yield f"\n  {column:<24} {'documents':>12} {'tokens':>15} {'bytes/token':>12}"
        for value, (documents, tokens, size) in sorted(values.items(), key=lambda item: -item[1][1]):
            yield f"    {value:<22} {documents:>12,} {tokens:>15,} {size / tokens:>12.2f}"
    if numbers := manifest.number_counts:
        yield f"\n  {'numbers':<24} {'documents':>12} {'tokens':>15} {'least':>12} {'greatest':>12}"
        for column, counts in numbers.items():
            least, greatest = ("none" if end is None else f"{end:.6g}" for end in (counts.min, counts.max))
            yield f"    {column:<22} {counts.documents:>12,} {counts.tokens:>15,} {least:>12} {greatest:>12}"


def draw_lengths(folder: Path, image: Path) -> None:
    """Draw the histogram of document lengths into ``image`` (PNG, or the format that its suffix names).

    Raises:
        UserError: matplotlib is not installed, a shard cannot be read, or the image cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--png needs matplotlib: pip install 'monet-train[plots]'") from None
    manifest = Manifest.read(folder)
    try:
        edges, counts = _bins(document_lengths(folder, manifest))
    except OSError as error:
        raise _unreadable(folder, error) from None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("documents")
    axes.set_title(f"{folder.name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    try:
        figure.savefig(image, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--png {image} cannot be written: {error}") from None


def _bins(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges at powers of two, and how many documents fall between them."""
    edges = 2 ** np.arange(0, int(lengths.max()).bit_length() + 1)
    return edges, np.histogram(lengths, edges)[0]


def _histogram(lengths: np.ndarray) -> Iterator[str]:
    yield "\n  tokens per document"
    edges, counts = _bins(lengths)
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            yield f"    {low:>9,} - {high - 1:<9,} {count:>12,} {'#' * int(np.ceil(BAR * count / counts.max()))}"


def _samples(folder: Path, manifest: Manifest, samples: int) -> Iterator[str]:
    tokenizer = load_tokenizer(folder / manifest.tokenizer.file)
    borders = np.cumsum([0] + [len(read_index(folder / record.name).lengths) for record in manifest.shards])
    chosen = np.unique(np.linspace(0, borders[-1] - 1, min(samples, borders[-1])).astype(np.int64))
    for document in chosen:
        number = int(np.searchsorted(borders, document, side="right")) - 1
        record = manifest.shards[number]
        index, local = read_index(folder / record.name), int(document - borders[number])
        length, pointer = int(index.lengths[local]), int(index.pointers[local])
        tokens = np.fromfile(
            folder / f"{record.name}.bin", manifest.dtype, count=min(length, SAMPLE_CHARS), offset=pointer
        )
        if ((tokens < 0) | (tokens >= manifest.tokenizer.vocabulary_size)).any():
            raise UserError(
                f"{folder / record.name}.bin: document {local} has a token outside the vocabulary of "
                f"{manifest.tokenizer.vocabulary_size}: find the damage with `monet-data verify {folder}`"
            )
        text = tokenizer.decode(tokens.tolist())[:SAMPLE_CHARS]
        yield f"\n  document {document:,} ({record.name}, {length:,} tokens)\n    {text!r}"
