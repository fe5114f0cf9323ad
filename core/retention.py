"""Removing old versions of a model, and what interrupted registrations left behind.

The manifest goes first, so that a version that is half removed is invisible. The removal is then an entry of
the history: of a removal and a promotion at once one is first, and the other sees it. The claim stays: a
number is never used again. Knows the registry's files and its traffic, and nothing of serving.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from core.errors import CheckFailed, Conflict, InvalidRequest
from core.manifest import MANIFEST_FILE
from core.registry import CLAIM_FILE, ModelRegistry, versions_in
from core.traffic import Traffic

ABANDONED_AFTER = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Pruning:
    """The versions removed, the numbers of interrupted registrations or removals whose files are, and of
    each version that stays the reason.
    """

    versions: tuple[int, ...]
    leftovers: tuple[int, ...]
    kept: Mapping[int, str]


def prune(
    registry: ModelRegistry,
    name: str,
    *,
    keep: int = 0,
    older_than: timedelta | None = None,
    dry_run: bool = False,
    why: str = "",
) -> Pruning:
    """Remove the versions beyond the newest ``keep`` that were created more than ``older_than`` ago.

    A version that an alias or a rollout points to always stays, and so does one whose manifest is not sound.

    Raises:
        ModelNotFound: there is no such model.
        InvalidRequest: neither limit is given; a dry run needs none, and tells of all not in use.
        Conflict: one of them came into use meanwhile; nothing of it is removed.
    """
    if keep < 1 and older_than is None and not dry_run:
        raise InvalidRequest("Pruning needs a limit.", hint="Give --keep, --older-than or both.")
    registry.require(name)
    now = datetime.now(tz=UTC)
    numbers = registry.versions(name)
    kept, doomed = _choose(registry, name, numbers, keep, None if older_than is None else now - older_than)
    leftovers = _leftovers(registry, name, set(numbers), now - ABANDONED_AFTER)
    if not dry_run:
        if doomed:
            _retire(registry, name, doomed, why)
        for number in [*doomed, *leftovers]:
            for path in registry.store.files(name, str(number)):
                # Only files of its own: what lies deeper would have been reached through a link.
                if len(path) == 1 and path[0] != CLAIM_FILE:
                    registry.store.remove(name, str(number), path[0])
    return Pruning(tuple(doomed), tuple(leftovers), kept)


def _choose(
    registry: ModelRegistry, name: str, numbers: list[int], keep: int, before: datetime | None
) -> tuple[dict[int, str], list[int]]:
    last = registry.latest(name)
    uses = _uses(last.traffic if last else Traffic())
    newest = set(numbers[-keep:]) if keep else set()
    kept, doomed = {}, []
    for number in numbers:
        if number in uses:
            kept[number] = uses[number]
        elif number in newest:
            kept[number] = f"among the newest {keep}"
        else:
            try:
                created = registry.manifest(name, number).created
            except CheckFailed as exc:
                kept[number] = f"not sound ({exc.code})"
                continue
            if before is not None and created >= before:
                kept[number] = f"created {created:%Y-%m-%d}"
            else:
                doomed.append(number)
    return kept, doomed


def _uses(traffic: Traffic) -> dict[int, str]:
    aliases: dict[int, list[str]] = {}
    for alias, number in sorted(traffic.aliases.items()):
        aliases.setdefault(number, []).append(alias)
    rollout = {} if traffic.rollout is None else dict.fromkeys(versions_in(traffic), "in a rollout")
    return rollout | {number: ", ".join(found) for number, found in aliases.items()}


def _retire(registry: ModelRegistry, name: str, doomed: list[int], why: str) -> None:
    """Remove the manifests, and say so in the history unless one of the versions came into use."""
    store = registry.store
    manifests = {number: store.read(name, str(number), MANIFEST_FILE) for number in doomed}
    for number in doomed:
        store.remove(name, str(number), MANIFEST_FILE)

    def unused(now: Traffic) -> Traffic:
        used = sorted(versions_in(now) & set(doomed))
        if used:
            raise Conflict(f"Version {used[0]} of model {name!r} came into use.", hint="Prune again.")
        return now

    listed = ", ".join(map(str, doomed))
    try:
        registry.change(name, "prune", unused, why=f"{listed}: {why}" if why else listed)
    except BaseException:
        for number, content in manifests.items():
            if content is not None:
                store.replace(content, name, str(number), MANIFEST_FILE)
        raise


def _leftovers(registry: ModelRegistry, name: str, registered: set[int], before: datetime) -> list[int]:
    """Claimed numbers without a manifest that hold files, and were claimed long ago."""
    found: set[int] = set()
    for path in registry.store.files(name):
        if len(path) == 2 and path[0].isdecimal() and path[1] != CLAIM_FILE:
            found.add(int(path[0]))
    claimed = {
        number: registry.store.modified(name, str(number), CLAIM_FILE) for number in found - registered
    }
    return sorted(number for number, moment in claimed.items() if moment is not None and moment < before)
