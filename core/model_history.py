"""The history of one model: an append-only chain of entries, the last of which is the model's state.

Entry n is ``history/<n>.json``, created exclusively, which decides between two writers; it holds the digest
of entry n - 1, so no entry can be changed, dropped or exchanged unnoticed by a reader that knows a later one.
Knows no versions and no packages.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from core import records
from core.errors import DamagedRegistry, HistoryRewritten
from core.object_store import ObjectStore
from core.traffic import Rollout, Traffic
from core.trust import Trust

_FOLDER = "history"
_ENTRY = re.compile(r"([1-9]\d*)\.json", re.ASCII)
_REWRITTEN = (
    "Someone removed or replaced entries. Restore them; a server that starts anew takes what it finds."
)


@dataclass(frozen=True, slots=True)
class Change:
    """Entry ``number`` of a model's history: what was done, and where the traffic goes from then on.

    ``before`` is the ``digest`` of the entry before it; ``signature`` covers all the rest.
    """

    number: int
    action: str
    aliases: Mapping[str, int]
    rollout: Rollout | None
    who: str
    when: datetime
    why: str
    before: str | None = None
    signature: str | None = None

    @property
    def traffic(self) -> Traffic:
        """The state that it left."""
        return Traffic(self.aliases, self.rollout)

    @property
    def content(self) -> bytes:
        """What is signed: the entry without its signature."""
        return _text(replace(self, signature=None))

    @property
    def digest(self) -> str:
        """The sha256 of its content."""
        return hashlib.sha256(self.content).hexdigest()


class ModelHistory:
    """The entries of model ``name``. ``latest`` says what its methods raise."""

    def __init__(self, store: ObjectStore, trust: Trust, name: str) -> None:
        self._store = store
        self._trust = trust
        self._name = name

    def entries(self) -> list[Change]:
        """Every entry, oldest first, each checked to follow from the one before."""
        changes: list[Change] = []
        for number in range(1, self._last_number() + 1):
            changes.append(self._entry(number, changes[-1] if changes else None))
        return changes

    def before(self, change: Change) -> Change | None:
        """The entry before that one; None where it is the first."""
        return self._entry(change.number - 1) if change.number > 1 else None

    def latest(self, known: Change | None = None) -> Change | None:
        """See ``ModelRegistry.latest``."""
        if known is None:
            number = self._last_number()
            if not number:
                return None
            return self._entry(number, self._entry(number - 1) if number > 1 else None)
        if self._entry(known.number).digest != known.digest:
            raise HistoryRewritten(
                f"{self._place(known.number)} in the model registry is not what it was.", hint=_REWRITTEN
            )
        while self._read(known.number + 1) is not None:
            known = self._entry(known.number + 1, known)
        return known

    def append(self, action: str, after: Callable[[Change | None], Traffic], *, who: str, why: str) -> Change:
        """Write the entry whose traffic ``after`` makes of the last one; again where another came first."""
        while True:
            last = self.latest()
            traffic = after(last)
            done = Change(
                number=last.number + 1 if last else 1,
                action=action,
                aliases=dict(traffic.aliases),
                rollout=traffic.rollout,
                who=who,
                when=datetime.now(tz=UTC),
                why=why,
                before=last.digest if last else None,
            )
            # As a reader will have it: a number given as 10 is read as 10.0, and that is what is signed.
            done = self._signed(records.from_json(Change, records.to_json(done), "it"))
            try:
                self._write(self._store.create, done)
            except FileExistsError:
                # Unless the answer to our own creation was lost, and the client library asked again.
                if self._read(done.number) != _text(done):
                    continue
            return done

    def sign(self) -> list[int]:
        """See ``ModelRegistry.sign``; the numbers of the entries that were signed."""
        numbers = []
        for change in ModelHistory(self._store, Trust(), self._name).entries():
            signed = self._signed(change)
            if signed == change:
                continue
            if change.signature is not None:
                self._check_signature(change)
            self._write(self._store.replace, signed)
            numbers.append(change.number)
        return numbers

    def _entry(self, number: int, before: Change | None = None) -> Change:
        """An entry, checked by itself and, where ``before`` is given or it is the first, as its successor."""
        content = self._read(number)
        if content is None:
            raise HistoryRewritten(f"{self._place(number)} is gone from the model registry.", hint=_REWRITTEN)
        try:
            change = records.from_json(Change, content, "it")
            if change.number != number:
                raise ValueError(f"it is entry {change.number}")
        except ValueError as exc:
            raise DamagedRegistry(
                f"{self._place(number)} in the model registry cannot be read: {exc}.",
                hint="Restore the file; the entries before it have every earlier state.",
            ) from exc
        self._check_signature(change)
        expected = before.digest if before else None
        if (before is not None or number == 1) and change.before != expected:
            raise HistoryRewritten(
                f"{self._place(number)} does not follow from the entry before it.", hint=_REWRITTEN
            )
        return change

    def _signed(self, change: Change) -> Change:
        signature = self._trust.sign("history entry", self._name, change.content)
        return replace(change, signature=signature)

    def _check_signature(self, change: Change) -> None:
        self._trust.check(
            "history entry", self._name, change.content, change.signature, self._place(change.number)
        )

    def _last_number(self) -> int:
        found = (_ENTRY.fullmatch(child) for child in self._store.children(self._name, _FOLDER))
        return max((int(match[1]) for match in found if match), default=0)

    def _place(self, number: int) -> str:
        return f"{self._name}/{_FOLDER}/{number}.json"

    def _read(self, number: int) -> bytes | None:
        return self._store.read(self._name, _FOLDER, f"{number}.json")

    def _write(self, write: Callable[..., None], change: Change) -> None:
        write(_text(change), self._name, _FOLDER, f"{change.number}.json")


def _text(change: Change) -> bytes:
    return records.to_json(change).encode()
