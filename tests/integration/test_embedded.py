"""The embedded server: started where nobody listens, kept, shared, found again and stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from core import embedded_process
from core.embedded import EmbeddedRedis, probe
from core.errors import Conflict, NotRedis, RedisAccessDenied, RedisUnavailable
from core.redis import RedisAddress
from tests.support.valkey import Valkey, free_port
from tests.support.waiting import wait_until


def address(port: int, host: str = "127.0.0.1", **options: Any) -> RedisAddress:
    return RedisAddress(hosts=((host, port),), options=options)


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path / "a folder" / "redis", address(free_port()))
    yield server
    server.stop()


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_starts_where_nobody_listens_keeps_its_data_and_stops(embedded: EmbeddedRedis) -> None:
    assert not embedded.status().running
    assert not embedded.stop()
    assert not embedded.directory.exists()

    state = embedded.start()
    assert (state.started, state.running, state.embedded, state.lasting) == (True, True, True, True)
    assert state.version
    assert state.process_id
    with embedded.address.session() as client:
        client.hset("entity", "field", "value")
        assert client.config_get("appendonly")["appendonly"] == "yes"
        assert client.config_get("bind")["bind"] == "127.0.0.1"

    again = embedded.start()
    assert (again.started, again.process_id) == (False, state.process_id)
    assert embedded.status() == again

    assert embedded.stop()
    assert not alive(state.process_id)
    assert not embedded.status().running
    assert embedded.start().started
    with embedded.address.session() as client:
        assert client.hget("entity", "field") == b"value"


def test_data_survives_a_kill(embedded: EmbeddedRedis) -> None:
    state = embedded.start()
    with embedded.address.session() as client:
        client.set("key", "value")
    appended = embedded.directory / "appendonlydir"
    wait_until(lambda: any(b"value" in file.read_bytes() for file in appended.iterdir()), "it is in the file")
    assert state.process_id
    os.kill(state.process_id, signal.SIGKILL)
    os.waitpid(state.process_id, 0)
    assert not embedded.status().running
    assert not embedded.stop()
    assert embedded.start().started
    with embedded.address.session() as client:
        assert client.get("key") == b"value"


@pytest.mark.parametrize(
    "options",
    [
        {"db": 20},
        {"password": 'sp ace"quo\\te#'},
        {"username": "feast", "password": "s3cret", "db": 1},
    ],
)
def test_it_is_what_the_connection_string_asks_for(tmp_path: Path, options: dict[str, Any]) -> None:
    embedded = EmbeddedRedis(tmp_path, address(free_port(), "localhost", **options))
    try:
        assert embedded.start().started
        with embedded.address.session() as client:
            assert client.set("key", "value")
        if "password" in options:
            assert options["password"] not in (tmp_path / "valkey.conf").read_text()
            with pytest.raises(RedisAccessDenied):
                probe(address(embedded.address.port))
    finally:
        assert embedded.stop()


def test_a_server_that_is_there_already_is_used_and_left_alone(tmp_path: Path) -> None:
    with Valkey(tmp_path) as foreign:
        embedded = EmbeddedRedis(tmp_path / "redis", foreign.address())
        with embedded.in_use() as state:
            assert (state.running, state.embedded, state.started) == (True, False, False)
        assert not embedded.stop()
        with foreign.client() as client:
            assert client.ping()


def test_what_is_not_redis_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    caller, _ = listener.accept()
                    with caller, suppress(OSError):
                        caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(NotRedis, match="another port"):
            EmbeddedRedis(tmp_path / "redis", address(listener.getsockname()[1])).start()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_an_address_elsewhere_is_never_started(tmp_path: Path) -> None:
    port = free_port()
    for elsewhere in (
        RedisAddress(hosts=(("127.0.0.1", port),), kind="cluster"),
        RedisAddress(hosts=(("127.0.0.1", port),), kind="sentinel"),
        RedisAddress(hosts=(("127.0.0.1", port),), options={"unix_socket_path": str(tmp_path / "sock")}),
    ):
        embedded = EmbeddedRedis(tmp_path / "redis", elsewhere)
        for call in (embedded.start, embedded.status):
            with pytest.raises(RedisUnavailable, match=r"online_store\.connection_string"):
                call()
        with pytest.raises(RedisUnavailable), embedded.in_use():
            pass
    assert not (tmp_path / "redis").exists()


def test_it_says_why_it_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(RedisUnavailable, match="does not speak TLS"):
        EmbeddedRedis(tmp_path / "tls", address(free_port(), ssl=True)).start()
    (tmp_path / "redis" / "appendonlydir").mkdir(parents=True)
    (tmp_path / "redis" / "appendonlydir" / "appendonly.aof.manifest").write_text("no manifest\n")
    embedded = EmbeddedRedis(tmp_path / "redis", address(free_port()))
    with pytest.raises(RedisUnavailable, match="did not start") as caught:
        embedded.start()
    assert str(embedded.log) in str(caught.value)
    assert not embedded.stop()


def test_a_changed_port_does_not_put_two_servers_on_one_folder(embedded: EmbeddedRedis) -> None:
    embedded.start()
    moved = EmbeddedRedis(embedded.directory, address(free_port()))
    with pytest.raises(Conflict, match="banquet redis stop"):
        moved.start()
    assert moved.stop()
    assert moved.start().started


def test_a_stale_record_with_a_process_number_used_again_harms_nobody(embedded: EmbeddedRedis) -> None:
    state = embedded.start()
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    record = embedded.directory / "server.json"
    honest = record.read_text()
    record.write_text(honest.replace(str(state.process_id), str(bystander.pid)))
    with pytest.raises(Conflict, match="as recorded"):
        embedded.stop()
    record.write_text(honest)
    assert embedded.stop()
    record.write_text(honest.replace(str(state.process_id), str(bystander.pid)))
    assert not embedded.stop()
    assert bystander.poll() is None
    bystander.communicate(b"\n")


def test_a_suspended_server_can_be_stopped(embedded: EmbeddedRedis) -> None:
    state = embedded.start()
    assert state.process_id
    os.kill(state.process_id, signal.SIGSTOP)
    assert embedded.stop()
    assert not alive(state.process_id)


def test_the_last_one_out_stops_it(embedded: EmbeddedRedis) -> None:
    with embedded.in_use() as first:
        with embedded.in_use() as second:
            assert (first.started, second.started) == (True, False)
            assert first.process_id == second.process_id
        assert embedded.status().running
    assert not embedded.status().running


def test_one_that_was_started_to_last_is_not_stopped_by_a_user(embedded: EmbeddedRedis) -> None:
    with embedded.in_use() as state:
        assert not state.lasting
        assert embedded.start(lasting=True).lasting
    assert embedded.status().running


USER = """
import json, sys
from pathlib import Path
from core.embedded import EmbeddedRedis
from core.redis import RedisAddress

address = RedisAddress(hosts=(("127.0.0.1", int(sys.argv[2])),))
with EmbeddedRedis(Path(sys.argv[1]), address).in_use() as state:
    print(json.dumps([state.started, state.process_id]), flush=True)
    sys.stdin.read()
"""


@contextmanager
def users(count: int, embedded: EmbeddedRedis) -> Iterator[list[tuple[subprocess.Popen[bytes], list[int]]]]:
    """Processes inside ``in_use`` until the block ends, each with [whether it started it, process id]."""
    command = [sys.executable, "-c", USER, str(embedded.directory), str(embedded.address.port)]
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(count)
    ]
    try:
        yield [(process, json.loads(process.stdout.readline())) for process in processes if process.stdout]
    finally:
        for process in processes:
            process.communicate()


def test_two_that_start_at_once_share_one_server_and_leave_none_behind(embedded: EmbeddedRedis) -> None:
    with users(2, embedded) as crowd:
        seen = [words for _, words in crowd]
        assert sorted(started for started, _ in seen) == [False, True]
        assert len({process_id for _, process_id in seen}) == 1
        assert embedded.status().running
    assert not embedded.status().running


def test_after_a_killed_user_the_next_one_finds_the_server_and_ends_it(embedded: EmbeddedRedis) -> None:
    with users(1, embedded) as ((user, (_, process_id)),):
        user.kill()
    assert embedded.status().process_id == process_id
    with embedded.in_use() as state:
        assert (state.started, state.process_id) == (False, process_id)
    assert not embedded.status().running


def killed(process_id: int | None) -> None:
    assert process_id
    os.kill(process_id, signal.SIGKILL)


def restarted(embedded: EmbeddedRedis, before: int | None) -> int:
    """Wait for another server than that process; its number."""

    def another() -> bool:
        with suppress(RedisUnavailable):
            return embedded.status().process_id not in (None, before)
        return False

    wait_until(another, "another server answers")
    found = embedded.status().process_id
    assert found
    return found


def test_while_it_is_in_use_a_killed_server_is_started_again_with_its_data(embedded: EmbeddedRedis) -> None:
    with embedded.in_use() as state:
        with embedded.address.session() as client:
            client.config_set("appendfsync", "always")
            client.set("key", "value")
        killed(state.process_id)
        second = restarted(embedded, state.process_id)
        with embedded.address.session() as client:
            assert client.get("key") == b"value"
        killed(second)
        restarted(embedded, second)
        assert not embedded.status().lasting
    assert not embedded.status().running


def test_one_that_was_to_last_lasts_when_it_is_started_again(embedded: EmbeddedRedis) -> None:
    state = embedded.start(lasting=True)
    with embedded.in_use():
        killed(state.process_id)
        second = restarted(embedded, state.process_id)
    assert embedded.status().process_id == second
    assert embedded.status().lasting


def test_two_users_start_one_server_again(embedded: EmbeddedRedis) -> None:
    with users(2, embedded) as crowd:
        ((_, (_, first)), _) = crowd
        killed(first)
        second = restarted(embedded, first)
        assert embedded.status().process_id == second
    assert not embedded.status().running


def test_one_that_was_stopped_on_purpose_stays_so(
    embedded: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    held = embedded_process.held
    monkeypatch.setattr(embedded_process, "held", lambda lock: looks.append(held(lock)) or looks[-1])
    with embedded.in_use():
        assert embedded.stop()
        after = len(looks)
        wait_until(lambda: looks[after:].count(False) >= 3, "it was looked at three times")
        assert not embedded.status().running
        assert embedded.start(lasting=False).started


@pytest.mark.parametrize("removed", [False, True], ids=["moved", "removed"])
def test_its_folder_gone_it_is_stopped_all_the_same(embedded: EmbeddedRedis, removed: bool) -> None:
    with embedded.in_use() as state:
        assert state.process_id
        if removed:
            while embedded.directory.exists():  # the server may be writing a file
                shutil.rmtree(embedded.directory, ignore_errors=True)
        else:
            embedded.directory.rename(embedded.directory.with_name("elsewhere"))
    assert not alive(state.process_id)


def test_its_folder_gone_it_is_not_started_empty(
    embedded: EmbeddedRedis, caplog: pytest.LogCaptureFixture
) -> None:
    away = embedded.directory.with_name("elsewhere")
    with embedded.in_use() as state:
        embedded.directory.rename(away)
        killed(state.process_id)
        wait_until(lambda: "is gone" in caplog.text, "it says so")
        assert not embedded.directory.exists()
        away.rename(embedded.directory)
        restarted(embedded, state.process_id)
    assert caplog.text.count("is gone") == 1
    assert not embedded.status().running
