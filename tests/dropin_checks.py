"""What has to hold for a family of models that `fastvit.accelerate` takes: each check raises AssertionError where it
does not. Tests run them, and so does `dropin_table.py`, which writes docs/drop-in.md's table."""

from __future__ import annotations

import copy
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from dropin_models import OTHERS, Family, first, gradients_of, images, randomise

import fastvit
from fastvit import dispatch
from fastvit.accuracy import FACTOR, relative_rms

EXACT = 2e-6  # what float32 outputs may be off by, relative rms, where the library's are as near
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


# --------------------------------------------------------------------------------------------------------------------
# Numbers


def errors(family: Family, dtype: torch.dtype, model=None) -> dict[str, tuple[float, float]]:
    """By name of an output or gradient the relative error in `dtype` of the accelerated model and of the library's."""
    model = (model or family.model()).to(dtype)
    x = images(6, dtype)
    truth = gradients_of(family, copy.deepcopy(model).double(), x.double())
    before = gradients_of(family, model, x)
    summary = fastvit.accelerate(model, strict=True)
    assert len(summary.swapped) == 3
    ran = []
    with fastvit.use_backend("triton"), dispatch.watching(lambda op, args: ran.append(op.name)):
        after = gradients_of(family, model, x)
    assert ran == ["patch_embed", "transformer_block", "transformer_block"]
    assert after.keys() == before.keys() == truth.keys()
    assert [value.dtype for value in after.values()] == [value.dtype for value in before.values()]

    def error(found, name):
        if not name.endswith(("k_proj.bias", "attention.key.bias")):
            return relative_rms(found[name], truth[name])
        # Softmax cannot see it: its gradient is zero, and what is left of it is judged beside its like of the queries.
        size = truth[name.replace("k_proj", "q_proj").replace("key", "query")].norm()
        return (found[name].double().norm() / size).item()

    return {name: (error(after, name), error(before, name)) for name in truth}


@torch.inference_mode()
def cpu_ratio(family: Family, rounds: int = 200) -> float:
    """The time of an accelerated model's forward pass on the CPU, where it runs its library's code, over that of the
    model as it was: the median of rounds in which both took turns."""
    x, models = images(6), [family.model(), family.model()]
    fastvit.accelerate(models[1])
    ratios = []
    for round in range(rounds + 5):  # the first to warm up
        seconds = {}
        for number in (0, 1) if round % 2 else (1, 0):
            start = time.perf_counter()
            family.run(models[number], x)
            seconds[number] = time.perf_counter() - start
        ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios[5:])


def too_large(found: dict[str, tuple[float, float]], dtype: torch.dtype) -> list[str]:
    """What is wrong: outputs by name, and of all gradients together the rms or the largest error."""
    outputs = {name: pair for name, pair in found.items() if not name.startswith("d ")}
    wrong = [
        name
        for name, (ours, theirs) in outputs.items()
        if not ours <= (EXACT if dtype == torch.float32 and theirs <= EXACT else FACTOR[dtype] * theirs)
    ]
    ours, theirs = torch.tensor([pair for name, pair in found.items() if name not in outputs]).T
    for what in ("rms", "largest"):
        mine, its = (e.square().mean().sqrt() if what == "rms" else e.max() for e in (ours, theirs))
        wrong += [] if mine <= FACTOR[dtype] * its else [f"{what} of the gradients, {mine:.2g} beside {its:.2g}"]
    return wrong


def check_numbers(family: Family, dtype: torch.dtype) -> None:
    """Outputs, and gradients of the image and of every parameter."""
    assert too_large(errors(family, dtype), dtype) == []


@torch.no_grad()
def check_other(name: str) -> None:
    """The outputs of one of OTHERS, in evaluation."""
    build, prepare, ops = OTHERS[name]
    torch.manual_seed(1)
    model, x = randomise(build()).eval(), images()

    def tokens():
        if name.startswith("timm"):
            out = model.forward_features(x)  # NaFlexViT's are in a dictionary
            return out["patches"] if isinstance(out, dict) else out
        return model(**(prepare(x) if prepare else {"pixel_values": x})).last_hidden_state

    want, ran = tokens(), []
    fastvit.accelerate(model)
    with fastvit.use_backend("triton"), dispatch.watching(lambda op, args: ran.append(op.name)):
        got = tokens()
    assert ran == ops, ran
    assert relative_rms(got, want) <= EXACT


# --------------------------------------------------------------------------------------------------------------------
# Tools


def check_compile(family: Family, backend: str) -> None:
    """`torch.compile`, forward and backward in one graph each; with our operators in it where these are asked for."""
    model, other = family.model().train(), family.model().train()
    fastvit.accelerate(model)
    torch._dynamo.reset()
    want = gradients_of(family, other, images())
    with fastvit.use_backend(backend), torch.profiler.profile() as profile:
        got = gradients_of(family, torch.compile(model, fullgraph=True, backend="aot_eager"), images())
    got = {name.replace("d _orig_mod.", "d "): value for name, value in got.items()}
    assert got.keys() == want.keys()
    torch.testing.assert_close(got, want, **CLOSE)
    called = {event.key for event in profile.key_averages() if event.key.startswith("fastvit::")}
    ours = {f"fastvit::{op}_{way}" for op in ("transformer_block", "patch_embed") for way in ("forward", "backward")}
    assert called == (ours if backend == "triton" else set()), called


@torch.no_grad()
def check_export(family: Family, strict: bool = False) -> None:
    """`torch.export` for any batch, saved and loaded: with our operators where the kernels are asked for, without them
    where they are not."""
    model = family.model()
    want = first(family.run(model, images(4)))
    fastvit.accelerate(model)
    shapes = {name: {0: torch.export.Dim("batch", min=2, max=64)} for name in (family.input, *family.arguments)}
    given = [{name: value[:batch] for name, value in family.arguments.items()} for batch in (3, 4)]
    for backend, expected in (("triton", ["patch_embed", *["transformer_block"] * 2]), ("auto", [])):
        with fastvit.use_backend(backend):
            exported = torch.export.export(model, (images(3),), given[0], dynamic_shapes=shapes, strict=strict)
            file = io.BytesIO()
            torch.export.save(exported, file)
            file.seek(0)
            got = torch.export.load(file).module()(images(4), **given[1])
        called = [str(node.target) for node in exported.graph.nodes if str(node.target).startswith("fastvit.")]
        assert called == [f"fastvit.{name}_forward.default" for name in expected], called
        torch.testing.assert_close(got if isinstance(got, torch.Tensor) else first(dict(got.items())), want, **CLOSE)


SCRIPT = """
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dropin_models import BY_NAME, first, images
import fastvit
from fastvit import dispatch
from fastvit.dropin.swap import swapped_kind

torch.set_num_threads(1)
dist.init_process_group("gloo")
name, *kinds = sys.argv[1:]
family = BY_NAME[name]
here = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)


def full(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def learn(kind, rows, accelerated):
    model, ops = family.model().train(), []
    if accelerated:
        fastvit.accelerate(model)
    blocks = [module for module in model.modules() if swapped_kind(module) == "block"]
    if kind == "DDP":
        # Of parameters that a model never reads DDP has to be told.
        model = DistributedDataParallel(model, find_unused_parameters=True)
    if kind == "FSDP2":
        for part in (*blocks, model):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with fastvit.use_backend("triton" if accelerated else "torch"):
        with dispatch.watching(lambda op, args: ops.append(op.name)):
            for _ in range(2):
                optimizer.zero_grad()
                given = {key: value[rows] for key, value in family.arguments.items()}
                out = model(images(4)[rows], **given)
                out = out if isinstance(out, torch.Tensor) else first(dict(out.items()))
                (out * torch.linspace(-1, 1, out[0].numel()).reshape(out[0].shape)).mean().backward()
                optimizer.step()
    assert ops.count("transformer_block") == (4 if accelerated else 0), (name, kind, ops)
    return [full(parameter).detach() for parameter in model.parameters()]


alone = learn("alone", slice(0, 4), False)
for kind in kinds:
    for got, expected in zip(learn(kind, here, True), alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)
dist.barrier()
print("learned", flush=True)
os._exit(0)  # at a usual end, one in forty times, PyTorch's threads abort the process
"""


def check_distributed(family: Family, *kinds: str) -> None:
    """Training over two processes, "DDP" or "FSDP2" around an accelerated model, against the library's own in one."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(SCRIPT)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
        paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        ran = subprocess.run(
            [*command, family.name, *kinds], env=environment, capture_output=True, text=True, check=False
        )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.count("learned") == 2
