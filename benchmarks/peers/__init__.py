"""What fastvit is compared with: the same model or op on the same weights, made by others.

Each peer is one entry of `PEERS` and its adapter one small module beside this file, imported only when the peer is
built. An adapter has `build(peer, case, ours, inputs) -> Built`, and where it cannot take everything that the fields of
its `Peer` allow, `unfit(peer, case, config, device) -> str | None`, the reason, from the model's `ViTConfig` alone. It
imports its library inside those functions, so that asking who is there costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from fastvit.models.config import ViTConfig
from fastvit.verify import SHORT

from ..cases import MODES, OPS, Case

_ALL, _CPU, _GPU = ("cpu", "cuda"), ("cpu",), ("cuda",)
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Peer:
    """One entry of `PEERS`.

    module: the adapter's file; packages: what it imports, by import name; kind: "model", "op", or "both" for one that
    has a form of each; devices: torch's device types; modes: of `cases.MODES`; what: one line for the reader; ops and
    dtypes: those it takes; compiles: whether something is compiled before its first answer.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    kind: str
    devices: tuple[str, ...]
    modes: tuple[str, ...]
    what: str
    ops: tuple[str, ...] = OPS
    dtypes: tuple[torch.dtype, ...] = tuple(SHORT)
    compiles: bool = False


@dataclass
class Built:
    """A peer ready to run.

    call: images (B, C, H, W) -> logits (B, num_classes) of a model, or the op's arguments by name -> its output. Where
    the case is training, the result has a graph to the images and to the peer's own parameters. It may be overwritten
    by the next call (of a peer that replays CUDA graphs). note: how what it computes differs from the case. opaque: on
    a GPU, it runs on CUDA graphs or streams of its own: PyTorch's allocator does not see what a call takes, and no
    CUDA graph can hold the call.
    """

    call: Callable[..., torch.Tensor]
    note: str = ""
    opaque: bool = False


_INFERENCE = MODES[:1]
_ATTENTION = ("attention",)

# In the order of a report.
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("torch", "own", (), "both", _GPU, MODES, "fastvit on its PyTorch back end"),
        Peer("compiled", "own", (), "op", _ALL, MODES, "fastvit's PyTorch back end under torch.compile", compiles=True),
        Peer("reference", "reference", (), "model", _ALL, MODES, "the plain ViT function that is fastvit's truth"),
        Peer("timm", "timm", ("timm",), "model", _ALL, MODES, "timm, eager, weights in the case's dtype"),
        Peer("timm amp", "timm", ("timm",), "model", _ALL, MODES, "timm, eager, autocast", dtypes=_HALVES),
        Peer("timm compiled", "timm", ("timm",), "model", _ALL, MODES, "timm under torch.compile", compiles=True),
        Peer(
            "timm max-autotune",
            "timm",
            ("timm",),
            "model",
            _GPU,
            MODES,
            "timm, torch.compile mode max-autotune",
            compiles=True,
        ),
        Peer(
            *("timm compiled freezing", "timm", ("timm",), "model", _CPU, _INFERENCE),
            "timm under torch.compile with freezing",
            compiles=True,
        ),
        Peer("torchvision", "torchvision", ("torchvision",), "model", _ALL, MODES, "torchvision, eager"),
        Peer("transformers", "transformers", ("transformers",), "model", _ALL, MODES, "Hugging Face, sdpa attention"),
        Peer(
            *("onnxruntime", "onnxruntime", ("onnxruntime", "onnx", "onnxscript"), "model", _ALL, _INFERENCE),
            "ONNX Runtime, of fastvit's model exported",
            compiles=True,
        ),
        Peer(
            *("openvino", "openvino", ("openvino",), "model", _CPU, _INFERENCE),
            "OpenVINO, of fastvit's model converted",
            dtypes=(torch.float32, torch.bfloat16),
            compiles=True,
        ),
        Peer("frozen", "frozen", (), "model", _CPU, _INFERENCE, "fastvit.freeze on PyTorch alone", compiles=True),
        Peer(
            *("frozen openvino", "frozen", ("openvino",), "model", _CPU, _INFERENCE, "fastvit.freeze on OpenVINO"),
            dtypes=(torch.float32, torch.bfloat16),
            compiles=True,
        ),
        Peer(
            *("frozen onnxruntime", "frozen", ("onnxruntime", "onnx", "onnxscript"), "model", _CPU, _INFERENCE),
            "fastvit.freeze on ONNX Runtime",
            dtypes=(torch.float32,),
            compiles=True,
        ),
        Peer(
            *("frozen auto", "frozen", (), "model", _ALL, _INFERENCE),
            "fastvit.freeze on the fastest runtime that is installed",
            compiles=True,
        ),
        Peer("sdpa flash", "sdpa", (), "op", _ALL, MODES, "PyTorch's flash attention", _ATTENTION),
        Peer("sdpa efficient", "sdpa", (), "op", _GPU, MODES, "PyTorch's memory-efficient attention", _ATTENTION),
        Peer("sdpa cudnn", "sdpa", (), "op", _GPU, MODES, "cuDNN's attention", _ATTENTION, _HALVES),
        Peer("sdpa math", "sdpa", (), "op", _ALL, MODES, "PyTorch's attention as matrix products", _ATTENTION),
        Peer(
            *("flash-attn", "flash_attn", ("flash_attn",), "op", _GPU, MODES),
            *("the flash-attn package on packed qkv", _ATTENTION, _HALVES),
        ),
        Peer("xformers", "xformers", ("xformers",), "op", _GPU, MODES, "memory_efficient_attention", _ATTENTION),
        Peer(
            *("transformer-engine", "transformer_engine", ("transformer_engine",), "op", _GPU, MODES),
            *("NVIDIA's fused modules", ("attention", "layer_norm_linear", "layer_norm_mlp")),
        ),
        Peer(
            *("attorch", "attorch", ("attorch",), "op", _GPU, MODES, "attorch's Triton kernels"),
            *(("layer_norm", "layer_norm_linear", "layer_norm_mlp"), (torch.float32,)),
            compiles=True,
        ),
    )
}


def absent(peer: Peer, case: Case, device: torch.device | str) -> str | None:
    """Why the peer cannot take part in the case on the device, or None where it can. Imports no peer's library."""
    device = torch.device(device)
    kind = "op" if case.op else "model"
    if peer.kind not in (kind, "both"):
        return f"has {peer.kind}s, no {kind}s"
    if device.type not in peer.devices:
        return f"runs on {' and '.join(peer.devices)}, not on {device.type}"
    if case.mode not in peer.modes:
        return f"{', '.join(peer.modes)} only"
    if case.op and case.op not in peer.ops:
        return f"has no {case.op}"
    if case.dtype not in peer.dtypes:
        return f"takes {', '.join(SHORT[dtype] for dtype in peer.dtypes)}, not {SHORT[case.dtype]}"
    missing = [package for package in peer.packages if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return _unfit(peer, case, case.config, device)


def build(peer: Peer, case: Case, ours: torch.nn.Module | None, inputs: dict | None) -> Built:
    """The peer ready to run the case.

    Of a model case, ours is fastvit's model on its device and in the case's dtype, in evaluation mode for inference
    and training mode with all drop rates 0 for training: the peer gets copies of its weights and its mode, and takes
    its shape from `ours.config`. Of an op case, inputs is the op's arguments (of `fastvit.ops.<op>`) by name.

    Raises ValueError where the peer has no such model or op, before any work, and what the peer's library raises.
    """
    config = case.config if case.op else ours.config
    tensors = ours.parameters() if ours is not None else (t for t in inputs.values() if isinstance(t, torch.Tensor))
    reason = _unfit(peer, case, config, next(iter(tensors)).device)
    if reason:
        raise ValueError(f"{peer.name}: {reason}")
    return _adapter(peer).build(peer, case, ours, inputs)


def _adapter(peer: Peer) -> ModuleType:
    return importlib.import_module(f".{peer.module}", __name__)


def _unfit(peer: Peer, case: Case, config: ViTConfig, device: torch.device) -> str | None:
    adapter = _adapter(peer)
    return adapter.unfit(peer, case, config, device) if hasattr(adapter, "unfit") else None
