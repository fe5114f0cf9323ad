"""Files below one folder or fsspec URL, with what a registry needs: exclusive creation and whole replacement.

The same on a local folder and on an object store. Knows no models; every failure of the store itself is a
RegistryUnavailable.
"""

from __future__ import annotations

import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from core.errors import InvalidRequest, RegistryUnavailable

# What S3 answers to If-None-Match where the object is there, or where another request is creating it.
_EXISTS = {"PreconditionFailed", "412", "ConditionalRequestConflict"}


class ObjectStore:
    """Files by their path below ``url``, which is a tuple of names.

    Every method raises RegistryUnavailable where the store does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def _root(self) -> tuple[Any, str]:
        import fsspec

        try:
            fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as exc:
            raise InvalidRequest(
                f"The model registry {self.url!r} cannot be opened: {exc}.",
                hint="Install the fsspec filesystem for this URL, or correct BANQUET_REGISTRY_URL.",
            ) from exc
        return fs, root.rstrip("/")

    @cached_property
    def _protocols(self) -> set[str]:
        protocol = self._root[0].protocol
        return {protocol} if isinstance(protocol, str) else set(protocol)

    @property
    def _is_local(self) -> bool:
        return "file" in self._protocols

    def children(self, *parts: str) -> list[str]:
        """The names of the files and folders in a folder, sorted; empty where there is none."""
        fs, root = self._root
        try:
            with self._available(FileNotFoundError, NotADirectoryError):
                found = fs.ls(posixpath.join(root, *parts), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(posixpath.basename(path.rstrip("/")) for path in found)

    def files(self, *parts: str) -> list[tuple[str, ...]]:
        """Every file below a folder, by its path from there: one listing, however deep it is."""
        fs, root = self._root
        folder = posixpath.join(root, *parts)
        with self._available():
            found = fs.find(folder)
        return [tuple(path[len(folder) :].strip("/").split("/")) for path in found]

    def read(self, *parts: str) -> bytes | None:
        """The content of a file, None where there is none."""
        fs, root = self._root
        # Else s3fs asks for the size first, and lists what begins with the name where there is no such file.
        options = {"max_concurrency": 1} if "s3" in self._protocols else {}
        try:
            with self._available(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                content: bytes = fs.cat_file(posixpath.join(root, *parts), **options)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        return content

    def modified(self, *parts: str) -> datetime | None:
        """When a file was last written, None where there is none."""
        fs, root = self._root
        try:
            with self._available(FileNotFoundError, NotADirectoryError):
                moment: datetime = fs.modified(posixpath.join(root, *parts))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

    def create(self, content: bytes, *parts: str) -> None:
        """Create a file; raises FileExistsError where it is there already, or being created."""
        fs, path = self._place(parts)
        with self._available(FileExistsError):
            if self._is_local:
                aside = _aside(path)
                fs.pipe_file(aside, content)
                try:
                    # A link appears with its whole content or not at all, and never over another.
                    os.link(aside, path)
                finally:
                    os.unlink(aside)
                return
            try:
                fs.pipe_file(path, content, mode="create")
            except OSError as exc:
                response = getattr(exc.__cause__, "response", None) or {}
                if response.get("Error", {}).get("Code") in _EXISTS:
                    raise FileExistsError(path) from exc
                raise

    def replace(self, content: bytes, *parts: str) -> None:
        """Write a file as a whole: a reader sees the old content or the new, never a part."""
        fs, path = self._place(parts)
        with self._available():
            if self._is_local:
                aside = _aside(path)
                fs.pipe_file(aside, content)
                os.replace(aside, path)
            else:
                fs.pipe_file(path, content)  # object stores replace objects atomically

    def remove(self, *parts: str) -> None:
        """Remove a file, if it is there."""
        fs, root = self._root
        try:
            with self._available(FileNotFoundError, NotADirectoryError):
                fs.rm_file(posixpath.join(root, *parts))
        except (FileNotFoundError, NotADirectoryError):
            return

    def _place(self, parts: tuple[str, ...]) -> tuple[Any, str]:
        """Where to write, its folder made."""
        fs, root = self._root
        path = posixpath.join(root, *parts)
        if self._is_local:  # object stores have no folders to make
            with self._available():
                fs.makedirs(posixpath.dirname(path), exist_ok=True)
        return fs, path

    @contextmanager
    def _available(self, *expected: type[OSError]) -> Iterator[None]:
        """Make anything but the errors that the caller expects a RegistryUnavailable."""
        try:
            yield
        except expected:
            raise
        except Exception as exc:  # each store has exceptions of its own, few of them OSError
            raise RegistryUnavailable(
                f"The model registry {self.url!r} does not answer: {str(exc).rstrip('.')}.",
                hint="Check BANQUET_REGISTRY_URL and the credentials of its store.",
            ) from exc


def _aside(path: str) -> str:
    return posixpath.join(posixpath.dirname(path), f".{uuid.uuid4().hex}")
