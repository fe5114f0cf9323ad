"""Fixtures that start real components: a Valkey server, and a small Feast repository applied to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# As `banquet train` does: spinning OpenMP threads make a fit on a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Everything that is asked here is on this machine, whatever proxy leads out of it.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost,::1"

# The same examples on every run and no clock: what a run finds, the next one finds again.
# To look further: --hypothesis-profile=default
settings.register_profile(
    "steady", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Valkey server on a free port for the whole session; tests keep apart by project name."""
    from tests.support.valkey import Valkey

    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def shop(valkey: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop repository, applied and materialized by stock Feast's own code."""
    from contextlib import chdir
    from datetime import timedelta

    from core.repository import FeastRepository
    from materialization import apply
    from tests.support import shop

    path = shop.write(tmp_path_factory.mktemp("shop"), valkey.connection_string)
    repository = FeastRepository.open(path)
    apply.apply(repository, apply.plan(repository))
    with chdir(path):
        repository.store().materialize(shop.NOW - timedelta(days=500), shop.NOW)
    return path


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of feature_repo with the demo's real data, built as of today; ``build.json`` says how.

    To be read only: copy it before applying or materializing.
    """
    from tests.support import demo

    return demo.build(tmp_path_factory.mktemp("demo") / "feature_repo")
