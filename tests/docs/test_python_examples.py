"""mypy in strict mode accepts the Python examples of the pages and files, without a plugin, and finds mistakes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("python-api.md", "extensions.md", "pacing.md")]
EXAMPLES = (*sorted((ROOT / "examples").rglob("*.py")), *PAGES)
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Kept beside that of a plain `mypy`, whose options differ: all that an application imports takes 12 s of CPU time.
CACHE = ROOT / ".mypy_cache" / "examples"
WRONG = """
from api_gateway import CostHook, GatewayConfig, RequestView, Respond, Route, Upstream
from api_gateway.sections import ServerSection

Route(name="users", path=5, upstream="users")
Upstream(targets=[7])
Respond("200")
Route(name="users", path="/api", upstream="users", costt=5)
ServerSection(port=[])

class Cost:
    def cost(self, request: RequestView) -> int:
        return request.cpst

hook: CostHook = Cost()
"""


@pytest.mark.timeout(600)  # mypy reads all that an application imports
def test_mypy_in_strict_mode_accepts_the_examples_and_finds_mistakes(tmp_path: Path) -> None:
    for example in EXAMPLES:
        code = example.read_text()
        name = re.sub(r"\W", "_", str(example.relative_to(ROOT)))
        pieces = [code] if example.suffix == ".py" else FENCE.findall(code)
        for number, piece in enumerate(pieces):
            (tmp_path / f"{name}_{number}.py").write_text(piece)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = true\nfollow_imports = silent\n")
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(CACHE), "."],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(ROOT)},
    )
    errors = [line for line in found.stdout.splitlines() if ": error:" in line]
    lines = sorted({int(line.split(":")[1]) for line in errors if line.startswith("wrong.py")})
    assert lines == [5, 6, 7, 8, 9, 13, 15], found.stdout
    assert not [line for line in errors if not line.startswith("wrong.py")]
