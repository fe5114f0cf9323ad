"""The table of traps in docs/feast-traps.md is whole, and the tests that it names are there."""

from __future__ import annotations

import ast
import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
ROWS = re.findall(r"^\| ([\d, ]+) \|(.*)\|$", (ROOT / "docs" / "feast-traps.md").read_text(), re.MULTILINE)
# What the other stores and clients offer is no fault of anything, so nothing can show it.
WITHOUT_A_TEST = {20}


def test_every_trap_is_there_once() -> None:
    numbers = [int(number) for cell, _ in ROWS for number in cell.split(",")]
    assert sorted(numbers) == list(range(1, 31))


def test_every_named_test_exists_and_every_trap_has_one() -> None:
    there = {
        node.name
        for file in (ROOT / "tests").rglob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    for cell, row in ROWS:
        named = re.findall(r"`(test_\w+)`", row)
        assert set(named) <= there, cell
        assert named or int(cell) in WITHOUT_A_TEST, cell


def test_what_feast_does_not_run_on_is_kept_out() -> None:
    """Whoever installs the package, by whatever resolver, gets no redis-py 8 and no pandas 3."""
    needs = {need.name: need for need in map(Requirement, requires("feast-banquet") or []) if not need.marker}
    assert not needs["redis"].specifier.contains("8.0.0")
    assert not needs["pandas"].specifier.contains("3.0.0")
    assert needs["feast"].extras == {"redis"}
