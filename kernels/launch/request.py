"""A launch that has a choice, described as data: what it computes (`Request`), and what is chosen for it (a config).

A product's prologue and epilogue say what the choice depends on (`Prologue`, `Epilogue`), each beside its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from .._math import float32_precision


class GemmConfig(NamedTuple):
    """Tile (BLOCK_M, BLOCK_N) of the output, step BLOCK_K of the reduction, GROUP_M row tiles that share L2; SPLIT_K:
    into how many parts the reduction is cut, each with partial sums of its own."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8
    SPLIT_K: int = 1
    SUBTILES = 1


class TmaConfig(NamedTuple):
    """As GemmConfig, of the persistent loop that loads whole tiles by TMA. SUBTILES: in how many parts, column after
    column, its epilogue finishes a tile; PROGRAMS: how many a multiprocessor is given."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    GROUP_M: int = 8
    SUBTILES: int = 2
    PROGRAMS: int = 2
    SPLIT_K = 1


class LibraryConfig(NamedTuple):
    """A product by the library, and the tile of the small kernels before and after it (see `twin`)."""

    BLOCK_M: int = 64
    BLOCK_N: int = 128
    num_warps: int = 8
    SPLIT_K = SUBTILES = 1


class AttentionConfig(NamedTuple):
    """BLOCK_ROWS rows of the result (queries, or keys for dk and dv) against BLOCK_STEP of the other at a time;
    ROW_TILES: tiles of rows a program, at most. Only the forward pass has several, and then keeps all keys on chip."""

    BLOCK_ROWS: int
    BLOCK_STEP: int
    num_warps: int
    num_stages: int
    ROW_TILES: int = 1


class RowConfig(NamedTuple):
    """BLOCK_ROWS rows of BLOCK_D columns at a time: whole rows for a LayerNorm."""

    BLOCK_ROWS: int
    BLOCK_D: int
    num_warps: int


Config = GemmConfig | TmaConfig | LibraryConfig | AttentionConfig | RowConfig

# The kernels that have a choice, and what they choose; a gemm may be a TmaConfig's or a LibraryConfig's too.
CONFIGS: dict[str, type[Config]] = {
    "gemm": GemmConfig,
    "attention_forward": AttentionConfig,
    "attention_backward_dq": AttentionConfig,
    "attention_backward_dkdv": AttentionConfig,
    "layer_norm_statistics": RowConfig,
    "layer_norm_forward": RowConfig,
    "layer_norm_backward": RowConfig,
    "column_sum": RowConfig,
}


def config_from(kernel: str, values: Mapping[str, int]) -> Config:
    """The config of `kernel` with these values by name."""
    kind = TmaConfig if kernel == "gemm" and "SUBTILES" in values else CONFIGS[kernel]
    return kind(**values)


@dataclass(frozen=True, eq=False)
class Prologue:
    """How a product loads an operand.

    name: in keys of the tuner's table. load: the Triton function. plain: tiles of a matrix as they are. transforms: it
    computes with what it loads. gathers: by less than 4 bytes at a time, which pass through registers. registers: a
    thread's, beside a plain load's: as left operand, as a left operand wider in memory than the products, as right
    operand.
    """

    name: str
    load: Callable
    plain: bool = False
    transforms: bool = False
    gathers: bool = False
    registers: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class Epilogue:
    """How a product finishes and stores a tile.

    name: in keys of the tuner's table. store: the Triton function. tiles: how many tiles of the output it holds at
    once. beside: it reads or writes another matrix beside its result. bare: it does nothing but store. scatters: pixel
    by pixel; gathers: by less than 4 bytes at a time. sums: partial ones, so that the reduction may be cut (SPLIT_K).
    input_gradient: of products whose right operand is the weight as it is. columns: what BLOCK_N is a multiple of.
    wide: it takes a difference that a product rounded to 16 bits would not survive. library: (x (M, K), y (K, N),
    target) -> whether the library stored all of it, which it does where it can.
    """

    name: str
    store: Callable
    tiles: int = 1
    beside: bool = False
    bare: bool = False
    scatters: bool = False
    gathers: bool = False
    sums: bool = False
    input_gradient: bool = False
    columns: int = 1
    wide: bool = False
    library: Callable | None = None


class Product(NamedTuple):
    """What a gemm is made of; the dtypes are of the matrices in memory. activation: what the epilogue is compiled for,
    an activation or a head's width. tma: whether both operands are as TMA takes them."""

    left: Prologue
    right: Prologue
    epilogue: Epilogue
    activation: str | int | None
    left_dtype: torch.dtype
    right_dtype: torch.dtype
    out_dtype: torch.dtype
    tma: bool = False

    @property
    def gathers(self) -> bool:
        """Whether pixels pass through registers."""
        return self.left.gathers or self.right.gathers or self.epilogue.gathers

    def words(self, dtype: torch.dtype) -> list[str]:
        """What a key says of it beside the products' dtype."""
        named = (("left", self.left_dtype), ("right", self.right_dtype), ("out", self.out_dtype))
        others = [f"{matrix}={dtype_name(other)}" for matrix, other in named if other != dtype]
        parts = [self.left.name, self.right.name, self.epilogue.name]
        return [*parts, *([str(self.activation)] if self.activation else []), *others, *["tma"] * self.tma]


class Scores(NamedTuple):
    """What is done with attention's scores: a key padding mask, a bias of this dtype, the bias's gradient stored;
    before_norm: whether qkv's gradient is made for the norm before it (see `transformer_block`); dropout; rope: the
    pairs of columns of a rotary embedding, "halves" or "neighbours"; packed sequences; how many queries there are, if
    not as many as keys."""

    mask: bool = False
    bias: torch.dtype | None = None
    bias_gradient: bool = False
    before_norm: bool = False
    dropout: bool = False
    rope: str | None = None
    packed: bool = False
    queries: int = 0

    def words(self, dtype: torch.dtype) -> list[str]:
        bias = {None: [], dtype: ["bias"]}.get(self.bias, ["bias", f"bias={dtype_name(self.bias)}"])
        flags = [flag for flag in ("bias_gradient", "before_norm", "dropout", "packed") if getattr(self, flag)]
        others = [f"{name}={value}" for name in ("rope", "queries") if (value := getattr(self, name))]
        return ["mask"] * self.mask + bias + flags + others

    @property
    def masked(self) -> bool:
        """Whether something is loaded between a tile's two products."""
        return self.mask or self.bias is not None

    @property
    def plain(self) -> bool:
        """Whether nothing is done but scale them."""
        return not (self.masked or self.dropout or self.rope or self.packed or self.queries)


class Rows(NamedTuple):
    """What a row-wise kernel does beside: add a residual's gradient, write a dtype that is not the request's."""

    residual: bool = False
    out_dtype: torch.dtype | None = None

    def words(self, dtype: torch.dtype) -> list[str]:
        out = [] if self.out_dtype in (None, dtype) else [f"out={dtype_name(self.out_dtype)}"]
        return ["residual"] * self.residual + out


class Request(NamedTuple):
    """One launch that has a choice of config.

    kernel: a name in `CONFIGS`. shape: (m, n, k) of a gemm; (batch, tokens, heads, head_dim) of attention;
    (rows, columns) of the others. dtype: of a gemm's products, of attention's qkv, of what the others read. parts: the
    rest that changes the code. tf32: of products in float32.
    """

    kernel: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Product | Scores | Rows
    tf32: bool = False

    @property
    def key(self) -> str:
        """A stable string, the same for equal requests only."""
        words = (*self.parts.words(self.dtype), *(["tf32"] if self.tf32 else []))
        return " ".join((self.kernel, "x".join(map(str, self.shape)), dtype_name(self.dtype), *words))


def dtype_name(dtype: torch.dtype) -> str:
    """As a key spells it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether torch's switch has products in `dtype` run in TF32."""
    return dtype == torch.float32 and float32_precision() == "tf32"


# So many rows of partial sums the row-wise kernels that sum over rows write at most.
MAX_PARTIALS = {"layer_norm_backward": 256, "column_sum": 64}


def rows_per_program(kernel: str, rows: int, block: int) -> int:
    """How many rows a program of such a kernel sums, in steps of `block`."""
    return ceil_div(ceil_div(rows, MAX_PARTIALS[kernel]), block) * block


@triton.constexpr_function
def split_head(head_dim: int) -> tuple[int, ...]:
    """Widths of the parts that a head is loaded in."""
    return cover(head_dim, 128)


MAX_STEP = 128  # BLOCK_STEP at most


class Tiling(NamedTuple):
    """How tiles cover the tokens of a head. peeled: the first one is taken apart. tiles: of BLOCK_ROWS rows; programs:
    that share these. widths: of the tiles that each of them is set against, one after the other; ragged: these reach
    beyond the last token. steps: of the main loop of a program."""

    peeled: bool
    tiles: int
    programs: int
    widths: tuple[int, ...]
    ragged: bool
    steps: int


def tiling(request: Request, config: AttentionConfig) -> Tiling:
    """The tiles of attention with a config."""
    tokens, scores = request.shape[1], request.parts
    forward = request.kernel == "attention_forward"
    peeled = forward and scores.plain and tokens > 1 and tokens % config.BLOCK_ROWS == 1
    others = tokens - peeled
    tiles = ceil_div(scores.queries if forward and scores.queries else others, config.BLOCK_ROWS)
    if config.ROW_TILES > 1:
        programs, widths = ceil_div(tiles, config.ROW_TILES), cover(others, config.BLOCK_STEP)
        steps = ceil_div(tiles, programs)
    else:
        programs, steps = tiles + peeled, ceil_div(others, config.BLOCK_STEP)
        widths = (config.BLOCK_STEP,) * steps
    return Tiling(peeled, tiles, programs, widths, scores.packed or sum(widths) > others, steps)


@triton.constexpr_function
def cover(size: int, widest: int) -> tuple[int, ...]:
    """Widths of tiles that cover `size`: of the widest, then of smaller and smaller powers of two, of 16 at least."""
    blocks = (size + 15) // 16
    whole, rest = divmod(blocks, widest // 16)
    return (widest,) * whole + tuple([16 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1])


def filled_parts(k: int, parts: int, block: int) -> int:
    """How many of `parts` are left something to do when a part's length is rounded up to whole blocks."""
    return ceil_div(k, ceil_div(ceil_div(k, parts), block) * block)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, for n of at least 1."""
    return 1 << (n - 1).bit_length()
