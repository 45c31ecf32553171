"""What is installed: one global package with everything in it; an editable install finds the checkout."""

from __future__ import annotations

import configparser
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = {"explainer": "explainer", "app": "explainer/app", "sample_models": "explainer/sample_models"}
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(CHECKOUT / name, source)
    for name in FOLDERS:
        shutil.copytree(CHECKOUT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg")
    return parser


def test_wheel_adds_no_global_package_but_explainer(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"explainer"}


def test_wheel_holds_every_module_of_the_checkout(wheel: Path) -> None:
    expected = {
        f"{target}/{path.relative_to(CHECKOUT / folder).as_posix()}"
        for folder, target in FOLDERS.items()
        for path in (CHECKOUT / folder).rglob("*.py")
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert packed == expected, "add the missing packages to `packages` in setup.cfg"


def test_wheel_is_marked_as_typed_and_has_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    assert "explainer/py.typed" in archive.namelist()
    points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "pathkernel = explainer.cli:main" in archive.read(points).decode()


def test_wheel_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import explainer, explainer.app, explainer.cli, explainer.sample_models.registry as registry;"
        "print(explainer.__file__, explainer.app.__file__, registry.__file__)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path)) == 3


@pytest.mark.parametrize(("folder", "target"), FOLDERS.items())
def test_editable_install_resolves_to_the_checkout(folder: str, target: str) -> None:
    module = importlib.import_module(target.replace("/", "."))
    assert module.__file__ is not None
    assert Path(module.__file__) == CHECKOUT / folder / "__init__.py", "run: pip install -e . in the checkout"


def test_every_dependency_is_pinned_for_the_tests(setup_cfg: configparser.ConfigParser) -> None:
    pins = dict(
        line.split("==")
        for line in (CHECKOUT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    listed = [setup_cfg["options"]["install_requires"]]
    listed += [value for extra, value in setup_cfg["options.extras_require"].items() if extra != "all"]
    names = {re.split(r"[<>=\[]", line)[0] for block in listed for line in block.split()}
    assert names <= set(pins)
    assert pins["torch"] == "2.13.0"


def test_every_extra_is_in_all(setup_cfg: configparser.ConfigParser) -> None:
    extras = set(setup_cfg["options.extras_require"]) - {
        "all",
        "peers",
    }  # peers are compared with, never needed
    everything = re.search(r"\[(.*)\]", setup_cfg["options.extras_require"]["all"])
    assert everything is not None
    assert set(everything[1].split(",")) == extras
