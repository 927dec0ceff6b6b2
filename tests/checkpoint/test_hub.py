"""Model names as directories or hub ids, with a fake hub.

Every refusal of the hub becomes one CheckpointError.
"""

import http.server
import json
import threading

import huggingface_hub.constants
import pytest

from slipway.checkpoint.hub import resolve
from slipway.errors import CheckpointError, InvalidConfig

pytestmark = pytest.mark.host
SHA = "a" * 40
REFUSALS = {
    "org/gated": (403, "GatedRepo"),
    "org/absent": (404, "RepoNotFound"),
    "org/broken": (500, ""),
}
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "additional_chat_templates/old/tool_use.jinja": b"{{ tools }}",
    "additional_chat_templates_2/tool_use.jinja": b"{{ tools }}",
    "additional/config.json": b"{}",
    "a/config.json": b"{}",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"code",
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Hub with one good repository, org/model, at one revision, and some that refuse."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        for name, (status, code) in REFUSALS.items():
            if name in self.path:
                return self._answer(status, b"{}", {"X-Error-Code": code})
        if "/revision/" in self.path:
            if self.path.endswith("/revision/main"):
                return self._answer(200, json.dumps({"id": "org/model", "sha": SHA}).encode(), {})
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in self.path:
            files = [
                {"type": "file", "path": p, "size": len(b), "oid": p.encode().hex()}
                for p, b in FILES.items()
            ]
            return self._answer(200, json.dumps(files).encode(), {})
        body = FILES[self.path.partition(f"/resolve/{SHA}/")[2]]
        return self._answer(200, body, {"ETag": f'"{len(body)}-etag"', "X-Repo-Commit": SHA})

    def _answer(self, status, body, headers):
        self.send_response(status)
        for name, text in {
            **headers,
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache without a reachable hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def hub(cache, monkeypatch):
    """The fake hub, reachable."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield cache
    server.shutdown()
    server.server_close()


def problem(model, revision=None) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve(model, revision)
    (text,) = caught.value.problems
    return text


def test_a_local_directory_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("org/name").resolve() == tmp_path / "org" / "name"
    assert resolve("~/org") == tmp_path / "org"


def test_a_local_directory_has_no_revision(tmp_path):
    with pytest.raises(InvalidConfig, match="revision: got 'main', expected none"):
        resolve(str(tmp_path), "main")


def test_a_model_has_a_name():
    with pytest.raises(InvalidConfig, match="model: got ''"):
        resolve("")


@pytest.mark.parametrize(
    "model", ["/no/such", "./no", "../no", "~/no-such", "~nobody-of-this-name/x"]
)
def test_a_path_is_not_looked_for_on_the_hub(model):
    assert problem(model) == "no such directory"


def test_a_file_is_no_model(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert problem("model.gguf") == "not a directory"


@pytest.mark.parametrize("model", ["a/b/c", "org/na me", "org/..", "x\0y"])
def test_neither_a_directory_nor_a_hub_id(cache, model):
    assert problem(model).startswith("neither a local directory nor a hub id")


def test_a_cached_snapshot_serves_offline(cache):
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    snapshot = repository / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    assert (
        resolve("org/name") == resolve("org/name", "main") == resolve("org/name", SHA) == snapshot
    )


def test_what_is_not_cached_is_refused_offline(cache):
    assert "not in the local cache" in problem("org/name")


def test_downloads_weights_and_texts_but_no_code_and_no_pickle(hub):
    snapshot = resolve("org/model")
    names = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()}
    templates = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert names == {"config.json", "model.safetensors", *templates}
    assert (snapshot / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    "model, revision, expected",
    [
        ("org/gated", None, "accept its terms"),
        ("org/absent", None, "no such repository"),
        ("org/model", "v9", "no revision 'v9'"),
        ("org/broken", None, "out of reach"),
    ],
)
def test_each_refusal_is_explained(hub, model, revision, expected):
    assert expected in problem(model, revision)
