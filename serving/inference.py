"""Open Inference Protocol v2: join keys as named tensors in, predictions as named tensors out.

Protocol: https://github.com/open-inference/open-inference-protocol; where it leaves something open, this
module answers as MLServer does. docs/inference-protocol.md has the tensors and the differences.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from typing import Any

import orjson

from core.errors import BanquetError, InvalidRequest, ModelNotFound
from core.json_values import describe
from core.manifest import ModelManifest
from core.types import Dtype, FeatureStatus
from serving import bodies
from serving.batching import Columns
from serving.catalog import Catalog
from serving.deployment import Deployment, Pinned, Share, pick
from serving.predictions import version_number
from serving.predictor import Answer
from serving.problems import MalformedBody, NotReady, row_error

_FIELDS = ("id", "parameters", "inputs", "outputs")
_INPUT_FIELDS = ("name", "shape", "datatype", "parameters", "data")
_OUTPUT_FIELDS = ("name", "parameters")

_INTEGERS = ("INT64", "INT32", "INT16", "INT8", "UINT64", "UINT32", "UINT16", "UINT8")
_FLOATS = ("FP64", "FP32", "FP16")
# The first one is what the metadata says.
_DATATYPES: Mapping[Dtype, tuple[str, ...]] = {
    Dtype.INT64: _INTEGERS,
    Dtype.INT32: ("INT32", *_INTEGERS),
    Dtype.DOUBLE: (*_FLOATS, *_INTEGERS),
    Dtype.FLOAT: ("FP32", *_FLOATS, *_INTEGERS),
    Dtype.BOOL: ("BOOL",),
    Dtype.UNIX_TIMESTAMP: (*_INTEGERS, "BYTES"),
}
_BYTES = ("BYTES",)
_PLATFORMS = {"onnx": "onnxruntime_onnx", "sklearn": "sklearn_joblib"}

Output = Callable[[Answer], list[Any]]


class ServerMetadata:
    """``GET /v2``."""

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        return orjson.dumps({"name": "banquet", "version": version("feast-banquet"), "extensions": []})


class ServerLive:
    """``GET /v2/health/live``."""

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        return b'{"live":true}'


class ServerReady:
    """``GET /v2/health/ready``: 200, or a 4xx that says what is missing, as the protocol wants it."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        try:
            await self._catalog.check_ready()
        except BanquetError as exc:
            raise NotReady(exc.message, hint=exc.hint) from exc
        return b'{"ready":true}'


class ModelReady:
    """``GET /v2/models/{name}[/versions/{version}]/ready``: 200, or a 4xx that says why not."""

    def __init__(self, catalog: Catalog, name: str, version: str | None = None) -> None:
        self._catalog = catalog
        self._name = name
        self._version = version

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        try:
            served = _target(self._catalog, self._name, self._version).served
        except ModelNotFound:
            raise
        except BanquetError as exc:
            raise NotReady(exc.message, hint=exc.hint) from exc
        return orjson.dumps({"name": served.name, "ready": True})


class ModelMetadata:
    """``GET /v2/models/{name}[/versions/{version}]``."""

    def __init__(self, catalog: Catalog, name: str, version: str | None = None) -> None:
        self._catalog = catalog
        self._name = name
        self._version = version

    async def __call__(self, body: bytes, request_id: str) -> bytes:  # noqa: ARG002 — the signature of endpoints
        target = _target(self._catalog, self._name, self._version)
        served = target.served
        manifest = served.model.manifest
        return orjson.dumps(
            {
                "name": served.name,
                "versions": [str(number) for number in target.numbers],
                "platform": _PLATFORMS[manifest.compiled.form],
                "inputs": [
                    {"name": name, "datatype": _accepted(dtype)[0], "shape": [-1, 1]}
                    for name, dtype in served.entities.dtypes.items()
                ],
                "outputs": [
                    {"name": name, "datatype": datatype, "shape": [-1, 1]}
                    for name, (datatype, _) in _outputs(manifest).items()
                ],
            }
        )


class Infer:
    """``POST /v2/models/{name}[/versions/{version}]/infer``."""

    def __init__(self, catalog: Catalog, name: str, version: str | None = None) -> None:
        self._catalog = catalog
        self._name = name
        self._version = version

    async def __call__(self, body: bytes, request_id: str) -> bytes:
        target = _target(self._catalog, self._name, self._version)
        served = target.served
        try:
            request = bodies.parse(body)
        except MalformedBody as exc:
            hint = "Tensors are sent as JSON; turn binary data off (tritonclient: `binary_data=False`)."
            raise MalformedBody(exc.message, hint=exc.hint or hint, **exc.details) from exc
        bodies.check_fields(request, _FIELDS)
        identity = request.get("id")
        if identity is None:
            identity = request_id
        if type(identity) is not str:
            raise InvalidRequest(f"`id` is {describe(identity)}; it must be a string.", field="id")
        _parameters(request, "the request")
        outputs = _asked(request.get("outputs"), _outputs(served.model.manifest))
        columns, rows = served.entities.columns(_columns(request.get("inputs"), served.entities.dtypes))

        def encode(answer: Answer, _: Columns) -> list[list[Any]]:
            return [column(answer) for _, column in outputs.values()]

        shares = target.shares(columns, rows)
        served = shares[0].served
        parameters: dict[str, Any] = {"variant": shares[0].variant}
        if shares[0].rows is None:
            data = _joined(await shares[0].predict(columns, rows, encode, identity))
        else:
            data = await _mixed(shares, columns, rows, encode, identity)
            parameters |= {f"{share.variant}_rows": share.rows for share in shares[1:]}
        return orjson.dumps(
            {
                "model_name": served.name,
                "model_version": str(served.version),
                "id": identity,
                "parameters": parameters,
                "outputs": [
                    {
                        "name": name,
                        "shape": [rows, 1],
                        "datatype": datatype,
                        "parameters": {"content_type": "str" if datatype == "BYTES" else "np"},
                        "data": values,
                    }
                    for (name, (datatype, _)), values in zip(outputs.items(), data, strict=True)
                ],
            }
        )


def _target(catalog: Catalog, name: str, version: str | None) -> Deployment | Pinned:
    return catalog.target(name, version_number(version, name))


def _joined(slices: Sequence[list[list[Any]]]) -> list[list[Any]]:
    """The columns of all slices of a request."""
    return [list(chain.from_iterable(parts)) for parts in zip(*slices, strict=True)]


async def _mixed(
    shares: Sequence[Share],
    columns: Columns,
    rows: int,
    encode: Callable[[Answer, Columns], list[list[Any]]],
    identity: str,
) -> list[list[Any]]:
    """The output columns of several versions' rows, in the order of the request."""

    async def one(share: Share) -> tuple[list[int], list[list[Any]]]:
        assert share.rows is not None
        found = await share.predict(pick(columns, share.rows), len(share.rows), encode, identity)
        return share.rows, _joined(found)

    parts = await asyncio.gather(*map(one, shares))
    data: list[list[Any]] = [[None] * rows for _ in parts[0][1]]
    for places, found in parts:
        for column, values in zip(data, found, strict=True):
            for place, value in zip(places, values, strict=True):
                column[place] = value
    return data


# Inputs


def _columns(inputs: Any, dtypes: Mapping[str, Dtype]) -> dict[str, list[Any]]:
    """The entity columns that the input tensors hold."""
    columns: dict[str, list[Any]] = {}
    for tensor in _objects(inputs, "inputs", _INPUT_FIELDS):
        name = tensor["name"]
        if name in columns:
            raise InvalidRequest(f"Input `{name}` is given twice.", field=name)
        # A name that is no entity's is refused with all the others' complaints, by the entity schema.
        columns[name] = _values(tensor, name, dtypes.get(name))
    if not columns:
        raise InvalidRequest(
            "The request has no `inputs`.",
            hint=f"Send one tensor for each of {', '.join(dtypes)}.",
            field="inputs",
        )
    return columns


def _values(tensor: Mapping[str, Any], name: str, dtype: Dtype | None) -> list[Any]:
    datatype, data = tensor.get("datatype"), tensor.get("data")
    if dtype is not None and datatype not in _accepted(dtype):
        shown = datatype if isinstance(datatype, str) else describe(datatype)
        raise InvalidRequest(
            f"Input `{name}` has datatype {shown}; it must be {_accepted(dtype)[0]}.",
            hint=f"`{name}` is {dtype.name} in the feature definitions.",
            field=name,
            expected=_accepted(dtype)[0],
        )
    parameters = _parameters(tensor, f"input `{name}`")
    if data is None and "binary_data_size" in parameters:
        raise InvalidRequest(
            f"Input `{name}` is sent as binary data, which this server does not take.",
            hint="Send it in `data` (tritonclient: `binary_data=False`).",
            field=name,
        )
    if not isinstance(data, list):
        raise InvalidRequest(f"The data of input `{name}` is {describe(data)}, not a list.", field=name)
    values = _flat(data)
    rows = _rows(tensor.get("shape"), name)
    if rows != len(values):
        raise InvalidRequest(
            f"Input `{name}` has {len(values)} values, but its shape is {tensor['shape']}.",
            hint=f"Its shape must be [{len(values)}] or [{len(values)}, 1].",
            field=name,
        )
    if datatype == "BYTES":
        return [_text(value, name, row, dtype, parameters) for row, value in enumerate(values)]
    return values


def _rows(shape: Any, name: str) -> int:
    dimensions = shape if isinstance(shape, list) else []
    if not all(type(size) is int and size >= 0 for size in dimensions) or dimensions[1:] not in ([], [1]):
        dimensions = []
    if not dimensions:
        raise InvalidRequest(
            f"The shape of input `{name}` is neither [n] nor [n, 1].",
            hint="A tensor holds one value per entity.",
            field=name,
        )
    return math.prod(dimensions)


def _flat(data: list[Any]) -> list[Any]:
    """The values in row-major order; data may be nested as its shape is."""
    if any(type(value) is list for value in data):
        return [value for part in data for value in (part if type(part) is list else [part])]
    return data


def _text(value: Any, name: str, row: int, dtype: Dtype | None, parameters: Mapping[str, Any]) -> Any:
    """A BYTES element as the entity schema takes it: text, and base64 for values that are bytes."""
    if type(value) is not str:
        return value
    encoded = parameters.get("content_type") == "base64"
    if dtype is Dtype.BYTES:
        return value if encoded else base64.b64encode(value.encode()).decode()
    if not encoded:
        return value
    try:
        return base64.b64decode(value, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise InvalidRequest(
            f"`{name}` in row {row} is not the base64 of a text.",
            hint="Send plain text and leave the content type base64 out.",
            field=name,
            row=row,
        ) from None


def _accepted(dtype: Dtype) -> tuple[str, ...]:
    return _DATATYPES.get(dtype, _BYTES)


def _objects(value: Any, field: str, known: tuple[str, ...]) -> list[dict[str, Any]]:
    """A list of objects that each have a name and no unknown field."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(entry) is dict for entry in value):
        raise InvalidRequest(f"`{field}` must be a list of objects.", field=field)
    for entry in value:
        bodies.check_fields(entry, known)
        if type(entry.get("name")) is not str:
            raise InvalidRequest(f"An entry of `{field}` has no name.", field=field)
    return value


def _parameters(holder: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """The protocol's open set of parameters; those that mean nothing here are left alone."""
    found = holder.get("parameters")
    if found is None:
        return {}
    if type(found) is not dict:
        raise InvalidRequest(f"The `parameters` of {what} must be an object.", field="parameters")
    return found


# Outputs


def _asked(wanted: Any, known: Mapping[str, tuple[str, Output]]) -> Mapping[str, tuple[str, Output]]:
    """The outputs to answer with, in the order of the request."""
    named = _objects(wanted, "outputs", _OUTPUT_FIELDS)
    if not named:
        return known
    asked = {}
    for output in named:
        name = output["name"]
        _parameters(output, f"output `{name}`")
        if name not in known:
            raise InvalidRequest(
                f"There is no output `{name}`.", hint=f"Outputs: {', '.join(known)}.", field="outputs"
            )
        asked[name] = known[name]
    return asked


def _outputs(manifest: ModelManifest) -> dict[str, tuple[str, Output]]:
    """Each output's datatype and how its values come from an answer, in the order of the answer."""
    outputs: dict[str, tuple[str, Output]] = {"prediction": (_label_datatype(manifest), _prediction)}
    if manifest.classes:
        outputs["confidence"] = ("FP64", _confidence)
    return {**outputs, "missing": ("BYTES", _missing), "error": ("BYTES", _error)}


def _label_datatype(manifest: ModelManifest) -> str:
    kinds = {type(label) for label in manifest.classes}
    if not kinds or kinds == {float}:
        return "FP64"
    return {int: "INT64", bool: "BOOL"}.get(kinds.pop(), "BYTES") if len(kinds) == 1 else "BYTES"


def _prediction(answer: Answer) -> list[Any]:
    return _without_errors(answer.predictions, answer)


def _confidence(answer: Answer) -> list[Any]:
    return _without_errors(answer.confidences, answer)


def _without_errors(values: Sequence[Any], answer: Answer) -> list[Any]:
    if not answer.errors:
        return list(values)
    return [None if row in answer.errors else value for row, value in enumerate(values)]


def _missing(answer: Answer) -> list[str]:
    """Per row a JSON object of the features that are not PRESENT and their statuses."""
    present, missing = FeatureStatus.PRESENT, answer.missing
    if not missing:
        return ["{}"] * answer.rows
    return [
        orjson.dumps({name: s[row].name for name, s in missing if s[row] is not present}).decode()
        for row in range(answer.rows)
    ]


def _error(answer: Answer) -> list[str]:
    """Per row a JSON object that says why it has no prediction, empty where it has one."""
    texts = [""] * answer.rows
    for row, error in answer.errors.items():
        said = {"code": error.code, "detail": error.message, **row_error(error)}
        texts[row] = orjson.dumps(said, default=str).decode()
    return texts
