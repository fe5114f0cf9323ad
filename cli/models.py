"""Commands for models: train and the registry."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from cli.main import Context, main

if TYPE_CHECKING:
    from core.registry import Change, ModelRegistry
    from core.repository import FeastRepository
    from core.settings import Settings
    from training.trainer import TrainingReport


def open_registry() -> ModelRegistry:
    """The registry that the settings name."""
    from core.registry import ModelRegistry
    from core.settings import load_settings

    return ModelRegistry.of(load_settings())


@main.command()
@click.option("--spec", required=True, help="MODULE:NAME or FILE.py:NAME of a ModelSpec.")
@click.pass_obj
def train(ctx: Context, spec: str) -> None:
    """Build the training set, fit, evaluate and register a model."""
    from core.repository import FeastRepository
    from training.spec import load_spec
    from training.trainer import train as run

    repository = FeastRepository.open(ctx.repo)
    report = run(repository, open_registry(), load_spec(spec), say=ctx.say)
    ctx.report(report.to_json(), _training_text(report))


def train_unless_there(ctx: Context, repository: FeastRepository, settings: Settings, reference: str) -> str:
    """Train the spec's model where it has no champion; a line that says which version serves."""
    from core.registry import CHAMPION, ModelRegistry
    from training.spec import load_spec

    spec = load_spec(reference)
    registry = ModelRegistry.of(settings)
    champion = registry.aliases(spec.name).get(CHAMPION)
    if champion is not None:
        return f"{spec.name} version {champion} is the champion"
    from training.trainer import train as run

    ctx.say("")
    report = run(repository, registry, spec, say=lambda line: ctx.say(f"  {line}"))
    ctx.say(_training_text(report))
    return f"{'':<14}{spec.name} version {report.manifest.version} registered as {report.alias}"


def _training_text(report: TrainingReport) -> str:
    """Metrics of the model and its baselines on the held-out rows, as a table."""
    manifest = report.manifest
    metrics = manifest.metrics
    rows: dict[str, Mapping[str, Any]] = {manifest.name: metrics, **metrics["baselines"]}
    names = [name for name, value in metrics.items() if isinstance(value, float)]
    lines = [f"  {'held-out rows':<20}" + "".join(f"{name.replace('_', ' '):>19}" for name in names)]
    for row, values in rows.items():
        cells = "".join(f"{values[name]:>19.4f}" if name in values else f"{'':>19}" for name in names)
        lines.append(f"  {row.replace('_', ' '):<20}{cells}")
    verdict = "beats every baseline" if report.beats_baselines else "does NOT beat every baseline"
    lines.append(
        f"  Version {manifest.version} {verdict}; registered as {report.alias}, "
        f"runs as {manifest.compiled.form}."
    )
    return "\n".join(lines)


@main.group()
def models() -> None:
    """The model registry: list, show, promote, rollback, verify."""


@models.command("list")
@click.pass_obj
def list_models(ctx: Context) -> None:
    """Every model with its versions and aliases."""
    registry = open_registry()
    found = {name: (registry.versions(name), registry.aliases(name)) for name in registry.models()}
    data = [{"name": n, "versions": versions, "aliases": aliases} for n, (versions, aliases) in found.items()]
    lines = []
    for name, (versions, aliases) in found.items():
        shown = ", ".join(f"{alias}: {version}" for alias, version in aliases.items())
        lines.append(f"{name}  {len(versions)} version{'s' if len(versions) > 1 else ''}  {shown}")
    ctx.report(data, "\n".join(lines) or f"No models in {registry.url}.")


@models.command()
@click.argument("reference")
@click.pass_obj
def show(ctx: Context, reference: str) -> None:
    """The manifest of a version: models:/NAME@ALIAS or models:/NAME/VERSION."""
    import json

    registry = open_registry()
    manifest = json.loads(registry.manifest(*registry.resolve(reference)).to_json())
    if not ctx.as_json:
        manifest["golden"] = f"{len(manifest['golden'])} rows"
    ctx.report(manifest, json.dumps(manifest, indent=2))


@models.command()
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="Default: the challenger.")
@click.option("--why", default="", help="Kept in the history.")
@click.pass_obj
def promote(ctx: Context, name: str, version: int | None, why: str) -> None:
    """Make a version champion; the champion before it becomes `previous`."""
    report_change(ctx, name, open_registry().promote(name, version, why=why))


@models.command()
@click.argument("name")
@click.option("--why", default="", help="Kept in the history.")
@click.pass_obj
def rollback(ctx: Context, name: str, why: str) -> None:
    """Bring the previous champion back."""
    report_change(ctx, name, open_registry().rollback(name, why=why))


@models.command()
@click.argument("name")
@click.pass_obj
def history(ctx: Context, name: str) -> None:
    """What the aliases were set to, by whom, when and why."""
    changes = open_registry().history(name)
    data = [change_data(change) for change in changes]
    lines = [
        f"{c.when:%Y-%m-%d %H:%M:%S}  {c.who}  {c.action}  {_aliases_text(c.aliases)}  {c.why}".rstrip()
        for c in changes
    ]
    ctx.report(data, "\n".join(lines) or f"Model {name!r} has no history.")


@models.command()
@click.argument("reference", required=False)
@click.pass_obj
def verify(ctx: Context, reference: str | None) -> None:
    """Re-check every digest, of one version or of all; exit 1 where one differs."""
    from core.errors import BanquetError

    registry = open_registry()
    if reference:
        wanted = [registry.resolve(reference)]
    else:
        wanted = [(name, number) for name in registry.models() for number in registry.versions(name)]
    results = []
    for name, number in wanted:
        try:
            registry.verify(name, number)
        except BanquetError as error:
            results.append(
                {"name": name, "version": number, "ok": False, "code": error.code, "detail": str(error)}
            )
        else:
            results.append({"name": name, "version": number, "ok": True})
    lines = [f"{r['name']}/{r['version']}: {'ok' if r['ok'] else r['detail']}" for r in results]
    ctx.report(results, "\n".join(lines) or f"No models in {registry.url}.")
    if not all(result["ok"] for result in results):
        sys.exit(1)


def report_change(ctx: Context, name: str, change: Change) -> None:
    """What a change left: aliases and rollout."""
    text = f"{name}: {_aliases_text(change.aliases)}"
    if change.rollout is not None:
        rollout = change.rollout
        text += f"; {rollout.kind} of version {rollout.version} at {rollout.step.percent:g} %"
    ctx.report(change_data(change), text)


def change_data(change: Change) -> dict[str, Any]:
    """An entry of a model's history as JSON data."""
    import json

    from core import records

    data: dict[str, Any] = json.loads(records.to_json(change))
    return data


def _aliases_text(aliases: Mapping[str, int]) -> str:
    return ", ".join(f"{alias}: {version}" for alias, version in sorted(aliases.items()))
