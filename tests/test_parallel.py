"""Training over processes: blocks as one op under DDP and FSDP2, whose parameters come and go."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastvit
from fastvit import accuracy, dispatch

torch.set_num_threads(1)
dist.init_process_group("gloo")
images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
mine = images[2 * dist.get_rank() :][:2]


def build(kind):
    torch.manual_seed(0)
    size = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_classes": 3}
    model = fastvit.create_model("vit_tiny_patch16_224", **size)
    if kind == "DDP":
        return DistributedDataParallel(model)
    if kind.startswith("FSDP2"):
        dtype = torch.bfloat16 if "bfloat16" in kind else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for part in (*model.blocks, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    return model


def full(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def learn(kind, images, steps, backend):
    # The parameters after so many steps, and the last step's gradients.
    model, ops, slopes = build(kind), [], torch.tensor([0.7, -1.0, 0.4])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastvit.use_backend(backend), dispatch.watching(lambda op, args: ops.append(op.name)):
        for _ in range(steps):
            optimizer.zero_grad()
            (model(images).float() * slopes).mean().backward()
            optimizer.step()
    assert backend == "torch" or ops.count("transformer_block") == 2 * steps, ops
    parameters = list(model.parameters())
    return [full(p).detach() for p in parameters], torch.cat([full(p.grad).flatten() for p in parameters])


alone, _ = learn("alone", images, 2, "triton")
for kind in ("DDP", "FSDP2"):
    for got, expected in zip(learn(kind, mine, 2, "triton")[0], alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6)
_, truth = learn("alone", images, 1, "torch")
_, ours = learn("FSDP2 bfloat16", mine, 1, "triton")
_, plain = learn("FSDP2 bfloat16", mine, 1, "torch")
error, allowed = (accuracy.relative_rms(found, truth) for found in (ours, plain))
assert error <= accuracy.limit(torch.bfloat16, allowed), (error, allowed)
dist.barrier()
print("learned", flush=True)
os._exit(0)  # at a usual end, one in forty times, PyTorch's threads abort the process
"""


def test_two_processes_learn_what_one_does(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("learned") == 2
