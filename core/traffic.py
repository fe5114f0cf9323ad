"""Where a model's traffic goes: its aliases and its rollout, and every way in which they may change. Pure.

Knows no registry: ``core.registry`` keeps what these functions make, one entry of a model's history each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import pairwise
from typing import Any, Literal

import mmh3
import orjson

from core.errors import Conflict, InvalidRequest, ModelNotFound

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
_BUCKETS = 1 << 32


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a rollout: how much traffic, and what must have been seen before the next one.

    ``percent`` is a share of the entities for a canary and of the requests for a shadow, above 0 and up to
    100. ``min_rows`` are predictions of the version on trial.
    """

    percent: float
    min_seconds: float = 300.0
    min_rows: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise InvalidRequest(f"A step of {self.percent:g} % is not above 0 and up to 100.", field="steps")
        if not (math.isfinite(self.min_seconds) and self.min_seconds >= 0 and self.min_rows >= 1):
            raise InvalidRequest(
                "A step needs a time of zero or more seconds and at least one row.", field="steps"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A version on trial.

    A canary answers for its share of the entities; a shadow predicts the same rows as the champion, and no
    client sees it. ``began`` has the time (UTC) at which each step so far began, so the last of them is the
    one under way. ``automatic`` lets the judge take the next step, promote or abort; ``limits`` are the
    judge's where they are not its defaults.
    """

    id: str
    kind: Literal["canary", "shadow"]
    version: int
    champion: int
    steps: tuple[Step, ...]
    began: tuple[datetime, ...]
    automatic: bool = True
    limits: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        percents = [step.percent for step in self.steps]
        if not percents or any(after <= before for before, after in pairwise(percents)):
            raise InvalidRequest(
                "The steps of a rollout must grow.", hint="Write them as 5,25,50,100.", field="steps"
            )
        if not 1 <= len(self.began) <= len(self.steps):
            raise InvalidRequest("A rollout is at one of its steps.", field="began")

    @property
    def position(self) -> int:
        """The index of the step under way."""
        return len(self.began) - 1

    @property
    def step(self) -> Step:
        """The step under way."""
        return self.steps[self.position]

    @property
    def is_last_step(self) -> bool:
        """Whether no further step follows."""
        return len(self.began) == len(self.steps)


@dataclass(frozen=True, slots=True)
class Traffic:
    """The aliases of a model, and its rollout if one is under way."""

    aliases: Mapping[str, int] = field(default_factory=dict)
    rollout: Rollout | None = None


class Split:
    """Which entities a canary answers for.

    An entity's place is a hash of its join keys, salted with the rollout: the same on every host, in every
    order of the keys' columns, and an entity within a small share is within every larger one.
    """

    def __init__(self, rollout: Rollout, join_keys: Iterable[str]) -> None:
        self._names = sorted(join_keys)
        self._seed = mmh3.hash(rollout.id.encode(), signed=False)
        self._below = round(rollout.step.percent / 100 * _BUCKETS)

    def chosen(self, columns: Mapping[str, Sequence[Any]], rows: int) -> list[bool]:
        """Per row of the join-key columns whether the canary answers for it."""
        seed, below = self._seed, self._below
        keys = zip(*(columns[name] for name in self._names), strict=True) if self._names else [()] * rows
        return [mmh3.hash(orjson.dumps(key, default=str), seed, signed=False) < below for key in keys]


def introduced(traffic: Traffic, version: int) -> Traffic:
    """A version that was just registered is champion where the model has none, else the challenger."""
    alias = CHALLENGER if CHAMPION in traffic.aliases else CHAMPION
    return replace(traffic, aliases={**traffic.aliases, alias: version})


def promoted(traffic: Traffic, version: int | None, *, name: str) -> Traffic:
    """``version`` (default: the version on trial, else the challenger) is champion, the old one ``previous``.

    Raises:
        ModelNotFound: there is neither.
        Conflict: it is the champion already, or another version is on trial.
    """
    aliases, rollout = traffic.aliases, traffic.rollout
    if version is not None:
        chosen: int | None = version
    else:
        chosen = rollout.version if rollout else aliases.get(CHALLENGER)
    if chosen is None:
        raise ModelNotFound(f"Model {name!r} has no challenger.", hint="Name a version to promote.")
    champion = aliases.get(CHAMPION)
    if chosen == champion:
        raise Conflict(f"Version {chosen} of model {name!r} is the champion already.")
    if rollout is not None and rollout.version != chosen:
        raise Conflict(
            f"Version {rollout.version} of model {name!r} is on trial.",
            hint=f"Abort it first: `banquet rollout abort {name}`.",
        )
    kept = {a: v for a, v in aliases.items() if not (a == CHALLENGER and v == chosen)}
    return Traffic({**kept, CHAMPION: chosen, **({} if champion is None else {PREVIOUS: champion})})


def rolled_back(traffic: Traffic, *, name: str) -> Traffic:
    """The previous champion is champion again, the champion ``previous``; a rollout ends.

    Raises:
        Conflict: there is no previous champion.
    """
    aliases = traffic.aliases
    if PREVIOUS not in aliases or CHAMPION not in aliases:
        raise Conflict(
            f"Model {name!r} has no previous champion.", hint="Promote a version with `models promote`."
        )
    chosen = aliases[PREVIOUS]
    kept = {a: v for a, v in aliases.items() if not (a == CHALLENGER and v == chosen)}
    return Traffic({**kept, CHAMPION: chosen, PREVIOUS: aliases[CHAMPION]})


def started(traffic: Traffic, rollout: Rollout, *, name: str) -> Traffic:
    """The rollout is under way and its version the challenger.

    Raises:
        Conflict: another rollout is, there is no champion to hold it against, or the version is the champion.
    """
    if traffic.rollout is not None:
        raise Conflict(
            f"Version {traffic.rollout.version} of model {name!r} is on trial already.",
            hint=f"Abort it first: `banquet rollout abort {name}`.",
        )
    champion = traffic.aliases.get(CHAMPION)
    if champion is None:
        raise Conflict(
            f"Model {name!r} has no champion to hold a version against.",
            hint=f"Promote one first: `banquet models promote {name} --version {rollout.version}`.",
        )
    if champion == rollout.version:
        raise Conflict(f"Version {rollout.version} of model {name!r} is the champion already.")
    if champion != rollout.champion:
        raise Conflict(f"The champion of model {name!r} has changed meanwhile.", hint="Start it again.")
    return Traffic({**traffic.aliases, CHALLENGER: rollout.version}, rollout)


def advanced(traffic: Traffic, seen: Rollout | None, now: datetime, *, name: str) -> Traffic:
    """The rollout's next step is under way; past the last one its version is champion (a shadow just ends).

    Raises Conflict where there is none, or, with ``seen``, where it is another or at another step.
    """
    rollout = _expect(traffic, seen, name)
    if not rollout.is_last_step:
        return replace(traffic, rollout=replace(rollout, began=(*rollout.began, now)))
    if rollout.kind == "canary":
        return promoted(traffic, rollout.version, name=name)
    return replace(traffic, rollout=None)


def aborted(traffic: Traffic, seen: Rollout | None, *, name: str) -> Traffic:
    """No rollout is under way; the aliases stay.

    Raises Conflict where there is none, or, with ``seen``, where it is another or at another step.
    """
    _expect(traffic, seen, name)
    return replace(traffic, rollout=None)


def _expect(traffic: Traffic, seen: Rollout | None, name: str) -> Rollout:
    rollout = traffic.rollout
    if rollout is None:
        raise Conflict(f"Model {name!r} has no rollout under way.")
    if seen is not None and (rollout.id, rollout.position) != (seen.id, seen.position):
        raise Conflict(f"The rollout of model {name!r} has moved on meanwhile.")
    return rollout
