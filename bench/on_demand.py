"""On-demand views at request time, in process: stock Feast, Banquet, and Banquet's read without them.

    python bench/on_demand.py [--rounds 5] [--scratch DIR]

The same two features computed by a python, a singleton python and a pandas view from two stored features and
a request-time input, at 1, 10 and 100 entities, in turns within one process. Both must give the same values
before anything is timed; stock calls a singleton view for the first row alone, so there it has one value and
is timed at one entity only. "Alone" is what the call of the view itself costs Banquet: the read with it less
the read of the stored features it uses. Prints a Markdown table and writes bench/results/on_demand.json.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import report
from userbase import USERS, Userbase, userbase

ONE_ROW = "python, singleton"
MODES = {"python": "by_column", ONE_ROW: "by_row", "pandas": "by_frame"}
SIZES = (1, 10, 100)
STORED = ("user_behavior:signal_0", "user_behavior:signal_1")


def measure(scene: Userbase, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Per mode, size and contender the median milliseconds of a read."""
    import uvloop
    from feast import FeatureStore

    from core.online import FeaturePlan, OnlineReader
    from core.redis_connection import open_connection
    from core.repository import FeastRepository

    store = FeatureStore(repo_path=str(scene.repo), fs_yaml_file=scene.repo / "stock.yaml")
    repository = FeastRepository.open(scene.repo)
    definitions = repository.definitions()
    loop = uvloop.new_event_loop()
    connection = open_connection(repository.redis)
    reader = OnlineReader(connection)
    loop.run_until_complete(connection.connect())
    draw = random.Random(5)

    def drawn(size: int) -> dict[str, list[Any]]:
        totals = [round(draw.uniform(1.0, 500.0), 2) for _ in range(size)]
        return {"user_id": draw.sample(range(USERS), size), "total": totals}

    def stock(references: list[str], columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        answer: dict[str, list[Any]] = store.get_online_features(references, rows).to_dict()
        return answer

    def median_ms(contender: str, references: list[str], size: int) -> float:
        columns = [drawn(size) for _ in range(10 if contender == "stock" else 200)]
        times = []
        if contender == "stock":
            for given in columns:
                started = time.perf_counter()
                stock(references, given)
                times.append(time.perf_counter() - started)
        else:
            plan = FeaturePlan.for_references(definitions, references)

            async def read_all() -> None:
                for given in columns:
                    started = time.perf_counter()
                    await reader.read(plan, given, size)
                    times.append(time.perf_counter() - started)

            loop.run_until_complete(read_all())
        return statistics.median(times) * 1e3

    found: dict[str, dict[str, dict[str, float]]] = {}
    for mode, view in MODES.items():
        references = [f"{view}:share", f"{view}:above"]
        given = drawn(100)
        plan = FeaturePlan.for_references(definitions, references)
        ours = loop.run_until_complete(reader.read(plan, given, 100)).values
        theirs = stock(references, given)
        for name in ("share", "above"):
            rows = 1 if mode == ONE_ROW else 100
            assert ours[f"{view}__{name}"][:rows] == theirs[name], f"{view}:{name} differs"
        found[mode] = {}
        for size in SIZES:
            asked = {"banquet": references, "stored": list(STORED)}
            if mode != ONE_ROW or size == 1:
                asked["stock"] = references
            turns: dict[str, list[float]] = {name: [] for name in asked}
            for turn in range(rounds + 1):
                for name, wanted in asked.items():
                    taken = median_ms(name, wanted, size)
                    if turn:  # the first is for warming up
                        turns[name].append(taken)
            cell = {name: statistics.median(times) for name, times in turns.items()}
            if "stock" in turns:
                pairs = zip(turns["stock"], turns["banquet"], strict=True)
                cell["ratio"] = statistics.median(a / b for a, b in pairs)
            found[mode][str(size)] = cell
    loop.run_until_complete(connection.close())
    return found


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as Markdown."""
    rows = [
        [
            f"{mode}, {size}",
            f"{cell['stock']:.3f}" if "stock" in cell else "",
            f"{cell['banquet']:.3f}",
            f"{cell['banquet'] - cell['stored']:.3f}",
            f"{cell['ratio']:.1f}x" if "ratio" in cell else "",
        ]
        for mode, sizes in found.items()
        for size, cell in sizes.items()
    ]
    header = ["view, entities", "stock, ms", "Banquet, ms", "of it the view alone, ms", "stock to Banquet"]
    return report.table(header, rows)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "banquet-bench-serving")
    parser.add_argument("--dry", action="store_true", help="print only; leave results and documents alone")
    options = parser.parse_args()
    with userbase(options.scratch) as scene:
        os.environ.update(scene.environment)
        os.chdir(scene.repo)
        found = measure(scene, options.rounds)
    print(table(found))
    if not options.dry:
        report.write_json("on_demand", {"machine": report.machine(), "milliseconds": found})
        report.replace_section(
            Path(__file__).parents[1] / "docs" / "performance.md", "on-demand", table(found)
        )


if __name__ == "__main__":
    main()
