"""A rollout's statistics in Redis, shared by every worker and host, and the reading of them.

Per trial, under ``banquet:trial:{<project>:<model>:<trial id>}``, which keeps a trial on one cluster node: a
hash of counts per variant and step of the rollout, what the shadow comparison found, a capped stream
of disagreements, a sample of predictions per variant that waits for labels, and a hash of each worker's last
batch. All expire some time after the last write. `banquet clean` leaves them alone.

Knows how the counts are stored; not how they are gathered (``serving.trials``) or judged (``core.judge``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from core.observed import LEAST_PROBABILITY, Moments, Observed, histogram

VARIANTS = ("champion", "challenger")
MOST_DISAGREEMENTS = 10_000
LIFETIME_SECONDS = 7 * 24 * 3600

# KEYS: state, compared, disagreements, then per variant counts, sample, order. ARGV: worker, batch
# number, JSON. A batch that was added before is not added again, so that a flush may be repeated.
_ADD = """
local batch, number = cjson.decode(ARGV[3]), tonumber(ARGV[2])
if number > tonumber(redis.call('HGET', KEYS[1], 'batch:' .. ARGV[1]) or '0') then
  redis.call('HSET', KEYS[1], 'batch:' .. ARGV[1], ARGV[2])
  for place, one in ipairs(batch.variants) do
    local counts, sample, order = KEYS[1 + 3 * place], KEYS[2 + 3 * place], KEYS[3 + 3 * place]
    for _, pair in ipairs(one.whole) do redis.call('HINCRBY', counts, pair[1], pair[2]) end
    for _, pair in ipairs(one.sums) do redis.call('HINCRBYFLOAT', counts, pair[1], pair[2]) end
    redis.call('EXPIRE', counts, batch.lifetime)
    local threshold = tonumber(redis.call('HGET', KEYS[1], 'threshold:' .. one.name) or '1')
    for _, row in ipairs(one.sample) do
      if tonumber(row[2]) < threshold then
        redis.call('HSET', sample, row[1], row[3])
        redis.call('ZADD', order, row[2], row[1])
      end
    end
    for _ = 1, redis.call('ZCARD', order) - batch.most do
      local last = redis.call('ZPOPMAX', order)
      redis.call('HDEL', sample, last[1])
      redis.call('HSET', KEYS[1], 'threshold:' .. one.name, last[2])
    end
    redis.call('EXPIRE', sample, batch.lifetime)
    redis.call('EXPIRE', order, batch.lifetime)
  end
  for _, pair in ipairs(batch.compared) do redis.call('HINCRBYFLOAT', KEYS[2], pair[1], pair[2]) end
  if batch.largest and tonumber(batch.largest) > tonumber(redis.call('HGET', KEYS[2], 'largest') or '0') then
    redis.call('HSET', KEYS[2], 'largest', batch.largest)
  end
  for _, text in ipairs(batch.disagreements) do
    redis.call('XADD', KEYS[3], 'MAXLEN', '~', batch.longest, '*', 'row', text)
  end
  for place = 1, 3 do redis.call('EXPIRE', KEYS[place], batch.lifetime) end
end
local answer = {}
for place, one in ipairs(batch.variants) do
  answer[place] = redis.call('HGET', KEYS[1], 'threshold:' .. one.name) or '1'
end
return answer
"""
# KEYS: counts, sample, order. ARGV: JSON. Only a row that is still in the sample counts.
_LABEL = """
local given, counted = cjson.decode(ARGV[1]), 0
for _, row in ipairs(given.rows) do
  if redis.call('HDEL', KEYS[2], row.field) == 1 then
    redis.call('ZREM', KEYS[3], row.field)
    for _, pair in ipairs(row.whole) do redis.call('HINCRBY', KEYS[1], pair[1], pair[2]) end
    for _, pair in ipairs(row.sums) do redis.call('HINCRBYFLOAT', KEYS[1], pair[1], pair[2]) end
    counted = counted + 1
  end
end
if counted > 0 then
  redis.call('EXPIRE', KEYS[1], given.lifetime)
end
return counted
"""


@dataclass(frozen=True, slots=True)
class TrialName:
    """Which trial: the prefix of all its keys."""

    project: str
    model: str
    trial_id: str

    def key(self, *parts: object) -> str:
        """The key of a part of the trial."""
        name = f"banquet:trial:{{{self.project}:{self.model}:{self.trial_id}}}"
        return ":".join((name, *map(str, parts)))

    def variant_keys(self, variant: str, step: int) -> tuple[str, str, str]:
        """The keys of a variant's counts in a step, its sample and the sample's order."""
        return self.key("counts", variant, step), self.key("sample", variant), self.key("order", variant)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a shadow trial found: rows both variants predicted, those alike, and the distance of their scores.

    ``scored`` rows had a score from both; ``difference`` is the sum of the absolute differences.
    """

    rows: int = 0
    agreed: int = 0
    scored: int = 0
    difference: float = 0.0
    largest: float = 0.0

    @property
    def agreement(self) -> float | None:
        """The share of rows that were alike; None without rows."""
        return self.agreed / self.rows if self.rows else None

    @property
    def mean_difference(self) -> float | None:
        """The mean absolute difference of the scores; None without scores."""
        return self.difference / self.scored if self.scored else None


@dataclass(frozen=True, slots=True)
class Remembered:
    """A prediction that waits for its label: what the model said of one row.

    ``place`` in [0, 1) decides whether it is in the sample. ``score`` is the probability of the last of two
    classes, the probabilities of more, or None where the model gives none.
    """

    field: str
    place: float
    prediction: Any
    score: float | Sequence[float] | None


@dataclass(frozen=True, slots=True)
class Batch:
    """What a worker adds at once. ``number`` counts the worker's batches from 1."""

    worker: str
    number: int
    step: int
    counts: Mapping[str, Observed]
    sample: Mapping[str, Sequence[Remembered]]
    compared: Comparison
    disagreements: Sequence[Mapping[str, Any]]


def add(
    client: Any, trial: TrialName, batch: Batch, *, lifetime_seconds: int, most_rows: int
) -> dict[str, float]:
    """Add a batch, once however often it is called, and keep ``most_rows`` of a variant's sample.

    Returns, by variant, the place below which a row has to be to enter the sample.
    """
    variants = sorted({*batch.counts, *batch.sample})
    keys = [trial.key(part) for part in ("state", "compared", "disagreements")]
    given = []
    for name in variants:
        keys += trial.variant_keys(name, batch.step)
        whole, sums = _amounts(batch.counts.get(name, Observed()))
        rows = [
            (one.field, repr(one.place), orjson.dumps((one.prediction, one.score), default=_plain).decode())
            for one in batch.sample.get(name, ())
        ]
        given.append({"name": name, "whole": whole, "sums": sums, "sample": rows})
    found = batch.compared
    compared = [
        (name, str(getattr(found, name)))
        for name in ("rows", "agreed", "scored", "difference")
        if getattr(found, name)
    ]
    text = {
        "lifetime": lifetime_seconds,
        "most": most_rows,
        "longest": MOST_DISAGREEMENTS,
        "variants": given,
        "compared": compared,
        "largest": repr(found.largest),
        "disagreements": [orjson.dumps(row, default=_plain).decode() for row in batch.disagreements],
    }
    answer = client.eval(_ADD, len(keys), *keys, batch.worker, batch.number, orjson.dumps(text))
    return {name: float(threshold) for name, threshold in zip(variants, answer, strict=True)}


def label(
    client: Any,
    trial: TrialName,
    request_id: str,
    labels: Mapping[int, Any],
    *,
    classes: Sequence[Any],
    edges: Sequence[float],
    step: int,
    lifetime_seconds: int,
) -> int:
    """Count the labels of a request's rows, by row number, each once; returns how many were counted.

    A row counts if its prediction is in the sample, had no label before, and the label is one of ``classes``
    or, without classes, a finite number.
    """
    fields = {f"{request_id}:{row}": truth for row, truth in labels.items()}
    if not fields:
        return 0
    with client.pipeline(transaction=False) as pipeline:
        for variant in VARIANTS:
            pipeline.hmget(trial.key("sample", variant), list(fields))
        found = pipeline.execute()
    counted = 0
    for variant, cells in zip(VARIANTS, found, strict=True):
        rows = []
        for (field, truth), cell in zip(fields.items(), cells, strict=True):
            if cell is None:
                continue
            prediction, score = orjson.loads(cell)
            quality = _quality(prediction, score, truth, classes, edges)
            if quality is not None:
                whole, sums = _amounts(quality)
                rows.append({"field": field, "whole": whole, "sums": sums})
        if rows:
            text = orjson.dumps({"rows": rows, "lifetime": lifetime_seconds})
            counted += client.eval(_LABEL, 3, *trial.variant_keys(variant, step), text)
    return counted


def read_trial(client: Any, trial: TrialName, step: int) -> dict[str, Observed]:
    """What each variant did in a step of the rollout, by variant; ``VARIANTS`` are always there.

    Labels are in the step in which they came. Raises redis-py's errors: ``RedisAddress.translated``.
    """
    with client.pipeline(transaction=False) as pipeline:
        for variant in VARIANTS:
            pipeline.hgetall(trial.key("counts", variant, step))
        answers = pipeline.execute()
    return {
        variant: Observed.from_counts({name.decode(): number.decode() for name, number in cells.items()})
        for variant, cells in zip(VARIANTS, answers, strict=True)
    }


def read_comparison(client: Any, trial: TrialName) -> Comparison:
    """What the shadow comparison found in the whole trial."""
    cells = client.hgetall(trial.key("compared"))
    found = {name.decode(): float(number) for name, number in cells.items()}
    whole = {name: round(found.get(name, 0)) for name in ("rows", "agreed", "scored")}
    return Comparison(**whole, difference=found.get("difference", 0.0), largest=found.get("largest", 0.0))


def read_disagreements(client: Any, trial: TrialName, *, most: int = 100) -> list[dict[str, Any]]:
    """The latest rows on which the variants disagreed, newest first."""
    entries = client.xrevrange(trial.key("disagreements"), count=most)
    return [orjson.loads(fields[b"row"]) for _, fields in entries]


def take_turn(client: Any, trial: TrialName, seconds: float) -> bool:
    """Whether the caller is the one who may judge the trial for the next ``seconds``."""
    return bool(client.set(trial.key("turn"), "", nx=True, px=max(1, int(seconds * 900))))


def take_look(client: Any, trial: TrialName, look: int, lifetime_seconds: int = LIFETIME_SECONDS) -> bool:
    """Whether the caller is the first to take a planned look of the judge's."""
    taken = bool(client.hsetnx(trial.key("looks"), look, ""))
    client.expire(trial.key("looks"), lifetime_seconds)
    return taken


def keep_verdict(client: Any, trial: TrialName, look: int, verdict: Mapping[str, Any]) -> None:
    """Keep what the judge said at a look."""
    client.hset(trial.key("looks"), look, orjson.dumps(verdict))


def read_verdicts(client: Any, trial: TrialName) -> dict[int, dict[str, Any]]:
    """What the judge said at each look so far, by its number."""
    found = client.hgetall(trial.key("looks"))
    return {int(look): orjson.loads(text) for look, text in sorted(found.items()) if text}


def _amounts(observed: Observed) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What to add to a hash: whole numbers, and sums of floats, as text."""
    flat = observed.counts()
    whole = [(name, str(number)) for name, number in flat.items() if not _is_sum(name)]
    return whole, [(name, repr(float(number))) for name, number in flat.items() if _is_sum(name)]


def _is_sum(name: str) -> bool:
    return name.endswith((":total", ":squares"))


def _quality(
    prediction: Any, score: Any, truth: Any, classes: Sequence[Any], edges: Sequence[float]
) -> Observed | None:
    """What one label says about one prediction; None where it is no label."""
    if not classes:
        if isinstance(truth, bool) or not isinstance(truth, int | float) or not math.isfinite(truth):
            return None
        return Observed(labels=1, squared_error=Moments.of([(prediction - truth) ** 2]))
    if truth not in classes:
        return None
    correct = int(prediction == truth)
    if score is None:
        return Observed(labels=1, correct=correct)
    chances = [1 - score, score] if isinstance(score, int | float) else score
    true_class = list(classes).index(truth)
    loss = Moments.of([-math.log(max(LEAST_PROBABILITY, chances[true_class]))])
    if len(classes) > 2:
        return Observed(labels=1, correct=correct, log_loss=loss)
    place = histogram([chances[1]], edges)
    positive, negative = (place, {}) if true_class == 1 else ({}, place)
    return Observed(labels=1, correct=correct, log_loss=loss, positive=positive, negative=negative)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)
