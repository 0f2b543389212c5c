"""`fastvit bench compare`: what changed, what only looks so, and the exit status."""

import copy
import json

import pytest
from fastvit.benchmarks import schema
from fastvit.benchmarks.compare import compare, lines
from fastvit.benchmarks.schema import OURS, Contestant, Spread
from runs import fake_run

from fastvit import cli

MODEL = "vit_tiny_patch16_224"
PEER = "timm"


@pytest.fixture
def run():
    return fake_run(models=(MODEL,), batches=(1, 8), modes=("inference",), dtypes=("fp32",), ops=(), gpu=False)


def slowed(run, factor, *names, rows=None):
    """The same run with the times of the named contestants longer, ratios to ours as they then are."""
    after = copy.deepcopy(run)
    for row in after.rows[:rows]:
        sides = row.contestants
        for name in names or sides:
            sides[name].seconds = sides[name].seconds and scaled(sides[name].seconds, factor)
        for name, side in sides.items():
            if side.ratio:
                by = (factor if name in (names or sides) else 1) / (factor if OURS in (names or sides) else 1)
                side.ratio = scaled(side.ratio, by)
    return after


def scaled(spread, factor):
    return Spread(spread.median * factor, spread.q25 * factor, spread.q75 * factor, spread.rounds)


def of(found, what, contestant=OURS):
    return [change for change in found.changes if (change.what, change.contestant) == (what, contestant)]


def test_a_run_and_itself_have_no_changes(run):
    found = compare(run, copy.deepcopy(run))
    assert {change.what for change in found.changes} == {"unchanged"}
    assert found.status == 0
    assert found.warnings == []
    assert all(ratio == 1.0 for ratio, _ in found.drift.values())
    assert list(lines(found, 0.05, None))[-1] == "ours: 2 unchanged"


def test_slower_fails_and_faster_does_not(run):
    found = compare(run, slowed(run, 1.2, OURS, rows=1))
    (change,) = of(found, "slower")
    assert (change.id, change.ratio, change.bad) == (run.rows[0].id, pytest.approx(1.2), True)
    assert len(of(found, "unchanged")) == 1
    assert found.status == 1
    assert any(line.startswith("! ") and "1.200" in line for line in lines(found, 0.05, None))

    found = compare(run, slowed(run, 1 / 1.2, OURS))
    assert len(of(found, "faster")) == 2
    assert found.status == 0


def test_a_slower_peer_is_said_but_does_not_fail(run):
    found = compare(run, slowed(run, 1.2, PEER))
    assert len(of(found, "slower", PEER)) == 2
    assert found.status == 0
    assert found.drift[PEER] == (pytest.approx(1.2), 2)


def test_a_change_must_exceed_the_threshold_and_the_quartiles(run):
    assert compare(run, slowed(run, 1.04, OURS)).status == 0, "below the threshold"
    assert compare(run, slowed(run, 1.04, OURS), threshold=0.01).status == 1
    after = slowed(run, 1.2, OURS)
    for row in after.rows:
        row.contestants[OURS].seconds.q25 = run.rows[0].contestants[OURS].seconds.median
    for row in run.rows:
        row.contestants[OURS].seconds.q75 = row.contestants[OURS].seconds.median * 1.3
    found = compare(run, after)
    assert not of(found, "slower"), "the quartiles overlap"


def test_a_slower_machine_is_seen_as_such(run):
    after = slowed(run, 1.3)
    found = compare(run, after)
    assert found.status == 1
    assert all(ratio == pytest.approx(1.3) for ratio, _ in found.drift.values())
    assert any("The peers' own times moved by 1.300" in line for line in lines(found, 0.05, None))
    relative = compare(run, after, relative=PEER)
    assert relative.status == 0
    assert [change.ratio for change in of(relative, "unchanged")] == pytest.approx([1.0, 1.0])
    # A peer that got slower leaves ours faster beside it; and ours slower than the machine still fails.
    assert len(of(compare(run, slowed(run, 1.2, PEER), relative=PEER), "faster")) == 2
    assert compare(run, slowed(after, 1.2, OURS), relative=PEER).status == 1


def test_relative_to_a_peer_that_was_not_timed(run):
    with pytest.raises(ValueError, match="'nobody' was timed in no case of both runs, expected one of .*timm"):
        compare(run, run, relative="nobody")
    after = slowed(run, 1.5, OURS)
    after.rows[0].contestants[PEER] = Contestant("failed", "out of memory")
    found = compare(run, after, relative=PEER)
    assert [change.bad for change in found.changes if change.contestant == OURS and change.ratio] == [True]
    assert "not judged" in of(found, "unchanged")[0].detail


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_ours_wrong_or_failed_fails(run, status):
    after = copy.deepcopy(run)
    row = after.rows[0]
    row.status, row.reason, row.contestants = status, "so it is", {OURS: Contestant(status, "so it is")}
    found = compare(run, after)
    assert [change.detail for change in of(found, status)] == ["so it is"]
    assert found.status == 1
    # The peers that were not timed then are no news; back again is no failure.
    assert not [change for change in found.changes if change.id == row.id and change.contestant != OURS]
    assert compare(after, run).status == 0
    row.contestants = {}
    assert compare(run, after).status == 1


def test_a_wrong_peer_and_an_absent_one_do_not_fail(run):
    after = copy.deepcopy(run)
    after.rows[0].contestants[PEER] = Contestant("wrong", error=0.5)
    del after.rows[1].contestants[PEER]
    found = compare(run, after)
    assert [change.id for change in of(found, "wrong", PEER)] == [run.rows[0].id]
    assert [change.id for change in of(found, "vanished", PEER)] == [run.rows[1].id]
    assert found.status == 0


def test_rows_that_appear_and_vanish(run):
    after = copy.deepcopy(run)
    after.rows[0].id = "new/fp32/b1/inference"
    found = compare(run, after)
    assert [change.id for change in of(found, "appeared")] == ["new/fp32/b1/inference"]
    assert [change.id for change in of(found, "vanished")] == [run.rows[0].id]
    assert found.status == 0
    after.rows[0].status = "wrong"
    assert compare(run, after).status == 1
    after.rows[1].status, after.rows[1].contestants = "skipped", {}
    assert [change.id for change in of(compare(run, after), "skipped")] == [run.rows[1].id]


def test_errors_and_memory_that_grew(run):
    after = copy.deepcopy(run)
    after.rows[0].contestants[OURS].error *= 1.5
    after.rows[1].contestants[OURS].peak_bytes += 100 << 20
    after.rows[0].contestants[OURS].peak_bytes += 1 << 20
    found = compare(run, after)
    assert [change.id for change in of(found, "error grew")] == [run.rows[0].id]
    assert [change.id for change in of(found, "memory grew")] == [run.rows[1].id]
    assert found.status == 0


def test_other_versions_and_threads_are_said(run):
    after = copy.deepcopy(run)
    after.environment["torch_threads"] = 4
    after.environment["packages"] = {**run.environment["packages"], "timm": "2.0"}
    assert compare(run, after).warnings == ["torch_threads was 2, is 4", "packages: timm was 1.0.31, is 2.0"]


def write(tmp_path, name, run):
    path = tmp_path / name
    path.write_text(json.dumps(run.as_dict()))
    return str(path)


def test_command(run, tmp_path, capsys):
    a, b = write(tmp_path, "a.json", run), write(tmp_path, "b.json", slowed(run, 1.2, OURS))
    assert cli.main(["bench", "compare", a, a]) == 0
    assert cli.main(["bench", "compare", a, b]) == 1
    assert cli.main(["bench", "compare", b, a]) == 0
    assert cli.main(["bench", "compare", a, b, "--threshold", "0.3"]) == 0
    assert cli.main(["bench", "compare", a, b, "--relative", PEER]) == 1
    assert "times that of timm" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not a results file of 'fastvit bench'"),
        ('{"kind": "fastvit verify", "schema": 2}', "expected 'fastvit bench' of schema"),
        ('{"kind": "fastvit bench", "schema": 1}', f"of schema 1, expected 'fastvit bench' of schema {schema.SCHEMA}"),
        ('{"kind": "fastvit bench", "schema": 2, "rows": [{}]}', "a damaged results file"),
    ],
)
def test_command_refuses_other_files(run, tmp_path, capsys, content, message):
    a, other = write(tmp_path, "a.json", run), tmp_path / "other.json"
    if content is not None:
        other.write_text(content)
    for files in ([a, str(other)], [str(other), a]):
        assert cli.main(["bench", "compare", *files]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "other.json" in error
        assert error.count("\n") == 1


def test_command_refuses_another_device_and_nothing_in_common(run, tmp_path, capsys):
    a, other = write(tmp_path, "a.json", run), copy.deepcopy(run)
    other.environment["device"] = "Another CPU"
    assert cli.main(["bench", "compare", a, write(tmp_path, "b.json", other)]) == 2
    assert "different devices, 'Imaginary CPU' and 'Another CPU'" in capsys.readouterr().err
    other.environment["device"], other.rows = "Imaginary CPU", []
    assert cli.main(["bench", "compare", a, write(tmp_path, "b.json", other)]) == 2
    assert "no case in common" in capsys.readouterr().err
