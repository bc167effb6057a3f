"""The order of the packages: an import never runs up a floor, and no packages import each other in a circle."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support import floors


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def test_every_package_has_a_floor() -> None:
    missing = {floors.package(name) for name in floors.modules()} - floors.HEIGHT.keys()
    assert not missing, f"give {', '.join(sorted(missing))} a floor in tests/support/floors.py"


def test_no_import_runs_up() -> None:
    upward = floors.upward(floors.imports())
    assert not upward, "imports that run up:\n" + "\n".join(map(str, upward))


def test_no_circle_between_packages() -> None:
    circle = floors.circle(floors.packages(floors.imports()))
    assert not circle, " imports ".join(circle)


def test_the_page_shows_the_imports() -> None:
    """Picture and list of docs/architecture.md follow the sources, and its floor plan is the order tested here."""
    page = floors.PAGE.read_text()
    shown = page.partition(floors.BEGIN)[2].partition(floors.END)[0]
    assert shown == floors.documented(), "run python -m tests.support.floors --write"
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", page, re.MULTILINE)
    plan = [re.findall(r"`(?:monet_train/)?(\w+)(?:\.py)?`", row) for row in rows]
    names = [["monet_train" if name == "__init__" else name for name in row] for row in plan]
    assert names == [list(floor) for floor in reversed(floors.FLOORS)]


def test_imports_are_found_wherever_they_are(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "monet_train/__init__.py": "",
            "monet_train/errors.py": "import monet_train.train\n",
            "monet_train/train.py": "",
            "monet_train/data/__init__.py": "",
            "monet_train/data/corpus.py": "def read():\n    from ..training import loop\n",
            "monet_train/training/__init__.py": "",
            "monet_train/training/loop.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n"
                "    from data_prep.ids import Ids\n"
                "import importlib\n"
                "late = importlib.import_module('monet_train.data.corpus')\n"
            ),
            "data_prep/__init__.py": "",
            "data_prep/ids.py": "from monet_train import errors\n",
        },
    )
    found = floors.imports(tmp_path)
    assert {(each.importer, each.imported, each.line) for each in found} == {
        ("monet_train.errors", "monet_train.train", 1),
        ("monet_train.data.corpus", "monet_train.training.loop", 2),
        ("monet_train.training.loop", "data_prep.ids", 3),
        ("monet_train.training.loop", "monet_train.data.corpus", 5),
        ("data_prep.ids", "monet_train.errors", 1),
    }
    assert {floors.package(each.imported) for each in floors.upward(found)} == {"train", "training", "data_prep"}
    assert floors.circle(floors.packages(found)) == ["data", "training", "data"]
