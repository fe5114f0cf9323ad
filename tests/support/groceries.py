"""The demo's feature rows worked out one at a time from a household's purchases, in plain Python.

An oracle for ``demo/sql``: it shares no code with it, and each function drops everything that its moment
may not see before it looks at anything else. Also small random purchases with the awkward cases in them.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

DAY = timedelta(days=1)

AGES = {"19-24": 22, "25-34": 30, "35-44": 40, "45-54": 50, "55-64": 60, "65+": 78}
INCOMES = {
    "Under 15K": 7500.0,
    "15-24K": 20000.0,
    "25-34K": 30000.0,
    "35-49K": 42500.0,
    "50-74K": 62500.0,
    "75-99K": 87500.0,
    "100-124K": 112500.0,
    "125-149K": 137500.0,
    "150-174K": 162500.0,
    "175-199K": 187500.0,
    "200-249K": 225000.0,
    "250K+": 300000.0,
}


@dataclass(frozen=True, slots=True)
class Purchase:
    """One line of a receipt; ``at`` is UTC-aware and already re-based, ``amount`` US dollars."""

    at: datetime
    basket: int
    store: int
    product: int
    amount: float
    coupon: bool


def behavior(purchases: Iterable[Purchase], midnight: datetime) -> dict[str, Any] | None:
    """The snapshot at ``midnight``: purchases strictly before it; None without one in 30 days."""
    past = [p for p in purchases if p.at < midnight]
    month = [p for p in past if p.at >= midnight - 30 * DAY]
    week = [p for p in past if p.at >= midnight - 7 * DAY]
    if not month:
        return None
    spent_week, spent_month = sum(p.amount for p in week), sum(p.amount for p in month)
    baskets_week, baskets_month = len({p.basket for p in week}), len({p.basket for p in month})
    return {
        "purchase_amount_7d": spent_week,
        "purchase_amount_30d": spent_month,
        "baskets_7d": baskets_week,
        "baskets_30d": baskets_month,
        "distinct_products_7d": len({p.product for p in week}),
        "distinct_products_30d": len({p.product for p in month}),
        "coupons_used_7d": sum(p.coupon for p in week),
        "coupons_used_30d": sum(p.coupon for p in month),
        "shopping_days_30d": len({p.at.date() for p in month}),
        "average_basket_7d": spent_week / baskets_week if baskets_week else None,
        "average_basket_30d": spent_month / baskets_month,
        "days_since_last_basket": (midnight - max(p.at for p in past)) / DAY,
        "favourite_store": _favourite(month),
    }


def activity(purchases: Iterable[Purchase], at: datetime) -> dict[str, Any] | None:
    """The event of the checkout at ``at``: purchases up to and including it; None if there is none."""
    past = [p for p in purchases if p.at <= at]
    now = [p for p in past if p.at == at]
    if not now:
        return None
    paid_at = {p.basket: p.at for p in past}
    first = min(paid_at.values())
    return {
        "basket_amount": sum(p.amount for p in now),
        "basket_products": len({p.product for p in now}),
        "basket_coupon_used": any(p.coupon for p in now),
        "baskets_total": len(paid_at),
        "days_between_baskets": (at - first) / DAY / (len(paid_at) - 1) if len(paid_at) > 1 else None,
        "first_basket_at": int(first.timestamp()),
        "last_basket_at": int(at.timestamp()),
        "activity_score": sum(0.5 ** ((at - paid) / (7 * DAY)) for paid in paid_at.values()),
    }


def demographics(survey: dict[str, Any], purchases: Iterable[Purchase], midnight: datetime) -> dict[str, Any]:
    """A household's survey answers and its store of the 90 days before ``midnight``."""
    recent = [p for p in purchases if midnight - 90 * DAY <= p.at < midnight]
    return {
        "age": AGES[survey["age"]],
        "age_band": survey["age"],
        "income": INCOMES[survey["income"]],
        "income_band": survey["income"],
        "household_size": int(survey["household_size"].rstrip("+")),
        "kids_count": int(survey["kids_count"].rstrip("+")),
        "home_owner": None
        if survey["home_ownership"] is None
        else survey["home_ownership"] in ("Homeowner", "Probable Homeowner"),
        "marital_status": survey["marital_status"],
        "location": _favourite(recent),
    }


def buys_again(purchases: Iterable[Purchase], at: datetime) -> bool:
    """Whether there is a purchase after ``at`` and not later than 7 days after it."""
    return any(at < p.at <= at + 7 * DAY for p in purchases)


def differences(row: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Every feature of ``row`` that is not what was expected; floats may differ by one part in a billion."""
    found = {name: row[name] for name in row if name not in ("user_id", "event_timestamp", "created")}
    assert found.keys() == expected.keys()
    return [
        f"{name} is {found[name]!r}, not {value!r}"
        for name, value in expected.items()
        if not (
            math.isclose(found[name], value, rel_tol=1e-9, abs_tol=1e-9)
            if isinstance(value, float) and found[name] is not None
            else found[name] == value
        )
    ]


def _favourite(purchases: Sequence[Purchase]) -> str | None:
    # Baskets paid in the same second count as one visit to the store with the lower number.
    checkouts: dict[datetime, list[Purchase]] = defaultdict(list)
    for p in purchases:
        checkouts[p.at].append(p)
    visits: dict[int, tuple[int, datetime]] = {}
    for at, lines in checkouts.items():
        store = min(p.store for p in lines)
        count, last = visits.get(store, (0, at))
        visits[store] = count + len({p.basket for p in lines}), max(last, at)
    if not visits:
        return None
    return f"store_{max(visits, key=lambda store: (*visits[store], store))}"


def random_purchases(seed: int, *, days: int = 80, households: int = 5) -> dict[int, list[Purchase]]:
    """Purchases of a few households from Sunday 2017-01-01 on, and one on the day after the last whole one.

    With checkouts at midnight and a second before it, two baskets in one second, ties between stores, a
    household that pauses for more than 30 days, one that stops and one that begins late.
    """
    rng = random.Random(seed)
    start = datetime(2017, 1, 1, tzinfo=UTC)
    clock = [0, 86399, 43200]
    found: dict[int, list[Purchase]] = {}
    basket = 1000
    for user in range(1, households + 1):
        first = 0 if user == 1 else rng.randrange(days // 2)
        last = days if user == 1 else rng.randrange(first + 1, days + 1)
        pause = range(20, 55) if user == 2 else range(0)
        lines: list[Purchase] = []
        moments = {start + timedelta(days=first, seconds=rng.choice(clock))}
        for day in range(first, last):
            if day not in pause and rng.random() < 0.25:
                seconds = rng.choice([*clock, rng.randrange(86400), rng.randrange(86400)])
                moments.add(start + timedelta(days=day, seconds=seconds))
        if user == 1:
            moments |= {start + timedelta(hours=1), start + timedelta(days=days, hours=4)}
        for at in sorted(moments):
            for _ in range(2 if rng.random() < 0.1 else 1):
                basket += 1
                store = rng.choice([3, 7, 300])
                lines += [
                    Purchase(
                        at,
                        basket,
                        store,
                        rng.randrange(12),
                        round(rng.choice([0.0, rng.uniform(0, 90)]), 2),
                        rng.random() < 0.2,
                    )
                    for _ in range(rng.randrange(1, 5))
                ]
        found[user] = lines
    return found


def random_survey(seed: int) -> dict[int, dict[str, Any]]:
    """Answers of households 1, 2 and one that never bought anything."""
    rng = random.Random(seed)
    return {
        user: {
            "age": rng.choice(list(AGES)),
            "income": rng.choice(list(INCOMES)),
            "home_ownership": rng.choice(
                [None, "Homeowner", "Renter", "Probable Homeowner", "Probable Renter"]
            ),
            "marital_status": rng.choice([None, "Married", "Unmarried"]),
            "household_size": rng.choice(["1", "2", "5+"]),
            "kids_count": rng.choice(["0", "1", "3+"]),
        }
        for user in (1, 2, 77)
    }


def write_raw(folder: Path, purchases: dict[int, list[Purchase]], survey: dict[int, dict[str, Any]]) -> Path:
    """Write both as files of the data package's schema; ``at`` loses its zone, as there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [(user, p) for user, own in purchases.items() for p in own]
    transactions = pa.table(
        {
            "household_id": pa.array([user for user, _ in lines], pa.int64()),
            "store_id": pa.array([p.store for _, p in lines], pa.int64()),
            "basket_id": pa.array([p.basket for _, p in lines], pa.int64()),
            "product_id": pa.array([p.product for _, p in lines], pa.int64()),
            "sales_value": pa.array([p.amount for _, p in lines], pa.float64()),
            "coupon_disc": pa.array([0.5 if p.coupon else 0.0 for _, p in lines], pa.float64()),
            "coupon_match_disc": pa.array([0.0] * len(lines), pa.float64()),
            "transaction_timestamp": pa.array(
                [p.at.replace(tzinfo=None) for _, p in lines], pa.timestamp("us")
            ),
        }
    )
    answers = [{"household_id": user, **row} for user, row in survey.items()]
    schema = pa.schema(
        [("household_id", pa.int64()), *((name, pa.string()) for name in next(iter(survey.values())))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(transactions, folder / "transactions.parquet")
    pq.write_table(pa.Table.from_pylist(answers, schema=schema), folder / "demographics.parquet")
    return folder
