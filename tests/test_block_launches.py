"""docs/kernels.md is what the code says, and a block has the launches that it should."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import run_script

LISTED = """
import json
from fastvit.benchmarks import block_launches

page = block_launches.PAGE.read_text(encoding="utf-8")
names = {training: [launch.name for launch in block_launches.of_block(768, training)] for training in (False, True)}
forms = [launch.form for launch in block_launches.of_block(768, True)]
print(json.dumps([block_launches.filled(page) == page, names[False], names[True], forms]))
"""

MOVED = """
import json
from fastvit.benchmarks import block_launches
from fastvit.kernels.launch import choice

set_table = choice.set_table
choice.set_table = lambda lookup, library=False: set_table(None)  # every product ours
rows, dim = block_launches.BATCH * block_launches.TOKENS, 768
moved = [sum(one.bytes for one in block_launches.of_block(dim, training)) for training in (False, True)]
print(json.dumps([total / (2 * rows * dim) for total in moved]))
"""


def test_the_kernels_touch_what_the_head_of_their_file_says():
    """Of ViT-B at batch 256, with weights, vectors and partial sums at most a fifteenth more; H is 4 D."""
    forward, both = json.loads(run_script(MOVED))
    for moved, least in ((forward, 14 + 2 * 4), (both, 14 + 3 * 4 + 33 + 6 * 4)):
        assert least < moved < 16 / 15 * least


def test_the_page_is_what_the_code_says():
    current, forward, both, forms = json.loads(run_script(LISTED))
    assert current, "docs/kernels.md is not what `make kernels` writes"
    assert (Path(__file__).parents[1] / "docs" / "kernels" / "block.png").stat().st_size > 20_000
    # Five beside the folding of the weights, and one that takes the library's form is two.
    around = [name for name, form in zip(both, forms, strict=True) if form == "around the library's"]
    assert both[: len(forward)] == forward
    assert len(forward) - sum(name in forward for name in around) == 6
    assert len(both) - len(forward) - sum(name not in forward for name in around) == 13
    assert sum(form == "library" for form in forms) == 4 + len(around)
