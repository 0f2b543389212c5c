"""What commands write: whole files or none."""

import json
import os
import stat

import pytest


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    from fastvit import report

    path = tmp_path / "results.json"
    report.write_json(path, {"old": 1})
    with pytest.raises(ValueError):
        report.write_json(path, {"new": float("nan")})

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        report.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_results_have_the_permissions_of_the_umask(tmp_path):
    from fastvit import report

    before = os.umask(0o022)
    try:
        report.write_json(tmp_path / "x.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == 0o644
