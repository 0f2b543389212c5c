"""`fastvit bench compare`: what changed, what only looks so, and the exit status."""

import copy
import json
import re

import pytest
from fastvit.benchmarks import schema
from fastvit.benchmarks.compare import compare, lines
from fastvit.benchmarks.schema import OURS, Entry, Spread
from runs import fake_run

from fastvit import cli

MODEL = "vit_tiny_patch16_224"
PEER = "timm"


@pytest.fixture
def run():
    return fake_run(models=(MODEL,), batches=(1, 8), modes=("inference",), dtypes=("fp32",), ops=(), gpu=False)


def slowed(run, factor, *names, rows=None):
    """The same run with the times of the named entries longer, ratios to ours as they then are."""
    after = copy.deepcopy(run)
    for row in after.rows[:rows]:
        entries = row.entries
        for name in names or entries:
            entries[name].seconds = entries[name].seconds and scaled(entries[name].seconds, factor)
        for name, entry in entries.items():
            if entry.ratio:
                by = (factor if name in (names or entries) else 1) / (factor if OURS in (names or entries) else 1)
                entry.ratio = scaled(entry.ratio, by)
    return after


def scaled(spread, factor):
    return Spread(spread.median * factor, spread.q25 * factor, spread.q75 * factor, spread.rounds)


def of(found, what, entry=OURS):
    return [change for change in found.changes if (change.what, change.entry) == (what, entry)]


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
    assert found.incomparable == ""
    assert len(of(found, "slower", PEER)) == 2
    assert found.status == 0
    assert found.drift[PEER] == (pytest.approx(1.2), 2)


def test_a_change_must_exceed_the_threshold_and_the_quartiles(run):
    assert compare(run, slowed(run, 1.04, OURS)).status == 0, "below the threshold"
    assert compare(run, slowed(run, 1.04, OURS), threshold=0.01).status == 1
    after = slowed(run, 1.2, OURS)
    for row in after.rows:
        row.entries[OURS].seconds.q25 = run.rows[0].entries[OURS].seconds.median
    for row in run.rows:
        row.entries[OURS].seconds.q75 = row.entries[OURS].seconds.median * 1.3
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
    after.rows[0].entries[PEER] = Entry("failed", "out of memory")
    found = compare(run, after, relative=PEER)
    assert [change.bad for change in found.changes if change.entry == OURS and change.ratio] == [True]
    (change,) = of(found, "not judged")
    assert (change.id, change.detail.split("; ")[1]) == (run.rows[0].id, f"{PEER} was not timed beside it")
    assert list(lines(found, 0.05, PEER))[-1] == "ours: 1 not judged, 1 slower"


def told(before, after, relative=None):
    """Comparison, its lines as text, and the last of them."""
    found = compare(before, after, relative=relative)
    text = list(lines(found, 0.05, relative))
    return found, "\n".join(text), text[-1]


def moved(run, **factors):
    for name, factor in factors.items():
        run = slowed(run, factor, name)
    return run


def only(run, *peers):
    run = copy.deepcopy(run)
    for row in run.rows:
        row.entries = {name: row.entries[name] for name in (OURS, *peers)}
    return run


def test_peers_that_moved_against_each_other_are_no_comparison(run):
    """The issue's: one peer took 0.18 of its time and another 4.7 times, and ours was called faster."""
    after = moved(run, timm=0.18, torchvision=4.7, ours=0.5)
    found, text, last = told(run, after)
    assert "These runs cannot be compared: timm took 0.18 times as long as before, torchvision 4.7 times" in last
    assert run.rows[0].id in last
    assert found.status == 2
    # What ours took stands there, without a verdict; and the machine is not said to have moved by some mean.
    assert [change.what for change in found.changes if change.entry == OURS] == ["not judged"] * 2
    assert all(change.ratio == pytest.approx(0.5) for change in of(found, "not judged"))
    assert "ours: 2 not judged" in text and "faster      0.5" not in text and "the machine did, too" not in text
    assert len(of(found, "faster", "timm")) == len(of(found, "slower", "torchvision")) == 2

    # The same the other way round, and where ours was slower.
    assert told(after, run)[0].status == 2
    assert "took 0.213 times as long as before, timm 5.56 times" in told(after, run)[2]


@pytest.mark.parametrize(("factor", "status"), [(1.2, 0), (1.4, 0), (1.6, 2), (1 / 1.4, 0), (1 / 1.6, 2)])
def test_how_far_peers_may_move_against_each_other(run, factor, status):
    assert compare(run, slowed(run, factor, PEER)).status == status


def test_peers_that_moved_against_each_other_in_each_row_another_way(run):
    """Over all rows neither moved."""
    after = copy.deepcopy(run)
    for row, factor in zip(after.rows, (0.2, 5), strict=True):
        for peer, by in ((PEER, factor), ("torchvision", 1 / factor)):
            row.entries[peer].seconds = scaled(row.entries[peer].seconds, by)
    found, _, last = told(run, after)
    assert found.drift[PEER][0] == pytest.approx(1.0) == found.drift["torchvision"][0]
    assert found.status == 2
    assert re.search("compared: (timm|torchvision) took 0.2 times as long as before, (timm|torchvision) 5 times", last)


def test_a_single_row_that_went_astray_in_a_long_run_does_not_spoil_the_others():
    run = fake_run(models=(MODEL,), modes=("inference",), dtypes=("fp32",), ops=(), gpu=False, batches=range(1, 13))
    assert compare(run, moved_in(run, 1, timm=2.0)).status == 0
    assert compare(run, moved_in(run, 12, timm=2.0)).status == 2


def moved_in(run, rows, **factors):
    for name, factor in factors.items():
        run = slowed(run, factor, name, rows=rows)
    return run


def test_a_slower_machine_moves_all_peers_alike(run):
    found, _, last = told(run, slowed(run, 5.0))
    assert found.status == 1 and last == "ours: 2 slower"


def test_one_peer_has_nothing_to_be_held_against(run):
    alone = only(run, PEER)
    assert told(alone, slowed(alone, 4.7, PEER))[2] == "ours: 2 unchanged"
    assert compare(alone, slowed(alone, 0.2, PEER), relative=PEER).status == 1, "slower beside it"


def test_a_peer_that_most_moved_with_is_a_yardstick_and_no_other_is(run):
    three = only(run, PEER, "torchvision", "transformers")
    after = slowed(slowed(three, 1.3), 4.0, PEER)
    last = told(three, after)[2]
    assert "cannot be compared" in last
    assert last.endswith("Most peers moved with torchvision: --relative torchvision judges ours beside it.")
    for peer in ("torchvision", "transformers"):
        found, _, last = told(three, after, peer)
        assert (found.status, last) == (0, "ours: 2 unchanged")
        assert compare(three, slowed(after, 1.2, OURS), relative=peer).status == 1
    found, _, last = told(three, after, PEER)
    assert found.status == 2
    assert "cannot be compared: torchvision took 1.3 times as long as before, timm 5.2 times" in last
    # Of two that differ nobody can say which one moved; nor of three that all do.
    two = only(run, PEER, "torchvision")
    for peer in (None, PEER, "torchvision"):
        found, _, last = told(two, slowed(two, 4.0, PEER), peer)
        assert found.status == 2 and "--relative" not in last
        assert told(three, moved(three, timm=0.25, torchvision=4.0), peer)[0].status == 2


def test_what_is_wrong_fails_whether_or_not_times_can_be_compared(run):
    after = moved(run, timm=0.18, torchvision=4.7)
    row = after.rows[1]
    row.status, row.reason, row.entries = "wrong", "so it is", {OURS: Entry("wrong", "so it is")}
    found, text, last = told(run, after)
    assert found.status == 1
    assert "ours: 1 not judged, 1 wrong" in text and "cannot be compared" in last


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_ours_wrong_or_failed_fails(run, status):
    after = copy.deepcopy(run)
    row = after.rows[0]
    row.status, row.reason, row.entries = status, "so it is", {OURS: Entry(status, "so it is")}
    found = compare(run, after)
    assert [change.detail for change in of(found, status)] == ["so it is"]
    assert found.status == 1
    # The peers that were not timed then are no news; back again is no failure.
    assert not [change for change in found.changes if change.id == row.id and change.entry != OURS]
    assert compare(after, run).status == 0
    row.entries = {}
    assert compare(run, after).status == 1


def test_a_wrong_peer_and_an_absent_one_do_not_fail(run):
    after = copy.deepcopy(run)
    after.rows[0].entries[PEER] = Entry("wrong", error=0.5)
    del after.rows[1].entries[PEER]
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
    after.rows[1].status, after.rows[1].entries = "skipped", {}
    assert [change.id for change in of(compare(run, after), "skipped")] == [run.rows[1].id]


def test_errors_and_memory_that_grew(run):
    after = copy.deepcopy(run)
    after.rows[0].entries[OURS].error *= 1.5
    after.rows[1].entries[OURS].peak_bytes += 100 << 20
    after.rows[0].entries[OURS].peak_bytes += 1 << 20
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
    c = write(tmp_path, "c.json", moved(run, timm=0.18, torchvision=4.7))
    assert cli.main(["bench", "compare", a, c]) == 2
    assert "These runs cannot be compared: timm took 0.18" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "not a results file of 'fastvit bench'"),
        ('{"kind": "fastvit verify", "schema": 2}', "expected 'fastvit bench' of schema"),
        ('{"kind": "fastvit bench", "schema": 1}', f"of schema 1, expected 'fastvit bench' of schema {schema.SCHEMA}"),
        ('{"kind": "fastvit bench", "schema": 3, "rows": [{}]}', "a damaged results file"),
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


def test_a_frozen_model_is_ours(run):
    """Slower is bad, whatever its runtime, and makes no other entry's times incomparable."""
    for row in run.rows:
        row.entries["frozen auto"] = copy.deepcopy(row.entries[PEER])
    found = compare(run, slowed(run, 2.0, "frozen auto"))
    assert not found.incomparable and "frozen auto" not in found.drift
    assert {(change.entry, change.what) for change in found.changes if change.bad} == {("frozen auto", "slower")}
    told = "\n".join(lines(compare(run, run), 0.05, None))
    assert told.count("frozen auto") == len(run.rows)
