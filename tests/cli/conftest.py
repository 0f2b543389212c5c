"""Weights and images for the commands, and a way to interrupt them."""

import shutil

import pytest
import torch
from command_line import MODEL, PHOTOS

import fastvit


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.manual_seed(0)
    torch.save(fastvit.create_model(MODEL).state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three photographs, one of them in a folder of its own; a truncated one and a text beside them."""
    pytest.importorskip("PIL")
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(PHOTOS / "chelsea.jpg", folder)
    shutil.copy(PHOTOS / "rocket.jpg", folder)
    shutil.copy(PHOTOS / "coffee.jpg", folder / "sub")
    return folder


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(n, error=KeyboardInterrupt): let `embed` and `classify` do n batches from now on, and then be stopped;
    all of them for None."""
    from fastvit import images

    right = images.read_batches

    def stop(batches, error=KeyboardInterrupt):
        def stopped(*arguments):
            for i, batch in enumerate(right(*arguments)):
                if i == batches:
                    raise error
                yield batch

        monkeypatch.setattr(images, "read_batches", right if batches is None else stopped)

    return stop
