"""Commands for models: train and the registry."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from cli.main import Context, main

if TYPE_CHECKING:
    from core.registry import Change, ModelRegistry
    from core.repository import FeastRepository
    from core.traffic import Rollout
    from training.trainer import TrainingReport


def open_registry(ctx: Context) -> ModelRegistry:
    """The registry that the settings name."""
    from core.registry import ModelRegistry

    return ModelRegistry.of(ctx.settings)


@main.command()
@click.option("--spec", required=True, help="MODULE:NAME or FILE.py:NAME of a ModelSpec.")
@click.pass_obj
def train(ctx: Context, spec: str) -> None:
    """Build the training set, fit, evaluate and register a model."""
    from core.repository import FeastRepository
    from training.spec import load_spec
    from training.trainer import train as run

    repository = FeastRepository.open(ctx.repo)
    report = run(repository, open_registry(ctx), load_spec(spec), say=ctx.say)
    ctx.report(report.to_json(), _training_text(report))


def train_unless_there(ctx: Context, repository: FeastRepository, reference: str) -> str:
    """Train the spec's model where it has no champion; a line that says which version serves."""
    from core.registry import CHAMPION
    from training.spec import load_spec

    spec = load_spec(reference)
    registry = open_registry(ctx)
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
    judgement = report.judgement
    verdict = "beats every baseline" if judgement.beats else "does NOT beat every baseline"
    lines.append(
        f"  Version {manifest.version} {verdict} in {_spoken(judgement.by)}; registered as {report.alias}, "
        f"runs as {manifest.compiled.form}."
    )
    lines += [
        f"  In {_spoken([metric])} it does not beat {_spoken(names)}."
        for metric, names in judgement.not_better.items()
    ]
    return "\n".join(lines)


def _spoken(names: Sequence[str]) -> str:
    return " and ".join(name.replace("_", " ") for name in names)


@main.group()
def models() -> None:
    """The model registry: its versions, and where the traffic goes."""


@models.command("list")
@click.pass_obj
def list_models(ctx: Context) -> None:
    """Every model with its versions and aliases."""
    from core.errors import CheckFailed

    registry = open_registry(ctx)
    data: list[dict[str, Any]] = []
    for name in registry.models():
        found: dict[str, Any] = {"name": name, "versions": registry.versions(name), "aliases": {}}
        try:
            found["aliases"] = registry.aliases(name)
        except CheckFailed as error:
            found |= {"code": error.code, "detail": error.message}
        data.append(found)
    width = max((len(found["name"]) for found in data), default=0)
    lines = []
    for found in data:
        count = len(found["versions"])
        shown = found.get("detail") or _aliases_text(found["aliases"]) or "no alias"
        lines.append(f"{found['name']:<{width}}  {count:>3} version{'s' if count > 1 else ' '}  {shown}")
    ctx.report(data, "\n".join(lines) or f"No models in {registry.url}.")


@models.command()
@click.argument("reference")
@click.pass_obj
def show(ctx: Context, reference: str) -> None:
    """A version's manifest.

    REFERENCE is NAME@ALIAS, NAME/VERSION or NAME, which means its champion.
    """
    import json

    registry = open_registry(ctx)
    manifest = json.loads(registry.manifest(*registry.resolve(reference)).to_json())
    if not ctx.as_json:
        manifest["golden"] = f"{len(manifest['golden'])} rows"
    ctx.report(manifest, json.dumps(manifest, indent=2))


@models.command()
@click.argument("name")
@click.option("--version", type=click.IntRange(1), help="Default: the version on trial, else the challenger.")
@click.option("--why", default="", help="Kept in the history.")
@click.pass_obj
def promote(ctx: Context, name: str, version: int | None, why: str) -> None:
    """Make a version champion.

    The champion before it becomes `previous`, which `rollback` brings back. A rollout of the version ends.
    """
    registry = open_registry(ctx)
    report_change(ctx, registry, name, registry.promote(name, version, why=why))


@models.command()
@click.argument("name")
@click.option("--why", default="", help="Kept in the history.")
@click.pass_obj
def rollback(ctx: Context, name: str, why: str) -> None:
    """Bring the previous champion back."""
    registry = open_registry(ctx)
    report_change(ctx, registry, name, registry.rollback(name, why=why))


@models.command()
@click.argument("name")
@click.argument("alias")
@click.argument("version", type=click.IntRange(1), required=False)
@click.option("--delete", is_flag=True, help="Remove the alias.")
@click.option(
    "--leave-no-champion", is_flag=True, help="Allow --delete of champion: the model stops serving."
)
@click.option("--why", default="", help="Kept in the history.")
@click.pass_obj
def alias(
    ctx: Context,
    name: str,
    alias: str,
    version: int | None,
    delete: bool,
    leave_no_champion: bool,
    why: str,
) -> None:
    """Point an alias to a version, or remove it."""
    from core.errors import InvalidRequest
    from core.registry import CHAMPION

    if (version is None) is not delete:
        raise click.UsageError("Give a version, or --delete.")
    if alias == CHAMPION and not delete:
        raise InvalidRequest(
            "The champion is not moved as an alias: nothing would remember the one before it.",
            hint=f"Run `banquet models promote {name} --version {version}`.",
        )
    if alias == CHAMPION and not leave_no_champion:
        raise InvalidRequest(
            f"Without a champion, model {name!r} stops serving.",
            hint="If that is meant, pass --leave-no-champion; to go back to the one before, `rollback`.",
        )
    registry = open_registry(ctx)
    report_change(ctx, registry, name, registry.set_alias(name, alias, version, why=why))


@models.command()
@click.argument("name")
@click.pass_obj
def history(ctx: Context, name: str) -> None:
    """What the aliases were set to, by whom, when and why."""
    registry = open_registry(ctx)
    changes = registry.history(name)
    if not changes:
        registry.require(name)
    data = [change_data(change) for change in changes]
    lines = []
    for c in changes:
        when = f"{c.when:%Y-%m-%d %H:%M:%S}"
        lines.append("  ".join((f"{c.number:>4}", when, c.who, c.action, _traffic_text(c), c.why)).rstrip())
    ctx.report(data, "\n".join(lines) or f"Model {name!r} has no history.")


@models.command()
@click.argument("reference", required=False)
@click.pass_obj
def verify(ctx: Context, reference: str | None) -> None:
    """Re-check digests, signatures, histories.

    Of one version, or of everything; exit 1 where one fails. Without a key or pins, who can write to the
    registry can write digests that match.
    """
    from core.errors import BanquetError

    registry = open_registry(ctx)
    if reference:
        wanted: list[tuple[str, int | None]] = [registry.resolve(reference)]
    else:
        wanted = []
        for name in registry.models():
            wanted += [(name, None), *((name, number) for number in registry.versions(name))]
    results = []
    for name, number in wanted:
        try:
            if number is None:
                registry.history(name)
            else:
                registry.verify(name, number)
        except BanquetError as error:
            failure = {"ok": False, "code": error.code, "detail": str(error)}
        else:
            failure = {"ok": True}
        results.append({"name": name, "version": number, **failure})
    lines = [f"{r['name']}/{r['version'] or 'history'}: {'ok' if r['ok'] else r['detail']}" for r in results]
    ctx.report(results, "\n".join(lines) or f"No models in {registry.url}.")
    if not all(result["ok"] for result in results):
        sys.exit(1)
    if results and not registry.trust.keys and registry.trust.pins is None:
        ctx.say(
            "Nothing is signed or pinned: who can write to the registry can write digests that match.\n"
            "  BANQUET_REGISTRY_KEY and BANQUET_PINNED_MODELS protect from that (docs/models.md)."
        )


@models.command()
@click.argument("name")
@click.option("--keep", type=click.IntRange(1), help="Keep this many of the newest versions.")
@click.option("--older-than", help="Remove only what was created longer ago than this: 36h, 30d.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed and remove nothing.")
@click.option("--why", default="", help="Kept in the history.")
@click.pass_obj
def prune(ctx: Context, name: str, keep: int | None, older_than: str | None, dry_run: bool, why: str) -> None:
    """Remove old versions that are not in use.

    A version that an alias or a rollout points to stays, and so does one whose manifest is not sound.
    """
    from dataclasses import asdict

    from cli.features import duration
    from core.retention import prune as run

    span = None if older_than is None else duration(older_than)
    if dry_run and keep is None and span is None:
        ctx.say("Without a limit: all that nothing points to. Removing takes --keep, --older-than or both.")
    done = run(open_registry(ctx), name, keep=keep or 0, older_than=span, dry_run=dry_run, why=why)
    would = "would be removed" if dry_run else "removed"
    lines = [f"{name}/{number}: {would}" for number in done.versions]
    lines += [f"{name}/{number}: what an interrupted step left, {would}" for number in done.leftovers]
    lines += [f"{name}/{number}: kept, {reason}" for number, reason in done.kept.items()]
    ctx.report({"name": name, "dry_run": dry_run, **asdict(done)}, "\n".join(lines))


@models.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.pass_obj
def sign(ctx: Context, names: tuple[str, ...]) -> None:
    """Sign what is not signed by the first key.

    For what was there before BANQUET_REGISTRY_KEY was set, and for a change of keys. You vouch for what is
    unsigned: nothing says where it came from.
    """
    registry = open_registry(ctx)
    data, lines = [], []
    for name in names:
        versions, entries = registry.sign(name)
        data.append({"name": name, "versions": versions, "history": entries})
        lines += [f"{name}/{number}: signed" for number in versions]
        if entries:
            lines.append(f"{name}/history: {len(entries)} entries signed")
    ctx.report(data, "\n".join(lines) or "Everything is signed by the first key.")


@models.command()
@click.argument("references", nargs=-1, metavar="[REFERENCE]...")
@click.pass_obj
def pins(ctx: Context, references: tuple[str, ...]) -> None:
    """Print what BANQUET_PINNED_MODELS takes.

    The digests of these versions, or of every version that has an alias.
    """
    import json

    from core.registry import ModelRegistry

    registry = ModelRegistry.of(ctx.settings.model_copy(update={"pinned_models": None}))
    if references:
        wanted = [registry.resolve(reference) for reference in references]
    else:
        wanted = [
            (name, number)
            for name in registry.models()
            for number in sorted(set(registry.aliases(name).values()))
        ]
    data = {}
    for name, number in wanted:
        registry.verify(name, number)
        data[f"{name}/{number}"] = registry.manifest_digest(name, number)
    ctx.report(data, json.dumps(data, indent=2))


@models.command()
@click.argument("reference")
@click.option("--to", "target", type=click.Choice(["mlflow"]), required=True, help="The other registry.")
@click.option("--tracking-uri", envvar="MLFLOW_TRACKING_URI", show_envvar=True, required=True)
@click.option("--experiment", help="MLflow experiment; default: the model's name.")
@click.pass_obj
def export(ctx: Context, reference: str, target: str, tracking_uri: str, experiment: str | None) -> None:  # noqa: ARG001
    """Put a version into MLflow.

    It is logged, registered and given the aliases that it has here; once, however often this is run.
    """
    from dataclasses import asdict

    from training.mlflow_export import export as run

    registry = open_registry(ctx)
    name, version = registry.resolve(reference)
    done = run(registry, name, version, tracking_uri=tracking_uri, experiment=experiment or name)
    state = "is" if done.was_there else "is now"
    text = f"{name}/{version} {state} models:/{name}/{done.mlflow_version} in MLflow"
    ctx.report(asdict(done), text + (f" ({', '.join(done.aliases)})" if done.aliases else ""))


def report_change(ctx: Context, registry: ModelRegistry, name: str, change: Change) -> None:
    """What a change left, aliases and rollout, and the rollout that it has ended."""
    from core import records

    ended = registry.ended(name, change)
    text = f"{name}: {_traffic_text(change)}"
    if ended is not None:
        text += f"; ended: {_rollout_text(ended)}"
    ctx.report({**change_data(change), "ended_rollout": records.as_data(ended)}, text)


def change_data(change: Change) -> dict[str, Any]:
    """An entry of a model's history as JSON data."""
    from core import records

    data: dict[str, Any] = records.as_data(change)
    return data


def _traffic_text(change: Change) -> str:
    text, rollout = _aliases_text(change.aliases), change.rollout
    if rollout is None:
        return text
    return f"{text}; {_rollout_text(rollout)}"


def _rollout_text(rollout: Rollout) -> str:
    return f"{rollout.kind} of version {rollout.version} at {rollout.step.percent:g} %"


def _aliases_text(aliases: Mapping[str, int]) -> str:
    return ", ".join(f"{alias}: {version}" for alias, version in sorted(aliases.items()))
