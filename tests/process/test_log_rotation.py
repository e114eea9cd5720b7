"""logrotate with `copytruncate` on a file that standard output is appended to: later lines are whole."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kit import ask, eventually, free_port
from tests.processes import ROOT, START


def test_the_access_log_goes_on_after_its_file_was_copied_and_truncated(tmp_path: Path) -> None:
    port, log, rotated = free_port(), tmp_path / "access.log", tmp_path / "access.log.1"
    command = [sys.executable, str(ROOT / "run_gateway.py"), "--port", str(port)]
    with (
        log.open("ab") as output,
        subprocess.Popen(
            command, cwd=tmp_path, stdout=output, stderr=subprocess.DEVNULL, env={"XDG_STATE_HOME": str(tmp_path)}
        ) as process,
    ):
        try:
            eventually(lambda: b"Listening on" in log.read_bytes(), "it listens", START)
            for number in range(3):
                ask(f"http://127.0.0.1:{port}/api/before/{number}")
            eventually(lambda: log.read_bytes().count(b'"path":"/api/before/') == 3, "three lines are written")
            shutil.copyfile(log, rotated)
            with log.open("r+b") as file:
                file.truncate()
            for number in range(3):
                ask(f"http://127.0.0.1:{port}/api/after/{number}")
            eventually(lambda: log.read_bytes().count(b'"path":"/api/after/') == 3, "three more lines are written")
        finally:
            process.terminate()
            process.wait(START)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert [line["path"] for line in lines] == [f"/api/after/{number}" for number in range(3)]
    assert "\0" not in log.read_text(), "the gateway appends, so that the file has no hole"
    assert rotated.read_text().count('"path":"/api/before/') == 3
