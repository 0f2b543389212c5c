"""`fastvit attention`: the picture, and whose attention it shows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import MODEL, PHOTOS, add_bad_files, one_line, run, weights

import fastvit


def attention_picture(output: Path):
    """The size of a written picture, and what is in it."""
    image = pytest.importorskip("PIL.Image").open(output)
    return image.size, np.asarray(image.convert("RGB"))


def test_attention(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "map.png"
    arguments = [folder / "chelsea.jpg", "-o", output, *weights(checkpoint)]
    assert run("attention", *arguments) == 0
    assert capsys.readouterr().out == f"block 11, mean of 3 heads, head 0, head 1, head 2: {output}\n"
    from fastvit import heatmaps, images

    model = fastvit.create_model(MODEL, checkpoint=checkpoint).eval()
    pixels = images.read(folder / "chelsea.jpg", model.config)
    maps = fastvit.attention_maps(model, pixels[None], [3])[0][0, :, 0, 1:].unflatten(1, (14, 14)).numpy()
    image = pixels.permute(1, 2, 0).numpy()

    size, picture = attention_picture(output)
    assert run("attention", *arguments, "--block", "-1") == 0
    assert np.array_equal(attention_picture(output)[1], picture)
    assert run("attention", *arguments, "--block", "3", "--head", "1", "--dtype", "fp32") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"block 3, head 1: {output}"
    expected = heatmaps.draw(
        image, {"head 1": maps[1]}, f"{MODEL}, block 3: attention of the class token to each patch"
    )
    assert np.array_equal(attention_picture(output)[1], np.asarray(expected))
    assert attention_picture(output)[0] < size
    assert run("attention", *arguments[:1], "-o", tmp_path / "map.jpg", *weights(checkpoint), "--dtype", "bf16") == 0
    assert attention_picture(tmp_path / "map.jpg")[0] == size


def test_attention_of_a_bad_image(checkpoint, folder, tmp_path, capsys):
    add_bad_files(folder)
    for name, message in (("half.jpg", "truncated"), ("absent.jpg", "no such file")):
        assert run("attention", folder / name, "-o", tmp_path / "x.png", *weights(checkpoint)) == 1
        assert message in one_line(capsys)
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("name", "tokens"), [("deit_tiny_distilled_patch16_224", 2), ("vit_small_patch14_reg4_dinov2", 5)]
)
def test_attention_leaves_out_the_tokens_before_the_patches(name, tokens, tmp_path, monkeypatch):
    from fastvit import heatmaps

    seen = []
    monkeypatch.setattr(heatmaps, "save", lambda path, image, maps, title: seen.append((image, maps)))
    side = 28 if "patch14" in name else 32
    torch.save(fastvit.create_model(name, img_size=side).state_dict(), tmp_path / "w.pth")
    arguments = ["--device", "cpu", "--model", name, "--checkpoint", tmp_path / "w.pth", "--img-size", side]
    assert run("attention", PHOTOS / "chelsea.jpg", "-o", tmp_path / "x.png", *arguments, "--block", "1") == 0
    model = fastvit.create_model(name, checkpoint=tmp_path / "w.pth", img_size=side, num_classes=0).eval()
    ((image, maps),) = seen
    whole = fastvit.attention_maps(model, torch.from_numpy(image).permute(2, 0, 1)[None], [1])[0][0]
    assert whole.shape[1] == tokens + 4
    assert len(maps) == 1 + model.config.num_heads
    for head in range(model.config.num_heads):
        np.testing.assert_allclose(maps[f"head {head}"].ravel(), whole[head, 0, tokens:].numpy(), rtol=1e-6)
    np.testing.assert_allclose(next(iter(maps.values())).ravel(), whole[:, 0, tokens:].mean(0).numpy(), rtol=1e-5)
