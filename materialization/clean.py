"""Removal of what no definition claims any more from the online store: `banquet clean`.

Rows of views that are gone, fields of features that are gone, rows past their ttl, ledgers of views that are
gone; a hash that loses its last field is gone with it. A key is read in full before it is touched, so a
project whose name ends like another's keeps its keys. ADR 0075 has the reasons for the order of the steps.

Knows Redis and ``materialization.claims``; knows no source.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from core import layout
from core.errors import Conflict, CorruptCell
from core.repository import FeastRepository
from core.write import created_times_key
from materialization.claims import Claim, Claims, Verdict, view_of
from materialization.ledger import Ledger, ledger_keys

SCAN_KEYS = 500
KEYS_PER_SECOND = 20_000
# A registry that is not a file is asked this often whether the definitions have changed.
LOOK_SECONDS = 2.0
_SIZED_KEYS = 64

# KEYS[1] is the hash. ARGV holds, per group: how many guards and each guard's field and expected value, the
# index in KEYS of the hash of created times (0: none), how many fields and the fields. A group whose guards
# do not hold is left alone.
_REMOVE = """
local at, answer = 1, {}
while at <= #ARGV do
  local intact, guards = true, tonumber(ARGV[at])
  at = at + 1
  for _ = 1, guards do
    if redis.call('HGET', KEYS[1], ARGV[at]) ~= ARGV[at + 1] then intact = false end
    at = at + 2
  end
  local side, count, removed = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), -1
  at = at + 2
  if intact then
    removed = 0
    for first = at, at + count - 1, 4000 do
      local last = math.min(first + 3999, at + count - 1)
      removed = removed + redis.call('HDEL', KEYS[1], unpack(ARGV, first, last))
    end
    if side > 0 then redis.call('HDEL', KEYS[side], KEYS[1]) end
  end
  at = at + count
  answer[#answer + 1] = removed
end
return answer
"""
# KEYS: a ledger and its lease.
_REMOVE_LEDGER = "if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end redis.call('DEL', KEYS[1]) return 1"
# KEYS[1] a ledger; ARGV a record's name and the value it was seen with.
_FORGET = (
    "if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end "
    "return redis.call('HDEL', KEYS[1], ARGV[1])"
)


@dataclass(slots=True)
class CleanReport:
    """What was removed, or in a dry run would be.

    ``looked`` counts the project's own keys; ``removed_views`` and ``expired`` rows by stored view;
    ``features`` single fields of features that no definition has; ``keys`` hashes that went altogether;
    ``rewritten`` parts of hashes left alone because somebody wrote them at that moment. ``bytes`` is
    an estimate from a sample, None where the server does not tell.
    """

    dry_run: bool
    looked: int = 0
    removed_views: Counter[str] = field(default_factory=Counter)
    features: int = 0
    expired: Counter[str] = field(default_factory=Counter)
    fields: int = 0
    keys: int = 0
    rewritten: int = 0
    ledgers: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    bytes: int | None = 0
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "dry_run": self.dry_run,
            "keys_looked_at": self.looked,
            "removed_views": dict(self.removed_views),
            "removed_features_fields": self.features,
            "expired_rows": dict(self.expired),
            "fields": self.fields,
            "keys_removed": self.keys,
            "rewritten": self.rewritten,
            "ledgers": self.ledgers,
            "busy_views": self.busy,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class CleanProgress:
    """How many keys of the server's ``total`` have been passed (other projects' among them), and removals."""

    passed: int
    total: int
    fields: int


def clean(
    repository: FeastRepository,
    *,
    dry_run: bool = False,
    expired_for: timedelta = timedelta(0),
    keys_per_second: int = KEYS_PER_SECOND,
    whole_project: bool = False,
    observe: Callable[[CleanProgress], None] | None = None,
) -> CleanReport:
    """Remove the project's orphans and the rows that have been past their ttl for ``expired_for``.

    Safe against concurrent writers and against being killed: what is left is found by the next run. Passes
    at most ``keys_per_second`` keys, those of others included. ``whole_project`` allows it where the registry
    has no view of the project, which makes every row of it an orphan.

    Raises:
        Conflict: there is no view and ``whole_project`` is not given.
        InvalidRepository: the registry cannot be read, or the online store is not Redis.
        RedisUnavailable: Redis went away.
    """
    return _Cleaning(repository, dry_run, expired_for, keys_per_second, whole_project, observe).run()


@dataclass(frozen=True, slots=True)
class _Group:
    """Fields of one hash that go together, if the guards still hold."""

    guards: tuple[tuple[bytes, bytes], ...]
    fields: Sequence[bytes]
    side: bytes | None
    orphans: Verdict | None
    claim: Claim | None


class _Cleaning:
    """One run."""

    def __init__(
        self,
        repository: FeastRepository,
        dry_run: bool,
        expired_for: timedelta,
        keys_per_second: int,
        whole_project: bool,
        observe: Callable[[CleanProgress], None] | None,
    ) -> None:
        self._repository = repository
        self._expired_for_ns = expired_for // timedelta(microseconds=1) * 1000
        self._rate = keys_per_second
        self._whole_project = whole_project
        self._observe = observe
        self._report = CleanReport(dry_run)
        self._busy: set[bytes] = set()
        self._definitions_checked = False
        self._sizes: dict[tuple[frozenset[bytes], frozenset[bytes]], list[float]] = {}
        self._counts: Counter[tuple[frozenset[bytes], frozenset[bytes]]] = Counter()
        self._passed = self._total = 0
        self._read_definitions()

    def run(self) -> CleanReport:
        """Ledgers first: rows may only go once nothing says that they are there."""
        began = time.monotonic()
        with self._repository.redis.session() as client:
            self._client = client
            nodes = list(servers(client))
            self._total = sum(int(node.dbsize()) for node in nodes)
            witnesses = self._witnesses()
            for node in nodes:
                self._clean_ledgers(node)
            for node in nodes:
                self._clean_rows(node)
            if not self._report.dry_run:
                self._forget_lost_witnesses(witnesses)
        self._report.bytes = self._estimated_bytes()
        self._report.seconds = time.monotonic() - began
        return self._report

    # Definitions

    def _read_definitions(self) -> None:
        self._fingerprint = self._repository.fingerprint()
        self._looked_at = time.monotonic()
        self._claims = Claims.of_registry(self._repository.registry(), self._repository.config)
        self._definitions_checked = False
        if not self._claims.stored_names and not self._whole_project:
            raise Conflict(
                f"The registry has no feature view of project {self._repository.project!r}: "
                "every row of it would be removed.",
                hint="Run `banquet apply` first, or pass --whole-project if that is what you want.",
            )

    def _follow_definitions(self) -> None:
        """Views that are applied while this runs must not lose the rows that are then written."""
        if self._definitions_changed():
            self._read_definitions()

    def _definitions_changed(self) -> bool:
        if self._repository.registry_file is None:
            if time.monotonic() - self._looked_at < LOOK_SECONDS:
                return False
            self._looked_at = time.monotonic()
        return self._repository.fingerprint() != self._fingerprint

    # Ledgers

    def _clean_ledgers(self, node: Any) -> None:
        """Remove the ledgers and the created times of views that are gone.

        While a run holds a removed view, its ledger and its rows are left for the next time.
        """
        project = self._repository.project
        ledgers, ending = f"banquet:{{{project}:".encode(), b"}:ledger"
        created = f"banquet:created:{project}:".encode()
        for keys in self._scan(node, b"banquet:*" + _escaped(project.encode()) + b":*"):
            self._follow_definitions()
            for key in keys:
                if key.startswith(ledgers) and key.endswith(ending):
                    view = key[len(ledgers) : -len(ending)].decode(errors="replace")
                elif key.startswith(created) and key.endswith(b"}"):
                    view = key[len(created) :].rpartition(b":{")[0].decode(errors="replace")
                else:
                    continue
                # A colon cannot be in a view's name; it is there if the project's name goes on.
                if ":" in view or view in self._claims.stored_names:
                    continue
                if key.startswith(created):
                    if not self._report.dry_run:
                        node.unlink(key)
                    continue
                both = ledger_keys(project, view)
                held = (
                    node.exists(both[1]) if self._report.dry_run else not node.eval(_REMOVE_LEDGER, 2, *both)
                )
                if held:
                    self._busy.add(layout.timestamp_field(view))
                    self._report.busy.append(view)
                else:
                    self._report.ledgers.append(view)

    def _forget_outdated_loads(self) -> None:
        """Make views reload that were loaded under another definition than today's.

        They would be reloaded anyway, unless their old definition comes back; then their ledger must not
        vouch for the fields that are removed now.
        """
        ledgers = (Ledger(self._client, self._repository.project, name) for name in self._claims.stored_names)
        loaded = {ledger.key: seen for ledger in ledgers if (seen := ledger.loaded()) is not None}
        if not loaded:
            return
        from materialization import views

        store = self._repository.store()
        for view in store._get_feature_views_to_materialize(None):
            stored = views.stored_view(view, store.config)
            key, _ = ledger_keys(store.project, stored.stored_name)
            if key in loaded and loaded[key].definition != views.definition_digest(view, store.config):
                text = self._client.hget(key, "loaded")
                if text is not None:
                    self._client.eval(_FORGET, 1, key, "loaded", text)

    def _witnesses(self) -> dict[str, list[bytes]]:
        """Keys of each view by which its ledger knows that its rows are still there."""
        found = {}
        for name in self._claims.stored_names:
            keys = Ledger(self._client, self._repository.project, name).recall("witnesses") or []
            if any(self._client.exists(bytes.fromhex(key)) for key in keys):
                found[name] = [bytes.fromhex(key) for key in keys]
        return found

    def _forget_lost_witnesses(self, before: dict[str, list[bytes]]) -> None:
        """A ledger whose witnesses have all expired must not take it for a lost Redis."""
        for name, keys in before.items():
            if not any(self._client.exists(key) for key in keys):
                ledger, _ = ledger_keys(self._repository.project, name)
                seen = self._client.hget(ledger, "witnesses")
                if seen is not None:
                    self._client.eval(_FORGET, 1, ledger, "witnesses", seen)

    # Rows

    def _clean_rows(self, node: Any) -> None:
        for keys in self._scan(node, b"*" + _escaped(self._claims.project)):
            self._follow_definitions()
            own = [(key, stored) for key in keys if (stored := layout.stored_key(key)) is not None]
            own = [(key, stored) for key, stored in own if stored.project == self._claims.project]
            self._report.looked += len(own)
            fields = answers(node, [("HKEYS", key) for key, _ in own])
            suspects = []
            for (key, stored), names in zip(own, fields, strict=True):
                if not names:
                    continue
                verdict = self._claims.verdict(stored.join_keys, sorted(names))
                if verdict.orphans or verdict.mortal:
                    suspects.append((key, verdict))
            if suspects:
                self._clean_hashes(node, suspects)

    def _clean_hashes(self, node: Any, suspects: Sequence[tuple[bytes, Verdict]]) -> None:
        # HMGET wants one field at least, and a hash may have no timestamp.
        looks = [("HMGET", key, *verdict.timestamps, b"") for key, verdict in suspects]
        now_ns = time.time_ns()
        work = []
        for (key, verdict), cells in zip(suspects, answers(node, looks), strict=True):
            if cells is None:
                continue
            stamps = {f: c for f, c in zip(verdict.timestamps, cells, strict=False) if c is not None}
            groups = self._groups(key, verdict, stamps, now_ns)
            if groups:
                work.append((key, verdict, groups))
        if not work:
            return
        self._measure(node, work)
        if self._report.dry_run:
            for _, verdict, groups in work:
                self._count(verdict, groups, [len(group.fields) for group in groups])
        else:
            self._remove(node, work)

    def _groups(self, key: bytes, verdict: Verdict, stamps: dict[bytes, bytes], now_ns: int) -> list[_Group]:
        groups = []
        if verdict.orphans and not self._busy.intersection(verdict.orphan_rows):
            groups.append(_Group(tuple(stamps.items()), verdict.orphans, None, verdict, None))
        expired = [claim for claim in verdict.mortal if self._has_expired(claim, stamps, now_ns)]
        for claim in expired:
            side = created_times_key(self._repository.project, claim.stored_name, key)
            guard = ((claim.timestamp, stamps[claim.timestamp]),)
            groups.append(_Group(guard, verdict.row(claim, expired), side, None, claim))
        return groups

    def _has_expired(self, claim: Claim, stamps: dict[bytes, bytes], now_ns: int) -> bool:
        with suppress(KeyError, CorruptCell):
            event_ns = layout.decode_timestamp(stamps[claim.timestamp])
            return event_ns < now_ns - claim.ttl_ns - self._expired_for_ns
        return False

    def _remove(self, node: Any, work: Sequence[tuple[bytes, Verdict, list[_Group]]]) -> None:
        # Features that are gone, of views that are not: the ledgers of these must know it first.
        if not self._definitions_checked and any(v.orphan_fields and v.living for _, v, _ in work):
            self._forget_outdated_loads()
            self._definitions_checked = True
        (sha,) = answers(node, [("SCRIPT", "LOAD", _REMOVE)])
        calls: list[tuple[Any, ...]] = []
        for key, _, groups in work:
            sides = [group.side for group in groups if group.side is not None]
            arguments: list[Any] = []
            for group in groups:
                arguments.append(len(group.guards))
                arguments += [part for guard in group.guards for part in guard]
                place = 0 if group.side is None else 2 + sides.index(group.side)
                arguments += [place, len(group.fields), *group.fields]
            calls.append(("EVALSHA", sha, 1 + len(sides), key, *sides, *arguments))
        if self._definitions_changed():
            self._report.rewritten += len(work)
            return
        for (_, verdict, groups), removed in zip(work, answers(node, calls), strict=True):
            self._count(verdict, groups, removed or [-1] * len(groups))

    def _count(self, verdict: Verdict, groups: Sequence[_Group], removed: Sequence[int]) -> None:
        report = self._report
        gone: set[bytes] = set()
        for group, count in zip(groups, removed, strict=True):
            if count < 0:
                report.rewritten += 1
                continue
            report.fields += count
            gone.update(group.fields)
            if group.orphans is not None:
                report.removed_views.update(map(view_of, group.orphans.orphan_rows))
                if not group.orphans.orphan_rows:
                    report.features += len(group.orphans.orphan_fields)
            if group.claim is not None:
                report.expired[group.claim.stored_name] += 1
        if gone:
            report.keys += gone == verdict.fields
            self._counts[verdict.fields, frozenset(gone)] += 1

    # Size

    def _measure(self, node: Any, work: Sequence[tuple[bytes, Verdict, list[_Group]]]) -> None:
        """Look at what some hashes of each kind will free."""
        calls: list[tuple[Any, ...]] = []
        measured = []
        for key, verdict, groups in work:
            gone = frozenset(name for group in groups for name in group.fields)
            sizes = self._sizes.setdefault((verdict.fields, gone), [])
            if len(sizes) < _SIZED_KEYS:
                sizes.append(0.0)
                measured.append((key, sizes, len(sizes) - 1, gone, verdict.fields))
                calls += [("MEMORY", "USAGE", key), ("HGETALL", key)]
        if not calls or self._report.bytes is None:
            return
        from redis.exceptions import RedisError

        try:
            found = answers(node, calls)
        except RedisError:  # MEMORY is a command that managed services and ACLs may withhold
            self._report.bytes = None
            return
        for (key, sizes, place, gone, fields), used, pairs in zip(
            measured, found[::2], found[1::2], strict=True
        ):
            if used is None or not pairs:
                continue
            weights = {name: len(name) + len(cell) + _ENTRY_OVERHEAD for name, cell in pairs.items()}
            share = sum(weights.get(name, 0) for name in gone) / sum(weights.values())
            sizes[place] = used if gone == fields else (used - _KEY_OVERHEAD - len(key)) * share

    def _estimated_bytes(self) -> int | None:
        if self._report.bytes is None:
            return None
        total = 0.0
        for kind, count in self._counts.items():
            sizes = self._sizes.get(kind)
            if sizes:
                total += count * sum(sizes) / len(sizes)
        return round(total)

    # Redis

    def _scan(self, node: Any, pattern: bytes) -> Iterator[list[bytes]]:
        """The hashes whose key fits, in small lots, no faster than the rate."""
        cursor = 0
        while True:
            began = time.monotonic()
            cursor, keys = node.scan(cursor, match=pattern, count=SCAN_KEYS, _type="hash")
            yield keys
            self._passed += SCAN_KEYS
            if self._observe is not None:
                passed = min(self._passed, 2 * self._total)
                self._observe(CleanProgress(passed, 2 * self._total, self._report.fields))
            if not cursor:
                return
            pause = SCAN_KEYS / self._rate - (time.monotonic() - began)
            if pause > 0:
                time.sleep(pause)


# A field and its value in a compact list: two entries with their lengths.
_ENTRY_OVERHEAD = 4
# What a key takes beside its own bytes and its hash's fields.
_KEY_OVERHEAD = 60


def servers(client: Any) -> Iterator[Any]:
    """A client for each server that holds keys."""
    from redis.cluster import RedisCluster

    if isinstance(client, RedisCluster):
        primaries = client.get_primaries()  # type: ignore[no-untyped-call]
        yield from (client.get_redis_connection(node) for node in primaries)
    else:
        yield client


def answers(node: Any, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The answers to some commands in one round trip; None for a key that moved or became something else."""
    from redis.exceptions import AskError, ResponseError

    if not calls:
        return []
    pipeline = node.pipeline(transaction=False)
    for call in calls:
        pipeline.execute_command(*call)
    found: list[Any] = pipeline.execute(raise_on_error=False)
    for place, answer in enumerate(found):
        if isinstance(answer, AskError) or (
            isinstance(answer, ResponseError) and str(answer).startswith("WRONGTYPE")
        ):
            found[place] = None
        elif isinstance(answer, Exception):
            raise answer
    return found


def _escaped(text: bytes) -> bytes:
    """``text`` as a pattern that only it fits."""
    return b"".join(b"\\%c" % byte if byte in b"*?[]^-\\" else b"%c" % byte for byte in text)
