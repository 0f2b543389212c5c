"""What the benchmark checks before it times anything: outputs and gradients, ours and the peers'."""

import json

import pytest
import torch

import fastvit
from fastvit.verify import reference_options

pytest.importorskip("PIL")
from bench_runs import BF16, FP32, MODEL, as_is, rows_of  # noqa: E402
from fastvit.benchmarks import ops, peers, schema, timing, work  # noqa: E402
from fastvit.benchmarks.cases import MODES, OPS, Case  # noqa: E402


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", MODES)
def test_every_photograph_and_every_row_of_the_batch_is_checked(quick, add_peer, mode, batch):
    """An error in any one row of any batch is found, whichever photograph is in it."""
    case = Case(MODEL, FP32, batch, mode)
    rows = batch * -(-2 // batch)
    for bad in range(rows):
        seen = [0]

        def make(case, ours, inputs, bad=bad, seen=seen):
            def call(images):
                assert len(images) == batch
                at = torch.arange(seen[0], seen[0] + batch)[:, None]
                seen[0] = (seen[0] + batch) % rows
                out = ours(images)
                return torch.where(at == bad, out * 1.01, out)

            return call

        add_peer("peer", make)
        subject = work.Subject(MODEL, None, quick())
        ready = work.ModelWork(case, subject)
        assert "error" in ready.judge(ready.build("peer").call)[1], bad
        assert ready.judge(ready.ours, ours=True)[1] == ""


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("op", OPS)
def test_ops_are_checked_and_timed(quick, add_peer, op, dtype):
    add_peer("same", as_is)
    add_peer("off", lambda *given: lambda **inputs: as_is(*given)(**inputs) * 1.05)
    cases = [Case(MODEL, dtype, 1, mode, op) for mode in MODES]
    for row in rows_of(quick(*cases, peers=("same", "off"))):
        assert (row.status, row.reason) == ("timed", ""), row
        assert (row.op, row.items) == (op, 1)
        assert row.entries["same"].ratio is not None
        assert row.entries["off"].status == "wrong"
        assert row.entries["off"].seconds is None
        assert "is more than the limit" in row.entries["off"].reason


@pytest.mark.parametrize("op", OPS)
def test_wrong_gradients_of_an_op_are_found(quick, add_peer, op):
    """Right outputs with wrong gradients, of any tensor."""
    case = Case(MODEL, FP32, 1, "training", op)
    wanted = [name for name, value in ops.inputs(case, "cpu").items() if getattr(value, "requires_grad", False)]
    for bad in wanted:
        add_peer(
            "peer", lambda *given, bad=bad: lambda **inputs: as_is(*given)(**inputs | {bad: Doubled.apply(inputs[bad])})
        )
        ready = work.OpWork(case, quick(case))
        assert "error of d " in ready.judge(ready.build("peer").call)[1], bad


class Doubled(torch.autograd.Function):
    """The identity, with twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_a_wrong_gradient_of_ours_is_not_timed(quick, monkeypatch):
    right = fastvit.VisionTransformer.forward_head
    monkeypatch.setattr(
        fastvit.VisionTransformer, "forward_head", lambda self, tokens: right(self, Doubled.apply(tokens))
    )
    monkeypatch.setattr(timing, "interleave", lambda *args: pytest.fail("timed a wrong model"))
    (row,) = rows_of(quick(Case(MODEL, FP32, 2, "training")))
    assert row.status == "wrong"
    assert "not timed: error of d " in row.reason
    assert list(row.entries) == ["ours"]


@pytest.mark.parametrize("bad", ["patch_embed.proj.weight", "blocks.1.norm2.bias", "head.bias"])
def test_every_gradient_of_ours_is_checked(quick, bad):
    case = Case(MODEL, FP32, 2, "training")
    ready = work.ModelWork(case, work.Subject(MODEL, None, quick()))
    ready.ours.get_parameter(bad).register_hook(lambda gradient: gradient * 1.01)
    error, reason = ready.judge(ready.ours, ours=True)
    assert f"error of d {bad} " in reason
    assert error < 1e-5, "the output is right"
    ready.ours.get_parameter(bad).requires_grad_(False)
    assert ready.judge(ready.ours, ours=True)[1] == f"has no d {bad}"


def test_gradients_of_a_peers_own_parameters_are_told_by_their_shape(quick):
    pytest.importorskip("timm")
    case = Case(MODEL, FP32, 2, "training")
    ready = work.ModelWork(case, work.Subject(MODEL, None, quick()))
    found = ready.evaluate(ready.build("timm").call)
    assert set(found) == {"out"} | {
        f"d {name}" for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "head.weight", "head.bias")
    }


def test_a_wrong_gradient_of_a_peer_is_found(quick, add_peer):
    pytest.importorskip("timm")
    case = Case(MODEL, FP32, 2, "training")
    build = peers.build

    def make(case, ours, inputs):
        right = build(peers.PEERS["timm"], case, ours, inputs).call
        right.blocks[1].register_forward_hook(lambda module, given, out: Doubled.apply(out))
        return right

    add_peer("peer", make)
    ready = work.ModelWork(case, work.Subject(MODEL, None, quick()))
    error, reason = ready.judge(ready.build("peer").call)
    assert error < 1e-5
    assert "error of d " in reason


def test_a_training_step_takes_the_gradient_of_every_parameter(quick):
    case = Case(MODEL, FP32, 2, "training")
    ready = work.ModelWork(case, work.Subject(MODEL, None, quick()))
    assert ready.ours.training
    step = ready.step(ready.ours)
    for _ in range(2):
        gradients = step()
        assert len(gradients) == len(list(ready.ours.parameters()))
    assert all(parameter.grad is None for parameter in ready.ours.parameters()), "nothing is summed up"


@pytest.mark.parametrize("mode", MODES)
def test_what_is_timed_is_what_was_checked(quick, mode):
    """Images of one kind in both: a compiler that met another kind would compile again."""
    seen = set()

    def call(images):
        seen.add(images.is_inference())
        return ready.ours(images)

    ready = work.ModelWork(Case(MODEL, FP32, 2, mode), work.Subject(MODEL, None, quick()))
    ready.judge(call)
    step = ready.step(call)
    with ready.gradients():
        step()
    assert seen == {mode == "inference"}


def test_the_step_of_an_op_takes_its_inputs_in_turn(quick, monkeypatch):
    case = Case(MODEL, FP32, 1, op="layer_norm")
    monkeypatch.setattr(ops, "MOST_BYTES", 1 << 30)
    monkeypatch.setattr(ops, "cache_bytes", lambda device: 200_000)
    ready, seen = work.OpWork(case, quick(case)), []
    step = ready.step(lambda x, **others: seen.append(x.data_ptr()))
    count = ready.turns
    assert count >= 2
    for _ in range(2 * count):
        step()
    assert len(set(seen[:count])) == count
    assert seen[:count] == seen[count:]


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_model_is_not_timed(quick, monkeypatch, factor):
    right = fastvit.VisionTransformer.forward
    monkeypatch.setattr(fastvit.VisionTransformer, "forward", lambda self, images: right(self, images) * factor)
    monkeypatch.setattr(timing, "interleave", lambda *args: pytest.fail("timed a wrong model"))
    (row,) = rows_of(quick())
    assert (row.status, row.entries["ours"].status) == ("wrong", "wrong")
    assert "not timed: error 1.00e-03" in row.reason or factor != factor
    assert row.entries["ours"].seconds is None
    assert list(row.entries) == ["ours"]
    json.dumps(schema.asdict(row), allow_nan=False)


@pytest.mark.parametrize("shape", ["fewer", "broadcast"])
def test_a_peer_of_another_shape_is_wrong(quick, add_peer, shape):
    add_peer("peer", lambda case, ours, inputs: lambda i: ours(i)[:, :10] if shape == "fewer" else ours(i)[:, None])
    (row,) = rows_of(quick(peers=("peer",)))
    assert row.entries["peer"].status == "wrong"
    assert "expected (3, 1000)" in row.entries["peer"].reason


def test_the_reference_of_a_subject_is_the_model(quick):
    """The truth is of the weights and photographs as the dtype holds them: in bfloat16 another one than in float32."""
    subject = work.Subject(MODEL, None, quick())
    for dtype in (FP32, BF16):
        truth, limits = subject.truth(dtype, "inference")
        state = {name: tensor.to(dtype).double() for name, tensor in subject.model.state_dict().items()}
        images = subject.photos.to(dtype).double()
        expected = fastvit.reference.vision_transformer(images, state, **reference_options(subject.config))
        assert torch.equal(truth["out"], expected)
        assert limits["out"] < 10 * torch.finfo(dtype).eps
    assert not torch.equal(truth["out"], subject.truth(FP32, "inference")[0]["out"])
