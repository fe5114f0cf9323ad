"""What a plan says it costs in Redis and breaks among the models, and what apply leaves alone in Redis."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cli.main import main
from core import layout
from core.errors import InvalidRepository, SchemaMismatch
from core.manifest import GoldenRow, ServiceSchema
from core.online import FeaturePlan
from core.registry import ModelRegistry
from core.repository import FeastRepository, Feature, View, parse_registry
from core.types import Dtype, Field
from materialization import apply, impact
from materialization.clean import clean
from materialization.ledger import Ledger
from materialization.run import materialize
from tests.support import packages
from tests.support import shop as source
from tests.support.valkey import Valkey, free_port

CITY = ' Field(name="city", dtype=String),'
AGE = 'Field(name="age", dtype=Int64),'


@pytest.fixture
def server(valkey: Valkey) -> Iterator[Valkey]:
    """The session's server with a database to itself."""
    with valkey.client(db=8) as client:
        client.flushdb()
        yield valkey
        client.flushdb()


def loaded(server: Valkey, path: Path, project: str) -> FeastRepository:
    """The shop, applied and materialized by Banquet."""
    repo = FeastRepository.open(source.write(path, f"{server.connection_string},db=8", project=project))
    apply.apply(repo, apply.plan(repo))
    assert materialize(repo).ok
    return FeastRepository.open(path)


def edit(repo: FeastRepository, *edits: tuple[str, str]) -> FeastRepository:
    path = repo.path / "definitions.py"
    text = path.read_text()
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return FeastRepository.open(repo.path)


def without_clicks(repo: FeastRepository) -> FeastRepository:
    """The push view goes, and nothing else."""
    path = repo.path / "definitions.py"
    text = path.read_text()
    start, end = text.index("clicks = FeatureView("), text.index("request = RequestSource(")
    path.write_text(text[:start] + text[end:])
    return FeastRepository.open(repo.path)


def hashes(server: Valkey) -> dict[bytes, dict[bytes, bytes]]:
    with server.client(db=8) as client:
        keys = [key for key in client.scan_iter(_type="hash") if not key.startswith(b"banquet:")]
        return {key: client.hgetall(key) for key in keys}


def test_the_plan_names_features_and_what_they_cost(server: Valkey, tmp_path: Path) -> None:
    """An added view, an added and a removed feature, a changed type, a changed tag: each by its name."""
    repo = loaded(server, tmp_path / "repo", "shop")
    assert impact.impact(repo, apply.plan(repo)) == impact.Impact()
    repo = edit(
        repo,
        (AGE, 'Field(name="age", dtype=Int64, tags={"max": "120"}), Field(name="years", dtype=Int64),'),
        (' Field(name="ratio", dtype=Float32)', ""),
        ('Field(name="temperature", dtype=Float64)', 'Field(name="temperature", dtype=Float32)'),
    )
    text = (repo.path / "definitions.py").read_text()
    extra = """
copies = FeatureView(
    name="copies", entities=[user], ttl=timedelta(days=3), source=FileSource(
        name="copies", path="behavior.parquet", timestamp_field="event_timestamp"),
    schema=[Field(name="user_id", dtype=Int64), Field(name="spend", dtype=Float64)],
)
"""
    (repo.path / "definitions.py").write_text(text + extra)
    # The source gets the new column.
    frame = source.sources()["profile"]
    frame["years"] = frame["age"]
    frame.to_parquet(repo.path / "profile.parquet", coerce_timestamps="us")
    repo = FeastRepository.open(repo.path)
    planned = apply.plan(repo)
    features = {c.name: {(f.action, f.name, *f.details) for f in c.features} for c in planned.changes}
    assert features["profile"] == {("added", "years", "INT64"), ("changed", "age", "max none -> 120")}
    assert features["stock"] == {("removed", "ratio", "FLOAT")}
    assert features["climate"] == {("changed", "temperature", "DOUBLE -> FLOAT")}
    assert features["copies"] == {("added", "spend", "DOUBLE")}
    found = impact.impact(repo, planned)
    growth = {entry.view: entry for entry in found.growth}
    assert growth["profile"].features == ("years",)
    assert growth["profile"].rows == 4
    assert growth["copies"].rows == 2  # the third user's row in the source is past the ttl
    field = len(layout.encode_value(41, Dtype.INT64)) + 4
    assert growth["profile"].bytes is not None
    assert 4 * field <= growth["profile"].bytes <= 4 * (field + 8)
    assert growth["copies"].bytes
    assert found.orphans is not None
    assert (found.orphans.rows, found.orphans.fields, found.orphans.exact) == ({}, 1, True)


def test_the_bytes_of_an_added_view_are_what_it_then_takes(server: Valkey, tmp_path: Path) -> None:
    repo = FeastRepository.open(
        source.write(tmp_path / "repo", f"{server.connection_string},db=8", project="shop")
    )
    planned = apply.plan(repo)
    found = impact.impact(repo, planned)
    expected = {entry.view: entry for entry in found.growth}
    assert all(entry.bytes is not None for entry in found.growth)
    apply.apply(repo, planned)
    materialize(repo, view_names=["visits"])
    with server.client(db=8) as client:
        taken = sum(client.memory_usage(key, samples=0) for key in hashes(server))
    entry = expected["visits"]
    assert entry.rows == 3
    assert entry.bytes is not None
    assert abs(entry.bytes - taken) <= 0.2 * taken


def test_without_redis_a_plan_says_unknown_and_apply_goes_through(tmp_path: Path) -> None:
    repo = FeastRepository.open(source.write(tmp_path / "repo", f"127.0.0.1:{free_port()}"))
    planned = apply.plan(repo)
    found = impact.impact(repo, planned)
    visits = next(entry for entry in found.growth if entry.view == "visits")
    assert (visits.rows, visits.bytes) == (3, None)
    assert visits.unknown is not None
    assert "does not answer" in visits.unknown
    apply.apply(repo, planned)
    repo = without_clicks(repo)
    planned = apply.plan(repo)
    assert [c.name for c in planned.changes if c.kind == "feature view"] == ["clicks"]
    gone = impact.impact(repo, planned)
    assert gone.orphans is None
    assert gone.unknown is not None
    apply.apply(repo, planned)
    assert apply.plan(FeastRepository.open(repo.path)).changes == ()


def test_removing_a_view_leaves_redis_to_clean_where_stock_feast_empties_another_project(
    server: Valkey, tmp_path: Path
) -> None:
    """Trap 8: Feast's pattern for the keys of `fraud` fits those of `prodfraud`."""
    theirs = loaded(server, tmp_path / "theirs", "prodfraud")
    before = hashes(server)
    mine = loaded(server, tmp_path / "mine", "fraud")
    both = hashes(server)
    mine = without_clicks(mine)
    planned = apply.plan(mine)
    found = impact.impact(mine, planned).orphans
    assert found is not None
    assert (found.rows, found.fields, found.keys) == ({"clicks": 1}, 2, 0)
    apply.apply(mine, planned)
    assert hashes(server) == both

    report = clean(FeastRepository.open(mine.path), keys_per_second=10_000_000)
    assert report.removed_views == {"clicks": 1}
    assert {key: both[key] for key in before} == {key: hashes(server)[key] for key in before}

    # What `feast apply` would have done: the view is gone from the other project as well.
    removed = theirs.store().get_feature_view("clicks")
    provider = FeastRepository.open(mine.path).store()._get_provider()
    provider.update_infra("fraud", [removed], [], [], [], False)
    assert {key: hashes(server)[key] for key in before} != before


def test_the_registry_foreseen_is_the_registry_that_comes_about(tmp_path: Path) -> None:
    """With versions: a new one for a changed schema, none for a ttl, an old one restored by its pin."""
    path = source.write(tmp_path / "repo", f"127.0.0.1:{free_port()}")
    settings = (path / "feature_store.yaml").read_text()
    versioned = "registry: {path: registry.db, enable_online_feature_view_versioning: true}"
    (path / "feature_store.yaml").write_text(settings.replace("registry: registry.db", versioned))
    repo = FeastRepository.open(path)
    names = []
    for old, new in (
        ("", ""),
        (AGE, AGE + ' Field(name="years", dtype=Int64),'),
        ("ttl=timedelta(days=30)", "ttl=timedelta(days=31)"),
        (AGE, AGE + ' Field(name="months", dtype=Int64),'),
    ):
        repo = edit(repo, (old, new)) if old else repo
        planned = apply.plan(repo)
        apply.apply(repo, planned)
        after, found = parse_registry(planned.after, repo.config), FeastRepository.open(path).definitions()
        assert after.views == found.views
        assert {key: found.pinned[key] for key in after.pinned} == after.pinned
        names.append(found.views["profile"].stored_name)
    assert names == ["profile", "profile_v1", "profile_v1", "profile_v2"]


def test_a_feature_that_comes_back_after_a_clean_is_loaded_again(server: Valkey, tmp_path: Path) -> None:
    """The ledger must not vouch for fields that clean has removed (nor another view lose its watermark)."""
    repo = loaded(server, tmp_path / "repo", "shop")
    removed = edit(
        repo, (CITY, ""), ('profile[["city", "age"]]', 'profile[["age"]]'), ('["age", "city"]', '["age"]')
    )
    apply.apply(removed, apply.plan(removed))
    with removed.redis.session() as client:
        marks = {name: Ledger(client, "shop", name).loaded() for name in ("profile", "behavior")}
        assert None not in marks.values()
        assert clean(removed, keys_per_second=10_000_000).features
        assert Ledger(client, "shop", "profile").loaded() is None
        assert Ledger(client, "shop", "behavior").loaded() == marks["behavior"]
    back = edit(removed, (AGE, AGE + CITY))
    apply.apply(back, apply.plan(back))
    assert materialize(back).ok
    found = back.store().get_online_features(["profile:city"], [{"user_id": 1}]).to_dict()
    assert found["city"] == ["Oslo"]


def test_collisions_count_across_views_of_the_same_join_keys_whatever_their_entities() -> None:
    """Also between a version and another view; not where the keys differ."""
    pair = _colliding("profile_v2", "clicks")
    views = [_view(name, feature) for name, feature in pair]
    with pytest.raises(InvalidRepository, match="same 32-bit hash field") as refused:
        apply.refuse_colliding_features(views)
    assert all(f"{name}:{feature}" in refused.value.message for name, feature in pair)
    assert refused.value.hint is not None
    apply.refuse_colliding_features([views[0], replace(views[1], join_keys=())])


def _view(stored: str, feature: str) -> View:
    return View(
        name=stored,
        stored_name=stored,
        join_keys=(Field("user_id", Dtype.INT64),),
        features=(Feature(feature, Dtype.INT64, {}),),
        ttl=timedelta(0),
    )


def _colliding(one: str, other: str) -> tuple[tuple[str, str], tuple[str, str]]:
    seen = {layout.feature_field(one, f"f{number}"): f"f{number}" for number in range(300_000)}
    for number in range(10_000_000):
        name = f"g{number}"
        if (first := seen.get(layout.feature_field(other, name))) is not None:
            return (one, first), (other, name)
    raise AssertionError("no collision found")


def a_model(registry: ModelRegistry, repo: FeastRepository, name: str) -> ServiceSchema:
    """Register a model that was trained on the service `plain` as it is."""
    schema = FeaturePlan.for_service(repo.definitions(), "plain").schema("plain")
    row: dict[str, Any] = {feature.name: None for feature in schema.features}
    packages.register(
        registry,
        name=name,
        schema=schema,
        vocabulary={"profile__city": ("Oslo",)},
        golden=(GoldenRow(row, 1.0, None),),
    )
    return schema


SPEND, PROFILE = 'behavior[["spend", "visits"]], ', 'profile[["city", "age"]]'


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('"visits", dtype=Int64', '"visits", dtype=Int32', "was INT64 and is INT32"),
        ('(days=3), source=source("behavior")', '(days=4), source=source("behavior")', "the ttl of"),
        (SPEND + PROFILE, 'behavior[["visits", "spend"]], ' + PROFILE, "order"),
        (SPEND + PROFILE, PROFILE, "behavior__spend is gone"),
        ('name="plain"', 'name="simple"', "no feature service 'plain'"),
    ],
)
def test_a_change_that_breaks_a_model_is_refused_without_break_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, problem: str
) -> None:
    monkeypatch.setenv("BANQUET_REGISTRY_URL", str(tmp_path / "models"))
    repo = FeastRepository.open(source.write(tmp_path / "repo", f"127.0.0.1:{free_port()}"))
    apply.apply(repo, apply.plan(repo))
    registry = ModelRegistry(str(tmp_path / "models"))
    a_model(registry, repo, "churn")
    registry.set_alias("churn", "champion", 1)
    command = ["--repo", str(repo.path), "--json", "apply"]
    assert CliRunner().invoke(main, command).exit_code == 0

    edit(repo, (old, new))
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    error = json.loads(refused.stderr)
    assert error["code"] == SchemaMismatch.code
    (model,) = error["models"]
    assert (model["name"], model["version"], model["aliases"]) == ("churn", 1, ["champion"])
    assert any(problem in found for found in model["problems"])
    assert apply.plan(FeastRepository.open(repo.path)).changes != ()

    forced = CliRunner().invoke(main, [*command, "--break-models"])
    assert forced.exit_code == 0
    assert json.loads(forced.stdout)["broken_models"][0]["name"] == "churn"
    # Broken already: not this plan's doing any more.
    edit(repo, ("dtype=Bool)", 'dtype=Bool, description="pays")'))
    assert CliRunner().invoke(main, command).exit_code == 0


def test_clean_from_the_command_line(server: Valkey, tmp_path: Path) -> None:
    repo = loaded(server, tmp_path / "repo", "shop")
    repo = without_clicks(repo)
    apply.apply(repo, apply.plan(repo))
    command = ["--repo", str(repo.path), "--json", "clean"]
    planned = json.loads(CliRunner().invoke(main, [*command, "--dry-run"]).stdout)
    assert planned["removed_views"] == {"clicks": 1}
    done = json.loads(CliRunner().invoke(main, [*command, "--expired-for", "100d"]).stdout)
    assert (done["removed_views"], done["expired_rows"], done["bytes"]) == (
        {"clicks": 1},
        {},
        planned["bytes"],
    )
    shown = CliRunner().invoke(main, ["--repo", str(repo.path), "clean"])
    assert shown.exit_code == 0
    assert "past their ttl" not in shown.stdout
    assert CliRunner().invoke(main, [*command, "--expired-for", "soon"]).exit_code == 2
