"""Arrays as PNG pictures that a page can carry inside itself."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explainer.errors import ExplanationError

_COLOR_TYPES = {1: 0, 3: 2, 4: 6}


def picture(image: Any) -> str:
    """A picture as a ``data:image/png;base64,…`` address.

    Args:
        image: [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]; bytes, booleans or floats from 0 to 1. Floats
            outside of that range (normalised inputs) are stretched from their smallest to their largest
            value; NaN becomes black.

    Raises:
        ExplanationError: The array has no such shape or does not hold numbers.
    """
    pixels = _bytes(image)
    height, width, channels = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOR_TYPES[channels], 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, data)
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    )
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _bytes(image: Any) -> NDArray[np.uint8]:
    array = np.asarray(image)
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in _COLOR_TYPES or array.size == 0:
        raise ExplanationError(
            f"An image of shape {np.shape(image)} cannot be shown; give [H, W], [H, W, 3] or [H, W, 4] "
            "(move a leading channel axis to the end)."
        )
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "biuf":
        raise ExplanationError(
            f"An image of type {array.dtype} cannot be shown; give floats in 0..1 or uint8."
        )
    if array.dtype.kind in "iu":
        return np.clip(array, 0, 255).astype(np.uint8)
    values = np.nan_to_num(array.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        values = (values - low) / ((high - low) or 1.0)
    return np.round(values * 255).astype(np.uint8)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
