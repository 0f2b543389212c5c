"""The static report's estimates follow the compiled code, and its pages say what is so."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from fastvit.benchmarks.static import estimate, pages
from fastvit.benchmarks.static.gates import Allowed
from fastvit.benchmarks.static.record import Record
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.launch.request import AttentionConfig, GemmConfig, Request, RowConfig
from static_records import FLAWED, GOOD, REQUEST, ROOT, request_of

CONFIG = GemmConfig(128, 128, 64, 8, 3)


def used(record: Record = GOOD, request: Request = REQUEST, config=CONFIG, blocks: int = 99 * 6) -> Record:
    return replace(record, uses=(estimate.use(request, config, blocks, ARCHS[record.arch]),))


def seconds(record: Record) -> float | None:
    return estimate.seconds(record, record.uses[0], ARCHS[record.arch])


def test_an_estimate_follows_the_compiled_code():
    base = seconds(used())
    loop = used(replace(GOOD, loop={"IADD3": 4000}))
    # 594 blocks on 132 multiprocessors are five on the fullest, of 8 warps, 48 steps each, four instructions a cycle.
    assert seconds(loop) == pytest.approx(5 * 8 * 48 * 4000 / 4 / ARCHS["sm_90"].clock) and seconds(loop) > base
    special = used(replace(GOOD, loop={"MUFU": 4000}))
    assert seconds(special) == pytest.approx(5 * 8 * 48 * 4000 * 32 / 16 / ARCHS["sm_90"].clock)
    assert seconds(used(replace(GOOD, loop={"FFMA": 4000}))) == pytest.approx(seconds(loop), rel=0.02)
    latency = used(replace(GOOD, blocks_per_sm=1), config=CONFIG._replace(num_stages=1), blocks=132 * 400)
    assert seconds(latency) == pytest.approx(400 * 48 * 480 / ARCHS["sm_90"].clock)
    assert seconds(used(replace(GOOD, blocks_per_sm=0))) is None and seconds(used(replace(GOOD, error="no"))) is None


@pytest.mark.parametrize(
    "kernel, config, steps",
    [
        ("attention_forward", AttentionConfig(64, 64, 4, 3), 4),
        ("layer_norm_forward", RowConfig(4, 1024, 4), 1),
        ("column_sum", RowConfig(32, 128, 4), 8),
    ],
)
def test_iterations_of_the_main_loop(kernel, config, steps):
    request = request_of(f"{kernel} {'64x197x12x64' if kernel.startswith('attention') else '12608x768'} bfloat16")
    blocks = {"attention_forward": 3072, "layer_norm_forward": 3152, "column_sum": 6 * 50}[kernel]
    assert estimate.use(request, config, blocks, ARCHS["sm_90"]).steps == steps


def test_a_configs_text_is_the_same_of_its_dictionary():
    fields = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2, "GROUP_M": 8, "SPLIT_K": 3}
    assert estimate.config_text(fields) == estimate.config_text(GemmConfig(**fields)) == "128x64x32 w4 s2 g8 k3"


@pytest.mark.parametrize(
    "pairs, expected",
    [
        ([(1, 10), (2, 20), (3, 30)], 1.0),
        ([(1, 30), (2, 20), (3, 10)], -1.0),
        ([(1, 1), (2, 3), (3, 2), (4, 4)], 0.8),
        ([(1, 1), (1, 2), (2, 3)], 0.866),
        ([(1, 1), (2, 2)], None),
        ([(1, 1), (1, 2), (1, 3)], None),
    ],
)
def test_rank_correlation(pairs, expected):
    found = estimate.rank_correlation(pairs)
    assert found is None if expected is None else found == pytest.approx(expected, abs=1e-3)


@pytest.fixture
def records():
    shapes = [(12608, 768, 768), (12608, 2304, 768), (12608, 768, 3072), (197, 768, 768)]
    made = [used(replace(GOOD, case=f"case {shape[1]}"), REQUEST._replace(shape=shape)) for shape in shapes]
    made.append(replace(used(replace(GOOD, spill_bytes=16), config=CONFIG._replace(BLOCK_N=256)), shipped=False))
    made.append(replace(FLAWED["serialized"], case="flawed"))
    return made


def write(folder: Path, records: list[Record], entries=(), results=Path("none"), others=()) -> str:
    """The page of sm_90, by way of the JSON files; others: (Triton, its records)."""
    folder.mkdir()
    runs = []
    for version, made in [("3.10.0", records), *others]:
        pages.save(folder / "json", pages.Run(version, "", made))
        runs.append(pages.load(folder / "json"))
    pages.write(folder, runs, entries, results)
    return (folder / "sm_90.md").read_text()


def test_pages_do_not_depend_on_the_order_of_compilation(tmp_path, records):
    write(tmp_path / "a", records)
    write(tmp_path / "b", records[::-1])
    names = ["README.md", "json", "sm_90.md"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        text = (tmp_path / "a" / name).read_text()
        assert text == (tmp_path / "b" / name).read_text()
        assert str(ROOT) not in text and str(tmp_path) not in text


def test_what_is_saved_is_loaded(tmp_path):
    record = replace(used(), loads_by_bits={128: 4, 16: 2}, loop={"HGMMA": 4, "LDG": 2}, rest={"EXIT": 1})
    pages.save(tmp_path / "new" / "run.json", pages.Run("3.6.0", "", [record]))
    assert pages.load(tmp_path / "new" / "run.json") == pages.Run("3.6.0", "", [record])


def test_a_page_says_what_failed_what_was_let_through_and_what_is_an_estimate(tmp_path, records):
    text = write(tmp_path / "a", records)
    assert "5 shipped kernels, 1 failures, 0 let through with a reason; 1 candidates of the tuner" in text
    assert "- **serialized**: `kernel`, flawed" in text and "- of the candidates: spill 1" in text
    assert "Each is an estimate from code and shape, not a measurement" in text
    assert "No kernel has been measured on sm_90 yet" in text
    found = json.loads((tmp_path / "a" / "json").read_text())["kernels"]
    shown = {
        (use["request"], use["config"]): estimated
        for row in found
        for use, estimated in zip(row["uses"], row["estimated_seconds"], strict=True)
    }
    assert len(shown) == 5 and shown[REQUEST.key, "128x128x64 w8 s3 g8 k1"] == pytest.approx(seconds(used()), rel=1e-3)

    text = write(tmp_path / "b", records, [Allowed("serialized", "It is planted here.", case="flawed")])
    assert "0 failures, 1 let through" in text and "let through. It is planted here. 1: `kernel`: flawed." in text
    row = "| 3.10.0 | [sm_90](sm_90.md) | 5 | 0 | 1 | 0 | 100 | 25% | 1 |"
    assert row in (tmp_path / "b" / "README.md").read_text()


def test_a_kernel_has_one_row_its_worst(tmp_path, records):
    spills = replace(GOOD, case="spills", spill_bytes=4)
    errs = replace(GOOD, kernel="other", case="errs", error="it raised")
    idle = replace(GOOD, case="idle", occupancy=0.125)
    rows = [line for line in write(tmp_path / "a", [*records, idle, spills]).splitlines() if "| kernel |" in line]
    assert len(rows) == 2 and rows[1].startswith("| kernel | 7 | spills |  | 100 | 4 |")
    rows = write(tmp_path / "b", [*records, errs, idle]).splitlines()
    first = rows.index("## Kernels, each in its worst case") + 4
    assert rows[first].startswith("| other | 1 | errs |  | ERROR it raised |")
    assert rows[first + 1].startswith("| kernel | 6 | idle |") and "| 12% (2x8 warps, registers) |" in rows[first + 1]


def test_a_page_says_what_differs_with_the_other_triton(tmp_path):
    serialized, spilling = FLAWED["serialized"], replace(GOOD, case="b", spill_bytes=4)
    newest = [serialized, replace(spilling, spill_bytes=0)]
    other = [replace(serialized, serialized=False), replace(spilling, occupancy=0.125)]
    entries = [Allowed(gate, "It is planted here.") for gate in ("serialized", "spill")]
    text = write(tmp_path / "a", newest, entries, others=[("3.9.0", other)])
    assert "by Triton 3.10.0" in text
    assert text.split("## With Triton 3.9.0 instead\n\n")[1].splitlines() == [
        "- spill, let through. It is planted here. 1: `kernel`: b.",
        "- no serialized: 1: `kernel`: case.",
        "- of 2 kernels (by name, case and config), 0 have a higher occupancy, 1 lower",
    ]
    assert "- **spill**: `kernel`, b, :" in write(tmp_path / "b", newest, others=[("3.9.0", other)])
    text = write(tmp_path / "c", newest, entries, others=[("3.9.0", newest)])
    same = "- of 2 kernels (by name, case and config), 0 have a higher occupancy, 0 lower"
    assert text.endswith(f"## With Triton 3.9.0 instead\n\n{same}\n")


def test_measured_kernels_stand_beside_their_estimates(tmp_path, records):
    folder = tmp_path / "results" / "nvidia-h100" / "abc"
    folder.mkdir(parents=True)
    config = {
        "BLOCK_M": 128,
        "BLOCK_N": 128,
        "BLOCK_K": 64,
        "num_warps": 8,
        "num_stages": 3,
        "GROUP_M": 8,
        "SPLIT_K": 1,
    }
    rows = [
        {"request": record.uses[0].request, "configs": [{"config": config, "seconds": factor * seconds(record)}]}
        for record, factor in zip(records[:4], (1.5, 1.2, 1.1, 2.0), strict=True)
    ]
    (folder / "micro.json").write_text(json.dumps({"finished": True, "arch": "sm_90", "launches": rows}))
    text = write(tmp_path / "pages", records, results=tmp_path / "results")
    line = "Against nvidia-h100/abc/micro.json: 4 kernels, Spearman's rank correlation 1.00 of estimate"
    assert line in text and "No kernel has been measured" not in text
    estimated, timed = (f"{scale * seconds(records[2]) * 1e6:.3g}" for scale in (1, 1.1))
    assert f"| {REQUEST.key} | 128x128x64 w8 s3 g8 k1 | {estimated} | {timed} |" in text
    assert estimate.measurements(tmp_path / "results", "sm_120") == {}


@pytest.mark.parametrize("content", ["", "[]", '{"arch": "sm_90", "launches": [{"request": "x"}]}', '{"launches": 3}'])
def test_a_damaged_file_of_measurements_is_named(tmp_path, content):
    path = tmp_path / "a" / "b" / "micro.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: no measured kernels"):
        estimate.measurements(tmp_path, "sm_90")


@pytest.mark.parametrize("content", ["", "[]", '{"kind": "fastvit static report", "schema": 0}'])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "3.6.0.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: not a fastvit static report of schema 2"):
        pages.load(path)
    with pytest.raises(SystemExit):
        pages.main([str(tmp_path / "pages"), str(path)])
    assert not (tmp_path / "pages").exists()


def test_the_committed_pages_are_of_every_architecture():
    folder = ROOT / "docs" / "static"
    assert {path.name for path in folder.iterdir()} == {"README.md", *(f"{arch}.md" for arch in ARCHS)}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 150_000
