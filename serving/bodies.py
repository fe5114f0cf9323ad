"""Request bodies: JSON parsed fast, refused where JSON parsers silently disagree.

A key given twice is an error, not "the last one wins"; NaN and Infinity are not JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import orjson

from core.errors import InvalidRequest
from serving.problems import MalformedBody


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in ``body``.

    Raises:
        MalformedBody: it is not JSON, not an object, nested too deeply, or names a key twice.
    """
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        if not body:
            raise MalformedBody("The request body is empty.", hint="Send a JSON object.") from None
        raise MalformedBody(f"The request body is not valid JSON: {exc}.") from None
    if not isinstance(parsed, dict):
        raise MalformedBody("The request body must be a JSON object.")
    try:
        if _may_repeat_a_key(body, parsed):
            _refuse_repeated_keys(body)
    except RecursionError:
        raise MalformedBody("The request body is nested too deeply.") from None
    return parsed


def check_fields(body: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise InvalidRequest for a field that the route does not know."""
    for name in body:
        if name not in known:
            raise InvalidRequest(
                f"Unknown field `{name}` in the request body.",
                hint=f"Known fields: {', '.join(known)}.",
                field=name,
            )


def flag(body: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """The boolean field ``name``, ``default`` where it is absent."""
    value = body.get(name, default)
    if type(value) is not bool:
        raise InvalidRequest(f"`{name}` must be true or false.", field=name)
    return value


def _may_repeat_a_key(body: bytes, parsed: dict[str, Any]) -> bool:
    """Cheap and never wrong about a repeat: it may only suspect one that is not there.

    Only a key is followed by a colon, so the text has as many of these pairs as the parsed body has keys,
    and more where a key is repeated or where a text looks like a pair.
    """
    entities = parsed.get("entities")
    objects = body.count(b"{")
    if type(entities) is dict and objects == 2:
        keys = len(parsed) + len(entities)
    elif type(entities) is list and objects == 1 + len(entities) and set(map(type, entities)) == {dict}:
        keys = len(parsed) + sum(map(len, entities))
    else:
        keys = _count_keys(parsed)
    return body.count(b":") > keys and len(_KEY_END.findall(body)) > keys


_KEY_END = re.compile(rb'"[ \t\n\r]*:')
_NESTED = {dict, list}


def _count_keys(value: Any) -> int:
    count, entries = 0, value
    if type(value) is dict:
        count, entries = len(value), list(value.values())
    if not _NESTED.isdisjoint(map(type, entries)):
        for entry in entries:
            if type(entry) in _NESTED:
                count += _count_keys(entry)
    return count


def _refuse_repeated_keys(body: bytes) -> None:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise MalformedBody(f"The request body names the key `{repeated}` twice.", field=repeated)
        return found

    json.loads(body, object_pairs_hook=check)
