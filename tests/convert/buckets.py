"""Fake buckets on 127.0.0.1: the part of Google's JSON API that tensorstore uses, and moto's S3.

https://cloud.google.com/storage/docs/json_api/v1/objects: ``list`` with startOffset, endOffset and
pageToken, ``get`` with alt=media and a range. Without the right token every answer is 401; a page
has two names. Not here: checkpoints (test_remote.py).
"""

import contextlib
import hashlib
import json
import re
import threading
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
from moto.server import ThreadedMotoServer

TOKEN, PAGE = "a-token", 2
Objects = dict[str, bytes]


def files(directory: Path, prefix: str) -> Objects:
    """Return every file below a directory, under its name in a bucket."""
    return {
        f"{prefix}/{p.relative_to(directory)}": p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


@contextlib.contextmanager
def gcs(buckets: Mapping[str, Objects], asked: list[str]) -> Iterator[str]:
    """Run a server that has ``buckets``; yield its address.

    Requested paths are appended to ``asked``.
    """
    with _Server(buckets, asked) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def s3(buckets: Mapping[str, Objects]) -> Iterator[str]:
    """Run a moto server that has ``buckets``; yield its address.

    The environment has key and secret.
    """
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        for bucket, objects in buckets.items():
            put_s3(f"http://{host}:{port}", bucket, objects)
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def put_s3(url: str, bucket: str, objects: Objects) -> None:
    """Write objects into a bucket, which is made if needed."""
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
    client.create_bucket(Bucket=bucket)
    for name, body in objects.items():
        client.put_object(Bucket=bucket, Key=name, Body=body)
    client.close()


class _Server(ThreadingHTTPServer):
    """Data shared by the server's handlers."""

    def __init__(self, buckets: Mapping[str, Objects], asked: list[str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = buckets
        self.asked = asked


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"
    # Head and body in one packet; in two, each answer waits 40 ms for an acknowledgement.
    wbufsize = -1

    def do_GET(self) -> None:
        buckets = self.server.buckets
        self.server.asked.append(self.path)
        url = urlsplit(self.path)
        found = re.fullmatch(r"/storage/v1/b/([^/]+)/o(?:/([^/]+))?", url.path)
        assert found, self.path
        if self.headers["authorization"] != f"Bearer {TOKEN}":
            self.answer(
                401, json.dumps({"error": {"code": 401, "message": "Invalid Credentials"}}).encode()
            )
        elif found[1] not in buckets or (found[2] and unquote(found[2]) not in buckets[found[1]]):
            self.answer(404, json.dumps({"error": {"code": 404, "message": "Not Found"}}).encode())
        elif found[2]:
            self.get(buckets[found[1]][unquote(found[2])])
        else:
            self.list(
                sorted(buckets[found[1]]),
                {key: value[0] for key, value in parse_qs(url.query).items()},
            )

    def list(self, names: list[str], query: Mapping[str, str]) -> None:
        first, end = query.get("startOffset", ""), query.get("endOffset")
        names = [name for name in names if name >= first and (not end or name < end)]
        after = urlsafe_b64decode(query.get("pageToken", "")).decode()
        names = [name for name in names if name > after]
        page: dict[str, Any] = {"items": [{"name": name} for name in names[:PAGE]]}
        if len(names) > PAGE:
            page["nextPageToken"] = urlsafe_b64encode(names[PAGE - 1].encode()).decode()
        self.answer(200, json.dumps(page).encode())

    def get(self, body: bytes) -> None:
        generation = {"x-goog-generation": str(int.from_bytes(hashlib.sha256(body).digest()[:7]))}
        asked_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["range"] or "")
        if asked_range is None:
            return self.answer(200, body, generation)
        start, stop = int(asked_range[1]), min(len(body), int(asked_range[2] or len(body)) + 1)
        if start >= len(body):
            return self.answer(416, b"")
        where = {"content-range": f"bytes {start}-{stop - 1}/{len(body)}"}
        self.answer(206, body[start:stop], generation | where)

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
