"""Runs a program as long as another process holds the other end of a pipe, and then removes its folder.

A separate program that is run by its path, so it imports nothing of the gateway. When the supervisor and the workers
end, by `kill -9` too, the system closes their ends of the pipe, so the program does not outlive them.

    python server_guardian.py DESCRIPTOR FOLDER PROGRAM [ARGUMENT ...]
"""

import os
import shutil
import signal
import subprocess
import sys
import threading


def main(descriptor: int, folder: str, command: list[str]) -> int:
    """Run the command; return its exit code, or 128 plus the number of the signal that ended it."""
    program = subprocess.Popen(command, stdin=subprocess.DEVNULL)  # noqa: S603 - the caller chooses the command
    signal.signal(signal.SIGTERM, lambda *_: program.terminate())

    is_cut = threading.Event()

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        is_cut.set()
        program.terminate()

    threading.Thread(target=watch, daemon=True).start()
    code = program.wait()
    if is_cut.is_set():  # no other process is left to remove it
        shutil.rmtree(folder, ignore_errors=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
