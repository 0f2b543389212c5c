"""What the benchmark runs: the default suites, what is asked for, and the inputs of an op."""

import pytest
import torch

import fastvit
from fastvit import dispatch

pytest.importorskip("PIL")
from bench_runs import BF16, FP32, MODEL  # noqa: E402
from fastvit.benchmarks import bench, ops, peers, suites  # noqa: E402
from fastvit.benchmarks.cases import MODES, OPS, Case, combine  # noqa: E402


def test_only_the_default_run_on_a_cpu_interprets():
    assert suites.settings("cpu").interpreted == MODEL
    assert suites.settings("cpu", models=(MODEL,)).interpreted is None
    assert suites.settings("cpu", quick=True).interpreted is None
    assert suites.settings("cuda").interpreted is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick_run", [True, False])
def test_the_default_suites_name_each_case_once_and_can_be_run(device, quick_run):
    settings = suites.settings(device, quick=quick_run)
    ids = [case.id for case in settings.cases]
    assert len(set(ids)) == len(ids)
    assert all(device in peers.PEERS[peer].devices for peer in settings.peers)
    for case in settings.cases:
        assert bench.roofline.case_cost(case).flops >= 0
        assert case.op != "layer_norm_mlp" or case.config.mlp == "mlp"


def test_the_suite_of_a_gpu_has_what_is_worth_knowing():
    cases = suites.settings("cuda").cases
    assert {197, 257, 577, 1025, 1370} <= {case.tokens for case in cases}
    assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16, torch.float16}
    assert {case.op for case in cases} == {"", *OPS}
    assert {case.mode for case in cases} == set(MODES)
    widths = {case.config.embed_dim for case in cases}
    assert widths == {192, 384, 768, 1024, 1280, 1536}
    assert {1, 32, 256} <= {case.batch for case in cases}
    assert all(case.dtype == torch.bfloat16 for case in cases[:30])


def test_what_is_asked_for_is_combined():
    settings = suites.settings("cpu", ops=("attention", "model"), modes=MODES, dtypes=(BF16,), batches=(2, 4))
    models = ("vit_tiny_patch16_224", "vit_base_patch16_224")
    expected = [case for op in ("attention", "") for case in combine(models, [BF16], [2, 4], MODES, [op])]
    assert list(settings.cases) == expected
    (case,) = suites.settings("cpu", models=(MODEL,), img_sizes=(64,), batches=(1,), dtypes=(FP32,)).cases
    assert (case.img_size, case.tokens) == (64, 17)
    assert len(suites.settings("cpu", models=(MODEL,), dtypes=(FP32,), batches=(1, 1)).cases) == 1
    assert {case.batch for case in suites.settings("cuda", ops=("attention",)).cases} == {256}


def test_the_same_seed_gives_the_same_inputs_in_every_mode():
    a, b = (ops.inputs(Case(MODEL, FP32, 1, mode, "linear_residual"), "cpu") for mode in MODES)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert b["x"].requires_grad and not a["x"].requires_grad
    patches = ops.inputs(Case(MODEL, FP32, 1, "training", "patch_embed"), "cpu")
    assert patches["weight"].requires_grad and not patches["image"].requires_grad


def test_an_ops_inputs_are_those_that_the_model_gives_it(monkeypatch):
    """Shapes, flags and options, caught in a forward pass of the model."""
    caught = {}
    for op in OPS:
        right = getattr(fastvit.ops, op)

        def catch(*args, op=op, right=right, **kwargs):
            caught.setdefault(op, (args, kwargs))
            return right(*args, **kwargs)

        monkeypatch.setattr(fastvit.ops, op, catch)
    for name, img_size in (("vit_small_patch14_reg4_dinov2", 56), ("deit_tiny_distilled_patch16_224", 64)):
        caught.clear()
        model = fastvit.create_model(name, img_size=img_size, depth=1)
        model(torch.randn(2, 3, img_size, img_size))
        with dispatch.watching(lambda op, args: None):  # as one op, as on a GPU
            model(torch.randn(2, 3, img_size, img_size))
        assert set(caught) == set(OPS)
        for op, (args, kwargs) in caught.items():
            made = ops.inputs(Case(name, FP32, 2, op=op, img_size=img_size), "cpu")
            shapes = sorted(tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
            if op == "layer_norm":  # the last one of the model
                assert made["x"].shape == args[0].shape
            assert sorted(tuple(v.shape) for v in made.values() if isinstance(v, torch.Tensor)) == shapes, op
            assert made.get("activation") == kwargs.get("activation")


def test_the_suite_of_a_gpu_begins_with_what_is_worth_most():
    cases = suites.settings("cuda").cases
    small, base, large, tiny = (f"vit_{size}_patch16_224" for size in ("small", "base", "large", "tiny"))
    first = [(model, mode) for model in (base, small, large) for mode in MODES]
    assert [(case.model, case.mode, case.op) for case in cases[:6]] == [(*pair, "") for pair in first]
    rest = 6 + len(MODES) * len(OPS)
    assert [(case.mode, case.op) for case in cases[6:rest]] == [(mode, op) for mode in MODES for op in OPS]
    assert {case.model for case in cases[6:rest]} == {base}
    assert {case.batch for case in cases if case.op} == {case.batch for case in cases[:rest]} == {256}
    models = [(model, batch) for model in (base, small, large, tiny) for batch in (1, 32)]
    assert [(case.model, case.batch) for case in cases[rest : rest + 8]] == models
    assert {(case.mode, case.op) for case in cases[rest : rest + 8]} == {("inference", "")}
