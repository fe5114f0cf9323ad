"""What an on-demand function returns is held to the declared types, row by row."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from core import layout
from core.online import FeaturePlan, FeatureVectors, OnlineReader
from core.redis_connection import open_connection
from core.repository import Definitions, Feature, OnDemandView
from core.types import Dtype, FeatureStatus
from tests.support.valkey import Valkey

PRESENT, INVALID, NULL = FeatureStatus.PRESENT, FeatureStatus.INVALID, FeatureStatus.NULL_VALUE


def computed(
    valkey: Valkey, dtype: Dtype, source: str, numbers: list[Any], *, as_json: bool
) -> FeatureVectors:
    """What the view ``made`` gives, whose function returns the text ``source`` of each ``number``."""
    view = OnDemandView(
        name="made",
        mode="python",
        singleton=False,
        features=(Feature("value", dtype, {}),),
        sources=(),
        request_inputs=(Feature("number", Dtype.DOUBLE, {}),),
        function_name="made",
        function_body=b"",
        function_source=f"def made(inputs): return {{'value': [{source} for n in inputs['number']]}}",
    )
    definitions = Definitions(project="made", views={}, on_demand={"made": view}, services={}, pinned={})
    plan = FeaturePlan.for_references(definitions, ["made:value"])

    async def read() -> FeatureVectors:
        connection = open_connection(valkey.address())
        await connection.connect()
        try:
            return await OnlineReader(connection).read(
                plan, {"number": numbers}, len(numbers), as_json=as_json
            )
        finally:
            await connection.close()

    return asyncio.run(read())


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("dtype", "source", "good"),
    [
        (Dtype.INT64, "int(n) if n < 2 else 2 ** 70", 1),
        (Dtype.INT32, "int(n) if n < 2 else 2 ** 31", 1),
        (Dtype.STRING_LIST, "['a'] if n < 2 else 'a'", ["a"]),
        (Dtype.BYTES, "b'a' if n < 2 else 'a'", b"a"),
        (Dtype.UNIX_TIMESTAMP, "int(n) if n < 2 else 'now'", 1),
    ],
)
def test_a_value_that_its_type_cannot_hold_fails_its_row_only(
    valkey: Valkey, dtype: Dtype, source: str, good: Any, as_json: bool
) -> None:
    found = computed(valkey, dtype, f"None if n is None else {source}", [1.0, 2.0, None], as_json=as_json)
    expected = layout.json_value(good, dtype) if as_json else good
    assert found.values["made__value"] == [expected, None, None]
    assert found.statuses["made__value"] == [PRESENT, INVALID, NULL]
    assert list(found.errors) == [1]
