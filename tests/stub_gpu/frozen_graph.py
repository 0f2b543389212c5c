"""A frozen model on CUDA graphs of the pretended GPU, as JSON: run by tests/test_launch_path.py in its own process.

Of each call of `Frozen` with so many images, on a plan made beforehand: the batch that was captured, the shapes of the
outputs, the kernels that were launched by preparing and by the call, and the replays.
"""

from __future__ import annotations

import json
import sys

import stub_gpu
import torch

from fastvit import create_model, use_backend
from fastvit.frozen import choice, freeze

model = create_model("vit_tiny_patch16_224", img_size=32, depth=3).bfloat16().eval()
with use_backend("torch"):
    frozen = freeze(model, output=["logits", "tokens"], runtime="torch")
plan = frozen.plan.dense()
stub_gpu.install()
replays = []
replay = torch.cuda.CUDAGraph.replay
torch.cuda.CUDAGraph.replay = lambda graph: replays.append(graph) or replay(graph)
# Its tensors hold no numbers to check.
freezing = sys.modules[type(frozen).__module__]
freezing._wrong, freezing.Frozen._right = lambda *_: "", lambda *_, **__: ()
frozen.__init__(plan.on(torch.device("cuda")), frozen.changes, "triton", False)
frozen._answers = {1: choice.Answer("triton", ())}
found = []
for batch in (3, 4, 3, 1):
    images, before = torch.zeros(batch, 3, 32, 32, device="cuda").bfloat16(), stub_gpu.State.launches
    outputs = frozen(images)
    shapes = {name: list(value.shape) for name, value in outputs.items()}
    captured = sorted({key[1] for key in frozen._prepared})
    found.append([captured, shapes, stub_gpu.State.launches - before, len(replays)])
print(json.dumps(found))
