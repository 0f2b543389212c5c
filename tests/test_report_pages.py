"""What is made of a run: the terminal's table, CSV, pictures, the page, and the READMEs' tables."""

from __future__ import annotations

import csv
import html
import importlib.util
import io
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastvit.benchmarks import bench, report
from fastvit.benchmarks.report import flat, gpu, page, summary, words
from fastvit.benchmarks.schema import OURS, Entry, Ratio, Run, Spread, is_ours, load
from runs import fake_run

ROOT = Path(__file__).parent.parent
SMALL = {"models": ("vit_tiny_patch16_224",), "dtypes": ("bf16",), "batches": (1, 8), "modes": ("inference",)}
SMALL["ops"] = ("attention",)
VOID = {"meta", "img"}

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")


@pytest.fixture(scope="module")
def run() -> Run:
    return fake_run()


class Page(HTMLParser):
    """Elements and text of a page; fails where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.attributes, self.text = set(), [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text += f"{data}\n"


# ---------------------------------------------------------------------------------------------------------------------
# Words and figures


@pytest.mark.parametrize(
    ("value", "text"),
    [(19012.3, "19,012"), (312.4, "312"), (31.24, "31.2"), (3.124, "3.12"), (0.03124, "0.0312"), (0, "0")],
)
def test_number(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.5, "1.50 s"), (0.0123, "12.3 ms"), (4.5e-5, "45.0 us"), (2e-7, "0.200 us")]
)
def test_duration(seconds, text):
    assert words.duration(seconds) == text


def duel(*ratios: tuple[float, str], peers=("timm",)) -> Run:
    """One case a ratio, against every peer; on a CPU."""
    run = fake_run(gpu=False, models=("vit_tiny_patch16_224",), modes=("inference",), ops=(), dtypes=("fp32",),
                   batches=range(1, len(ratios) + 1))  # fmt: skip
    for row, (ratio, verdict) in zip(run.rows, ratios, strict=True):
        ours = row.entries[OURS]
        row.entries = {OURS: ours}
        ours.seconds = Spread(row.bound_seconds * 2, 1, 1, 9)
        for i, peer in enumerate(peers):
            median = ratio * (1 + i)
            seconds = Spread(ours.seconds.median * median, 1, 1, 9)
            row.entries[peer] = Entry(seconds=seconds, ratio=Ratio(median, median, median, 9), verdict=verdict)
    return run


def test_the_headline_says_how_fast_against_whom_on_what_and_how_close():
    run = duel((2.0, "faster"), (0.5, "slower"), (8.0, "faster"), peers=("timm", "slow"))
    assert words.headline(run) == (
        "On Imaginary CPU, 2 threads, fastvit's PyTorch back end has 2.00 times the speed of the fastest peer of each "
        "case (3 cases of inference: faster in 2, a tie in 0, slower in 1), and reaches 50 % of the roofline bound."
    )
    (standing, slow) = words.against_each(run.rows)
    assert (standing.peer, standing.speed, standing.ties) == ("timm", pytest.approx(2.0), 0)
    assert slow.speed == pytest.approx(4.0)


def test_on_a_cpu_it_is_said_that_the_kernels_were_not_timed(run):
    assert words.caveats(duel((1.0, "tie"))) == [words.NOT_THE_KERNELS]
    assert words.NOT_THE_KERNELS not in words.caveats(run)


def test_ties_everywhere_are_no_speed_up():
    run = duel((1.3, "tie"), (1.2, "tie"))
    assert "PyTorch back end ties with the fastest peer of each case (2 cases" in words.headline(run)
    assert words.answers(run)["Against whom?"] == ["Our speed over theirs, inference: timm a tie."]


@pytest.mark.parametrize("entry", [OURS, "timm"])
def test_a_limit_that_somebody_beats_is_doubted(entry):
    run = duel((1.0, "tie"), (1.0, "tie"))
    assert "of the roofline bound" in words.headline(run)
    run.rows[1].entries[entry].seconds.median = run.rows[1].bound_seconds / 1.25
    run.rows[0].entries[entry].seconds.median = run.rows[0].bound_seconds / 1.5
    assert words.caveats(run)[1].startswith(f"Faster than the roofline bound: {entry} (up to 150 % of it). The device")
    assert "limit" not in words.headline(run)


def test_a_run_without_peers_or_speeds_claims_nothing(run):
    alone = duel((1.0, "tie"))
    del alone.rows[0].entries["timm"]
    assert "no peer could take part" in words.headline(alone)
    empty = Run(run.environment, run.settings, run.started)
    assert words.headline(empty) == "On Imaginary GPU, nothing was timed: no case was run."
    assert "The run did not finish: cases are missing." in words.caveats(empty)
    alone.rows[0].status = "wrong"
    assert words.headline(alone).endswith("nothing was timed: 1 case wrong.")


def test_the_answers_count_what_was_checked_and_name_the_absent(run):
    answers = words.answers(run)
    wrong = sum(row.status == "wrong" for row in run.rows)
    checked = wrong + len(words.timed(run.rows))
    assert wrong == 1
    assert f"{checked - 1} of {checked} cases" in answers["How sure?"][0]
    assert "flash-attn (flash-attn is not installed)" in answers["Against whom?"][-1]
    assert "2.00 TB/s" in answers["How close to the roofline bound?"][-1]
    assert "Without a speed: 1 case wrong, 1 case failed, 1 case skipped; the reasons stand in the tables." in (
        words.caveats(run)
    )


# Twelve rounds each. Of the first both quartiles are below 1, and three of the rounds are not: a tie, whose quartiles
# would say otherwise; of the second only one is not; the third is 1 to two decimals, and every time above it.
SPLIT = [0.93, 0.94, 0.94, 0.95, 0.95, 0.96, 0.96, 0.97, 0.97, 1.02, 1.03, 1.04]
BELOW = [0.93, 0.94, 0.94, 0.95, 0.95, 0.96, 0.96, 0.97, 0.97, 0.97, 0.98, 1.04]
CLOSE = [1.001, 1.0015, *[1.002] * 8, 1.003, 1.003]


@pytest.mark.parametrize(
    ("rounds", "text"), [(SPLIT, "tie [0.94 1.03]"), (BELOW, "0.96 [0.94 0.98]"), (CLOSE, "1.002 [1.002 1.003]")]
)
def test_the_word_and_the_interval_never_contradict_each_other(rounds, text):
    """In the terminal, on the page, in the README's table and in the summary of `make gpu`."""
    run = duel((1.0, "tie"))
    (row,) = run.rows
    ((found, verdict),) = bench._against(OURS, {OURS: [1.0] * 12, "timm": rounds}).values()
    row.entries["timm"].ratio, row.entries["timm"].verdict = found, verdict
    word, low, high = re.findall(r"[\w.]+", text)
    assert (word == "tie") == (float(low) <= 1 <= float(high))
    assert words.ratio(found, verdict) == text
    assert any(text in line for line in lines_of(run))
    on_page = Page(page.render(run, {})).text
    assert f"{word}\n{low}–{high}\n" in on_page and f"{text}\n" in on_page
    assert summary.matrix(run.rows).endswith(f"| {word} |")
    assert gpu._model(row).endswith(f"timm {word}")


def test_random_rounds_are_never_told_in_two_ways():
    draw = random.Random(0)
    for _ in range(2000):
        noise, centre = draw.choice([(0.001, 1.001), (0.003, 0.998), (0.02, 1.0), (0.02, 1.02), (0.02, 0.97)])
        rounds = [draw.gauss(centre, noise) for _ in range(draw.choice([12, 22, 51]))]
        ((found, verdict),) = bench._against(OURS, {OURS: [1.0] * len(rounds), "timm": rounds}).values()
        word, low, high = re.findall(r"[\w.]+", words.ratio(found, verdict))
        assert (word == "tie") == (float(low) <= 1 <= float(high)), (word, low, high)
        assert word == "tie" or float(low) <= float(word) <= float(high)


def test_the_interval_is_explained_where_it_is_shown_and_old_files_show_none(run):
    told = Page(page.render(run, {})).text
    assert words.INTERVAL in told and "Below it the interval of that ratio" in told
    old = duel((0.95, "tie"))
    assert words.ratio(old.rows[0].entries["timm"].ratio, "tie") == "tie"
    told = Page(page.render(old, {})).text
    assert "Below it the interval" not in told and "tie [" not in told
    assert "tie [" not in "\n".join(lines_of(old))


def test_each_side_of_ours_is_seen_on_its_own():
    """The committed run's frozen models against each peer, by their own paired rounds, none of ours among the peers."""
    committed = load(ROOT / summary.RESULTS / "cpu" / "bench.json")
    auto, alone, ours = words.sides(committed)
    assert ours is committed and len(auto.rows) == len(alone.rows) == len(committed.rows)
    for side, name in ((auto, "frozen auto"), (alone, "frozen")):
        for row, whole in zip(side.rows, committed.rows, strict=True):
            assert row.entries[OURS].seconds == whole.entries[name].seconds
            assert not any(is_ours(peer) for peer in row.entries if peer != OURS)
            assert row.entries["timm"].ratio == whole.against[name]["timm"].ratio
            assert row.entries["timm"].verdict == whole.against[name]["timm"].verdict
    assert words.headline(auto) != words.headline(alone) != words.headline(ours)


# ---------------------------------------------------------------------------------------------------------------------
# The terminal and CSV


def lines_of(run: Run) -> list[str]:
    out = io.StringIO()
    report.print_run(run, out)
    return out.getvalue().splitlines()


def test_the_table_is_plain_aligned_text_where_nobody_looks(run):
    lines = lines_of(run)
    assert not any("\x1b" in line for line in lines)
    heading = lines[0]
    ours = next(line for line in lines if line.startswith("  ours") and "wrong" not in line)
    end = heading.index("images/s") + len("images/s")
    assert re.fullmatch(r"  ours +[\d,.]+", ours[:end])
    first = run.rows[0].entries
    assert f"{first['timm'].ratio.median:.2f} [{first['timm'].ratio.low:.2f}" in next(x for x in lines if "timm " in x)
    assert any("tie [" in line for line in lines)
    assert max(map(len, lines)) <= 120


def test_failures_stand_where_speeds_would_and_absences_once(run):
    text = "\n".join(lines_of(run))
    assert "torchvision           failed: RuntimeError: expected <b>one</b> device" in text
    assert "timm compiled         wrong: error 2.5e-01 is more than the limit 4.0e-03" in text
    assert "  skipped: the time limit of 100 s was reached" in text
    assert text.count("flash-attn is not installed") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_colours_and_no_line_wraps(run, monkeypatch, columns):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    table = report.Table(out)
    for row in words.timed(run.rows)[:3]:
        table.row(row)
    assert "\x1b[" in out.getvalue()
    lines = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()
    measured = [line for line in lines if re.match(r"  (by|ours|timm)\b", line)]
    assert max(map(len, measured)) <= columns
    assert ("compile s" in lines[0]) == (columns == 120)


def test_csv_has_a_line_a_entry_and_every_number(run):
    lines = list(csv.DictReader(io.StringIO(flat.as_csv(run))))
    assert len(lines) == sum(max(1, len(row.entries)) for row in run.rows)
    line = next(line for line in lines if line["by"] == "timm")
    entry = run.rows[0].entries["timm"]
    assert line["id"] == run.rows[0].id
    assert float(line["seconds_q75"]) == entry.seconds.q75
    assert float(line["ratio_median"]) == entry.ratio.median
    assert float(line["fraction_of_bound"]) == run.rows[0].fraction_of_bound("timm")
    assert {line["case_status"] for line in lines} == {"timed", "wrong", "failed", "skipped"}


def test_times_of_graphs_stand_beside_the_others_with_their_own_verdict():
    run = fake_run(**SMALL)
    row = run.rows[0]
    timm, torch = row.entries["timm"], row.entries["torch"]
    before = page.render(run, {})
    assert "ours/this, graphs" not in before and page.GRAPHS.strip() not in before
    timm.graph_ratio, timm.graph_verdict = Ratio(4.5, 4.4, 4.6, 12, 4.35, 4.65), "faster"
    torch.graph_ratio, torch.graph_verdict = Ratio(1.01, 1.005, 1.1, 12, 0.9, 1.12), "tie"
    text = "\n".join(lines_of(run))
    graph = words.duration(timm.graph.median)
    assert f"CUDA graph {graph}, ours/this 4.50 [4.35 4.65]; until the call returned" in text
    assert ", ours/this tie [0.90 1.12]; until" in text
    found = Page(page.render(run, {})).text
    assert "graph 4.50\n" in found and "graph tie\n" in found, "the scoreboard"
    assert "ours/this, graphs\n" in found and "4.50 [4.35 4.65]\n" in found, "every entry"
    assert page.GRAPHS.strip() in found
    line = next(line for line in csv.DictReader(io.StringIO(flat.as_csv(run))) if line["by"] == "timm")
    assert (line["graph_ratio_median"], line["graph_ratio_high"], line["graph_verdict"]) == ("4.5", "4.65", "faster")


def test_what_the_time_limit_left_out_is_said(run):
    left = Run(run.environment, run.settings, run.started, extra={"left_out": {"a": 40.0, "b": 20.0}})
    assert words.caveats(left)[-1] == "The run did not finish: cases are missing, 2 cases to fit the time limit."


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (44.4, "44 s"), (59.9, "1 min"), (138, "2 min 20 s"), (3900, "1 h 5 min")]
)
def test_minutes(seconds, text):
    assert words.minutes(seconds) == text


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@needs_matplotlib
def test_each_picture_is_made_where_there_is_something_to_draw():
    from fastvit.benchmarks.report.pictures import DRAWN, pictures

    assert list(DRAWN) == list(page.CAPTIONS)
    run = fake_run(**SMALL)
    drawn = set(pictures(run))
    of_models = {f"{stem}-inference-bf16.png" for stem in ("throughput", "latency", "memory")}
    assert drawn == of_models | {"waterfall-inference.png", "roofline.png", "error.png"}

    run.peaks = None
    run.rows = [row for row in run.rows if row.batch == 1]
    for row in run.rows:
        row.entries.pop("timm", None), row.entries.pop("timm amp", None)
        for entry in row.entries.values():
            entry.peak_bytes = entry.error = None
    assert set(pictures(run)) == {"throughput-inference-bf16.png"}
    run.rows = []
    assert pictures(run) == {}


@needs_matplotlib
def test_pictures_are_for_a_phone_and_the_same_from_the_same_run():
    from fastvit.benchmarks.report.pictures import pictures
    from PIL import Image

    first, second = (pictures(fake_run(**SMALL)) for _ in range(2))
    assert first == second
    for name, data in first.items():
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.width < 1000, name
            assert picture.height > picture.width / 2, name
            assert "dpi" not in picture.info and not picture.text, name
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 8, name


@needs_matplotlib
def test_labels_that_would_touch_are_pushed_apart():
    from fastvit.benchmarks.report.pictures import _apart

    assert _apart([0.2, 0.8], 0.1, 0, 1) == [0.2, 0.8]
    assert _apart([0.5, 0.5], 0.1, 0, 1) == pytest.approx([0.45, 0.55])
    assert _apart([1.0, 0.99, 0.3], 0.1, 0, 1) == pytest.approx([1.0, 0.9, 0.3])
    assert _apart([0.0, 0.01], 0.1, 0, 1) == pytest.approx([0.0, 0.1])


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_the_page_stands_alone_and_holds_every_case(run):
    text = page.render(run, {"roofline.png": b"png"})
    found = Page(text)
    assert words.headline(run) in found.text
    assert "script" not in found.tags and "link" not in found.tags
    sources = [value for key, value in found.attributes if key in ("src", "href")]
    assert sources == ["data:image/png;base64,cG5n"]
    assert not re.search(r"url\(|@import|https?:", text)
    for row in run.rows:
        assert row.model in found.text
        if row.status != "timed":
            assert f"{row.status}: {row.reason}" in found.text
    assert "tanh GELU; no class token" in found.text
    assert run.settings["command"] in found.text
    assert "cpu" not in words.METHOD_GPU and words.METHOD_GPU in found.text
    assert 'name="viewport"' in text


def test_whatever_a_run_says_is_text_on_the_page_and_in_markdown(run):
    evil = "</style><script>alert(1)</script>|<img src=x>"

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(inner) for key, inner in value.items()}
        return evil if isinstance(value, str) else value

    spoiled = fake_run(**SMALL)
    spoiled.environment, spoiled.settings = poison(spoiled.environment), poison(spoiled.settings)
    spoiled.started, spoiled.extra = evil, {evil: evil}
    for row in spoiled.rows:
        row.entries = {(evil if name == "timm" else name): entry for name, entry in row.entries.items()}
        for entry in row.entries.values():
            entry.note = entry.reason = evil
            entry.verdict = '" onclick="'  # a class on the page
    spoiled.rows[0].status = spoiled.rows[0].reason = spoiled.rows[0].id = evil
    found = Page(page.render(spoiled, {}))
    assert "script" not in found.tags and "img" not in found.tags
    assert found.text.count(evil) > 20
    assert "onclick" not in dict(found.attributes)
    table = summary.matrix(spoiled.rows)
    assert "<script>" not in table.replace("\\<", "")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_write_leaves_the_same_files_twice_and_no_picture_of_another_run(tmp_path):
    run = fake_run(**SMALL)
    (tmp_path / "latency-training-fp16.png").write_text("of an earlier run")
    (tmp_path / "photo.png").write_text("of somebody else")
    written = report.write(run, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", *(path.name for path in written)}
    before = {path: path.read_bytes() for path in written}
    report.write(run, tmp_path)
    assert {path: path.read_bytes() for path in written} == before
    assert {"bench.csv", "index.html"} <= {path.name for path in written}


def test_without_matplotlib_there_is_a_page_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    written = report.write(fake_run(**SMALL), tmp_path)
    assert [path.name for path in written] == ["bench.csv", "index.html"]
    assert "img" not in Page((tmp_path / "index.html").read_text()).tags


# ---------------------------------------------------------------------------------------------------------------------
# The READMEs


@pytest.fixture
def tree(tmp_path) -> Path:
    """A checkout with a CPU's run, an older one of a GPU, one of another schema, and one folder verified only."""
    results = tmp_path / summary.RESULTS
    runs = {"cpu": fake_run(gpu=False, **SMALL), "imaginary/0123": fake_run(**SMALL)}
    runs["cpu"].started = "2001-01-01T00:00:00+00:00"
    for name, run in runs.items():
        (results / name).mkdir(parents=True)
        (results / name / "bench.json").write_text(json.dumps(run.as_dict()))
    for name in ("old", "verified"):
        (results / name).mkdir()
    (results / "old" / "bench.json").write_text('{"rows": []}')
    (results / "verified" / "verify.json").write_text('{"results": [{"status": "passed"}, {"status": "failed"}]}')
    (tmp_path / "README.md").write_text(f"before\n{summary.BEGIN}\nold table\n{summary.END}\nafter\n")
    return tmp_path


def test_main_writes_both_readmes_and_every_page(tree):
    summary.main(tree)
    text = (tree / summary.RESULTS / "README.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.M)
    assert headings == ["cpu", "imaginary/0123", "old", "verified"]
    assert f"Not readable: {summary.RESULTS}/old/bench.json: not a results file of 'fastvit bench'." in text
    assert "every kernel against the reference: 1 passed, 1 failed." in text
    assert words.NOT_THE_KERNELS in text
    for link in re.findall(r'(?:\]\(|src=")([^")]+)', text):
        assert (tree / summary.RESULTS / link).exists(), link
    assert str(tree) not in text
    readme = (tree / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old table" not in readme
    assert "On Imaginary GPU" in readme, "a GPU's run goes before a newer one of a CPU"
    assert "/attention" not in readme
    assert text == summary.results_page(tree)
    assert summary.between(readme, summary.BEGIN, summary.END, summary.newest_table(tree)) == readme


def test_the_newest_of_two_runs_is_shown(tree):
    newer = fake_run(**SMALL)
    newer.started = "2000-06-01T00:00:00+00:00"
    folder = tree / summary.RESULTS / "imaginary" / "4567"
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps(newer.as_dict()))
    assert "Measured 2000-06-01" in summary.newest_table(tree)


def test_a_readme_without_its_markers_is_refused(tree):
    (tree / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="README.md has no <!-- results:begin -->"):
        summary.main(tree)


def test_the_committed_readmes_are_what_the_results_make_them():
    again = "out of date: `make pages` writes it"
    assert (ROOT / summary.RESULTS / "README.md").read_text() == summary.results_page(ROOT), again
    readme = (ROOT / "README.md").read_text()
    assert summary.between(readme, summary.BEGIN, summary.END, summary.newest_table(ROOT)) == readme, again
    for found in summary.find(ROOT):
        if found.run:
            assert (found.folder / report.CSV).read_text() == flat.as_csv(found.run), again


# ---------------------------------------------------------------------------------------------------------------------
# In a browser

PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{page}"></iframe>
<script>
onerror = message => document.title = message;
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument, root = page.documentElement, images = [...page.images];
  for (const details of page.querySelectorAll("details")) details.open = true;
  const out = document.createElement("output");
  out.textContent = JSON.stringify({{
    overflow: root.scrollWidth - root.clientWidth, width: root.clientWidth, images: images.length,
    loaded: images.filter(image => image.complete && image.naturalWidth > 300).length,
    legible: Math.min(...images.map(image => image.width)),
    fonts: Math.min(...[...page.querySelectorAll("p,dd,dt,td,th")].map(e => parseFloat(getComputedStyle(e).fontSize))),
  }});
  document.body.append(out);
}};
</script>"""


@pytest.mark.slow
@needs_matplotlib
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser_the_page_fits_its_width_and_shows_its_pictures(tmp_path, gpu, width, height):
    """In a frame of that width: a window of headless Chromium is never narrower than 500 pixels."""
    run = fake_run(gpu, batches=(1, 256), dtypes=("bf16",))
    written = report.write(run, tmp_path)
    wrapper = tmp_path / "wrapper.html"
    text = html.escape((tmp_path / "index.html").read_text())
    wrapper.write_text(PROBE.format(width=width, height=height, page=text))
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    arguments += ["--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(["chromium", *arguments, wrapper.as_uri()], capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r"<output>(.*?)</output>", done.stdout).group(1))
    assert found["width"] in range(width - 20, width + 1)
    assert found["overflow"] == 0
    assert found["images"] == found["loaded"] == sum(path.suffix == ".png" for path in written)
    assert found["legible"] > 300
    assert found["fonts"] >= 13
    assert "CONSOLE" not in done.stderr
