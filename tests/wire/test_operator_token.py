"""The generated token: readable by its owner only, written atomically, and kept."""

import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from api_gateway.admin.operator_token import FILE, operator_token, token_file
from tests.kit import ask, in_front_of, running_gateway


def test_it_is_generated_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    old = os.umask(0)
    try:
        token = operator_token(folder)
    finally:
        os.umask(old)
    assert token is not None
    assert len(token) >= 40
    assert stat.S_IMODE(token_file(folder).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert operator_token(folder) == token
    assert [path.name for path in token_file(folder).parent.iterdir()] == [FILE], "drafts are removed"
    assert operator_token(tmp_path / "other") != token


def test_all_workers_that_start_at_once_have_the_same(tmp_path: Path) -> None:
    found: list[str | None] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        found.append(operator_token(tmp_path))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert None not in found
    assert len(set(found)) == 1


def test_without_a_place_for_it_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "occupied").write_text("a file, not a folder")
    assert operator_token(tmp_path / "occupied") is None
    assert "occupied" in caplog.text


def written(state_dir: Path) -> Path:
    """Return the file, in the folder it belongs to."""
    path = token_file(state_dir)
    path.parent.mkdir()
    return path


@pytest.mark.parametrize("content", ["", "\n", "short", "\u00e9" * 40])
def test_an_invalid_token_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str) -> None:
    written(tmp_path).write_text(content, "utf-8")
    token_file(tmp_path).chmod(0o600)
    assert operator_token(tmp_path) is None
    assert FILE in caplog.text


def test_permissions_that_let_others_read_it_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    token = operator_token(tmp_path)
    token_file(tmp_path).chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert operator_token(tmp_path) == token
    assert "0644" in caplog.text
    assert token is not None
    assert token not in caplog.text


@pytest.mark.parametrize("admin", [{}, {"token": "a-configured-token"}, {"local": False}])
def test_it_operates_beside_what_is_configured(tmp_path: Path, admin: dict[str, object]) -> None:
    with running_gateway(in_front_of("http://127.0.0.1:9") | {"admin": admin}, tmp_path / "state") as gateway:
        token = token_file(tmp_path / "state").read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        url = f"{gateway.url}/clients/x/tier"
        answer = ask(url, method="POST", headers=headers, body=b'{"tier": "PREMIUM"}')
        assert answer.status == 200
        wrong = headers | {"Authorization": f"Bearer {token}x"}
        assert ask(url, method="POST", headers=wrong, body=b'{"tier": "PREMIUM"}').status == 401
