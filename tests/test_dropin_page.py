"""docs/drop-in.md: its examples run, and its table is what the checks find."""

import os
import re
import subprocess
import sys

import pytest
from dropin_models import FAMILIES
from dropin_table import BEGIN, CHECKS, END, PAGE, cells, table

TEXT = PAGE.read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.S)
ROWS = [line.strip("| ").split(" | ") for line in TEXT.partition(BEGIN)[2].partition(END)[0].splitlines()[4:-3]]


def test_there_is_an_example_of_each_use():
    assert len(EXAMPLES) == 6


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, tmp_path):
    shim = "from fastvit import torchvision_shim\ntorchvision_shim.install()\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", shim + EXAMPLES[number]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_table_has_every_family_and_nothing_failed():
    assert [row[:2] for row in ROWS] == [[family.name, family.options] for family in FAMILIES]
    assert all(row[-len(CHECKS) :] == ["yes"] * len(CHECKS) for row in ROWS)
    assert "wrong" not in TEXT.partition(BEGIN)[2]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_row_is_what_the_checks_find(family):
    """But for the numbers, which another machine rounds otherwise."""
    row = cells(family)
    kept = ROWS[FAMILIES.index(family)]
    assert row[:2] + row[7:] == kept[:2] + kept[7:]
    assert table([row]).count("|") == 3 * (len(row) + 1)
