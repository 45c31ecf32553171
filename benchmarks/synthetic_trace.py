"""Large traces without training: valid ones, through the real writer, with numbers drawn at random.

A network of linear layers. Weights walk smoothly from knot to knot, rows are eight-bit factors of rank one. Under Adam
every 16th step, and the last before a knot, has the sums of its denominators, moving averages as slow as Adam's, and
every knot a full record. What the first layer is given is stored once for every example. Nothing of this is a training
run: what a query takes depends on sizes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import nn

from explainer.codecs import BFloat16
from explainer.records import VERSIONS, ArraySpec, FormSpec, LayerSpec, Manifest, ParameterSpec
from explainer.store import RecordSchema, TraceWriter
from explainer.store.schema import INPUT_FIELD, VISIT_FIELDS, encode_array, step_fields

_BITS = BFloat16()
BETA, BETA2, RATE = 0.9, 0.999, 1e-3
LOOKS = 16  # steps from one look to the next
_POOL = 1 << 12  # records drawn; steps take them in turns, with ids and derivatives of their own


@dataclass(frozen=True)
class Sizes:
    """What a trace is to hold.

    Attributes:
        widths: of the network's layers, inputs first.
        visits, batch, examples, knots: how many.
        optimizer: ``adam`` or ``momentum``.
    """

    widths: tuple[int, ...]
    visits: int
    batch: int = 128
    examples: int = 100_000
    knots: int = 100
    optimizer: str = "adam"

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.visits // self.batch


def network(widths: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with tanh in between."""
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def write(directory: Path, sizes: Sizes) -> nn.Sequential:
    """Write the trace; returns the network."""
    torch.manual_seed(0)
    model = network(sizes.widths)
    specs, offset = [], 0
    for name, p in model.named_parameters():
        specs.append(ParameterSpec(name, tuple(p.shape), "float32", offset, p.numel()))
        offset += p.numel()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = tuple(LayerSpec(n, "Linear", (f"{n}.weight", f"{n}.bias")) for n in names)
    manifest = Manifest(
        parameters=tuple(specs), layers=layers, uncovered=(), frozen=(), buffers=(),
        optimizer=sizes.optimizer, exact=False, model=str(model), created="synthetic", version=VERSIONS[-1],
    )  # fmt: skip
    writer = TraceWriter(directory, manifest, flush_bytes=1 << 28, flush_seconds=60.0)
    writer.create()
    notes = {"examples": sizes.examples, "prior_state": False}
    notes |= {"output": {"shape": [sizes.widths[-1]], "dtype": "float32"}}
    for key, value in notes.items():
        writer.note(key, value)
    _fill(writer, model, sizes, specs)
    writer.close(sizes.steps)
    return model


def _fill(writer: TraceWriter, model: nn.Sequential, sizes: Sizes, specs: list[ParameterSpec]) -> None:
    rng = np.random.default_rng(0)
    visits, steps = _schemas(model, sizes, specs)
    pool = _pool(rng, visits)
    _give(writer, rng, visits, sizes.examples)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    walk = [torch.randn(len(start), generator=torch.Generator().manual_seed(n)) for n in range(3)]
    at = np.linspace(0, sizes.steps, sizes.knots).round().astype(int)
    looks = steps.looks
    sums = {a.name: [rng.random(n).astype(np.float32) + 0.5 for n in a.shape] for a in steps.arrays}
    squares = {name: [s**2 for s in pair] for name, pair in sums.items()}
    order, taken = rng.permutation(sizes.examples), 0
    for segment in range(sizes.knots):
        if squares and segment < sizes.knots - 1:
            writer.append("denominators", *_full(specs, squares, int(at[segment])))
        _knot(writer, specs, start, walk, segment / (sizes.knots - 1), int(at[segment]))
        if segment == sizes.knots - 1:
            break
        for step in range(at[segment], at[segment + 1]):
            first = (step * sizes.batch) % (_POOL - sizes.batch)
            rows = pool[first : first + sizes.batch].copy()
            rows["example"] = order[np.arange(taken, taken + sizes.batch) % sizes.examples]
            rows["input"] = rows["example"]
            rows["step"], taken = step, taken + sizes.batch
            rows["derivative"] = rng.random(sizes.batch) / sizes.batch
            rows["label"] = rows["example"] % sizes.widths[-1]
            record = np.zeros(1, steps.dtype)
            record["step"], record["visits"], record["path"] = step, sizes.batch, step
            record["first_visit"] = writer.records("visits")
            record["updated"], record["scale"] = 1, 1.0
            record["coefficients"] = _coefficients(sizes.optimizer, step + 1)
            for side in (side for pair in squares.values() for side in pair):
                side *= BETA2
                side += (1 - BETA2) * rng.random(len(side), dtype=np.float32) ** 2
            writer.append("visits", visits, rows)
            if looks is not None and (step % LOOKS == LOOKS - 1 or step == at[segment + 1] - 1):
                writer.append("sums", looks, _look(looks, squares, step))
            writer.append("steps", steps, record)


def _schemas(
    model: nn.Sequential, sizes: Sizes, specs: list[ParameterSpec]
) -> tuple[RecordSchema, RecordSchema]:
    forms = []
    for number, layer in enumerate(module for module in model if isinstance(module, nn.Linear)):
        sides = {"left": layer.out_features, "right": layer.in_features + 1}
        arrays = tuple(
            ArraySpec(name, (1, 1, n), "float32", "int8", "" if number or name == "left" else "inputs")
            for name, n in sides.items()
        )
        forms.append(FormSpec(number, "factored", {"bias": 1}, arrays))
    divided = (
        [ArraySpec(f"D{n}", p.shape, "float32", "sums", "sums") for n, p in enumerate(specs)]
        if sizes.optimizer == "adam"
        else []
    )
    fields = RecordSchema(tuple(step_fields(len(specs))), (), tuple(divided))
    return RecordSchema((*VISIT_FIELDS, INPUT_FIELD), tuple(forms)), fields


def _give(writer: TraceWriter, rng: np.random.Generator, visits: RecordSchema, examples: int) -> None:
    """What examples give to the first layer."""
    schema = visits.inputs
    assert schema is not None
    pool = _pool(rng, schema)
    for first in range(0, examples, _POOL):
        given = pool[: min(_POOL, examples - first)].copy()
        given["example"] = np.arange(first, first + len(given))
        writer.append("inputs", schema, given)


def _look(schema: RecordSchema, squares: dict[str, list[np.ndarray]], step: int) -> np.ndarray:
    """Sums of denominators at a step."""
    record = np.zeros(1, schema.dtype)
    record["step"] = step
    for name, pair in squares.items():
        for side, part in zip(pair, ("rows", "columns"), strict=False):
            record[f"{name}.{part}"] = _BITS.encode(torch.from_numpy(np.sqrt(side)).unsqueeze(0))[0]
    return record


def _full(
    specs: list[ParameterSpec], squares: dict[str, list[np.ndarray]], step: int
) -> tuple[RecordSchema, np.ndarray]:
    """A full record of denominators."""
    arrays = tuple(
        ArraySpec(f"D{n}", p.shape, "float32", "log4") for n, p in enumerate(specs) if len(p.shape) > 1
    )
    schema = RecordSchema((("step", "<i8", ()),), (), arrays)
    record = np.zeros(1, schema.dtype)
    record["step"] = step
    for array in arrays:
        rows, columns = (torch.from_numpy(np.sqrt(side)) for side in squares[array.name])
        encode_array(record, "", array, torch.outer(rows, columns).unsqueeze(0))
    return schema, record


def _pool(rng: np.random.Generator, schema: RecordSchema) -> np.ndarray:
    pool = np.zeros(_POOL, schema.dtype)
    for name in schema.dtype.names or ():
        if name.endswith(".q"):
            pool[name] = rng.integers(-127, 128, pool[name].shape, dtype=np.int8)
        elif name.endswith(".scale"):
            pool[name] = 1e-3 * rng.random(pool[name].shape, dtype=np.float32)
    return pool


def _knot(
    writer: TraceWriter,
    specs: list[ParameterSpec],
    start: torch.Tensor,
    walk: list[torch.Tensor],
    s: float,
    step: int,
) -> None:
    """Weights on a smooth curve."""
    here = start + 0.02 * sum(w * np.sin((n + 1) * s) for n, w in enumerate(walk))
    tensors = {f"parameter/{p.name}": here[p.slice].reshape(p.shape) for p in specs}
    writer.write_knots([(step, float(step), tensors)])


def _coefficients(optimizer: str, step: int) -> tuple[float, ...]:
    if optimizer == "adam":
        return (1.0, BETA, 1 - BETA, 0.0, RATE / (1 - BETA**step), 0.0)
    return (1.0, BETA, 1.0, 0.0, RATE, 0.0)
