"""``POST /feedback``: what really happened, by the id of the request that predicted it.

Labels count for the rollout under way: they are what the judge compares the quality of both versions by.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from core.errors import InvalidRequest, TooLarge
from serving import bodies
from serving.catalog import Catalog

_FIELDS = ("request_id", "labels")


class FeedbackEndpoint:
    """Takes one label per row of a request, null for those that are not known."""

    def __init__(self, catalog: Catalog, max_entities: int) -> None:
        self._catalog = catalog
        self._max_entities = max_entities

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the labels' is another
        given = bodies.parse(body)
        bodies.check_fields(given, _FIELDS)
        about = given.get("request_id")
        if type(about) is not str or not about:
            raise InvalidRequest(
                "`request_id` must be the id of a prediction, a string.",
                hint="It is in the answer of POST /predict, and in its header x-request-id.",
                field="request_id",
            )
        labels = self._labels(given.get("labels"))
        counted = 0
        for deployment in list(self._catalog.deployments.values()):
            if deployment.trial is not None and labels:
                counted += await asyncio.to_thread(deployment.trial.recorder.label, about, labels)
        return orjson.dumps({"request_id": about, "labels": len(labels), "counted": counted})

    def _labels(self, given: Any) -> dict[int, Any]:
        """The labels that are known, by row."""
        if not isinstance(given, list) or not given:
            raise InvalidRequest(
                "`labels` must be a list with one label per row of the request.",
                hint='Such as {"request_id": "01J...", "labels": [1, 0, null]}.',
                field="labels",
            )
        if len(given) > self._max_entities:
            raise TooLarge(
                f"`labels` has {len(given)} entries; the limit is {self._max_entities}.",
                field="labels",
                limit=self._max_entities,
            )
        for row, label in enumerate(given):
            if isinstance(label, list | dict):
                raise InvalidRequest(f"The label of row {row} is not a value.", field="labels", row=row)
        return {row: label for row, label in enumerate(given) if label is not None}
