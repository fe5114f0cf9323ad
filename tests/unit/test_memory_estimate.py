"""What views take together: keys are paid once, and a table is one for every view's fields."""

from __future__ import annotations

import pytest

from materialization.memory import Estimate, together

COMPACT = Estimate(bytes=100, key_bytes=40, rows=10, tables=0, loosened=60)
TABLE = Estimate(bytes=500, key_bytes=40, rows=10, tables=10)
FEW = Estimate(bytes=20, key_bytes=8, rows=2, tables=2)


@pytest.mark.parametrize(
    ("views", "sizes"),
    [
        ([COMPACT], [100]),
        ([COMPACT, COMPACT], [100, 60]),
        ([COMPACT, TABLE], [160, 460]),
        ([FEW, COMPACT], [12, 112]),  # two of the ten hashes are tables
        ([Estimate(), COMPACT], [0, 100]),
    ],
)
def test_views_of_the_same_keys(views: list[Estimate], sizes: list[int]) -> None:
    assert together(views) == sizes
