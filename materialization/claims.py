"""Which hash fields the registry's definitions claim under which join keys; what is left are orphans.

Pure: knows the registry's protobuf and, through ``core.layout``, Feast's bytes; knows no connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from core import layout
from core.layout import EntityKeys
from core.repository import View, stored_views
from core.types import Dtype, Field

_TIMESTAMP_PREFIX = layout.timestamp_field("")
_FEATURE_BYTES = 4
# Feast stores a service's precomputed vectors as rows of a view of this name, under any entity.
_PRECOMPUTED = "__precomputed__"


@dataclass(frozen=True, slots=True)
class Claim:
    """The fields of one stored view's row. ``kinds`` are its join keys' types, None where any will do."""

    stored_name: str
    kinds: tuple[Dtype | None, ...]
    timestamp: bytes
    features: frozenset[bytes]
    ttl_ns: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said of a hash with certain fields under certain join keys.

    ``orphan_rows`` are timestamp fields of rows that no view claims, ``orphan_fields`` feature fields that
    none claims, ``timestamps`` all timestamp fields, ``living`` the claims with a row here, ``mortal`` those
    of them that can expire. ``fields`` are all fields; what Feast did not write is neither orphan nor
    claimed.
    """

    fields: frozenset[bytes]
    timestamps: tuple[bytes, ...]
    orphan_rows: tuple[bytes, ...]
    orphan_fields: tuple[bytes, ...]
    mortal: tuple[Claim, ...]
    living: tuple[Claim, ...]

    @property
    def orphans(self) -> tuple[bytes, ...]:
        """All fields that nothing claims."""
        return self.orphan_rows + self.orphan_fields

    def row(self, claim: Claim, without: Iterable[Claim]) -> list[bytes]:
        """The fields here of a claim's row, but for those that a living row of another claim has too."""
        gone = {claim.stored_name, *(other.stored_name for other in without)}
        shared: set[bytes] = set()
        for other in self.living:
            if other.stored_name not in gone:
                shared |= other.features
        return [claim.timestamp, *sorted((claim.features & self.fields) - shared)]


class Claims:
    """The definitions of one project as claims on the fields of its hashes."""

    def __init__(self, project: str, views: Iterable[View], services: Iterable[str] = ()) -> None:
        """``services`` may have precomputed vectors, which lie under any join keys."""
        self.project = project.encode()
        self.stored_names: set[str] = set()
        self._by_names: dict[tuple[str, ...], dict[str, Claim]] = {}
        self._verdicts: dict[tuple[tuple[Field, ...], tuple[bytes, ...]], Verdict] = {}
        self._vectors = [
            _claim(_PRECOMPUTED + service, (), ("vector",), timedelta(0)) for service in services
        ]
        for view in views:
            keys = sorted(view.join_keys or (layout.PLACEHOLDER,), key=lambda key: key.name)
            kinds = tuple(key.dtype if key.dtype in EntityKeys.STORED_AS_DECLARED else None for key in keys)
            names = [feature.name for feature in view.features]
            claim = _claim(view.stored_name, kinds, names, view.ttl)
            self.stored_names.add(view.stored_name)
            known = self._by_names.setdefault(tuple(key.name for key in keys), {})
            known[view.stored_name] = _both(known.get(view.stored_name, claim), claim)

    @classmethod
    def of_registry(cls, registry: Any, config: Mapping[str, Any]) -> Claims:
        """The claims of the project that ``config`` names."""
        project = config["project"]
        services = [s.spec.name for s in registry.feature_services if s.spec.project == project]
        return cls(project, stored_views(registry, config), services)

    def verdict(self, join_keys: tuple[Field, ...], fields: Sequence[bytes]) -> Verdict:
        """Judge a hash by its fields, under the join keys that its own key names."""
        known = (join_keys, tuple(fields))
        if known not in self._verdicts:
            if len(self._verdicts) >= _REMEMBERED:
                self._verdicts.clear()
            self._verdicts[known] = self._judge(join_keys, frozenset(fields))
        return self._verdicts[known]

    def _judge(self, join_keys: tuple[Field, ...], fields: frozenset[bytes]) -> Verdict:
        kinds = [key.dtype for key in join_keys]
        candidates = self._by_names.get(tuple(key.name for key in join_keys), {})
        claims = [claim for claim in candidates.values() if _fits(claim.kinds, kinds)]
        claims += self._vectors
        claimed = {claim.timestamp for claim in claims}.union(*(claim.features for claim in claims))
        timestamps = tuple(sorted(filter(_is_timestamp, fields)))
        return Verdict(
            fields,
            timestamps,
            orphan_rows=tuple(field for field in timestamps if field not in claimed),
            orphan_fields=tuple(
                sorted(f for f in fields - claimed if len(f) == _FEATURE_BYTES and not _is_timestamp(f))
            ),
            mortal=tuple(claim for claim in claims if claim.ttl_ns and claim.timestamp in fields),
            living=tuple(claim for claim in claims if claim.timestamp in fields),
        )


def _claim(
    stored_name: str, kinds: tuple[Dtype | None, ...], features: Iterable[str], ttl: timedelta
) -> Claim:
    return Claim(
        stored_name,
        kinds,
        layout.timestamp_field(stored_name),
        frozenset(layout.feature_field(stored_name, feature) for feature in features),
        ttl // timedelta(microseconds=1) * 1000,
    )


def _both(one: Claim, other: Claim) -> Claim:
    """Two definitions of one stored view: whatever either of them claims."""
    return Claim(
        one.stored_name,
        tuple(a if a is b else None for a, b in zip(one.kinds, other.kinds, strict=True)),
        one.timestamp,
        one.features | other.features,
        max(one.ttl_ns, other.ttl_ns) if one.ttl_ns and other.ttl_ns else 0,
    )


def _fits(declared: Sequence[Dtype | None], stored: Sequence[Dtype]) -> bool:
    pairs = zip(declared, stored, strict=True)
    return all(kind is None or kind is found for kind, found in pairs)


def _is_timestamp(field: bytes) -> bool:
    return field.startswith(_TIMESTAMP_PREFIX) and len(field) > len(_TIMESTAMP_PREFIX)


def view_of(timestamp_field: bytes) -> str:
    """The stored view whose row a timestamp field belongs to."""
    return timestamp_field[len(_TIMESTAMP_PREFIX) :].decode(errors="replace")


_REMEMBERED = 10_000
