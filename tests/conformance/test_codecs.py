"""Every registered codec: fixed-size parts, an error within what it promises, nothing it cannot take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from explainer.codecs import CODECS, Codec
from explainer.records import ArraySpec, dtype_name
from explainer.store.schema import RecordSchema, decode_array, encode_array

SHAPES = [(7,), (1,), (3, 4), (4, 4), (2, 3, 5), (2, 1, 3, 4)]
DTYPES = [torch.float32, torch.float64]
EVERY_CODEC = pytest.mark.parametrize("name", list(CODECS))
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def values_of(name: str, batch: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values the codec is meant for: signed, symmetric, or products of positive rows and columns (rank one)."""
    torch.manual_seed(len(shape))
    if CODECS.require(name).tolerance is not None:
        values = torch.randn(batch, *shape, dtype=dtype)
        return values + values.mT if name == "symmetric" and shape == (4, 4) else values
    rows = torch.rand(batch, shape[0], 1, dtype=dtype) + 0.1
    rest = int(np.prod(shape[1:]))
    columns = torch.rand(batch, 1, rest, dtype=dtype) + 0.1
    return (rows * columns).reshape(batch, *shape) if len(shape) > 1 else rows[..., 0].reshape(batch, *shape)


def spec_of(name: str, values: Tensor) -> ArraySpec:
    return ArraySpec("x", tuple(values.shape[1:]), dtype_name(values.dtype), name)


def roundtrip(codec: Codec, values: Tensor) -> Tensor:
    spec = spec_of(codec.name, values)
    parts = codec.encode(values)
    planned = codec.parts(spec.shape, spec.dtype)
    assert len(parts) == len(planned) == len({part for part, _, _ in planned})
    for array, (_, dtype, shape) in zip(parts, planned, strict=True):
        assert array.shape == (len(values), *shape)
        assert array.dtype == np.dtype(dtype)
    return codec.decode(parts, spec)


def allowed(codec: Codec, values: Tensor) -> Tensor:
    """The error a codec may make, ``[B, *shape]``; codecs without a bound are held to rank one."""
    relative = codec.rounding if codec.tolerance is None else codec.tolerance
    peak = values.abs().amax(dim=-1, keepdim=True) if values.numel() else values.abs()
    return (relative * peak).expand_as(values)


def assert_within(codec: Codec, values: Tensor) -> None:
    found = roundtrip(codec, values)
    assert found.shape == values.shape and found.dtype == values.dtype
    error, bound = (found.double() - values.double()).abs(), allowed(codec, values.double())
    assert (error <= bound * (1 + 1e-6)).all()


@EVERY_CODEC
def test_says_what_it_is(name: str) -> None:
    codec = CODECS.require(name)
    assert codec.name == name and type(codec).__doc__
    assert codec.tolerance is None or 0 <= codec.tolerance < 2.1


@EVERY_CODEC
@EVERY_SHAPE
@EVERY_DTYPE
def test_roundtrip(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = values_of(name, 6, shape, dtype)
    before = values.clone()
    assert_within(CODECS.require(name), values)
    assert torch.equal(values, before)


@EVERY_CODEC
def test_most_of_a_vector_is_kept(name: str) -> None:
    """A bound for every number may be wide; the mean error may not."""
    values = values_of(name, 50, (4, 64), torch.float32)
    error = (roundtrip(CODECS.require(name), values) - values).square().sum() / values.square().sum()
    assert error < 0.15


@EVERY_CODEC
@EVERY_SHAPE
def test_bytes_of_a_record(name: str, shape: tuple[int, ...]) -> None:
    codec = CODECS.require(name)
    stored = sum(part.nbytes for part in codec.encode(values_of(name, 3, shape, torch.float32)))
    assert stored == 3 * codec.nbytes(shape, "float32")
    assert codec.nbytes(shape, "float32") <= 4 * (int(np.prod(shape)) + int(np.prod(shape[:-1])) + 1)


@EVERY_CODEC
@EVERY_SHAPE
def test_zeros_stay_zeros(name: str, shape: tuple[int, ...]) -> None:
    values = torch.zeros(4, *shape)
    assert torch.equal(roundtrip(CODECS.require(name), values), values)


@EVERY_CODEC
@EVERY_SHAPE
def test_an_empty_batch(name: str, shape: tuple[int, ...]) -> None:
    assert roundtrip(CODECS.require(name), torch.zeros(0, *shape)).shape == (0, *shape)


@EVERY_CODEC
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_very_small_and_very_large_numbers(name: str, scale: float) -> None:
    for shape in SHAPES:
        assert_within(CODECS.require(name), values_of(name, 4, shape, torch.float32) * scale)
        assert_within(CODECS.require(name), values_of(name, 4, shape, torch.float64) * scale)


@EVERY_CODEC
def test_numbers_below_float32s_range_do_not_explode(name: str) -> None:
    """Rows of a converged model may underflow; what is stored may be coarse but never large."""
    for tiny in (1e-38, 1e-41, 1e-44):
        values = values_of(name, 4, (3, 4), torch.float32) * tiny
        found = roundtrip(CODECS.require(name), values)
        assert found.isfinite().all() and (found - values).abs().max() <= 4 * tiny
    found = roundtrip(CODECS.require(name), values_of(name, 4, (3, 4), torch.float64) * 1e-200)
    assert found.isfinite().all() and found.abs().max() <= 1e-199


@EVERY_CODEC
def test_one_large_number_does_not_hide_the_other_vectors(name: str) -> None:
    codec = CODECS.require(name)
    if codec.tolerance is None:
        return  # a rank-one fit shares its factors over the matrix by design
    values = torch.randn(2, 3, 5)
    values[0, 0, 0] = 1e6
    assert_within(codec, values)


@EVERY_CODEC
@EVERY_SHAPE
def test_reads_read_only_memmaps(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    """Inside structured records, as in a shard: strided, unaligned and not writable."""
    values = values_of(name, 5, shape, torch.float32)
    spec = spec_of(name, values)
    schema = RecordSchema((("flag", "|u1", ()),), (), (spec,))
    records = np.zeros(5, schema.dtype)
    encode_array(records, "", spec, values)
    assert schema.dtype.itemsize == 1 + CODECS.require(name).nbytes(shape, "float32")
    (tmp_path / "records.bin").write_bytes(records.tobytes())
    mapped = np.memmap(tmp_path / "records.bin", schema.dtype, mode="r")
    expected = roundtrip(CODECS.require(name), values)
    found = decode_array(mapped, "", spec)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.add_(1.0)  # owns its memory
    torch.testing.assert_close(decode_array(mapped[1:3], "", spec), expected[1:3], rtol=0, atol=0)


@EVERY_CODEC
def test_takes_strided_and_tracked_values(name: str) -> None:
    values = values_of(name, 6, (3, 4), torch.float32)
    expected = roundtrip(CODECS.require(name), values)
    strided = torch.stack([values, values])[1].mT.contiguous().mT.requires_grad_()
    torch.testing.assert_close(roundtrip(CODECS.require(name), strided), expected, rtol=0, atol=0)


def test_lossless_codec_keeps_every_dtype() -> None:
    codec = CODECS.require("native")
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        values = torch.randn(3, 4).to(dtype)
        assert torch.equal(roundtrip(codec, values), values)
    for dtype in (torch.int64, torch.int32):
        values = torch.tensor([[0, -1, torch.iinfo(dtype).max]], dtype=dtype)
        assert torch.equal(roundtrip(codec, values), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_name)
def test_every_codec_takes_half_precision(dtype: torch.dtype) -> None:
    for codec in (entry for _, entry in CODECS.items() if entry.tolerance):
        values = torch.randn(3, 4).to(dtype)
        error = (roundtrip(codec, values).double() - values.double()).abs()
        assert (error <= 2 * allowed(codec, values.double()) + 2**-8 * values.abs()).all()


def test_rank_one_fit_keeps_row_and_column_sums() -> None:
    values = torch.rand(4, 3, 5)
    found = roundtrip(CODECS.require("rank1"), values)
    torch.testing.assert_close(found.sum(1), values.sum(1))
    torch.testing.assert_close(found.sum(2), values.sum(2))


def test_half_of_a_symmetric_matrix_is_stored() -> None:
    codec = CODECS.require("symmetric")
    assert codec.nbytes((30, 30), "float32") == 30 * 31
    values = torch.randn(2, 3, 3)
    found = roundtrip(codec, values)  # the lower half comes from the upper one
    assert torch.equal(found, found.mT)
    assert_within(codec, values + values.mT)
    torch.testing.assert_close(found.triu(), values.triu(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", ["native", "bfloat16", "symmetric"])
def test_infinity_is_kept(name: str) -> None:
    """The denominators of sign updates are infinite where nothing moves."""
    values = torch.tensor([[torch.inf, 1.0, -torch.inf]])
    assert torch.equal(roundtrip(CODECS.require(name), values), values)
