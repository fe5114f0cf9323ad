"""The model registry: immutable versions and movable aliases on a filesystem or an object store.

``<url>/<name>/<version>/`` holds a package's files; its ``manifest.json`` is written last, and a version
without one does not exist for any reader. ``<url>/<name>/history/<n>.json`` is the append-only record of
where the traffic went, by whom and why; its last entry is the state of the model, and ``aliases.json`` only
repeats its aliases for people and other tools. Every step that must happen once is the exclusive creation of
a file, so it needs no lock and survives a crash.

Knows what a manifest is; never opens a model.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from core import records, traffic
from core.errors import (
    DamagedRegistry,
    DigestMismatch,
    InvalidRequest,
    ModelNotFound,
    RegistryUnavailable,
)
from core.manifest import MANIFEST_FILE, ModelManifest, check_model_name, is_model_name
from core.traffic import CHALLENGER, CHAMPION, PREVIOUS, Rollout, Traffic

__all__ = ["CHALLENGER", "CHAMPION", "PREVIOUS", "Change", "ModelRegistry"]

ALIASES_FILE = "aliases.json"
_HISTORY = "history"
_CLAIM = ".claim"
_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))?")


@dataclass(frozen=True, slots=True)
class Change:
    """Entry ``number`` of a model's history: what was done, and where the traffic goes from then on."""

    number: int
    action: str
    aliases: Mapping[str, int]
    rollout: Rollout | None
    who: str
    when: datetime
    why: str

    @property
    def traffic(self) -> Traffic:
        """The state that it left."""
        return Traffic(self.aliases, self.rollout)


class ModelRegistry:
    """Models below one folder or fsspec URL (``s3://bucket/models``).

    Every method raises RegistryUnavailable where the store does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def _store(self) -> tuple[Any, str]:
        import fsspec

        try:
            fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as exc:
            raise InvalidRequest(
                f"The model registry {self.url!r} cannot be opened: {exc}.",
                hint="Install the fsspec filesystem for this URL, or correct BANQUET_REGISTRY_URL.",
            ) from exc
        return fs, root.rstrip("/")

    def models(self) -> list[str]:
        """The names of the models that have a version."""
        return [name for name in self._children() if is_model_name(name) and self.versions(name)]

    def versions(self, name: str) -> list[int]:
        """The registered versions of a model, ascending; empty for an unknown one."""
        found = sorted(int(child) for child in self._children(check_model_name(name)) if child.isdecimal())
        return [version for version in found if self._exists(name, str(version), MANIFEST_FILE)]

    def aliases(self, name: str) -> dict[str, int]:
        """The aliases of a model and the versions they point to."""
        last = self.latest(name)
        return {} if last is None else dict(last.aliases)

    def resolve(self, reference: str) -> tuple[str, int]:
        """The name and version behind ``name``, ``models:/name@champion`` or ``models:/name/3``.

        A bare name means its champion.

        Raises:
            InvalidRequest: the reference is malformed.
            ModelNotFound: it points to nothing.
        """
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            raise InvalidRequest(
                f"{reference!r} is not a model reference.",
                hint="Write models:/name@champion or models:/name/3.",
            )
        name = check_model_name(match["name"])
        if match["version"]:
            version = int(match["version"])
        else:
            alias = match["alias"] or CHAMPION
            aliases = self.aliases(name)
            if alias not in aliases:
                known = ", ".join(sorted(aliases)) or "none"
                raise ModelNotFound(f"Model {name!r} has no alias {alias!r}.", hint=f"Its aliases: {known}.")
            version = aliases[alias]
        if not self._exists(name, str(version), MANIFEST_FILE):
            raise self._no_version(name, version)
        return name, version

    def manifest(self, name: str, version: int) -> ModelManifest:
        """The manifest of a version.

        Raises:
            ModelNotFound: there is no such version.
            InvalidManifest: it is not a manifest, or that of another package.
        """
        text = self._read(check_model_name(name), str(version), MANIFEST_FILE)
        if text is None:
            raise self._no_version(name, version)
        manifest = ModelManifest.from_json(text)
        if (manifest.name, manifest.version) != (name, version):
            raise DigestMismatch(
                f"The manifest of {name}/{version} says it is {manifest.name}/{manifest.version}.",
                hint="The package was moved or edited; register it anew.",
            )
        return manifest

    def artifact(self, manifest: ModelManifest, file: str) -> bytes:
        """The content of one of a package's files, checked against its digest before anyone parses it.

        Raises:
            DigestMismatch: the file is missing or differs.
        """
        content = self._read(manifest.name, str(manifest.version), file)
        found = None if content is None else hashlib.sha256(content).hexdigest()
        if content is None or found != manifest.artifacts[file]:
            state = "is missing" if content is None else "differs from its digest"
            raise DigestMismatch(
                f"{file} of model {manifest.name} version {manifest.version} {state}.",
                hint="The package was altered after registration; roll back, or register the model anew.",
                artifact=file,
            )
        return content

    def verify(self, name: str, version: int) -> ModelManifest:
        """Check every digest of a version; raises DigestMismatch at the first that differs."""
        manifest = self.manifest(name, version)
        for file in manifest.artifacts:
            self.artifact(manifest, file)
        return manifest

    def register(
        self,
        name: str,
        files: Mapping[str, bytes],
        describe: Callable[[int, Mapping[str, str]], ModelManifest],
    ) -> ModelManifest:
        """Store a new version.

        Args:
            name: the model.
            files: the package's files but the manifest.
            describe: makes the manifest from the version and the files' sha256 digests.

        Returns:
            The manifest that was written.
        """
        check_model_name(name)
        version = self._claim(name)
        digests = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        manifest = describe(version, digests)
        for file, content in files.items():
            self._write_new((name, str(version), file), content)
        self._replace((name, str(version), MANIFEST_FILE), manifest.to_json().encode())
        return manifest

    def set_alias(
        self, name: str, alias: str, version: int, *, why: str = "", who: str | None = None
    ) -> Change:
        """Point one alias to a registered version. Raises ModelNotFound where there is none.

        ``who`` is the person behind the change; by default the user this process runs as.
        """
        check_model_name(alias)
        self._require(name, version)

        def pointed(now: Traffic) -> Traffic:
            return replace(now, aliases={**now.aliases, alias: version})

        return self.change(name, f"set {alias}", pointed, why=why, who=who)

    def promote(
        self, name: str, version: int | None = None, *, why: str = "", who: str | None = None
    ) -> Change:
        """Make a version champion as ``traffic.promoted`` does. Raises as that, or where there is none."""
        if version is not None:
            self._require(name, version)
        return self.change(
            name, "promote", lambda now: traffic.promoted(now, version, name=name), why=why, who=who
        )

    def rollback(self, name: str, *, why: str = "", who: str | None = None) -> Change:
        """Bring the previous champion back as ``traffic.rolled_back`` does. Raises as that."""
        return self.change(
            name, "rollback", lambda now: traffic.rolled_back(now, name=name), why=why, who=who
        )

    def change(
        self,
        name: str,
        action: str,
        transform: Callable[[Traffic], Traffic],
        *,
        why: str = "",
        who: str | None = None,
    ) -> Change:
        """Append what ``transform`` makes of a model's traffic to its history.

        Of two writers at once one is first; the other's ``transform`` is called again on what that one left.
        Whatever it raises is raised, and nothing is written.
        """
        check_model_name(name)
        while True:
            last = self.latest(name)
            after = transform(last.traffic if last else Traffic())
            number = last.number + 1 if last else 1
            done = Change(
                number, action, dict(after.aliases), after.rollout, who or _user(), datetime.now(tz=UTC), why
            )
            try:
                self._write_new((name, _HISTORY, f"{number}.json"), records.to_json(done).encode())
            except FileExistsError:
                continue
            self._repeat_aliases(name)
            return done

    def history(self, name: str) -> list[Change]:
        """Every change of a model's traffic, oldest first."""
        return [self._entry(name, number) for number in self._history_numbers(check_model_name(name))]

    def latest(self, name: str, known: Change | None = None) -> Change | None:
        """The last change of a model's traffic, which is its state; None where there was none.

        ``known`` is what the caller has: while nothing follows it, one question to the store answers.
        """
        if known is not None and not self._exists(name, _HISTORY, f"{known.number + 1}.json"):
            return known
        last = max(self._history_numbers(check_model_name(name)), default=0)
        return self._entry(name, last) if last else None

    def _entry(self, name: str, number: int) -> Change:
        place = f"{name}/{_HISTORY}/{number}.json"
        try:
            change = records.from_json(Change, self._read(name, _HISTORY, f"{number}.json") or b"", "it")
            if change.number != number:
                raise ValueError(f"it is entry {change.number}")
        except ValueError as exc:
            raise DamagedRegistry(
                f"{place} in the model registry cannot be read: {exc}.",
                hint="Restore the file; the entries before it have every earlier state.",
            ) from exc
        return change

    def _repeat_aliases(self, name: str) -> None:
        """Write the last entry's aliases to ``aliases.json``.

        Of two writers at once the slower may carry the older entry, so each looks again after it has
        written: the last one to look leaves the newest.
        """
        written = None
        while (last := self.latest(name, written)) is not None and last != written:
            self._replace((name, ALIASES_FILE), records.to_json(last.aliases).encode())
            written = last

    def _history_numbers(self, name: str) -> list[int]:
        stems = (child.removesuffix(".json") for child in self._children(name, _HISTORY))
        return sorted(int(stem) for stem in stems if stem.isdecimal())

    def _claim(self, name: str) -> int:
        """The next free version; creating its claim is what makes it ours alone."""
        taken = [int(child) for child in self._children(name) if child.isdecimal()]
        version = max(taken, default=0) + 1
        while True:
            try:
                self._write_new((name, str(version), _CLAIM), b"")
            except FileExistsError:
                version += 1
            else:
                return version

    def _require(self, name: str, version: int) -> None:
        if not self._exists(check_model_name(name), str(version), MANIFEST_FILE):
            raise self._no_version(name, version)

    def _no_version(self, name: str, version: int) -> ModelNotFound:
        known = ", ".join(str(v) for v in self.versions(name)) or "none"
        return ModelNotFound(f"Model {name!r} has no version {version}.", hint=f"Its versions: {known}.")

    def _children(self, *parts: str) -> list[str]:
        fs, root = self._store
        try:
            with self._available(FileNotFoundError, NotADirectoryError):
                found = fs.ls(posixpath.join(root, *parts), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(posixpath.basename(path.rstrip("/")) for path in found)

    def _exists(self, *parts: str) -> bool:
        fs, root = self._store
        with self._available():
            return bool(fs.isfile(posixpath.join(root, *parts)))

    def _read(self, *parts: str) -> bytes | None:
        fs, root = self._store
        try:
            with self._available(FileNotFoundError, NotADirectoryError):
                content: bytes = fs.cat_file(posixpath.join(root, *parts))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content

    def _write_new(self, parts: tuple[str, ...], content: bytes) -> None:
        """Create a file; raises FileExistsError where it is there already."""
        fs, path = self._place(parts)
        with self._available(FileExistsError):
            if "file" not in _protocols(fs):
                fs.pipe_file(path, content, mode="create")
                return
            aside = posixpath.join(posixpath.dirname(path), f".{uuid.uuid4().hex}")
            fs.pipe_file(aside, content)
            try:
                # A link appears with its whole content or not at all, and never over another.
                os.link(aside, path)
            finally:
                os.unlink(aside)

    def _replace(self, parts: tuple[str, ...], content: bytes) -> None:
        """Write a file as a whole: a reader sees the old content or the new, never a part."""
        fs, path = self._place(parts)
        with self._available():
            if "file" not in _protocols(fs):
                fs.pipe_file(path, content)  # object stores replace objects atomically
                return
            aside = posixpath.join(posixpath.dirname(path), f".{uuid.uuid4().hex}")
            fs.pipe_file(aside, content)
            os.replace(aside, path)

    def _place(self, parts: tuple[str, ...]) -> tuple[Any, str]:
        """Where to write, its folder made."""
        fs, root = self._store
        path = posixpath.join(root, *parts)
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
                f"The model registry {self.url!r} does not answer: {exc}.",
                hint="Check BANQUET_REGISTRY_URL and the credentials of its store.",
            ) from exc


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"
