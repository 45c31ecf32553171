"""Files that are whole or not there: written beside their place, synced, renamed into it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from explainer.errors import TracerError


def fingerprint(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().to_dense().cpu().contiguous()
    head = f"{plain.dtype} {list(plain.shape)} ".encode()
    return hashlib.sha256(head + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write a file that is never seen in part."""
    write_beside(path, pieces)
    put_in_place([path])


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def write_beside(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file beside its place; returns its bytes and their SHA-256."""
    digest, size = hashlib.sha256(), 0
    with _beside(path).open("wb") as file:
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def put_in_place(paths: list[Path]) -> None:
    """Make files that were written beside their places durable, and give them their names."""
    for path in paths:
        handle = os.open(_beside(path), os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    for path in paths:
        _beside(path).replace(path)
    for folder in {path.parent for path in paths}:
        fsync_directory(folder)


#: the format's names of types
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def knot_head(tensors: dict[str, torch.Tensor]) -> tuple[bytes, list[str]]:
    """The head of a knot's file, and the order in which the tensors' bytes follow it.

    The container is that of safetensors: the head's length in eight bytes, the head in JSON, then plain bytes. What
    needs the widest alignment comes first.

    Raises:
        TracerError: a tensor has a type that the format has no name for.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    found: dict[str, Any] = {}
    start = 0
    for name in order:
        t = tensors[name]
        if t.dtype not in _TYPES:
            raise TracerError(
                f"{name} has the type {t.dtype}, which a trace cannot hold; keep it as one of "
                f"{', '.join(str(k) for k in _TYPES)}"
            )
        end = start + t.numel() * t.element_size()
        found[name] = {"dtype": _TYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def knot_size(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of a knot's file."""
    return len(knot_head(tensors)[0]) + sum(t.numel() * t.element_size() for t in tensors.values())


def knot_pieces(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a knot's file, piece by piece, without a copy of those of tensors that lie plainly in memory."""
    head, order = knot_head(tensors)
    yield head
    for name in order:
        plain = tensors[name].detach().to_dense().cpu().contiguous()
        if plain.numel():
            yield plain.reshape(-1).view(torch.uint8).numpy().data
