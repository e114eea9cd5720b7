"""The page on `api-gateway doctor`: its command runs, and its table names what is checked."""

import json
import re
import shlex
from pathlib import Path

import pytest

from api_gateway import cli
from api_gateway.doctor.options import CHECK_TIMEOUT
from tests.kit import RawUpstream, reply

PAGE = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()


def test_the_command_of_the_page_runs_and_its_table_names_each_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    up = RawUpstream(reply(b"fine"))
    limit = "{name: a, quota: 5, period: day}"
    text = f"server: {{port: 0}}\nupstreams: {{users: '{up.url}'}}\nlimits: [{limit}]\nstate_dir: {tmp_path}\n"
    (tmp_path / "gateway.yaml").write_text(text + "admin: {token: 0f3c9a7e5b1d2846e7f09a1c3b5d7e92}\n")
    (command,) = re.findall(r"```sh\napi-gateway (.+)\n```", PAGE)
    assert cli.main([*shlex.split(command), "--json"]) == 0
    up.close()
    abouts = {
        one["about"].partition(" http")[0].partition(".")[0] for one in json.loads(capsys.readouterr().out)["checks"]
    }
    rows = " ".join(re.findall(r"^\| ([^|]+) \|", PAGE, flags=re.MULTILINE))
    expected = {"admin": "tokens", "server": "server.port"}
    assert [about for about in abouts if expected.get(about, about) not in rows] == []
    assert f"at most {CHECK_TIMEOUT:g}\nseconds" in PAGE
