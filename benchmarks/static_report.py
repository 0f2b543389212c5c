"""Compiles every kernel for GPUs that are not here, and reads registers, spills, memory and instructions off the code.

    python benchmarks/static_report.py [--arch sm_90 ...] [--match TEXT] [--configs shipped|all] [--json FILE]

The exit status is 1 when a kernel fails a gate (see `static/gates.py`) that `static/allowed.py` does not let it
through, or an entry there has become needless; 2 for bad arguments; 130 when interrupted: FILE keeps the
architectures that were finished. A static figure is evidence about the code, never a speed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import triton
from fastvit.benchmarks.static import allowed, cases, pages
from fastvit.benchmarks.static.compile import Case, compile_all, launches
from fastvit.benchmarks.static.gates import judge, unused
from fastvit.benchmarks.static.record import Record
from fastvit.kernels.launch.hardware import ARCHS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="static_report.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", nargs="+", choices=list(ARCHS), default=list(ARCHS), metavar="ARCH", help=", ".join(ARCHS)
    )
    parser.add_argument("--match", default="", metavar="TEXT", help="only the cases whose label holds TEXT")
    parser.add_argument(
        "--configs", choices=("shipped", "all"), default="all", help="all: with the tuner's likeliest candidates"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to FILE: see static/pages.py")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: kernels are interpreted, not compiled")
    chosen = [case for case in cases.cases() if options.match in case.label]
    if not chosen:
        parser.error(f"no case's label holds {options.match!r}")

    print(f"Triton {triton.__version__}, torch {torch.__version__}", flush=True)
    records: list[Record] = []

    try:
        for of_arch in _compile(chosen, dict.fromkeys(options.arch), options.configs == "all"):
            records += of_arch
            if options.json:
                pages.save(options.json, pages.Run(triton.__version__, options.match, records))
    except KeyboardInterrupt:
        done = list(dict.fromkeys(record.arch for record in records))
        print(f"interrupted; finished: {', '.join(done) or 'none'}", file=sys.stderr)
        return 130

    verdict = judge(records, triton.__version__, allowed.ALLOWED)
    for record, gate, text in verdict.failures:
        print(f"FAILED {gate}: {record.arch} {record.kernel} ({record.case}; {pages.config(record)}): {text}")
    for record, gate, text, _ in verdict.excused:
        print(f"let through, {gate}: {record.arch} {record.kernel} ({record.case}; {pages.config(record)}): {text}")
    # Only a whole run can tell.
    needless = [] if options.match else unused(records, options.arch, triton.__version__, allowed.ALLOWED)
    for entry in needless:
        print(f"FAILED needless exception, take it out of static/allowed.py: {entry}")
    failures = len(verdict.failures) + len(needless)
    print(f"{len(records)} kernels, {failures} failures, {len(verdict.excused)} let through")
    return 1 if failures else 0


def _compile(chosen: list[Case], archs: Iterable[str], candidates: bool) -> Iterator[list[Record]]:
    """The records of each architecture, as they are compiled, with lines on stderr that say what is left."""
    found = {arch: launches(chosen, arch, candidates) for arch in archs}
    total = sum(map(len, found.values()))
    start, done = time.monotonic(), 0
    compiled = compile_all([launch for arch in archs for launch in found[arch]])
    for arch in archs:
        of_arch = []
        for _ in found[arch]:
            of_arch.append(next(compiled))
            done += 1
            left = (time.monotonic() - start) / done * (total - done)
            line = f"{done}/{total} kernels, {arch}, about {left:.0f} s left"
            if sys.stderr.isatty():
                print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            elif done % 100 == 0 or done == total:
                print(line, file=sys.stderr, flush=True)
        yield of_arch
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
