"""feature_repo/ as a stranger uses it: stock Feast commands typed in its folder, stock reads after them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from core.expectations import Expectation
from core.on_demand import OnDemandTransformation
from core.repository import Definitions, FeastRepository
from tests.support import demo

REQUEST = {"account_age_days", "recent_activity_score"}


def feast(repo: Path, *arguments: str) -> str:
    """What `feast ...` prints, run in the repository's folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "FEAST_USAGE": "False", "NO_COLOR": "1"}
    done = subprocess.run(
        ["feast", *arguments], cwd=repo, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def moment() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="module")
def repo(valkey: Any, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.copy(
        demo_data, tmp_path_factory.mktemp("stock") / "feature_repo", f"{valkey.connection_string},db=3"
    )


@pytest.fixture(scope="module")
def printed(repo: Path, moment: datetime) -> dict[str, str]:
    """Output of the four stock commands, in the order a user types them."""
    return {
        "plan": feast(repo, "plan"),
        "apply": feast(repo, "apply"),
        "list": feast(repo, "feature-views", "list"),
        "materialize": feast(repo, "materialize-incremental", moment.strftime("%Y-%m-%dT%H:%M:%S")),
    }


@pytest.fixture(scope="module")
def definitions(repo: Path, printed: dict[str, str]) -> Definitions:
    return FeastRepository.open(repo).definitions()


def test_stock_plan_and_apply_create_every_object_and_list_shows_the_views(printed: dict[str, str]) -> None:
    for view in ("user_demographics", "user_behavior", "user_activity"):
        assert f"Created feature view {view}" in printed["plan"]
        assert f"Deploying infrastructure for {view}" in printed["apply"]
        assert view in printed["list"]
        assert view in printed["materialize"]
    assert "Created on demand feature view user_at_request" in printed["plan"]
    assert "Created feature service repurchase_v1" in printed["plan"]
    assert "user_at_request" in printed["list"]


def test_the_registry_holds_what_the_design_promises(definitions: Definitions) -> None:
    assert definitions.project == "banquet"
    assert set(definitions.views) == {"user_demographics", "user_behavior", "user_activity"}
    for view in definitions.views.values():
        assert [(key.name, key.dtype.name) for key in view.join_keys] == [("user_id", "INT64")]
        assert view.description
        assert all(feature.description for feature in view.features)
    names = {name: {f.name for f in view.features} for name, view in definitions.views.items()}
    assert {"age", "location", "income"} <= names["user_demographics"]
    assert "purchase_amount_30d" in names["user_behavior"]
    assert {f.name for f in definitions.on_demand["user_at_request"].features} == REQUEST
    (given,) = definitions.on_demand["user_at_request"].request_inputs
    assert (given.name, given.dtype.name) == ("request_timestamp", "INT64")
    assert definitions.views["user_demographics"].ttl == timedelta(0)
    assert definitions.views["user_behavior"].ttl == timedelta(days=3)
    assert definitions.views["user_activity"].ttl == timedelta(days=60)


def test_every_column_of_the_data_is_a_feature_of_its_dtype(
    definitions: Definitions, demo_data: Path
) -> None:
    arrow = {"INT64": "int64", "DOUBLE": "double", "STRING": "string", "BOOL": "bool"}
    for name, view in definitions.views.items():
        schema = pq.read_schema(demo_data / "data" / f"{name.removeprefix('user_')}.parquet")
        columns = {field.name: str(field.type) for field in schema}
        for key in ("user_id", "event_timestamp", "created"):
            del columns[key]
        assert columns == {feature.name: arrow[feature.dtype.name] for feature in view.features}


def test_the_real_data_meets_every_expectation_beside_its_definition(
    definitions: Definitions, demo_data: Path
) -> None:
    checked = 0
    for name, view in definitions.views.items():
        frame = pd.read_parquet(demo_data / "data" / f"{name.removeprefix('user_')}.parquet")
        for feature in view.features:
            expected = Expectation.parse(name, feature)
            column = frame[feature.name]
            known = column.dropna()
            checked += not expected.empty
            assert column.isna().mean() <= expected.null_rate_limit, feature.name
            if expected.minimum is not None:
                assert known.min() >= expected.minimum, feature.name
            if expected.maximum is not None:
                assert known.max() <= expected.maximum, feature.name
            if expected.categories is not None:
                assert set(known) <= set(expected.categories), feature.name
            if expected.outlier_sigma is not None:
                distance = (known - known.mean()).abs().max() / known.std()
                assert distance <= expected.outlier_sigma, feature.name
    assert checked == sum(len(view.features) for view in definitions.views.values())


def test_ttls_make_households_expire_and_surveys_last(demo_data: Path, moment: datetime) -> None:
    for name, days in (("behavior", 3), ("activity", 60)):
        frame = pd.read_parquet(
            demo_data / "data" / f"{name}.parquet", columns=["user_id", "event_timestamp"]
        )
        newest = frame.groupby("user_id").event_timestamp.max()
        expired = (pd.Timestamp(moment) - newest > pd.Timedelta(days=days)).mean()
        assert 0.02 < expired < 0.3, name


def test_the_on_demand_function_gives_none_for_what_is_missing(definitions: Definitions) -> None:
    view = definitions.on_demand["user_at_request"]
    compute = OnDemandTransformation(view, view.name, ["user_id"])
    day = 86400
    full = {"request_timestamp": 100 * day, "first": 40 * day, "last": 93 * day, "score": 4.0}

    def answer(**changes: Any) -> tuple[Any, Any]:
        given = {**full, **changes}
        columns = {
            "user_id": [1],
            "request_timestamp": [given["request_timestamp"]],
            "user_activity__first_basket_at": [given["first"]],
            "user_activity__last_basket_at": [given["last"]],
            "user_activity__activity_score": [given["score"]],
        }
        result = compute(columns, 1)
        return result["user_at_request__account_age_days"][0], result[
            "user_at_request__recent_activity_score"
        ][0]

    assert answer() == (60.0, 2.0)  # 7 days are one half-life
    for nothing in (None, float("nan")):
        assert answer(request_timestamp=nothing) == (None, None)
        assert answer(first=nothing) == (None, 2.0)
        assert answer(last=nothing) == (60.0, None)
        assert answer(score=nothing) == (60.0, None)
    # Stamped a minute after the request: neither a negative age nor a score above the stored one.
    late = 100 * day + 60
    assert answer(first=late, last=late) == (0.0, 4.0)


def test_stock_training_and_stock_serving_agree_at_the_same_moment(
    repo: Path, printed: dict[str, str], moment: datetime, demo_data: Path
) -> None:
    """Households with fresh rows only: what stock Feast does with expired rows is not this test's matter."""
    store = FeastRepository.open(repo).store()
    service = store.get_feature_service("repurchase_v1")
    behavior = pd.read_parquet(
        demo_data / "data" / "behavior.parquet", columns=["user_id", "event_timestamp"]
    )
    fresh = behavior[behavior.event_timestamp == behavior.event_timestamp.max()].user_id.head(50).tolist()
    seconds = int(moment.timestamp())
    entities = pd.DataFrame(
        {
            "user_id": fresh,
            "event_timestamp": pd.Timestamp(moment),
            "request_timestamp": seconds,
        }
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "On demand feature view", RuntimeWarning)
        offline = store.get_historical_features(entities, service).to_df()
    online = store.get_online_features(
        service, [{"user_id": user, "request_timestamp": seconds} for user in fresh]
    ).to_df()
    features = [column for column in online.columns if column != "user_id"]
    assert set(features) >= REQUEST | {"age", "purchase_amount_30d", "days_between_baskets"}
    offline = offline.set_index("user_id").loc[fresh, features].reset_index()
    pd.testing.assert_frame_equal(
        online[["user_id", *features]].astype(float),
        offline.astype(float),
        check_exact=False,
        rtol=1e-12,
    )
    assert online.recent_activity_score.notna().all()
    assert 0 < online.age.notna().sum() < len(fresh)


def test_a_pushed_checkout_is_served_at_once(repo: Path, printed: dict[str, str], moment: datetime) -> None:
    store = FeastRepository.open(repo).store()
    user = 987_654
    event = {
        "user_id": user,
        "event_timestamp": pd.Timestamp(moment),
        "created": pd.Timestamp(moment),
        "basket_amount": 12.5,
        "basket_products": 3,
        "basket_coupon_used": True,
        "baskets_total": 1,
        "days_between_baskets": None,
        "first_basket_at": int(moment.timestamp()),
        "last_basket_at": int(moment.timestamp()),
        "activity_score": 1.0,
    }
    frame = pd.DataFrame([event]).astype({"days_between_baskets": "float64"})
    store.push("user_activity_push", frame)
    later = int(time.time()) + 86400
    answer = store.get_online_features(
        ["user_activity:basket_amount", "user_at_request:account_age_days"],
        [{"user_id": user, "request_timestamp": later}],
    ).to_dict()
    assert answer["basket_amount"] == [12.5]
    assert answer["account_age_days"] == [pytest.approx((later - moment.timestamp()) / 86400)]


def test_categories_are_json_lists(definitions: Definitions) -> None:
    for view in definitions.views.values():
        for feature in view.features:
            if "categories" in feature.tags:
                assert isinstance(json.loads(feature.tags["categories"]), list)
