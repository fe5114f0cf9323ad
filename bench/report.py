"""How a bench reports: Markdown tables, a JSON record, charts as SVG, a marked section of a document."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_COLORS = ("#8a8f98", "#2f6fde", "#d5a021", "#4aa564", "#b04a8a")


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    libraries = {}
    for name in ("feast", "scikit-learn", "redis", "hiredis", "uvicorn", "duckdb", "numpy"):
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.system(),
        "libraries": libraries,
    }


def peak_mb() -> float:
    """This process's own: ``ru_maxrss`` would be the parent's, where that was larger when it started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def times(ratio: float) -> str:
    """A ratio as a table shows it."""
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x"


def write_json(name: str, record: dict[str, Any]) -> None:
    """``bench/results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, default=str) + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def replace_section(document: Path, name: str, text: str) -> bool:
    """Put ``text`` between ``<!-- name:begin -->`` and ``<!-- name:end -->``; False where they are not."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    whole = document.read_text() if document.exists() else ""
    if begin not in whole or end not in whole:
        return False
    head, rest = whole.split(begin, 1)
    document.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}")
    return True


def bar_chart(
    name: str, title: str, unit: str, groups: dict[str, dict[str, float]], *, own_scales: bool = False
) -> None:
    """``bench/results/<name>.svg``: horizontal bars from zero, grouped, with their numbers.

    ``own_scales`` draws each group to its own longest bar, for groups that lie orders of magnitude apart.
    """
    series = list(dict.fromkeys(label for bars in groups.values() for label in bars))
    longest = max(value for bars in groups.values() for value in bars.values())
    left, width, step = 30 + 7 * max(map(len, groups)), 470, 18
    y, parts = 52, [f'<text x="10" y="22" font-size="15">{escape(title)}</text>']
    for group, bars in groups.items():
        middle = y + step * len(bars) / 2 + 2
        parts.append(f'<text x="{left - 10}" y="{middle:.0f}" text-anchor="end">{escape(group)}</text>')
        for label, value in bars.items():
            length = max(1.0, width * value / (max(bars.values()) if own_scales else longest))
            color = _COLORS[series.index(label) % len(_COLORS)]
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            parts.append(
                f'<rect x="{left}" y="{y}" width="{length:.0f}" height="{step - 4}" fill="{color}"/>'
            )
            x = f"{left + length + 5:.0f}"
            parts.append(f'<text x="{x}" y="{y + step - 7}" fill="#555">{text} {escape(label)}</text>')
            y += step
        y += 12
    note = f"{unit}, each group to a scale of its own" if own_scales else unit
    parts.append(f'<text x="10" y="{y + 8}" fill="#777">{escape(note)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 250}" height="{y + 22}" '
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.svg").write_text(
        f'{head}font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def line_chart(
    name: str, title: str, axes: tuple[str, str], lines: dict[str, list[tuple[float, float]]]
) -> None:
    """``bench/results/<name>.svg``: lines of (x, y) on linear axes that begin at 0."""
    left, top, width, height = 70, 48, 720, 260
    right = max(x for points in lines.values() for x, _ in points)
    high = max(y for points in lines.values() for _, y in points) * 1.1
    parts = [f'<text x="10" y="22" font-size="15">{escape(title)}</text>']
    for step in range(6):
        x, y = left + width * step / 5, top + height * (1 - step / 5)
        parts.append(f'<line x1="{left}" y1="{y:.0f}" x2="{left + width}" y2="{y:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{high * step / 5:.0f}</text>')
        label = f"{right * step / 5:.3g}"
        parts.append(f'<text x="{x:.0f}" y="{top + height + 18}" text-anchor="middle">{label}</text>')
    for number, (label, points) in enumerate(lines.items()):
        color = _COLORS[(number + 1) % len(_COLORS)]
        path = " ".join(
            f"{left + width * x / right:.1f},{top + height * (1 - y / high):.1f}" for x, y in points
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(
            f'<text x="{left + 10 + 110 * number}" y="{top - 8}" fill="{color}">{escape(label)}</text>'
        )
    parts.append(
        f'<text x="{left + width}" y="{top + height + 36}" text-anchor="end">{escape(axes[0])}</text>'
    )
    parts.append(f'<text x="{left - 8}" y="{top - 8}" text-anchor="end">{escape(axes[1])}</text>')
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="860" height="{top + height + 50}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
