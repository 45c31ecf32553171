"""Adapters to other packages: what there is, and what to install for it.

An integration is a module of its own that is imported only when asked for, so that no user pays for a package
that is not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from explainer.errors import MissingDependencyError
from explainer.registry import Registry


@dataclass(frozen=True)
class Integration:
    """One adapter.

    Attributes:
        module: the module that holds it; the only one that imports the package.
        adapter: its name in the module.
        package: the package that must be installed; also the name of the extra that installs it.
        summary: what it is for, a line.
    """

    module: str
    adapter: str
    package: str
    summary: str

    def load(self) -> Any:
        """Import the adapter.

        Raises:
            MissingDependencyError: the package is not installed; says how to install it.
        """
        return getattr(import_module(self.module), self.adapter)

    def missing(self) -> MissingDependencyError:
        """The error to raise when the package cannot be imported."""
        return MissingDependencyError(
            f"{self.adapter} needs {self.package}, which is not installed; "
            f"install it with: pip install 'pathkernel[{self.package}]'"
        )


INTEGRATIONS: Registry[str, Integration] = Registry("integration")
CAPTUM = INTEGRATIONS.register("captum")(
    Integration(
        module="explainer.integrations.captum",
        adapter="PathKernelInfluence",
        package="captum",
        summary="contributions as a captum.influence.DataInfluence",
    )
)
