"""`fastvit.accelerate` and `fastvit.freeze` with other versions of timm and transformers than the tests' own.

`make test` installs the oldest whose blocks are known, `make test-all` the newest there is too, each in a folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from static_records import ROOT

SCRIPT = """
import json
import sys

import torch
from dropin_checks import errors, too_large
from dropin_models import FAMILIES, images, timm, transformers

import fastvit
from fastvit import dispatch
from fastvit.accuracy import relative_rms


def run(model, **arguments):
    with torch.no_grad():
        return family.run(model, images(), **arguments)


def ops_of(model, **arguments):
    ran = []
    with fastvit.use_backend("triton"), dispatch.watching(lambda op, args: ran.append(op.name)):
        run(model, **arguments)
    return ran.count("transformer_block")


def check(family):
    # The largest error of a gradient goes with the weights that are drawn, which are others in other versions.
    wrong = too_large(errors(family, torch.float32), torch.float32)
    assert [what for what in wrong if not what.startswith("largest")] == [], (family.name, wrong)
    model = family.model()
    before, classes = run(model), [type(module) for module in model.modules()]
    if family.name.startswith("transformers"):  # which records outputs by what it puts into the layers, for good
        model.set_attn_implementation("eager")
        asked = {"output_hidden_states": True, "output_attentions": True}
        recorded = run(model, **asked)
        fastvit.accelerate(model, strict=True)
        assert ops_of(model) == 2
        if family.name != "transformers CLIP vision":  # of 4.57, whose layers return them
            assert ops_of(model, output_hidden_states=True) == 2
        torch.testing.assert_close(run(model, **asked), recorded, rtol=0, atol=0)
        assert ops_of(model) == 2
    else:
        fastvit.accelerate(model, strict=True)
        assert ops_of(model) == 2
    fastvit.restore(model)
    assert [type(module) for module in model.modules()] == classes and ops_of(model) == 0
    if family.name.startswith("transformers"):
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(run(model), before, rtol=0, atol=0)


found = {"versions": [timm.__version__, transformers.__version__]}
for family in FAMILIES:
    if sys.argv[1:] and family.name not in sys.argv[1:]:
        continue
    try:
        family.build()
    except RuntimeError as error:
        assert "Unknown model" in str(error)
        found[family.name] = "unknown"
        continue
    check(family)
    found[family.name] = "right"
print(json.dumps(found))
"""
# Whose blocks were put together in another way.
OTHERS = ["timm ViT", "timm EVA-02", *(f"transformers {name}" for name in ("ViT", "Dinov2", "Dinov2, SwiGLU",
          "DINOv3ViT", "CLIP vision", "SigLIP vision"))]  # fmt: skip


def found_with(folder: str, *families: str) -> dict:
    place = ROOT / folder
    assert (place / ".installed").exists(), f"make {place.name}/.installed installs it"
    paths = [place, ROOT / "tests", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", SCRIPT, *families]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_the_oldest_that_are_known():
    assert found_with(".venv-oldest", *OTHERS) == {"versions": ["1.0.15", "4.57.6"], **dict.fromkeys(OTHERS, "right")}


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".venv-oldest", ".venv-newest"])
def test_every_family(folder):
    found = found_with(folder)
    del found["versions"]
    new = {"timm DINOv3"} if folder == ".venv-oldest" else set()
    assert {name for name, what in found.items() if what != "right"} == new and len(found) > 15
