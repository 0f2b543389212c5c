"""Makes the numbers of Triton's interpreter those of a GPU.

Stock, in Triton 3.6 to 3.9: arithmetic, comparisons, reductions and `tl.dot` on bfloat16 and float8 work on the raw
bit patterns; float32 to bfloat16 truncates; casts to float8 lose the rounding carry and wrap; TF32 is not simulated;
`tl.erf` is evaluated element by element in Python; sums run from the first to the last, which rounds more than a GPU's
trees; the comparison of two scalars is no mask. Here 16- and 8-bit floats are decoded to float32, computed on and
rounded back, to nearest even, and to float8 saturating, as the compiler has NVIDIA GPUs do it.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from fastvit.kernels.launch.absent import ABSENT_H100
from triton.runtime import driver, interpreter

_FLOAT8 = {tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0)}

# Everything private that the repair and the sanitizer replace or call. Checked first, so that a Triton that renamed one
# is refused by name instead of failing, or quietly staying unrepaired, somewhere inside a kernel.
_PRIVATE = {
    "": [
        "_interpreter",
        "_ir",
        "_get_np_dtype",
        "_patch_lang",
        "_unwrap_tensor",
        "InterpretedFunction",
        "InterpreterError",
        "TensorDescriptor",
        "TensorHandle",
    ],
    "InterpreterBuilder": [
        "cast_impl",
        "create_fp_to_fp",
        "create_dot",
        "create_erf",
        "create_fma",
        "create_masked_load",
        "create_maxnumf",
        "create_minnumf",
        "unary_op",
        "binary_op",
        "set_grid_idx",
    ],
    "ReduceScanOpInterface": ["apply"],
    "ReduceOps": ["sum"],
    "GridExecutor": ["__call__"],
    "_interpreter": ["load", "store", "atomic_rmw", "atomic_cas"],
}


def install() -> None:
    """Repair the interpreter, for the rest of the process. Raises RuntimeError if this Triton's is not one known."""
    _check_triton()
    if not torch.cuda.is_available():
        driver.set_active(ABSENT_H100)  # so that autotuned kernels run, too

    builder, reductions = interpreter.InterpreterBuilder, interpreter.ReduceScanOpInterface
    builder.cast_impl = _cast_impl(builder.cast_impl)
    builder.create_fp_to_fp = _create_fp_to_fp(builder.create_fp_to_fp)
    builder.create_dot = _create_dot
    builder.create_erf = _create_erf
    builder.get_bf16 = _get_bf16
    # Given one NaN, a GPU's maxnum and minnum return the other operand. Before 3.8 the interpreter returns the NaN.
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.unary_op = _on_decoded(builder.unary_op, 1)
    builder.binary_op = _on_decoded(builder.binary_op, 2)
    builder.create_fma = _create_fma
    reductions.apply = _apply(reductions.apply)
    interpreter.ReduceOps.sum = _sum
    interpreter._get_np_dtype = _looked_up_once(interpreter._get_np_dtype)
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    interpreter.GridExecutor.__call__ = _without_warnings(interpreter.GridExecutor.__call__)


def _check_triton() -> None:
    for owner, names in _PRIVATE.items():
        holder = getattr(interpreter, owner, None) if owner else interpreter
        for name in names:
            if not hasattr(holder, name):
                full = f"{owner}.{name}" if owner else name
                raise RuntimeError(f"cannot repair the interpreter of Triton {triton.__version__}: it has no {full}")
    if not isinstance(tl.standard.cdiv, interpreter.InterpretedFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 in the environment before Triton is imported")


def _is_encoded(dtype: tl.dtype) -> bool:
    """Whether the interpreter holds values of this type as bit patterns, for want of a numpy type."""
    return dtype == tl.bfloat16 or dtype in _FLOAT8


def _decode(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The numbers that the interpreter's `data` of Triton type `dtype` stand for."""
    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype in _FLOAT8:
        return torch.from_numpy(np.array(data, np.uint8, order="C")).view(_FLOAT8[dtype][0]).float().numpy()
    return data


def _encode(numbers: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Round `numbers` to Triton type `dtype`, as the interpreter holds it."""
    if dtype == tl.bfloat16:
        numbers = np.asarray(numbers, np.float32)
        bits = numbers.view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
        # The addition may carry a NaN into infinity or zero.
        is_nan = np.isnan(numbers)
        return np.where(is_nan, np.uint16(0x7FC0), rounded) if is_nan.any() else rounded
    if dtype in _FLOAT8:
        torch_dtype, largest = _FLOAT8[dtype]
        values = torch.from_numpy(np.array(numbers, np.float32, order="C")).clamp(-largest, largest)
        return values.to(torch_dtype).view(torch.uint8).numpy()
    return np.asarray(numbers).astype(interpreter._get_np_dtype(dtype), copy=False)


def _round_to_tf32(numbers: np.ndarray) -> np.ndarray:
    bits = np.asarray(numbers, np.float32).view(np.uint32)
    half = np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    rounded = ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(numbers), rounded, numbers)


def _cast_impl(original):
    def cast_impl(self, src, dst_type):
        src_dtype, dst_dtype = src.dtype.scalar, dst_type.scalar
        if _is_encoded(src_dtype) or _is_encoded(dst_dtype):
            return interpreter.TensorHandle(_encode(_decode(src.data, src_dtype), dst_dtype), dst_dtype)
        return original(self, src, dst_type)

    return cast_impl


def _create_fp_to_fp(original):
    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        # Only rounding towards zero, which the stock interpreter does right, is left to it.
        if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
            return original(self, src, dst_type, rounding_mode)
        return self.cast_impl(src, dst_type)

    return create_fp_to_fp


def _create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
    lhs, rhs = _decode(a.data, a.dtype.scalar), _decode(b.data, b.dtype.scalar)
    if a.dtype.scalar == tl.float32 and input_precision == interpreter._ir.INPUT_PRECISION.TF32:
        lhs, rhs = _round_to_tf32(lhs), _round_to_tf32(rhs)
    total = _decode(acc.data, acc.dtype.scalar)
    # numpy multiplies float16 matrices a hundred times slower, and adds up in float32 then, too.
    compute_dtype = np.float32 if total.dtype == np.float16 else total.dtype
    product = np.matmul(lhs.astype(compute_dtype, copy=False), rhs.astype(compute_dtype, copy=False))
    return interpreter.TensorHandle(_encode(product + total, acc.dtype.scalar), acc.dtype.scalar)


def _create_erf(self, arg):
    values = torch.erf(torch.from_numpy(np.array(arg.data, order="C"))).numpy()
    return interpreter.TensorHandle(values, arg.dtype.scalar)


def _create_fma(self, x, y, z):
    # One rounding, as on a GPU: in float64 the product of two narrower floats is exact.
    dtype = z.dtype.scalar
    factors = _decode(x.data, dtype), _decode(y.data, dtype)
    total = np.multiply(*factors, dtype=np.float64) + _decode(z.data, dtype)
    return interpreter.TensorHandle(_encode(total, dtype), dtype)


def _get_bf16(self, value):
    return self.cast_impl(self.get_fp32(value), tl.bfloat16)


def _on_decoded(original, count: int):
    """Have a builder's method with `count` operands compute on numbers where operands are bit patterns."""

    @functools.wraps(original)
    def method(self, *args):
        operands, rest = args[:count], args[count:]
        dtypes = [operand.dtype.scalar for operand in operands]
        if not any(_is_encoded(dtype) for dtype in dtypes):
            result = original(self, *args)
            # A comparison's is of its operands' dtype: spread to a block it would be no mask.
            return interpreter.TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result
        decoded = [
            interpreter.TensorHandle(_decode(operand.data, dtype), tl.float32) if _is_encoded(dtype) else operand
            for operand, dtype in zip(operands, dtypes, strict=True)
        ]
        result = original(self, *decoded, *rest)
        if result.data.dtype == np.bool_:
            return interpreter.TensorHandle(result.data, tl.int1)
        dtype = next(dtype for dtype in dtypes if _is_encoded(dtype))
        return interpreter.TensorHandle(_encode(result.data, dtype), dtype)

    return method


def _sum(self, tensor):
    """The sum along an axis, or of all, in halves: of a power of two, as every axis is."""
    data = tensor.handle.data
    axis = self.axis
    data = data.reshape(-1) if axis is None else np.moveaxis(data, axis, 0)
    while len(data) > 1:
        data = data[: len(data) // 2] + data[len(data) // 2 :]
    data = data[0]
    if self.keep_dims:
        data = np.reshape(data, [1] * tensor.handle.data.ndim) if axis is None else np.expand_dims(data, axis)
    return self.to_tensor(data, tensor.dtype)


def _apply(original):
    """Reduce and scan bit patterns as float32 numbers, the result rounded back."""

    def recoded(tensor, convert, dtype):
        data = convert(tensor.handle.data)
        block = tl.block_type(dtype, list(tensor.shape)) if tensor.type.is_block() else dtype
        return tl.tensor(interpreter.TensorHandle(data, dtype), block)

    def apply(self, inputs):
        if not isinstance(inputs, tuple):
            return self.apply((inputs,))[0]
        dtypes = [tensor.dtype for tensor in inputs]
        if not any(_is_encoded(dtype) for dtype in dtypes):
            return original(self, inputs)
        numbers = tuple(
            recoded(tensor, functools.partial(_decode, dtype=dtype), tl.float32) if _is_encoded(dtype) else tensor
            for tensor, dtype in zip(inputs, dtypes, strict=True)
        )
        return tuple(
            recoded(result, functools.partial(_encode, dtype=dtype), dtype) if _is_encoded(dtype) else result
            for result, dtype in zip(original(self, numbers), dtypes, strict=False)
        )

    return apply


def _looked_up_once(original):
    """The interpreter builds a table of all types each time it asks for one's numpy type, often in one operation."""
    known = {}

    def get_np_dtype(triton_dtype):
        name = triton_dtype.scalar.name
        if name not in known:
            known[name] = original(triton_dtype)
        return known[name]

    return get_np_dtype


def _patch_once(original):
    """Leave `triton.language` patched after the first launch.

    The interpreter patches and restores some 200 names at every launch and at every call of a jitted helper, 0.7 ms
    each time. A process that interprets compiles nothing, so nothing there needs the originals back.
    """

    class NothingToRestore:
        def restore(self) -> None:
            pass

    seen = set()

    def patch_lang(fn):
        if fn not in seen:
            original(fn)
            seen.add(fn)
        return NothingToRestore()

    return patch_lang


def _without_warnings(original):
    """GPUs divide by zero and overflow silently."""

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return original(self, *args, **kwargs)

    return call
