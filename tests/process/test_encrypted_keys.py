"""No program waits at a terminal for the passphrase of an encrypted key: it is an error, wherever the key is used."""

import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from tests.tls_kit import Authority

# Each prints the name of an error, and is followed by a line of its own.
PROGRAM = """
import os, ssl, sys
os.open(sys.argv[2], os.O_RDWR)  # it becomes the controlling terminal of this session
from pathlib import Path
from api_gateway.downstream.certificates import _load_pair
from api_gateway.process.operator_client import _context
from api_gateway.process.start_check import _pem_problems
from api_gateway.settings.tls import CertificateSection
from api_gateway.storage.redis_session import _check_files
from api_gateway.transport.http1_transport import tls_context

pem = Path(sys.argv[1])
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
print("check:", [problem for _, problem in _pem_problems({"cert_file": pem})])
for name, use in {
    "upstream": lambda: tls_context(None, pem),
    "store": lambda: _check_files({"ssl_certfile": str(pem)}),
    "command": lambda: _context(None, None, pem, None),
    "listener": lambda: _load_pair(context, CertificateSection(certificate=pem), ()),
}.items():
    try:
        use()
    except Exception as error:
        print(name, "refuses:", type(error).__name__)
print("end")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a terminal of its own")
def test_no_passphrase_is_asked_for_on_a_terminal(tmp_path: Path) -> None:
    pair = Authority(tmp_path).issue("one", "localhost")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )
    both = tmp_path / "both.pem"
    both.write_bytes(pair.certificate.read_bytes() + encrypted)
    both.chmod(0o600)
    terminal, other_end = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, str(both), os.ttyname(other_end)]
    with subprocess.Popen(command, stdout=other_end, stderr=other_end, start_new_session=True) as child:
        os.close(other_end)
        said = b""
        try:
            with suppress(OSError):  # the end of a terminal
                while b"Enter PEM" not in said and (more := os.read(terminal, 4096)):
                    said += more
        finally:
            child.kill()
    os.close(terminal)
    lines = said.decode().splitlines()
    assert lines[-1] == "end", said
    assert "is encrypted; the gateway cannot ask for a passphrase" in lines[0]
    assert [line.split(" refuses:")[0] for line in lines[1:-1]] == ["upstream", "store", "command", "listener"]
