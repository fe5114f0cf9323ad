"""A view and its source for tests of materialization that need neither Feast nor Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import duckdb
import pandas as pd

from core.repository import Feature, View
from core.source import Scan, connect
from core.types import Dtype, Field
from materialization.window import ViewSource


def make_view(
    features: Mapping[str, Dtype],
    *,
    keys: Sequence[Field] = (Field("user_id", Dtype.INT64),),
    tags: Mapping[str, Mapping[str, str]] | None = None,
) -> View:
    """A view ``behavior``; ``tags`` by feature."""
    return View(
        name="behavior",
        stored_name="behavior",
        join_keys=tuple(keys),
        features=tuple(Feature(n, dtype, dict((tags or {}).get(n, {}))) for n, dtype in features.items()),
        ttl=timedelta(0),
    )


def make_source(
    view: View,
    events: pd.DataFrame,
    *,
    created: str | None = None,
    field_mapping: Mapping[str, str] | None = None,
    con: duckdb.DuckDBPyConnection | None = None,
) -> ViewSource:
    """The events as the view's source; their column ``position`` orders them as they lie."""
    con = con or connect()
    con.execute("CREATE OR REPLACE TABLE events AS SELECT * FROM events")
    columns = {row[0]: row[1] for row in con.execute("DESCRIBE events").fetchall()}
    position = ("position",) if "position" in columns else ()
    return ViewSource(
        con,
        view,
        Scan("events", columns, position, "the events"),
        timestamp="event_timestamp",
        created=created,
        field_mapping=field_mapping or {},
    )
