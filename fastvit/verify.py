"""Every kernel against the reference, on this machine: the same inputs three times, in float64, plain and ours.

The truth is `fastvit.reference` in float64 on inputs already rounded to the case's dtype. The bar is the error of
plain PyTorch (back end "torch") in that dtype; ours is the error of the Triton kernels. Both are relative rms errors
over each whole tensor: the output, and the gradient of every input, weight, bias and table.
"""

from __future__ import annotations

import functools
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

import fastvit

from . import report, workers
from .dispatch import LIBRARY_GRADIENTS

# How many times plain PyTorch's own error ours may be, by dtype; and the order in which they are verified.
FACTOR = {torch.bfloat16: 1.5, torch.float32: 2.0, torch.float16: 1.5}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Given as data, never trained: they have no gradient.
_CONSTANT = ("drop_path_scale",)
CASE_SECONDS = 60.0  # what no case takes, with a process's start and all its compiling, on a busy machine
OUT_OF_MEMORY = "OutOfMemoryError"


def floor(dtype: torch.dtype) -> float:
    """The error below which a tensor stored in `dtype` is never called wrong, whatever plain PyTorch's is.

    Where both results are exact up to rounding, their ratio is luck. A result rounded once, correctly, to a half
    precision is off by up to eps / sqrt(12) rms (uniform in half a unit in the last place): no kernel that stores that
    dtype does better. In float32 the sums themselves round too, in an order that is the kernel's own: one eps.
    """
    eps = torch.finfo(dtype).eps
    return eps if dtype in (torch.float32, torch.float64) else eps / math.sqrt(12)


def relative_rms(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||; the plain rms of `got` where the truth is zero throughout."""
    got, truth = got.double(), truth.double()
    norm = torch.linalg.vector_norm(truth)
    if norm == 0:
        return torch.linalg.vector_norm(got).item() / math.sqrt(max(1, got.numel()))
    return (torch.linalg.vector_norm(got - truth) / norm).item()


@dataclass(frozen=True)
class Case:
    """One thing to verify. `prepare(device)` gives three functions, of the truth's tensors by name, plain PyTorch's and
    ours; the last two run under the back end in force. `rank` orders the list: what matters most comes first."""

    op: str
    label: str
    dtype: torch.dtype
    prepare: Callable[[str], tuple[Callable[[], dict], ...]] = field(repr=False)
    rank: int = 0

    @property
    def name(self) -> str:
        return f"{self.op} {self.label} {SHORT[self.dtype]}"


@dataclass
class TensorResult:
    """One tensor's errors: ours, plain PyTorch's, and the most that ours may be."""

    name: str
    ours: float
    plain: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.limit  # false for NaN too


@dataclass
class Result:
    """What became of one case: "passed", "failed" or "skipped", with every tensor's errors or the reason."""

    case: Case
    status: str
    tensors: list[TensorResult]
    reason: str = ""
    seconds: float = 0.0

    @property
    def worst(self) -> TensorResult | None:
        """The tensor nearest to its limit, or furthest beyond it."""
        return max(self.tensors, key=lambda t: t.ours / t.limit if math.isfinite(t.ours) else math.inf, default=None)

    def as_dict(self) -> dict:
        """For JSON, which has no NaN and no infinity: those become strings."""
        return {
            "op": self.case.op,
            "case": self.case.label,
            "dtype": SHORT[self.case.dtype],
            "status": self.status,
            "reason": self.reason,
            "seconds": round(self.seconds, 3),
            "tensors": [
                {"name": t.name, "ok": t.ok} | {key: _for_json(getattr(t, key)) for key in ("ours", "plain", "limit")}
                for t in self.tensors
            ],
        }


def _for_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def run_case(case: Case, device: str) -> Result:
    """Verify one case. Never raises for what the case does: an exception is a failed result with its first line."""
    start = time.perf_counter()
    try:
        truth_of, plain_of, ours_of = case.prepare(device)
        truth = truth_of()
        with fastvit.use_backend("torch"):
            plain = plain_of()
        with fastvit.use_backend("triton"):
            ours = ours_of()
        tensors = [_compare(name, case.dtype, ours[name], plain[name], truth[name]) for name in truth]
    except Exception as error:  # whatever a broken kernel raises must not stop the other cases
        return Result(case, "failed", [], report.first_line(error), time.perf_counter() - start)
    wrong = [t.name for t in tensors if not t.ok]
    reason = f"beyond the limit: {', '.join(wrong)}" if wrong else ""
    return Result(case, "failed" if wrong else "passed", tensors, reason, time.perf_counter() - start)


def _compare(name, dtype, ours, plain, truth) -> TensorResult:
    if ours.shape != truth.shape or ours.dtype != plain.dtype:
        raise ValueError(
            f"{name} is {tuple(ours.shape)} {ours.dtype}, expected {tuple(truth.shape)} {plain.dtype}",
        )
    plain_error = relative_rms(plain, truth)
    limit = max(FACTOR[dtype] * plain_error, floor(ours.dtype))
    return TensorResult(name, relative_rms(ours, truth), plain_error, limit)


def run(cases: Iterable[Case], device: str, time_limit: float | None = None) -> Iterator[Result]:
    """Results of `cases` as they come. Past `time_limit` seconds no case is started: the rest come back "skipped"."""
    start = time.perf_counter()
    for case in cases:
        if time_limit is not None and time.perf_counter() - start > time_limit:
            yield _skipped(case, time_limit)
        else:
            yield run_case(case, device)


def run_in_processes(
    cases: Iterable[Case], device: str, count: int, time_limit: float | None = None
) -> Iterator[Result]:
    """As `run`, in `count` processes: most of a case's time on a GPU is compiling, which one process does on one core.

    Cases of one op and dtype, which share kernels, run in one process; whole models, which compile the most, begin. A
    case that takes the GPU from its process (an illegal access) or ends it has failed, and the rest go on. One that
    found no memory left beside the others, or takes longer than `CASE_SECONDS`, runs again at the end, alone and with
    its kernels in Triton's cache.
    """
    waiting = {case.name: case for case in cases}
    deadline = None if time_limit is None else time.monotonic() + time_limit
    for processes in (count, 1):
        groups: dict[tuple, list[str]] = {}
        for case in sorted(waiting.values(), key=lambda case: case.op != "model"):  # which compile the most
            groups.setdefault((case.op, case.dtype), []).append(case.name)
        for outcome in workers.run(groups.values(), Server(device), processes, CASE_SECONDS, deadline):
            case = waiting[outcome.task]
            result = Result(case, "failed", [], outcome.died) if outcome.died else Result(case, *outcome.result)
            if processes > 1 and result.reason.startswith((OUT_OF_MEMORY, workers.TOO_LONG)):
                continue
            del waiting[outcome.task]
            yield result
    for case in waiting.values():
        yield _skipped(case, time_limit)


def _skipped(case: Case, time_limit: float) -> Result:
    return Result(case, "skipped", [], f"not started: the time limit of {time_limit:g} s was reached")


@dataclass(frozen=True)
class Server:
    """What a process of `run_in_processes` does: verifies a case of the device's list, by name."""

    device: str

    def __call__(self, name: str) -> tuple[tuple, bool]:
        """The fields of a Result after its case, and whether the process can verify another one."""
        on_gpu = self.device.startswith("cuda")
        torch.set_num_threads(1)  # the other cores have processes of their own
        if not on_gpu:
            use_interpreter()
        result = run_case(_by_name(self.device)[name], self.device)
        fields, fit = (result.status, result.tensors, result.reason, result.seconds), True
        if on_gpu:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()  # others need the memory
            except RuntimeError as error:
                fit = False
                if result.status == "passed":  # it broke after its results were read
                    fields = ("failed", [], report.first_line(error), result.seconds)
        return fields, fit


@functools.cache
def _by_name(device: str) -> dict[str, Case]:
    return {case.name: case for case in cases(sizes_for(device))}


def use_interpreter() -> None:
    """Let the kernels run on the CPU, repaired and guarded. Nothing may have imported Triton before."""
    os.environ["TRITON_INTERPRET"] = "1"
    from .interpret import install

    install(os.environ.get("FASTVIT_GUARD", "race"))


# --------------------------------------------------------------------------------------------------------------------
# Ops


def _op_case(
    op: str, label: str, dtype: torch.dtype, build: Callable, rank: int = 0, ours: Callable | None = None
) -> Case:
    """`build(draw)` gives the op's tensors by argument name, and its other arguments; ours: what is verified, the op
    if not said."""

    def prepare(device):
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{op} {label}".encode()))

        def draw(*shape, mean=0.0, scale=1.0, dtype=dtype):
            values = torch.randn(shape, generator=generator, device=device)
            return (mean + scale * values).to(dtype)

        tensors, options = build(draw)
        upstream = {}  # the output gradient, drawn once the output's shape is known: the same for all three

        def evaluate(function, precise):
            leaves = {}
            for name, tensor in tensors.items():
                tensor = tensor.double() if precise and tensor.is_floating_point() else tensor
                leaves[name] = tensor.detach().requires_grad_(tensor.is_floating_point() and name not in _CONSTANT)
            out = function(**leaves, **options)
            if not upstream:
                upstream["out"] = draw(*out.shape)
            wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
            gradients = torch.autograd.grad(out, list(wanted.values()), upstream["out"].to(out.dtype))
            return {"out": out.detach(), **{f"d {name}": g for name, g in zip(wanted, gradients, strict=True)}}

        return (
            lambda: evaluate(getattr(fastvit.reference, op), precise=True),
            # With a bias, PyTorch's own attention may compute in float32 whatever the dtype: no bar for a computation
            # in half precision. The formula, op by op in the dtype, is.
            lambda: evaluate(getattr(fastvit.reference if "attn_bias" in tensors else fastvit.ops, op), precise=False),
            lambda: evaluate(ours or getattr(fastvit.ops, op), precise=False),
        )

    return Case(op, label, dtype, prepare, rank)


def _norm(draw, dim):
    return {"norm_weight": draw(dim, mean=1.0, scale=0.2), "norm_bias": draw(dim, scale=0.2)}


def _layer_norm(draw, batch, tokens, dim):
    return {
        "x": draw(batch, tokens, dim, mean=0.5),
        "weight": draw(dim, mean=1.0, scale=0.2),
        "bias": draw(dim, scale=0.2),
    }, {}


def _layer_norm_linear(draw, batch, tokens, dim, out, wide_x=False, bias=True):
    x = draw(batch, tokens, dim, mean=0.5, **({"dtype": torch.float32} if wide_x else {}))
    tensors = {"x": x, **_norm(draw, dim), "weight": draw(out, dim, scale=dim**-0.5)}
    return tensors | ({"bias": draw(out, scale=0.2)} if bias else {}), {}


def _linear_residual(draw, batch, tokens, dim, layer_scale=False, drop_path=False, bias=True, wide_x=False):
    tensors = {
        "x": draw(batch, tokens, dim),
        "weight": draw(dim, dim, scale=dim**-0.5),
        "bias": draw(dim, scale=0.2) if bias else None,
        "residual": draw(batch, tokens, dim, **({"dtype": torch.float32} if wide_x else {})),
    }
    return _scales(draw, tensors, batch, dim, layer_scale, drop_path)


def _layer_norm_mlp(
    draw,
    batch,
    tokens,
    dim,
    hidden,
    activation="gelu",
    residual=True,
    layer_scale=False,
    drop_path=False,
    bias=True,
    wide_x=False,
):
    x = draw(batch, tokens, dim, mean=0.5, **({"dtype": torch.float32} if wide_x else {}))
    tensors = {
        "x": x,
        **_norm(draw, dim),
        "fc1_weight": draw(hidden, dim, scale=dim**-0.5),
        "fc1_bias": draw(hidden, scale=0.2) if bias else None,
        "fc2_weight": draw(dim, hidden, scale=hidden**-0.5),
        "fc2_bias": draw(dim, scale=0.2) if bias else None,
    }
    if residual:
        tensors["residual"] = draw(batch, tokens, dim, dtype=x.dtype)
    tensors, options = _scales(draw, tensors, batch, dim, layer_scale, drop_path)
    return tensors, options | {"activation": activation}


def _scales(draw, tensors, batch, dim, layer_scale, drop_path):
    options = {name: None for name, tensor in tensors.items() if tensor is None}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if layer_scale:
        tensors["layer_scale"] = draw(dim, mean=0.5, scale=0.2)
    if drop_path:
        keep = torch.tensor([i % 3 != 1 for i in range(batch)], device=tensors["x"].device)
        tensors["drop_path_scale"] = keep.to(tensors["x"].dtype) * 1.25
    return tensors, options


def _attention(draw, batch, tokens, heads, dim, mask=False, bias=False, scale=None):
    tensors = {"qkv": draw(batch, tokens, 3, heads, dim)}
    if mask:
        lengths = torch.arange(batch, device=tensors["qkv"].device) * tokens // batch  # the first attends to nothing
        tensors["key_padding_mask"] = torch.arange(tokens, device=lengths.device) < lengths[:, None]
    if bias:
        tensors["attn_bias"] = draw(1, heads, tokens, tokens)
    return tensors, {"scale": scale}


def _patch_embed(
    draw, batch, size, patch, dim, channels=3, prefix=1, pos="all", bias=True, pixels="float", channels_last=False
):
    height, width = size
    ph, pw = patch
    patches = (height // ph) * (width // pw)
    fan_in = channels * ph * pw
    image = draw(batch, channels, height, width)
    if pixels == "uint8":
        image = (image.float() * 50 + 120).clamp(0, 255).to(torch.uint8)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    tensors = {"image": image, "weight": draw(dim, channels, ph, pw, scale=fan_in**-0.5)}
    if bias:
        tensors["bias"] = draw(dim, scale=0.2)
    if prefix:
        tensors["prefix"] = draw(prefix, dim)
    if pos is not None:
        tensors["pos_embed"] = draw(patches + (prefix if pos == "all" else 0), dim)
    if pixels == "float":
        return tensors, {}
    return tensors, {"mean": [0.485, 0.456, 0.406][:channels], "std": [0.229, 0.224, 0.225][:channels]}


# --------------------------------------------------------------------------------------------------------------------
# Whole models


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter with seeded random values of a size that makes each one matter to the output.

    The usual initialisation would hide faults: zero biases, layer-scale of 1e-5, tokens of 1e-6.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                gain = "norm" in name and name.endswith("weight") or name.endswith("gamma")
                values = values * 0.2 + (1.0 if gain else 0.0)
            elif name.endswith("weight"):
                values = values * parameter[0].numel() ** -0.5
            else:  # class, distillation and register tokens; the position table
                values = values * 0.5
            parameter.copy_(values)


def reference_options(config) -> dict:
    """The arguments of `fastvit.reference.vision_transformer` for a model of `config`, beside images and state."""
    return {
        "num_heads": config.num_heads,
        "eps": config.norm_eps,
        "activation": config.activation,
        "mlp": config.mlp,
        "global_pool": config.global_pool,
    }


def _model_case(name: str, label: str, dtype: torch.dtype, batch: int, rank: int, **overrides) -> Case:
    def prepare(device):
        model = fastvit.create_model(name, **overrides)
        randomise(model)
        model = model.to(device, dtype).eval()
        generator = torch.Generator(device).manual_seed(1)
        shape = (batch, model.config.in_chans, *model.config.img_size)
        images = torch.randn(shape, generator=generator, device=device).to(dtype)
        upstream = {}

        def evaluate(forward, parameters):
            out = forward()
            if not upstream:
                upstream["out"] = torch.randn(out.shape, generator=generator, device=device).to(dtype)
            gradients = torch.autograd.grad(out, list(parameters.values()), upstream["out"].to(out.dtype))
            return {"out": out.detach(), **{f"d {n}": g for n, g in zip(parameters, gradients, strict=True)}}

        def truth():
            state = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
            options = reference_options(model.config)
            return evaluate(lambda: fastvit.reference.vision_transformer(images.double(), state, **options), state)

        def ours():
            return evaluate(lambda: model(images), dict(model.named_parameters()))

        return truth, ours, ours

    return Case("model", label, dtype, prepare, rank)


# --------------------------------------------------------------------------------------------------------------------
# The two lists


@dataclass(frozen=True)
class Sizes:
    """What the lists differ in: everything else about a case is the same on a GPU and in the interpreter."""

    batch: int
    widths: dict[str, int]  # embed_dim by the model size that has it
    tokens: tuple[int, ...]  # the first goes with every width, the others with `main`
    main: str
    head_dims: tuple[int, ...]
    attention_shapes: tuple[tuple[int, int, int], ...]  # (tokens, heads, head dim) of real models
    patches: tuple[tuple[str, int, int, int], ...]  # (label, image side, patch side, embed_dim)
    models: tuple[tuple[str, dict], ...]
    model_batch: int
    brief: tuple[torch.dtype, ...] = ()  # dtypes of which only the cases of rank 0 and the models are run


DEVICE = Sizes(
    batch=8,
    widths={"Ti": 192, "S": 384, "B": 768, "L": 1024, "H": 1280, "g": 1536},
    tokens=(197, 257, 577, 1370),
    main="B",
    head_dims=(16, 32, 48, 64, 72, 80, 88, 96, 104, 128),
    attention_shapes=tuple((n, h, d) for n in (197, 257, 577, 1370) for h, d in ((12, 64), (16, 80))),
    patches=(
        ("Ti/16 224", 224, 16, 192),
        ("S/8 224", 224, 8, 384),
        ("B/16 224", 224, 16, 768),
        ("B/32 224", 224, 32, 768),
        ("L/16 384", 384, 16, 1024),
        ("H/14 224", 224, 14, 1280),
        ("g/14 518", 518, 14, 1536),
    ),
    models=(
        ("vit_base_patch16_224", {}),
        ("vit_tiny_patch16_224", {}),
        ("vit_small_patch32_224", {}),
        ("deit_small_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 224}),
        ("vit_large_patch16_384", {"depth": 12}),
        ("vit_huge_patch14_224", {"depth": 12}),
    ),
    model_batch=4,
)

# Small enough for a second a case in Triton's interpreter, on a real width; tokens that no block size divides. float16
# takes the same paths there as bfloat16.
INTERPRETER = Sizes(
    batch=2,
    widths={"Ti": 192},
    tokens=(50,),
    main="Ti",
    head_dims=(16, 72, 80, 128),
    attention_shapes=((197, 1, 64),),
    patches=(("Ti/16 64", 64, 16, 192), ("S/8 24", 24, 8, 384), ("Ti/32 64", 64, 32, 192), ("H/14 28", 28, 14, 320)),
    models=(("vit_tiny_patch16_224", {"img_size": 64, "num_classes": 10}),),
    model_batch=1,
    brief=(torch.float16,),
)


def sizes_for(device: str) -> Sizes:
    """The list that is run on a device: "cuda...", or "cpu" for the interpreter."""
    return DEVICE if device.startswith("cuda") else INTERPRETER


def cases(sizes: Sizes, dtypes: tuple[torch.dtype, ...] = tuple(FACTOR), ops: Iterable[str] = ()) -> list[Case]:
    """The list for `sizes`: every op (or `ops`) in every dtype, what matters most first."""
    found = [case for dtype in dtypes for case in _cases_of(sizes, dtype) if not ops or case.op in ops]
    found = [case for case in found if case.rank == 0 or case.op == "model" or case.dtype not in sizes.brief]
    return sorted(found, key=lambda case: case.rank)


def _cases_of(sizes: Sizes, dtype: torch.dtype) -> Iterator[Case]:
    batch, first = sizes.batch, sizes.tokens[0]

    def op(name, label, build, rank, ours=None, **arguments):
        return _op_case(name, label, dtype, lambda draw: build(draw, **arguments), rank, ours)

    # Each op at each width, then at each sequence length.
    for width, tokens in [(w, first) for w in sizes.widths] + [(sizes.main, n) for n in sizes.tokens[1:]]:
        dim = sizes.widths[width]
        shape = {"batch": batch, "tokens": tokens, "dim": dim}
        rank = 0 if (width, tokens) == (sizes.main, first) else 2
        label = f"{width} {batch}x{tokens}x{dim}"
        yield op("layer_norm", label, _layer_norm, rank, **shape)
        yield op("layer_norm_linear", f"{label} qkv", _layer_norm_linear, rank, out=3 * dim, **shape)
        yield op("linear_residual", label, _linear_residual, rank, **shape)
        yield op("layer_norm_mlp", label, _layer_norm_mlp, rank, hidden=4 * dim, **shape)
    for tokens, heads, dim in sizes.attention_shapes:
        rank = 0 if tokens == sizes.attention_shapes[0][0] else 2
        yield op("attention", f"{batch}x{tokens} {heads}x{dim}", _attention, rank, batch=batch, tokens=tokens,
                 heads=heads, dim=dim)  # fmt: skip
    for label, side, patch, dim in sizes.patches:
        rank = 0 if label == sizes.patches[0][0] else 2
        image = {"batch": batch, "size": (side, side), "patch": (patch, patch), "dim": dim}
        yield op("patch_embed", label, _patch_embed, rank, **image)

    for name, overrides in sizes.models:
        label = " ".join([name, *(f"{key}={value}" for key, value in overrides.items())])
        yield _model_case(name, label, dtype, sizes.model_batch, rank=1, **overrides)

    # Every option of every op, at one width.
    dim = sizes.widths[sizes.main]
    shape = {"batch": batch, "tokens": first, "dim": dim}
    for activation in ("gelu_tanh", "quick_gelu", "silu"):
        yield op("layer_norm_mlp", activation, _layer_norm_mlp, 3, hidden=2 * dim, activation=activation, **shape)
    yield op("layer_norm_mlp", "no residual, no bias", _layer_norm_mlp, 3, hidden=dim, residual=False, bias=False,
             **shape)  # fmt: skip
    yield op("layer_norm_mlp", "layer-scale, drop-path", _layer_norm_mlp, 3, hidden=dim, layer_scale=True,
             drop_path=True, **shape)  # fmt: skip
    yield op("linear_residual", "layer-scale, drop-path", _linear_residual, 3, layer_scale=True, drop_path=True,
             **shape)  # fmt: skip
    yield op("linear_residual", "no bias", _linear_residual, 3, bias=False, **shape)
    yield op("layer_norm_linear", "no bias, odd sizes", _layer_norm_linear, 3, batch=1, tokens=13, dim=100, out=77,
             bias=False)  # fmt: skip
    if dtype != torch.float32:  # the residual stream stays in float32, as under autocast
        yield op("layer_norm_linear", "fp32 stream", _layer_norm_linear, 3, out=dim, wide_x=True, **shape)
        yield op("linear_residual", "fp32 stream", _linear_residual, 3, wide_x=True, **shape)
        yield op("layer_norm_mlp", "fp32 stream", _layer_norm_mlp, 3, hidden=dim, wide_x=True, **shape)
        # Under "auto", weight gradients are the library's in half precision.
        scales = {"layer_scale": True, "drop_path": True}
        image = {"batch": batch, "size": (64, 48), "patch": (16, 16), "dim": 192, "pixels": "uint8"}
        for name, build, arguments in (
            ("layer_norm_linear", _layer_norm_linear, {**shape, "out": dim}),
            ("linear_residual", _linear_residual, shape | scales),
            ("layer_norm_mlp", _layer_norm_mlp, {**shape, "hidden": dim, **scales}),
            ("patch_embed", _patch_embed, image),
        ):
            ours = functools.partial(fastvit.ops.run_candidate, name, LIBRARY_GRADIENTS)
            yield op(name, "weight gradients by torch.mm", build, 3, ours, **arguments)
    for head_dim in sizes.head_dims:
        yield op("attention", f"head dim {head_dim}", _attention, 3, batch=batch, tokens=first, heads=2, dim=head_dim)
    attention = {"batch": 3, "tokens": first, "heads": 2, "dim": 64}
    yield op("attention", "padding mask", _attention, 3, mask=True, **attention)
    yield op("attention", "bias", _attention, 3, bias=True, scale=0.1, **attention)
    yield op("attention", "mask and bias", _attention, 3, mask=True, bias=True, **attention)
    image = {"batch": batch, "size": (64, 48), "patch": (16, 16), "dim": 192}
    yield op("patch_embed", "uint8", _patch_embed, 3, pixels="uint8", **image)
    yield op("patch_embed", "uint8 channels_last", _patch_embed, 3, pixels="uint8", channels_last=True, **image)
    yield op("patch_embed", "channels_last", _patch_embed, 3, channels_last=True, **image)
    yield op("patch_embed", "no bias, no prefix, no positions", _patch_embed, 3, bias=False, prefix=0, pos=None,
             **image)  # fmt: skip
    yield op("patch_embed", "5 prefix tokens, positions of patches", _patch_embed, 3, prefix=5, pos="patches", **image)
    yield op("patch_embed", "patch 8x16, 4 channels", _patch_embed, 3, channels=4, **image | {"patch": (8, 16)})
