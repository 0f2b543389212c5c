"""The table of choices on disk: what counts, what is ignored, and that no process loses what another wrote."""

import dataclasses
import json
import math
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fastvit.kernels import tiles
from fastvit.kernels.launch import choice
from fastvit.kernels.launch.heuristic import LARGE
from fastvit.kernels.launch.request import GemmConfig, Product, Request

from fastvit import tuned
from fastvit.ops import _common
from fastvit.tuned import Entry

CONFIG = {"GemmConfig": LARGE._asdict()}
IDENTITY = {
    "device": "Some GPU",
    "capability": "9.0",
    "driver": "1.2",
    "torch": "2.13",
    "triton": "3.7",
    "kernels": tuned.source_hash(),
}


def entry(choice="torch", incumbent="triton") -> Entry:
    name = choice if isinstance(choice, str) else tuned.label(choice)
    seconds = {incumbent: [2e-6, 2.1e-6, 2.2e-6], name: [1e-6, 1.1e-6, 1.2e-6]}
    return Entry(choice, incumbent, seconds, {"sdpa cudnn": "RuntimeError: no"}, 50, True, "2026-01-01T00:00:00+00:00")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVIT_CACHE", str(tmp_path))
    monkeypatch.setattr(tuned, "_warned", set())
    return tmp_path


@pytest.fixture
def shipped(tmp_path):
    folder = tmp_path / "shipped"
    folder.mkdir()
    return folder


def load(identity=IDENTITY, shipped=None):
    return tuned.load(identity, shipped) if shipped else tuned.load(identity)


def test_decisions_come_back_as_they_were():
    table = load()
    assert not table.files and not table.ops
    table.record("ops", "attention x", entry("sdpa flash"))
    table.record("configs", "gemm 1x2x3", entry(CONFIG, "GemmConfig other"))
    again = load()
    assert again.ops["attention x"][0] == entry("sdpa flash")
    assert again.configs["gemm 1x2x3"][0] == entry(CONFIG, "GemmConfig other")
    assert again.own("configs") == {"gemm 1x2x3"}
    assert "torch 2.13, Triton 3.7" in again.files[0].versions


def test_evidence_in_words():
    said = str(entry())
    assert said.startswith("torch 1.1 us [1.0, 1.2], triton 2.1 us [2.0, 2.2] (50 rounds, 2026-01-01")
    assert "sdpa cudnn not timed: RuntimeError: no" in said


@pytest.mark.parametrize("what", ["device", "capability", "driver", "torch", "triton", "kernels"])
def test_a_users_table_is_for_exactly_what_it_was_measured_with(what):
    table = load()
    table.record("ops", "x", entry())
    other = IDENTITY | {what: "another"}
    assert not load(other).ops
    # A file of that name all the same, copied by hand: foreign, said once.
    foreign = load(other).path
    foreign.write_bytes(table.path.read_bytes())
    with pytest.warns(UserWarning, match=f"ignored, measured with another {what}") as caught:
        assert not load(other).ops
        assert not load(other).ops
    assert len(caught) == 1


@pytest.mark.parametrize("what, counts", [("driver", True), ("torch", True), ("triton", True), ("kernels", False)])
def test_a_shipped_table_counts_with_other_versions_but_not_for_other_kernels(shipped, what, counts):
    file = tuned.File(shipped / "some-gpu.json", IDENTITY | {what: "another"}, {}, {"x": entry("torch")})
    file.path.write_text(json.dumps(file.as_dict()))
    with warnings.catch_warnings():
        warnings.simplefilter("error" if counts else "ignore")
        table = load(shipped=shipped)
    assert ("x" in table.ops) == counts
    assert not table.own("ops")
    if counts:
        assert "another" in table.files[0].versions
        table.record("ops", "x", entry("triton", "triton"))
        again = load(shipped=shipped)
        assert again.ops["x"][0].choice == "triton" and len(again.files) == 2  # the user's own comes first


GOOD = {"kind": tuned.KIND, "schema": tuned.SCHEMA, "identity": IDENTITY, "configs": {}, "ops": {}}
NO_TIMES = dict.fromkeys(("triton", "torch"), [math.nan] * 3)
DAMAGED = {
    "empty": "",
    "truncated": json.dumps(GOOD)[:-20],
    "not ours": json.dumps({"name": "package"}),
    "a list": "[]",
    "of the future": json.dumps(GOOD | {"schema": tuned.SCHEMA + 1}),
    "another kind": json.dumps(GOOD | {"kind": "fastvit bench"}),
    "no identity": json.dumps(GOOD | {"identity": {}}),
    "entries of another form": json.dumps(GOOD | {"ops": {"x": {"choice": "torch"}}}),
    "a choice without times": json.dumps(GOOD | {"ops": {"x": dataclasses.asdict(entry()) | {"choice": "sdpa flash"}}}),
    "a time that is no number": json.dumps(GOOD | {"ops": {"x": dataclasses.asdict(entry()) | {"seconds": NO_TIMES}}}),
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_costs_one_warning(what):
    path = load().path
    content = DAMAGED[what]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="ignored, not a table of choices") as caught:
        assert not load().files
        table = load()
        table.record("ops", "y", entry())  # takes its place
    assert len(caught) == 1
    assert set(load().ops) == {"y"}


def test_a_folder_that_cannot_be_written_costs_one_warning(cache, monkeypatch):
    (cache / "file").write_text("")
    monkeypatch.setenv("FASTVIT_CACHE", str(cache / "file"))
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        table = load()
        table.record("ops", "x", entry())
        table.record("ops", "y", entry())
    assert len(caught) == 1
    assert set(table.ops) == {"x", "y"}


def _write(folder: str, name: str, count: int, barrier) -> None:
    os.environ["FASTVIT_CACHE"] = folder
    table = tuned.load(IDENTITY)
    barrier.wait()
    for i in range(count):
        table.record("ops", f"{name} {i}", entry())


def test_processes_that_tune_at_once_lose_nothing(cache):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    writers = [context.Process(target=_write, args=(str(cache), name, 20, barrier)) for name in "abc"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert set(load().ops) == {f"{name} {i}" for name in "abc" for i in range(20)}


def test_the_source_hash_follows_every_kernel(tmp_path):
    def digest(name, files):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content)
        return tuned.source_hash(folder)

    files = {"gemm.py": "a", "reduce.py": "b", "cost.py": "c"}
    before = digest("before", files)
    assert digest("same", files) == before
    assert digest("gemm", files | {"gemm.py": "A"}) != before
    assert digest("reduce", files | {"reduce.py": "B"}) != before
    assert digest("more", files | {"scan.py": ""}) != before
    assert digest("moved", {"gemm.py": "", "reduce.py": "ab", "cost.py": "c"}) != before
    assert digest("cost", files | {"cost.py": "C"}) == before
    names = {path.relative_to(tuned.KERNELS).as_posix() for path in tuned.KERNELS.rglob("*.py")}
    assert {"gemm.py", "attention.py", "launch/heuristic.py"} <= names


def test_where_tables_are(monkeypatch, tmp_path):
    assert tuned.folder() == tmp_path
    monkeypatch.delenv("FASTVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuned.folder() == tmp_path / "xdg" / "fastvit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.folder() == tmp_path / ".cache" / "fastvit"


def run(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "FASTVIT_TUNING"}
    return subprocess.run([sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True)


def test_mode_from_the_environment_and_for_a_while():
    code = "from fastvit import tuned; print(tuned.mode())"
    assert run(code).stdout.strip() == "read-only"
    assert run(code, FASTVIT_TUNING="off").stdout.strip() == "off"
    assert (
        "FASTVIT_TUNING: unknown tuning mode 'on', expected one of off, read-only"
        in run(code, FASTVIT_TUNING="on").stderr
    )
    with tuned.use_tuning("measure"):
        assert tuned.mode() == "measure"
    assert tuned.mode() == "read-only"
    with pytest.raises(ValueError, match="use_tuning: unknown tuning mode 'force'"), tuned.use_tuning("force"):
        pass


PRODUCT = Product(tiles.MATRIX, tiles.MATRIX, tiles.INPUT_GRADIENT, None, *[torch.bfloat16] * 3)
REQUEST = Request("gemm", (1024, 1024, 768), torch.bfloat16, PRODUCT)


@pytest.fixture
def cpu_table(monkeypatch):
    """A table for the interpreter's device, in force."""
    table = load(IDENTITY)
    monkeypatch.setitem(tuned._tables, torch.device("cpu"), table)
    tuned.changed()
    _common._connect()  # what was chosen is forgotten with every decision
    yield table
    tuned.changed()


def test_launches_follow_the_table_unless_it_is_off(cpu_table):
    device = torch.device("cpu")
    unmeasured, other = choice.choose(REQUEST, device), GemmConfig(64, 64, 64, 4, 3)
    cpu_table.record("configs", REQUEST.key, entry({"GemmConfig": other._asdict()}, "heuristic"))
    assert choice.choose(REQUEST, device) == other  # at once, though it was asked before
    with tuned.use_tuning("off"):
        assert choice.choose(REQUEST, device) == unmeasured
    assert choice.choose(REQUEST, device) == other


@pytest.mark.parametrize("chosen", ["triton", {"NoConfig": {}}, {"GemmConfig": {"BLOCK": 1}}, {"torch": {}}])
def test_a_config_that_makes_no_sense_is_ignored_with_one_warning(cpu_table, chosen):
    unmeasured = choice.choose(REQUEST, torch.device("cpu"))
    cpu_table.record("configs", REQUEST.key, entry(chosen, "heuristic"))
    with pytest.warns(UserWarning, match="is ignored") as caught:
        assert choice.choose(REQUEST, torch.device("cpu")) == unmeasured
        assert tuned.lookup(REQUEST, torch.device("cpu")) is None
    assert len(caught) == 1


def test_nothing_is_read_for_what_is_no_gpu(cache, monkeypatch):
    monkeypatch.setattr(tuned, "load", None)
    assert not tuned.table(torch.device("meta")).ops


def test_the_fingerprint_is_of_what_is_in_force():
    def table(**ops):
        file = tuned.File(Path("a.json"), {}, {}, ops)
        return tuned.Table({}, Path("a.json"), (file,)).fingerprint

    assert tuned.Table({}).fingerprint == table() == ""
    assert table(a=entry("torch")) == table(a=entry("torch", incumbent="torch"))
    assert len({table(a=entry("torch")), table(a=entry("triton")), table(b=entry("torch"))}) == 3
