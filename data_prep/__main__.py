"""``monet-data``: from a corpus to a tokenizer and to the shards that training reads."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from data_prep.encode import default_workers
from data_prep.files import is_remote
from data_prep.recipe import NUMBER, STRING, Recipe, recipe_from
from monet_train.data.manifest import Manifest
from monet_train.errors import UserError, one_line_errors, unwritable_output

MAX_WORKERS = 1024

EPILOG = """\
a SOURCE is
  FILE or 'PATTERN'    txt, jsonl or parquet, plain or .gz, .zst, .xz; also fsspec addresses (s3://...)
  FOLDER               source code, one document per file
  hf:NAME[:CONFIG[:SPLIT]]   a Hugging Face dataset, streamed
  python               the sources and licences of this Python installation
  RECIPE.yaml          a list of sources with their fields and filters (see conf/data_prep)

examples
  monet-data tokenizer python --max-bytes 8M --vocab-size 4096 --out data/tokenizer
  monet-data shards python --max-bytes 8M --tokenizer data/tokenizer --out data/python
  monet-data shards 'corpora/*.jsonl.zst' --tokenizer llama/tokenizer.model --out data/corpora --where lang=en,de
  monet-data shards conf/data_prep/fineweb_edu.yaml --tokenizer data/tokenizer --out data/fineweb
  monet-data shards chats.jsonl --keep topic toxicity:number --tokenizer data/tokenizer --out data/chats
  monet-data shards SOURCE... --out data/big --tokenizer T --task 3 --tasks 16     (each of 16 jobs; then merge)
  monet-data merge data/big
  monet-data verify data/corpora
  monet-data info data/corpora

A run that was stopped resumes when the same command is given again.
"""


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest valid word."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage."""
        if match := re.search(r"argument (\S+): invalid choice: '([^']*)' \(choose from (.*)\)", message):
            words = re.findall(r"[\w-]+", match[3])
            near = difflib.get_close_matches(match[2], words, n=1)
            message = f"no command {match[2]!r}: " if match[1] == "COMMAND" else f"{match[1]} {match[2]!r}: "
            message += f"did you mean {near[0]}?" if near else f"choose {', '.join(words)}"
        elif match := re.search(r"unrecognized arguments: (\S+)", message):
            options = [option for action in self._all_actions() for option in action.option_strings]
            name = match[1].split("=")[0]
            near = difflib.get_close_matches(name, options, n=1)
            if name in options:
                message = f"{name} is an option of another command: see monet-data COMMAND --help"
            else:
                message += f": did you mean {near[0]}?" if near else ": see monet-data --help"
        elif "see monet-data" not in message:
            message += f": see {self.prog} --help"
        raise UserError(message)

    def _all_actions(self) -> list[argparse.Action]:
        actions = list(self._actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                actions += [inner for sub in action.choices.values() for inner in sub._actions]
        return actions


def number(text: str) -> int:
    """A count with an optional suffix: 300, 8M, 2.5G."""
    match = re.fullmatch(r"([0-9]{1,15})(?:(\.[0-9]+)?([kKMGBT]))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number like 300, 8M or 2.5G")
    factor = {None: 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}[match[3]]
    return int(float(match[1] + (match[2] or "")) * factor)


def positive(text: str) -> int:
    """A number of at least 1."""
    value = number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def processes(text: str) -> int:
    """A number of processes that a machine may have."""
    value = positive(text)
    if value > MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text} is more than {MAX_WORKERS} processes")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:  # nan neither
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def label(text: str) -> tuple[str, str]:
    """``NAME=VALUE`` of a label."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=VALUE")
    return name, value


def kept(text: str) -> tuple[str, str]:
    """``FIELD`` or ``FIELD:KIND`` of a further label."""
    name, _, kind = text.partition(":")
    if kind not in (STRING, NUMBER) and ":" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD, FIELD:{STRING} or FIELD:{NUMBER}")
    return name, kind or STRING


def filled(text: str) -> str:
    """A name that is not empty: ``Path("")`` would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: give a name (`.` is the current folder)")
    return text


def local(text: str) -> Path:
    """A file or folder of this machine's file systems: shards are memory-mapped, a library opens the tokenizer."""
    filled(text)
    if is_remote(text):
        raise argparse.ArgumentTypeError(
            f"{text} is not on a file system: give a local or shared path, and copy it from or to the address"
        )
    return Path(text)


def build_parser() -> Parser:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="monet-data", description=__doc__, epilog=EPILOG, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help_: str) -> Parser:
        return commands.add_parser(
            name, help=help_, description=help_, epilog=EPILOG, formatter_class=formatter, allow_abbrev=False
        )

    tokenizer = command("tokenizer", "train a SentencePiece tokenizer, or report on an existing one")
    _add_sources(tokenizer)
    tokenizer.set_defaults(id_field=None, keep=None)
    kind = tokenizer.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--vocab-size", type=positive, help="train one with this many pieces, 259 special and byte ones included"
    )
    kind.add_argument(
        "--existing", type=local, metavar="TOKENIZER", help="take one as `shards --tokenizer` does, and report"
    )
    tokenizer.add_argument("--model-type", choices=("bpe", "unigram"), help="default: bpe")
    tokenizer.add_argument(
        "--sample-bytes", type=positive, default=100_000_000, help="text to learn from, spread over all files (100M)"
    )
    tokenizer.add_argument(
        "--normalization", choices=("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"),
        help="SentencePiece's rule (default: identity, the text comes back as it was)",
    )  # fmt: skip
    tokenizer.add_argument("--out", type=local, required=True, help="folder for tokenizer.model and report.json")

    shards = command("shards", "tokenize documents into memory-mapped shards")
    _add_sources(shards)
    shards.add_argument(
        "--id-field", metavar="NAME", help="field with a document's id; an id that occurs twice is refused"
    )
    shards.add_argument(
        "--keep", type=kept, nargs="+", action="extend", metavar="FIELD[:number]",
        help="also keep these fields of jsonl, parquet and hf as labels: strings, or numbers with :number",
    )  # fmt: skip
    shards.add_argument(
        "--tokenizer", type=local, required=True, help="folder, SentencePiece .model, tokenizer.json, or PACKAGE:FILE"
    )
    shards.add_argument("--out", type=local, required=True, help="folder for the shards and manifest.json")
    shards.add_argument("--tokens-per-shard", type=positive, default=250_000_000, help="a shard is cut here (250M)")
    shards.add_argument("--workers", type=processes, default=default_workers(), help="processes (default: all cores)")
    shards.add_argument(
        "--max-bad-share", type=share, default=0.01, help="stop if a larger share of documents is bad (0.01)"
    )

    shards.add_argument("--task", type=number, default=0, metavar="I", help="do part I (from 0) of --tasks N")
    shards.add_argument(
        "--tasks", type=positive, default=1, metavar="N", help="share the files among N runs, then merge"
    )

    merge = command("merge", "write the manifest over the shards of all tasks")
    merge.add_argument("folder", type=local, help="the --out of the tasks")
    verify = command("verify", "check every byte of a shard folder")
    verify.add_argument("folder", type=local, help="made by `monet-data shards`")
    info = command("info", "counts, labels, lengths and decoded samples of a shard folder")
    info.add_argument("folder", type=local, help="made by `monet-data shards`")
    info.add_argument("--samples", type=number, default=10, help="documents to decode (10)")
    info.add_argument("--png", type=local, metavar="FILE", help="also draw the lengths as an image (needs matplotlib)")
    return parser


def _add_sources(parser: Parser) -> None:
    parser.add_argument("sources", nargs="+", type=filled, metavar="SOURCE", help="what to read; see below")
    parser.add_argument("--text-field", metavar="NAME", help="field with the text in jsonl, parquet and hf (text)")
    parser.add_argument(
        "--label", type=label, action="append", metavar="LABEL=VALUE", help="give every document a label"
    )
    parser.add_argument(
        "--where", type=label, action="append", metavar="LABEL=A,B", help="keep documents with these values only"
    )
    parser.add_argument("--min-chars", type=number, help="leave out shorter documents")
    parser.add_argument("--max-chars", type=number, help="leave out longer documents")
    parser.add_argument(
        "--txt", choices=("file", "line"), help="a document in .txt is the whole file or one line (file)"
    )
    parser.add_argument("--max-documents", type=positive, help="stop after this many documents")
    parser.add_argument("--max-bytes", type=positive, help="stop after this much text (8M, 2G)")


def read_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the source arguments describe."""
    labels: dict[str, str] = {}
    for name, value in arguments.label or ():
        if labels.setdefault(name, value) != value:
            raise UserError(
                f"--label {name}={labels[name]} and {name}={value}: a document has one value per label: give one"
            )
    keep: dict[str, str] = {}
    for name, kind in arguments.keep or ():
        if keep.setdefault(name, kind) != kind:
            raise UserError(f"--keep {name} as a {keep[name]} and as a {kind}: a label has one kind: give one")
    where: dict[str, list[str]] = {}
    for name, values in arguments.where or ():
        where.setdefault(name, []).extend(values.split(","))
    options: dict[str, Any] = {
        "text": arguments.text_field,
        "id": arguments.id_field,
        "keep": keep or None,
        "labels": labels or None,
        "where": where or None,
        "min_chars": arguments.min_chars,
        "max_chars": arguments.max_chars,
        "txt": arguments.txt,
    }
    bounds = {"max_documents": arguments.max_documents, "max_bytes": arguments.max_bytes}
    return recipe_from(arguments.sources, {k: v for k, v in options.items() if v is not None}, bounds)


def run_tokenizer(arguments: argparse.Namespace) -> Iterator[str]:
    """``monet-data tokenizer``."""
    from data_prep.train_tokenizer import TokenizerOptions, make_tokenizer

    for option in ("model_type", "normalization"):
        if arguments.existing and getattr(arguments, option):
            raise UserError(f"--{option.replace('_', '-')} is for training: leave it out with --existing")
    options = TokenizerOptions(
        arguments.vocab_size,
        arguments.model_type or "bpe",
        arguments.sample_bytes,
        arguments.normalization or "identity",
        arguments.existing,
    )
    report = make_tokenizer(read_recipe(arguments), options, arguments.out)
    yield f"{arguments.out}: {report['tokenizer']['vocabulary_size']} pieces"
    yield f"  {'source':<28} {'documents':>10} {'bytes/token':>12} {'unknown':>9} {'round-trip failures':>20}"
    for name, row in report["sources"].items():
        unknown = "none" if row["unknown_rate"] is None else f"{row['unknown_rate']:.2%}"
        yield (
            f"  {name[:28]:<28} {row['documents']:>10,} {row['bytes_per_token']:>12.2f} {unknown:>9} "
            f"{row['round_trip_failures']:>20}"
        )


def run_shards(arguments: argparse.Namespace) -> Iterator[str]:
    """``monet-data shards``."""
    from data_prep.pipeline import ShardOptions
    from data_prep.shards import prepare
    from monet_train.tokenizers import load_tokenizer

    options = ShardOptions(
        arguments.tokens_per_shard, arguments.workers, arguments.max_bad_share, arguments.task, arguments.tasks
    )
    manifest = prepare(read_recipe(arguments), load_tokenizer(arguments.tokenizer), arguments.out, options)
    if manifest:
        yield from summary(arguments.out, manifest)
    else:
        yield f"{arguments.out}: task {options.task} of {options.tasks} is done"
        yield f"  when all are: monet-data merge {arguments.out}"


def run_merge(arguments: argparse.Namespace) -> Iterator[str]:
    """``monet-data merge``."""
    from data_prep.merge import merge

    if not arguments.folder.is_dir():
        raise UserError(f"{arguments.folder} is not a folder: give the --out of the tasks")
    yield from summary(arguments.folder, merge(arguments.folder))


def summary(folder: Path, manifest: Manifest) -> Iterator[str]:
    """One line of counts, and one about bad documents if there are some; labels without a value are warned of."""
    from data_prep.shard_writer import labels_without_value

    yield (
        f"{folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens in {len(manifest.shards)} "
        f"shard{'s' * (len(manifest.shards) > 1)}, {manifest.text_bytes / manifest.tokens:.2f} bytes per token"
    )
    for label in labels_without_value(manifest):
        print(f"warning: no document has a value for {label!r}: check the name of the field", file=sys.stderr)
    if manifest.rejected:
        yield f"  {sum(manifest.rejected.values()):,} bad documents were left out: {folder}/rejects*.jsonl"


def run_verify(arguments: argparse.Namespace) -> Iterator[str]:
    """``monet-data verify``."""
    from data_prep.verify import verify

    manifest, problems = verify(arguments.folder)
    if problems:
        for problem in problems[:-1]:
            print(f"bad: {problem}", file=sys.stderr)
        raise UserError(problems[-1])
    yield f"{arguments.folder}: {len(manifest.shards)} shards, {manifest.tokens:,} tokens: as the manifest says"


def run_info(arguments: argparse.Namespace) -> Iterator[str]:
    """``monet-data info``."""
    from data_prep.info import describe, draw_lengths

    if arguments.png:
        draw_lengths(arguments.folder, arguments.png)
    yield from describe(arguments.folder, arguments.samples)


@one_line_errors
def main() -> None:
    """Entry point of ``monet-data``."""
    arguments = build_parser().parse_args()
    commands = {
        "tokenizer": run_tokenizer,
        "shards": run_shards,
        "merge": run_merge,
        "verify": run_verify,
        "info": run_info,
    }
    for line in commands[arguments.command](arguments):
        try:
            print(line, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise unwritable_output(error) from None


if __name__ == "__main__":
    main()
