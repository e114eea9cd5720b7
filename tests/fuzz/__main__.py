"""The command: draws and runs cases for a while, and makes what is found small.

Exit code 0: nothing was found; 1: something was.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tests.fuzz.case import Case, read, write
from tests.fuzz.generator import Generator
from tests.fuzz.reduction import reduced
from tests.fuzz.session import Found, Session

BETWEEN_LOOKS = 8.0  # seconds of cases, before what they have left is looked at
REPEATS = 60  # of a case whose finding may hang on the pace
LAST = 400  # cases before a finding that are tried again


async def fuzz(seconds: float, seed: int, folder: Path) -> tuple[str, list[Case]] | None:
    """Run cases for that long; return what was found and the cases since the last look, or None."""
    generator = Generator(seed)
    session = Session(folder / "fuzzed")
    await session.start()
    until = time.monotonic() + seconds
    began = shown = time.monotonic()
    try:
        while (now := time.monotonic()) < until:
            await session.run(_endless(generator), min(until, now + BETWEEN_LOOKS))
            await session.settle()
            if time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(f"{session.count} cases in {shown - began:.0f} s", flush=True)
    except Found as found:
        print(f"found after {time.monotonic() - began:.1f} s and {session.count} cases", flush=True)
        recent = session.recent[-LAST:]
        session.kill()
        return str(found), recent
    print(f"{session.count} cases in {time.monotonic() - began:.0f} s", flush=True)
    wrong = await session.close()
    return None if wrong is None else (wrong, [])


def _endless(generator: Generator) -> Iterator[Case]:
    while True:
        yield generator.draw()


async def shown(cases: list[Case], folder: Path, repeats: int) -> str | None:
    """Run cases on a gateway of their own; return what they show."""
    session = Session(folder / f"replayed-{time.monotonic_ns()}")
    await session.start()
    try:
        await session.run(case for _ in range(repeats) for case in cases)
        await session.settle()
    except Found as found:
        session.kill()
        return str(found)
    return await session.close()


async def _main(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.replay is not None:
            wrong = await shown(read(options.replay), folder, options.repeat)
            print(wrong or "nothing is wrong")
            return 0 if wrong is None else 1
        result = await fuzz(options.minutes * 60, options.seed, folder)
        if result is None:
            return 0
        finding, cases = result
        print(f"seed {options.seed}: {finding}", flush=True)

        async def shows(some: list[Case]) -> bool:
            return await shown(some, folder, max(1, REPEATS // len(some))) is not None

        if cases:
            cases = await reduced(cases, shows, options.reduce)
            path = options.out / f"fuzz-{options.seed}-{int(time.time())}.json"
            write(path, options.seed, finding, cases)
            _print(cases, path)
        return 1


def _print(cases: list[Case], path: Path) -> None:
    for case in islice(cases, 3):
        print("client:  ", *map(str, case.client))
        for script in case.responses.values():
            print("upstream:", *map(str, script))
    print(f"{len(cases)} cases; run them again: python -m tests.fuzz --replay {path} --repeat {REPEATS}", flush=True)


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the cases of a finding instead")
    parser.add_argument("--repeat", type=int, default=1, help="how often, with --replay")
    parser.add_argument("--reduce", type=float, default=300.0, help="seconds to make a finding small (default: 300)")
    parser.add_argument("--out", type=Path, default=Path(), help="where findings are written (default: here)")
    return asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
