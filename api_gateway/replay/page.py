"""The result of a replay as one HTML page with plots: no script, and nothing from elsewhere."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from typing import Any

from api_gateway.replay.report import Document

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 200, 56, 24  # of a plot, in pixels
MAX_CLIENTS = 200  # in the table
_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --faint: #555; --rule: #ddd; --log: #767676; --current: #2b6cb0;
  --candidate: #c53030; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --faint: #aaa; --rule: #444; --log: #999; --current: #63b3ed; --candidate: #fc8181; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: var(--text); }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; }
td:first-child { min-width: 6rem; max-width: 20rem; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; }
svg { max-width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint); }
.axis { stroke: var(--log); }
polyline.log { stroke: var(--log); } polyline.current { stroke: var(--current); stroke-dasharray: 6 3; }
polyline.candidate { stroke: var(--candidate); } rect.candidate { fill: var(--candidate); }
svg text.log { fill: var(--log); } svg text.current { fill: var(--current); }
svg text.candidate { fill: var(--candidate); } polyline { fill: none !important; stroke-width: 1.5; }
""".strip()
_COLUMNS = (
    "client",
    "tier",
    "requests",
    "limited_before",
    "limited",
    "newly_limited",
    "newly_allowed",
    "longest_wait_seconds",
    "limited_seconds",
    "first_newly_limited",
    "last_newly_limited",
)


def page_of(document: Document) -> str:
    """Return the page. Its policy permits its own style, by hash, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    totals, log = document["totals"], document["log"]
    current = "the log" if document["current"] is None else document["current"]
    parts = [
        f"<h1>Replay of {escape(', '.join(log['files']))}</h1>",
        (
            f"<p>{totals['decisions']:,} decisions from {escape(str(log['begin']))} to {escape(str(log['end']))};"
            f" candidate <b>{escape(document['candidate'])}</b>, compared with <b>{escape(current)}</b>.</p>"
        ),
        _table(("", "log", "current", "candidate"), [_limited(totals)]),
        (
            f"<p>Newly limited: <b>{totals['newly_limited']:,}</b> requests of"
            f" {totals['clients_newly_limited']:,} clients. Newly allowed: {totals['newly_allowed']:,}.</p>"
        ),
        "<h2>Limited requests over time</h2>",
        _lines(document["timeline"], document["current"] is not None),
        "<h2>Newly limited requests by tier</h2>",
        _bars([(name, tier["newly_limited"]) for name, tier in document["tiers"].items()]),
        "<h2>Newly limited requests by limit</h2>",
        _bars(list(document["newly_limited_by"].items())),
        "<h2>Clients</h2>",
        _table(_COLUMNS, [[client[name] for name in _COLUMNS] for client in document["clients"][:MAX_CLIENTS]]),
        _notes("Not evaluable", document["not_evaluable"]),
        _notes("Not known", document["cannot_know"]),
        _notes("Of the logs", log["messages"]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f"<title>Replay</title><style>{_STYLE}</style></head>\n<body>{''.join(parts)}</body></html>\n"
    )


def _limited(totals: Document) -> list[Any]:
    by_current = totals["limited_by_current"]
    return ["limited", totals["limited_in_log"], "-" if by_current is None else by_current, totals["limited"]]


def _lines(timeline: Document, has_current: bool) -> str:  # noqa: FBT001 - of a private function
    names = ["log", *(["current"] if has_current else []), "candidate"]
    top = max(1, *(max(timeline[name]) for name in names))
    count = len(timeline["log"])
    drawn = [_frame(f"{top} in {timeline['slot_seconds']:.3g} s")]
    for index, name in enumerate(names):
        points = " ".join(
            f"{LEFT + slot * (WIDTH - LEFT) / max(count - 1, 1):.1f},{(HEIGHT - BOTTOM) * (1 - value / top):.1f}"
            for slot, value in enumerate(timeline[name])
        )
        drawn.append(f'<polyline class="{name}" points="{points}"/>')
        drawn.append(f'<text class="{name}" x="{LEFT + 8 + index * 90}" y="{HEIGHT - 6}">{name}</text>')
    return _svg(HEIGHT, "Limited requests over time", drawn)


def _bars(values: Sequence[tuple[str, int]]) -> str:
    if not any(value for _, value in values):
        return "<p>None.</p>"
    top = max(value for _, value in values)
    drawn = []
    for row, (name, value) in enumerate(values):
        length = (WIDTH - 260) * value / top
        drawn.append(f'<text x="0" y="{row * 22 + 14}">{escape(name)}</text>')
        drawn.append(f'<rect class="candidate" x="160" y="{row * 22 + 3}" width="{length:.1f}" height="14"/>')
        drawn.append(f'<text x="{166 + length:.1f}" y="{row * 22 + 14}">{value:,}</text>')
    return _svg(22 * len(values), "Newly limited requests", drawn)


def _frame(label: str) -> str:
    floor = HEIGHT - BOTTOM
    return (
        f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{WIDTH}" y2="{floor}"/>'
        f'<line class="axis" x1="{LEFT}" y1="0" x2="{LEFT}" y2="{floor}"/><text x="{LEFT + 6}" y="12">{label}</text>'
    )


def _svg(height: int, title: str, drawn: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
        f"<title>{title}</title>{''.join(drawn)}</svg>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:,.3f}</td>'
    if isinstance(value, int):
        return f'<td class="n">{value:,}</td>'
    return f"<td>{'' if value is None else escape(str(value))}</td>"


def _notes(title: str, notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f"<h2>{title}</h2><ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>"
