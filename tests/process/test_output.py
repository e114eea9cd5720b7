"""The gateway's own output: nothing that reads it, or does not, and no full disk keeps the gateway from serving."""

import errno
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from api_gateway.system import output
from api_gateway.system.output import LineHandler, LineWriter, ProcessOutput, TextStream
from tests.forked import Fork
from tests.kit import PATIENCE, RawClient, RawUpstream, ask, eventually, free_port
from tests.processes import ROOT, START, WATCHED, config_file, is_alive, process

TOKEN = "for-the-tests-of-output"
OPERATOR = {"Authorization": f"Bearer {TOKEN}"}
LISTENS = re.compile(r"Listening on .* \((http://[\w.:]+)\)")
FILL = 300  # requests whose lines are more than the 64 KiB that a pipe holds


class Pipe:
    """A pipe that is read when told to, and a writer in front of it."""

    def __init__(self, **limits: int) -> None:
        self.reader, self.end = os.pipe()
        self.lost: list[tuple[int, OSError | None]] = []
        self.writer = LineWriter(self.end, lambda lines, error: self.lost.append((lines, error)), **limits)

    def read_until(self, end: str) -> list[str]:
        """Return the lines up to `end`."""
        text = ""
        while not text.endswith(f"{end}\n"):
            text += os.read(self.reader, 1 << 16).decode()
        return text.splitlines()

    def close(self) -> None:
        """Close both ends, once the thread has nothing left to write to a number that may then be another file's."""
        os.close(self.reader)
        assert self.writer.flush(PATIENCE)
        os.close(self.end)


@pytest.fixture
def pipe() -> Iterator[Callable[..., Pipe]]:
    made: list[Pipe] = []

    def make(**limits: int) -> Pipe:
        made.append(Pipe(**limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


def padded(number: int, size: int = 100) -> str:
    return f"{number:08d}".ljust(size, ".")


def test_lines_are_written_in_order_and_without_being_asked_to(pipe: Callable[..., Pipe]) -> None:
    one = pipe()
    for number in range(5000):
        one.writer.write(f"{padded(number)}\n")
    one.writer.write("end\n")
    assert one.read_until("end") == [*(padded(number) for number in range(5000)), "end"]
    assert not one.lost


def test_a_reader_that_stops_costs_the_newest_lines_and_never_blocks_the_writer(pipe: Callable[..., Pipe]) -> None:
    """The queue is bounded; what was queued before it was full arrives in order once the reader goes on."""
    one = pipe(max_bytes=200_000)
    for number in range(20_000):  # 2 MB, of which the pipe takes 64 KiB
        one.writer.write(f"{padded(number, 99)}\n")
    assert not one.writer.flush(0.05)
    began = time.monotonic()
    assert not one.writer.flush(3600)  # it is not waited for twice
    assert time.monotonic() - began < 60
    lost = sum(lines for lines, _ in one.lost)
    assert 20_000 - (200_000 + 65_536) // 100 - 1 <= lost < 20_000
    received: list[str] = []
    reading = threading.Thread(target=lambda: received.extend(one.read_until("end")))
    reading.start()
    eventually(lambda: one.writer.flush(PATIENCE), "the rest is written")
    one.writer.write("end\n")
    reading.join(PATIENCE)
    assert received == [*sorted(received[:-1]), "end"]
    assert len(received) == 20_000 - lost + 1
    assert set(map(len, received[:-1])) == {99}


def test_the_number_of_queued_entries_is_bounded_too(pipe: Callable[..., Pipe]) -> None:
    one = pipe(max_entries=10)
    one.writer.write("." * 100_000 + "\n")  # blocks the thread
    eventually(lambda: not one.writer._entries, "the thread has taken the first line")
    for _ in range(15):
        one.writer.write("a\nb\n")
    assert one.lost == [(2, None)] * 5


def test_lines_that_the_thread_renders_are_in_order_with_others(pipe: Callable[..., Pipe]) -> None:
    """One that cannot be rendered is missing, and no other."""
    one = pipe()
    one.writer.write("before\n")
    for number in range(300):
        one.writer.write_later(lambda record, at: f"{[1, 2][record]} at {at}\n", number % 3, float(number), 10)
        one.writer.write(f"{number}\n")
    one.writer.write("end\n")
    expected = ["before"]
    for number in range(300):
        expected += ([] if number % 3 == 2 else [f"{number % 3 + 1} at {float(number)}"]) + [str(number)]
    assert one.read_until("end") == [*expected, "end"]
    assert not one.lost


def test_lines_that_are_not_rendered_yet_take_part_in_the_limit_by_their_size(pipe: Callable[..., Pipe]) -> None:
    one = pipe(max_bytes=150_000)
    one.writer.write("." * 100_000 + "\n")  # blocks the thread
    for _ in range(7):
        one.writer.write_later(lambda record, _: f"{record}\n", "late", 0.0, 10_000)
    assert one.lost == [(1, None)] * 3
    reading = threading.Thread(target=lambda: one.read_until("end"))
    reading.start()
    eventually(lambda: one.writer.flush(PATIENCE), "the rest is written")
    one.writer.write("end\n")
    reading.join(PATIENCE)
    assert one.writer.flush(PATIENCE)
    assert one.writer._pending == 0


def test_lines_of_several_threads_are_neither_torn_nor_mixed(pipe: Callable[..., Pipe]) -> None:
    """Also those printed piece by piece, as `print` and tracebacks do."""
    one = pipe()
    stream = TextStream(one.writer, one.end)

    def chat(name: str) -> None:
        for number in range(500):
            print(name, name * 200, number, sep="|", file=stream)

    threads = [threading.Thread(target=chat, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    reading: list[str] = []
    reader = threading.Thread(target=lambda: reading.extend(one.read_until("end")))
    reader.start()
    for thread in threads:
        thread.join()
    print("end", file=stream)
    reader.join(PATIENCE)
    for name in "abcd":
        mine = [line for line in reading if line.startswith(name)]
        assert mine == [f"{name}|{name * 200}|{number}" for number in range(500)]


def test_a_line_may_be_finished_by_a_flush(pipe: Callable[..., Pipe]) -> None:
    one = pipe()
    stream = TextStream(one.writer, one.end)
    print("Password: ", end="", file=stream, flush=True)
    assert one.writer.flush(PATIENCE)
    assert os.read(one.reader, 100) == b"Password: "


def test_a_failed_write_loses_its_lines_and_the_next_begins_on_a_line_of_its_own(
    pipe: Callable[..., Pipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full in the middle of a line leaves half of it."""
    one = pipe()
    really = os.write

    def half_full(descriptor: int, data: bytes) -> int:
        if descriptor != one.end or not data.startswith(b"lost"):
            return really(descriptor, data)
        if data.startswith(b"lost"):
            really(descriptor, data[:2])
            monkeypatch.setattr(os, "write", full)
        return 2

    def full(descriptor: int, data: bytes) -> int:
        if descriptor != one.end:
            return really(descriptor, data)
        monkeypatch.setattr(os, "write", really)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", half_full)
    one.writer.write("lost\n")
    assert one.writer.flush(PATIENCE)
    one.writer.write("kept\n")
    one.writer.write("end\n")
    assert one.read_until("end") == ["lo", "kept", "end"]
    assert [(lines, error.errno) for lines, error in one.lost if error] == [(1, errno.ENOSPC)]


def test_a_descriptor_that_another_process_made_non_blocking_loses_nothing(pipe: Callable[..., Pipe]) -> None:
    one = pipe()
    os.set_blocking(one.end, False)
    for number in range(5000):
        one.writer.write(f"{padded(number)}\n")
    one.writer.write("end\n")
    assert len(one.read_until("end")) == 5001
    assert not one.lost


def test_a_log_that_cannot_be_written_never_blocks_who_logs(pipe: Callable[..., Pipe]) -> None:
    one = pipe(max_bytes=10_000)
    logger = logging.getLogger("chatty")
    logger.propagate = False
    logger.addHandler(LineHandler(one.writer))
    for number in range(5000):
        logger.warning("%d %s", number, "." * 100)
    assert one.lost


def test_flushing_a_handler_writes_what_was_logged(pipe: Callable[..., Pipe]) -> None:
    """As it is done before a process ends at once."""
    one = pipe()
    handler = LineHandler(one.writer)
    handler.emit(logging.makeLogRecord({"msg": "the end"}))
    handler.flush()
    assert os.read(one.reader, 100) == b"the end\n"


def test_what_was_lost_is_said_at_most_once_an_interval(caplog: pytest.LogCaptureFixture) -> None:
    lossy = ProcessOutput(delay=0.05, interval=3600)
    on_loss = lossy.out._on_loss
    with caplog.at_level(logging.WARNING, logger="api_gateway.system.output"):
        for _ in range(1000):
            on_loss(2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        eventually(lambda: bool(caplog.messages), "the loss is reported")
        on_loss(1, None)
        eventually(lossy._has_losses.is_set, "the later loss is known")
    (message,) = caplog.messages
    assert message.endswith("No space left on device")
    assert (lossy.dropped["stdout"], lossy.errors["stdout"]) == (2001, 1000)
    caplog.clear()
    lossy.report()  # as at the end of the process
    assert "2001 since the start" in caplog.messages[0]


def test_warnings_and_tracebacks_of_threads_pass_through_the_queue(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ProcessOutput()
    monkeypatch.setattr(output, "process_output", lambda: made)
    with output.redirected():
        print("printed")
        print("complained", file=sys.stderr)  # as warnings do
        threading.__excepthook__(threading.ExceptHookArgs((ValueError, ValueError("in a thread"), None, None)))
    written = capfd.readouterr()
    assert written.out == "printed\n"
    assert "complained\n" in written.err
    assert "ValueError: in a thread" in written.err


# The whole gateway


def is_listening(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), PATIENCE):
        return True
    return False


def options(folder: Path, upstream: str, port: int) -> list[str]:
    """Write a configuration; return the options of a gateway with it."""
    settings = f"tiers: {{FREE: {{rate: 1000000, capacity: 1000000}}}}\nadmin: {{token: {TOKEN}}}\n"
    return ["--config", config_file(folder, upstream, settings), "--port", str(port)]


def variables(folder: Path) -> dict[str, str]:
    return {**WATCHED, "PATH": "/usr/bin:/bin", "XDG_STATE_HOME": str(folder)}


@contextmanager
def gateway(folder: Path, upstream: str, redirection: str, **streams: Any) -> Iterator[Any]:
    """Run the gateway under a shell's redirection; yield the process and its address."""
    port = free_port()
    start = [sys.executable, str(ROOT / "run_gateway.py"), *options(folder, upstream, port)]
    command = f"exec {shlex.join(start)} {redirection}"
    with serving(subprocess.Popen(["sh", "-c", command], cwd=folder, env=variables(folder), **streams), port) as found:
        yield found


@contextmanager
def serving(popen: "subprocess.Popen[bytes] | Fork", port: int) -> Iterator[Any]:
    """Yield a gateway that has been started and its address, once it listens; end it afterwards."""
    try:
        eventually(lambda: popen.poll() is not None or is_listening(port), "it listens", START)
        assert popen.poll() is None, "the gateway did not start"
        yield popen, f"http://127.0.0.1:{port}"
    finally:
        if is_alive(popen.pid):
            popen.kill()
        popen.wait()


def serve(url: str, requests: int = FILL) -> None:
    """Make requests, and see that all are answered and that the gateway is alive."""
    with RawClient(int(url.rpartition(":")[2])) as client:
        assert {client.get("/api/up/x").status for _ in range(requests)} == {200}
    assert ask(f"{url}/healthz").status == 200


def test_a_reader_that_never_reads_stops_neither_requests_nor_the_end(
    tmp_path: Path, upstream: Callable[..., RawUpstream]
) -> None:
    """Neither standard output nor standard error is read."""
    reader, end = os.pipe()
    try:
        with gateway(tmp_path, upstream().url, "2>&1", stdout=end) as (popen, url):
            serve(url)
            popen.send_signal(signal.SIGTERM)
            assert popen.wait(PATIENCE) == 0
    finally:
        os.close(reader)
        os.close(end)


def test_a_full_disk_is_counted_and_said_once(tmp_path: Path, upstream: Callable[..., RawUpstream]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    log, port = tmp_path / "log", free_port()
    arguments = options(tmp_path, upstream().url, port)
    full = Path("/dev/full")
    fork = Fork("api_gateway", arguments, cwd=tmp_path, env=variables(tmp_path), stdout=full, stderr=log)
    with serving(fork, port) as (popen, url):
        serve(url)
        eventually(lambda: "lines were dropped" in log.read_text(), "it is said")

        def output() -> Any:
            return ask(f"{url}/metrics", headers=OPERATOR).json()["output"]

        eventually(lambda: output()["dropped_lines"]["stdout"] >= FILL, "every line is counted")
        counted = output()
        text = ask(f"{url}/metrics?format=prometheus", headers=OPERATOR).body.decode()
        popen.terminate()
        assert popen.wait(PATIENCE) == 0
    assert counted["write_errors"]["stdout"] > 0
    assert 'gateway_output_dropped_lines_total{stream="stdout"}' in text
    said = [line for line in log.read_text().splitlines() if "process.server: " not in line]
    assert len(said) <= 2  # in its minute, and at the end what came after it
    assert all("standard output: " in line and "No space left on device" in line for line in said)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_descriptors_are_no_reason_to_abort(
    redirection: str, tmp_path: Path, upstream: Callable[..., RawUpstream]
) -> None:
    with gateway(tmp_path, upstream().url, redirection) as (popen, url):
        serve(url, 20)
        popen.terminate()
        assert popen.wait(PATIENCE) == 0


def test_every_line_is_written_before_the_end(tmp_path: Path, upstream: Callable[..., RawUpstream]) -> None:
    log = tmp_path / "access"
    with log.open("wb") as stdout, gateway(tmp_path, upstream().url, "", stdout=stdout) as (popen, url):
        serve(url)
        popen.terminate()
        assert popen.wait(PATIENCE) == 0
    lines = [line for line in log.read_text().splitlines() if line.startswith("{")]
    assert len([json.loads(line) for line in lines]) == FILL


@pytest.mark.parametrize("workers", ["1", "2"])
def test_with_json_each_line_is_an_object_from_the_start(tmp_path: Path, workers: str) -> None:
    up = RawUpstream()
    path = config_file(tmp_path, up.url, f"state_dir: {tmp_path / 'state'}\nlog: {{format: json}}")
    try:
        with process("-m", "api_gateway", "--config", path, "--port", "0", "--workers", workers, cwd=tmp_path) as one:
            eventually(lambda: LISTENS.search(one.errors) is not None, "the log says that it listens", START)
            found = LISTENS.search(one.errors)
            assert found is not None
            assert ask(f"{found[1]}/api/up/1", headers={"X-Client-ID": "acme"}).status == 200
            eventually(lambda: "/api/up/1" in one.output, "the access log has the request")
            one.signal(signal.SIGTERM)
            assert one.exit_code() == 0
            accesses = [json.loads(line) for line in one.output.splitlines()]
            messages = [json.loads(line) for line in one.errors.splitlines()]
    finally:
        up.close()
    assert [line["path"] for line in accesses] == ["/api/up/1"]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, messages))
    assert {line["level"] for line in messages if "Listening on" in line["message"]} == {"info"}
