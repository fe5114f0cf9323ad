"""Request bodies: JSON parsed fast, refused where JSON parsers silently disagree.

A key given twice is an error, not "the last one wins"; NaN and Infinity are not JSON.
"""

from __future__ import annotations

import json
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
    if _may_repeat_a_key(body, parsed):
        _refuse_repeated_keys(body)
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
    """Cheap and never wrong about a repeat: it may only suspect one that is not there."""
    if b"\\u" in body:
        return True
    if any(body.count(b'"%s"' % key.encode()) > 1 for key in parsed):
        return True
    entities = parsed.get("entities")
    if isinstance(entities, dict):
        return any(body.count(b'"%s"' % key.encode()) > 1 for key in entities)
    if isinstance(entities, list) and entities and isinstance(entities[0], dict):
        return any(body.count(b'"%s"' % key.encode()) > len(entities) for key in entities[0])
    return entities is None


def _refuse_repeated_keys(body: bytes) -> None:
    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise MalformedBody(f"The request body names the key `{repeated}` twice.", field=repeated)
        return found

    try:
        json.loads(body, object_pairs_hook=check)
    except RecursionError:
        raise MalformedBody("The request body is nested too deeply.") from None
