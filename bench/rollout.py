"""What a rollout costs on /predict: a canary at 50 % and a shadow at 100 % beside no rollout.

    python bench/rollout.py [--seconds 4] [--rounds 5] [--shapes 1x8,50x8] [--scratch DIR] [--dry]

Three servers of one worker each, on the same Redis, definitions and model, driven by wrk in turns; a ratio is
the median of the ratios within each round. The version on trial is the champion's own package once more, so
only the machinery differs, and before anything is timed all three must give the same predictions. The
rollouts are manual: nothing is judged, and they stay where they are.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import report  # noqa: E402 — the folder is no package: its files are scripts
from userbase import USERS, Userbase, userbase  # noqa: E402

from core import rollouts  # noqa: E402
from core.registry import ModelRegistry  # noqa: E402
from core.traffic import Step  # noqa: E402
from serving import (  # noqa: E402
    KEY,
    Running,
    Server,
    Target,
    get,
    load_options,
    load_parser,
    measure_load,
    running,
)

MODEL = "churn"
NONE, CANARY, SHADOW = "no rollout", "canary at 50 %", "shadow at 100 %"
FIGURES = {"rps": "req/s", "p99_ms": "p99", "cpu_us": "CPU"}


def registry_with(scene: Userbase, kind: str) -> str:
    """A copy of the registry with that rollout under way; its folder."""
    folder = scene.folder / "rollouts" / kind.partition(" ")[0]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(scene.folder / "models", folder)
    registry = ModelRegistry(str(folder))
    champion = registry.manifest(MODEL, 1)
    files = {name: registry.artifact(champion, name) for name in champion.artifacts}
    registry.register(
        MODEL, files, lambda version, digests: replace(champion, version=version, artifacts=digests)
    )
    if kind != NONE:
        one = Step(50) if kind == CANARY else Step(100)
        kind_name = "canary" if kind == CANARY else "shadow"
        rollouts.start(registry, MODEL, kind=kind_name, version=2, steps=[one], automatic=False)
    return str(folder)


def server(scene: Userbase, kind: str) -> Server:
    """One worker in front of that registry."""
    return Server(
        kind.replace(" ", "-").replace("-%", ""),
        ("banquet", "--repo", ".", "serve", "--port", "{port}"),
        "/readyz",
        {"BANQUET_API_KEYS": KEY, "BANQUET_REGISTRY_URL": registry_with(scene, kind)},
    )


def check_answers(up: dict[str, Running]) -> dict[str, Any]:
    """Raises AssertionError unless all give the same predictions and the canary answers about half."""
    rows = {"entities": [{"user_id": user} for user in range(0, USERS, USERS // 300)]}
    answers = {name: json.loads(get(f"{one.url}/predict", rows)[1]) for name, one in up.items()}
    expected = answers[NONE]["predictions"]
    plain = [{key: row[key] for key in ("entity", "prediction", "confidence")} for row in expected]
    for name, answer in answers.items():
        found = [
            {key: row[key] for key in ("entity", "prediction", "confidence")} for row in answer["predictions"]
        ]
        assert found == plain, f"{name} predicts otherwise"
    head = answers[CANARY]["model_version"]
    canary = sum(row.get("model_version", head) == 2 for row in answers[CANARY]["predictions"])
    assert 0.35 < canary / len(plain) < 0.65, f"the canary answered {canary} of {len(plain)}"
    assert answers[SHADOW]["model_version"] == 1
    return {"predictions_equal": len(plain), "by_canary": canary}


def ratios(turns: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """To no rollout, medians of the ratios within each round."""
    return {
        f"{kind} {figure}": statistics.median(
            a[figure] / b[figure] for a, b in zip(turns[kind], turns[NONE], strict=True)
        )
        for kind in (CANARY, SHADOW)
        for figure in FIGURES
    }


def table(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = []
    for cell in record["load"]:
        base = cell["targets"][NONE]
        rows.append(
            [
                f"{cell['entities']}, {cell['connections']}",
                f"{base['rps']:,.0f} req/s, p99 {base['p99_ms']:.1f} ms, {base['cpu_us']:,.0f} us CPU",
                *(
                    ", ".join(
                        f"{name} {cell['ratios'][f'{kind} {figure}']:.2f}x"
                        for figure, name in FIGURES.items()
                    )
                    for kind in (CANARY, SHADOW)
                ),
            ]
        )
    return report.table(["entities, connections", NONE, CANARY, SHADOW], rows)


def main() -> None:
    """Measure, print, keep."""
    options, shapes = load_options(load_parser(__doc__, "rollout", shapes="1x8,1x32,50x8", rounds=5))
    targets = tuple(Target(kind, kind, "/predict", "rows") for kind in (NONE, CANARY, SHADOW))
    record: dict[str, Any] = {
        "machine": report.machine(),
        "seconds": options.seconds,
        "rounds": options.rounds,
    }
    with userbase(options.scratch) as scene, ExitStack() as stack:
        up = {
            kind: stack.enter_context(running(server(scene, kind), scene)) for kind in (NONE, CANARY, SHADOW)
        }
        record["checks"] = check_answers(up)
        record["load"] = measure_load(scene, up, targets, shapes, options.seconds, options.rounds, ratios)
    text = table(record)
    print(text)
    if options.dry:
        return
    report.write_json("rollout", record)
    groups = {
        f"{cell['entities']} x {cell['connections']}": {
            kind: shown["cpu_us"] for kind, shown in cell["targets"].items()
        }
        for cell in record["load"]
    }
    report.bar_chart(
        "rollout", "CPU per request of /predict, entities x connections, one worker", "microseconds", groups
    )
    report.replace_section(HERE.parent / "docs" / "rollouts.md", "rollout", text)


if __name__ == "__main__":
    main()
