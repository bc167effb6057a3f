"""From sources to parts: files, groups of files and streams, in a fixed order."""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.files import is_remote, suffix_of
from data_prep.installed import installed_files
from data_prep.recipe import Recipe, Source
from data_prep.source_refusals import (
    FORMATS,
    dataset_unreadable,
    refuse_irregular,
    refuse_names_beyond_utf8,
    unreadable,
    warn_of_data_files,
    warn_of_links,
)
from data_prep.zstd import ZstdReader
from monet_train.errors import UserError
from monet_train.fingerprint import sha256_text

LINES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "txt", ".text": "txt"}
DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet")  # .json is usual among source code, .txt is read with it
FILES_PART_BYTES = 64 << 20  # files of a folder are grouped into parts of about this size
LANGUAGES = {
    ".py": "python", ".c": "c", ".h": "c", ".cc": "cpp", ".cpp": "cpp", ".cxx": "cpp", ".hpp": "cpp", ".cu": "cuda",
    ".go": "go", ".rs": "rust", ".java": "java", ".kt": "kotlin", ".scala": "scala", ".js": "javascript",
    ".jsx": "javascript", ".ts": "typescript", ".tsx": "typescript", ".php": "php", ".rb": "ruby", ".pl": "perl",
    ".lua": "lua", ".r": "r", ".jl": "julia", ".hs": "haskell", ".ml": "ocaml", ".swift": "swift", ".cs": "csharp",
    ".m": "matlab", ".f90": "fortran", ".sh": "shell", ".sql": "sql", ".html": "html", ".css": "css", ".tex": "tex",
    ".md": "markdown", ".rst": "rst", ".txt": "text", ".yaml": "yaml", ".toml": "toml", ".cmake": "cmake",
}  # fmt: skip


@dataclass(frozen=True)
class FileEntry:
    """One file that is one document, and the labels that follow from its place."""

    path: str
    labels: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Part:
    """A unit of reading: one data file, a group of whole-file documents, or one shard of a hub dataset."""

    kind: str  # jsonl | parquet | txt | files | hub
    source: Source
    path: str = ""
    size: int = 0  # bytes on disk; 0 if unknown
    files: tuple[FileEntry, ...] = ()
    stream: int = 0  # hub: number of the dataset's shard
    streams: int = 1
    version: str = ""  # hub: see HubDataset; files: a hash over their names and sizes

    def identity(self) -> list[Any]:
        """What must be equal for a run to resume: names and sizes, without the folder they lie in."""
        if self.kind == "hub":
            source = self.source
            return [
                source.source,
                source.config,
                source.data_dir,
                source.split,
                self.stream,
                self.streams,
                self.version,
            ]
        return [Path(self.path).name, self.size, len(self.files), self.version]


def list_parts(recipe: Recipe, outside: Path | None = None) -> list[Part]:
    """All parts of a recipe, in order: sources as given, files of a source by name.

    Args:
        outside: the output folder; its files are never a source, whatever matches them.

    Raises:
        UserError: a source matches nothing, cannot be read, has no known format or a name that is not valid UTF-8.
    """
    parts: list[Part] = []
    for source in recipe.sources:
        try:
            parts += _parts_of(source, outside.resolve() if outside else None)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise
            raise unreadable(error.filename or source.source, error) from None
    for part in parts:
        refuse_names_beyond_utf8(
            [part.path, *(word for entry in part.files for word in (entry.path, *dict(entry.labels).values()))]
        )
    return parts


def _parts_of(source: Source, outside: Path | None) -> list[Part]:
    name = source.source
    if name == "python" and not Path(name).exists():
        entries = [
            FileEntry(
                str(path), (("lang", "python" if domain == "code" else "en"), ("domain", domain), ("source", where))
            )
            for where, domain, path in installed_files()
        ]
        return _group(source, "installed python", entries)
    if name.startswith("hf:"):
        return _hub_parts(source)
    if not is_remote(name) and Path(name).is_dir():
        return _folder_parts(source, Path(name))
    paths = _expand(name)
    if outside and not is_remote(name):
        paths = [path for path in paths if not Path(path).resolve().is_relative_to(outside)]
    if not paths:
        raise UserError(f"source {name} matches no file: check the path, or quote the pattern")
    return [_file_part(source, path) for path in paths]


def _expand(name: str) -> list[str]:
    if is_remote(name):
        import fsspec

        if "::" in name:
            raise UserError(f"source {name}: an address within an address is not read: unpack it first")
        try:
            filesystem, pattern = fsspec.core.url_to_fs(name)
            found = filesystem.glob(pattern) if glob.has_magic(pattern) else [pattern] * filesystem.exists(pattern)
            return sorted(filesystem.unstrip_protocol(path) for path in found)
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"source {name} cannot be listed: {error}") from None
    if Path(name).exists():
        refuse_irregular(name)
        return [name]
    found = glob.glob(name, recursive=True)  # noqa: PTH207 - Path.glob refuses absolute patterns
    paths: dict[Path, str] = {}  # the first to lead to a file
    for path in sorted(found):
        if not Path(path).is_dir():
            refuse_irregular(path)
            paths.setdefault(Path(path).resolve(), path)
    files = sum(not Path(path).is_dir() for path in found)
    if files > len(paths):
        warn_of_links(name, files - len(paths))
    return list(paths.values())


def _file_part(source: Source, path: str) -> Part:
    kind = LINES.get(suffix_of(path))
    if kind is None:
        raise UserError(
            f"source {path} has no known format: give {FORMATS}, a folder of source code, hf:NAME or python"
        )
    if is_remote(path):
        import fsspec

        filesystem, inner = fsspec.core.url_to_fs(path)
        return Part(kind, source, path, int(filesystem.size(inner) or 0))
    return Part(kind, source, path, Path(path).stat().st_size)


def _folder_parts(source: Source, folder: Path) -> list[Part]:
    entries, patterns = [], Counter[str]()
    for path in sorted(_visible_files(folder)):
        if language := LANGUAGES.get(path.suffix.lower()):
            labels = (("lang", language), ("domain", "code"), ("source", folder.resolve().name))
            entries.append(FileEntry(str(path), labels))
        elif (suffix := suffix_of(path.name)) in DATA_SUFFIXES:
            patterns[f"'{folder}/**/*{path.name[path.name.lower().rindex(suffix) :]}'"] += 1
    if not entries:
        raise UserError(
            f"source {folder} is a folder without source code: for data files give a pattern, '{folder}/*.jsonl'"
        )
    if patterns:
        warn_of_data_files(folder, patterns)
    return _group(source, str(folder), entries)


def _visible_files(folder: Path) -> Iterator[Path]:
    """The regular files below a folder without the hidden ones; links are followed, each folder once."""

    def refuse(error: OSError) -> None:
        raise error

    seen: set[Path] = set()
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := Path(root).resolve()) in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (path for name in files if not name.startswith(".") and (path := Path(root, name)).is_file())


def _group(source: Source, name: str, entries: list[FileEntry]) -> list[Part]:
    parts: list[Part] = []
    group: list[FileEntry] = []
    size, identity = 0, ""
    for number, entry in enumerate(entries):
        group.append(entry)
        bytes_ = Path(entry.path).stat().st_size
        size += bytes_
        # Relative to its folder. For an installation the name alone: its place is not part of the corpus.
        place = entry.path.removeprefix(name) if entry.path.startswith(name) else Path(entry.path).name
        identity += f"{place} {bytes_}\n"
        if size >= FILES_PART_BYTES or number == len(entries) - 1:
            parts.append(Part("files", source, name, size, tuple(group), version=sha256_text(identity)))
            group, size, identity = [], 0, ""
    return parts


def _hub_parts(source: Source) -> list[Part]:
    dataset = open_hub(source)
    streams = dataset.stream.num_shards
    return [
        Part("hub", source, source.source, stream=i, streams=streams, version=dataset.version) for i in range(streams)
    ]


class HubDataset(NamedTuple):
    """A Hugging Face dataset as a stream."""

    stream: Any  # datasets.IterableDataset
    version: str  # "commit SHA" of the hub, "files HASH" of a folder


def open_hub(source: Source) -> HubDataset:
    """Open a dataset of the hub, or a local folder that is laid out like one.

    Raises:
        UserError: it cannot be opened.
    """
    name = source.source.removeprefix("hf:")
    try:
        return _load_hub(name, source.config, source.data_dir, source.split, source.revision)
    except UserError:
        raise
    except Exception as error:  # the hub's clients raise dozens of kinds
        raise dataset_unreadable(source.source, error) from None


@lru_cache(maxsize=128)  # the hub's first answer holds for all streams of a run
def _load_hub(name: str, config: str | None, data_dir: str | None, split: str, revision: str | None) -> HubDataset:
    import datasets
    import fsspec.compression

    fsspec.compression.register_compression("zstd", _open_zstd, "zst", force=True)  # theirs reads small windows only
    datasets.logging.set_verbosity(logging.CRITICAL)  # whatever it logs as an error it also raises
    if (Path(name) / datasets.config.DATASET_STATE_JSON_FILENAME).exists():
        raise ValueError("the folder was made by save_to_disk: write the dataset with to_parquet and give those files")
    builder = datasets.load_dataset_builder(name, config, data_dir=data_dir, revision=revision)
    files = [file for of_split in (builder.config.data_files or {}).values() for file in of_split]
    return HubDataset(builder.as_streaming_dataset(split=split), _version(files))


def _open_zstd(raw: Any, mode: str) -> ZstdReader:
    assert mode == "r", "a dataset is not written"
    return ZstdReader(raw, str(getattr(raw, "path", None) or getattr(raw, "name", "of the dataset")))


def _version(files: list[str]) -> str:
    """What a dataset's name means today. Addresses on the hub name the commit."""
    commits = {found[1] for file in files if (found := re.search(r"^hf://[^@]+@([0-9a-f]{40})/", file))}
    if len(commits) == 1:
        return f"commit {commits.pop()}"
    described = [file if is_remote(file) else f"{Path(file).name} {Path(file).stat().st_size}" for file in files]
    return "files " + sha256_text("\n".join(described))
