"""fastvit verify --model: a model of ours beside timm's."""

import json

import pytest
import torch
from command_line import MODEL, one_line, run

import fastvit


def test_a_model_beside_timms(tmp_path, capsys):
    assert run("verify", "--device", "cpu", "--model", MODEL, "--json", tmp_path / "report.json") == 0
    printed = capsys.readouterr().out
    assert "No layer departs by more than rounding" in printed and "block 11 mlp" in printed
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["same"] and found["model_a"].startswith("timm.") and found["model_b"].startswith("fastvit.")


def test_a_layer_that_departs_fails(capsys, monkeypatch):
    original = fastvit.create_model

    def other(name, **options):
        model = original(name, **options)
        model.blocks[3].mlp.act = torch.nn.GELU("tanh")
        return model

    monkeypatch.setattr(fastvit, "create_model", other)
    assert run("verify", "--device", "cpu", "--model", MODEL) == 1
    assert "block 3 mlp: tanh GELU against exact GELU explains all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_tiny_patch16_225"], "vit_tiny_patch16_224"),
        (["--model", MODEL, "--checkpoint", "no/such.pth"], "no/such.pth"),
        (["--checkpoint", "weights.pth"], "--checkpoint has no use without --model"),
        (["--model", MODEL, "--ops", "attention"], "--ops is of the kernels"),
        (["--model", MODEL, "--resume"], "--resume is of the kernels"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    assert run("verify", "--device", "cpu", *arguments) == 2
    assert message in one_line(capsys)
