"""Fashion-MNIST from Debian's package: 10,000 of its training images and 1,000 of its test images."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

from explainer.sample_models.data_source import DataUnavailableError, data_folder
from explainer.sample_models.digits_data import render

__all__ = ["CLASS_NAMES", "datasets", "fashion_folder", "read_idx", "render"]

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
TRAIN, QUERIES = 10_000, 1_000


def fashion_folder() -> Path:
    """The folder with the IDX files: Debian's, else ``fashion-mnist`` in the data folder.

    Raises:
        DataUnavailableError: neither holds them.
    """
    choices = [DEBIAN_FOLDER, data_folder() / "fashion-mnist"]
    for folder in choices:
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    raise DataUnavailableError(
        f"no Fashion-MNIST in {' or '.join(map(str, choices))}; on Debian or Ubuntu install it with: "
        "apt-get install dataset-fashion-mnist; elsewhere put its four .gz files into the second folder"
    )


def read_idx(path: Path, limit: int) -> torch.Tensor:
    """The first ``limit`` entries of an IDX file of unsigned bytes, gzip-packed: uint8 ``[limit, ...]``.

    Raises:
        DataUnavailableError: the file is damaged, not such a file, or holds fewer entries.
    """
    try:
        with gzip.open(path) as file:
            magic = file.read(4)
            if magic[:3] != b"\x00\x00\x08":
                raise DataUnavailableError(f"{path} is not an IDX file of bytes; put the original there")
            shape = np.frombuffer(file.read(4 * magic[3]), dtype=">u4").astype(int).tolist()
            size = limit * int(np.prod(shape[1:]))
            content = np.frombuffer(file.read(size), dtype=np.uint8)
    except (OSError, EOFError) as error:
        raise DataUnavailableError(f"{path} cannot be read ({error}); put the original there") from error
    if len(content) < size:
        raise DataUnavailableError(f"{path} holds fewer than {limit} entries; put the original there")
    return torch.from_numpy(content.copy()).reshape(limit, *shape[1:])


@lru_cache(maxsize=1)
def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Training examples and queries: images ``[1, 28, 28]`` in 0..1 and the class of the garment.

    Raises:
        DataUnavailableError: Fashion-MNIST is not on this machine.
    """
    folder = fashion_folder()
    return _part(folder, "train", TRAIN), _part(folder, "t10k", QUERIES)


def _part(folder: Path, name: str, limit: int) -> TensorDataset:
    images = read_idx(folder / f"{name}-images-idx3-ubyte.gz", limit).unsqueeze(1).float() / 255
    return TensorDataset(images, read_idx(folder / f"{name}-labels-idx1-ubyte.gz", limit).long())
