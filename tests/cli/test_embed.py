"""`fastvit embed`: what it writes, and that an interruption costs nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import MODEL, PHOTOS, ROOT, add_bad_files, complaints, one_line, read_npz, run, weights

import fastvit
from fastvit.commands import embed


def test_embed_npz(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "out.npz"
    assert run("embed", folder, "-o", output, "--batch-size", "2", *weights(checkpoint)) == 0
    assert capsys.readouterr().out == f"3 images, 0 skipped: {output}\n"
    names, rows = read_npz(output)
    assert names == ["chelsea.jpg", "rocket.jpg", "sub/coffee.jpg"]
    model = fastvit.create_model(MODEL, checkpoint=checkpoint).eval()
    from fastvit import images

    pixels = torch.stack([images.read(folder / name, model.config) for name in names])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    np.testing.assert_allclose(rows, expected.numpy(), rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.npz"]


@pytest.mark.parametrize("command", ["embed", "classify"])
def test_on_a_cpu_the_model_is_frozen(command, checkpoint, folder, tmp_path, capsys, monkeypatch):
    """The same numbers within rounding as of the model as it is, and a line that says so; where it cannot be frozen it
    runs as it is, and the line says why."""

    def refuse(*_, batch_sizes, **__):
        assert batch_sizes == (len(files),)  # those to come, not as many as would fit into a batch
        raise RuntimeError("no runtime can run this model")

    output, files = tmp_path / "out.npz", sorted(folder.rglob("*.jpg"))
    arguments = [folder, "-o", output] if command == "embed" else [*files, "--json"]

    def rows_and_notes() -> tuple[np.ndarray, str]:
        assert run(command, *arguments, "--img-size", "32", "--batch-size", "4", *weights(checkpoint)) == 0
        printed = capsys.readouterr()
        if command == "embed":
            return read_npz(output)[1], printed.err
        found = json.loads(printed.out)
        return np.array([[entry["probability"] for entry in image["top5"]] for image in found]), printed.err

    frozen, notes = rows_and_notes()
    assert "The model is frozen, on torch: the same numbers within rounding." in notes
    monkeypatch.setattr("fastvit.frozen.freeze", refuse)
    plain, notes = rows_and_notes()
    assert "The model runs as it is, not frozen: RuntimeError: no runtime can run this model." in notes
    np.testing.assert_allclose(frozen, plain, rtol=1e-4, atol=1e-5)
    assert command == "classify" or not np.array_equal(frozen, plain)  # other rounding: it was another path


@pytest.mark.parametrize("name", ["OUT.NPZ", "Out.SafeTensors"])
def test_embed_takes_its_format_in_any_case(name, checkpoint, folder, tmp_path):
    pytest.importorskip("safetensors")
    assert run("embed", folder, "-o", tmp_path / name, "--img-size", "32", *weights(checkpoint)) == 0
    assert (tmp_path / name).read_bytes().startswith(b"PK") == (name == "OUT.NPZ")


def test_embed_writes_to_what_its_output_links_to(checkpoint, folder, tmp_path):
    (tmp_path / "disk").mkdir()
    output, target = tmp_path / "out.npz", tmp_path / "disk" / "real.npz"
    output.symlink_to("disk/real.npz")
    for _ in range(2):  # a link to nothing yet, and to a file
        assert run("embed", folder, "-o", output, "--img-size", "32", *weights(checkpoint)) == 0
        assert output.is_symlink() and not target.is_symlink()
        assert len(read_npz(target)[0]) == 3
        assert list((tmp_path / "disk").iterdir()) == [target]


def test_embed_safetensors(checkpoint, folder, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    output = tmp_path / "out.safetensors"
    assert run("embed", folder, "-o", output, "--dtype", "bf16", *weights(checkpoint)) == 0
    with safetensors.safe_open(output, "np") as file:
        assert json.loads(file.metadata()["files"]) == ["chelsea.jpg", "rocket.jpg", "sub/coffee.jpg"]
        assert json.loads(file.metadata()["about"])["model"] == MODEL
        assert file.get_tensor("features").shape == (3, 192)


def test_embed_names_and_skips_bad_images(checkpoint, folder, tmp_path, capsys):
    add_bad_files(folder)
    output = tmp_path / "out.npz"
    assert run("embed", folder, "-o", output, *weights(checkpoint)) == 1
    printed = capsys.readouterr()
    assert "3 images, 2 skipped" in printed.out
    assert [line.split(":")[0] for line in complaints(printed.err).splitlines()] == [
        f"skipped {folder / 'half.jpg'}",
        f"skipped {folder / 'text.jpg'}",
    ]
    assert len(read_npz(output)[0]) == 3


def test_embed_of_bad_images_only_writes_nothing(checkpoint, tmp_path, capsys):
    pytest.importorskip("PIL")
    folder = tmp_path / "images"
    folder.mkdir()
    add_bad_files(folder)
    assert run("embed", folder, "-o", tmp_path / "out.npz", *weights(checkpoint)) == 1
    assert "no image gave features; nothing written" in capsys.readouterr().err
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError("device lost")])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_embed_keeps_what_it_has_and_goes_on_from_there(stop, resume, checkpoint, folder, tmp_path, capsys, stop_after):
    output, whole = tmp_path / "out.npz", tmp_path / "whole.npz"
    arguments = [folder, "--batch-size", "1", *weights(checkpoint)]
    assert run("embed", "-o", whole, *arguments) == 0
    stop_after(1, stop)
    assert run("embed", "-o", output, *arguments) == (130 if stop is KeyboardInterrupt else 1)
    assert "1 images are kept" in capsys.readouterr().err
    assert not output.exists()
    partial = tmp_path / "out.npz.partial"
    assert read_npz(partial)[0] == ["chelsea.jpg"]

    stop_after(0, stop)
    assert run("embed", "-o", output, *arguments, *resume) == (130 if stop is KeyboardInterrupt else 1)
    assert read_npz(partial)[0] == ["chelsea.jpg"]

    stop_after(None)
    capsys.readouterr()
    assert run("embed", "-o", output, *arguments, *resume) == 0
    assert complaints(capsys.readouterr().err) == "Resuming: 1 of 3 images are done.\n"
    assert not partial.exists()
    assert read_npz(output)[0] == read_npz(whole)[0]
    assert np.array_equal(read_npz(output)[1], read_npz(whole)[1])


def test_a_second_ctrl_c_does_not_stop_the_saving(checkpoint, folder, tmp_path, capsys, stop_after, monkeypatch):
    from fastvit import features

    right, before = features.write_atomically, signal.getsignal(signal.SIGTERM)

    def interrupted(path, data):
        assert "Saving 1 images" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        right(path, data)

    monkeypatch.setattr(features, "write_atomically", interrupted)
    stop_after(1)
    assert run("embed", folder, "-o", tmp_path / "x.npz", "--batch-size", "1", *weights(checkpoint)) == 130
    assert "Stopped: 1 images are kept in" in capsys.readouterr().err
    assert read_npz(tmp_path / "x.npz.partial")[0] == ["chelsea.jpg"]
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_embed_recomputes_what_is_gone_or_has_changed_and_keeps_the_order(
    checkpoint, folder, tmp_path, capsys, stop_after
):
    shutil.copy(PHOTOS / "camera.jpg", folder / "t.jpg")
    output, arguments = tmp_path / "out.npz", [folder, "--batch-size", "1", *weights(checkpoint)]
    stop_after(3)
    assert run("embed", "-o", output, *arguments) == 130
    assert read_npz(tmp_path / "out.npz.partial")[0] == ["chelsea.jpg", "rocket.jpg", "sub/coffee.jpg"]
    (folder / "rocket.jpg").unlink()
    shutil.copy(PHOTOS / "astronaut.jpg", folder / "a.jpg")
    status = (folder / "chelsea.jpg").stat()
    shutil.copy(PHOTOS / "astronaut.jpg", folder / "chelsea.jpg")
    os.utime(folder / "chelsea.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))  # another size, the same time
    os.utime(folder / "sub" / "coffee.jpg")  # the same size, another time
    stop_after(1)
    capsys.readouterr()
    assert run("embed", "-o", output, *arguments) == 130
    noted = f"Left out 3 rows of {output}.partial: their images are gone or have changed.\n"
    assert capsys.readouterr().err.startswith(noted)
    stop_after(None)
    assert run("embed", "-o", output, *arguments) == 0
    assert run("embed", "-o", tmp_path / "whole.npz", *arguments) == 0
    names, rows = read_npz(output)
    assert names == read_npz(tmp_path / "whole.npz")[0] == ["a.jpg", "chelsea.jpg", "sub/coffee.jpg", "t.jpg"]
    assert np.array_equal(rows, read_npz(tmp_path / "whole.npz")[1])
    assert np.array_equal(rows[0], rows[1])


def test_embed_never_takes_or_replaces_what_another_run_left(checkpoint, folder, tmp_path, capsys, stop_after):
    output, partial = tmp_path / "out.npz", tmp_path / "out.npz.partial"
    arguments = ["-o", output, "--batch-size", "1", "--device", "cpu", "--model", MODEL]
    mine, theirs = ["--checkpoint", checkpoint], ["--checkpoint", tmp_path / "other.pth"]
    torch.save(fastvit.create_model(MODEL, num_classes=3).state_dict(), tmp_path / "other.pth")
    stop_after(2)
    assert run("embed", folder, *arguments, *mine) == 130
    before = partial.read_bytes()
    capsys.readouterr()
    for others, message in (
        ([folder, *mine, "--dtype", "bf16"], "was made with dtype float32 (now bfloat16)"),
        ([folder, *mine, "--img-size", "32"], "was made with img_size 224 (now 32)"),
        ([folder, *theirs], "other.pth"),
        ([folder / "sub", *mine], f"was made with folder {folder} (now {folder / 'sub'})"),
    ):
        assert run("embed", *arguments, *others) == 2
        error = one_line(capsys)
        assert message in error
        assert error.endswith("; --no-resume starts anew\n")
        assert partial.read_bytes() == before
    stop_after(0)
    assert run("embed", folder, *arguments, *mine, "--dtype", "fp32", "--img-size", "224") == 130  # not other ones
    assert partial.read_bytes() == before
    stop_after(1)
    assert run("embed", folder, *arguments, *mine, "--dtype", "bf16", "--no-resume") == 130
    assert read_npz(partial)[0] == ["chelsea.jpg"]


def test_embed_replaces_a_finished_result_when_it_is_through_and_says_so(
    checkpoint, folder, tmp_path, capsys, stop_after
):
    output, arguments = tmp_path / "out.npz", ["--batch-size", "1", *weights(checkpoint)]
    assert run("embed", folder, "-o", output, *arguments) == 0
    before = output.read_bytes()
    (folder / "rocket.jpg").unlink()
    stop_after(1)
    capsys.readouterr()
    assert run("embed", folder, "-o", output, *arguments) == 130
    assert f"{output} exists: it is replaced when this run is through.\n" in capsys.readouterr().err
    assert output.read_bytes() == before
    stop_after(None)
    assert run("embed", folder, "-o", output, *arguments) == 0
    assert read_npz(output)[0] == ["chelsea.jpg", "sub/coffee.jpg"]


def test_a_full_disk_costs_no_row(checkpoint, folder, tmp_path, capsys, monkeypatch):
    from fastvit import features

    right, calls = features.write_atomically, []

    def full(path, data):
        calls.append(path.name)
        if len(calls) in (2, 4):  # the second partial file, and the output
            raise OSError(28, "No space left on device")
        right(path, data)

    monkeypatch.setattr(features, "write_atomically", full)
    monkeypatch.setattr(embed, "SAVE_SECONDS", -1)
    arguments = [folder, "-o", tmp_path / "out.npz", "--batch-size", "1", *weights(checkpoint)]
    assert run("embed", *arguments) == 1
    assert calls == ["out.npz.partial"] * 3 + ["out.npz", "out.npz.partial"]
    error = complaints(capsys.readouterr().err).splitlines()
    assert error[0] == f"{tmp_path / 'out.npz.partial'} could not be written and is as it was: No space left on device"
    assert error[1].startswith("Saving 3 images")
    assert error[2].startswith("Stopped: 3 images are kept in")
    assert error[3] == "fastvit embed: error: [Errno 28] No space left on device"
    assert run("embed", *arguments) == 0
    assert capsys.readouterr().err == "Resuming: 3 of 3 images are done.\n"  # and nothing to freeze the model for


@pytest.mark.slow
def test_ctrl_c_again_and_again_loses_no_row(checkpoint, tmp_path):
    """With real signals: a bad image among good ones tells when to send them."""
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "000.png")
    for i in range(1, 1000):
        (folder / f"{i:03}.png").symlink_to("000.png")
    for bad in ("040.png", "080.png"):
        (folder / bad).unlink()
        (folder / bad).write_text("no image at all")
    command = [sys.executable, "-m", "fastvit", "embed", folder, "-o", tmp_path / "x.npz", "--batch-size", "1"]
    command += ["--img-size", "32", *weights(checkpoint)]
    kept = []
    for bad in ("040.png", "080.png"):
        with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            said = []
            for line in process.stderr:
                said.append(line)
                if f"skipped {folder / bad}: " in line:
                    process.send_signal(signal.SIGINT)
        assert process.returncode == 130, said
        assert "images are kept in" in said[-2]
        assert said[-1] == "fastvit embed: error: interrupted\n"
        kept.append(read_npz(tmp_path / "x.npz.partial")[0])
    assert kept[0][:40] == [f"{i:03}.png" for i in range(40)]
    assert kept[1][: len(kept[0])] == kept[0]
    assert 79 <= len(kept[1]) < 998
    assert said[0] == f"Resuming: {len(kept[0])} of 1000 images are done.\n"


@pytest.mark.parametrize(
    ("target", "status", "message"),
    [
        ("absent/out.npz", 2, "no such folder"),
        ("images", 2, "is a folder"),
        ("out.csv", 2, "unknown format '.csv', expected .npz or .safetensors"),
    ],
)
def test_embed_refuses_a_bad_output_before_it_works(target, status, message, checkpoint, folder, tmp_path, capsys):
    assert run("embed", folder, "-o", tmp_path / target, *weights(checkpoint)) == status
    assert message in one_line(capsys)


@pytest.mark.parametrize("content", ["garbage", "older"])
def test_embed_does_not_trust_a_partial_file(content, checkpoint, folder, tmp_path, capsys):
    partial = tmp_path / "x.npz.partial"
    if content == "garbage":
        partial.write_bytes(b"not an archive")
    else:  # without the times of its images, as the first version wrote it
        with partial.open("wb") as file:
            np.savez(file, files=np.array(["chelsea.jpg"]), features=np.ones((1, 192)), about=np.array("{}"))
    before = partial.read_bytes()
    assert run("embed", folder, "-o", tmp_path / "x.npz", *weights(checkpoint)) == 2
    assert "no partial result of this version of fastvit; --no-resume starts anew" in one_line(capsys)
    assert partial.read_bytes() == before
    assert run("embed", folder, "-o", tmp_path / "x.npz", "--no-resume", *weights(checkpoint)) == 0
    assert not partial.exists()


def test_files_that_vanish_are_named_and_cost_only_themselves(checkpoint, folder, tmp_path, capsys, monkeypatch):
    from fastvit import images

    right = images.read_batches

    def vanish(*arguments):
        (folder / "rocket.jpg").unlink()
        return right(*arguments)

    monkeypatch.setattr(images, "read_batches", vanish)
    (folder / "dangling.jpg").symlink_to("absent.jpg")
    (folder / "link").symlink_to(PHOTOS)
    assert run("embed", folder, "-o", tmp_path / "x.npz", *weights(checkpoint)) == 1
    assert complaints(capsys.readouterr().err).splitlines() == [
        f"skipped {folder / 'dangling.jpg'}: No such file or directory",
        f"skipped {folder / 'rocket.jpg'}: no such file",
    ]
    linked = [f"link/{path.name}" for path in sorted(PHOTOS.glob("*.jpg"))]
    assert read_npz(tmp_path / "x.npz")[0] == ["chelsea.jpg", *linked, "sub/coffee.jpg"]


def test_kinds_of_images_that_are_not_read_are_named(checkpoint, folder, tmp_path, capsys):
    for name in ("a.heic", "b.svg", "notes.txt"):
        (folder / name).write_text("")
    shutil.copy(PHOTOS / "coffee.jpg", folder / "c.NEF")
    assert run("embed", folder, "-o", tmp_path / "x.npz", *weights(checkpoint)) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("3 images, 3 skipped")
    for line, name in zip(complaints(printed.err).splitlines(), ("a.heic", "b.svg", "c.NEF"), strict=True):
        assert line.startswith(f"skipped {folder / name}: {Path(name).suffix.lower()} is not read by Pillow")


def test_embed_saves_on_the_way(checkpoint, folder, tmp_path, monkeypatch):
    from fastvit.features import Features

    right, saved = Features.save_partial, []
    monkeypatch.setattr(Features, "save_partial", lambda self: (saved.append(len(self.rows)), right(self))[1])
    monkeypatch.setattr(embed, "SAVE_SECONDS", -1)
    assert run("embed", folder, "-o", tmp_path / "x.npz", "--batch-size", "1", *weights(checkpoint)) == 0
    assert saved == [1, 2, 3]


def test_embed_takes_a_checkpoint_of_any_classifier(folder, tmp_path):
    for classes in (0, 10):
        torch.save(fastvit.create_model(MODEL, num_classes=classes).state_dict(), tmp_path / "w.pth")
        assert run("embed", folder, "-o", tmp_path / f"{classes}.npz", *weights(tmp_path / "w.pth")) == 0
