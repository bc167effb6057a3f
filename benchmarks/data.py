"""How fast data is prepared and read. Every figure is a ratio or a size measured in one run on this machine.

python -m benchmarks.data tokenize --corpus 'corpora/*.jsonl.zst' --tokenizer mistral_common:data/tokenizer.model.v1
python -m benchmarks.data memory   --corpus 'corpora/*.jsonl.zst' --tokenizer TOKENIZER
python -m benchmarks.data index    --tokens 1G 10G
python -m benchmarks.data load     --shards data/corpus
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.__main__ import number
from data_prep.chunks import read_chunks
from data_prep.documents import parse
from data_prep.recipe import recipe_from
from data_prep.sources import list_parts
from monet_train.errors import one_line_errors
from monet_train.tokenizers import Tokenizer, load_tokenizer

DOCUMENT_TOKENS = 1000  # mean length of the made-up documents of `index`
SEQUENCE = 2048
BLOCK = 256  # texts that the bare encoder gets per call


class Times:
    """Wall and processor seconds of things that are measured in turn, by name."""

    def __init__(self) -> None:
        self.taken: dict[str, list[tuple[float, float]]] = {}

    def add(self, name: str, wall: float, processor: float) -> None:
        """One more measurement."""
        self.taken.setdefault(name, []).append((wall, processor))

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure a block: its processor time is that of the child processes that it starts."""
        started, before = time.perf_counter(), processor_seconds()
        yield
        self.add(name, time.perf_counter() - started, processor_seconds() - before)

    def medians(self, name: str) -> tuple[float, float]:
        """Wall and processor seconds."""
        wall, processor = zip(*self.taken[name], strict=True)
        return statistics.median(wall), statistics.median(processor)

    def ratio(self, name: str, other: str) -> str:
        """Time of ``name`` / time of ``other``, wall and processor: the median over the rounds, and each round."""
        rounds = zip(self.taken[name], self.taken[other], strict=True)
        wall, processor = zip(*((a[0] / b[0], a[1] / b[1]) for a, b in rounds), strict=True)
        each = " ".join(f"{ratio:.2f}" for ratio in wall)
        fastest = min(self.taken[name])[0] / min(self.taken[other])[0]
        return (f"{statistics.median(wall):.2f} (rounds {each}; the fastest of each {fastest:.2f}; by processor time "
                f"{statistics.median(processor):.2f})")  # fmt: skip


def processor_seconds() -> float:
    """Of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_texts(corpus: str) -> list[str]:
    """All documents of a corpus."""
    parts = list_parts(recipe_from([corpus], {}, {}))
    return [document.text for part in parts for chunk in read_chunks(part) for document in parse(chunk).documents]


def tokenize(arguments: argparse.Namespace) -> None:
    """Our command end to end beside bare encoders in as many processes and `datasets.map`; ids compared.

    With the tokenizer's own library on both sides, with the fast encoder on both sides, and across.
    """
    texts = read_texts(arguments.corpus)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB, {arguments.workers} processes, in turn, "
          f"medians of {arguments.repeats} rounds; load {os.getloadavg()[0]:.1f}")  # fmt: skip
    times = Times()
    encoder, library = "bare fast encoder", "bare tokenizer (its library)"
    ours, slow_ours = "monet-data shards", "monet-data, library only"
    plain, start = "datasets.map + writing", "start (one document)"
    for _ in range(arguments.repeats):
        times.add(encoder, *bare(texts, arguments, lambda tokenizer: (tokenizer.fast or tokenizer).encode))
        with tempfile.TemporaryDirectory() as folder:
            with times.measure(ours):
                prepare(arguments, Path(folder) / "shards", arguments.corpus)
            (Path(folder) / "one.txt").write_text("One document.")
            with times.measure(start):
                prepare(arguments, Path(folder) / "one", Path(folder) / "one.txt")
            if arguments.plain:
                times.add(library, *bare(texts, arguments, lambda tokenizer: tokenizer.encode_by_library))
                with times.measure(slow_ours):
                    prepare(arguments, Path(folder) / "slow", arguments.corpus, fast=False)
                with times.measure(plain):
                    map_and_write(texts, arguments, Path(folder))
    for name in times.taken:
        wall, processor = times.medians(name)
        print(f"  {name:<28} {wall:8.2f} s {size / wall / 1e6:8.2f} MB/s  {processor:8.2f} s of processor time"
              f"  fastest {min(times.taken[name])[0]:.2f} s")  # fmt: skip
    pairs = [(slow_ours, library), (ours, library), (ours, plain)] if arguments.plain else []
    for one, other in [*pairs, (ours, encoder)]:
        print(f"  {one}, times as fast as {other}: {times.ratio(other, one)}")
    print(f"  load at the end: {os.getloadavg()[0]:.1f}")
    if arguments.compare_ids:
        compare_ids(texts, arguments)


def prepare(arguments: argparse.Namespace, out: Path, source: str | Path, fast: bool = True) -> None:
    """``monet-data shards`` in a process of its own; not ``fast``: as it is where fastokens is not installed."""
    program = "" if fast else "import sys; sys.modules['fastokens'] = None\n"
    program += "from data_prep.__main__ import main; main()"
    command = [sys.executable, "-c", program, "shards", str(source), "--tokenizer", arguments.tokenizer]
    command += ["--out", str(out), "--workers", str(arguments.workers)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def bare(
    texts: list[str], arguments: argparse.Namespace, call: Callable[[Tokenizer], Callable[[list[str]], Any]]
) -> tuple[float, float]:
    """Wall seconds, and processor seconds of all, that ``workers`` processes take to encode what they have in memory.

    Each has its texts and its tokenizer before the time starts. ``call``: which of the tokenizer's calls.
    """
    context = multiprocessing.get_context("fork")
    barrier, used = context.Barrier(arguments.workers + 1), context.Array("d", arguments.workers)

    def work(rank: int) -> None:
        tokenizer = load_tokenizer(Path(arguments.tokenizer))
        encode = call(tokenizer)
        # Copies: counting references to the parent's would copy its pages while the time runs.
        mine = [text.encode().decode() for text in texts[rank :: arguments.workers]]
        blocks = [mine[i : i + BLOCK] for i in range(0, len(mine), BLOCK)]
        gc.freeze()
        barrier.wait()
        started = time.process_time()
        for block in blocks:
            encode(block)
        used[rank] = time.process_time() - started
        barrier.wait()

    processes = [context.Process(target=work, args=(rank,)) for rank in range(arguments.workers)]
    for process in processes:
        process.start()
    barrier.wait()
    started = time.perf_counter()
    barrier.wait()
    wall = time.perf_counter() - started
    for process in processes:
        process.join()
    return wall, sum(used[rank] for rank in range(arguments.workers))


def map_and_write(texts: list[str], arguments: argparse.Namespace, folder: Path) -> None:
    """What one would write first: ``datasets.map`` with the same encoder, then Megatron's builder."""
    program = (
        "import sys, datasets, numpy as np\n"
        "from pathlib import Path\n"
        "from monet_train.tokenizers import load_tokenizer\n"
        "from monet_train.data.megatron import IndexedDatasetBuilder\n"
        "tokenizer = load_tokenizer(Path(sys.argv[2]))\n"
        "encode = lambda rows: {'ids': tokenizer.encode(rows['text'])}\n"
        "data = datasets.load_dataset('json', data_files=sys.argv[1], split='train', cache_dir=sys.argv[3])\n"
        "data = data.map(encode, batched=True, num_proc=int(sys.argv[4]), remove_columns=data.column_names)\n"
        "builder = IndexedDatasetBuilder(sys.argv[3] + '/map.bin', dtype=np.uint16)\n"
        "for row in data: builder.add_document(np.array(row['ids'] + [2]), [len(row['ids']) + 1])\n"
        "builder.finalize(sys.argv[3] + '/map.idx')\n"
    )
    source = folder / "texts.jsonl"
    if not source.exists():
        with source.open("w") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    subprocess.run(
        [sys.executable, "-c", program, source, arguments.tokenizer, folder, str(arguments.workers)],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def compare_ids(texts: list[str], arguments: argparse.Namespace) -> None:
    """Are the fast encoder's ids those of the tokenizer's own library, on every document?"""
    tokenizer = load_tokenizer(Path(arguments.tokenizer))
    if tokenizer.fast:
        different = 0
        for i in range(0, len(texts), 256):
            block = texts[i : i + 256]
            pairs = zip(tokenizer.encode(block), tokenizer.encode_by_library(block), strict=True)
            different += sum(fast != slow for fast, slow in pairs)
        print(f"  documents with other ids than the tokenizer's own library: {different} of {len(texts)}")


def memory(arguments: argparse.Namespace) -> None:
    """Largest memory of a preparation at two sizes ten times apart (all processes, one shard size)."""
    texts = read_texts(arguments.corpus)
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 10):
            source = Path(folder) / f"times-{times}.jsonl"
            with source.open("w") as stream:
                for _ in range(times):
                    stream.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            command = [sys.executable, "-m", "data_prep", "shards", str(source), "--tokenizer", arguments.tokenizer,
                       "--workers", str(arguments.workers), "--tokens-per-shard", "5M"]  # fmt: skip
            process = subprocess.Popen(
                [*command, "--out", str(Path(folder) / f"out-{times}")], stdout=subprocess.DEVNULL
            )
            peak = watch_memory(process)
            print(f"  {source.stat().st_size / 1e6:8.1f} MB of jsonl: {peak / 1e6:8.1f} MB of memory at most")


def watch_memory(process: subprocess.Popen[bytes]) -> int:
    """Largest memory of a process and its children while it runs, bytes; pages that they share count once."""
    import psutil

    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):
            peak = max(peak, sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)]))
        time.sleep(0.1)
    return peak


def index(arguments: argparse.Namespace) -> None:
    """Build time, size and memory of the index cache, and opening with the cache, at several corpus sizes.

    The shards are real indices over sparse data files.
    """
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            make_sparse(Path(folder), tokens)
            built, opened = (measure_open(Path(folder)) for _ in range(2))
            cache = sum(p.stat().st_size for p in (Path(folder) / "index-cache").rglob("*") if p.is_file())
            print(
                f"  {tokens / 1e9:6.1f}B tokens, {tokens // DOCUMENT_TOKENS / 1e6:6.1f}M documents: built in "
                f"{built['seconds']:.1f} s with {built['rss'] / 1e9:.2f} GB, cache {cache / 1e9:.2f} GB; opened with a "
                f"batch in {opened['seconds']:.2f} s with {opened['rss'] / 1e9:.2f} GB"
            )


def make_sparse(folder: Path, tokens: int, shards: int = 8) -> None:
    """``.idx`` files of the right length over sparse ``.bin`` files (token 0 everywhere), as Megatron's format says."""
    random = np.random.default_rng(0)
    for shard in range(shards):
        count = tokens // DOCUMENT_TOKENS // shards
        lengths = random.integers(1, 2 * DOCUMENT_TOKENS, count, dtype=np.int32)
        pointers = np.zeros(count, dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= 2
        with (folder / f"shard-{shard:05d}.idx").open("wb") as stream:
            stream.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1))
            for array in (lengths, pointers, np.arange(count + 1, dtype=np.int64)):
                array.tofile(stream)
        with (folder / f"shard-{shard:05d}.bin").open("wb") as stream:
            stream.truncate(2 * int(lengths.sum(dtype=np.int64)))


def measure_open(folder: Path) -> dict[str, float]:
    """Seconds to open a corpus and read 8 random sequences in a fresh process (imports not counted), and its memory."""
    program = (
        "import sys, time, json, resource; from pathlib import Path\n"
        "from monet_train.config.schema import DataSection; from monet_train.data.corpus import open_corpus\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; t = time.perf_counter()\n"
        f"c = open_corpus(DataSection(path=sys.argv[1]), seq_length={SEQUENCE}, seed=0, vocab_size=32000,\n"
        "    train_sequences=100, valid_sequences=0, cache_dir=Path(sys.argv[1]))\n"
        "n = c.train.per_epoch; [c.train[i * (n // 8)] for i in range(8)]\n"
        "t = time.perf_counter() - t; after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps({'seconds': t, 'rss': 1024 * after, 'before': 1024 * before}))\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(folder)], check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def load(arguments: argparse.Namespace) -> None:
    """How long a training process waits for data when a step takes ``--step-seconds``."""
    from monet_train.config.schema import DataSection
    from monet_train.data.batches import MicroBatches
    from monet_train.data.corpus import open_corpus

    config = DataSection(path=str(arguments.shards), reset_attention=True, reset_positions=True)
    corpus = open_corpus(config, seq_length=SEQUENCE, seed=0, vocab_size=1 << 17, train_sequences=1, valid_sequences=0,
                         cache_dir=Path(tempfile.gettempdir()))  # fmt: skip
    started = time.perf_counter()
    for i in range(1000):
        corpus.train[i]
    print(f"  {(time.perf_counter() - started) * 1e3:.1f} us per sequence of {SEQUENCE} tokens")
    steps = 20
    batches = MicroBatches(
        corpus.train, steps=steps + 1, global_batch_size=32, micro_batch_size=8, data_rank=0, data_size=1
    )
    for step in range(steps + 1):
        if step == 1:
            batches.wait_seconds = 0.0  # the first batch has nobody to read it ahead
        for _ in list(batches.read(step)):  # as the trainer, which counts the targets of a step first
            time.sleep(arguments.step_seconds / batches.micro_steps)
    batches.close()
    share = batches.wait_seconds / (steps * arguments.step_seconds)
    print(f"  waited {share:.3%} of steps of {arguments.step_seconds} s (32 sequences each)")


@one_line_errors
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands: Any = parser.add_subparsers(dest="command", required=True)
    for name, function in (("tokenize", tokenize), ("memory", memory)):
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--corpus", required=True)
        command.add_argument("--tokenizer", required=True)
        command.add_argument("--workers", type=int, default=2)
        command.add_argument("--repeats", type=int, default=3)
        command.set_defaults(run=function)
    command = commands.choices["tokenize"]
    command.add_argument("--compare-ids", action="store_true", help=compare_ids.__doc__)
    command.add_argument("--no-plain", dest="plain", action="store_false", help="only beside the fast encoder")
    command = commands.add_parser("index", help=index.__doc__)
    command.add_argument("--tokens", type=number, nargs="+", default=[10**9])
    command.add_argument("--folder", type=Path, help="where the sparse shards are made (the temporary folder)")
    command.set_defaults(run=index)
    command = commands.add_parser("load", help=load.__doc__)
    command.add_argument("--shards", type=Path, required=True)
    command.add_argument("--step-seconds", type=float, default=0.5)
    command.set_defaults(run=load)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
