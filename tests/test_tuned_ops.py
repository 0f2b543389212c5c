"""Ops follow what was recorded in the table of choices, and `explain` tells."""

import contextlib
import functools
import inspect

import pytest
import torch
from fastvit.kernels.launch import choice
from tuning import CPU, FakeClock, attention_call, price_of

import fastvit
from fastvit import dispatch, ops, tune, tuned
from fastvit.accuracy import relative_rms
from fastvit.ops import _common


def record(table, call, choice):
    work = tune.BoundCall(call, CPU, tune._random(CPU))
    seconds = {"triton": [2e-6, 2e-6, 2e-6]} | {choice: [1e-6, 1e-6, 1e-6]}
    table.record("ops", work.key, tuned.Entry(choice, "triton", seconds, {}, 50, True, "2026-01-01"))
    return work.args


@pytest.mark.parametrize("choice", ["torch", "sdpa math", "sdpa flash"])
@pytest.mark.parametrize("grad", [False, True])
def test_auto_follows_the_table_and_explain_tells(table, auto, choice, grad, monkeypatch):
    qkv = record(table, attention_call(grad), choice)[0]
    assert (qkv.requires_grad, tuned.table(CPU)) == (grad, table)
    ran = []
    for name, function in list(dispatch.OPS["attention"].others.items()):
        spied = functools.partial(lambda n, f, *args: ran.append(n) or f(*args), name, function)
        monkeypatch.setitem(dispatch.OPS["attention"].others, name, spied)
    out = ops.attention(qkv)
    assert ran == ([choice] if choice != "torch" else [])
    torch.testing.assert_close(out, fastvit.reference.attention(qkv), rtol=0, atol=0.05)
    assert "AttentionFunction" not in str(out.grad_fn)
    found = fastvit.explain("attention", qkv)
    assert (found.backend, found.candidate) == ("torch", choice)
    assert "was measured to be faster" in found.reasons[0]
    assert "triton 2.0 us" in found.evidence[0] and str(table.path) in found.evidence[1]
    assert f"attention: {choice}" in str(found) and "measured: " in str(found)

    with fastvit.use_backend("triton"):  # still forces
        if grad:
            assert "AttentionFunction" in str(ops.attention(qkv).grad_fn)
        assert fastvit.explain("attention", qkv).candidate == "triton"
    with tuned.use_tuning("off"):
        assert fastvit.explain("attention", qkv).candidate == "triton"
        assert "off" in fastvit.explain("attention", qkv).evidence[0]
    # Another shape, other gradients, other strides: nothing is known of those.
    for other in (qkv[:1].contiguous(), qkv.detach().requires_grad_(not grad)):
        found = fastvit.explain("attention", other)
        assert found.candidate == "triton" and "heuristics decide" in found.evidence[0]
    del ran[:]
    strided = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    ops.attention(strided)
    assert not ran
    found = fastvit.explain("attention", strided)
    assert found.candidate == "triton" and "not contiguous" in found.evidence[0]


@pytest.mark.parametrize("dtype, unmeasured", [(torch.float32, "torch"), (torch.bfloat16, "triton")])
def test_a_tie_changes_nothing(table, auto, dtype, unmeasured):
    """What would run unmeasured stays, in the table too, unless something is measured to be faster; the library's form
    of each product is measured with the others."""
    x, norm, weight = (torch.randn(*shape, dtype=dtype) for shape in ((2, 21, 24), (24,), (40, 24)))
    arguments = (x, norm, norm, weight.requires_grad_(), None, 1e-6)
    call = tune.Call.like(dispatch.OPS["layer_norm_linear"], arguments)
    assert fastvit.explain("layer_norm_linear", *arguments[:5]).candidate == unmeasured
    tune.tune_call(call, CPU, FakeClock(price_of(lambda bound: False)))
    ((segment, _),) = table.ops.values()
    assert (segment.choice, segment.incumbent) == (unmeasured, unmeasured)
    assert set(segment.seconds) == {"triton", "torch"}
    assert {key.split()[0] for key in table.configs} == {"layer_norm_statistics", "gemm"}
    products = {key.split()[5]: entry for key, (entry, _) in table.configs.items() if key.startswith("gemm")}
    assert set(products) == {"linear", "sums"}
    for name, entry in products.items():
        assert any(label.startswith("LibraryConfig") for label in entry.seconds), name
        assert entry.chosen == entry.incumbent
    assert products["sums"].chosen.startswith("LibraryConfig")


def test_the_first_launch_brings_the_table_in(table, monkeypatch, triton_backend):
    choice.set_table(None)
    asked = []
    monkeypatch.setattr(tuned, "lookup", lambda request, device: asked.append(request.kernel))
    _common._connect.cache_clear()  # as in a fresh process
    monkeypatch.delitem(vars(inspect.getmodule(ops.layer_norm).FORWARD), "replayed", raising=False)
    ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8))
    assert asked == ["layer_norm_forward"]


def test_an_unknown_candidate_is_no_candidate(table, auto):
    qkv = record(table, attention_call(), "sdpa magic")[0]
    assert fastvit.explain("attention", qkv).candidate == "triton"
    torch.testing.assert_close(ops.attention(qkv), fastvit.reference.attention(qkv), rtol=0, atol=0.05)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_graphs_follow_the_table(table, auto, grad, monkeypatch):
    qkv = record(table, attention_call(grad), "sdpa math")[0]

    def read(device):  # as at the first call of a process, which no compiler can look into
        assert table.path.read_text()
        return table

    monkeypatch.setattr(tuned, "table", read)
    graphs = []

    def look(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compile(lambda x: ops.attention(x), fullgraph=True, backend=look)(qkv)
    assert "scaled_dot_product_attention" in graphs[0]
    # A graph for any batch follows no table, and stays one for any batch.
    torch._dynamo.reset()
    del graphs[:]
    compiled = torch.compile(lambda x: ops.attention(x), fullgraph=True, backend=look, dynamic=True)
    for batch in (4, 6, 5):  # not the number of heads: equal sizes are taken for one
        x = torch.randn(batch, 21, 3, 2, 16, dtype=torch.bfloat16, requires_grad=grad)
        torch.testing.assert_close(compiled(x), fastvit.reference.attention(x), rtol=0, atol=0.05)
    assert len(graphs) == 1 and "scaled_dot_product_attention" not in graphs[0]
    torch._dynamo.reset()


def test_measure_tunes_at_the_first_eager_call(table, auto, monkeypatch):
    clock = FakeClock(price_of(lambda bound: bound is dispatch.OPS["layer_norm"].torch))
    monkeypatch.setattr(tune, "CudaClock", lambda: clock)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(dispatch, "can_measure", lambda device: tuned.mode() == "measure")
    x, one = torch.randn(2, 21, 24), torch.ones(24)
    ops.layer_norm(x, one, one)
    assert not clock.timed and not table.ops
    with tuned.use_tuning("measure"):
        torch.testing.assert_close(ops.layer_norm(x, one, one), fastvit.reference.layer_norm(x, one, one))
        assert fastvit.explain("layer_norm", x, one, one).candidate == "torch"
        count = len(clock.timed)
        ops.layer_norm(x, one, one)
        with torch.inference_mode():
            ops.layer_norm(x, one, one)
        assert len(clock.timed) == count > 0

        def broken(run):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(tune, "CudaClock", lambda: FakeClock(broken))
        y = torch.randn(4, 24)
        with pytest.warns(UserWarning, match=r"float32\[4x24\].* could not be tuned: RuntimeError: out of memory") as w:
            for _ in range(2):
                torch.testing.assert_close(ops.layer_norm(y, one, one), fastvit.reference.layer_norm(y, one, one))
        assert len(w) == 1


def test_only_eager_calls_on_a_gpu_are_measured(monkeypatch):
    gpu = torch.device("cuda", 0)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert not dispatch.can_measure(gpu)
    with tuned.use_tuning("measure"):
        assert dispatch.can_measure(gpu)
        assert not dispatch.can_measure(CPU)
        capturing = True
        assert not dispatch.can_measure(gpu)
        capturing = False
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not dispatch.can_measure(gpu)


def test_keys_tell_apart_what_may_run_differently():
    op = dispatch.OPS["layer_norm_linear"]
    x, norm, weight = torch.randn(2, 3, 8), torch.ones(8), torch.randn(4, 8, requires_grad=True)
    key = op.key((x, norm, norm, weight, None, 1e-6))
    assert key == "layer_norm_linear float32[2x3x8] float32[8] float32[8] float32[4x8]+grad -"
    with torch.no_grad():
        assert "+grad" not in op.key((x, norm, norm, weight, None, 1e-6))
    with torch.autocast("cpu", torch.bfloat16):
        assert op.key((x, norm, norm, weight, None, 1e-6)) == f"{key} autocast=bfloat16"
        call = tune.Call.like(op, (x, norm, norm, weight, None, 1e-6))
    with fastvit.use_backend("triton"):
        assert tune.BoundCall(call, CPU, tune._random(CPU)).key == f"{key} autocast=bfloat16"


def test_the_watcher_of_ops_is_restored():
    seen = []
    with dispatch.watching(lambda op, args: seen.append(op.name)):
        ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8))
    ops.layer_norm(torch.ones(2, 8), torch.ones(8), torch.ones(8))
    assert seen == ["layer_norm"]


@pytest.mark.parametrize("pixel", [torch.uint8, torch.float32], ids=str)
def test_patches_by_the_librarys_convolution(table, auto, pixel):
    """Where it was measured to be the fastest; in a row of blocks, it hands on nothing."""
    image = torch.rand(2, 3, 16, 24).mul(255 if pixel == torch.uint8 else 1).to(pixel)
    weight, bias, prefix = torch.randn(24, 3, 8, 8), torch.randn(24), torch.randn(1, 24)
    given = (image, weight, bias, None, prefix, [0.4] * 3, [0.3] * 3)
    record(table, tune.Call.like(dispatch.OPS["patch_embed"], given), "convolution")
    names = {"prefix": prefix, "mean": given[5], "std": given[6]}
    assert fastvit.explain("patch_embed", image, weight, bias, **names).candidate == "convolution"
    with ops.carrying():
        out = ops.patch_embed(image, weight, bias, **names)
    # Against float64: of the values near zero, rounding in another order leaves few digits on some machines.
    exact = image if pixel == torch.uint8 else image.double()
    want = fastvit.reference.patch_embed(
        exact, weight.double(), bias.double(), prefix=prefix.double(), mean=given[5], std=given[6]
    )
    assert relative_rms(out, want) < 1e-6


def test_dropout_is_not_measured(table, auto, monkeypatch):
    """Its results differ from call to call; a choice made without it is not followed with it."""
    qkv = record(table, attention_call(False), "torch")[0]
    assert fastvit.explain("attention", qkv).candidate == "torch"
    found = fastvit.explain("attention", qkv, dropout_p=0.1)
    assert found.candidate == "triton" and "calls with dropout" in found.evidence[0]
    asked = []
    monkeypatch.setattr(dispatch, "_tuner", lambda op, args: asked.append(op.name))
    monkeypatch.setattr(dispatch, "can_measure", lambda device: True)
    with tuned.use_tuning("measure"):
        ops.attention(qkv, dropout_p=0.1)
        assert not asked
        ops.attention(qkv)
    assert asked == ["attention"]
