"""As much of S3 as Arrow's client uses, in memory, on a free port: objects, ranges, listings, uploads."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape


class S3:
    """A running server. ``objects`` maps bucket/key to content; ``requests`` counts by method."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: dict[str, int] = {}
        store = self

        class Handler(_Handler):
            s3 = store

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> S3:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    s3: S3
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        if parsed:
            split = urlsplit(self.path)
            self.key = unquote(split.path).lstrip("/")
            self.query = parse_qs(split.query, keep_blank_values=True)
            self.s3.requests[self.command] = self.s3.requests.get(self.command, 0) + 1
        return parsed

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            raw = self.chunked()
        else:
            raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return raw
        content = b""
        while raw:
            head, _, raw = raw.partition(b"\r\n")
            size = int(head.partition(b";")[0], 16)
            if not size:
                break
            content, raw = content + raw[:size], raw[size + 2 :]
        return content

    def chunked(self) -> bytes:
        raw = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            raw += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return raw

    def do_HEAD(self) -> None:
        if "/" not in self.key.rstrip("/"):
            self.answer(200)
        elif self.key in self.s3.objects:
            size = str(len(self.s3.objects[self.key]))
            self.answer(200, length=size, ETag='"e"', Last_Modified="Mon, 01 Jan 2024 00:00:00 GMT")
        else:
            self.answer(404)

    def do_GET(self) -> None:
        if "list-type" in self.query:
            self.list_objects()
            return
        content = self.s3.objects.get(self.key)
        if content is None:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None:
            self.answer(200, content, ETag='"e"')
            return
        first, last = int(found[1]), min(int(found[2]), len(content) - 1)
        span = f"bytes {first}-{last}/{len(content)}"
        self.answer(206, content[first : last + 1], Content_Range=span, ETag='"e"')

    def list_objects(self) -> None:
        bucket = self.key.rstrip("/")
        prefix, delimiter = (self.query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        contents, folders = [], {}
        for name in sorted(self.s3.objects):
            key = name.removeprefix(bucket + "/")
            if key == name or not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders[prefix + rest.split(delimiter)[0] + delimiter] = None
            else:
                contents.append(
                    f"<Contents><Key>{escape(key)}</Key><Size>{len(self.s3.objects[name])}</Size>"
                    "<LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders)
        count = len(contents) + len(folders)
        self.answer(
            200,
            f"<ListBucketResult><Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{count}</KeyCount>"
            f"<IsTruncated>false</IsTruncated>{''.join(contents)}{common}</ListBucketResult>".encode(),
        )

    def do_PUT(self) -> None:
        source = self.headers.get("x-amz-copy-source")
        content = self.body()
        if "partNumber" in self.query:
            parts = self.s3.uploads[self.query["uploadId"][0]]
            parts[int(self.query["partNumber"][0])] = content
            self.answer(200, ETag='"p"')
        elif source:
            self.s3.objects[self.key] = self.s3.objects[unquote(source).lstrip("/")]
            self.answer(200, b"<CopyObjectResult><ETag>e</ETag></CopyObjectResult>")
        else:
            self.s3.objects[self.key] = content
            self.answer(200, ETag='"e"')

    def do_POST(self) -> None:
        content = self.body()
        if "uploads" in self.query:
            upload = str(len(self.s3.uploads))
            self.s3.uploads[upload] = {}
            self.answer(
                200,
                f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId>"
                "</InitiateMultipartUploadResult>".encode(),
            )
        elif "uploadId" in self.query:
            parts = self.s3.uploads.pop(self.query["uploadId"][0])
            self.s3.objects[self.key] = b"".join(parts[number] for number in sorted(parts))
            done = "<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
            self.answer(200, done.encode())
        else:
            bucket = self.key.rstrip("/")
            for node in ElementTree.fromstring(content).iter():
                if node.tag.endswith("Key"):
                    self.s3.objects.pop(f"{bucket}/{node.text}", None)
            self.answer(200, b"<DeleteResult></DeleteResult>")

    def do_DELETE(self) -> None:
        self.s3.objects.pop(self.key, None)
        self.answer(204)
