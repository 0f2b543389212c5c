"""One self-contained HTML page of a run: no script, no network, readable on a phone, light and dark."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable

from ..peers import PEERS
from ..schema import OURS, Row, Run
from .words import (
    COLUMNS,
    GLOSSARY,
    METHOD,
    METHOD_CPU,
    METHOD_GPU,
    answers,
    caveats,
    cells,
    command,
    device,
    duration,
    ends,
    groups,
    headline,
    number,
    on_gpu,
    outcome,
    peers_of,
    rate,
    ratio,
    score,
    subject,
    versions,
)

CAPTIONS = {
    "throughput": "How fast, against whom. Whiskers are quartiles.",
    "latency": "How the time of an image falls as the batch grows, until the device is full.",
    "waterfall": "What each step from eager PyTorch to fused kernels gains, and what is left to the roofline bound.",
    "roofline": "How close to the measured peaks: on a line, nothing is left to gain.",
    "memory": "What a call needs beside weights and input.",
    "error": "Nobody is fast by being wrong: the limit is twice plain PyTorch's own error in float32, 1.5 times it in "
    "the half precisions.",
}

STYLE = """
:root { --ink: #1d2329; --quiet: #5c6670; --paper: #fff; --line: #e3e7eb; --soft: #f5f7f9; --accent: #0b62a8;
        --worse: #a8430a; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --quiet: #9aa5b0; --paper: #14181c; --line: #2c333a; --soft: #1b2026; --accent: #6db3f2;
          --worse: #f0975f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
       Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 74rem; margin: 0 auto; padding: 2rem 1.1rem 5rem; }
header, .prose { max-width: 44rem; }
.kicker { color: var(--quiet); margin: 0; font-size: .9rem; }
.answers { margin-top: 1.8rem; }
h1 { font-size: 1.3rem; line-height: 1.4; font-weight: 600; margin: .4rem 0 1.2rem; text-wrap: pretty; }
h2 { font-size: 1.2rem; font-weight: 600; margin: 3.2rem 0 .6rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.8rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .5rem 0; }
.notice { border-left: 3px solid var(--worse); padding: .1rem 0 .1rem .9rem; margin: .6rem 0; }
dl { margin: 0; }
.answers div, .facts div { border-top: 1px solid var(--line); padding: .7rem 0; }
dt { font-weight: 600; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
dd p:first-child { margin-top: 0; }
.facts dt { font-weight: 400; color: var(--quiet); }
@media (min-width: 50rem) {
  .answers div, .facts div { display: grid; grid-template-columns: 13rem 1fr; gap: 1rem; }
}
code, pre { font: .9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; margin: .6rem 0; }
.pictures { display: grid; gap: 2rem; grid-template-columns: minmax(0, 1fr); align-items: start; }
@media (min-width: 50rem) { .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
             border-radius: 6px; padding: 3px; }
figcaption { color: var(--quiet); font-size: .9rem; margin-top: .4rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .32rem .55rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--quiet); font-weight: 500; background: var(--soft); white-space: normal;
           vertical-align: bottom; }
th:first-child, td.wide, thead th.wide { text-align: left; }
tbody th { font-weight: 400; }
@media (min-width: 50rem) { tbody th:first-child { position: sticky; left: 0; background: var(--paper); } }
td.wide { white-space: normal; min-width: 14rem; color: var(--quiet); }
.ours, .faster { color: var(--accent); }
.ours > *, tr.ours td { font-weight: 600; }
.slower, .bad { color: var(--worse); }
.tie, .none { color: var(--quiet); }
small { display: block; color: var(--quiet); font-size: .8em; font-weight: 400; }
details { border-top: 1px solid var(--line); }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; padding: .7rem 0; overflow-wrap: anywhere; }
a { color: var(--accent); }
"""


class Markup(str):
    """Text that is HTML already; every other string is escaped where it enters an element."""


def _element(name: str, *content: str, **attributes: str) -> Markup:
    """An element. An empty attribute is left out; a trailing underscore keeps a name clear of Python's keywords."""
    opening = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value)
    return Markup(f"<{name}{opening}>{_joined(content)}</{name}>")


def _joined(content: Iterable[str]) -> Markup:
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in content))


def render(run: Run, pictures: dict[str, bytes]) -> str:
    """The page of a run with these PNGs, by file name."""
    title = f"fastvit on {device(run)}"
    body = [
        _header(run, title),
        _answers(run),
        *([_pictures(pictures)] if pictures else []),
        *(_section(f"Every case of {group}", _scoreboard(rows)) for group, rows in groups(run.rows).items()),
        _section("All entries", *_entries(run.rows)),
        _section("How times were taken", _list([*METHOD, METHOD_GPU if on_gpu(run) else METHOD_CPU])),
        _section("What the words mean", _facts(GLOSSARY | _peers(run))),
        _section("Environment and settings", *_records(run)),
    ]
    head = [
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        _element("title", title),
        _element("style", Markup(STYLE)),
    ]
    document = _element("html", _element("head", *head), _element("body", _element("main", *body)), lang="en")
    return f"<!doctype html>\n{document}\n"


def _section(title: str, *content: str) -> Markup:
    return _element("section", _element("h2", title), *content)


def _list(sentences: Iterable[str]) -> Markup:
    return _element("div", *(_element("p", sentence) for sentence in sentences), class_="prose")


def _facts(facts: dict[str, str], class_: str = "facts") -> Markup:
    rows = (_element("div", _element("dt", name), _element("dd", value)) for name, value in facts.items())
    return _element("dl", *rows, class_=class_)


def _header(run: Run, title: str) -> Markup:
    started = run.started.replace("T", " ")[:16]
    return _element(
        "header",
        _element("p", f"{title}, {started} UTC; {versions(run)}", class_="kicker"),
        _element("h1", headline(run)),
        *(_element("p", sentence, class_="notice") for sentence in caveats(run)),
    )


def _peers(run: Run) -> dict[str, str]:
    """What the peers of the run are, by name."""
    return {name: PEERS[name].what for name in peers_of(run.rows) if name in PEERS}


def _answers(run: Run) -> Markup:
    rows = [
        _element("div", _element("dt", question), _element("dd", *(_element("p", sentence) for sentence in sentences)))
        for question, sentences in answers(run).items()
    ]
    how = [
        _element("p", "On such a machine, in a checkout of this commit:"),
        _element("pre", command(run)),
        _element("p", "What two results files differ in, with an exit status:"),
        _element("pre", "fastvit bench compare A.json B.json"),
    ]
    rows.append(_element("div", _element("dt", "How to check?"), _element("dd", *how)))
    return _element("dl", *rows, class_="answers")


def _pictures(pictures: dict[str, bytes]) -> Markup:
    figures = []
    for name, png in pictures.items():
        stem = name.removesuffix(".png")
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        image = Markup(f'<img src="{source}" alt="{html.escape(stem.replace("-", " "))}">')
        figures.append(_element("figure", image, _element("figcaption", CAPTIONS[stem.partition("-")[0]])))
    return _section("Pictures", _element("div", *figures, class_="pictures"))


def _table(headings: Iterable[str], rows: Iterable[Markup]) -> Markup:
    head = _element(
        "thead",
        _element("tr", *(_element("th", heading, class_="wide" if heading == REMARKS else "") for heading in headings)),
    )
    return _element("div", _element("table", head, _element("tbody", *rows)), class_="scroll", tabindex="0")


def _scoreboard(rows: list[Row]) -> Markup:
    """A line for each case: our speed, and the ratio to every peer that any case has."""
    peers = [name for name in peers_of(rows) if any(_present(row, name) for row in rows)]
    lines = []
    for row in rows:
        what = ", ".join([*([row.op] if row.op else []), row.dtype, f"batch {row.batch}"])
        name = _element("th", subject(row), _element("small", what))
        if row.status != "timed":
            reason = _element("td", f"{row.status}: {row.reason}", class_="wide bad", colspan=str(len(peers) + 2))
            lines.append(_element("tr", name, reason))
            continue
        ours = cells(row, OURS)
        lines.append(
            _element(
                "tr",
                name,
                _element("td", ours["images/s"], class_="ours"),
                _element("td", ours["of bound"]),
                *(_score(row, peer) for peer in peers),
            )
        )
    unit = "ours, a call" if rows[0].op else "ours, images/s"
    entries = [entry for row in rows for entry in row.entries.values() if entry.ratio]
    intervals = any(ends(entry.ratio, entry.verdict) for entry in entries)
    note = _element(
        "p",
        "Under each peer: our speed over its speed, above 1 ours is faster."
        + (" Below it the interval of that ratio, which holds 1 where it is a tie." if intervals else "")
        + (GRAPHS if any(entry.graph_ratio for entry in entries) else ""),
        class_="kicker",
    )
    return _joined([note, _table(["case", unit, "of bound", *peers], lines)])


def _present(row: Row, name: str) -> bool:
    return name in row.entries and row.entries[name].status != "absent"


def _score(row: Row, name: str) -> Markup:
    if not _present(row, name):
        return _element("td", "–", class_="none")
    entry = row.entries[name]
    if entry.ratio is None:
        return _element("td", entry.status, class_="bad")
    below = [_element("small", "–".join(interval))] if (interval := ends(entry.ratio, entry.verdict)) else []
    if entry.graph_ratio:
        shown = f"graph {score(entry.graph_ratio, entry.graph_verdict)}"
        below.append(_element("small", shown, class_=entry.graph_verdict))
    return _element("td", score(entry.ratio, entry.verdict), *below, class_=entry.verdict)


def _entries(rows: list[Row]) -> list[Markup]:
    """All that was measured, in one folded section for each model, op and mode."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(" ".join([subject(row), *([row.op] if row.op else []), row.mode]), []).append(row)
    return [
        _element("details", _element("summary", f"{name} ({len(some)})"), *(_case(row) for row in some))
        for name, some in parts.items()
    ]


def _case(row: Row) -> Markup:
    facts = [f"{row.tokens} tokens"]
    if row.limit is not None:
        facts.append(f"error limit {row.limit:.1e}")
    if row.bound_seconds is not None:
        facts.append(f"the roofline bound is {duration(row.bound_seconds)}")
    if row.flops and row.bytes:
        facts.append(f"{number(row.flops / 1e9)} GFLOP, {number(row.bytes / 1e6)} MB")
    heading = _element("h3", f"{row.dtype}, batch {row.batch}")
    told = _element("p", "; ".join(facts), class_="kicker")
    if row.status != "timed":
        told = _joined([told, _element("p", f"{row.status}: {row.reason}", class_="bad")])
    if not row.entries:
        return _joined([heading, told])
    shown = {name: cells(row, name) | _more(row, name) for name in row.entries}
    headings = {"images/s": "time of a call"} if row.op else {}
    used = [column for column in (*COLUMNS, *MORE) if any(values[column] for values in shown.values())]
    lines = []
    for name, values in shown.items():
        entry = row.entries[name]
        line = [_element("th", name)]
        if entry.status == "timed":
            classes = {REMARKS: "wide", "ours/this": entry.verdict, "ours/this, graphs": entry.graph_verdict}
            line += [_element("td", values[column], class_=classes.get(column, "")) for column in used[1:]]
        else:
            kind = "wide" if entry.status == "absent" else "wide bad"
            line.append(_element("td", outcome(entry, row.limit), class_=kind, colspan=str(max(1, len(used) - 1))))
        lines.append(_element("tr", *line, class_="ours" if name == OURS else ""))
    return _joined([heading, told, _table([headings.get(column, column) for column in used], lines)])


GRAPHS = " Graph: the same ratio of CUDA graphs, which do not wait for the host."
REMARKS = "remarks"
MORE = ("quartiles", "rounds", "CUDA graph", "ours/this, graphs", "until it returned", REMARKS)


def _more(row: Row, name: str) -> dict[str, str]:
    """The columns that only the page has room for."""
    entry = row.entries[name]
    found = rate(row, entry)
    if found is None:
        return dict.fromkeys(MORE, "")
    low, high = (duration(entry.seconds.q25), duration(entry.seconds.q75)) if row.op else map(number, found[1:])
    graph, host = ("" if spread is None else duration(spread.median) for spread in (entry.graph, entry.host))
    values = (f"{low} – {high}", str(entry.seconds.rounds), graph, ratio(entry.graph_ratio, entry.graph_verdict), host)
    return dict(zip(MORE, (*values, entry.note), strict=True))


def _records(run: Run) -> list[Markup]:
    found = [_element("h3", "Environment"), _facts(_flat(run.environment))]
    found += [_element("h3", "Settings"), _facts(_flat(run.settings))]
    if run.extra:
        text = json.dumps(run.extra, indent=1, ensure_ascii=False)
        found.append(_element("details", _element("summary", "What else the run recorded"), _element("pre", text)))
    return found


def _flat(facts: dict, prefix: str = "") -> dict[str, str]:
    """Nested facts by dotted names; "none" for what is empty."""
    found: dict[str, str] = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            found[f"{prefix}{key}"] = ", ".join(map(str, value)) or "none"
        else:
            found[f"{prefix}{key}"] = "none" if value is None else str(value)
    return found
