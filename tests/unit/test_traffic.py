"""Aliases and rollouts: every change that is allowed, every one that is refused, and who sees a canary."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core import records, traffic
from core.errors import Conflict, InvalidRequest, ModelNotFound
from core.traffic import CHALLENGER, CHAMPION, PREVIOUS, Rollout, Split, Step, Traffic

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)
LATER = NOW + timedelta(minutes=5)
STEPS = (Step(5), Step(25), Step(100))


def rollout(kind: str = "canary", **changes: object) -> Rollout:
    given: dict[str, object] = {"id": "r1", "kind": kind, "version": 2, "champion": 1, "steps": STEPS}
    return Rollout(**{"began": (NOW,), **given, **changes})  # type: ignore[arg-type]


CALM = Traffic({CHAMPION: 1, CHALLENGER: 2, PREVIOUS: 7})
UNDER_WAY = traffic.started(CALM, rollout(), name="churn")


def test_a_rollout_is_a_record_that_survives_json() -> None:
    for one in (rollout(), rollout("shadow", steps=(Step(50, 1.5, 10),), limits={"error_rate": 0.5})):
        assert records.from_json(Rollout, records.to_json(one), "rollout") == one


def test_a_canary_goes_step_by_step_and_ends_as_champion() -> None:
    now = UNDER_WAY
    for position in range(3):
        assert now.rollout is not None
        assert now.rollout.step is STEPS[position]
        assert now.rollout.is_last_step == (position == 2)
        assert now.aliases == {CHAMPION: 1, CHALLENGER: 2, PREVIOUS: 7}
        now = traffic.advanced(now, now.rollout, LATER, name="churn")
    assert now == Traffic({CHAMPION: 2, PREVIOUS: 1})


def test_a_shadow_ends_without_becoming_champion() -> None:
    shadow = traffic.started(CALM, rollout("shadow", steps=(Step(100),)), name="churn")
    assert shadow.rollout is not None
    assert traffic.advanced(shadow, shadow.rollout, LATER, name="churn") == CALM


def test_a_started_version_becomes_the_challenger() -> None:
    began = traffic.started(Traffic({CHAMPION: 1}), rollout(), name="churn")
    assert began.aliases == {CHAMPION: 1, CHALLENGER: 2}


def test_an_aborted_rollout_leaves_the_aliases() -> None:
    assert traffic.aborted(UNDER_WAY, None, name="churn") == CALM


def test_promoting_during_a_rollout_ends_it() -> None:
    assert traffic.promoted(UNDER_WAY, None, name="churn") == Traffic({CHAMPION: 2, PREVIOUS: 1})


def test_rolling_back_during_a_rollout_ends_it() -> None:
    assert traffic.rolled_back(UNDER_WAY, name="churn") == Traffic({CHAMPION: 7, CHALLENGER: 2, PREVIOUS: 1})


def test_a_champion_is_no_challenger_of_itself() -> None:
    now = Traffic({CHAMPION: 2, CHALLENGER: 1, PREVIOUS: 1})
    assert traffic.rolled_back(now, name="churn") == Traffic({CHAMPION: 1, PREVIOUS: 2})


def test_what_is_refused() -> None:
    under_way = UNDER_WAY.rollout
    assert under_way is not None
    moved = traffic.advanced(UNDER_WAY, under_way, LATER, name="churn")
    with pytest.raises(Conflict, match="on trial already"):
        traffic.started(UNDER_WAY, rollout(), name="churn")
    with pytest.raises(Conflict, match="no champion"):
        traffic.started(Traffic(), rollout(), name="churn")
    with pytest.raises(Conflict, match="is the champion already"):
        traffic.started(Traffic({CHAMPION: 2}), rollout(champion=2), name="churn")
    with pytest.raises(Conflict, match="has changed meanwhile"):
        traffic.started(Traffic({CHAMPION: 3}), rollout(), name="churn")
    with pytest.raises(Conflict, match="Version 2 of model 'churn' is on trial"):
        traffic.promoted(UNDER_WAY, 3, name="churn")
    with pytest.raises(Conflict, match="no rollout under way"):
        traffic.aborted(CALM, None, name="churn")
    with pytest.raises(Conflict, match="moved on"):
        traffic.aborted(moved, under_way, name="churn")
    with pytest.raises(Conflict, match="moved on"):
        traffic.advanced(moved, under_way, LATER, name="churn")
    with pytest.raises(Conflict, match="moved on"):
        traffic.advanced(UNDER_WAY, rollout(id="another"), LATER, name="churn")
    with pytest.raises(ModelNotFound, match="no challenger"):
        traffic.promoted(Traffic({CHAMPION: 1}), None, name="churn")


@pytest.mark.parametrize("percents", [(), (0,), (101,), (5, 5), (25, 5), (float("nan"),)])
def test_steps_that_do_not_grow_to_at_most_100_are_refused(percents: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRequest):
        rollout(steps=tuple(Step(percent) for percent in percents))


@given(
    st.lists(st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), st.text()), min_size=1, max_size=50), st.data()
)
def test_a_growing_share_keeps_those_already_in(users: list[int | str], data: st.DataObject) -> None:
    percents = sorted(data.draw(st.sets(st.floats(0.01, 100), min_size=2, max_size=5)))
    steps = tuple(Step(percent) for percent in percents)
    columns = {"user_id": users, "store": ["a"] * len(users)}
    before = [False] * len(users)
    for position in range(len(steps)):
        at = rollout(steps=steps, began=(NOW,) * (position + 1))
        chosen = Split(at, ["user_id", "store"]).chosen(columns, len(users))
        assert chosen == Split(at, ["store", "user_id"]).chosen(columns, len(users))
        assert all(now or not then for then, now in zip(before, chosen, strict=True))
        before = chosen


def test_a_share_is_as_large_as_it_says_and_of_other_entities_in_another_rollout() -> None:
    users = {"user_id": list(range(20_000))}
    first = Split(rollout(steps=(Step(25),)), ["user_id"]).chosen(users, 20_000)
    other = Split(rollout(id="r2", steps=(Step(25),)), ["user_id"]).chosen(users, 20_000)
    assert abs(sum(first) - 5000) < 250  # four standard deviations
    assert abs(sum(other) - 5000) < 250
    assert abs(sum(a and b for a, b in zip(first, other, strict=True)) - 1250) < 140
    assert all(Split(rollout(steps=(Step(100),)), ["user_id"]).chosen(users, 20_000))


def test_an_entity_has_its_place_on_every_host() -> None:
    """Pinned: a release that moved entities would show a client two versions in turns."""
    users = {"user_id": [1, 2, 3, 4, 5, 6, 7, 8]}
    chosen = Split(rollout(steps=(Step(50),)), ["user_id"]).chosen(users, 8)
    assert chosen == [True, True, True, False, True, True, True, True]
    assert Split(rollout(steps=(Step(50),)), []).chosen({}, 2) == [True, True]
