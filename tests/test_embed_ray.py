"""`fastvit embed --engine ray`: the rows of the one-machine form, each once, whatever is killed."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import MODEL, ROOT, add_bad_files, one_line, read_npz, run

import fastvit
from fastvit.commands import embed_ray

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
Image = pytest.importorskip("PIL.Image")
pa = pytest.importorskip("pyarrow")

import pyarrow.dataset  # noqa: E402
import pyarrow.parquet  # noqa: E402

UNIT = 4


@pytest.fixture(scope="module")
def cluster():
    """A Ray of the tests' own, and the folder that all its processes have in their environment."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
        yield folder
        ray.shutdown()


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(embed_ray, "UNIT", UNIT)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.manual_seed(0)
    torch.save(fastvit.create_model(MODEL, num_classes=0).state_dict(), path)
    return ["--device", "cpu", "--model", MODEL, "--checkpoint", path, "--batch-size", UNIT]


@pytest.fixture
def folder(tmp_path):
    """42 images, two of them in a folder of their own, and two that are none."""
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for i in range(42):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("sub" if i >= 40 else "") / f"{i:02}.png")
    add_bad_files(folder)
    return folder


def tables(output: Path) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """ids, features and the reasons of bad images, in the order of the files' names."""
    table = pyarrow.dataset.dataset(output / "features").to_table()
    assert table.schema.names == ["id", "features"] and table.schema.types[0] == pa.string()
    assert table.schema.types[1] == pa.list_(pa.float32(), 192)
    bad = pyarrow.dataset.dataset(output / "bad", format="parquet").to_table().to_pylist()
    return (
        table["id"].to_pylist(),
        np.stack(table["features"].to_numpy()),
        {row["id"]: row["reason"] for row in bad},
    )


def begun(output: Path) -> list[Path]:
    return list(output.glob("features/.*.parquet.*"))


def finished(output: Path) -> list[Path]:
    return sorted(output.glob("features/*-*.parquet"))


def actors_of(folder: str) -> list[int]:
    """The process ids of the actors of the Ray that has this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::MapWorker") and f"RAY_TMPDIR={folder}\0".encode() in environment:
            found.append(int(process.name))
    return found


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)
    return found


def test_a_folder_with_actors_killed_meanwhile(cluster, weights, folder, tmp_path, capsys):
    one, output = tmp_path / "one.npz", tmp_path / "out"
    assert run("embed", folder, "-o", one, *weights) == 1
    names, rows = read_npz(one)
    killed = []

    def kill():
        until(lambda: finished(output) and begun(output))
        for actor in actors_of(cluster):
            os.kill(actor, signal.SIGKILL)
            killed.append(actor)
        killed.append(begun(output))

    killer = threading.Thread(target=kill)
    killer.start()
    arguments = [folder, "-o", output, "--engine", "ray", "--actors", "2", *weights]
    capsys.readouterr()
    assert run("embed", *arguments) == 1
    killer.join()
    assert capsys.readouterr().out == f"42 images, 2 skipped: {output}\n"
    assert len(killed) == 3 and killed[-1]  # both actors, one or both of them at a unit
    ids, features, bad = tables(output)
    assert ids == names and len(set(ids)) == 42
    np.testing.assert_allclose(features, rows, rtol=1e-5, atol=1e-5)
    assert bad.keys() == {"half.jpg", "text.jpg"} and bad["text.jpg"] == "not an image"
    assert len(finished(output)) == 11 and not begun(output)

    # What is done is not done again, and not without being asked by another model.
    before = {path: path.stat().st_mtime_ns for path in finished(output)}
    assert run("embed", *arguments) == 1
    assert "Resuming: 11 of 11 files are there." in capsys.readouterr().err
    for other, said in ((["--dtype", "bf16"], "dtype float32 (now bfloat16)"), (["--img-size", 32], "img_size 224")):
        assert run("embed", *arguments, *other) == 2
        error = one_line(capsys)
        assert f"{output} was made with {said}" in error and error.endswith("; --no-resume starts anew\n")
    assert {path: path.stat().st_mtime_ns for path in finished(output)} == before


def command(arguments: list, ray_folder: str, **how) -> subprocess.Popen:
    """A run in a process of its own, with a Ray of its own in this folder, in units as small as the tests'."""
    code = f"import sys; from fastvit import cli; from fastvit.commands import embed_ray; embed_ray.UNIT = {UNIT}; "
    code += "sys.exit(cli.main(sys.argv[1:]))"
    environment = {**os.environ, "RAY_TMPDIR": ray_folder}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, env=environment, **how)


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["the process", "all, as a terminal does"])
def test_ctrl_c_ends_a_run_with_its_processes(send, weights, folder, tmp_path):
    output = tmp_path / "out"
    arguments = ["embed", folder, "-o", output, "--engine", "ray", *weights]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temporary:
        with command(arguments, temporary, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            until(lambda: finished(output) and begun(output))
            send(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 130 and said.endswith("fastvit embed: error: interrupted\n"), said
        assert "Traceback" not in said
        until(lambda: not actors_of(temporary))
    assert 1 <= len(finished(output)) < 11


@pytest.mark.slow
def test_a_killed_run_goes_on(cluster, weights, folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["embed", folder, "-o", output, "--engine", "ray", *weights]
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as temporary:
        with command(arguments, temporary) as process:
            until(lambda: len(finished(output)) >= 2 and begun(output))
            process.kill()
            for actor in actors_of(temporary):  # which else do some more before they hear of it
                os.kill(actor, signal.SIGKILL)
        until(lambda: not actors_of(temporary))
        before = {path: path.stat().st_mtime_ns for path in finished(output)}
        assert 2 <= len(before) < 11
    (folder / "39.png").unlink()  # and its unit changes, which was not done
    (folder / "38.png").write_bytes((folder / "00.png").read_bytes())
    assert run(*arguments) == 1
    printed = capsys.readouterr()
    assert f"Resuming: {len(before)} of 11 files are there." in printed.err
    assert printed.out == f"41 images, 2 skipped: {output}\n"
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    run("embed", folder, "-o", tmp_path / "one.npz", *weights)
    names, rows = read_npz(tmp_path / "one.npz")
    ids, features, _ = tables(output)
    assert ids == names
    np.testing.assert_allclose(features, rows, rtol=1e-5, atol=1e-5)

    # What has changed since is made anew, and nothing else.
    (folder / "00.png").write_bytes((folder / "01.png").read_bytes())
    assert run(*arguments) == 1
    assert "Removed 1 files" in capsys.readouterr().err
    ids, features, _ = tables(output)
    assert ids == names and np.array_equal(features[0], features[1])


@pytest.mark.slow
def test_parquet_and_webdataset(cluster, weights, folder, tmp_path, capsys):
    run("embed", folder, "-o", tmp_path / "one.npz", *weights)
    names, rows = read_npz(tmp_path / "one.npz")
    expected = dict(zip(names, rows, strict=True))
    files = [folder / name for name in names]
    data = [file.read_bytes() for file in files]

    (tmp_path / "tars" / "more").mkdir(parents=True)
    for shard, part in (("a.tar", slice(0, 20)), ("more/b.tar", slice(20, 42))):
        with tarfile.open(tmp_path / "tars" / shard, "w") as tar:
            for file, content in zip(files[part], data[part], strict=True):
                for ending, text in (("cls", b"1"), ("png", content)):
                    info = tarfile.TarInfo(f"{file.stem}.{ending}")
                    info.size = len(text)
                    tar.addfile(info, io.BytesIO(text))
            for name in ("00.left.PNG", "x.nef"):  # of a sample that has another, and of a kind that is not read
                info = tarfile.TarInfo(name)
                info.size = len(data[0])
                tar.addfile(info, io.BytesIO(data[0]))
                if name == "00.left.PNG":
                    info.name = "00.right.PNG"
                    tar.addfile(info, io.BytesIO(data[0]))
    (tmp_path / "tars" / "broken.tar").write_bytes((tmp_path / "tars" / "a.tar").read_bytes()[:12000])
    assert run("embed", tmp_path / "tars", "-o", tmp_path / "of_tars", "--engine", "ray", *weights) == 1
    ids, features, bad = tables(tmp_path / "of_tars")
    whole = {id: row for id, row in zip(ids, features, strict=True) if not id.startswith("broken.tar")}
    wanted = {f"a.tar:{Path(name).stem}": expected[name] for name in names[:20]}
    wanted |= {f"more/b.tar:{Path(name).stem}": expected[name] for name in names[20:]}
    wanted |= {f"{shard}:00{more}": rows[0] for shard in ("more/b.tar", "a.tar") for more in ("", ".right.PNG")}
    assert sorted(id for id in ids if not id.startswith("broken.tar")) == sorted([*wanted, "a.tar:00"])
    for id, row in wanted.items():
        np.testing.assert_allclose(whole[id], row, rtol=1e-5, atol=1e-5)
    assert bad.keys() == {"a.tar:x", "more/b.tar:x", "broken.tar"}
    assert "broken.tar:00" in ids

    folder_of = tmp_path / "parquet"
    folder_of.mkdir()
    plain = pa.table({"image": pa.array([*data[:20], None, b"no image"], pa.binary())})
    pyarrow.parquet.write_table(plain, folder_of / "a.parquet", row_group_size=3)
    struct = [{"bytes": content, "path": "x.png"} for content in data[20:]]
    named = pa.table({"id": list(range(20, 42)), "image": struct, "label": [0] * 22})
    pyarrow.parquet.write_table(named, folder_of / "b.parquet")
    (folder_of / "c.parquet").write_bytes(b"no Parquet")
    assert run("embed", folder_of, "-o", tmp_path / "of_parquet", "--engine", "ray", *weights) == 1
    assert f"skipped {folder_of / 'c.parquet'}: " in capsys.readouterr().err
    ids, features, bad = tables(tmp_path / "of_parquet")
    assert ids == [*(f"a.parquet:{i}" for i in range(20)), *(str(i) for i in range(20, 42))]
    np.testing.assert_allclose(features, rows, rtol=1e-5, atol=1e-5)
    assert {*bad} == {"", "a.parquet:20", "a.parquet:21"} and bad["a.parquet:21"] == "not an image"


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, said", [(".*.parquet.*", "4 processes died at unit 0000"), (".model.*", "4 processes died while they built")]
)
def test_what_every_process_dies_of_ends_the_run(file, said, cluster, weights, folder, tmp_path, capsys):
    """And what an actor raises is told in one line."""
    output = tmp_path / "out"
    arguments = ["embed", folder, "-o", output, "--engine", "ray", *weights]
    stop = threading.Event()

    def kill():
        seen = 0
        while not stop.is_set():
            found = len(list((output / "features").glob(file)))
            if found > seen:
                seen = found
                for actor in actors_of(cluster):
                    os.kill(actor, signal.SIGKILL)
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert run(*arguments) == 1
    finally:
        stop.set()
        killer.join()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastvit embed: error: ") and said in last


def test_wrong_requests(weights, folder, tmp_path, capsys, monkeypatch):
    def refused(*arguments) -> str:
        assert run("embed", *arguments, *weights) == 2
        return one_line(capsys)

    for name in ("x.parquet", "x.tar"):
        assert "need --engine ray" in refused(tmp_path / name, "-o", tmp_path / "out")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "x.tar").write_bytes(b"")
    assert "its Parquet and .tar files need --engine ray" in refused(tmp_path / "shards", "-o", tmp_path / "x.npz")
    assert "--actors needs --engine ray" in refused(folder, "-o", tmp_path / "x.npz", "--actors", "2")
    ray = ["--engine", "ray", "-o"]
    assert "is inside of" in refused(folder, *ray, folder / "out")
    assert "expected a new folder" in refused(folder, *ray, tmp_path / "shards")
    (tmp_path / "empty").mkdir()
    assert "no images in" in refused(tmp_path / "empty", *ray, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    pyarrow.parquet.write_table(pa.table({"picture": [b""]}), tmp_path / "x.parquet")
    assert "no column 'image', but picture" in refused(tmp_path / "x.parquet", *ray, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "about.json").read_text())["folder"] == str(tmp_path / "x.parquet")
    monkeypatch.setattr(embed_ray.importlib.util, "find_spec", lambda _: None)
    assert "pip install 'fastvit[ray]'" in refused(folder, *ray, tmp_path / "out")
    code = "import sys, fastvit.cli, fastvit.commands.embed_ray; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
