"""Keys of certificates that too many can read give a warning."""

import os
from pathlib import Path

import pytest

from api_gateway.downstream.certificates import readable_keys
from api_gateway.settings.tls import ServerTlsSection


@pytest.mark.parametrize(
    ("mode", "owner", "warnings"),
    [(0o600, "gateway", 0), (0o640, "gateway", 1), (0o440, "another", 0), (0o444, "another", 1)],
)
def test_a_key_of_another_user_may_be_readable_by_its_group(
    mode: int, owner: str, warnings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service has no other access to a credential of systemd, which has the mode 0440."""
    key = tmp_path / "tls.key"
    key.touch()
    key.chmod(mode)
    number = key.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: number if owner == "gateway" else number + 1)
    section = ServerTlsSection.model_validate({"certificates": [{"certificate": key, "key": key}]})
    assert len(list(readable_keys(section))) == warnings
