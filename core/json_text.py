"""What JSON parsers silently disagree about: an object that names a key twice.

For whatever text comes from outside: request bodies and events. Knows neither.
"""

from __future__ import annotations

import json
import re
from typing import Any


def repeated_key(text: bytes, parsed: Any) -> str | None:
    """A key that an object in ``text`` names twice, at any depth, or None.

    ``parsed`` is what a parser made of the text. Costs next to nothing unless a key may be repeated.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if not _may_repeat_a_key(text, parsed):
        return None

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            raise _Repeated(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
        return found

    try:
        json.loads(text, object_pairs_hook=check)
    except _Repeated as found:
        return str(found.args[0])
    return None


class _Repeated(Exception):
    """The argument is a key that was found twice."""


def _may_repeat_a_key(text: bytes, parsed: Any) -> bool:
    """Cheap and never wrong about a repeat: it may only suspect one that is not there.

    Only a key is followed by a colon, so the text has as many of these pairs as the parsed value has keys,
    and more where a key is repeated or where a text looks like a pair.
    """
    entities = parsed.get("entities") if type(parsed) is dict else None
    objects = text.count(b"{")
    if type(entities) is dict and objects == 2:
        keys = len(parsed) + len(entities)
    elif type(entities) is list and objects == 1 + len(entities) and set(map(type, entities)) == {dict}:
        keys = len(parsed) + sum(map(len, entities))
    else:
        keys = _count_keys(parsed)
    return text.count(b":") > keys and len(_KEY_END.findall(text)) > keys


_KEY_END = re.compile(rb'"[ \t\n\r]*:')
_NESTED = {dict, list}


def _count_keys(value: Any) -> int:
    count, entries = 0, value if type(value) is list else []
    if type(value) is dict:
        count, entries = len(value), list(value.values())
    if not _NESTED.isdisjoint(map(type, entries)):
        for entry in entries:
            if type(entry) in _NESTED:
                count += _count_keys(entry)
    return count
