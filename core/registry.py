"""The model registry: immutable versions and movable aliases on a filesystem or an object store.

``<url>/<name>/<version>/`` holds a package's files; its ``manifest.json`` is written last, and a version
without one does not exist for any reader. ``<url>/<name>/history/<n>.json`` is the append-only record of
where the traffic went, by whom and why, each entry with the digest of the one before; the last one is the
state of the model, and ``aliases.json`` only repeats its aliases for people and other tools. Every step that
must happen once is the exclusive creation of a file, so it needs no lock and survives a crash.

Knows what a manifest is; never opens a model.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from core import records, traffic
from core.errors import Conflict, DigestMismatch, InvalidRequest, ModelNotFound
from core.manifest import (
    DIGEST_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    ModelManifest,
    check_model_name,
    is_model_name,
)
from core.model_history import Change, ModelHistory
from core.object_store import ObjectStore
from core.settings import Settings
from core.traffic import CHALLENGER, CHAMPION, PREVIOUS, Rollout, Traffic
from core.trust import Trust

__all__ = ["CHALLENGER", "CHAMPION", "PREVIOUS", "Change", "ModelRegistry"]

ALIASES_FILE = "aliases.json"
CLAIM_FILE = ".claim"
_NUMBER = re.compile(r"[1-9]\d*", re.ASCII)
_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/@:]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))?", re.ASCII)


class ModelRegistry:
    """Models below one folder or fsspec URL (``s3://bucket/models``).

    ``trust`` is what is demanded of everything that is read; by default, nothing.

    Every method raises RegistryUnavailable where the store does not answer.
    """

    def __init__(self, url: str, trust: Trust | None = None) -> None:
        self.store = ObjectStore(url)
        self.trust = trust or Trust()

    @classmethod
    def of(cls, settings: Settings) -> ModelRegistry:
        """The registry that the settings name, trusted as they say; raises InvalidSetting as Trust does."""
        trust = Trust.of(
            settings.registry_key.get_secret_value(),
            settings.pinned_models,
            unpickle=settings.allow_pickle,
            skops_types=settings.skops_trusted,
        )
        return cls(settings.models_url, trust)

    @property
    def url(self) -> str:
        """Where it is."""
        return self.store.url

    def models(self) -> list[str]:
        """The names of the models that have a version."""
        found = {path[0] for path in self.store.files() if _is_version(path[1:]) and is_model_name(path[0])}
        return sorted(found)

    def names(self) -> list[str]:
        """What may be a model, with or without a version: one small listing, for who asks often."""
        return [name for name in self.store.children() if is_model_name(name)]

    def versions(self, name: str) -> list[int]:
        """The registered versions of a model, ascending; empty for an unknown one."""
        found = self.store.files(check_model_name(name))
        return sorted(int(path[0]) for path in found if _is_version(path))

    def require(self, name: str, version: int | None = None) -> None:
        """Raise ModelNotFound, which says what there is, where there is no such model or version."""
        if version is None:
            if not self.versions(name):
                raise self._not_found(name, None)
        elif not self._is_registered(name, version):
            raise self._not_found(name, version)

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
                self.require(name)
                known = ", ".join(sorted(aliases)) or "none"
                raise ModelNotFound(f"Model {name!r} has no alias {alias!r}.", hint=f"Its aliases: {known}.")
            version = aliases[alias]
        self.require(name, version)
        return name, version

    def manifest(self, name: str, version: int) -> ModelManifest:
        """The manifest of a version.

        Raises:
            ModelNotFound: there is no such version.
            Unsigned, SignatureMismatch, NotPinned: it is not to be trusted.
            InvalidManifest: it is not a manifest.
            DigestMismatch: it is that of another package, or was altered after its registration by who left
                its digest as it was. Only a key or a pin tells of who did not.
        """
        content = self._manifest_bytes(name, version)
        self.trust.check_pin(name, version, content)
        if self.trust.keys:
            self._check_signature(name, version, content, self._signature(name, version))
        else:
            self._check_digest(name, version, content)
        return _parsed(name, version, content)

    def manifest_digest(self, name: str, version: int) -> str:
        """The sha256 of ``manifest.json``, as pins have it; raises ModelNotFound where there is none."""
        return hashlib.sha256(self._manifest_bytes(name, version)).hexdigest()

    def artifact(self, manifest: ModelManifest, file: str) -> bytes:
        """The content of one of a package's files, checked against its digest before anyone parses it.

        Raises:
            DigestMismatch: the file is missing or differs.
        """
        content = self.store.read(manifest.name, str(manifest.version), file)
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
        content = manifest.to_json().encode()
        signature = self.trust.sign("manifest", name, content)
        # The claim makes the folder ours alone.
        for file, artifact in files.items():
            self.store.replace(artifact, name, str(version), file)
        if signature is not None:
            self.store.replace(signature.encode(), name, str(version), SIGNATURE_FILE)
        self.store.replace(_digest_line(content), name, str(version), DIGEST_FILE)
        self.store.replace(content, name, str(version), MANIFEST_FILE)
        return manifest

    def sign(self, name: str) -> tuple[list[int], list[int]]:
        """Sign by the first key whatever of a model is unsigned, or signed by another of the keys.

        The caller vouches for what is unsigned: nothing says where it came from.

        Returns:
            The versions and the numbers of the history entries that were signed.

        Raises:
            InvalidRequest: there is no key.
            SignatureMismatch, DigestMismatch, HistoryRewritten, DamagedRegistry: something is not what was
                registered or signed; what comes after it is left as it is.
        """
        if not self.trust.keys:
            raise InvalidRequest("There is no key to sign with.", hint="Set BANQUET_REGISTRY_KEY.")
        self.require(name)
        versions = []
        for version in self.versions(name):
            content, signature = self._manifest_bytes(name, version), self._signature(name, version)
            if self.trust.is_current("manifest", name, content, signature):
                continue
            if signature is not None:
                self._check_signature(name, version, content, signature)
            self._check_digest(name, version, content)
            manifest = _parsed(name, version, content)
            for file in manifest.artifacts:
                self.artifact(manifest, file)
            signature = self.trust.sign("manifest", name, content) or ""
            self.store.replace(signature.encode(), name, str(version), SIGNATURE_FILE)
            versions.append(version)
        return versions, self._history(name).sign()

    def set_alias(
        self, name: str, alias: str, version: int | None, *, why: str = "", who: str | None = None
    ) -> Change:
        """Point one alias to a registered version, or to none: then it is gone.

        ``who`` is the person behind the change; by default the user this process runs as.

        Raises:
            ModelNotFound: there is no such version, or no such alias to remove.
            Conflict: it is the champion, and a rollout is under way.
        """
        check_model_name(alias)

        def pointed(now: Traffic) -> Traffic:
            if alias == CHAMPION and now.rollout is not None:
                raise Conflict(
                    f"Version {now.rollout.version} of model {name!r} is on trial against the champion.",
                    hint=f"Abort it first: `banquet rollout abort {name}`.",
                )
            if version is not None:
                return replace(now, aliases={**now.aliases, alias: version})
            if alias not in now.aliases:
                known = ", ".join(sorted(now.aliases)) or "none"
                raise ModelNotFound(f"Model {name!r} has no alias {alias!r}.", hint=f"Its aliases: {known}.")
            return replace(now, aliases={a: v for a, v in now.aliases.items() if a != alias})

        action = f"remove {alias}" if version is None else f"set {alias}"
        return self.change(name, action, pointed, why=why, who=who)

    def introduce(self, name: str, version: int, *, why: str = "", who: str | None = None) -> Change:
        """Give a version that was just registered its alias as ``traffic.introduced`` does."""
        return self.change(name, "introduce", lambda now: traffic.introduced(now, version), why=why, who=who)

    def promote(
        self, name: str, version: int | None = None, *, why: str = "", who: str | None = None
    ) -> Change:
        """Make a version champion as ``traffic.promoted`` does. Raises as that, or where there is none."""
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

        Raises:
            ModelNotFound: there is no such model, or no such version as the traffic would newly go to.
            Unsigned, SignatureMismatch, HistoryRewritten, DamagedRegistry: as ``latest``.
        """

        def checked(last: Change | None) -> Traffic:
            now = last.traffic if last else Traffic()
            try:
                after = transform(now)
            except (Conflict, ModelNotFound):
                if last is None:
                    self.require(name)  # a name that does not exist is what the caller wants to hear of
                raise
            for version in sorted(versions_in(after) - versions_in(now)):
                self.require(name, version)
            return after

        done = self._history(name).append(action, checked, who=who or _user(), why=why)
        self._repeat_aliases(name)
        return done

    def ended(self, name: str, change: Change) -> Rollout | None:
        """The rollout that a change has ended, if it ended one. Raises as ``latest``."""
        before = self._history(name).before(change)
        return before.rollout if before is not None and change.rollout is None else None

    def history(self, name: str) -> list[Change]:
        """Every change of a model's traffic, oldest first. Raises as ``latest``."""
        return self._history(name).entries()

    def latest(self, name: str, known: Change | None = None) -> Change | None:
        """The last change of a model's traffic, which is its state; None where there was none.

        ``known`` is what the caller has: while nothing follows it, two questions to the store answer. What
        follows is checked link by link, so that a caller never goes behind an entry that it has seen.

        Raises:
            HistoryRewritten: ``known`` is gone or another, or an entry does not follow from the one before.
            Unsigned, SignatureMismatch: an entry is not to be trusted.
            DamagedRegistry: an entry cannot be read.
        """
        return self._history(name).latest(known)

    def _history(self, name: str) -> ModelHistory:
        return ModelHistory(self.store, self.trust, check_model_name(name))

    def _repeat_aliases(self, name: str) -> None:
        """Write the last entry's aliases to ``aliases.json``.

        Of two writers at once the slower may carry the older entry, so each looks again after it has
        written: the last one to look leaves the newest.
        """
        written = None
        while (last := self.latest(name, written)) is not None and last != written:
            self.store.replace(records.to_json(last.aliases).encode(), name, ALIASES_FILE)
            written = last

    def _claim(self, name: str) -> int:
        """The next free version; creating its claim is what makes it ours alone, and no one's afterwards."""
        taken = [int(child) for child in self.store.children(name) if _NUMBER.fullmatch(child)]
        version = max(taken, default=0) + 1
        while True:
            try:
                self.store.create(b"", name, str(version), CLAIM_FILE)
            except FileExistsError:
                version += 1
            else:
                return version

    def _manifest_bytes(self, name: str, version: int) -> bytes:
        content = self.store.read(check_model_name(name), str(version), MANIFEST_FILE)
        if content is None:
            raise self._not_found(name, version)
        return content

    def _signature(self, name: str, version: int) -> str | None:
        found = self.store.read(name, str(version), SIGNATURE_FILE)
        return None if found is None else found.decode("ascii", "replace").strip()

    def _check_signature(self, name: str, version: int, content: bytes, signature: str | None) -> None:
        self.trust.check("manifest", name, content, signature, f"The manifest of {name}/{version}")

    def _check_digest(self, name: str, version: int, content: bytes) -> None:
        """The digest beside a manifest; what an older release registered has none."""
        recorded = self.store.read(name, str(version), DIGEST_FILE)
        if recorded is not None and recorded != _digest_line(content):
            raise DigestMismatch(
                f"{MANIFEST_FILE} of model {name} version {version} differs from its digest.",
                hint="It was edited after registration; roll back, or register the model anew.",
                artifact=MANIFEST_FILE,
            )

    def _is_registered(self, name: str, version: int) -> bool:
        return self.store.read(check_model_name(name), str(version), MANIFEST_FILE) is not None

    def _not_found(self, name: str, version: int | None) -> ModelNotFound:
        versions = self.versions(name)
        if version is None or not versions:
            known = ", ".join(self.models()) or "none; `banquet train` registers one"
            return ModelNotFound(f"There is no model {name!r}.", hint=f"Models: {known}.")
        known = ", ".join(map(str, versions))
        return ModelNotFound(f"Model {name!r} has no version {version}.", hint=f"Its versions: {known}.")


def _parsed(name: str, version: int, content: bytes) -> ModelManifest:
    manifest = ModelManifest.from_json(content)
    if (manifest.name, manifest.version) != (name, version):
        raise DigestMismatch(
            f"The manifest of {name}/{version} says it is {manifest.name}/{manifest.version}.",
            hint="The package was moved or edited; register it anew.",
        )
    return manifest


def _digest_line(content: bytes) -> bytes:
    """What ``sha256sum -c`` reads."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST_FILE}\n".encode()


def versions_in(traffic: Traffic) -> set[int]:
    """The versions that aliases or a rollout point to."""
    trial = {traffic.rollout.version, traffic.rollout.champion} if traffic.rollout else set()
    return {*traffic.aliases.values(), *trial}


def _is_version(path: tuple[str, ...]) -> bool:
    return len(path) == 2 and path[1] == MANIFEST_FILE and _NUMBER.fullmatch(path[0]) is not None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return f"uid {os.getuid()}"
