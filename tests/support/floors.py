"""Which package imports which, read from the sources, and the order that no import may break.

python -m tests.support.floors            print the picture and the list of docs/architecture.md
python -m tests.support.floors --write    put them there
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("monet_train", "data_prep")
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports -->\n", "<!-- end of imports -->\n"

# From the ground up. A package may import those of lower floors, and those of its own floor if they make no circle.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "durable", "typed", "fingerprint"),
    ("tokenizers",),
    ("kernels",),
    ("parallel",),
    ("model",),
    ("config",),
    ("planning",),
    ("checkpoints",),
    ("data",),
    ("interop",),
    ("training",),
    ("analysis",),
    ("ownership",),
    ("train",),
    ("monet_train",),  # its __init__: the public names
    ("data_prep",),  # a program of its own, on top of monet_train
)
HEIGHT = {package: height for height, packages in enumerate(FLOORS) for package in packages}


class Import(NamedTuple):
    """One import statement."""

    importer: str  # module, dotted
    imported: str  # module, dotted
    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({package(self.importer)}) imports {self.imported} ({package(self.imported)})"


def package(module: str) -> str:
    """The package of a dotted module: its package below ``monet_train``, ``monet_train`` itself, or ``data_prep``."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] or top if top == "monet_train" else top


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the sources by its dotted name."""
    found = {}
    for source in SOURCES:
        for file in sorted((root / source).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(root: Path = ROOT) -> list[Import]:
    """Every import of one module of the sources by another: also inside functions and under TYPE_CHECKING."""
    known = modules(root)
    return [
        Import(name, imported, file.relative_to(root), line)
        for name, file in known.items()
        for imported, line in _imported(ast.parse(file.read_bytes()), name, file.name == "__init__.py", known)
    ]


def packages(found: list[Import]) -> dict[str, set[str]]:
    """For each package the other packages that it imports."""
    graph: dict[str, set[str]] = {}
    for statement in found:
        source, target = package(statement.importer), package(statement.imported)
        graph.setdefault(source, set())
        graph.setdefault(target, set())
        if source != target:
            graph[source].add(target)
    return graph


def upward(found: list[Import]) -> list[Import]:
    """The imports that run up."""
    return [each for each in found if HEIGHT[package(each.imported)] > HEIGHT[package(each.importer)]]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle in the graph, first node repeated at its end, or an empty list."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph[node]):
            if found := visit(following, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def _imported(tree: ast.Module, name: str, is_package: bool, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, name, is_package)
            # `from package import name`: the module of that name if there is one, else the package
            targets = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            targets = [part.value for part in node.args if isinstance(part, ast.Constant)]
        else:
            continue
        for target in targets:
            if str(target).partition(".")[0] in SOURCES:
                yield target, node.lineno


def _absolute(node: ast.ImportFrom, name: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *(node.module or "").split(".")]).rstrip(".")


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph without the edges that follow from others.

    Raises:
        ValueError: it has a circle.
    """
    if found := circle(graph):
        raise ValueError(" imports ".join(found))

    def below(name: str) -> set[str]:
        return graph[name].union(*(below(target) for target in graph[name]))

    return {name: graph[name] - set().union(*(below(target) for target in graph[name])) for name in graph}


def documented() -> str:
    """The picture (a Mermaid graph of the edges that do not follow from others) and the list of all, as Markdown."""
    graph = packages(imports())
    ordered = [name for floor in FLOORS for name in floor if name in graph]
    drawn = reduced(graph)
    arrows = [f"  {name} --> {target}" for name in reversed(ordered) for target in sorted(drawn[name])]
    lines = [f"{name:12} imports  {', '.join(sorted(graph[name], key=ordered.index)) or 'nothing'}" for name in ordered]
    picture, listing = "\n".join(arrows), "\n".join(lines)
    return f"```mermaid\ngraph TD\n{picture}\n```\n\n```\n{listing}\n```\n"


def main() -> None:
    """Print what :func:`documented` gives, or put it into the page."""
    if "--write" not in sys.argv:
        print(documented())
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{documented()}{END}{after}")


if __name__ == "__main__":
    main()
