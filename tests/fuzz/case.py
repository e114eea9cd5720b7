"""What is run: the steps of one client on one connection, and of the upstream for each of its requests."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEND, PAUSE, FIN, RESET = "send", "pause", "fin", "reset"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing a peer does: send `data`, pause for `seconds`, say that no more comes (FIN), or reset."""

    kind: str
    data: bytes = b""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.data!r}" if self.kind == SEND else f"[{self.kind} {self.seconds or ''}]".replace(" ]", "]")


Script = tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One connection of a client.

    Each of its requests has a nonce, which is in its target, and in every response to it. `expected` holds what each
    response must be, in order, as method, status and body; it is empty where something is mutated.
    """

    client: Script
    nonces: tuple[bytes, ...]
    responses: dict[bytes, Script] = field(default_factory=dict)
    expected: tuple[tuple[str, int, bytes], ...] = ()
    is_faulty: bool = False  # its upstream may answer more than it was asked: what it says elsewhere is its own fault

    def state(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "client": [_state(step) for step in self.client],
            "nonces": [nonce.decode("latin-1") for nonce in self.nonces],
            "responses": {
                nonce.decode("latin-1"): [_state(step) for step in steps] for nonce, steps in self.responses.items()
            },
            "expected": [[method, status, body.decode("latin-1")] for method, status, body in self.expected],
            "is_faulty": self.is_faulty,
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Case":
        """Return the case whose `state` this is."""
        return cls(
            tuple(map(_step, state["client"])),
            tuple(nonce.encode("latin-1") for nonce in state["nonces"]),
            {nonce.encode("latin-1"): tuple(map(_step, steps)) for nonce, steps in state["responses"].items()},
            tuple((method, status, body.encode("latin-1")) for method, status, body in state["expected"]),
            state["is_faulty"],
        )


def _state(step: Step) -> list[Any]:
    return [step.kind, step.data.decode("latin-1"), step.seconds]


def _step(state: list[Any]) -> Step:
    return Step(state[0], state[1].encode("latin-1"), state[2])


def write(path: Path, seed: int, finding: str, cases: list[Case]) -> None:
    """Write a finding, to be replayed."""
    path.write_text(
        json.dumps({"seed": seed, "finding": finding, "cases": [case.state() for case in cases]}, indent=1)
    )


def read(path: Path) -> list[Case]:
    """Return the cases of a finding."""
    return [Case.of(state) for state in json.loads(path.read_text())["cases"]]
