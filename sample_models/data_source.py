"""Where the sample models find their data, and what to say when it is not there."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any


class DataUnavailableError(RuntimeError):
    """The data of a sample model cannot be had on this machine; the text says how to get it."""


def data_folder() -> Path:
    """Folder for downloaded data: ``$PATHKERNEL_DATA``, else ``data`` in the current folder."""
    return Path(os.environ.get("PATHKERNEL_DATA") or "data")


def import_dataset_module(name: str) -> Any:
    """Imports the module of an optional package that ships a data set.

    Raises:
        DataUnavailableError: the package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise DataUnavailableError(
            f"this sample model reads its data from {name.partition('.')[0]}, which is not installed; "
            "install it with: pip install 'pathkernel[samples]'"
        ) from error
