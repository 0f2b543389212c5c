"""The thirty lines that a reader of `make gpu` may have alone: what passed, what is far off, what to do next."""

import json

import pytest
from fastvit.benchmarks.report import gpu


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def launch(op, ours, library, bound, **more):
    row = {"launch": f"{op}: gemm 64x64x64 bfloat16", "request": "gemm 64x64x64 bfloat16", "op": op}
    times = {"seconds": ours, "heuristic_seconds": 2 * ours, "bound_seconds": bound}
    return row | times | {"library": library, "direction": "forward", "best": "b", "without": {}, "configs": []} | more


@pytest.fixture
def results(tmp_path):
    """A run in which much went wrong."""
    write(
        tmp_path, "environment.json", {"device": "H900", "commit": "abc", "torch": "9.9", "packages": {"triton": "8"}}
    )
    states = {name: {"state": "done", "seconds": 10.0, "starts": 1} for name in ("verify", "peaks", "micro", "tune")}
    states["micro"] |= {"state": "unfinished", "starts": 3}
    write(tmp_path, "runbook.json", states)
    rows = [
        {"op": "attention", "case": f"c{i}", "dtype": "bf16", "status": "failed", "reason": "x" * 400} for i in range(9)
    ]
    write(tmp_path, "verify.json", {"results": [*rows, {"status": "passed"}]})
    launches = [launch(f"op{i}", 1e-3 * (i + 1), {"library mm": 1e-3}, 5e-4) for i in range(9)]
    del launches[8]["without"]  # its time was up before what explains it
    launches.append(launch("alone", 5e-2, {}, 1e-3, without={"plain": 3e-4}))
    micro = {"model": "m", "batch": 256, "dtype": "bf16", "launches": launches, "failed": ["patch_embed: no memory"]}
    write(tmp_path, "micro.json", micro)
    (tmp_path / "tuned").mkdir()
    write(tmp_path / "tuned", "h900.attempts.json", {"gemm: a config": "took the GPU"})
    (tmp_path / "tuned" / "h900.attempts.trying").write_text("attention: a config")
    return tmp_path


def test_it_is_thirty_lines_that_end_with_what_to_do(results):
    lines = gpu.summary(results).splitlines()
    assert len(lines) <= gpu.LINES and max(map(len, lines)) <= gpu.WIDTH
    assert lines[0] == "fastvit on H900; commit abc; torch 9.9; Triton 8"
    assert "micro unfinished in 3 starts 10 s" in "\n".join(lines[1:3])
    assert "mend what verify names" in lines[-1] and "go on with micro" in lines[-1] and "kernels/tuned" in lines[-1]


def test_it_names_what_failed_and_what_is_furthest_off(results):
    lines = gpu.summary(results).splitlines()
    assert "verify: 1 passed, 9 failed" in lines and "  and 6 more" in lines
    start = next(i for i, line in enumerate(lines) if line.startswith("furthest behind"))
    behind = [line.split()[0] for line in lines[start + 1 : start + 6]]
    assert behind == ["op8", "op7", "op6", "op5", "op4"], "in the order of what there is to gain"
    assert "9000 / 1000 = 9.00" in lines[start + 1]
    assert lines[start + 7].split()[0] == "alone" and "= 50.00" in lines[start + 7]
    assert "FATAL, left out: gemm: a config: took the GPU" in lines
    assert "FATAL: ended the process that tried it: attention: a config" in lines
    assert any("NOT MEASURED: patch_embed: no memory" in line for line in lines)


@pytest.mark.parametrize("text", [None, "", "[]", "{}"])
def test_files_that_are_not_there_or_damaged_leave_the_rest(tmp_path, text):
    if text is not None:
        for name in ("environment", "runbook", "verify", "micro", "bench"):
            (tmp_path / f"{name}.json").write_text(text)
    assert "verify: nothing is known" in gpu.summary(tmp_path)
