"""Replayed calls of launchers that only call PyTorch, whose results can be compared. That launches are replayed with
the arguments of Triton's own is in test_launch_path.py."""

from __future__ import annotations

import ctypes
import gc
import random
import types
import weakref

import numpy
import pytest
import torch
from fastvit.kernels.launch import absent, choice, replay
from fastvit.kernels.launch.hardware import ARCHS
from fastvit.kernels.layer_norm import row_statistics
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(replay, "_KNOWN", True)  # the tests' Triton interprets
    with absent.without_gpu(absent.target_of(ARCHS["sm_90"])):
        yield


def counted(launcher):
    """A launcher with its calls replayed, and the list of its own calls."""
    calls = []

    def counting(*args):
        calls.append(args)
        return launcher(*args)

    return replay.replaying(counting), calls


def matrix(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def everything(x, weight, bias, scale, needs):
    """Views, in-place and out= operators, several results, results that are views, None and an input."""
    product = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    torch.mm(x, weight.t(), out=product)
    product += bias
    halves = product.view(x.shape[0], 2, -1)
    first, second = torch.split(product, [1, weight.shape[0] - 1], dim=1)
    total = torch.empty_like(bias)
    total.copy_(torch.sum(product, 0))
    values, _ = torch.max(product * scale, 1)
    return product, halves, second[1:], total if needs[0] else None, values, x, torch.zeros(3), first.exp()


def compare(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if other is None:
            assert one is None
        else:
            assert one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_third_call_is_a_replay_with_the_same_results():
    call, own = counted(everything)
    for number in range(5):
        x, weight, bias = matrix(5, 8), matrix(6, 8), matrix(6)
        found = call(x, weight, bias, 0.5, [True, False])
        compare(found, everything(x, weight, bias, 0.5, [True, False]))
        assert found[5] is x and len(own) == min(number + 1, 2)


def test_results_share_what_they_shared_and_inputs_are_changed_in_place():
    def launcher(x):
        y = torch.empty_like(x)
        y.copy_(x)
        x.mul_(2)
        return y, y[1:]

    call, own = counted(launcher)
    for _ in range(4):
        x = matrix(4, 3)
        before = x.clone()
        y, part = call(x)
        assert torch.equal(y, before) and torch.equal(x, 2 * before)
        assert part.data_ptr() == y[1:].data_ptr() and part.shape == (3, 3)
    assert len(own) == 2


def test_one_tensor_comes_as_one():
    call, own = counted(lambda x: x.exp())
    for _ in range(4):
        x = matrix(2, 2)
        assert torch.equal(call(x), x.exp())
    assert len(own) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (x.double(), y.double(), 2),
        lambda x, y: (x[:3].clone(), y[:3].clone(), 2),
        lambda x, y: (x.t().contiguous().t(), y, 2),
        lambda x, y: (x, x, 2),
        lambda x, y: (x, None, 2),
        lambda x, y: (x, y, 3),
        lambda x, y: (x, y, 2.0),
        lambda x, y: (x, y, True),
    ],
)
def test_calls_that_are_not_alike_have_programs_of_their_own(other):
    def launcher(x, y, number):
        return x * number if y is None else x * number + y, x

    call, own = counted(launcher)
    x, y = matrix(4, 4), matrix(4, 4)
    given = other(x, y)
    for args in ((x, y, 2), given) * 3:
        compare(call(*args), launcher(*args))
    assert len(own) == 4 and len(call.programs) == 2


def test_strides_tell_calls_apart():
    call, own = counted(lambda x: (x + 1,))
    for _ in range(3):
        for x in (matrix(4, 8)[:, :4], matrix(4, 4).t()):
            compare(call(x), (x + 1,))
    assert len(own) == 4 and len(call.programs) == 2


def test_a_part_of_a_larger_tensor_is_one_at_any_offset():
    """As the parameters are that a flat buffer holds: several arguments in one storage."""
    call, own = counted(lambda x, y: (x + 1, y[1:].mul(2), x.t().contiguous()))
    for first in (0, 64, 128, 32):
        flat = matrix(512)
        x, y = flat[first : first + 64].view(8, 8), flat[first + 64 : first + 128].view(8, 8)
        compare(call(x, y), (x + 1, y[1:] * 2, x.t().contiguous()))
    assert len(own) == 2


def test_a_part_of_one_of_two_arguments_that_overlap_is_not_replayed():
    """Whose part it is cannot be told, nor be said of the next call's."""
    call, own = counted(lambda x, y: y[1:] + x[1:])
    flat = matrix(96)
    for _ in range(4):
        x, y = flat[:64].view(8, 8), flat[32:].view(8, 8)
        assert torch.equal(call(x, y), y[1:] + x[1:])
    assert len(own) == 4


def test_a_part_that_two_arguments_have_is_not_replayed():
    """The next call's two may not share it."""
    call, own = counted(lambda x, y: x[32:] + 1)
    flat = matrix(128)
    for x, y in 2 * [(matrix(64), matrix(64)), (flat[:64], flat[32:96])]:  # the second is noted
        assert torch.equal(call(x, y), x[32:] + 1)
    assert len(own) == 4


def test_an_empty_argument_is_not_taken_for_the_one_at_its_place():
    call, _ = counted(lambda x, y: (y + 1, x))
    for _ in range(4):
        flat = matrix(64)
        compare(call(flat[:0], flat), (flat + 1, flat[:0]))


def test_an_odd_address_is_not_replayed():
    call, own = counted(lambda x: (x + 1,))
    for number in range(6):
        x = matrix(65)[1:] if number % 2 else matrix(64)
        compare(call(x), (x + 1,))
    assert len(own) == 2 + 3  # two of the even ones, all of the odd ones


def test_a_launch_is_handed_the_address_of_a_part():
    x = matrix(64)
    recorder = replay._Recorder([x])
    assert recorder._argument((x, x[4:], 3, None)) == "(px0, px0 + 16, 3, None, )" and recorder.known
    recorder._argument(x[1:])  # Triton compiles another kernel for it
    assert not recorder.known


def test_the_precision_of_float32_products_is_part_of_a_call():
    call, own = counted(lambda x: (x + 1,))
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        for products.fp32_precision in ("ieee", "tf32") * 3:
            call(torch.ones(4))
    finally:
        products.fp32_precision = before
    assert len(own) == 4 and len(call.programs) == 2


def test_memory_is_freed_where_it_is_read_last():
    def launcher(x):
        y = torch.empty_like(x)
        y.copy_(x)
        z = torch.empty_like(y)
        z.copy_(y)
        return (z,)

    class Alive(TorchDispatchMode):
        """How many results there are at each copy."""

        def __init__(self):
            super().__init__()
            self.made, self.counts = [], []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            self.made.append(weakref.ref(found))
            if function is torch.ops.aten.copy_.default:
                self.counts.append(len({id(ref()) for ref in self.made if ref() is not None}))
            return found

    call, own = counted(launcher)
    x = matrix(4)
    for _ in range(2):
        call(x)
    (program,) = call.programs.values()
    with Alive() as alive:
        (z,) = program([x], [x.data_ptr()], 0)
    assert alive.counts == [1, 2]  # y, then z beside it
    assert all(ref() is None or ref() is z for ref in alive.made)  # y is free
    assert torch.equal(z, x) and len(own) == 2


class AddingKernel:
    """In place of a compiled kernel: out = 1 + the sum of what it is given, of as many float32, at addresses."""

    class metadata:
        class target:
            backend = "cuda"

    function = packed_metadata = None

    def run(self, x, y, z, stream, function, metadata, *rest):
        out, given, count = rest[3:]
        at = [numpy.ctypeslib.as_array((ctypes.c_float * count).from_address(address)) for address in (out, *given)]
        at[0][:] = 1 + sum(at[1:])


def test_small_tensors_that_only_launches_see_share_memory(monkeypatch):
    """Chains of launches drawn at random, each of some of what the ones before it made; some of it is returned, some
    goes through an operator of PyTorch's."""
    kernel = AddingKernel()
    monkeypatch.setattr(replay, "CompiledKernel", AddingKernel)
    monkeypatch.setattr(replay, "SMALL", 4096)
    plain = types.SimpleNamespace(pre_run_hooks=[], arg_names=["out", "given", "count"])

    def launcher(x, seed):
        draw = random.Random(seed)
        made = [x]
        for _ in range(12):
            given = draw.sample(made, min(len(made), draw.randint(1, 3)))
            count = min(tensor.numel() for tensor in given)
            out = x.new_empty_strided((draw.randint(1, count),), (1,))  # which is not filled with NaN here
            args = (out, tuple(given), out.numel())
            address = [tensor.data_ptr() for tensor in given]
            kernel.run(1, 1, 1, 0, None, None, None, None, None, out.data_ptr(), address, out.numel())
            recorder = getattr(replay.launcher.here, "recorder", None)
            if recorder:
                recorder(plain, kernel, (1, 1, 1), args, {})
            if draw.random() < 0.1:
                out = out + 1
            made.append(out)
            if len(made) > 4:
                made.pop(draw.randrange(4))
        return draw.sample(made, 2)

    shared = 0
    for seed in range(60):
        call, own = counted(launcher)
        for _ in range(4):
            x = matrix(2000)
            compare(call(x, seed), launcher(x, seed))
        (program,) = call.programs.values()
        assert len(own) == 2
        shared += "workspace" in program.__code__.co_varnames
    assert shared > 40


def test_places_in_the_workspace():
    """Never two tensors in one place at a time, and no more bytes than a chain needs."""

    def places(lines, sizes):
        recorder = replay._Recorder([matrix(1)])
        recorder._empty = {line: (number, sizes[line]) for number, line in enumerate(lines) if line in sizes}
        last = {name: max([n for n, line in enumerate(lines) if f"p{name}" in line.split()] or [0]) for name in sizes}
        return *recorder._workspace(lines, last), last

    draw = random.Random(0)
    for _ in range(200):
        sizes = {f"t{number}": 256 * draw.randint(1, 40) for number in range(draw.randint(1, 25))}
        lines = []
        for number, name in enumerate(sizes):
            known = list(sizes)[: number + 1]
            lines += [name, " ".join(f"p{one}" for one in {name, *draw.sample(known, min(number, 2))})]
        found, total, last = places(lines, sizes)
        assert found.keys() == sizes.keys() and total <= sum(sizes.values())
        for number, one in enumerate(sizes):
            assert found[one] % 256 == 0 and found[one] + sizes[one] <= total
            for other in list(sizes)[:number]:
                apart = found[one] + sizes[one] <= found[other] or found[other] + sizes[other] <= found[one]
                assert apart or last[other] < lines.index(one)
    lines = [part for number in range(9) for part in (f"t{number}", f"pt{number} pt{max(0, number - 1)}")]
    assert places(lines, {f"t{number}": 512 for number in range(9)})[1] == 2 * 512
    assert places(["t0", "t0"], {"t0": 512})[0] == {}  # something else than a launch has it


def test_a_replay_under_autocast_rounds_no_product():
    def launcher(x):
        with torch.autocast("cpu", enabled=False):
            return (torch.mm(x, x),)

    call, _ = counted(launcher)
    for _ in range(4):
        x = matrix(4, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (found,) = call(x)
        assert found.dtype == torch.float32 and torch.equal(found, x @ x)


def test_what_was_there_before_is_held_as_a_constant():
    tables = [torch.arange(4.0)]
    held = weakref.ref(tables[0])
    call, own = counted(lambda x: (x + tables[0],))
    for _ in range(3):
        x = matrix(4)
        compare(call(x), (x + torch.arange(4.0),))
    tables.clear()
    assert len(own) == 2 and held() is not None


def test_a_part_of_a_constant_has_a_name_of_its_own():
    table = torch.arange(8.0)
    call, own = counted(lambda x: (x + 1) * table[4:] + x)
    for _ in range(4):
        x = matrix(4)
        assert torch.equal(call(x), (x + 1) * table[4:] + x)
    assert len(own) == 2


def test_a_result_of_another_dtype_in_the_same_memory_is_not_replayed():
    call, own = counted(lambda x: (x.exp().view(torch.int32),))
    for _ in range(4):
        x = matrix(4)
        compare(call(x), (x.exp().view(torch.int32),))
    assert len(own) == 4


def test_a_call_that_reads_a_number_is_not_replayed():
    call, own = counted(lambda x: (x * x.max().item(),))
    for _ in range(4):
        x = matrix(4)
        assert torch.equal(call(x)[0], x * x.max())
    assert len(own) == 4


def test_programs_are_forgotten_when_other_configs_may_be_chosen():
    call, own = counted(lambda x: (x + 1,))
    x = matrix(4)
    for _ in range(3):
        call(x)
    with choice.forcing(lambda request: None):
        call(x)
        assert len(own) == 3
    call(x)
    assert len(own) == 4


def test_what_was_noted_while_configs_changed_is_not_kept():
    """By another thread, which does not wait."""
    changing, x = [], matrix(4)

    def launcher(x):
        if changing:
            choice._changed()
        return (x + 1,)

    call, own = counted(launcher)
    call(x)
    changing.append(1)
    call(x)  # noted
    changing.clear()
    call(x)
    assert len(own) == 3 and not any(map(callable, call.programs.values()))


def test_a_program_that_is_forgotten_is_free():
    table = [torch.arange(4.0)]
    held = weakref.ref(table[0])
    call, _ = counted(lambda x: (x + table[0],))
    for _ in range(3):
        call(matrix(4))
    table.clear()
    gc.disable()
    try:
        choice._changed()
        assert held() is None
    finally:
        gc.enable()


def test_nothing_is_replayed_while_triton_is_told_to_compile_otherwise(monkeypatch):
    call, own = counted(lambda x: (x + 1,))
    x = matrix(4)
    for _ in range(3):
        call(x)
    monkeypatch.setattr(replay.knobs.runtime, "add_stages_inspection_hook", lambda *stages: ("", ""))
    call(x)
    assert len(own) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU kernels are not interpreted")
def test_a_launch_of_the_interpreter_is_not_replayed():
    def launcher(x):
        return row_statistics(x, 1e-6)

    call, own = counted(launcher)
    for _ in range(4):
        x = matrix(4, 8)
        mean, _ = call(x)
        torch.testing.assert_close(mean, x.mean(1))
    assert len(own) == 4


def test_nothing_is_replayed_before_a_tuner():
    call, own = counted(lambda x: (x + 1,))
    x = matrix(4)
    for _ in range(3):
        call(x)
    with choice.watching(lambda request, repeat: None):
        call(x)
    assert len(own) == 3


def test_an_error_is_the_callers_and_what_comes_after_is_right():
    def launcher(x, fail):
        if fail and wrong:
            raise ValueError("no")
        return (x + 1,)

    wrong = []
    call, _ = counted(launcher)
    x = matrix(4)
    call(x, True)
    wrong.append(1)
    with pytest.raises(ValueError, match="no"):
        call(x, True)
    wrong.clear()
    for _ in range(3):
        compare(call(x, True), (x + 1,))


def test_programs_are_not_kept_without_end(monkeypatch):
    monkeypatch.setattr(replay, "REMEMBERED", 3)
    call, _ = counted(lambda x: (x + 1,))
    for size in range(1, 12):
        call(matrix(size))
        assert len(call.programs) <= 3
