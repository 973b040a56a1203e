"""The load of benchmarks/serve_load.py in short: nothing is lost, nothing stays behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_under_load_nothing_is_lost(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.serve_load", "--seconds", "8", "--clients", "12"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([*command, "--output", str(tmp_path / "load.json")], cwd=ROOT, env=environment, check=True)
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["received"] > 20 and found["received_and_not_logged"] == 0
    assert found["slots_in_use"] == found["waiting"] == found["log_lost"] == 0 and found["exit_code"] == 0
    codes = {int(name) for name in found["counts"] if name.isdigit()}
    assert 200 in codes and codes <= {200, 400, 404, 429} and found["counts"]["leave"] > 0
