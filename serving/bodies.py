"""Request bodies: JSON parsed fast, refused where JSON parsers silently disagree.

A key given twice is an error, not "the last one wins"; NaN and Infinity are not JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from core.errors import InvalidRequest
from core.json_text import repeated_key
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
        repeated = repeated_key(body, parsed)
    except RecursionError:
        raise MalformedBody("The request body is nested too deeply.") from None
    if repeated is not None:
        raise MalformedBody(f"The request body names the key `{repeated}` twice.", field=repeated)
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
