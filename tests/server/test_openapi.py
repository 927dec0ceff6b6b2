"""schemathesis over the OpenAPI document: whatever fits it, or just does not, is answered, and never by a 5xx."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.xdist_group("server")


def test_no_data_makes_the_server_fail(server, tmp_path):
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error",
        "--phases", "coverage,fuzzing", "--max-examples", "25", "--request-timeout", "30", "--exclude-path", "/pause",
        "--seed", "7", "--no-color",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-5000:]
    assert "cases:" in run.stdout and server.http.get("/readyz").status_code == 200
    assert server.complete(prompt="def f(")["choices"], "it still answers"
