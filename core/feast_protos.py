"""Feast's protobuf messages without the seven seconds that ``import feast`` costs.

A worker, ``banquet --help`` and the codec need the messages only; they live in ``feast.protos``, which
itself needs nothing of Feast. This module loads them below a stand-in for the package ``feast`` and takes
all of it out of ``sys.modules`` again, so that a later ``import feast`` is the usual one. It then gets the
very same classes: protobuf keeps one class per message of its descriptor pool.

Import it at module level: while it loads (a tenth of a second), another thread that begins to
``import feast`` would see the stand-in.

Knows nothing of what the messages are used for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType


def _stand_in() -> ModuleType:
    """An empty package ``feast`` that finds its subpackages on disk.

    Raises:
        ModuleNotFoundError: Feast is not installed.
    """
    spec = importlib.util.find_spec("feast")
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("No module named 'feast'", name="feast")
    package = ModuleType("feast")
    package.__path__ = list(spec.submodule_search_locations)
    return package


def _load(*names: str) -> tuple[ModuleType, ...]:
    """Import ``feast.protos.feast.<name>`` for each name; Feast's own ``__init__`` never runs for it."""
    absolute = [f"feast.protos.feast.{name}" for name in names]
    if "feast" in sys.modules:
        return tuple(importlib.import_module(name) for name in absolute)
    sys.modules["feast"] = _stand_in()
    try:
        return tuple(importlib.import_module(name) for name in absolute)
    finally:
        for name in [name for name in sys.modules if name == "feast" or name.startswith("feast.protos")]:
            del sys.modules[name]


(
    value_pb2,
    entity_key_pb2,
    registry_pb2,
    feature_view_pb2,
    stream_feature_view_pb2,
    on_demand_feature_view_pb2,
    label_view_pb2,
) = _load(
    "types.Value_pb2",
    "types.EntityKey_pb2",
    "core.Registry_pb2",
    "core.FeatureView_pb2",
    "core.StreamFeatureView_pb2",
    "core.OnDemandFeatureView_pb2",
    "core.LabelView_pb2",
)

Value = value_pb2.Value
EntityKey = entity_key_pb2.EntityKey
Registry = registry_pb2.Registry
FeatureView = feature_view_pb2.FeatureView
StreamFeatureView = stream_feature_view_pb2.StreamFeatureView
OnDemandFeatureView = on_demand_feature_view_pb2.OnDemandFeatureView
LabelView = label_view_pb2.LabelView
