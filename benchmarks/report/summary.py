"""benchmarks/results/README.md, which describes all results there, and the table of the newest in the project's README.

    python -m fastvit.benchmarks.report.summary        # or: make pages

writes both, and every run's pages anew from its bench.json. Results lie in <device>/ or <device>/<commit>/.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from fastvit.report import write_atomically

from ..schema import OURS, Row, Run, is_ours, load
from . import PAGE, baselines, write
from .page import CAPTIONS
from .words import (
    answers,
    caveats,
    cells,
    command,
    device,
    groups,
    headline,
    on_gpu,
    peers_of,
    score,
    sides,
    timed,
    versions,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path("benchmarks") / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MADE_BY = "<!-- Written by `make pages` from the results files. Edit those, or the code; not this. -->"


@dataclass
class Found:
    """One folder of results: its bench.json as a run and its baselines.json, or why one cannot be read; None for all
    where there is none."""

    folder: Path
    run: Run | None = None
    unreadable: str = ""
    baselines: Run | None = None


def find(root: Path) -> list[Found]:
    """Every folder with results under root/benchmarks/results, newest run first, then those without one by name."""
    results = root / RESULTS
    found = []
    names = ("bench.json", "verify.json", baselines.FILE)
    for folder in sorted({path.parent for name in names for path in results.rglob(name)}):
        found.append(each := Found(folder))
        for field, name in (("run", "bench.json"), ("baselines", baselines.FILE)):
            if (folder / name).exists():
                try:
                    setattr(each, field, load(folder / name))
                except ValueError as error:
                    each.unreadable = str(error).replace(f"{root}/", "")
    return sorted(found, key=lambda each: each.run.started if each.run else "", reverse=True)


def results_page(root: Path) -> str:
    """benchmarks/results/README.md, in Markdown."""
    found = find(root)
    parts = [
        MADE_BY,
        "# Results",
        "One folder a device, or a device and a commit. Each holds what `fastvit bench` wrote: `bench.json` with every "
        "number and the environment, `bench.csv`, pictures, and `index.html`, one page with all of it and an "
        "explanation of every word.",
        "`fastvit bench --baselines -o FOLDER` adds `baselines.json`, a table and a picture: ResNets and RegNetY-16GF "
        "of timm beside DeiT and ViT-B/32, images a second against published top-1 accuracy, as in Figure 1 of "
        "DeiT's paper (arXiv 2012.12877), at inference and in a training step. The sources of the "
        "accuracies are in `benchmarks/top1.py` and in the table.",
    ]
    if not any(each.run for each in found):
        parts.append("No run is here that this version reads.")
    for each in found:
        parts += _folder(each, root / RESULTS)
    return "\n\n".join(parts) + "\n"


def _folder(found: Found, results: Path) -> list[str]:
    where = found.folder.relative_to(results).as_posix()
    parts = [f"## {where}"]
    if found.unreadable:
        parts.append(f"Not readable: {_escape(found.unreadable)}.")
    if found.run:
        parts += _told(found.run)
        parts += [
            f"- **{question}** {_escape(' '.join(sentences))}" for question, sentences in answers(found.run).items()
        ]
        parts.append(f"- **How to check?** {_code(command(found.run))}, then `fastvit bench compare` the two files.")
        parts += [f"### {group.capitalize()}\n\n{matrix(rows)}" for group, rows in groups(found.run.rows).items()]
        drawn = [path.name for stem in CAPTIONS for path in sorted(found.folder.glob(f"{stem}*.png"))]
        parts += [f'<img src="{where}/{name}" alt="{name.removesuffix(".png")}" width="420">' for name in drawn]
        if (found.folder / PAGE).exists():
            parts.append(f"All of it on one page: [{where}/{PAGE}]({where}/{PAGE}).")
    if found.baselines:
        parts += ["### Baselines: accuracy against speed", baselines.markdown(found.baselines)]
        if (found.folder / baselines.PICTURE).exists():
            parts.append(f'<img src="{where}/{baselines.PICTURE}" alt="accuracy against speed" width="420">')
    verified = _verified(found.folder / "verify.json")
    return [*parts, verified] if verified else parts


def _told(run: Run) -> list[str]:
    """The headline, its caveats, and when and with what it was measured."""
    when = f"Measured {run.started[:10]} with {versions(run)}: the median of rounds in which all took turns."
    return [f"**{_escape(headline(run))}**", *map(_escape, [*caveats(run), when])]


def _verified(path: Path) -> str:
    """A sentence about verify.json; empty if there is none."""
    if not path.exists():
        return ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        statuses = [case["status"] for case in json.loads(path.read_text(encoding="utf-8"))["results"]]
        counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
        return f"`fastvit verify`, every kernel against the reference: {counts}."
    return "`verify.json` is not readable."


def matrix(rows: list[Row], ours: str = "ours") -> str:
    """A Markdown table: for each case our speed, under the heading `ours`, and over that of each peer that any case
    has."""
    peers = [peer for peer in peers_of(rows) if not is_ours(peer) and any(_score(row, peer) for row in rows)]
    headings = [
        "case",
        f"{ours}, a call" if rows[0].op else f"{ours}, images/s",
        "of bound",
        *(f"over {peer}" for peer in peers),
    ]
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)]]
    for row in rows:
        if row.status == "timed":
            found = cells(row, OURS)
            lines.append([row.id, found["images/s"], found["of bound"], *(_score(row, peer) for peer in peers)])
        else:
            lines.append([row.id, f"{row.status}: {row.reason}", "", *[""] * len(peers)])
    return "\n".join(f"| {' | '.join(map(_escape, line))} |" for line in lines)


def _score(row: Row, peer: str) -> str:
    entry = row.entries.get(peer)
    if entry is None or entry.status == "absent":
        return ""
    if entry.ratio is None:
        return entry.status
    return score(entry.ratio, entry.verdict)


def _escape(text: str) -> str:
    """Text escaped for Markdown, tables included."""
    for character in "\\|<>*`[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def newest_table(root: Path) -> str:
    """The table in the project's README: of the newest run of whole models, on a GPU if there is one."""
    runs = [each for each in find(root) if each.run and any(not row.op for row in timed(each.run.rows))]
    runs.sort(key=lambda each: on_gpu(each.run), reverse=True)  # stable: the newest stays first
    link = f"[{RESULTS.as_posix()}/]({RESULTS.as_posix()}/README.md)"
    if not runs:
        return f"No results are here that this version reads. What there is: {link}."
    run = replace(runs[0].run, rows=[row for row in runs[0].run.rows if not row.op])
    note = (
        f"On {_escape(device(run))}. `over`: our speed over that peer's, above 1 is faster; `tie`: the rounds do "
        f"not tell the two apart; `of bound`: 100 % is the roofline bound, as fast as the measured peaks allow. "
        f"Everything else: {link}."
    )
    *frozen, last = sides(run)
    parts = [part for side in frozen for part in (f"**{_escape(headline(side))}**", matrix(side.rows, "frozen"))]
    return "\n\n".join([*parts, *_told(last), matrix(last.rows), note])


def between(page: str, begin: str, end: str, text: str, name: str = "README.md") -> str:
    """`page`, of this file name, with what stands between its markers replaced by `text`. Raises ValueError where they
    are missing."""
    before, found, rest = page.partition(begin)
    _, also, after = rest.partition(end)
    if not found or not also:
        raise ValueError(f"{name} has no {begin} and {end}, in this order")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main(root: Path = ROOT) -> None:
    """Write all pages. Raises OSError, and ValueError where README.md has no place for the table."""
    readme = root / "README.md"
    write_atomically(readme, between(readme.read_text(encoding="utf-8"), BEGIN, END, newest_table(root)).encode())
    for each in find(root):
        if each.run:
            write(each.run, each.folder)
        if each.baselines:
            baselines.write(each.baselines, each.folder)
    write_atomically(root / RESULTS / "README.md", results_page(root).encode())


if __name__ == "__main__":
    main()
