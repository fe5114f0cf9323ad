"""What ``online_store`` in feature_store.yaml says about Redis, read or refused."""

from __future__ import annotations

import pickle

import pytest

from core.errors import InvalidRepository, RedisAccessDenied, RedisReplyError, RedisUnavailable
from core.redis import RedisAddress


def address(connection_string: str, **keys: object) -> RedisAddress:
    return RedisAddress.from_online_store({"type": "redis", "connection_string": connection_string, **keys})


def test_nothing_said_means_feasts_default() -> None:
    found = RedisAddress.from_online_store({"type": "redis"})
    assert found == RedisAddress(hosts=(("localhost", 6379),))
    assert found.is_local


def test_options_are_json_where_they_can_be() -> None:
    found = address("redis.example:6380,db=3,ssl=true,ssl_ca_certs=/etc/ca.pem,socket_timeout=0.25")
    assert (found.host, found.port, found.db, found.kind) == ("redis.example", 6380, 3, "standalone")
    assert found.options == {"db": 3, "ssl": True, "ssl_ca_certs": "/etc/ca.pem", "socket_timeout": 0.25}
    assert not found.is_local


@pytest.mark.parametrize(
    ("text", "password"),
    [("12345", "12345"), ("1e5", "1e5"), ("a=b==", "a=b=="), ('"x"', "x"), ("null", None)],
)
def test_a_password_is_the_text_that_was_written(text: str, password: str | None) -> None:
    assert address(f"localhost:6379,password={text}").options["password"] == password


def test_sentinels_and_cluster_nodes_are_all_kept() -> None:
    sentinels = address("a:1,b:2,c:3", redis_type="redis_sentinel", sentinel_master="features")
    assert (sentinels.kind, sentinels.hosts, sentinels.master) == (
        "sentinel",
        (("a", 1), ("b", 2), ("c", 3)),
        "features",
    )
    assert address("a:1,b:2", redis_type="redis_cluster").hosts == (("a", 1), ("b", 2))


def test_a_single_server_takes_the_first_of_several_hosts_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert address("a:1,b:2").hosts == (("a", 1),)
    assert "only the first" in caplog.text


@pytest.mark.parametrize(
    ("connection_string", "named"),
    [
        ("", "connection_string"),
        ("db=1", "no host"),
        ("localhost", "no port"),
        ("localhost:", "localhost:"),
        ("localhost:redis", "localhost:redis"),
        ("localhost:70000", "localhost:70000"),
        (":6379", ":6379"),
        ("::1:6379", "more than one colon"),
        ("${REDIS_HOST}:6379", "REDIS_HOST"),
        ("localhost:6379,db=first", "db"),
        ("localhost:6379,db=-1", "db"),
        ("localhost:6379,ssl=False", "ssl"),
        ("localhost:6379,socket_timeout=0", "socket_timeout"),
        ("localhost:6379,socket_connect_timeout=soon", "socket_connect_timeout"),
        ("localhost:6379,decode_responses=true", "decode_responses"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(connection_string: str, named: str) -> None:
    with pytest.raises(InvalidRepository) as caught:
        address(connection_string)
    assert "online_store.connection_string" in str(caught.value)
    assert named in str(caught.value)


def test_another_store_or_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidRepository, match=r"online_store\.type is 'sqlite'"):
        RedisAddress.from_online_store({"type": "sqlite", "path": "online.db"})
    with pytest.raises(InvalidRepository, match=r"online_store\.redis_type"):
        address("localhost:6379", redis_type="redis_swarm")
    with pytest.raises(InvalidRepository, match="only one"):
        address("localhost:6379,db=1", redis_type="redis_cluster")


def test_no_text_of_an_address_shows_a_password() -> None:
    found = address('a:1,username=reader,password=s3cret,sentinel_kwargs={"password":"s3cret"},db=2')
    assert "s3cret" not in str(found) + repr(found) + str(found.unavailable("gone"))
    assert str(found) == "a:1,username=reader,password=***,sentinel_kwargs=***,db=2"


@pytest.mark.parametrize(
    ("hosts", "options", "local"),
    [
        ((("127.0.0.1", 6379),), {}, True),
        ((("::1", 6379),), {}, True),
        ((("10.0.0.1", 6379),), {}, False),
        ((("localhost", 6379),), {"unix_socket_path": "/run/redis.sock"}, False),
    ],
)
def test_local_is_the_loopback_only(
    hosts: tuple[tuple[str, int], ...], options: dict[str, object], local: bool
) -> None:
    assert RedisAddress(hosts=hosts, options=options).is_local is local


def test_sentinels_on_this_machine_are_no_place_for_an_embedded_server() -> None:
    assert not address("localhost:26379", redis_type="redis_sentinel").is_local


def test_an_address_can_be_sent_to_another_process_and_be_a_key() -> None:
    found = address("a:1,db=1")
    assert pickle.loads(pickle.dumps(found)) == found
    assert {found: 1}[found] == 1


@pytest.mark.parametrize(
    ("reply", "kind", "retryable"),
    [
        ("LOADING Redis is loading the dataset in memory", RedisUnavailable, True),
        ("READONLY You can't write against a read only replica.", RedisUnavailable, True),
        ("CLUSTERDOWN Hash slot not served", RedisUnavailable, True),
        ("NOAUTH Authentication required.", RedisAccessDenied, False),
        ("WRONGPASS invalid username-password pair or user is disabled.", RedisAccessDenied, False),
        ("ERR AUTH <password> called without any password configured", RedisAccessDenied, False),
        ("NOPERM User reader has no permissions to run the 'hmget' command", RedisAccessDenied, False),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", RedisReplyError, False),
        ("MOVED 3999 127.0.0.1:6381", RedisReplyError, False),
    ],
)
def test_an_error_reply_becomes_the_error_that_says_whether_to_try_again(
    reply: str, kind: type[Exception], retryable: bool
) -> None:
    error = address("localhost:6379").reply_error(reply)
    assert type(error) is kind
    assert error.retryable is retryable
