"""Errors as HTTP answers: RFC 9457 problem+json with a stable code and the way out.

The one place that maps error classes to status codes. What it lets out is what an error was written to
say; an exception nobody planned for becomes a bare 500, and its text stays in the server's log.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

import orjson

from core import errors
from serving.failures import FailureLog

log = logging.getLogger("banquet.serving")

CONTENT_TYPE = b"application/problem+json"


class MalformedBody(errors.InvalidRequest):
    """The request body is not valid JSON."""


class UnsupportedMediaType(errors.InvalidRequest):
    """The request body must be JSON."""


class BodyTooLarge(errors.TooLarge):
    """The request body is larger than the limit."""


class AccessDenied(errors.BanquetError):
    """The request carries no valid key."""


class AdminDisabled(errors.BanquetError):
    """The admin API is off: no admin key is configured."""


class RouteNotFound(errors.NotFound):
    """There is nothing at this address."""


class MethodNotAllowed(errors.InvalidRequest):
    """The address does not take this method."""


class NotReady(errors.Unavailable):
    """The server or the model is not ready for inference."""


STATUS: dict[type[errors.BanquetError], int] = {
    errors.InvalidRequest: 422,
    MalformedBody: 400,
    NotReady: 400,  # the inference protocol wants a 4xx
    UnsupportedMediaType: 415,
    BodyTooLarge: 413,
    MethodNotAllowed: 405,
    AccessDenied: 401,
    AdminDisabled: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.OnDemandFailed: 422,
    errors.InvalidFeatureValue: 422,
    errors.Unavailable: 503,
    errors.BanquetError: 500,
}


def status_of(error: errors.BanquetError) -> int:
    """The status code of the nearest class in the error's ancestry."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def problem(error: Exception, request_id: str, failures: FailureLog) -> tuple[int, bytes]:
    """The status code and problem+json body that tell a client of ``error``; ours is logged too."""
    if not isinstance(error, errors.BanquetError):
        log.error("unexpected error, request_id=%s", request_id, exc_info=error)
        error = errors.BanquetError("The server failed on this request.", hint="Its log has the request_id.")
    elif status_of(error) >= 500:
        failures.note(error, request_id)
    status = status_of(error)
    return status, orjson.dumps(
        {
            "type": "about:blank",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": error.message,
            "code": error.code,
            "request_id": request_id,
            "error": str(error),
            **row_error(error),
        },
        default=str,
    )


def row_error(error: errors.BanquetError) -> dict[str, Any]:
    """What an error says beside its message: the hint and the details it carries.

    Redis' own words stay in the log: they may quote what was sent.
    """
    said = {name: value for name, value in error.details.items() if value is not None and name != "reply"}
    return said if error.hint is None else {"hint": error.hint, **said}
