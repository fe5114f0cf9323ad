"""What a model is, before it is trained: the object that ``banquet train --spec`` names.

A spec says which Feast feature service the model reads, which entity rows and labels it learns from,
how time is split, and how the estimator is built. It must not know how features are stored or served.
Importing this module imports neither pandas nor scikit-learn.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

from core.errors import BanquetError, InvalidModelSpec
from core.manifest import Default, Policy, Task, check_model_name

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Default", "MatrixColumns", "ModelSpec", "load_spec"]

Entities = Callable[[Path], "pd.DataFrame"] | str


@dataclass(frozen=True, slots=True)
class MatrixColumns:
    """The columns of the matrix that an estimator is fitted on, in order.

    ``names`` are feature names (``view__feature``). ``vocabulary`` holds, for each string feature, the
    categories seen in the training part; the matrix has a category's index there, NaN for any other.
    """

    names: tuple[str, ...]
    vocabulary: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def index(self, name: str) -> int:
        """The position of a feature in the matrix; raises InvalidModelSpec when the service has none."""
        try:
            return self.names.index(name)
        except ValueError:
            raise InvalidModelSpec(
                f"The feature service has no feature {name!r}.", hint=f"It has: {', '.join(self.names)}."
            ) from None

    @property
    def categorical(self) -> list[int]:
        """Positions of the string features."""
        return [i for i, name in enumerate(self.names) if name in self.vocabulary]

    @property
    def numeric(self) -> list[int]:
        """Positions of all other features."""
        return [i for i, name in enumerate(self.names) if name not in self.vocabulary]

    @property
    def category_codes(self) -> list[list[float]]:
        """Per categorical column its codes, as ``OneHotEncoder(categories=...)`` takes them."""
        return [
            [float(code) for code in range(len(self.vocabulary[self.names[i]]))] for i in self.categorical
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One model: what it reads, what it learns from, how it is built and judged.

    The estimator that ``build`` returns is fitted on a float64 matrix of shape (rows, features) and not on
    a DataFrame: the same few lines of code make that matrix from an offline row and from an online one, so
    what was trained is what serves, and no DataFrame is built while a request waits. Columns stand in the
    order of the feature service: numbers as they are, booleans 0 and 1, timestamps as epoch seconds,
    strings as their code in ``MatrixColumns.vocabulary``; anything missing is NaN. Address columns by
    position::

        def build(columns: MatrixColumns) -> Pipeline:
            numeric = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
            one_hot = make_pipeline(
                SimpleImputer(strategy="constant", fill_value=-1.0),
                OneHotEncoder(categories=[[-1.0, *codes] for codes in columns.category_codes]),
            )
            return make_pipeline(
                ColumnTransformer(
                    [("numeric", numeric, columns.numeric), ("categories", one_hot, columns.categorical)]
                ),
                LogisticRegression(max_iter=1000),
            )

    name             the registered model's name: letters, digits, ``_``, ``-`` and ``.``
    service          the Feast feature service
    entities         rows to learn from: join keys, ``event_timestamp`` (UTC-aware), the request-time inputs
                     of the service's on-demand views, and the label; a function of the repository path that
                     returns a DataFrame, or the path of a Parquet or CSV file relative to the repository
    label            the label's column; a classifier's classes are its distinct values
    build            makes the unfitted estimator
    task             "classification" or "regression"
    holdout          the last part of the time range, kept for evaluation; the rest trains
    label_horizon    how long after ``event_timestamp`` a label is known; rows whose label was not yet known
                     when the next part begins are left out of the part before it (the embargo)
    calibration      a part of the time range before the holdout on which probabilities are calibrated; None
                     leaves them as the estimator gives them
    calibration_method  "sigmoid" or "isotonic", as in ``sklearn.calibration.CalibratedClassifierCV``
    policy           per feature what to do with a missing value: "pass" (NaN to the estimator, the default),
                     ``Default(value)``, or "reject" (the row gets an error, and trains nothing)
    threshold        binary only: predict ``classes[1]`` from this probability on; None: the most likely
    recency_feature  the feature of the recency-only baseline ("how long since the entity was last seen")
    format           how the estimator is stored: "joblib" runs code when it is read, "skops" does not and
                     stores fewer kinds of estimators; a model that compiles is served without reading it
    description      one sentence for people
    """

    name: str
    service: str
    entities: Entities
    label: str
    build: Callable[[MatrixColumns], Any]
    holdout: timedelta
    task: Task = "classification"
    label_horizon: timedelta = timedelta(0)
    calibration: timedelta | None = None
    calibration_method: Literal["sigmoid", "isotonic"] = "sigmoid"
    policy: Mapping[str, Policy] = field(default_factory=lambda: MappingProxyType({}))
    threshold: float | None = None
    recency_feature: str | None = None
    format: Literal["joblib", "skops"] = "joblib"
    description: str = ""

    def __post_init__(self) -> None:
        def require(holds: bool, message: str) -> None:
            if not holds:
                raise InvalidModelSpec(f"Model spec {self.name!r}: {message}")

        try:
            check_model_name(self.name)
        except BanquetError as exc:
            raise InvalidModelSpec(exc.message, hint=exc.hint) from exc
        for attribute in ("service", "label"):
            value = getattr(self, attribute)
            require(isinstance(value, str) and value != "", f"{attribute} must be a non-empty string.")
        require(callable(self.build), "build must be callable: build(columns: MatrixColumns) -> estimator.")
        require(
            callable(self.entities) or isinstance(self.entities, str),
            "entities must be a function of the repository path or the path of a Parquet or CSV file.",
        )
        require(
            self.task in ("classification", "regression"), 'task must be "classification" or "regression".'
        )
        require(self.format in ("joblib", "skops"), 'format must be "joblib" or "skops".')
        for attribute in ("holdout", "label_horizon", "calibration"):
            value = getattr(self, attribute)
            optional = attribute == "calibration" and value is None
            require(optional or isinstance(value, timedelta), f"{attribute} must be a datetime.timedelta.")
        require(self.holdout > timedelta(0), "holdout must be longer than zero.")
        require(self.label_horizon >= timedelta(0), "label_horizon must not be negative.")
        require(self.calibration is None or self.calibration > timedelta(0), "calibration must be positive.")
        require(
            self.calibration is None or self.task == "classification",
            "calibration is for classifiers only.",
        )
        require(
            self.calibration_method in ("sigmoid", "isotonic"),
            'calibration_method must be "sigmoid" or "isotonic".',
        )
        require(
            self.threshold is None or (self.task == "classification" and 0.0 < self.threshold < 1.0),
            "threshold is for binary classifiers and must lie between 0 and 1.",
        )
        for feature, policy in self.policy.items():
            require(
                policy in ("pass", "reject") or isinstance(policy, Default),
                f'policy of {feature!r} must be "pass", "reject" or Default(value), not {policy!r}.',
            )


def load_spec(reference: str) -> ModelSpec:
    """The spec that ``package.module:name`` or ``path/to/file.py:name`` names.

    A file is executed with its own folder importable, as ``python file.py`` would. Raises InvalidModelSpec
    when the reference, the module, the name or the object is not what it should be.
    """
    target, separator, name = reference.rpartition(":")
    if not separator or not target or not name.isidentifier():
        raise InvalidModelSpec(
            f"{reference!r} does not name a model spec.",
            hint="Give MODULE:NAME or FILE.py:NAME, such as demo.model:spec.",
        )
    # Before scikit-learn is imported, which is usually here: OpenMP threads that spin while they wait make a
    # fit on a busy machine many times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    is_file = target.endswith(".py")
    try:
        module = _execute(Path(target)) if is_file else importlib.import_module(target)
    except InvalidModelSpec:
        raise
    except ModuleNotFoundError as exc:
        raise InvalidModelSpec(
            f"{target!r} cannot be imported: no module named {exc.name!r}.",
            hint="A module must be importable from here; a file needs its .py ending.",
        ) from exc
    except Exception as exc:
        raise InvalidModelSpec(
            f"{target!r} failed while it was imported: {type(exc).__name__}: {exc}"
        ) from exc
    try:
        spec = getattr(module, name)
    except AttributeError as exc:
        specs = sorted(key for key, value in vars(module).items() if isinstance(value, ModelSpec))
        raise InvalidModelSpec(
            f"{target!r} has no {name!r}.",
            hint=f"Its model specs: {', '.join(specs)}." if specs else "It has no ModelSpec at all.",
        ) from exc
    if not isinstance(spec, ModelSpec):
        raise InvalidModelSpec(
            f"{reference!r} is a {type(spec).__name__}; a training.spec.ModelSpec is expected."
        )
    return spec


def _execute(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise InvalidModelSpec(
            f"There is no file {str(path)!r}.", hint="Paths are relative to where you are."
        )
    name = f"banquet_spec_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    # Registered only while it runs (dataclasses look their module up): a class that stayed importable under
    # this name would pickle here and be missing in the process that serves.
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        found.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
        del sys.modules[name]
    return module
