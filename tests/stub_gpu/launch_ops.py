"""What the ops launch, as JSON: run by tests/test_launch_path.py in processes of their own, because pytest's interprets
the kernels. The tensors are on the CPU, the driver does nothing (see stub_gpu.py), all between is the real thing.

    launch_ops.py launches DTYPE...    of each sample, the kernels of a forward pass, of a backward pass with everything
                                       to train, and of one with each input alone; a second DTYPE: of the wide tensors
    launch_ops.py variants BATCH...    of each sample, how many kernels were compiled once it had run, forward and
                                       backward, at this and all earlier batch sizes
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable

import samples
import stub_gpu
import torch

from fastvit import dispatch, use_backend

# What may be wider than the weights: the residual stream, images, what is added to tokens or to scores.
WIDE = ("x", "residual", "image", "pos_embed", "prefix", "attn_bias")

launched: list[Recorder] = []


class Recorder(stub_gpu.Launcher):
    """There is one of each compiled kernel."""

    def __init__(self, src, metadata):
        super().__init__(src, metadata)
        self.constants = dict(part.split("=", 1) for part in self.description.split() if "=" in part)

    def __call__(self, *args):
        super().__call__(*args)
        launched.append(self)

    def __str__(self):
        """The kernel's name; of a product with its loaders, its epilogue and the dtype that it runs in."""
        name = self.description.split()[0]
        told = [self.constants[key] for key in ("LOAD_A", "LOAD_B", "EPILOGUE", "DTYPE") if key in self.constants]
        return f"{name}({', '.join(told)})" if told else name


def launches(run: Callable[[], object]) -> tuple[list[Recorder], object]:
    """The launches of run(), in their order, and what it returns."""
    count = ctypes.CDLL("libcuda.so.1").stub_launches
    before = count()
    launched.clear()
    result = run()
    assert count() - before == len(launched), "what Triton was asked to launch is not what it told the driver to"
    return launched.copy(), result


def passes(sample: samples.Sample, tensors: dict[str, torch.Tensor]) -> tuple[list[Recorder], list[Recorder]]:
    """The launches of a forward and of a backward pass."""
    forward, out = launches(lambda: sample.run(tensors))
    backward, _ = launches(lambda: samples.gradients(out, tensors, torch.ones_like(out)))
    return forward, backward


def report_launches(dtype: str, wide: str | None = None) -> dict[str, dict]:
    found = {}
    for sample in samples.SAMPLES:
        tensors = sample.tensors(getattr(torch, dtype))
        if wide is not None:
            wider = sample.tensors(getattr(torch, wide))
            tensors |= {name: wider[name] for name in WIDE if name in wider}
        forward, backward = passes(sample, tensors)
        report = found[sample.name] = {"forward": forward, "backward": backward}
        for name in [name for name, tensor in tensors.items() if tensor.requires_grad]:
            alone = {n: t.detach().requires_grad_(n == name) for n, t in tensors.items()}
            report[name] = passes(sample, alone)[1]
    return found


def report_variants(*batches: str) -> dict[str, list[int]]:
    found = {}
    for sample in samples.SAMPLES:
        compiled, counts = set(), []
        for batch in map(int, batches):
            tensors = sample.tensors(torch.bfloat16)
            for name in samples.BATCHED:
                if name in tensors:
                    one = tensors[name].detach()[:1]
                    tensors[name] = torch.cat(batch * [one]).requires_grad_(tensors[name].requires_grad)
            for launches_of_pass in passes(sample, tensors):
                compiled.update(launches_of_pass)
            counts.append(len(compiled))
        found[sample.name] = counts
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    stub_gpu.Driver.launcher_cls = Recorder
    stub_gpu.install_driver()
    dispatch.missing_requirements = lambda tensor: []
    what, *arguments = sys.argv[1:]
    if what == "auto":
        dispatch.torch_without_question = lambda device_type: None
    reports = {"launches": report_launches, "auto": report_launches, "variants": report_variants}
    with use_backend("auto" if what == "auto" else "triton"):
        print(json.dumps(reports[what](*arguments), default=str))
