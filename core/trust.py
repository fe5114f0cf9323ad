"""Who wrote what is in a model registry: signatures by keys that are kept outside of it, and pinned versions.

A signature is HMAC-SHA256 over exactly what is read: a manifest's bytes, or a history entry with the name of
its model. A digest in a package says that the package is whole; only these say whose it is. What they cover
and what they cannot: docs/models.md. Knows no files but the one of the pins.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.errors import InvalidSetting, NotPinned, SignatureMismatch, Unsigned

MIN_KEY_CHARACTERS = 32
_PIN = re.compile(r"(?P<name>[^/]+)/(?P<version>[1-9]\d*)", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")

Kind = Literal["manifest", "history entry"]


@dataclass(frozen=True, slots=True)
class Trust:
    """What a reader demands of a registry; by default nothing, and then nothing is signed.

    ``keys``: what is read must be signed by one of them; the first one signs. ``pins``: only these versions
    load, and only with manifests of these sha256 digests. ``unpickle`` allows reading an estimator in a
    format that runs code; ``skops_types`` are trusted in the one that does not, beside skops' own.
    """

    keys: tuple[bytes, ...] = field(default=(), repr=False)
    pins: Mapping[tuple[str, int], str] | None = None
    unpickle: bool = True
    skops_types: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls, keys: str = "", pins_file: Path | None = None, *, unpickle: bool = True, skops_types: str = ""
    ) -> Trust:
        """From the settings: keys and types separated by commas, a JSON file of {"name/version": "sha256"}.

        Raises:
            InvalidSetting: a key is too short to be one, or the file is not such a file.
        """
        parts = [part.strip() for part in keys.split(",")] if keys.strip() else []
        if any(len(part) < MIN_KEY_CHARACTERS for part in parts):
            raise InvalidSetting(
                f"BANQUET_REGISTRY_KEY has a key of fewer than {MIN_KEY_CHARACTERS} characters.",
                hint="Make one with `openssl rand -hex 32`; several are separated by commas.",
            )
        return cls(
            keys=tuple(part.encode() for part in parts),
            pins=None if pins_file is None else _pins(pins_file),
            unpickle=unpickle,
            skops_types=frozenset(part.strip() for part in skops_types.split(",") if part.strip()),
        )

    def sign(self, kind: Kind, model: str, content: bytes) -> str | None:
        """The signature by the first key; None without a key."""
        return _signature(self.keys[0], kind, model, content) if self.keys else None

    def is_current(self, kind: Kind, model: str, content: bytes, signature: str | None) -> bool:
        """Whether the signature is that of the first key."""
        own = self.sign(kind, model, content)
        return own is not None and signature is not None and hmac.compare_digest(own, signature)

    def check(self, kind: Kind, model: str, content: bytes, signature: str | None, what: str) -> None:
        """Check a signature, if there are keys; ``what`` is what errors call the thing.

        Raises:
            Unsigned: it has none.
            SignatureMismatch: none of the keys made it for this content.
        """
        if not self.keys:
            return
        if signature is None:
            raise Unsigned(
                f"{what} is not signed.",
                hint=f"If you know where it comes from, sign it: `banquet models sign {model}`.",
            )
        found = signature.encode()
        if not any(
            hmac.compare_digest(_signature(k, kind, model, content).encode(), found) for k in self.keys
        ):
            raise SignatureMismatch(
                f"The signature of {what} was made by another key, or for other content.",
                hint="It was edited or brought from elsewhere, or BANQUET_REGISTRY_KEY lacks the key.",
            )

    def check_pin(self, name: str, version: int, manifest: bytes) -> None:
        """Raise NotPinned where there are pins, and none for a version with this manifest."""
        if self.pins is None:
            return
        pinned = self.pins.get((name, version))
        if pinned != hashlib.sha256(manifest).hexdigest():
            state = "is not among the pinned versions" if pinned is None else "is not the one that was pinned"
            raise NotPinned(
                f"Model {name} version {version} {state}.",
                hint="Add what `banquet models pins` says of it to the file in BANQUET_PINNED_MODELS.",
            )


def _signature(key: bytes, kind: Kind, model: str, content: bytes) -> str:
    # Neither a kind nor a model's name has a NUL, so no two messages are the same bytes.
    message = b"\0".join((b"banquet", kind.encode(), model.encode(), content))
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def _pins(file: Path) -> dict[tuple[str, int], str]:
    try:
        tree = json.loads(file.read_bytes())
    except (OSError, ValueError) as exc:
        raise InvalidSetting(
            f"The file in BANQUET_PINNED_MODELS cannot be read: {exc}.",
            hint="`banquet models pins` writes one.",
        ) from exc
    pins = {}
    for key, digest in tree.items() if isinstance(tree, dict) else [("", None)]:
        match = _PIN.fullmatch(key)
        if match is None or not (isinstance(digest, str) and _SHA256.fullmatch(digest)):
            raise InvalidSetting(
                f'{file} is not of the form {{"name/version": "sha256 of manifest.json"}}.',
                hint="`banquet models pins` writes one.",
            )
        pins[match["name"], int(match["version"])] = digest
    return pins
