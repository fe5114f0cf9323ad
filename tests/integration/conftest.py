"""Fixtures of the tests that need a Valkey or an S3 server to themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import bucket
from tests.support.bucket import Bucket
from tests.support.valkey import Valkey


@pytest.fixture(scope="module")
def own_valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server for one file of tests."""
    with Valkey(tmp_path_factory.mktemp("own")) as server:
        yield server


@pytest.fixture
def server(own_valkey: Valkey) -> Valkey:
    """The file's server, emptied."""
    with own_valkey.client() as client:
        client.flushall()
    return own_valkey


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A server that speaks S3, named by the environment."""
    with bucket.running(monkeypatch) as running:
        yield running
