"""The repaired interpreter computes what torch computes, bit for bit where rounding is defined."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fastvit.dispatch import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="tests Triton's interpreter")


@triton.jit
def cast_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


@triton.jit
def cast_towards_zero_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x + y)
    tl.store(out_ptr + N + i, x - y)
    tl.store(out_ptr + 2 * N + i, x * y)
    tl.store(out_ptr + 3 * N + i, -x)
    tl.store(out_ptr + 4 * N + i, tl.abs(x))
    tl.store(out_ptr + 5 * N + i, tl.fma(x, y, x))
    tl.store(out_ptr + 6 * N + i, tl.where(x < y, x, y))
    tl.store(out_ptr + 7 * N + i, tl.full((N,), 0.7, x.dtype))


@triton.jit
def compare_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, (x < y) & (x >= -y))
    tl.store(out_ptr + N + i, x == y)


@triton.jit
def reduce_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row[:, None] * COLUMNS + column[None, :])
    tl.store(out_ptr + row, tl.sum(x, axis=1).to(x.dtype))
    tl.store(out_ptr + ROWS + row, tl.max(x, axis=1).to(x.dtype))
    tl.store(out_ptr + 2 * ROWS + row, tl.min(x, axis=1).to(x.dtype))
    tl.store(out_ptr + 3 * ROWS + row, tl.argmax(x, axis=1).to(x.dtype))


@triton.jit
def cumsum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.cumsum(tl.load(x_ptr + i), 0).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    out = tl.dot(a, tl.trans(b), input_precision=PRECISION, out_dtype=out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * N + n[None, :], out)


@triton.jit
def math_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.erf(x))
    tl.store(out_ptr + N + i, tl.exp2(x))
    tl.store(out_ptr + 2 * N + i, tl.log2(x))
    tl.store(out_ptr + 3 * N + i, tl.rsqrt(x))
    tl.store(out_ptr + 4 * N + i, tl.sqrt(x))
    tl.store(out_ptr + 5 * N + i, tl.maximum(x, float("nan")))


@triton.jit
def rearrange_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS * COLUMNS)
    x = tl.reshape(tl.load(x_ptr + i), (ROWS, COLUMNS // 2, 2))
    even, odd = tl.split(x)
    out = tl.join(odd + odd, even)
    tl.store(out_ptr + i, tl.reshape(tl.trans(tl.reshape(out, (ROWS, COLUMNS))), (ROWS * COLUMNS,)))


# Rounded up as if they were numbers, they become zero and minus zero.
NANS_THAT_ROUND_UP = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32)


def special_values(dtype: torch.dtype) -> torch.Tensor:
    """1024 numbers: random ones of every magnitude, ties between two bfloat16 or float8 numbers, specials."""
    x = torch.randn(1024, dtype=torch.float64) * 2.0 ** torch.randint(-30, 30, (1024,))
    x[:8] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 1e-40])
    x[8:200] = 1 + torch.arange(192) / 256
    x[200:300] = torch.linspace(-460, 460, 100)
    x = x.to(dtype)
    if dtype == torch.float32:
        x.view(torch.int32)[8:10] = NANS_THAT_ROUND_UP
    return x


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, any NaN equal to any other."""
    assert a.dtype == b.dtype
    nan = a.float().isnan()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool((nan == b.float().isnan()).all() and ((a.view(integers) == b.view(integers)) | nan).all())


SIZES_16_TO_64 = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("source", SIZES_16_TO_64)
@pytest.mark.parametrize("target", SIZES_16_TO_64)
def test_casts_round_as_torch(source, target):
    x = special_values(source)
    out = torch.empty(1024, dtype=target)
    cast_kernel[(1,)](x, out, N=1024)
    assert same_bits(out, x.to(target))


def test_rounding_towards_zero_when_asked():
    x = torch.randn(1024)
    out = torch.empty(1024, dtype=torch.bfloat16)
    cast_towards_zero_kernel[(1,)](x, out, N=1024)
    assert same_bits(out, (x.view(torch.int32) & -0x10000).view(torch.float32).bfloat16())


def test_integers_cast_to_bfloat16_as_torch():
    x = torch.randint(-(10**6), 10**6, (1024,), dtype=torch.int32)
    out = torch.empty(1024, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, N=1024)
    assert same_bits(out, x.bfloat16())


@pytest.mark.parametrize("dtype, largest", [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)])
def test_float8_casts_round_to_nearest_and_saturate(dtype, largest):
    x = special_values(torch.float32)
    out = torch.empty(1024, dtype=dtype)
    cast_kernel[(1,)](x, out, N=1024)
    assert same_bits(out, x.clamp(-largest, largest).to(dtype))
    back = torch.empty(1024)
    cast_kernel[(1,)](out, back, N=1024)
    assert same_bits(back, out.float())


@pytest.mark.parametrize("dtype", SIZES_16_TO_64)
def test_arithmetic_rounds_once_per_operation(dtype):
    x, y = torch.randn(256).to(dtype), torch.randn(256).to(dtype)
    out = torch.empty(8, 256, dtype=dtype)
    arithmetic_kernel[(1,)](x, y, out, N=256)
    fma = (x.double() * y.double() + x.double()).to(dtype)
    expected = [x + y, x - y, x * y, -x, x.abs(), fma, torch.where(x < y, x, y), torch.full_like(x, 0.7)]
    for i, want in enumerate(expected):
        assert same_bits(out[i], want), i


@pytest.mark.parametrize("dtype", SIZES_16_TO_64)
def test_comparisons(dtype):
    x, y = torch.randn(256).to(dtype), torch.randn(256).to(dtype)
    x[::5] = y[::5]
    out = torch.empty(2, 256, dtype=torch.int32)
    compare_kernel[(1,)](x, y, out, N=256)
    assert torch.equal(out, torch.stack([(x < y) & (x >= -y), x == y]).int())


@pytest.mark.parametrize("dtype", SIZES_16_TO_64)
def test_reductions(dtype):
    x = torch.randint(-20, 20, (16, 64)).to(dtype)  # Small integers: every order of summation is exact.
    x[:, 17] = 100
    out = torch.empty(4, 16, dtype=dtype)
    reduce_kernel[(1,)](x, out, ROWS=16, COLUMNS=64)
    want = torch.stack([x.double().sum(1), x.double().amax(1), x.double().amin(1), x.double().argmax(1)]).to(dtype)
    assert torch.equal(out, want)


def test_scan_of_bfloat16():
    x = torch.randint(-20, 20, (64,)).bfloat16()
    out = torch.empty(64, dtype=torch.float32)
    cumsum_kernel[(1,)](x, out, N=64)
    torch.testing.assert_close(out, x.float().cumsum(0), rtol=2**-8, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_dot_of_small_floats_multiplies_exactly(dtype):
    a, b = (torch.randint(-4, 5, (n, 32)).to(dtype) for n in (16, 64))
    out = torch.empty(16, 64)
    dot_kernel[(1,)](a, b, out, M=16, N=64, K=32, PRECISION="ieee")
    assert torch.equal(out, a.float() @ b.float().T)


def test_dot_accumulates_in_float32_and_rounds_once():
    a, b = (torch.randn(n, 256, dtype=torch.bfloat16) for n in (16, 32))
    out = torch.empty(16, 32)
    dot_kernel[(1,)](a, b, out, M=16, N=32, K=256, PRECISION="ieee")
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-5)
    half = torch.empty(16, 32, dtype=torch.float16)
    dot_kernel[(1,)](a.half(), b.half(), half, M=16, N=32, K=256, PRECISION="ieee")
    # Rounded once, from float32: off by half a unit in the last place at most, which sums kept in float16 are not.
    torch.testing.assert_close(half.float(), a.half().float() @ b.half().float().T, rtol=1.01 * 2**-11, atol=1e-5)


def test_dot_in_float64():
    a, b = (torch.randn(n, 32, dtype=torch.float64) for n in (16, 64))
    out = torch.empty(16, 64, dtype=torch.float64)
    dot_kernel[(1,)](a, b, out, M=16, N=64, K=32, PRECISION="ieee")
    torch.testing.assert_close(out, a @ b.T, rtol=1e-13, atol=1e-13)


def test_dot_in_tf32_rounds_its_inputs():
    a, b = torch.randn(16, 32), torch.randn(64, 32)
    a[0, 0] = float("inf")
    a.view(torch.int32)[1, :2] = NANS_THAT_ROUND_UP
    out = {name: torch.empty(16, 64) for name in ("ieee", "tf32")}
    for name, tensor in out.items():
        dot_kernel[(1,)](a, b, tensor, M=16, N=64, K=32, PRECISION=name)

    def tf32(x):  # 10 bits of fraction; every step here is exact but the rounding, which is to nearest even.
        fraction, exponent = torch.frexp(x.double())
        return torch.ldexp(torch.round(fraction * 2**11) / 2**11, exponent).float()

    torch.testing.assert_close(out["ieee"], a @ b.T, rtol=1e-6, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(out["tf32"], tf32(a) @ tf32(b).T, rtol=1e-6, atol=1e-5, equal_nan=True)
    assert (out["tf32"] - a @ b.T)[2:].abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_math_functions(dtype):
    x = torch.rand(512, dtype=dtype) * 4 + 0.01
    out = torch.empty(6, 512, dtype=dtype)
    math_kernel[(1,)](x, out, N=512)
    torch.testing.assert_close(out, torch.stack([x.erf(), x.exp2(), x.log2(), x.rsqrt(), x.sqrt(), x]))


def test_math_functions_run_on_whole_blocks(monkeypatch):
    def element_by_element(*args):
        raise AssertionError("evaluated one element at a time")

    monkeypatch.setattr("math.erf", element_by_element)
    out = torch.empty(6, 512)
    math_kernel[(1,)](torch.rand(512), out, N=512)


def test_infinities_and_nans_warn_no_more_than_on_a_gpu():
    out = torch.empty(6, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        math_kernel[(1,)](torch.full((64,), -0.0), out, N=64)
    assert out[2].eq(-float("inf")).all()


def test_reshape_join_split_and_trans_of_bfloat16():
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    out = torch.empty(16, 8, dtype=torch.bfloat16)
    rearrange_kernel[(1,)](x, out, ROWS=8, COLUMNS=16)
    even, odd = x[:, ::2], x[:, 1::2]
    assert same_bits(out, torch.stack([odd + odd, even], dim=-1).reshape(8, 16).T.contiguous())


@triton.autotune([triton.Config({"N": 32}), triton.Config({"N": 64})], key=[])
@triton.jit
def autotuned_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), 1.0)


def test_autotuned_kernels_run_without_a_gpu():
    x = torch.zeros(64)
    autotuned_kernel[(1,)](x)
    assert x[:32].eq(1).all()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True)


def test_install_needs_the_environment_variable():
    done = run_python("import fastvit.interpret; fastvit.interpret.install()")
    assert "RuntimeError: install: set TRITON_INTERPRET=1 in the environment before Triton" in done.stderr
    late = "import os, triton; os.environ['TRITON_INTERPRET'] = '1'; import fastvit.interpret as i; i.install()"
    assert "RuntimeError: set TRITON_INTERPRET=1 in the environment before Triton" in run_python(late).stderr


def test_install_refuses_an_unknown_interpreter():
    code = (
        "import triton; from triton.runtime import interpreter; import fastvit.interpret as i\n"
        "del interpreter.InterpreterBuilder.create_dot; i.install()"
    )
    done = run_python(code, TRITON_INTERPRET="1")
    assert f"interpreter of Triton {triton.__version__}: it has no InterpreterBuilder.create_dot" in done.stderr


def test_install_twice_changes_nothing_and_keeps_its_sanitizer():
    code = (
        "import fastvit.interpret as i; i.install('bounds'); from triton.runtime import interpreter as t\n"
        "before = t.InterpreterBuilder.create_dot, t.GridExecutor.__call__, t._interpreter; i.install('bounds')\n"
        "assert before == (t.InterpreterBuilder.create_dot, t.GridExecutor.__call__, t._interpreter)\n"
        "for name in ('race', 'nonsense'):\n"
        "    try: i.install(name)\n"
        "    except (RuntimeError, ValueError) as error: print(error)\n"
    )
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.stdout.splitlines() == [
        "install: sanitizer 'bounds' is installed already, cannot change it to 'race'",
        "install: unknown sanitizer 'nonsense', expected one of off, bounds, race",
    ], done.stderr


@triton.jit
def masked_by_scalars_kernel(ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(ptr + i, i, mask=(i < n) & (tl.min(i, axis=0) == 0))


def test_the_comparison_of_two_scalars_is_a_mask():
    builder, number = interpreter.interpreter_builder, interpreter.TensorHandle(np.array([5], np.int32), tl.int32)
    equal = builder.create_icmpEQ(number, number)
    assert equal.dtype == tl.int1
    assert builder.create_splat(tl.block_type(tl.int1, [4]), equal).data.dtype == np.bool_
    out = torch.full((8,), -1, dtype=torch.int32)
    masked_by_scalars_kernel[(1,)](out, 5, BLOCK=8)
    assert out.tolist() == [0, 1, 2, 3, 4, -1, -1, -1]
