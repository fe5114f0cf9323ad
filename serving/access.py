"""Who may call: bearer keys, compared in constant time. With no key configured everyone may."""

from __future__ import annotations

import hmac
from hashlib import sha256

from serving.problems import AccessDenied


class AccessPolicy:
    """Lets a request through when its bearer key is one of ``keys``, which ``setting`` lists."""

    setting = "BANQUET_API_KEYS"

    def __init__(self, keys: str) -> None:
        """``keys`` are separated by commas."""
        given = (key.strip() for key in keys.split(","))
        self._digests = [sha256(key.encode()).digest() for key in given if key]

    @property
    def has_keys(self) -> bool:
        """Whether any key is configured."""
        return bool(self._digests)

    def check(self, authorization: bytes | None) -> None:
        """Raise AccessDenied unless ``authorization`` is ``Bearer <key>`` with a configured key."""
        if not self._digests:
            return
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() == b"bearer":
            found = sha256(key.strip()).digest()
            matches = [hmac.compare_digest(found, digest) for digest in self._digests]
            if any(matches):
                return
        raise AccessDenied(
            "The request carries no valid key." if authorization else "The request carries no key.",
            hint=f"Send the header `Authorization: Bearer <key>` with one of {self.setting}.",
        )
