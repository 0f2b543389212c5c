"""What runs an accelerated model of each library on a GPU under "auto", as JSON: by model and dtype the ops that were
asked for and whether the kernels took them, and how many launches a training step had. Run by
tests/test_accelerate_tools.py in a process of its own, because pytest's interprets the kernels."""

from __future__ import annotations

import ctypes
import json

import stub_gpu

stub_gpu.install()

import torch  # noqa: E402
from dropin_models import BY_NAME, first  # noqa: E402

import fastvit  # noqa: E402
from fastvit import dispatch  # noqa: E402

taken: list[str] = []
choose = dispatch.choose


def noted(op, args):
    run, prepared = choose(op, args)
    taken.append(f"{op.name}: {'torch' if run is op.torch else 'kernels'}")
    return run, prepared


dispatch.choose = noted
launches = ctypes.CDLL("libcuda.so.1").stub_launches
found = {}
for name in ("timm ViT", "torchvision ViT", "transformers Dinov2"):
    for kind in ("bfloat16", "float32", "autocast"):
        family = BY_NAME[name]
        model = family.model().to("cuda", torch.bfloat16 if kind == "bfloat16" else torch.float32)
        images = torch.randn(2, 3, 32, 32, device="cuda", dtype=next(model.parameters()).dtype)
        fastvit.accelerate(model)
        taken.clear()
        before = launches()
        with torch.autocast("cuda", torch.bfloat16, enabled=kind == "autocast"):
            torch.autograd.backward(first(family.run(model, images)).float().sum())
        found[f"{name}, {kind}"] = [launches() - before, *taken]
print(json.dumps(found))
