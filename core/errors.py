"""Every error Banquet raises on purpose.

BanquetError
├── InvalidInput                the caller's mistake; says which field and what to do
│   ├── InvalidRequest          a request body, an entity row, a command's argument
│   │   ├── InvalidEntity       a join key or request-time input of the wrong type or missing
│   │   ├── InvalidRow          a pushed feature row
│   │   └── TooLarge            more rows or bytes than the limit
│   ├── InvalidSetting          a BANQUET_* variable
│   ├── InvalidRepository       feature_store.yaml or the definitions
│   ├── InvalidModelSpec        the object that `banquet train --spec` names
│   ├── EntityFrameError        entity rows that a point-in-time join cannot take
│   ├── UnsupportedKeyVersion   entity_key_serialization_version other than 3
│   ├── InvalidSource           a source that cannot be read or written as its definition says
│   ├── InvalidLock             the lock of a dataset that cannot be read
│   └── InvalidFeatureValue     a feature value that its declared type cannot hold
├── NotFound                    a name that does not exist
│   ├── ModelNotFound
│   ├── FeatureServiceNotFound
│   ├── FeatureNotFound
│   └── PushSourceNotFound
├── Conflict                    the state on record forbids it
│   ├── NotRedis                something else answers on the configured address
│   ├── AlreadyRunning          another run materializes the view
│   └── LeaseLost               another run took the view over
├── CheckFailed                 a check did what it is for: it found something
│   ├── GateFailed              source rows that the gate keeps from being loaded
│   ├── DatasetMismatch         the offline store returned other rows than it was asked for
│   ├── DamagedRegistry         a file of the model registry cannot be read
│   ├── HistoryRewritten        a model's history lacks or changed what was seen of it
│   └── ModelRejected           a model package, or what points to one, that must not serve
│       ├── InvalidManifest     manifest.json is not what this release reads
│       ├── Unsigned            a key is set, and there is no signature
│       ├── SignatureMismatch
│       ├── NotPinned           versions are pinned, and this is none of them
│       ├── DigestMismatch
│       ├── PickleRefused       reading it would run code, which is switched off
│       ├── UntrustedType       a skops file with a type that nobody vouched for
│       ├── SchemaMismatch
│       ├── LibraryMismatch
│       └── GoldenMismatch
├── ExportFailed                another model registry did not take a version
├── CorruptCell                 a stored value is not what Feast would have stored
├── RedisReplyError             Redis refused a command (WRONGTYPE and the like)
├── OnDemandFailed              an on-demand view's function failed on a row
├── PredictionFailed            the model failed on a row, or gave no number
└── Unavailable                 a dependency is away; retryable
    ├── RedisUnavailable
    │   └── RedisAccessDenied   the password, the user or its permissions; not retryable
    ├── RegistryUnavailable     the model registry's store
    ├── Overloaded
    └── ModelNotReady

The docstring of a class is its default message. ``code`` is stable and part of the API;
``hint`` says the way out; ``retryable`` says whether the same call may succeed later.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar


class BanquetError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, *, hint: str | None = None, **details: Any) -> None:
        self.message = message or (type(self).__doc__ or "").strip().splitlines()[0]
        self.hint = hint
        self.details = details
        super().__init__(f"{self.message} {hint}" if hint else self.message)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "code" not in cls.__dict__:
            cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()


class InvalidInput(BanquetError):
    """The input is not valid."""


class InvalidRequest(InvalidInput):
    """The request is not valid."""


class InvalidEntity(InvalidRequest):
    """An entity row is not valid."""


class InvalidRow(InvalidRequest):
    """A feature row is not valid."""


class TooLarge(InvalidRequest):
    """The request is larger than the limit."""


class InvalidSetting(InvalidInput):
    """A setting is not valid."""


class InvalidRepository(InvalidInput):
    """The Feast repository cannot be used."""


class InvalidModelSpec(InvalidInput):
    """The model spec cannot be used."""


class EntityFrameError(InvalidInput):
    """The entity rows cannot be joined."""


class UnsupportedKeyVersion(InvalidInput):
    """Only entity_key_serialization_version 3 is supported."""


class InvalidSource(InvalidInput):
    """The source cannot be used."""


class InvalidLock(InvalidInput):
    """The lock of the dataset cannot be used."""


class InvalidFeatureValue(InvalidInput):
    """A feature value cannot be of its declared type."""


class ExportFailed(BanquetError):
    """The other registry did not take the model."""


class CorruptCell(BanquetError):
    """A value in the online store cannot be decoded."""


class NotFound(BanquetError):
    """There is nothing by that name."""


class ModelNotFound(NotFound):
    """There is no such model, version or alias."""


class FeatureServiceNotFound(NotFound):
    """There is no such feature service."""


class FeatureNotFound(NotFound):
    """There is no such feature."""


class PushSourceNotFound(NotFound):
    """There is no such push source."""


class Conflict(BanquetError):
    """The current state does not allow this."""


class NotRedis(Conflict):
    """What listens on the configured address is not Redis."""


class AlreadyRunning(Conflict):
    """Another run is materializing this view."""

    retryable = True


class LeaseLost(Conflict):
    """Another run has taken this view over."""


class CheckFailed(BanquetError):
    """A check failed."""


class GateFailed(CheckFailed):
    """The source's rows do not meet the expectations."""


class DatasetMismatch(CheckFailed):
    """The offline store returned other rows than the entity rows it was given."""


class DamagedRegistry(CheckFailed):
    """A file of the model registry cannot be read."""


class HistoryRewritten(CheckFailed):
    """The history of the model is not the one that was seen before."""


class ModelRejected(CheckFailed):
    """The model package must not serve."""


class InvalidManifest(ModelRejected):
    """The manifest of a model package is not valid."""


class Unsigned(ModelRejected):
    """It is not signed, and here only what is signed is used."""


class SignatureMismatch(ModelRejected):
    """The signature does not belong to the content."""


class NotPinned(ModelRejected):
    """The version is not among the pinned ones."""


class DigestMismatch(ModelRejected):
    """An artifact differs from the digest in its manifest."""


class PickleRefused(ModelRejected):
    """Reading the model would run code."""


class UntrustedType(ModelRejected):
    """The model has a type that is not trusted."""


class SchemaMismatch(ModelRejected):
    """The feature service no longer serves what the model was trained on."""


class LibraryMismatch(ModelRejected):
    """The model was trained with another version of a library."""


class GoldenMismatch(ModelRejected):
    """The model does not reproduce the predictions recorded when it was trained."""


class RedisReplyError(BanquetError):
    """Redis refused a command."""


class OnDemandFailed(BanquetError):
    """An on-demand view failed."""


class PredictionFailed(BanquetError):
    """The model gives no prediction for this row."""


class Unavailable(BanquetError):
    """A dependency does not answer."""

    retryable = True


class RedisUnavailable(Unavailable):
    """Redis does not answer."""


class RedisAccessDenied(RedisUnavailable):
    """Redis denies access."""

    retryable = False


class RegistryUnavailable(Unavailable):
    """The model registry does not answer."""


class Overloaded(Unavailable):
    """Too many requests are in flight."""


class ModelNotReady(Unavailable):
    """The model is not loaded yet."""
