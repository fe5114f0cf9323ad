"""A real S3 server, moto's, on a free port with one bucket.

It answers one request after the other, so that what S3 promises of conditional writes holds: moto's own
threads look first and write later.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class Bucket:
    """A running server: its requests by method, and how many writes asked If-None-Match.

    The next request for a key that ends like ``lose`` is done, and answered with an error.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.name = f"models-{uuid.uuid4().hex}"  # moto keeps what it has for the life of the process
        self.url = f"s3://{self.name}/registry"
        self.requests: Counter[str] = Counter()
        self.conditional = 0
        self.port = 0
        self.lose = ""
        self._moto = DomainDispatcherApplication(create_backend_app)

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        self.requests[environ["REQUEST_METHOD"]] += 1
        self.conditional += environ.get("HTTP_IF_NONE_MATCH") == "*"
        answer: Iterable[bytes] = self._moto(environ, start)
        if self.lose and environ["PATH_INFO"].endswith(self.lose):
            self.lose = ""
            start("500 Internal Server Error", [("Content-Length", "0")])
            return []
        return answer

    def start(self) -> None:
        """Listen, on the port of last time if there was one."""
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=False)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """The server's address, for ``s3_endpoint_override``."""
        return f"http://127.0.0.1:{self.port}"

    def at(self, key: str) -> str:
        """The URL of an object, a prefix or a glob."""
        return f"s3://{self.name}/{key}"

    @contextmanager
    def away(self) -> Iterator[None]:
        """Nothing listens in the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """The requests of the block, by method."""
        before, found = self.requests.copy(), Counter[str]()
        yield found
        found.update(self.requests - before)


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """A server with an empty bucket, which the environment of this process and its children point to."""
    import s3fs

    bucket = Bucket()
    bucket.start()
    for name, value in {
        "AWS_ENDPOINT_URL": bucket.endpoint,
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",  # Arrow would look for a machine of Amazon's around it
    }.items():
        monkeypatch.setenv(name, value)
    try:
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(bucket.name)
        yield bucket
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        bucket.stop()
