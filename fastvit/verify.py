"""Every kernel against the reference, on this machine: the same inputs three times, in float64, plain and ours.

What is accurate enough stands in `accuracy`: the truth is `fastvit.reference`, plain is the back end "torch", ours are
the Triton kernels. The arguments of the ops come from `examples`.
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

from . import examples, report, workers
from .accuracy import FACTOR, excess, floor, limit, precise, relative_rms, results

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What no case takes on a busy machine, with a process's start and all its compiling; and, on a CPU, in the interpreter.
CASE_SECONDS, INTERPRETED_SECONDS = 60.0, 600.0
OUT_OF_MEMORY = "OutOfMemoryError"


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
        return max(self.tensors, key=lambda t: excess(t.ours, t.limit), default=None)

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
            # On a GPU the second time is noted, and the third replays it: see `kernels.launch.replay`.
            again = [ours_of() for _ in range(2)] if device != "cpu" else []
        tensors = [_compare(name, case.dtype, ours[name], plain[name], truth[name]) for name in truth]
    except Exception as error:  # whatever a broken kernel raises must not stop the other cases
        return Result(case, "failed", [], report.first_line(error), time.perf_counter() - start)
    wrong = [t.name for t in tensors if not t.ok]
    reason = f"beyond the limit: {', '.join(wrong)}" if wrong else ""
    for name in truth if not wrong else ():
        if not all(torch.equal(ours[name], other[name]) for other in again):
            wrong, reason = [name], f"{name} is not the same when the call is repeated"
    return Result(case, "failed" if wrong else "passed", tensors, reason, time.perf_counter() - start)


def _compare(name, dtype, ours, plain, truth) -> TensorResult:
    if ours.shape != truth.shape or ours.dtype != plain.dtype:
        raise ValueError(
            f"{name} is {tuple(ours.shape)} {ours.dtype}, expected {tuple(truth.shape)} {plain.dtype}",
        )
    plain_error = relative_rms(plain, truth)
    return TensorResult(name, relative_rms(ours, truth), plain_error, limit(dtype, plain_error, floor(ours.dtype)))


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
    found no memory left beside the others, or takes longer than any should, runs again at the end, alone and with
    its kernels in Triton's cache.
    """
    waiting = {case.name: case for case in cases}
    seconds = CASE_SECONDS if device.startswith("cuda") else INTERPRETED_SECONDS
    deadline = None if time_limit is None else time.monotonic() + time_limit
    for processes in (count, 1):
        groups: dict[tuple, list[str]] = {}
        for case in sorted(waiting.values(), key=lambda case: case.op != "model"):  # which compile the most
            groups.setdefault((case.op, case.dtype), []).append(case.name)
        for outcome in workers.run(groups.values(), Server(device), processes, seconds, deadline):
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
    """Let the kernels run on the CPU, repaired, each launch checked. Nothing may have imported Triton before."""
    os.environ["TRITON_INTERPRET"] = "1"
    from .interpret import install

    install(os.environ.get("FASTVIT_SANITIZER", "race"))


# --------------------------------------------------------------------------------------------------------------------
# Ops


def _op_case(
    dtype: torch.dtype,
    op: str,
    label: str,
    rank: int,
    sizes: dict,
    dtypes: dict[str, torch.dtype] | None = None,
    channels_last: bool = False,
    by_library: bool = False,
    trained: bool = True,
    **options,
) -> Case:
    """The op on its example tensors of these sizes, some of `dtypes` of their own, with these further arguments;
    by_library: with the library's form of every product; trained: with all gradients."""

    def prepare(device):
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{op} {label}".encode()))
        draw = examples.Draw(dtype, device, generator, dtypes or {}, trained=trained, channels_last=channels_last)
        tensors = examples.tensors(op, draw, **sizes)
        upstream = functools.cache(lambda shape: draw("out", *shape).detach())

        def evaluate(function, tensors):
            return results(function(**tensors, **options), tensors, upstream)

        def ours():
            if not by_library:
                return evaluate(getattr(fastvit.ops, op), tensors)
            from .kernels.launch import choice

            with choice.by_library():
                return evaluate(getattr(fastvit.ops, op), tensors)

        return (
            lambda: evaluate(getattr(fastvit.reference, op), precise(tensors)),
            # With a bias, PyTorch's own attention may compute in float32 whatever the dtype: no bar for a computation
            # in half precision. The formula, op by op in the dtype, is.
            lambda: evaluate(getattr(fastvit.reference if "attn_bias" in tensors else fastvit.ops, op), tensors),
            ours,
        )

    return Case(op, label, dtype, prepare, rank)


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
        "rope_temperature": config.rope_temperature,
    }


def _model_case(name: str, label: str, dtype: torch.dtype, batch: int, rank: int, **overrides) -> Case:
    def prepare(device):
        model = fastvit.create_model(name, **overrides)
        randomise(model)
        model = model.to(device, dtype).eval()
        draw = examples.Draw(dtype, device, torch.Generator(device).manual_seed(1))
        images = draw("image", batch, model.config.in_chans, *model.config.img_size)
        upstream = functools.cache(lambda shape: draw("out", *shape))

        parameters = dict(model.named_parameters())

        def truth():
            state, options = precise(parameters), reference_options(model.config)
            return results(fastvit.reference.vision_transformer(images.double(), state, **options), state, upstream)

        def ours():
            return results(model(images), parameters, upstream)

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
        ("vit_base_patch32_clip_quickgelu_224", {}),
        ("vit_so400m_patch16_siglip_256", {"depth": 9}),
        ("vit_small_plus_patch16_dinov3_qkvb", {}),
    ),
    model_batch=4,
)

# Small enough for a second a case in Triton's interpreter, on a real width; tokens that no block size divides. float16
# takes the same paths there as bfloat16, but for a block's layer-scale.
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
    op = functools.partial(_op_case, dtype)
    # In float16 the block as one op runs only where no backward pass can come.
    whole = functools.partial(op, "transformer_block", trained=dtype != torch.float16)

    # Each op at each width, then at each sequence length.
    for width, tokens in [(w, first) for w in sizes.widths] + [(sizes.main, n) for n in sizes.tokens[1:]]:
        dim = sizes.widths[width]
        shape = {"batch": batch, "tokens": tokens, "dim": dim}
        rank = 0 if (width, tokens) == (sizes.main, first) else 2
        label = f"{width} {batch}x{tokens}x{dim}"
        yield op("layer_norm", label, rank, shape)
        yield op("layer_norm_linear", f"{label} qkv", rank, shape | {"out": 3 * dim})
        yield op("linear_residual", label, rank, shape | {"out": dim})
        yield op("layer_norm_mlp", label, rank, shape | {"hidden": 4 * dim, "also": ["residual"]})
        heads = dim // 64
        yield whole(label, rank, shape | {"heads": heads, "hidden": 4 * dim}, num_heads=heads)
    for tokens, heads, dim in sizes.attention_shapes:
        rank = 0 if tokens == sizes.attention_shapes[0][0] else 2
        qkv = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": dim}
        yield op("attention", f"{batch}x{tokens} {heads}x{dim}", rank, qkv)
    for label, side, patch, dim in sizes.patches:
        rank = 0 if label == sizes.patches[0][0] else 2
        image = {"batch": batch, "size": (side,) * 2, "patch": (patch,) * 2, "dim": dim, "also": examples.TABLES}
        yield op("patch_embed", label, rank, image)

    for name, overrides in sizes.models:
        label = " ".join([name, *(f"{key}={value}" for key, value in overrides.items())])
        yield _model_case(name, label, dtype, sizes.model_batch, rank=1, **overrides)

    # Every option of every op, at one width.
    dim = sizes.widths[sizes.main]
    shape = {"batch": batch, "tokens": first, "dim": dim}
    linear, mlp = shape | {"out": dim}, shape | {"hidden": dim, "also": ["residual"]}
    scales = {"also": examples.SCALES}
    scaled_mlp = mlp | {"also": ["residual", *examples.SCALES]}
    block, heads = shape | {"heads": dim // 64, "hidden": dim}, {"num_heads": dim // 64}
    scaled_block = block | {"also": examples.BLOCK_SCALES}
    for activation in ("gelu_tanh", "quick_gelu", "silu"):
        yield op("layer_norm_mlp", activation, 3, mlp | {"hidden": 2 * dim}, activation=activation)
    yield op("layer_norm_mlp", "no residual, no bias", 3, mlp | {"also": [], "bias": False})
    yield op("layer_norm_mlp", "layer-scale, drop-path", 3, scaled_mlp)
    yield op("linear_residual", "layer-scale, drop-path", 3, linear | scales)
    yield op("linear_residual", "no bias", 3, linear | {"bias": False})
    yield whole("layer-scale, drop-path", 3, scaled_block, **heads)
    yield whole("no bias, silu", 3, block | {"bias": False}, activation="silu", **heads)
    yield whole("gated, silu", 3, block | {"gated": True}, activation="silu", **heads)
    masks = ["key_padding_mask", "attn_bias"]
    yield whole("mask and bias", 3, block | {"batch": 3, "also": masks}, **heads)
    rotary, tables = {"also": examples.ROPE}, dict.fromkeys(examples.ROPE, torch.float32)
    yield whole("rotary", 3, block | rotary, tables, **heads)
    yield whole("heads of 32", 3, block | {"heads": dim // 32}, num_heads=dim // 32)
    odd = {"batch": 1, "tokens": 13, "dim": 100, "out": 77, "bias": False}
    yield op("layer_norm_linear", "no bias, odd sizes", 3, odd)
    image = {"batch": batch, "size": (64, 48), "patch": (16, 16), "dim": 192, "also": examples.TABLES}
    uint8 = {"dtypes": {"image": torch.uint8}, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    if dtype != torch.float32:
        stream = dict.fromkeys(("x", "residual"), torch.float32)  # stays in float32, as under autocast
        yield op("layer_norm_linear", "fp32 stream", 3, linear, stream)
        yield op("linear_residual", "fp32 stream", 3, linear, {"residual": torch.float32})
        yield op("layer_norm_mlp", "fp32 stream", 3, mlp, stream)
        if dtype != torch.float16:
            yield whole("fp32 stream", 3, scaled_block, stream, **heads)
        # Under "auto", a product may be the library's, between small kernels.
        for name, given, more in (
            ("layer_norm_linear", linear, {}),
            ("linear_residual", linear | scales, {}),
            ("layer_norm_mlp", scaled_mlp, {}),
            ("patch_embed", image, uint8),
            ("transformer_block", scaled_block, {"trained": dtype != torch.float16} | heads),
        ):
            yield op(name, "products by the library", 3, given, by_library=True, **more)
    for head_dim in sizes.head_dims:
        qkv = {"batch": batch, "tokens": first, "heads": 2, "head_dim": head_dim}
        yield op("attention", f"head dim {head_dim}", 3, qkv)
    qkv = {"batch": 3, "tokens": first, "heads": 2, "head_dim": 64}
    yield op("attention", "padding mask", 3, qkv | {"also": ["key_padding_mask"]})
    yield op("attention", "bias", 3, qkv | {"also": ["attn_bias"]}, scale=0.1)
    yield op("attention", "mask and bias", 3, qkv | {"also": ["key_padding_mask", "attn_bias"]})
    yield op("attention", "a query", 3, qkv, num_queries=1)
    yield op("attention", "rotary, halves", 3, qkv | rotary, tables)
    yield op("attention", "rotary, neighbours", 3, qkv | rotary, tables, rope_interleaved=True)
    packed = {"sequences": 3 + 2 * batch, "heads": 2, "head_dim": 64, "also": examples.ROPE}
    yield op("attention_varlen", "packed, rotary", 0, packed, tables)
    yield op("patch_embed", "uint8", 3, image, **uint8)
    yield op("patch_embed", "uint8 channels_last", 3, image, channels_last=True, **uint8)
    yield op("patch_embed", "channels_last", 3, image, channels_last=True)
    yield op("patch_embed", "no bias, no prefix, no positions", 3, image | {"bias": False, "also": []})
    of_patches = {"prefix": 5, "prefix_has_positions": False}
    yield op("patch_embed", "5 prefix tokens, positions of patches", 3, image | of_patches)
    yield op("patch_embed", "patch 8x16, 4 channels", 3, image | {"channels": 4, "patch": (8, 16)})
