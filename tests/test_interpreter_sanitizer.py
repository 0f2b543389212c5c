"""Every kind of fault, planted in a kernel, is found and named; correct kernels pass."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from poison import poison_empty
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvit.dispatch import interpreting

if not interpreting():
    pytest.skip("tests Triton's interpreter", allow_module_level=True)
if os.environ.get("FASTVIT_SANITIZER", "race") != "race":
    pytest.skip("tests the sanitizer 'race'", allow_module_level=True)

from fastvit.interpret.sanitizer import KernelFault


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def rows_kernel(x_ptr, out_ptr, row_stride, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    tl.store(out_ptr + row * COLUMNS + column, tl.load(x_ptr + row * row_stride + column))


@triton.jit
def store_offset_kernel(out_ptr, step, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0) * step + tl.arange(0, BLOCK), 1.0)


@triton.jit
def shift_kernel(x_ptr, distance, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    shifted = tl.load(x_ptr + i + distance)
    tl.store(x_ptr + i, shifted)


@triton.jit
def shift_second_kernel(x_ptr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i - program))


@triton.jit
def touch(x_ptr, out_ptr, ACTION: tl.constexpr):
    if ACTION == "load":
        tl.store(out_ptr + tl.program_id(0), tl.load(x_ptr))
    elif ACTION == "store":
        tl.store(x_ptr, 1)
    elif ACTION == "update":
        tl.atomic_add(x_ptr, 1)
    else:
        tl.atomic_cas(x_ptr, 0, 1)


@triton.jit
def two_actions_kernel(x_ptr, out_ptr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    if tl.program_id(0) < 2:
        touch(x_ptr, out_ptr, FIRST)
    else:
        touch(x_ptr, out_ptr, SECOND)


@triton.jit
def store_first_kernel(x_ptr, out_ptr, SECOND: tl.constexpr):
    if tl.program_id(0) == 0:
        touch(x_ptr, out_ptr, "store")
    else:
        touch(x_ptr, out_ptr, SECOND)


@triton.jit
def touch_out_of_bounds_kernel(x_ptr, out_ptr, ACTION: tl.constexpr):
    touch(x_ptr + 2, out_ptr, ACTION)


@triton.jit
def wide_store_kernel(bytes_ptr, step):
    tl.store((bytes_ptr + tl.program_id(0) * step).to(tl.pointer_type(tl.int32)), 7)


@triton.jit
def tuple_kernel(tensors, BLOCK: tl.constexpr):
    x_ptr, out_ptr = tensors
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, BLOCK)))


@triton.jit
def no_other_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n))


@triton.jit
def sum_helper(x_ptr, i):
    return tl.sum(tl.load(x_ptr + i))


@triton.jit
def helper_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, sum_helper(x_ptr, tl.arange(0, BLOCK)))


@triton.jit
def descriptor_kernel(x, out, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    out.store([row, 0], x.load([row, 0]))


def line_of(kernel, text: str) -> str:
    """`file:line: source` of the first line of `kernel` that holds `text`, as a fault names it."""
    code = kernel.fn.__code__
    with open(code.co_filename) as file:
        lines = file.readlines()
    number = next(n for n in range(code.co_firstlineno, len(lines)) if text in lines[n - 1])
    return f"[{os.path.basename(code.co_filename)}:{number}: {lines[number - 1].strip()}]"


def test_correct_kernels_pass():
    x, out = torch.randn(100), torch.empty(100)
    copy_kernel[(4,)](x, out, 100, BLOCK=32)
    assert torch.equal(x, out)


def test_load_out_of_bounds():
    x, out = torch.randn(100), torch.empty(128)
    with pytest.raises(KernelFault) as fault:
        copy_kernel[(4,)](x, out, 101, BLOCK=32)
    assert str(fault.value) == (
        "copy_kernel, program (3, 0, 0): load out of bounds of 1 element(s), the first being element 100 of `x_ptr`, "
        "which spans 100 " + line_of(copy_kernel, "tl.store")
    )


def test_load_before_the_start():
    x = torch.randn(101)[1:]
    with pytest.raises(KernelFault, match="load out of bounds of 1 .* element -1 of `x_ptr`, which spans 100"):
        shift_kernel[(1,)](x, -1, BLOCK=64)


def test_store_out_of_bounds():
    x, out = torch.randn(128), torch.empty(100)
    with pytest.raises(KernelFault, match=r"program \(3, 0, 0\): store out of bounds of 28 .*element 100 of `out_ptr`"):
        copy_kernel[(4,)](x, out, 128, BLOCK=32)


def test_bounds_are_those_of_the_view_not_of_its_storage():
    x, out = torch.randn(200)[:100], torch.empty(128)
    with pytest.raises(KernelFault, match="element 100 of `x_ptr`, which spans 100"):
        copy_kernel[(4,)](x, out, 101, BLOCK=32)


def test_masked_off_lanes_may_lie_anywhere():
    x, out = torch.randn(3), torch.empty(3)
    copy_kernel[(2,)](x, out, 3, BLOCK=1024)
    assert torch.equal(x, out)


def test_gaps_of_a_view_are_out_of_bounds():
    x, out = torch.randn(4, 48), torch.empty(4, 32)
    rows_kernel[(4,)](x[:, 8:40], out, 48, COLUMNS=32)
    assert torch.equal(out, x[:, 8:40])
    with pytest.raises(KernelFault, match=r"load out of bounds of 8 .* gap of the strided view `x_ptr`, 24 elements"):
        rows_kernel[(3,)](x[:, 8:32], out, 48, COLUMNS=32)


def test_transposed_expanded_and_overlapping_views_have_no_gaps():
    x, out = torch.randn(4, 32), torch.empty(8, 32)
    for view in (x.T, x[:1].expand(4, 32), torch.randn(64).unfold(0, 32, 8)):
        rows_kernel[(1,)](view, out, 32, COLUMNS=32)
    rows_kernel[(8,)](x[:1].expand(8, 32), out, 0, COLUMNS=32)
    assert torch.equal(out, x[:1].expand(8, 32))
    rows_kernel[(3,)](torch.randn(20).as_strided((3, 4), (5, 3)), out, 3, COLUMNS=1)


def test_interleaved_views_of_one_storage():
    pair = torch.randn(4, 64)
    pair[:, 32:] = float("nan")
    rows = pair[:, :32].clone()
    rows_kernel[(1,)](pair[:, :32], pair[:, 32:], 64, COLUMNS=32)
    assert torch.equal(pair[0, 32:], rows[0])


def test_empty_tensors_hold_nothing():
    with pytest.raises(KernelFault, match="store of memory, but the launch was given no tensor with elements"):
        store_offset_kernel[(1,)](torch.empty(0), 0, BLOCK=4)


def test_two_programs_store_the_same_element():
    out = torch.empty(128)
    store_offset_kernel[(4,)](out, 32, BLOCK=32)
    with pytest.raises(KernelFault) as fault:
        store_offset_kernel[(4,)](out, 31, BLOCK=32)
    assert str(fault.value) == (
        "store_offset_kernel, program (1, 0, 0): race, store of element 31 of `out_ptr` after a store by program "
        "(0, 0, 0) " + line_of(store_offset_kernel, "tl.store")
    )


def test_a_program_stores_what_a_later_one_loads():
    with pytest.raises(KernelFault, match=r"program \(1, 0, 0\): race, load of element 31 of `x_ptr` after a store"):
        shift_second_kernel[(2,)](torch.randn(64), BLOCK=32)


def test_a_program_stores_what_an_earlier_one_loaded():
    with pytest.raises(KernelFault, match=r"race, store of element 32 of `x_ptr` after a load by program \(0, 0, 0\)"):
        shift_kernel[(2,)](torch.randn(65), 1, BLOCK=32)


def test_in_place_kernels_pass():
    x = torch.randn(64)
    shift_kernel[(2,)](x, 0, BLOCK=32)


ACTIONS = ("load", "store", "update", "compare and swap")


@pytest.mark.parametrize("first", ["load", "update", "compare and swap"])
@pytest.mark.parametrize("second", ACTIONS)
def test_which_actions_of_two_programs_may_meet(first, second):
    """Programs 0 and 1 do the first, program 2 the second, all to one element."""
    x, out = torch.zeros(1, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
    may_meet = first == second or {first, second} == {"update", "compare and swap"}
    if may_meet:
        two_actions_kernel[(3,)](x, out, FIRST=first, SECOND=second)
        assert (x.item() == 0) == (first == "load")
        return
    names = {action: action if action in ("load", "store") else "update" for action in ACTIONS}
    with pytest.raises(
        KernelFault, match=rf"program \(2, 0, 0\): race, {names[second]} of element 0 of `x_ptr`"
    ) as fault:
        two_actions_kernel[(3,)](x, out, FIRST=first, SECOND=second)
    article = "an" if names[first] == "update" else "a"
    assert f"after {article} {names[first]} by several programs" in str(fault.value)


@pytest.mark.parametrize("second", ACTIONS)
def test_nothing_may_meet_a_store(second):
    x, out = torch.zeros(1, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    with pytest.raises(KernelFault, match=r"race, .* of element 0 of `x_ptr` after a store by program \(0, 0, 0\)"):
        store_first_kernel[(2,)](x, out, SECOND=second)


def test_a_race_with_one_of_very_many_reads(monkeypatch):
    monkeypatch.setattr("fastvit.interpret.sanitizer._KEPT_READS", 10)
    test_a_program_stores_what_an_earlier_one_loaded()


def test_accesses_wider_than_an_element():
    wide_store_kernel[(3,)](torch.empty(12, dtype=torch.uint8), 4)
    with pytest.raises(KernelFault, match="store out of bounds of 1"):
        wide_store_kernel[(1,)](torch.empty(3, dtype=torch.uint8), 4)
    with pytest.raises(
        KernelFault, match=r"race, store of element 3 of `bytes_ptr` after a store by program \(0, 0, 0\)"
    ):
        wide_store_kernel[(2,)](torch.empty(12, dtype=torch.uint8), 3)


def test_atomics_out_of_bounds():
    x, out = torch.zeros(2, dtype=torch.int32), torch.empty(2, dtype=torch.int32)
    for action in ("update", "compare and swap"):
        with pytest.raises(KernelFault, match="update out of bounds"):
            touch_out_of_bounds_kernel[(1,)](x, out, ACTION=action)


def test_tensors_in_a_tuple():
    x, out = torch.randn(32), torch.empty(32)
    tuple_kernel[(1,)]((x, out), BLOCK=32)
    assert torch.equal(x, out)
    with pytest.raises(KernelFault, match=r"element 31 of `tensors\[0\]`"):
        tuple_kernel[(1,)]((x[:31], out), BLOCK=32)


def test_fault_in_a_helper_is_named_where_it_happens():
    with pytest.raises(KernelFault) as fault:
        helper_kernel[(1,)](torch.randn(30), torch.empty(1), BLOCK=32)
    assert str(fault.value).endswith("which spans 30 " + line_of(sum_helper, "tl.load"))


def test_descriptors_are_masked_by_their_shape_and_races_are_seen():
    x, out = torch.randn(40, 16), torch.empty(40, 16)
    describe = [TensorDescriptor(t, [40, 16], [16, 1], [32, 16]) for t in (x, out)]
    descriptor_kernel[(2,)](*describe, BLOCK=32)
    assert torch.equal(x, out)
    with pytest.raises(KernelFault, match="race, store of element .* of `out`"):
        descriptor_kernel[(2,)](*describe, BLOCK=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_that_nothing_wrote_is_nan(dtype):
    x, out = torch.empty(64, dtype=dtype), torch.zeros(64, dtype=dtype)
    copy_kernel[(2,)](x, out, 40, BLOCK=32)
    assert out[:40].isnan().all() and not out[40:].any()


def test_poison_ends_with_its_context():
    makers = [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]
    with poison_empty():
        inner = [
            torch.empty(3),
            torch.empty_like(torch.ones(3)),
            torch.empty_strided((3,), (1,)),
            torch.ones(3).new_empty(3),
        ]
        assert all(tensor.isnan().all() for tensor in inner)
        assert torch.empty(3, dtype=torch.int16).eq(2**15 - 1).all()
    assert makers == [torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_off_lanes_without_other_are_undefined(dtype):
    x, out = torch.ones(16, dtype=dtype), torch.empty(16, dtype=dtype)
    no_other_kernel[(1,)](x, out, 10, BLOCK=16)
    assert out[:10].eq(1).all() and out[10:].isnan().all()


RUN_SANITIZED = """
import fastvit.interpret, torch, triton, triton.language as tl
fastvit.interpret.install({sanitizer!r})
@triton.jit
def kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)
for programs, length in ((2, 32), (1, 31)):
    try:
        kernel[(programs,)](torch.zeros(64)[:length], BLOCK=32)
        print("passed")
    except RuntimeError as error:
        print("race" if "race" in str(error) else "bounds")
"""


@pytest.mark.parametrize(
    "sanitizer, found", [("off", ["passed", "passed"]), ("bounds", ["passed", "bounds"]), ("race", ["race", "bounds"])]
)
def test_levels(sanitizer, found, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RUN_SANITIZED.format(sanitizer=sanitizer))
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == found, done.stderr
