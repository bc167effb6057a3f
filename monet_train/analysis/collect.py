"""``monet-experts collect``: one pass over labelled text, and an atlas of what every expert does there."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from monet_train.analysis.collector import Collector
from monet_train.analysis.manifest import MANIFEST, AtlasManifest, CellRecord, ModelRecord, NumericRecord
from monet_train.analysis.parts import DOCUMENTS, Parts
from monet_train.analysis.plan import SAVE_SECONDS, Plan, Request
from monet_train.analysis.sums import DocumentCounts
from monet_train.analysis.write import AtlasWriter
from monet_train.durable import write_atomically
from monet_train.errors import UserError
from monet_train.fingerprint import sha256_json
from monet_train.model.identity import identify
from monet_train.model.transformer import MonetForCausalLM
from monet_train.parallel.agreement import agree

T = TypeVar("T")


@dataclass(frozen=True)
class Worker:
    """This process among those that collect together."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes the atlas."""
        return self.rank == 0

    def wait(self) -> None:
        """For the others."""
        if self.size > 1:
            dist.barrier()

    def agree(self, check: Callable[[], T]) -> T:
        """What ``check`` gives; if it refuses on one worker it does on all, and none waits for the others."""
        return agree(check) if self.size > 1 else check()


ALONE = Worker()


def collect(
    model: MonetForCausalLM,
    plan: Plan,
    out: Path,
    groups: Sequence[int],
    worker: Worker = ALONE,
    *,
    save_seconds: float = SAVE_SECONDS,
    show: bool = False,
) -> AtlasManifest | None:
    """Make an atlas, or finish one that was begun. Every worker calls it.

    Args:
        model: on its device; its expert masks are taken as they are.
        out: folder of the atlas.
        groups: routing groups that are read.
        save_seconds: between two saves of what a worker has: a kill loses no more.
        show: a progress bar.

    Returns:
        The manifest, on the main worker.

    Raises:
        UserError: ``out`` holds another atlas.
    """
    model.eval()
    record = ModelRecord(identify(model), hash_weights(model), model.config.vocab_size)
    parts = Parts(out, _identity(record, plan, groups))
    worker.agree(lambda: _prepare(out, parts) if worker.is_main else None)
    todo = worker.agree(lambda: np.flatnonzero(~parts.done(len(plan.documents))))  # before any part is added
    mine = todo[worker.rank :: worker.size]
    if len(mine):
        _read(Collector(model, plan, list(groups)), mine, parts, worker, save_seconds, show)
    worker.wait()
    if not worker.is_main:
        return None
    writer = AtlasWriter(out, plan, parts.paths(), model.config.moe_experts, model.config.moe_heads)
    manifest = _manifest(record, plan, groups, writer.write(groups, show))
    write_atomically(out / MANIFEST, manifest.to_json().encode())
    parts.remove()
    return manifest


def check_out(out: Path) -> None:
    """Refuse a folder that holds an atlas. Raises :class:`UserError`."""
    if (out / MANIFEST).exists():
        raise UserError(f"{out} has an atlas already; give another --out, or delete it")


def _prepare(out: Path, parts: Parts) -> None:
    check_out(out)
    parts.open()
    parts.clean()


def _read(
    collector: Collector, documents: np.ndarray, parts: Parts, worker: Worker, save_seconds: float, show: bool
) -> None:
    """Read documents of the plan, and save now and then and at the end."""
    tokens = collector.plan.documents.tokens
    name = f"worker-{worker.rank:05d}-{time.time_ns():x}-{os.getpid()}"
    done = np.zeros(len(tokens), bool)
    last, number, saved = None, 0, time.monotonic()
    total = int(tokens[documents].sum())
    with tqdm(total=total, desc="reading", unit="token", unit_scale=True, disable=not show or None) as bar:
        for document in documents.tolist():
            collector.add(document)
            done[document] = True
            bar.update(int(tokens[document]))
            if document == documents[-1] or time.monotonic() - saved > save_seconds:
                last = parts.write(name, number, _arrays(collector) | {DOCUMENTS: done}, replaces=last)
                number, saved = number + 1, time.monotonic()


def _arrays(collector: Collector) -> dict[str, np.ndarray]:
    return {
        f"{group}.{name}": array
        for group, collected in collector.groups.items()
        for name, array in collected.arrays().items()
    }


def _manifest(record: ModelRecord, plan: Plan, groups: Sequence[int], files: dict[str, str]) -> AtlasManifest:
    counts = DocumentCounts.of_plan(plan)
    return AtlasManifest(
        model=record,
        tokenizer_sha256=plan.tokenizer_sha256,
        shards=list(plan.fingerprints),
        request=_asked(plan.request),
        groups=list(groups),
        documents=len(plan.documents),
        tokens=plan.tokens,
        labels=_cell_records(plan, counts),
        numeric=_numeric_records(plan, counts),
        files=files,
    )


def _cell_records(plan: Plan, counts: DocumentCounts) -> dict[str, dict[str, CellRecord]]:
    return {
        column.name: {
            value: CellRecord(
                counts.cell_documents[:, cell].tolist(),
                counts.cell_tokens[:, cell].tolist(),
                counts.cell_token_squares[:, cell].tolist(),
            )
            for cell, value in enumerate(column.values, plan.schema.first_cell(place))
        }
        for place, column in enumerate(plan.schema.columns)
    }


def _numeric_records(plan: Plan, counts: DocumentCounts) -> dict[str, NumericRecord]:
    records = {}
    for number, numeric in enumerate(plan.schema.numeric):
        tokens = max(1, int(counts.numeric_tokens[number]))
        mean = counts.numeric_total[number] / tokens
        variance = counts.numeric_square[number] / tokens - mean**2
        records[numeric.name] = NumericRecord(
            int(counts.numeric_tokens[number]), float(mean * numeric.scale), float(variance * numeric.scale**2)
        )
    return records


def hash_weights(model: MonetForCausalLM) -> str:
    """SHA-256 over all weights and buffers of the state dict in the order of their names, each as it is in memory."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _asked(request: Request) -> dict[str, object]:
    asked = asdict(request)
    return asked | {"labels": None if request.labels is None else list(request.labels)}


def _identity(record: ModelRecord, plan: Plan, groups: Sequence[int]) -> str:
    """Tells collections apart."""
    documents = sha256_json([int(number) for number in plan.documents.hash])
    return json.dumps(
        {
            "weights": record.weights_sha256, "shards": plan.fingerprints, "documents": documents,
            "labels": asdict(plan.schema), "request": _asked(plan.request), "groups": list(groups),
        }
    )  # fmt: skip
