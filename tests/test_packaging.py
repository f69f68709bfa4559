"""The wheel holds all that a run reads, and works from a folder that holds nothing, or traps."""

from __future__ import annotations

import fnmatch
import os
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT

PACKAGES = ("rlhf", "stages", "reward_models", "conf")


def shipped() -> list[Path]:
    """Every file of the four packages, relative to the root, without what Python caches."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    return sorted(path.relative_to(ROOT) for path in files if "__pycache__" not in path.parts)


def pyproject() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_data_file_is_matched_by_a_glob_of_pyproject() -> None:
    globs = pyproject()["tool"]["setuptools"]["package-data"]["*"]
    data = [path for path in shipped() if path.suffix != ".py"]
    assert {path.suffix for path in data} >= {".yaml", ".txt", ".jsonl"}
    assert [str(path) for path in data if not any(fnmatch.fnmatch(path.name, glob) for glob in globs)] == []


def test_every_folder_with_files_belongs_to_a_package_that_is_found() -> None:
    """A folder below a package is found as a package (a namespace if it has no `__init__.py`): its name must fit."""
    setuptools = pytest.importorskip("setuptools")

    include = pyproject()["tool"]["setuptools"]["packages"]["find"]["include"]
    found = set(setuptools.find_namespace_packages(str(ROOT), include=include))
    needed = {".".join(path.parent.parts) for path in shipped()}
    assert needed <= found
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").is_file()


def test_a_folder_of_python_files_is_a_regular_package() -> None:
    folders = {path.parent for path in shipped() if path.suffix == ".py"}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, built from a copy so that no build folder is left in it."""
    pytest.importorskip("setuptools", minversion="77", reason="pyproject.toml needs it, and nothing is downloaded")
    source, out = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for package in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    pip(["wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)])
    (made,) = out.glob("*.whl")
    return made


def pip(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [str(path) for path in shipped() if path.as_posix() not in names] == []
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "rlhf = rlhf.__main__:main" in zipfile.ZipFile(wheel).read(entry).decode()


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked by pip into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    pip(["install", "--no-deps", "--target", str(target), str(wheel)])
    return target


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and with what it depends on from this one; not with what is editable here,
    since Python does not read the .pth files of a folder that a .pth file adds."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pip(["--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", str(wheel)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [["rlhf"], ["python", "-m", "rlhf"]], ids=" ".join)
def test_both_ways_to_start_it_work_in_the_wheels_environment(
    environment: Path, command: list[str], tmp_path: Path
) -> None:
    bare = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    options: Any = {"cwd": tmp_path, "env": bare, "capture_output": True, "text": True, "timeout": 120}
    program = [str(environment / "bin" / command[0]), *command[1:]]
    helped = subprocess.run([*program, "--help"], **options)
    assert helped.returncode == 0, helped.stderr
    assert "stage=" in helped.stdout and helped.stderr == ""
    refused = subprocess.run([*program, "ppo.updatez=3"], **options)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "did you mean ppo.updates?" in refused.stderr
    where = subprocess.run(
        [str(environment / "bin" / "python"), "-c", "import rlhf; print(rlhf.__file__)"], **options, check=True
    )
    assert Path(where.stdout.strip()).is_relative_to(environment)
    assert list(tmp_path.iterdir()) == []


def start(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_installed_wheel_composes_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = start(installed, tmp_path, "-c", "import rlhf, stages, conf; print(rlhf.__file__)")
    assert where.stdout.strip() == str(installed / "rlhf" / "__init__.py"), where.stderr
    done = start(installed, tmp_path, "-m", "rlhf", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "name: quickstart" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_folders_of_the_users_with_our_names_change_nothing(installed: Path, tmp_path: Path) -> None:
    for name in ("conf", "stages", "reward_models"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('the decoy {name} was imported')\n")
    (tmp_path / "conf" / "config.yaml").write_text("decoy: true\n")
    done = start(installed, tmp_path, "-m", "rlhf", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "decoy" not in done.stdout + done.stderr
    # `do=plan` starts the worker, which imports the stages' modules.
    planned = start(installed, tmp_path, "-m", "rlhf", "do=plan")
    assert planned.returncode == 0, planned.stderr
    assert "decoy" not in planned.stdout + planned.stderr
