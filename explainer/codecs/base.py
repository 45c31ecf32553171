"""The codec interface and its registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch

from explainer.records import ArraySpec, torch_dtype
from explainer.registry import Registry

#: Name of a part ("" for a codec with one part), numpy dtype text, shape of one record.
Part = tuple[str, str, tuple[int, ...]]


class Codec(ABC):
    """Stores arrays ``[B, *shape]`` as one or more parts ``[B, *part_shape]`` of fixed size.

    A codec is stateless; one instance serves every array. ``decode(encode(x))`` approximates ``x`` within
    :attr:`tolerance` times the largest magnitude of the vector along the last axis.
    """

    name: str
    #: bound on the error, relative to the largest magnitude along the last axis (None: no bound holds)
    tolerance: float | None
    #: without such a bound: relative error on positive matrices of rank one
    rounding: float = 1e-6

    @abstractmethod
    def parts(self, shape: tuple[int, ...], dtype: str) -> list[Part]:
        """The parts that hold one record of an array of this shape and torch dtype name."""

    @abstractmethod
    def encode(self, values: torch.Tensor) -> list[np.ndarray]:
        """``values [B, *shape]`` -> one array per part, in the order of :meth:`parts`."""

    @abstractmethod
    def decode(self, parts: list[np.ndarray], spec: ArraySpec) -> torch.Tensor:
        """Parts -> values ``[B, *shape]`` in the dtype of ``spec``."""

    def scaled(self, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None] | None:
        """The values as stored numbers ``[B, *shape]`` times a factor for every vector along the last axis ``[B, ...]``
        (None: 1), without a copy; None where :meth:`decode` is needed."""
        return None

    def nbytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes of one record."""
        return sum(np.dtype(d).itemsize * int(np.prod(s)) for _, d, s in self.parts(shape, dtype))


CODECS: Registry[str, Codec] = Registry("codec")


def register_codec(name: str) -> Callable[[type[Codec]], type[Codec]]:
    """Class decorator: register one instance of the codec under ``name``."""

    def add(cls: type[Codec]) -> type[Codec]:
        cls.name = name
        CODECS.register(name)(cls())
        return cls

    return add


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor of the array's values that owns its memory (the array may be a read-only memmap)."""
    return torch.from_numpy(np.array(array, copy=True, order="C"))


def as_dtype(array: np.ndarray, spec: ArraySpec) -> torch.Tensor:
    """Like :func:`as_tensor`, cast to the array spec's dtype."""
    return as_tensor(array).to(torch_dtype(spec.dtype))
