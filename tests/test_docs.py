"""The documentation: links lead somewhere, lines are under 120 columns, the README is short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README_WORDS = 1000
COLUMNS = 120


PAGES = sorted(str(page.relative_to(ROOT)) for folder in (".", "docs", "csrc") for page in (ROOT / folder).glob("*.md"))


def anchors(page: Path) -> set[str]:
    """The fragments that headings of a page get: lower case, punctuation dropped, spaces as hyphens."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        if not linked.exists() or (fragment and fragment not in anchors(linked)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page: str) -> None:
    lines = (ROOT / page).read_text().splitlines()
    assert not [f"{page}:{number}" for number, line in enumerate(lines, 1) if len(line) >= COLUMNS]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert not [
        page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index and page.name != "README.md"
    ]
