"""The audit log: entries survive, in order, whatever happens to the file."""

import logging
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import pytest

from api_gateway.admin.audit_log import AuditAction, AuditEntry, AuditFile, AuditLog
from api_gateway.errors import StoreUnavailable


def entry(number: int, comment: str = "") -> AuditEntry:
    return AuditEntry(
        time="2026-01-01T00:00:00.000+00:00",
        request_id=str(number),
        operator="alice",
        address="192.0.2.1",
        action=AuditAction.TIER_SET,
        subject="acme",
        before={"tier": "FREE"},
        after={"tier": "BASIC", "comment": comment},
    )


def numbers(file: AuditFile, count: int = 1000) -> list[int]:
    return [int(one.request_id) for one in file.last(count)]


def test_the_last_entries_are_read_newest_first(tmp_path: Path) -> None:
    file = AuditFile(tmp_path / "state")
    for number in range(5):
        file.append(entry(number))
    assert file.last(2) == [entry(4), entry(3)]
    assert numbers(file) == [4, 3, 2, 1, 0]
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_line_breaks_in_values_do_not_break_a_line(tmp_path: Path) -> None:
    file = AuditFile(tmp_path)
    file.append(entry(1, "a\nb\u2028c\u0085d\x1b[31m"))
    assert file.last(1) == [entry(1, "a\nb\u2028c\u0085d\x1b[31m")]
    assert file.path.read_bytes().count(b"\n") == 2, "with the line of the version"


@pytest.mark.parametrize("rest", [b'{"time": "2026', b'{"time": 1}\n', b"\xff\xfe\n", b"\n\n", b"[" * 100_000 + b"\n"])
def test_an_unfinished_or_foreign_line_costs_only_itself(tmp_path: Path, rest: bytes) -> None:
    file = AuditFile(tmp_path)
    file.append(entry(1))
    with file.path.open("ab") as opened:
        opened.write(rest)
    file.append(entry(2))
    assert numbers(file) == [2, 1]


def test_the_log_is_bounded_and_its_last_part_is_kept(tmp_path: Path) -> None:
    file = AuditFile(tmp_path, max_bytes=2000)
    for number in range(100):
        file.append(entry(number))
        kept = numbers(file)
        assert kept == list(range(number, number - len(kept), -1))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 2000 < size < 2 * 2400
    assert len(list(tmp_path.iterdir())) <= 2


def append_many(folder: str, first: int, count: int) -> None:
    for number in range(first, first + count):
        AuditFile(Path(folder), max_bytes=100_000).append(entry(number, "x" * 50))


def test_several_processes_lose_no_entry_when_the_file_is_replaced(tmp_path: Path) -> None:
    """Some 75 KB are written, so no entry is old enough to be dropped when the file is replaced at 40 KB."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=append_many, args=(str(tmp_path), 100 * i, 100)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert sorted(numbers(AuditFile(tmp_path))) == list(range(300))


def test_a_part_of_an_entry_that_a_full_disk_leaves_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write = AuditFile(tmp_path), os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, line: write(descriptor, line[: len(line) // 2]))
        with pytest.raises(OSError, match="No space left on device"):
            file.append(entry(1))
    file.append(entry(2))
    assert numbers(file) == [2]


async def test_a_change_is_logged_and_counted_even_if_the_file_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    log = AuditLog(AuditFile(tmp_path / "state"), counts, dropped)
    assert dropped == {"audit": 0}
    assert counts == dict.fromkeys(map(str, AuditAction), 0)
    with caplog.at_level(logging.INFO):
        await log.record(entry(1))
        with pytest.raises(StoreUnavailable, match="The audit log cannot be read"):  # not: nothing was changed
            await log.last(10)
    assert counts["tier_set"] == 1
    assert dropped == {"audit": 1}
    assert f"audit: {entry(1).model_dump_json(exclude_defaults=True)}" in caplog.text
    assert "cannot record a change by an operator" in caplog.text
    assert "cannot read the audit log" in caplog.text
