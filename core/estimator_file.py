"""A fitted estimator as a file and back: joblib, which runs code when it is read, or skops, which does not.

Only for content whose digest has been checked. What may be read is ``core.trust``'s to say: it comes from the
settings of the reader and never from the package.
"""

from __future__ import annotations

import io
from typing import Any

from core.errors import DigestMismatch, LibraryMismatch, PickleRefused, UntrustedType
from core.manifest import MODEL_FILE, SKOPS_FILE
from core.trust import Trust

FILES = {"joblib": MODEL_FILE, "skops": SKOPS_FILE}


def dump(estimator: Any, file: str) -> bytes:
    """The content of ``file``, in the format that its name says.

    Raises:
        LibraryMismatch: skops is not installed.
        Exception: whatever the library raises for an estimator that it cannot store.
    """
    if file == SKOPS_FILE:
        content: bytes = _skops().dumps(estimator)
        return content
    import joblib

    stream = io.BytesIO()
    joblib.dump(estimator, stream, compress=3)
    return stream.getvalue()


def load(content: bytes, file: str, trust: Trust, what: str) -> Any:
    """The estimator; ``what`` is what errors call the file.

    Raises:
        PickleRefused: it is joblib's, and nothing is to be unpickled here.
        UntrustedType: it is skops', and has types that are not trusted; ``types`` names them.
        LibraryMismatch: skops is not installed.
        DigestMismatch: it is not of the format that its name says.
    """
    if file == SKOPS_FILE:
        odd = untrusted_types(content, trust, what)
        if odd:
            raise UntrustedType(
                f"{what} has types that are not trusted: {', '.join(odd)}.",
                hint="If you know what they do, add them to BANQUET_SKOPS_TRUSTED.",
                types=odd,
            )
        return _skops().loads(content, trusted=sorted(trust.skops_types))
    if not trust.unpickle:
        raise PickleRefused(
            f"{what} would run code when it is read, and BANQUET_ALLOW_PICKLE is off.",
            hint='Train it with `format="skops"`, or so that it compiles to ONNX.',
        )
    import joblib

    return joblib.load(io.BytesIO(content))


def untrusted_types(content: bytes, trust: Trust, what: str) -> list[str]:
    """The types in skops' content that neither skops nor the settings trust, sorted. Raises as ``load``."""
    skops = _skops()
    try:
        found = skops.get_untrusted_types(data=content)
    except Exception as exc:  # a zip file, JSON and arrays: each fails in its own way
        raise DigestMismatch(
            f"{what} is not in skops' format: {type(exc).__name__}.", hint="Register the model anew."
        ) from exc
    return sorted(set(found) - trust.skops_types)


def _skops() -> Any:
    try:
        import skops.io
    except ImportError as exc:
        raise LibraryMismatch(
            "The model is stored in skops' format, and skops is not installed.",
            hint="Install feast-banquet[skops].",
            library="skops",
        ) from exc
    return skops.io
