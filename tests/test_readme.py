"""The README's Python examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_is_an_example_of_each_use():
    assert len(EXAMPLES) == 5
    assert all(5 <= len(example.strip().splitlines()) <= 12 for example in EXAMPLES)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, tmp_path):
    script = EXAMPLES[number]
    if "import timm" in script:
        pytest.importorskip("timm")
        # A torchvision built for CUDA, which timm imports, needs this beside a torch without.
        script = "from fastvit import torchvision_shim\ntorchvision_shim.install()\n" + script
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
