"""The distribution a user installs: built sdist first, wheel from it, imported elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def run(*command: str, cwd: Path, **settings) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, **settings)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist of a copy of the checkout, links and all, offline."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.is_symlink():
            (source / path.name).symlink_to(path.readlink())
        elif path.name in ("mda_lightning", "tests", "docs", "benchmarks"):
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.is_file():
            shutil.copy(path, source)
    build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder))
    run(*build, "--sdist", str(source), cwd=folder)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(*build, "--wheel", str(unpacked), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def package_files() -> set[str]:
    """Everything in the package's folders, as named from the repository root."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mda_lightning").rglob("*")
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    }


def test_wheel_holds_the_package_whole_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == package_files()
    packages = {str(Path(name).parent) for name in inside if name.endswith("__init__.py")}
    expected = {
        f"mda_lightning/{part}"
        for part in ("callbacks", "datamodules", "recipes", "metrics", "corpora", "analysis")
    }
    assert expected <= packages and "mda_lightning/py.typed" in inside


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "mda_lightning").rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").exists()]


def test_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (folder,) = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" in n}
    metadata = archive.read(f"{folder}/METADATA").decode()
    version = re.search(
        r'__version__ = "(.+)"', (ROOT / "mda_lightning" / "__init__.py").read_text()
    )
    assert version and f"\nVersion: {version[1]}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    entry_points = archive.read(f"{folder}/entry_points.txt").decode()
    assert entry_points.split() == [
        "[console_scripts]",
        "mda-lightning",
        "=",
        "mda_lightning.cli:main",
    ]


def test_installed_wheel_imports_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Every module, from the wheel's own files, in a folder that knows nothing of the checkout."""
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", str(target), str(wheel), cwd=tmp_path)
    code = """
import importlib, pkgutil, sys
import mda_lightning
root = sys.argv[1]
names = [m.name for m in pkgutil.walk_packages(mda_lightning.__path__, "mda_lightning.")]
for name in names:
    if not name.endswith("__main__"):
        module = importlib.import_module(name)
        assert module.__file__.startswith(root), module.__file__
assert callable(importlib.import_module("mda_lightning.cli").main)
print("\\n".join(names))
"""
    environment = {"PYTHONPATH": str(target), "PATH": "", "OMP_NUM_THREADS": "1"}
    listed = run(sys.executable, "-P", "-c", code, str(target), cwd=tmp_path, env=environment)
    modules = {name for name in package_files() if name.endswith(".py")}
    dotted = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in modules
    }
    assert set(listed.split()) == dotted - {"mda_lightning"}


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    found = [Requirement(line) for line in project["dependencies"] + extras]
    return [requirement for requirement in found if requirement.name != "mda-lightning"]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_dependency_is_pinned_within_its_bounds(requirement: Requirement) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pin = pins.get(canonicalize_name(requirement.name))
    assert pin, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(Version(pin)), f"{requirement} against {pin}"


def test_constraints_name_versions_only() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line


def test_malicious_lightning_releases_are_out_of_bounds() -> None:
    (lightning,) = [r for r in requirements() if r.name == "lightning"]
    assert not [v for v in ("2.6.2", "2.6.3") if lightning.specifier.contains(v)]
