"""Results of a run, and their report: medians and ranges as Markdown tables."""

import statistics
from collections.abc import Callable, Sequence

from benchmarks.cases import TITLES
from benchmarks.peers import Peer

OURS = "gateway"
_MB = 2**20

Figures = dict[str, float]


class Results:
    """Figures of each measurement by case and peer, or the reason of its failure."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, list[Figures]]] = {}
        self.failures: dict[str, dict[str, str]] = {}

    def __repr__(self) -> str:
        counts = {case: sum(map(len, peers.values())) for case, peers in self.found.items()}
        return f"<Results [{counts}, {sum(map(len, self.failures.values()))} failed]>"

    def add(self, case: str, peer: str, figures: Figures) -> None:
        """Add the figures of one measurement."""
        self.found.setdefault(case, {}).setdefault(peer, []).append(figures)

    def fail(self, case: str, peer: str, reason: str) -> None:
        """Add the reason of a failed measurement."""
        self.failures.setdefault(case, {})[peer] = reason

    def values(self, case: str, peer: str, figure: str) -> list[float]:
        """Return one figure of all rounds; empty unless all rounds succeeded."""
        if peer in self.failures.get(case, {}):
            return []
        return [figures[figure] for figures in self.found.get(case, {}).get(peer, [])]

    def as_json(self) -> dict[str, object]:
        """Return all results in JSON's types."""
        return {"found": self.found, "failures": self.failures}


def tables(results: Results, peers: Sequence[Peer]) -> str:
    """Return Markdown tables: three of all requests by case and peer, one of each other case; then the failures."""
    measured = [case for case in TITLES if case in results.found or case in results.failures]
    requests = [case for case in measured if case not in _SHAPES]
    shown = [_matrix(results, title, requests, peers, cell) for title, cell in _MATRICES if requests]
    shown += [_table(results, case, peers) for case in measured if case in _SHAPES]
    failed = [f"{peer}, {case}: {why}" for case, whys in results.failures.items() for peer, why in whys.items()]
    return "\n".join([*shown, *(["Failed:", "", *failed, ""] if failed else [])])


def _matrix(
    results: Results,
    title: str,
    cases: Sequence[str],
    peers: Sequence[Peer],
    cell: Callable[[Results, str, str], str],
) -> str:
    """Return a table with a row for each case and a column for each peer."""
    names = [peer.title.partition(",")[0] if peer.name != "compiled" else "compiled" for peer in peers]
    lines = [f"{title}:", "", f"| | {' | '.join(names)} |", f"|---{'|---:' * len(names)}|"]
    for case in cases:
        cells = [_cell(results, case, peer, cell) for peer in peers]
        lines.append(f"| {TITLES[case]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(results: Results, case: str, peer: Peer, cell: Callable[[Results, str, str], str]) -> str:
    if not peer.takes(case):
        return ""
    return "failed" if peer.name in results.failures.get(case, {}) else cell(results, case, peer.name)


def _cpu(results: Results, case: str, peer: str) -> str:
    values = results.values(case, peer, "cpu")
    return f"{statistics.median(values):,.0f} ({spread(values)})"


def _ratio(results: Results, case: str, peer: str) -> str:
    ours = results.values(case, OURS, "cpu")
    return f"{statistics.median(results.values(case, peer, 'cpu')) / statistics.median(ours):.2f}" if ours else ""


def _rate(results: Results, case: str, peer: str) -> str:
    return f"{statistics.median(results.values(case, peer, 'rate')):,.0f}"


_MATRICES = (
    ("CPU time per request in microseconds, median and range", _cpu),
    ("CPU time per request as a multiple of this gateway's", _ratio),
    ("Requests per second", _rate),
)


def _table(results: Results, case: str, peers: Sequence[Peer]) -> str:
    columns, row = _SHAPES[case]
    lines = [f"{TITLES[case]}:", "", f"| | {' | '.join(columns)} |", f"|---{'|---:' * len(columns)}|"]
    for peer in peers:
        if peer.takes(case):
            failed = peer.name in results.failures.get(case, {})
            cells = ["failed", *[""] * (len(columns) - 1)] if failed else row(results, case, peer.name)
            lines.append(f"| {peer.title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """Return the range."""
    return f"{min(values):,.0f} to {max(values):,.0f}"


_LATENCY = ("p50", "least to most", "p99", "least to most")


def _latency_row(results: Results, case: str, peer: str) -> list[str]:
    columns = [results.values(case, peer, figure) for figure in ("p50", "p99")]
    return [cell for values in columns for cell in (f"{statistics.median(values):,.0f}", spread(values))]


_MEMORY = ("at start", "with 1,000 idle clients", "peak, 8 bodies of 100 MB streaming both ways")


def _memory_row(results: Results, case: str, peer: str) -> list[str]:
    return [
        f"{statistics.median(results.values(case, peer, figure)) / _MB:,.0f}"
        for figure in ("start", "idle", "streaming")
    ]


_CONNECTIONS = ("MB", "bytes per connection")


def _connections_row(results: Results, case: str, peer: str) -> list[str]:
    used, each = (statistics.median(results.values(case, peer, figure)) for figure in ("used", "each"))
    return [f"{used / _MB:,.0f}", f"{each:,.0f}"]


_SHAPES: dict[str, tuple[Sequence[str], Callable[[Results, str, str], list[str]]]] = {
    "latency": (_LATENCY, _latency_row),
    "memory": (_MEMORY, _memory_row),
    "idle": (_CONNECTIONS, _connections_row),
    "active": (_CONNECTIONS, _connections_row),
}
