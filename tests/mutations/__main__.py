"""Applies each mutation to a copy of the working tree, and runs the tests that must catch it.

`python -m tests.mutations` runs all of the list in `tests/mutations/mutants.py`; with words, those whose file or text
has one of them. Exit code 1 if one survives, or if a test fails without a mutation.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutations.mutant import Mutant
from tests.mutations.mutants import MUTANTS

ROOT = Path(__file__).parents[2]
PASSED, FAILED = 0, 1  # exit codes of pytest; others are errors
TIMEOUT = 600  # seconds for the tests of one mutation; what takes longer is caught
_LOCATION = "import api_gateway; print(api_gateway.__file__)"


def copy_of_tree(folder: Path) -> Path:
    """Copy what git tracks, as it is in the working tree, and what would be added; return the copy."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    copy = folder / "tree"
    for name in listed.decode().split("\0"):
        source, place = ROOT / name, copy / name
        if name and source.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, place)
    return copy


def environment(copy: Path) -> dict[str, str]:
    """Return the variables with which the modules of the copy are imported. Raises RuntimeError if they are not."""
    variables = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", _LOCATION], cwd=copy, env=variables, capture_output=True, text=True, check=True
    )
    if not Path(found.stdout.strip()).is_relative_to(copy):
        raise RuntimeError(f"the copy in {copy} is not imported, but {found.stdout.strip()}")
    return variables


def run(tests: Sequence[str], copy: Path, variables: dict[str, str]) -> tuple[int, str]:
    """Run tests in the copy; return the exit code of pytest, FAILED after the timeout, and the last line of output."""
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--hypothesis-seed=1"]
    command = [sys.executable, "-m", "pytest", "--hypothesis-profile", "whole", *options, *tests]
    try:
        done = subprocess.run(
            command, cwd=copy, env=variables, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return FAILED, f"no end within {TIMEOUT} s"
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return done.returncode, lines[-1]


def result_of(mutant: Mutant, copy: Path, variables: dict[str, str]) -> str:
    """Return "caught", "survived", or an error, after which the file is as before."""
    path = copy / mutant.file
    text = path.read_text()
    if text.count(mutant.old) != 1:
        return f"error: the old text occurs {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        code, last = run(mutant.tests, copy, variables)
    finally:
        path.write_text(text)
    return {PASSED: "survived", FAILED: "caught"}.get(code, f"error: pytest ended with {code}: {last}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutations and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", help="only mutations whose file or text has one of these")
    options = parser.parse_args(arguments)
    chosen = [one for one in MUTANTS if not options.words or any(word in one.file + one.old for word in options.words)]
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        copy = copy_of_tree(Path(name))
        variables = environment(copy)
        code, last = run(sorted({test for one in chosen for test in one.tests}), copy, variables)
        sys.stdout.write(f"without a mutation: {last}\n")
        if code != PASSED:
            return 1
        counts = {"caught": 0, "survived": 0, "error": 0}
        for mutant in chosen:
            began = time.monotonic()
            result = result_of(mutant, copy, variables)
            counts[result.partition(":")[0]] += 1
            took = time.monotonic() - began
            sys.stdout.write(f"{result:9} {took:5.1f} s  {mutant.file}: {' '.join(mutant.old.split())[:90]}\n")
            sys.stdout.flush()
    sys.stdout.write(", ".join([f"{count} {result}" for result, count in counts.items()]) + "\n")
    return int(counts["caught"] != len(chosen))


if __name__ == "__main__":
    raise SystemExit(main())
