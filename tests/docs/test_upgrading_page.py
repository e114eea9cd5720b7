"""The page on upgrading: its versions are those of the code, and its commands go back."""

import re
import shutil
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

from api_gateway.admin.audit_log import AUDIT_FILE, AUDIT_VERSION
from api_gateway.admin.breaker_overrides import OVERRIDES_FILE, OVERRIDES_VERSION
from api_gateway.assembly.store_schema import STORE_SCHEMA, schema_key
from api_gateway.clients.kept_proofs import PROOFS_FILE, PROOFS_VERSION
from api_gateway.clients.sqlite_store import CLIENTS_FILE, CLIENTS_SCHEMA
from api_gateway.limits.period_store import QUOTAS_FILE, QUOTAS_SCHEMA
from api_gateway.storage.sqlite_file import SqliteFile
from api_gateway.system.state_folder import FOLDER_VERSION, VERSION_FILE
from api_gateway.transport.webhook_events import EVENTS_VERSION
from api_gateway.usage.ledger import USAGE_FILE, USAGE_SCHEMA
from tests.processes import ROOT

PAGE = (ROOT / "docs" / "upgrading.md").read_text()


def test_the_table_has_the_versions_of_the_code() -> None:
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (\d+) \|", PAGE, flags=re.MULTILINE)
    found = {(re.findall(r"`([^`]+)`", what) or [""])[0]: int(version) for what, _, version in rows}
    assert found == {
        CLIENTS_FILE: CLIENTS_SCHEMA.version,
        QUOTAS_FILE: QUOTAS_SCHEMA.version,
        USAGE_FILE: USAGE_SCHEMA.version,
        OVERRIDES_FILE: OVERRIDES_VERSION,
        PROOFS_FILE: PROOFS_VERSION,
        AUDIT_FILE: AUDIT_VERSION,
        "webhook-N.json": EVENTS_VERSION,
        "via": FOLDER_VERSION,
        "store.prefix": STORE_SCHEMA,
    }
    assert f"the file `{VERSION_FILE}`" in PAGE
    assert f"`{schema_key('gateway')}`" in PAGE


def test_the_commands_put_a_backup_in_the_place_of_the_file(tmp_path: Path) -> None:
    for file in (ROOT / "tests" / "store" / "former" / "0250753").iterdir():
        shutil.copy(file, tmp_path)
    upgraded = SqliteFile(tmp_path / CLIENTS_FILE, CLIENTS_SCHEMA, thread_name="test")
    upgraded._open().close()
    (backup,) = tmp_path.glob("*.backup")
    block = re.findall(r"```sh\n(mkdir .*?)```", PAGE, flags=re.DOTALL)[0]
    commands = re.sub(r"clients\.sqlite3\.v\S+\.backup", backup.name, block)
    subprocess.run(["sh", "-ec", commands], cwd=tmp_path, check=True)
    with closing(sqlite3.connect(tmp_path / CLIENTS_FILE)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
        assert connection.execute("SELECT id, tier FROM clients ORDER BY id").fetchall() == [
            ("acme", "PREMIUM"),
            ("beta", "BASIC"),
        ]
    with closing(sqlite3.connect(tmp_path / "newer" / CLIENTS_FILE)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (CLIENTS_SCHEMA.version,)
