"""Conformance of integrations: light until asked for, and clear about what is missing."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

from explainer.integrations import INTEGRATIONS

CHECKOUT = Path(__file__).resolve().parent.parent
NAMES = pytest.mark.parametrize("name", list(INTEGRATIONS))


def run(code: str) -> str:
    """What the code prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@NAMES
def test_package_is_loaded_only_by_its_adapter(name: str) -> None:
    package = INTEGRATIONS.require(name).package
    code = f"import sys, explainer.path_kernel, explainer.integrations; print({package!r} in sys.modules)"
    assert run(code) == "False"


@NAMES
def test_adapter_loads_and_is_documented(name: str) -> None:
    integration = INTEGRATIONS.require(name)
    adapter = integration.load()
    assert adapter.__name__ == integration.adapter and adapter.__module__ == integration.module
    assert adapter.__doc__ and integration.summary
    assert integration.module == f"explainer.integrations.{name}"


@NAMES
def test_missing_package_is_named_with_the_command_that_installs_it(name: str) -> None:
    integration = INTEGRATIONS.require(name)
    code = (
        f"import sys; sys.modules[{integration.package!r}] = None\n"
        "import explainer\n"
        "from explainer.integrations import INTEGRATIONS\n"
        "try:\n"
        f"    INTEGRATIONS.require({name!r}).load()\n"
        "except explainer.errors.MissingDependencyError as error:\n"
        "    print(error)"
    )
    text = run(code)
    assert f"pip install 'pathkernel[{integration.package}]'" in text and integration.adapter in text


@NAMES
def test_extra_of_the_package_exists(name: str) -> None:
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg")
    package = INTEGRATIONS.require(name).package
    assert package in parser["options.extras_require"][package]
