"""The model registry: immutable versions and movable aliases on a filesystem or an object store.

``<url>/<name>/<version>/`` holds a package's files; its ``manifest.json`` is written last, and a version
without one does not exist for any reader. ``<url>/<name>/history/<n>.json`` is the append-only record of
what the aliases were set to, by whom and why; ``aliases.json`` repeats the last of them for readers. Every
step that must happen once is the exclusive creation of a file, so it needs no lock and survives a crash.

Knows what a manifest is; never opens a model.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from core.errors import (
    Conflict,
    DamagedRegistry,
    DigestMismatch,
    InvalidRequest,
    ModelNotFound,
    RegistryUnavailable,
)
from core.manifest import MANIFEST_FILE, ModelManifest, check_model_name, is_model_name

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIASES_FILE = "aliases.json"
_HISTORY = "history"
_CLAIM = ".claim"
_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))?")


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of a model's history: what was done, and the aliases as they stood afterwards."""

    action: str
    aliases: Mapping[str, int]
    who: str
    when: str
    why: str = ""


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
        text = self._read(check_model_name(name), ALIASES_FILE)
        return {} if text is None else _aliases(text, f"{name}/{ALIASES_FILE}", lambda tree: tree)

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
        return self._change(name, f"set {alias}", lambda aliases: {**aliases, alias: version}, why, who)

    def promote(
        self, name: str, version: int | None = None, *, why: str = "", who: str | None = None
    ) -> Change:
        """Make a version (default: the challenger) champion; the champion before it becomes ``previous``.

        Raises:
            ModelNotFound: there is no such version, or no challenger.
            Conflict: it is the champion already.
        """
        if version is not None:
            self._require(name, version)

        def promoted(aliases: dict[str, int]) -> dict[str, int]:
            chosen = aliases.get(CHALLENGER) if version is None else version
            if chosen is None:
                raise ModelNotFound(f"Model {name!r} has no challenger.", hint="Name a version to promote.")
            champion = aliases.get(CHAMPION)
            if chosen == champion:
                raise Conflict(f"Version {chosen} of model {name!r} is the champion already.")
            kept = {a: v for a, v in aliases.items() if not (a == CHALLENGER and v == chosen)}
            return {**kept, CHAMPION: chosen, **({} if champion is None else {PREVIOUS: champion})}

        return self._change(name, "promote", promoted, why, who)

    def rollback(self, name: str, *, why: str = "", who: str | None = None) -> Change:
        """Make the previous champion champion again, and the champion ``previous``.

        Raises:
            Conflict: there is no previous champion.
        """

        def rolled_back(aliases: dict[str, int]) -> dict[str, int]:
            if PREVIOUS not in aliases or CHAMPION not in aliases:
                raise Conflict(
                    f"Model {name!r} has no previous champion.",
                    hint="Promote a version with `models promote`.",
                )
            return {**aliases, CHAMPION: aliases[PREVIOUS], PREVIOUS: aliases[CHAMPION]}

        return self._change(name, "rollback", rolled_back, why, who)

    def history(self, name: str) -> list[Change]:
        """Every change of a model's aliases, oldest first."""
        return [self._entry(name, number) for number in self._history_numbers(check_model_name(name))]

    def _entry(self, name: str, number: int) -> Change:
        text = self._read(name, _HISTORY, f"{number}.json")
        place = f"{name}/{_HISTORY}/{number}.json"
        aliases = _aliases(text or b"", place, lambda tree: tree["aliases"])
        tree = json.loads(text or b"")
        return Change(str(tree["action"]), aliases, str(tree["who"]), str(tree["when"]), str(tree["why"]))

    def _change(
        self,
        name: str,
        action: str,
        change: Callable[[dict[str, int]], dict[str, int]],
        why: str,
        who: str | None,
    ) -> Change:
        """Append to the history, which decides who comes first, then repeat the aliases for readers."""
        check_model_name(name)
        while True:
            last = max(self._history_numbers(name), default=0)
            current = dict(self._entry(name, last).aliases) if last else {}
            done = Change(action, change(current), who or _user(), datetime.now(tz=UTC).isoformat(), why)
            try:
                self._write_new((name, _HISTORY, f"{last + 1}.json"), _json(asdict(done)))
            except FileExistsError:
                continue
            self._repeat_aliases(name)
            return done

    def _repeat_aliases(self, name: str) -> None:
        """Write the last entry's aliases to ``aliases.json``.

        Of two writers at once the slower may carry the older entry, so each looks again after it has
        written: the last one to look leaves the newest.
        """
        written = 0
        while (last := max(self._history_numbers(name))) != written:
            self._replace((name, ALIASES_FILE), _json(self._entry(name, last).aliases))
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


def _aliases(text: bytes, place: str, pick: Callable[[Any], Any]) -> dict[str, int]:
    """The aliases in a JSON text; raises DamagedRegistry where there are none to be read."""
    try:
        aliases = pick(json.loads(text))
        if not all(type(version) is int for version in aliases.values()):
            raise TypeError("a version is not an integer")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise DamagedRegistry(
            f"{place} in the model registry cannot be read: {exc}.",
            hint="Restore the file; the model's history has every change of its aliases.",
        ) from exc
    return dict(aliases)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"


def _json(tree: Any) -> bytes:
    return json.dumps(tree, indent=2).encode() + b"\n"
