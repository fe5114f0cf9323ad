"""The import rules of the house, held by reading the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "materialization", "training", "serving", "monitoring", "cli", "demo")
SIBLINGS = {"materialization", "training", "serving", "monitoring"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "materialization": {"core"},
    "training": {"core"},
    "serving": {"core"},
    "monitoring": {"core"},
    "cli": {"core", *SIBLINGS},
    "demo": {"core", "training"},
    "feature_repo": set(),
}


def modules() -> Iterator[tuple[str, Path]]:
    for package in MAY_IMPORT:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield package, path


def imported(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node.lineno


@pytest.mark.parametrize(
    ("package", "path"), [pytest.param(*m, id=str(m[1].relative_to(ROOT))) for m in modules()]
)
def test_imports_run_one_way(package: str, path: Path) -> None:
    for name, line in imported(path):
        top = name.partition(".")[0]
        if top in {*PACKAGES, "feature_repo", "tests", "bench"} and top != package:
            assert top in MAY_IMPORT[package], f"{path.relative_to(ROOT)}:{line} imports {name}"
        if top in {"fastapi", "starlette"}:
            assert package in {"serving", "monitoring"}, f"{path.relative_to(ROOT)}:{line} imports {name}"


def test_no_helper_grab_bags() -> None:
    grab_bags = [p for _, p in modules() if p.stem in {"utils", "util", "helpers", "common", "misc"}]
    assert not grab_bags


def test_the_command_line_starts_without_heavy_imports() -> None:
    """`banquet --help` answers at once: nothing it imports pulls in Feast, pandas or scikit-learn."""
    import subprocess

    heavy = ("feast", "pandas", "sklearn", "pyarrow", "duckdb", "fastapi", "numpy")
    code = f"import cli.main, sys; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert out.stdout.strip() == "[]"
