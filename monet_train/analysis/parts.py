"""What each worker has collected so far, on the disk: how a collection survives a kill, and how workers are joined.

A part is a folder with an array per file and the list of the documents that it covers. It is written under a temporary
name and renamed, so that it is whole or absent. Parts are sums, so it does not matter how many there are, or which
worker wrote them: a collection that goes on with another number of workers reads what is left and adds parts.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from monet_train.durable import sync, write_atomically
from monet_train.errors import UserError

DOCUMENTS = "documents"  # bool [D], those that are in the part
PARTS, IDENTITY = "parts", "identity"


class Parts:
    """The parts of a collection.

    Args:
        folder: of the atlas that is being made.
        identity: of the collection; parts of another are refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self._identity = folder / PARTS, identity

    def open(self) -> None:
        """Make the folder, or check that what is there belongs to this collection.

        Raises:
            UserError: another collection was begun in the same place.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / IDENTITY
        if not file.exists():
            write_atomically(file, self._identity.encode())
        if file.read_text() != self._identity:
            raise UserError(
                f"{self.folder.parent} holds an unfinished collection of another model, other data or other options; "
                "give the same ones to finish it, another --out, or delete the folder"
            )

    def clean(self) -> None:
        """Remove what a kill left half-written, and parts that a later part of the same worker replaced."""
        for path in self.folder.glob("*.tmp"):
            shutil.rmtree(path)
        newest: dict[str, Path] = {}
        for path in self.paths():
            older = newest.get(_worker(path))
            if older is not None:
                shutil.rmtree(older)
            newest[_worker(path)] = path

    def paths(self) -> list[Path]:
        """The parts that are whole; of a worker that was killed between two steps the older one may still be there."""
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.endswith(".tmp"))

    def done(self, documents: int) -> np.ndarray:
        """Which documents are in some part, bool [D]."""
        found = np.zeros(documents, bool)
        for path in self.paths():
            found |= np.load(path / f"{DOCUMENTS}.npy")
        return found

    def write(self, worker: str, number: int, arrays: dict[str, np.ndarray], replaces: Path | None) -> Path:
        """Write what a worker has, in place of what it wrote before.

        Args:
            worker: its name, of this start alone. number: grows from one part of a worker to the next.
            arrays: with DOCUMENTS among them.
            replaces: its part before.
        """
        final = self.folder / f"{worker}.{number:06d}"
        temporary = final.with_name(f"{final.name}.tmp")
        temporary.mkdir()
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as stream:
                np.save(stream, array)
            sync(temporary / f"{name}.npy")
        sync(temporary)
        temporary.rename(final)
        sync(self.folder)
        if replaces is not None:
            shutil.rmtree(replaces)
        return final

    def remove(self) -> None:
        """Remove all parts, when the atlas is whole."""
        shutil.rmtree(self.folder)


def read_part(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a part, mapped into memory."""
    return {file.name.removesuffix(".npy"): np.load(file, mmap_mode="r") for file in path.glob("*.npy")}


def _worker(path: Path) -> str:
    return path.name.rpartition(".")[0]
