"""The manifest of a model package (contract 3): frozen records and what must hold of them.

It knows what a package says about itself, and nothing of where packages lie, how a model is loaded or
what a feature store is. Reading is strict, because a manifest that is half understood is how a wrong model
comes to serve.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from core import records
from core.errors import InvalidManifest, InvalidRequest
from core.types import Dtype, Field

SCHEMA_VERSION = 1
MODEL_FILE = "model.joblib"
SKOPS_FILE = "model.skops"
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.sig"
DIGEST_FILE = "manifest.sha256"
BASELINE_FILE = "baseline.parquet"

Task = Literal["classification", "regression"]
Scalar = str | int | float | bool | None

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_model_name(name: str) -> bool:
    """Whether ``name`` can name a model, and a folder or file of its own."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_model_name(name: str) -> str:
    """``name`` itself when it can name a model; raises InvalidRequest otherwise."""
    if not is_model_name(name):
        raise InvalidRequest(
            f"{name!r} cannot name a model.",
            hint="Use up to 128 letters, digits, '_', '-' and '.', beginning with a letter or digit.",
        )
    return name


@dataclass(frozen=True, slots=True)
class Default:
    """Missing-value policy: put this value in the place of a missing one."""

    default: str | int | float | bool


Policy = Literal["pass", "reject"] | Default


@dataclass(frozen=True, slots=True)
class ServedFeature:
    """A feature as a feature service serves it; ``ttl_seconds`` is its view's, 0 for "never expires"."""

    name: str
    dtype: Dtype
    ttl_seconds: float


@dataclass(frozen=True, slots=True)
class ServiceSchema:
    """What a feature service serves, in order: what a model is trained on and checked against."""

    service: str
    features: tuple[ServedFeature, ...]
    join_keys: tuple[Field, ...]
    request_inputs: tuple[Field, ...] = ()

    def differences(self, serves: ServiceSchema) -> list[str]:
        """What a model trained on this schema would find changed where ``serves`` is served, sorted."""
        was = {feature.name: feature for feature in self.features}
        now = {feature.name: feature for feature in serves.features}
        renamed = self._renamed(serves)
        problems = [f"{old} is gone, probably renamed to {new}" for old, new in renamed.items()]
        problems += [f"{gone} is gone" for gone in was if gone not in now and gone not in renamed]
        problems += [f"{new} is new" for new in now if new not in was and new not in renamed.values()]
        for feature in was.keys() & now.keys():
            if was[feature].dtype is not now[feature].dtype:
                problems.append(f"{feature} was {was[feature].dtype.name} and is {now[feature].dtype.name}")
            if was[feature].ttl_seconds != now[feature].ttl_seconds:
                before, after = was[feature].ttl_seconds, now[feature].ttl_seconds
                problems.append(f"the ttl of {feature} was {before:g} s and is {after:g} s")
        if not problems and list(was) != list(now):
            problems.append("the order of the features changed")
        if self.service != serves.service:
            problems.append(f"the feature service is {serves.service}")
        if self.join_keys != serves.join_keys:
            problems.append(
                f"the join keys were {_listed(self.join_keys)} and are {_listed(serves.join_keys)}"
            )
        if self.request_inputs != serves.request_inputs:
            inputs, others = _listed(self.request_inputs), _listed(serves.request_inputs)
            problems.append(f"the request-time inputs were {inputs} and are {others}")
        return sorted(problems)

    def _renamed(self, serves: ServiceSchema) -> dict[str, str]:
        """Features that are gone, and new ones of the same type and ttl that probably are the same.

        Those of the same name in another view first, then those in the same place, then the only one.
        """
        was, now = ({f.name for f in schema.features} for schema in (self, serves))
        gone = [(place, f) for place, f in enumerate(self.features) if f.name not in now]
        new = [(place, f) for place, f in enumerate(serves.features) if f.name not in was]
        pairs: list[tuple[int, str, str]] = []
        for place, old in gone:
            for other_place, other in new:
                if (old.dtype, old.ttl_seconds) != (other.dtype, other.ttl_seconds):
                    continue
                if old.name.rpartition("__")[2] == other.name.rpartition("__")[2]:
                    pairs.append((0, old.name, other.name))
                elif place == other_place:
                    pairs.append((1, old.name, other.name))
                elif len(gone) == len(new) == 1:
                    pairs.append((2, old.name, other.name))
        found: dict[str, str] = {}
        for _, name, other_name in sorted(pairs):
            if name not in found and other_name not in found.values():
                found[name] = other_name
        return found


@dataclass(frozen=True, slots=True)
class TrainingWindow:
    """Event times (UTC) of the entity rows, and what became of them. ``split`` begins the held-out part.

    Embargoed rows had labels that were not known before the next part began; rejected ones lacked a feature
    whose policy is ``reject``.
    """

    start: datetime
    split: datetime
    end: datetime
    training_rows: int
    calibration_rows: int
    holdout_rows: int
    embargoed_rows: int
    rejected_rows: int


@dataclass(frozen=True, slots=True)
class GoldenRow:
    """Raw feature values (timestamps as epoch seconds) and what the model said about them.

    ``probabilities`` are in the order of the manifest's classes; None where the model has none.
    """

    features: Mapping[str, Scalar]
    prediction: Scalar
    probabilities: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class CompiledForm:
    """The form that serves, and how close it came to scikit-learn on ``rows_checked`` baseline rows.

    For regressors ``max_difference`` is relative, for classifiers a difference of probabilities.
    ``reason`` says why a faster form was not taken, or is empty.
    """

    form: Literal["onnx", "sklearn"]
    artifact: str
    max_difference: float
    classes_equal: bool
    rows_checked: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelManifest:
    """Everything needed to know that a model predicts here what it predicted when it was trained."""

    schema_version: int = SCHEMA_VERSION
    name: str
    version: int
    created: datetime
    description: str = ""
    task: Task
    schema: ServiceSchema
    label: str
    classes: tuple[str | int | float | bool, ...] = ()
    threshold: float | None = None
    policies: Mapping[str, Policy] = field(default_factory=dict)
    vocabulary: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    window: TrainingWindow
    dataset_digest: str
    libraries: Mapping[str, str]
    golden: tuple[GoldenRow, ...]
    compiled: CompiledForm
    artifacts: Mapping[str, str]

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise InvalidManifest(f"The manifest of model {self.name!r} is not valid: {message}.")

        require(
            self.schema_version == SCHEMA_VERSION,
            f"schema_version is {self.schema_version}, this release reads {SCHEMA_VERSION}",
        )
        require(_NAME.fullmatch(self.name) is not None, "name is not a model name")
        require(self.version >= 1, "version is not a positive integer")
        names = self.feature_names
        require(len(names) > 0 and len(set(names)) == len(names), "features are empty or repeated")
        require(set(self.policies) <= set(names), "policies name unknown features")
        strings = {f.name for f in self.schema.features if f.dtype is Dtype.STRING}
        require(set(self.vocabulary) == strings, "vocabulary does not cover exactly the string features")
        if self.task == "classification":
            require(len(self.classes) >= 2, "a classifier needs two or more classes")
            require(len(set(self.classes)) == len(self.classes), "classes repeat")
        else:
            require(not self.classes, "a regressor has no classes")
        require(self.threshold is None or len(self.classes) == 2, "threshold is for two classes")
        require(all(set(row.features) == set(names) for row in self.golden), "golden rows lack features")
        require(
            all(r.probabilities is None or len(r.probabilities) == len(self.classes) for r in self.golden),
            "golden rows have other classes",
        )
        for artifact, digest in self.artifacts.items():
            require(_NAME.fullmatch(artifact) is not None, f"{artifact!r} is not a file name")
            own = (MANIFEST_FILE, SIGNATURE_FILE, DIGEST_FILE)
            require(artifact not in own, "the manifest cannot hold a digest of itself or of its signature")
            require(_SHA256.fullmatch(digest) is not None, f"the digest of {artifact!r} is not a sha256")
        estimators = {MODEL_FILE, SKOPS_FILE} & set(self.artifacts)
        require(len(estimators) == 1, f"no digest of {MODEL_FILE}, or of {SKOPS_FILE}, or digests of both")
        if self.compiled.form == "sklearn":
            require(self.compiled.artifact in estimators, "the compiled form is not the estimator")
        require(self.compiled.artifact in self.artifacts, "no digest of the compiled form")

    @property
    def estimator_file(self) -> str:
        """The artifact that holds the fitted estimator."""
        return SKOPS_FILE if SKOPS_FILE in self.artifacts else MODEL_FILE

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The columns of the matrix, in order."""
        return tuple(feature.name for feature in self.schema.features)

    def to_json(self) -> str:
        """The text of ``manifest.json``."""
        return records.to_json(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelManifest:
        """The manifest that ``text`` is; raises InvalidManifest with the place that is wrong."""
        try:
            return records.from_json(cls, text, "manifest")
        except records.NotJSON as exc:
            raise InvalidManifest(f"{MANIFEST_FILE} is not JSON: {exc}.") from exc
        except records.NotRecord as exc:
            raise InvalidManifest(f"{exc}.") from exc


def _listed(fields: tuple[Field, ...]) -> str:
    return ", ".join(f"{f.name} ({f.dtype.name})" for f in fields) or "none"


def finite_or_none(tree: Any) -> Any:
    """A JSON tree with every NaN and infinity replaced by None (JSON has neither)."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {key: finite_or_none(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite_or_none(value) for value in tree]
    return tree
