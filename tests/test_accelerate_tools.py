"""What compilers, exporters, tracers and wrappers of distributed training make of accelerated models."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dropin_checks import check_compile, check_distributed, check_export
from dropin_models import BY_NAME, FAMILIES, every_family, first, gradients_of, images, one_of_each, timm
from torch import nn

import fastvit
from fastvit import dispatch
from fastvit.dropin import register_attention

VIT, TORCHVISION, DINOV2 = BY_NAME["timm ViT"], BY_NAME["torchvision ViT"], BY_NAME["transformers Dinov2"]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.mark.parametrize("backend", [pytest.param("auto", marks=pytest.mark.slow), "triton"])
@one_of_each
def test_compile(family, backend):
    check_compile(family, backend)


@torch.no_grad()
def test_compile_of_what_transformers_has_hooked():
    model = DINOV2.model()
    fastvit.accelerate(model)
    want = DINOV2.run(model, images(), output_hidden_states=True)
    torch._dynamo.reset()
    with fastvit.use_backend("triton"):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(first(DINOV2.run(compiled, images())), first(want), **CLOSE)
        torch.testing.assert_close(DINOV2.run(compiled, images(), output_hidden_states=True), want, **CLOSE)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@one_of_each
def test_export(family, strict):
    check_export(family, strict)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_jit_traces_hold_the_librarys_own_code():
    model = VIT.model()
    want = model(images())
    fastvit.accelerate(model)
    file = io.BytesIO()
    with fastvit.use_backend("triton"):
        traced = torch.jit.trace(model, images())
    assert "fastvit" not in str(traced.inlined_graph)
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(images()), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_is_refused_in_one_sentence_until_restored():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=1, num_heads=3).eval()
    fastvit.accelerate(model, modules=("block",))
    with pytest.raises(RuntimeError, match="^torch.jit.script cannot compile Block, which .*fastvit.restore.*before$"):
        torch.jit.script(model)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(fastvit.restore(model))(images()), model(images()))


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
@pytest.mark.parametrize("family", [VIT, TORCHVISION], ids=str)
@torch.no_grad()
def test_feature_extractors_trace_the_librarys_own_code(family):
    from torchvision.models.feature_extraction import create_feature_extractor

    model, other = family.model(), family.model()
    fastvit.accelerate(model)
    nodes = ["blocks.0.mlp.fc1", "patch_embed.proj"] if family is VIT else ["encoder.layers.encoder_layer_0.ln_1"]
    got, want = (create_feature_extractor(which, nodes)(images()) for which in (model, other))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@torch.no_grad()
def test_functional_calls_and_transforms():
    """Other parameters than the model's own; and a batch of them, which runs in PyTorch."""
    model = VIT.model()
    fastvit.accelerate(model)
    state = {name: tensor + 0.1 for name, tensor in model.state_dict().items()}
    want = torch.func.functional_call(fastvit.restore(model), state, images())
    fastvit.accelerate(model)
    with fastvit.use_backend("triton"):
        torch.testing.assert_close(torch.func.functional_call(model, state, images()), want, **CLOSE)
    x = images()
    got = torch.func.vmap(lambda s: torch.func.functional_call(model, s, x))(
        {name: torch.stack([tensor, tensor]) for name, tensor in state.items()}
    )
    torch.testing.assert_close(got[1], want, **CLOSE)


@every_family
@torch.no_grad()
def test_a_cpu_is_not_asked_to_do_more(family):
    """Beside a call of a module that asks for nothing: what the swap adds is a look at the input."""
    model = family.model()
    fastvit.accelerate(model)
    calls = []
    run = fastvit.dropin.plans.BlockPlan.run
    fastvit.dropin.plans.BlockPlan.run = lambda *args, **kwargs: calls.append(args) or run(*args, **kwargs)
    try:
        family.run(model, images())
    finally:
        fastvit.dropin.plans.BlockPlan.run = run
    assert calls == []


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the stand-in for a GPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, its own driver would be in the way")
def test_on_a_gpu_as_far_as_a_stand_in_goes():
    """By Triton's own launches: in bfloat16 and under autocast blocks run on the kernels; in float32, of which nothing
    was measured, their own code."""
    tests = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path]), "FASTVIT_TUNING": "off"}
    command = [sys.executable, tests / "stub_gpu" / "accelerated.py"]
    done = subprocess.run(command, env=environment | {"STUB_GPU_COMPILE": "no"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 9
    for case, (launched, *ops) in found.items():
        way = "torch" if "float32" in case else "kernels"
        assert ops == [f"patch_embed: {way}", *[f"transformer_block: {way}"] * 2], case
        assert (launched > 30) == (way == "kernels"), case


# --------------------------------------------------------------------------------------------------------------------
# transformers' light form


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.name.startswith("transformers")])
def test_as_an_implementation_of_attention(name):
    register_attention()
    family = BY_NAME[name]
    model, other = family.model(), family.model()
    model.set_attn_implementation("fastvit")
    ran = []
    with fastvit.use_backend("triton"), dispatch.watching(lambda op, args: ran.append(op.name)):
        got = gradients_of(family, model, images())
    assert ran == ["attention"] * 2
    torch.testing.assert_close(got, gradients_of(family, other, images()), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        want = first(family.run(other, images()))
        torch.testing.assert_close(first(family.run(model, images())), want, rtol=0, atol=0)  # on a CPU SDPA
        fastvit.accelerate(model)  # and both forms at once
        with fastvit.use_backend("triton"):
            torch.testing.assert_close(first(family.run(model, images())), want, **CLOSE)


@torch.no_grad()
def test_an_implementation_of_attention_takes_masks():
    """Which transformers drops for names that it has no function of masks for."""
    register_attention("ours")
    model, other = DINOV2.model(), DINOV2.model()
    model.set_attn_implementation("ours")
    mask = torch.rand(2, 17) < 0.6
    mask[:, 0] = True
    with fastvit.use_backend("triton"):
        got = model(images(), attention_mask=mask).last_hidden_state
    want = other(images(), attention_mask=mask).last_hidden_state
    assert (want - other(images()).last_hidden_state).abs().max() > 1e-2
    torch.testing.assert_close(got, want, **CLOSE)


def test_what_the_attention_op_has_not_runs_as_sdpa():
    import transformers

    register_attention()
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        want = model(tokens).last_hidden_state
        model.set_attn_implementation("fastvit")
        with fastvit.use_backend("triton"):
            torch.testing.assert_close(model(tokens).last_hidden_state, want, rtol=0, atol=0)
    dropping = BY_NAME["transformers ViT"].model(attention_probs_dropout_prob=0.3).train()
    dropping.set_attn_implementation("fastvit")
    ran = []
    with fastvit.use_backend("triton"), dispatch.watching(lambda op, args: ran.append(op.name)):
        dropping(images())
    assert ran == []


def test_importing_fastvit_registers_nothing():
    script = (
        "from fastvit import torchvision_shim; torchvision_shim.install()\n"
        "import sys, fastvit; fastvit.accelerate; fastvit.restore\n"
        "print({'timm', 'torchvision', 'transformers', 'triton'} & {*sys.modules})\n"
        "import transformers\n"
        "print('fastvit' in transformers.AttentionInterface())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["set()", "False"], done.stderr


# --------------------------------------------------------------------------------------------------------------------
# Distributed training


@pytest.mark.slow
def test_two_processes_learn_what_one_does():
    check_distributed(DINOV2, "DDP", "FSDP2")


def test_a_sharded_model_is_left_alone_and_an_accelerated_one_not_restored(tmp_path):
    """Which one to call first: accelerate, then fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = VIT.model()
        fully_shard(model.blocks[0], mesh=mesh)
        found = {entry.name: entry.reason for entry in fastvit.accelerate(model, modules=("block",)).entries}
        assert found == {"blocks.0": "it holds DTensor, quantised or distributed", "blocks.1": ""}
        fully_shard(model.blocks[1], mesh=mesh)
        with pytest.raises(ValueError, match="model.blocks.1 is a FSDPBlock now"):
            fastvit.restore(model)
        assert isinstance(model.blocks[1], nn.Module)
    finally:
        torch.distributed.destroy_process_group()
