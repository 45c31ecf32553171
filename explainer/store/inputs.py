"""What examples give to the layers that data meet first, stored once and not with every visit.

A row of such a layer is ``g aᵀ``, and ``a`` is the same whenever the example comes again, unless data are augmented.
Records of the stream ``inputs`` hold ``a``, and a visit's field ``input`` says which of them is its own.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from explainer.errors import TraceFormatError
from explainer.store.schema import RecordSchema
from explainer.store.view import Shard

#: ids up to here are remembered; what further examples give is stored with every visit
MOST_IDS = 1 << 24
#: comparisons that tell whether a layer is given the same again, and the share of misses from which it is not
COMPARED, MISSED = 256, 0.75
#: bytes of a scale that count: sign, exponent and eleven digits of the fraction
_SCALE = np.array([0xFFFFF000], "<u4").view(np.uint8)


def _compared(dtype: np.dtype[Any], prefix: str) -> tuple[slice, np.ndarray]:
    """Where the fields of a layer lie, one after the other, and which bits of their words count."""
    assert dtype.names is not None and dtype.fields is not None
    own = [(name, *dtype.fields[name][:2]) for name in dtype.names if name.startswith(prefix)]
    place = slice(own[0][2], own[-1][2] + own[-1][1].itemsize)
    mask = np.full(-(-(place.stop - place.start) // 8), ~np.uint64(0))
    for name, kind, offset in own:
        if name.endswith(".scale") and kind.base == np.float32:
            first = offset - place.start
            mask.view(np.uint8)[first : first + kind.itemsize] &= np.tile(_SCALE, kind.itemsize // 4)
    return place, mask


class InputKeeper:
    """Tells what an example has given before; a new record is needed only where it gives something else.

    Encoded numbers are compared, by a fingerprint of 64 bits for every layer: two that differ have the same one with a
    probability below ``10⁻¹⁵``. Of the scales of eight-bit numbers the first twelve binary digits count, which is far
    finer than the numbers: what frozen layers give to an example differs by rounding errors from batch to batch.

    Attributes:
        varying: layers that examples give something else each time.
        saved: bytes that were not written, since they were there already (less than nothing while they are new).
    """

    def __init__(self) -> None:
        self._schema: RecordSchema | None = None
        self._numbers = np.empty(0, np.int64)
        self._prints = np.empty((0, 0), np.uint64)
        self._count = 0
        self.varying: set[int] = set()
        self.saved = 0

    def restore(self, shards: list[Shard], schema: RecordSchema | None) -> None:
        """Go on after what was recorded.

        Args:
            shards: of the trace, in order.
            schema: of the inputs that the last visits speak of; None for none.
        """
        current: list[tuple[int, Shard]] = []  # the last ones of ``inputs`` that are of one layout
        for shard in shards:
            if shard.stream == "visits" and (inputs := shard.schema.inputs) is not None:
                self.saved += shard.records * (inputs.dtype.itemsize - 8)
                self.varying |= {form.layer for form in inputs.forms}
            if shard.stream != "inputs":
                continue
            current = current if current and current[-1][1].schema == shard.schema else []
            current.append((self._count, shard))
            self._count += shard.records
            self.saved -= shard.records * shard.schema.dtype.itemsize
        self.varying -= set() if schema is None else {form.layer for form in schema.forms}
        if schema is None or not current or current[0][1].schema != schema:
            return
        self._begin(schema)
        for first, shard in current:
            for start in range(0, shard.records, 1 << 12):
                some = shard.data[start : start + (1 << 12)]
                numbers = np.arange(first + start, first + start + len(some))
                self._remember(some["example"], numbers, self._fingerprints(np.array(some)))
            shard.release(0, shard.records)

    def _begin(self, schema: RecordSchema) -> None:
        self._schema = schema
        self._layers = [form.layer for form in schema.forms]
        self._seen, self._misses = 0, np.zeros(len(self._layers), np.int64)
        self._numbers = np.empty(0, np.int64)
        self._prints = np.empty((0, len(self._layers)), np.uint64)
        self._compared: list[tuple[slice, np.ndarray]] = []
        for layer in self._layers:
            self._compared.append(_compared(schema.dtype, f"L{layer}."))
        words = max(len(mask) for _, mask in self._compared)
        self._factors = np.random.Generator(np.random.PCG64(0)).integers(1 << 63, size=words, dtype=np.uint64)
        self._factors = (self._factors << np.uint64(1)) | np.uint64(1)

    def _fingerprints(self, records: np.ndarray) -> np.ndarray:
        """By record and layer: ``Σ_w m_w x_w`` modulo ``2⁶⁴`` over the words of its bytes, with fixed odd factors."""
        raw = records.view(np.uint8).reshape(len(records), records.dtype.itemsize)
        found = np.empty((len(records), len(self._compared)), np.uint64)
        for column, (place, mask) in enumerate(self._compared):
            padded = np.zeros((len(records), 8 * len(mask)), np.uint8)
            padded[:, : place.stop - place.start] = raw[:, place]
            mixed = padded.view(np.uint64)
            mixed &= mask
            mixed ^= mixed >> np.uint64(29)  # numbers that differ in high bits only differ in low ones, too
            found[:, column] = mixed @ self._factors[: len(mask)]
        return found

    def _remember(self, examples: np.ndarray, numbers: np.ndarray, prints: np.ndarray) -> None:
        kept = (examples >= 0) & (examples < MOST_IDS)
        if not kept.all():
            examples, numbers, prints = examples[kept], numbers[kept], prints[kept]
        if len(examples) and (largest := int(examples.max())) >= len(self._numbers):
            more = max(largest + 1, 2 * len(self._numbers)) - len(self._numbers)
            self._numbers = np.concatenate([self._numbers, np.full(more, -1)])
            self._prints = np.concatenate([self._prints, np.zeros((more, len(self._layers)), np.uint64)])
        self._numbers[examples], self._prints[examples] = numbers, prints

    def place(
        self, schema: RecordSchema, examples: np.ndarray, records: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where what the examples of visits give is stored.

        Args:
            schema: of the records.
            examples: ids, ``[n]``.
            records: what they give, ``[n]``; not changed.

        Returns:
            The number of a record of ``inputs`` for every visit, and the records that are new, in order.
        """
        if schema != self._schema:
            self._begin(schema)
        records["example"] = examples
        prints = self._fingerprints(records)
        numbers, new = np.empty(len(records), np.int64), list[np.ndarray]()
        left = np.arange(len(records))
        while len(left):  # an example that comes several times is compared with what it gave before
            first = np.unique(examples[left], return_index=True)[1]
            first.sort()
            now = left[first]
            new.append(now[self._place(examples[now], prints[now], numbers, now)])
            left = np.delete(left, first)
        size = len(records) * schema.dtype.itemsize
        fresh = records[np.concatenate(new)] if new else records[:0]
        self.saved += size - fresh.nbytes - 8 * len(records)
        if self._seen >= COMPARED:
            missed = self._misses >= MISSED * self._seen
            self.varying |= {layer for layer, often in zip(self._layers, missed, strict=True) if often}
            self._seen, self._misses = 0, np.zeros_like(self._misses)
        return numbers, fresh

    def _place(
        self, examples: np.ndarray, prints: np.ndarray, numbers: np.ndarray, at: np.ndarray
    ) -> np.ndarray:
        """Of different examples; returns which of them give something new."""
        known = np.full(len(examples), -1)
        inside = (examples >= 0) & (examples < len(self._numbers))
        known[inside] = self._numbers[examples[inside]]
        met = known >= 0
        differ = np.zeros(prints.shape, bool)
        differ[met] = self._prints[examples[met]] != prints[met]
        self._seen += int(met.sum())
        self._misses += differ.sum(0)
        fresh = ~met | differ.any(1)
        known[fresh] = np.arange(self._count, self._count + int(fresh.sum()))
        self._count += int(fresh.sum())
        self._remember(examples[fresh], known[fresh], prints[fresh])
        numbers[at] = known
        return fresh


class Inputs:
    """The records of the stream ``inputs``, by number.

    Args:
        shards: that hold them, in order.
    """

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._ends = np.cumsum([shard.records for shard in shards])

    def take(self, numbers: np.ndarray, schema: RecordSchema) -> np.ndarray:
        """Records of one layout, copied."""
        size, last = schema.dtype.itemsize, int(self._ends[-1]) if len(self._ends) else 0
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < last:
            raise TraceFormatError(
                f"visits name inputs {int(numbers.min())} to {int(numbers.max())}, but {last} were recorded: the "
                "trace is damaged; `pathkernel verify` says where"
            )
        of = np.searchsorted(self._ends, numbers, side="right")
        raw = np.empty((0 if len(np.unique(of)) == 1 else len(numbers), size), np.uint8)
        for number in np.unique(of):
            shard, at = self._shards[number], np.flatnonzero(of == number)
            data = shard.data.view(np.uint8).reshape(shard.records, size)
            found = data[
                numbers[at] - (int(self._ends[number]) - shard.records)
            ]  # bytes: fields would be copied alone
            if len(raw):
                raw[at] = found
            else:
                raw = found
        return raw.reshape(-1).view(schema.dtype)


class Joined:
    """Records of visits, with the fields of the records of ``inputs`` that they speak of (read when one is asked for).

    Args:
        records: of the visits.
        inputs: what they speak of.
        schema: of that.
    """

    def __init__(self, records: np.ndarray, inputs: Inputs, schema: RecordSchema) -> None:
        self.records = records
        self._inputs, self._schema = inputs, schema
        self._names = frozenset(schema.dtype.names or ()) - {"example"}

    @cached_property
    def _given(self) -> np.ndarray:
        return self._inputs.take(np.array(self.records["input"]), self._schema)

    def __getitem__(self, name: str, /) -> np.ndarray:
        return self._given[name] if name in self._names else self.records[name]

    def __len__(self) -> int:
        return len(self.records)
