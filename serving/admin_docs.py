"""The OpenAPI descriptions of the admin API. Every example here is sent to a running server by a test."""

from __future__ import annotations

from typing import Any

from serving.api_docs import DENIED, PROBLEM, REFUSED, with_path

_SIGNED: dict[str, Any] = {
    "why": {"type": "string", "description": "Kept in the history."},
    "who": {"type": "string", "description": "Kept in the history."},
}


def _admin(
    operation: str,
    summary: str,
    *path: str,
    properties: dict[str, Any] | None = None,
    example: dict[str, Any] | None = None,
    description: str = "Answers with the entry of the model's history.",
) -> dict[str, Any]:
    """A route of the admin API; with ``properties`` it has a body."""
    docs: dict[str, Any] = {
        "operationId": f"admin_{operation}",
        "summary": summary,
        "description": description,
        "tags": ["admin"],
        "responses": {
            "200": {"description": "Done."},
            **DENIED,
            "403": {**PROBLEM, "description": "The admin API is off: no admin key is configured."},
            "404": PROBLEM,
            "409": PROBLEM,
            "422": PROBLEM,
        },
    }
    if properties is not None:
        docs["responses"] |= REFUSED
        schema = {"type": "object", "additionalProperties": False, "properties": properties}
        docs["requestBody"] = {"content": {"application/json": {"schema": schema, "example": example or {}}}}
    return with_path(docs, *path)


MODELS = _admin("models", "Aliases, versions and rollouts", description="As this worker has them.")
PROMOTE = _admin(
    "promote",
    "Make a version champion",
    "name",
    properties={"version": {"type": "integer", "description": "Default: the challenger."}, **_SIGNED},
    example={"version": 2, "why": "better on the last month"},
)
ROLLBACK = _admin(
    "rollback",
    "Bring the previous champion back",
    "name",
    properties=_SIGNED,
    example={"why": "complaints since noon"},
)
ROLLOUT = _admin(
    "rollout",
    "The rollout under way",
    "name",
    description="What was seen of both versions, and what the judge says.",
)
START = _admin(
    "start_rollout",
    "Put a version on trial",
    "name",
    properties={
        "kind": {"enum": ["canary", "shadow"], "default": "canary"},
        "version": {"type": "integer", "description": "Default: the challenger."},
        "steps": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["percent"],
                "properties": {
                    "percent": {"type": "number"},
                    "min_seconds": {"type": "number", "default": 300},
                    "min_rows": {"type": "integer", "default": 1000},
                },
            },
        },
        "automatic": {"type": "boolean", "default": True},
        "limits": {"type": "object", "description": "The judge's, where they are not its defaults."},
        **_SIGNED,
    },
    example={"kind": "canary", "version": 2, "steps": [{"percent": 5}, {"percent": 100}]},
)
ADVANCE = _admin(
    "advance_rollout", "Take the next step", "name", properties=_SIGNED, example={"why": "seen enough"}
)
ABORT = _admin(
    "abort_rollout", "Give all traffic to the champion", "name", properties=_SIGNED, example={"why": "slow"}
)
RELOAD = _admin(
    "reload",
    "Look for changes now",
    properties={},
    description="Definitions and models, in the worker that answers; the others look within a second.",
)
