"""Feature vectors by column, cut and put together."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from core.errors import OnDemandFailed
from core.online import FeatureVectors
from core.types import FeatureStatus

PRESENT, MISSING = FeatureStatus.PRESENT, FeatureStatus.NOT_FOUND


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12), st.data())
def test_what_was_cut_joins_to_the_whole(rows: list[tuple[bool, bool]], data: st.DataObject) -> None:
    """A column whose values are all present has no statuses, whatever the slices were."""
    missing = [PRESENT if there else MISSING for there, _ in rows]
    whole = FeatureVectors(
        rows=len(rows),
        values={"v__a": [float(i) if there else None for i, (there, _) in enumerate(rows)]},
        statuses={"v__a": missing if MISSING in missing else None},
        event_ns={"v": list(range(len(rows)))},
        errors={i: OnDemandFailed(f"{i}") for i, (_, failed) in enumerate(rows) if failed},
    )
    cuts = sorted({0, len(rows), *data.draw(st.lists(st.integers(0, len(rows))))})
    parts = [whole.slice(start, stop) for start, stop in pairwise(cuts)]
    for part in parts:
        if set(part.statuses["v__a"] or ()) == {PRESENT}:
            part.statuses["v__a"] = None
    assert FeatureVectors.joined(parts) == whole
