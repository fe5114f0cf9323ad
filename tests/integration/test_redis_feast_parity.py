"""The connection string means to us what it means to Feast."""

from __future__ import annotations

import pytest

from core.redis import RedisAddress


@pytest.mark.parametrize(
    "connection_string",
    [
        "localhost:6379",
        "redis.example:6380,db=3,ssl=true,password=pa=ss,username=feast",
        "10.0.0.1:7000,10.0.0.2:7001,10.0.0.3:7002,ssl=false,socket_timeout=1.5,health_check_interval=10",
        'h:1,password="quoted",client_name=online,ssl_ca_certs=/etc/ssl/ca.pem,ssl_cert_reqs=none',
        "h:1,skip_full_coverage_check=true,ssl_check_hostname=false,socket_keepalive=true",
        'h:26379,sentinel_kwargs={"password":"x"},retry_on_timeout=true,socket_connect_timeout=2',
    ],
)
def test_hosts_and_options_are_those_that_feast_reads(connection_string: str) -> None:
    from feast.infra.online_stores.redis import RedisOnlineStore

    nodes, options = RedisOnlineStore._parse_connection_string(connection_string)
    ours = RedisAddress.from_online_store(
        {"type": "redis", "redis_type": "redis_sentinel", "connection_string": connection_string}
    )
    assert [{"host": host, "port": str(port)} for host, port in ours.hosts] == nodes
    assert ours.options == options
