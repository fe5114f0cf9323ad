"""Settings from the environment: one frozen object, built where a process starts and passed down.

Only what an operator tunes per deployment lives here; what describes the data lives in the Feast
repository, and what describes a model lives in its manifest.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from core.errors import InvalidSetting

PREFIX = "BANQUET_"


class Settings(BaseModel):
    """Every ``BANQUET_*`` variable, its type and its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    registry_url: str | None = Field(
        None, description="Model registry: a folder or any fsspec URL; none: `models` in the state folder."
    )
    registry_key: SecretStr = Field(
        SecretStr(""),
        description="Keys that sign the registry, separated by commas, the first signs; empty: none.",
    )
    pinned_models: Path | None = Field(
        None,
        description="JSON file of the only versions to load and the sha256 of their manifests; none: any.",
    )
    allow_pickle: bool = Field(True, description="Read models whose format runs code when it is read.")
    skops_trusted: str = Field(
        "", description="Types to trust in skops files beside skops' own, separated by commas."
    )
    state_dir: Path = Field(
        Path(".banquet"), description="Folder of the embedded Redis and of the local model registry."
    )
    default_model: str | None = Field(
        None,
        description="Model (name or name@alias) of POST /predict; none: the only one with a champion.",
    )
    features_only: bool = Field(False, description="Be ready without a model, as a feature server.")
    api_keys: str = Field("", description="Bearer keys, separated by commas; empty: no key is needed.")
    admin_keys: str = Field("", description="Bearer keys of the admin API; empty: it is off.")
    max_entities: int = Field(10_000, gt=0, description="Entities in one request.")
    max_body_bytes: int = Field(4 * 1024 * 1024, gt=0, description="Bytes in one request body.")
    slice_rows: int = Field(256, gt=0, description="Rows handled before other requests get a turn.")
    redis_timeout_s: float = Field(
        2.0, gt=0, description="Seconds for connecting and for a command, unless the connection string says."
    )
    redis_max_in_flight: int = Field(50_000, gt=0, description="Redis commands under way per worker.")
    registry_refresh_s: float = Field(
        1.0, gt=0, description="Seconds between looks for changed definitions and models."
    )
    max_requests: int = Field(
        0, ge=0, description="Requests after which a worker is replaced, up to a fifth more; 0: never."
    )
    memory_limit_mb: int = Field(
        0, ge=0, description="Resident memory in MB past which a worker is replaced; 0: no limit."
    )
    keep_alive_s: float = Field(
        75.0,
        gt=0,
        description="Seconds an idle connection stays open; longer than a proxy in front keeps it.",
    )
    stop_timeout_s: float = Field(
        25.0,
        gt=0,
        description="Seconds that requests in flight get to end when a worker or the server stops.",
    )
    log_level: str = Field(
        "INFO",
        pattern="^(DEBUG|INFO|WARNING|ERROR)$",
        description="What a server logs: DEBUG, INFO, WARNING or ERROR.",
    )

    @property
    def models_url(self) -> str:
        """Where the model registry is: ``registry_url``, else a folder in ``state_dir``."""
        return self.registry_url or str(self.state_dir / "models")


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Read the environment.

    Raises:
        InvalidSetting: a value is out of range or of the wrong type, or a ``BANQUET_*`` variable is unknown.
    """
    environ = os.environ if environ is None else environ
    known = {PREFIX + name.upper(): name for name in Settings.model_fields}
    given = {name: value for name, value in environ.items() if name.upper().startswith(PREFIX)}
    unknown = sorted(name for name in given if name.upper() not in known)
    if unknown:
        raise InvalidSetting(
            f"Unknown setting: {', '.join(unknown)}.",
            hint=f"Known settings: {', '.join(sorted(known))}.",
        )
    try:
        return Settings.model_validate({known[name.upper()]: value for name, value in given.items()})
    except ValidationError as exc:
        first = exc.errors()[0]
        name = PREFIX + str(first["loc"][0]).upper()
        raise InvalidSetting(f"{name} is not valid: {first['msg']} (got {first['input']!r}).") from exc
