"""The plot for the README: CPU per request as horizontal bars, an SVG for light and dark pages."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from benchmarks.peers import Peer
from benchmarks.report import OURS, Results

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _BAR = 760, 280, 70, 66, 30, 18
_CUT = 4.0  # bars longer than this multiple of the median are cut, so that the others stay distinguishable
_STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2328; }
  .title { font-size: 16px; font-weight: 600; }
  .note { font-size: 12px; fill: #59636e; }
  .bar { fill: #9aa7b4; }
  .bar.ours { fill: #0969da; }
  text.ours { font-weight: 600; }
  .spread { stroke: #1f2328; stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc; }
    .note { fill: #9198a1; }
    .bar { fill: #656c76; }
    .bar.ours { fill: #4493f8; }
    .spread { stroke: #f0f6fc; }
  }
"""


@dataclass(frozen=True)
class Row:
    """One bar: label, median, minimum and maximum of the rounds."""

    label: str
    ours: bool
    middle: float
    least: float
    greatest: float


def plot(results: Results, peers: Sequence[Peer]) -> str:
    """Return bars of CPU µs per small request, lowest first, each with a line for the range of the rounds."""
    rows = []
    for peer in peers:
        if values := results.values("small", peer.name, "cpu"):
            row = Row(peer.title, peer.name == OURS, statistics.median(values), min(values), max(values))
            rows.append(row)
    return draw(sorted(rows, key=lambda row: row.middle))


def draw(rows: Sequence[Row]) -> str:
    """Return the SVG of these bars, from top to bottom."""
    height = _TOP + _ROW * len(rows) + 8
    end = _end(rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / end
    note = "GET of 190 bytes, 64 keep-alive connections; median and range of the rounds; lower is better"
    if any(row.greatest > end for row in rows):
        note += "; cut bars are longer"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" role="img">',
        f"<style>{_STYLE}</style>",
        '<text class="title" x="8" y="24">CPU time per request, in microseconds</text>',
        f'<text class="note" x="8" y="46">{note}</text>',
    ]
    for index, row in enumerate(rows):
        lines += _bar(row, _TOP + _ROW * index, scale)
    return "\n".join([*lines, "</svg>", ""])


def _end(rows: Sequence[Row]) -> float:
    """Return the value at the end of the axis."""
    if not rows:
        return 1.0
    bound = _CUT * statistics.median(row.middle for row in rows)
    return max((row.greatest for row in rows if row.greatest <= bound), default=bound)


def _bar(row: Row, top: float, scale: float) -> Iterator[str]:
    ours = " ours" if row.ours else ""
    middle, low, high = top + _ROW / 2, top + (_ROW - _BAR) / 2, top + (_ROW + _BAR) / 2
    room = _WIDTH - _LEFT - _RIGHT
    length = row.middle * scale
    yield f'<text class="label{ours}" x="{_LEFT - 10}" y="{middle + 5}" text-anchor="end">{escape(row.label)}</text>'
    if row.greatest * scale > room + 0.01:
        length, gap = room, _LEFT + room * 0.9
        yield _polygon(ours, [(_LEFT, low), (gap + 4, low), (gap - 4, high), (_LEFT, high)])
        yield _polygon(ours, [(gap + 10, low), (_LEFT + room, low), (_LEFT + room, high), (gap + 2, high)])
    else:
        yield _polygon(ours, [(_LEFT, low), (_LEFT + length, low), (_LEFT + length, high), (_LEFT, high)])
        ends = f'x1="{_LEFT + row.least * scale:.1f}" x2="{_LEFT + row.greatest * scale:.1f}"'
        yield f'<line class="spread" {ends} y1="{middle}" y2="{middle}"/>'
        length = max(length, row.greatest * scale)
    yield f'<text class="value{ours}" x="{_LEFT + length + 8:.1f}" y="{middle + 5}">{row.middle:,.0f}</text>'


def _polygon(ours: str, corners: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f'<polygon class="bar{ours}" points="{points}"/>'
