"""The OpenAPI descriptions of the hot routes, whose bodies FastAPI does not parse itself.

Every example here is sent to a running server by a test.
"""

from __future__ import annotations

from typing import Any

PROBLEM: dict[str, Any] = {
    "description": "What was wrong, with the field and the way out (RFC 9457).",
    "content": {
        "application/problem+json": {
            "schema": {
                "type": "object",
                "required": ["type", "title", "status", "detail", "code", "request_id", "error"],
                "properties": {
                    "type": {"type": "string"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                    "code": {"type": "string"},
                    "hint": {"type": "string"},
                    "field": {"type": "string"},
                    "row": {"type": "integer"},
                    "request_id": {"type": "string"},
                    "error": {"type": "string"},
                },
            },
            "example": {
                "type": "about:blank",
                "title": "Unprocessable Entity",
                "status": 422,
                "detail": '`user_id` in row 0 is a string, "12"; it must be a 64-bit integer (Int64).',
                "code": "invalid_entity",
                "request_id": "01KAT2Z1M8K3V5W6QZ0A1B2C3D",
                "error": '`user_id` in row 0 is a string, "12"; it must be a 64-bit integer (Int64).',
                "hint": "Send it as a bare JSON integer, such as 12.",
                "field": "user_id",
                "row": 0,
                "expected": "INT64",
            },
        }
    },
}
_UNAVAILABLE = {**PROBLEM, "description": "Redis or the model is away; try again after Retry-After seconds."}
DENIED = {"401": {**PROBLEM, "description": "Keys are configured, and the request carries none of them."}}
REFUSED = {
    **DENIED,
    "400": {**PROBLEM, "description": "The body is no JSON object, or names a key twice."},
    "413": {**PROBLEM, "description": "The body is larger than the limit."},
    "415": {**PROBLEM, "description": "The body is not sent as JSON, or compressed."},
}

_ENTITIES = {
    "oneOf": [
        {"type": "array", "items": {"type": "object"}, "minItems": 1, "description": "Rows."},
        {
            "type": "object",
            "additionalProperties": {"type": "array"},
            "description": "Columns of equal length.",
        },
    ]
}

_PREDICTIONS = {
    "description": "One entry per entity, in the order of the request.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "model_name": {"type": "string"},
                    "model_version": {"type": "integer"},
                    "variant": {
                        "type": "string",
                        "description": "The alias of the version that answered; challenger for a canary.",
                    },
                    "request_id": {"type": "string"},
                    "predictions": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {
                                "entity": {"type": "object"},
                                "prediction": {},
                                "confidence": {
                                    "type": ["number", "null"],
                                    "description": "Probability of the predicted class; null without one.",
                                },
                                "missing": {
                                    "type": "object",
                                    "additionalProperties": {
                                        "enum": ["NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE"]
                                    },
                                },
                                "features": {"type": "object", "description": "With `explain` only."},
                                "error": {"type": "object", "description": "In place of a prediction."},
                                "model_version": {
                                    "type": "integer",
                                    "description": "Where it is not the one above: a canary answered.",
                                },
                                "variant": {"type": "string", "description": "As model_version."},
                            },
                        },
                    },
                },
            }
        }
    },
}

_PREDICT_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["entities"],
                "additionalProperties": False,
                "properties": {
                    "entities": _ENTITIES,
                    "explain": {"type": "boolean", "default": False},
                },
            },
            "examples": {
                "rows": {
                    "summary": "Rows",
                    "value": {"entities": [{"user_id": 1}, {"user_id": 99999999}]},
                },
                "columns": {"summary": "Columns", "value": {"entities": {"user_id": [1, 99999999]}}},
                "explained": {
                    "summary": "With the feature values used",
                    "value": {"entities": [{"user_id": 1}], "explain": True},
                },
            },
        }
    },
}

_RESPONSES = {**REFUSED, "200": _PREDICTIONS, "404": PROBLEM, "422": PROBLEM, "503": _UNAVAILABLE}

PREDICT: dict[str, Any] = {
    "operationId": "predict",
    "summary": "Predict by entity ID",
    "description": "Fetches the features of each entity and predicts with the default model's champion.",
    "tags": ["predictions"],
    "requestBody": _PREDICT_BODY,
    "responses": _RESPONSES,
}


def with_path(docs: dict[str, Any], *names: str) -> dict[str, Any]:
    """``docs`` of a route with these path parameters."""
    parameters = [{"name": n, "in": "path", "required": True, "schema": {"type": "string"}} for n in names]
    return {**docs, "parameters": parameters}


PREDICT_WITH: dict[str, Any] = with_path(
    {
        **PREDICT,
        "operationId": "predict_with",
        "summary": "Predict by entity ID with a named model",
        "description": "`name` is a model, whose champion answers and whoever is on trial, or `name@alias`.",
    },
    "name",
)

PREDICT_WITH_VERSION: dict[str, Any] = with_path(
    {
        **PREDICT,
        "operationId": "predict_with_version",
        "summary": "Predict by entity ID with one version of a model",
        "description": "Any version that an alias points to; no rollout has a say.",
    },
    "name",
    "version",
)

FEEDBACK: dict[str, Any] = {
    "operationId": "feedback",
    "summary": "Tell what really happened",
    "description": "Labels of the rows of a request, in their order; null where one is not known. They count "
    "for the rollout under way, each row once; a prediction can be labelled a second after it was given.",
    "tags": ["predictions"],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["request_id", "labels"],
                    "additionalProperties": False,
                    "properties": {
                        "request_id": {"type": "string"},
                        "labels": {"type": "array", "items": {}, "minItems": 1},
                    },
                },
                "examples": {
                    "labels": {
                        "summary": "Of a request with three rows",
                        "value": {"request_id": "01KAT2Z1M8K3V5W6QZ0A1B2C3D", "labels": [1, 0, None]},
                    }
                },
            }
        },
    },
    "responses": {
        **REFUSED,
        "200": {"description": "How many labels there were, and how many counted."},
        "422": PROBLEM,
        "503": _UNAVAILABLE,
    },
}

ONLINE_FEATURES: dict[str, Any] = {
    "operationId": "get_online_features",
    "summary": "Read online features",
    "description": "Feast's own feature-server API; statuses say what is missing or expired.",
    "tags": ["features"],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["entities"],
                    "properties": {
                        "feature_service": {"type": "string"},
                        "features": {"type": "array", "items": {"type": "string"}},
                        "entities": {"type": "object", "additionalProperties": {"type": "array"}},
                        "full_feature_names": {"type": "boolean", "default": False},
                    },
                },
                "examples": {
                    "references": {
                        "summary": "By feature references",
                        "value": {
                            "features": ["user_behavior:purchase_amount_30d", "user_demographics:age"],
                            "entities": {"user_id": [1, 99999999]},
                        },
                    }
                },
            }
        },
    },
    "responses": {
        **REFUSED,
        "200": {"description": "One result per name in metadata.feature_names."},
        "404": PROBLEM,
        "422": PROBLEM,
        "503": _UNAVAILABLE,
    },
}

_FRAME = {
    "type": "object",
    "additionalProperties": {"type": "array"},
    "description": "Columns of equal length: join keys, features, event and created timestamps. "
    "A timestamp without a time zone is UTC.",
}
_WRITTEN = {**REFUSED, "404": PROBLEM, "422": PROBLEM, "503": _UNAVAILABLE}

PUSH: dict[str, Any] = {
    "operationId": "push",
    "summary": "Push feature rows",
    "description": "Feast's own feature-server API. Every row is checked before any is written; a row that "
    "is older than the stored one is not written.",
    "tags": ["features"],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["push_source_name", "df"],
                    "additionalProperties": False,
                    "properties": {
                        "push_source_name": {"type": "string"},
                        "df": _FRAME,
                        "to": {"enum": ["online", "offline", "online_and_offline"], "default": "online"},
                        "allow_registry_cache": {"type": "boolean", "default": True},
                        "transform_on_write": {"type": "boolean", "default": True},
                    },
                },
                "examples": {
                    "online": {
                        "summary": "To the online store",
                        "value": {
                            "push_source_name": "user_activity_push",
                            "df": {
                                "user_id": [1],
                                "basket_amount": [42.5],
                                "basket_products": [12],
                                "basket_coupon_used": [False],
                                "baskets_total": [57],
                                "days_between_baskets": [6.2],
                                "first_basket_at": [1735732800],
                                "last_basket_at": [1769860800],
                                "activity_score": [1.9],
                                "event_timestamp": ["2026-01-31T12:00:00Z"],
                                "created": ["2026-01-31T12:00:05Z"],
                            },
                        },
                    }
                },
            }
        },
    },
    "responses": {"200": {"description": "Every row can be read; the body is empty."}, **_WRITTEN},
}

WRITE_ONLINE: dict[str, Any] = {
    "operationId": "write_to_online_store",
    "summary": "Write rows of one view online",
    "description": "What Feast's remote online store calls for `push` and `write_to_online_store`.",
    "tags": ["features"],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["feature_view_name", "df"],
                    "additionalProperties": False,
                    "properties": {
                        "feature_view_name": {"type": "string"},
                        "df": _FRAME,
                        "allow_registry_cache": {"type": "boolean", "default": True},
                        "transform_on_write": {"type": "boolean", "default": True},
                    },
                }
            }
        },
    },
    "responses": {"200": {"description": "Every row can be read; the body is `null`."}, **_WRITTEN},
}

_NOT_READY = {**PROBLEM, "description": "Not ready; `error` says why."}


def _v2(operation: str, summary: str, description: str, **responses: Any) -> dict[str, Any]:
    return {
        "operationId": f"v2_{operation}",
        "summary": summary,
        "tags": ["open inference protocol"],
        "responses": {**DENIED, "200": {"description": description}, **responses},
    }


V2_SERVER = _v2("server", "Server metadata", "Name, version and extensions.")
V2_LIVE = _v2("live", "Whether the server answers", "It does.")
V2_READY = _v2("ready", "Whether the server can infer", "It can.", **{"400": _NOT_READY})
V2_MODEL_READY = _v2(
    "model_ready", "Whether a model can infer", "It can.", **{"400": _NOT_READY, "404": PROBLEM}
)
V2_MODEL = _v2(
    "model",
    "Model metadata",
    "Versions, platform, input and output tensors.",
    **{"404": PROBLEM, "503": _UNAVAILABLE},
)

_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype", "data"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}, "description": "[n] or [n, 1]."},
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {"type": "array"},
    },
}

V2_INFER: dict[str, Any] = {
    **_v2(
        "infer",
        "Infer by entity ID",
        "One tensor per output: `prediction`, `confidence`, `missing`, `error`.",
        **REFUSED,
        **{"404": PROBLEM, "422": PROBLEM, "503": _UNAVAILABLE},
    ),
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "additionalProperties": False,
                    "properties": {
                        "id": {"type": "string"},
                        "parameters": {"type": "object"},
                        "inputs": {"type": "array", "items": _TENSOR, "minItems": 1},
                        "outputs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name"],
                                "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}},
                            },
                        },
                    },
                },
                "examples": {
                    "two": {
                        "summary": "Two entities",
                        "value": {
                            "id": "request-1",
                            "inputs": [
                                {
                                    "name": "user_id",
                                    "shape": [2, 1],
                                    "datatype": "INT64",
                                    "data": [1, 99999999],
                                }
                            ],
                            "outputs": [{"name": "prediction"}, {"name": "confidence"}],
                        },
                    }
                },
            }
        },
    },
}
