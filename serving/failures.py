"""The log's lines about failed requests: one that stays readable while every request fails.

Knows errors by their code; what a client is told is ``serving.problems``.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from core.errors import BanquetError

log = logging.getLogger("banquet.serving")

SUMMARY_SECONDS = 5.0


@dataclass(slots=True)
class _Spell:
    """Failures of one code without a pause of ``SUMMARY_SECONDS``."""

    last: BanquetError
    request_id: str
    count: int = 1
    logged: int = 1


class FailureLog:
    """Logs the first failure of a code at once, the others in a line every ``SUMMARY_SECONDS``, and the end.

    To be used on one event loop.
    """

    def __init__(self) -> None:
        self._spells: dict[str, _Spell] = {}

    def note(self, error: BanquetError, request_id: str) -> None:
        """A request has failed with ``error``."""
        spell = self._spells.get(error.code)
        if spell is None:
            log.warning("%s: %s, request_id=%s", error.code, error, request_id)
            self._spells[error.code] = _Spell(error, request_id)
            self._look_later(error.code)
        else:
            spell.last, spell.request_id = error, request_id
            spell.count += 1

    def _look_later(self, code: str) -> None:
        asyncio.get_running_loop().call_later(SUMMARY_SECONDS, self._look, code)

    def _look(self, code: str) -> None:
        spell = self._spells[code]
        more = spell.count - spell.logged
        if more:
            log.warning(
                "%s: %d more in %g s, the last: %s, request_id=%s",
                code,
                more,
                SUMMARY_SECONDS,
                spell.last.message,
                spell.request_id,
            )
            spell.logged = spell.count
            self._look_later(code)
            return
        del self._spells[code]
        if spell.count > 1:
            log.info("%s: over, none for %g s; %d requests failed", code, SUMMARY_SECONDS, spell.count)
