"""A Feast repository with a view that has a feature of every type, and rows for it; and views for pushes.

In ``every``, item 1 has ordinary values, item 2 nothing but nulls, item 3 the values at the edges of the
types. ``graded`` and ``counted`` are both fed by ``shelf_push``: ``graded`` has two join keys, expectations
and a source with column names of its own, ``counted`` is plain. ``roots`` fails on negative numbers.
"""

from __future__ import annotations

import math
import uuid
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.types import Dtype

if TYPE_CHECKING:
    from core.repository import FeastRepository

EVENT = datetime.now(tz=UTC).replace(microsecond=250_000) - timedelta(hours=1)
ITEMS = (1, 2, 3)

_STORE = """\
project: {project}
provider: local
registry: registry.db
online_store:
  type: redis
  connection_string: "{connection_string}"
offline_store:
  type: {offline}
entity_key_serialization_version: 3
"""

_DEFINITIONS = """\
import math
from typing import Any

from feast import Entity, FeatureView, Field, FileSource, PushSource, RequestSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Float64, Int32, Int64, Set, String, Struct, from_value_type

STRUCT = Struct({"a": Int64, "b": String})
TYPES = {
    ValueType.STRUCT: STRUCT,
    ValueType.STRUCT_LIST: Array(STRUCT),
    ValueType.VALUE_LIST: Array(Array(Int64)),
    ValueType.VALUE_SET: Set(Array(String)),
}
NAMES = @names@

item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
source = FileSource(
    name="every", path="every.parquet", timestamp_field="event_timestamp", created_timestamp_column="created"
)
every = FeatureView(
    name="every", entities=[item], ttl=None, source=PushSource(name="every_push", batch_source=source),
    schema=[Field(name="item_id", dtype=Int64)] + [
        Field(name=name.lower(), dtype=TYPES.get(ValueType[name]) or from_value_type(ValueType[name]))
        for name in NAMES
    ],
)

shelf = Entity(name="shelf", join_keys=["shelf_code"], value_type=ValueType.STRING)
shelf_source = FileSource(
    name="shelf", path="shelf.parquet", timestamp_field="seen_at", field_mapping={"points": "score"}
)
shelf_push = PushSource(name="shelf_push", batch_source=shelf_source)
graded = FeatureView(
    name="graded", entities=[item, shelf], ttl=None, source=shelf_push,
    schema=[
        Field(name="item_id", dtype=Int64),
        Field(name="shelf_code", dtype=String),
        Field(name="score", dtype=Float64, tags={"min": "0", "max": "10", "nullable": "false"}),
        Field(name="grade", dtype=String, tags={"categories": '["a", "b"]'}),
    ],
)
counted = FeatureView(
    name="counted", entities=[item], ttl=None, source=shelf_push,
    schema=[Field(name="item_id", dtype=Int64), Field(name="count", dtype=Int32)],
)


@on_demand_feature_view(
    sources=[RequestSource(name="request", schema=[Field(name="number", dtype=Float64)])],
    schema=[Field(name="root", dtype=Float64)],
    mode="python",
)
def roots(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"root": [math.sqrt(number) for number in inputs["number"]]}
"""

_ID = uuid.UUID("0b8e5b0e-5d7c-4d0a-9f0e-0123456789ab")
_MOMENT = datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC)

# Per type an ordinary value and one from its edge.
VALUES: dict[Dtype, tuple[Any, Any]] = {
    Dtype.BYTES: (b"\x00\xff", b"a" * 300),
    Dtype.PDF_BYTES: (b"%PDF-1.7", b"\x00"),
    Dtype.IMAGE_BYTES: (b"\x89PNG", b"\xff\xd8"),
    Dtype.STRING: ("plain", 'a "quoted"\n\u2028 \U0001f34b'),
    Dtype.INT32: (7, -(2**31)),
    Dtype.INT64: (7_000_000_000, 2**63 - 1),
    Dtype.DOUBLE: (0.1, math.inf),
    Dtype.FLOAT: (0.1, -math.inf),
    Dtype.BOOL: (True, False),
    Dtype.UNIX_TIMESTAMP: (_MOMENT, datetime(1901, 1, 1, tzinfo=UTC)),
    Dtype.BYTES_LIST: ([b"a", b"\x00"], []),
    Dtype.STRING_LIST: (["a", "b"], ["", "ü"]),
    Dtype.INT32_LIST: ([1, 2], [-(2**31), 2**31 - 1]),
    Dtype.INT64_LIST: ([1, 2], []),
    Dtype.DOUBLE_LIST: ([0.5, 1e300], [math.inf, math.nan]),
    Dtype.FLOAT_LIST: ([0.5, 0.1], [-math.inf]),
    Dtype.BOOL_LIST: ([True, False], []),
    Dtype.UNIX_TIMESTAMP_LIST: ([_MOMENT, _MOMENT + timedelta(days=1)], []),
    Dtype.MAP: ({"a": 1, "b": "x", "c": {"d": 0.5}}, {"": True, "n": None}),
    Dtype.MAP_LIST: ([{"a": 1}, {"b": "x"}], []),
    Dtype.BYTES_SET: ({b"a"}, {b"\x00"}),
    Dtype.STRING_SET: ({"a"}, {"ü"}),
    Dtype.INT32_SET: ({3, 1, 2}, {-1}),
    Dtype.INT64_SET: ({3, 1, 2}, {2**63 - 1}),
    Dtype.DOUBLE_SET: ({0.5}, {math.inf}),
    Dtype.FLOAT_SET: ({0.25}, {0.1}),
    Dtype.BOOL_SET: ({True}, {False}),
    Dtype.UNIX_TIMESTAMP_SET: ({_MOMENT}, {datetime(1901, 1, 1, tzinfo=UTC)}),
    Dtype.JSON: ('{"a":1,  "b": [null, 0.5]}', '"text"'),
    Dtype.JSON_LIST: (['{"a":1}', "[1, 2]"], []),
    Dtype.STRUCT: ({"a": 1, "b": "x"}, {"a": -1, "b": ""}),
    Dtype.STRUCT_LIST: ([{"a": 1, "b": "x"}], []),
    Dtype.UUID: (_ID, uuid.UUID(int=0)),
    Dtype.TIME_UUID: (_ID, uuid.UUID(int=2**128 - 1)),
    Dtype.UUID_LIST: ([_ID], []),
    Dtype.TIME_UUID_LIST: ([_ID, _ID], []),
    Dtype.UUID_SET: ({_ID}, {uuid.UUID(int=0)}),
    Dtype.TIME_UUID_SET: ({_ID}, {uuid.UUID(int=0)}),
    Dtype.VALUE_LIST: ([[1, 2], [3]], [[5]]),
    Dtype.VALUE_SET: ([["a", "b"], ["c"]], [["ü"]]),
    Dtype.DECIMAL: (Decimal("1.50"), Decimal("-1E+20")),
    Dtype.DECIMAL_LIST: ([Decimal("1.5"), Decimal("2")], []),
    Dtype.DECIMAL_SET: ({Decimal("1.5")}, {Decimal("0")}),
    Dtype.SCALAR_MAP: ({1: "a", 2: "b"}, {True: None}),
    Dtype.ZONED_TIMESTAMP: (
        datetime(2024, 2, 29, 12, 0, tzinfo=timezone(timedelta(hours=-7))),
        datetime(2024, 2, 29, 12, 0, tzinfo=UTC),
    ),
}


def applied(
    path: Path,
    connection_string: str,
    *,
    project: str = "every",
    offline: str = "core.offline.BanquetOfflineStore",
) -> FeastRepository:
    """Write the repository below ``path`` and apply it."""
    import pandas as pd

    from core.repository import FeastRepository
    from materialization import apply

    path.mkdir(parents=True, exist_ok=True)
    settings = _STORE.format(project=project, connection_string=connection_string, offline=offline)
    (path / "feature_store.yaml").write_text(settings)
    names = [dtype.name for dtype in VALUES]
    # A module that Feast has imported under this name for another repository would be taken for it.
    (path / f"{project}_definitions.py").write_text(_DEFINITIONS.replace("@names@", repr(names)))
    shelf = pd.DataFrame(
        {
            "item_id": [1],
            "shelf_code": ["low"],
            "points": [1.5],
            "grade": ["a"],
            "count": pd.array([3], dtype="Int32"),
            "seen_at": [EVENT - timedelta(days=1)],
        }
    )
    shelf.to_parquet(path / "shelf.parquet", coerce_timestamps="us")
    repository = FeastRepository.open(path)
    apply.apply(repository, apply.plan(repository))
    return repository


def store_rows(repository: FeastRepository) -> None:
    """Write the items' rows as stock Feast encodes and writes them."""
    from feast import ValueType
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import python_values_to_proto_values

    store = repository.store()

    def encoded(position: int) -> dict[str, Any]:
        return {
            dtype.name.lower(): python_values_to_proto_values([values[position]], ValueType[dtype.name])[0]
            for dtype, values in VALUES.items()
        }

    nulls = {dtype.name.lower(): Value() for dtype in VALUES}
    rows = dict(zip(ITEMS, (encoded(0), nulls, encoded(1)), strict=True))
    store._get_provider().online_write_batch(
        store.config,
        store.get_feature_view("every"),
        [
            (EntityKey(join_keys=["item_id"], entity_values=[Value(int64_val=item)]), values, EVENT, None)
            for item, values in rows.items()
        ],
        None,
    )
