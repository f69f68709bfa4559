"""What do=doctor says of this machine, and of one that lacks things."""

from __future__ import annotations

import resource
from importlib.metadata import version
from pathlib import Path

import pytest

from rlhf import doctor


def findings(run_dir: Path) -> dict[str, tuple[str, str]]:
    table, _ = doctor.examine(run_dir)
    columns = [list(column.cells) for column in table.columns]
    return {str(what): (str(state), str(seen)) for what, state, seen in zip(*columns, strict=True)}


def test_a_machine_that_lacks_things_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_packages", lambda: iter(()))
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor.torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor.torch.distributed, "is_backend_available", lambda name: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda what: (256, 512))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: type("", (), {"free": 2 * doctor.GIB})())
    seen = findings(tmp_path / "not" / "there")
    notes = {what for what, (state, _) in seen.items() if state == "note"}
    assert {"CUDA", "gloo", "DeepSpeed", "C++ compiler", "open files", "disk"} <= notes
    assert "nvidia-smi" in seen["CUDA"][1]
    assert "launch.gpus=1" in seen["gloo"][1]
    assert "pip install deepspeed" in seen["DeepSpeed"][1]
    assert "apt install g++" in seen["C++ compiler"][1]
    assert seen["open files"][1] == "256: `ulimit -n 4096` before a run"
    assert seen["disk"][1].startswith(f"2 GiB free at {tmp_path}: do=plan")


def test_no_limit_of_open_files_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, 0))
    assert list(doctor._limits()) == [("open files", "ok", "unlimited")]


def test_what_nothing_runs_without_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package that is not there and a folder that cannot be written; a version out of its range is a note."""
    wanted = ["rich>=1", "torch<1", "no-such-package>=2", "not-of-an-extra; extra == 'more'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: wanted)
    assert list(doctor._packages()) == [
        ("rich", "ok", f"{version('rich')} (tested range: >=1)"),
        ("torch", "note", f"{version('torch')} (tested range: <1)"),
        ("no-such-package", "missing", "pip install 'no-such-package>=2'"),
    ]
    monkeypatch.setattr(doctor, "_several_ranks", lambda: iter(()))
    monkeypatch.setattr(doctor.os, "access", lambda place, mode: False)
    _, missing = doctor.examine(tmp_path)
    assert missing == ["no-such-package", "run directory"]


def test_a_package_that_breaks_on_import_is_not_ok(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its import is tried in another process, so that it cannot take this one with it."""
    (tmp_path / "broken_package.py").write_text("raise ImportError('undefined symbol: _ZN3c10')", encoding="utf-8")
    (tmp_path / "good_package.py").write_text("__version__ = '1.2'; print('chatter')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    what, state, seen = doctor._imported("it", "broken_package", "absent", "build it again")
    assert (what, state) == ("it", "note")
    assert seen == "is installed but cannot be imported (ImportError: undefined symbol: _ZN3c10): build it again"
    assert doctor._imported("it", "good_package", "absent", "") == ("it", "ok", "1.2")
    assert doctor._imported("it", "no_such_package", "absent", "") == ("it", "note", "absent")
