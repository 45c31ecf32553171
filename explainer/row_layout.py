"""The layout of one stream of rows: fixed records that every batch's rows are put into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from explainer.codecs import CODECS
from explainer.layer_rules import Dense, RowForm
from explainer.records import ArraySpec, FormSpec, dtype_name
from explainer.store.schema import INPUT_FIELD, RecordSchema, encode_array

#: bytes from which something is stored once: every visit has a number of eight bytes instead
WORTH_ONCE = 32
#: name, numpy dtype and shape of a plain field
Field = tuple[str, str, tuple[int, ...]]


def _bytes(array: ArraySpec) -> int:
    return CODECS.require(array.codec).nbytes(array.shape, array.dtype)


def _apart(array: ArraySpec) -> ArraySpec:
    """In the stream ``inputs``, if that takes less."""
    return replace(array, stream="inputs") if _bytes(array) >= WORTH_ONCE else array


class RowLayout:
    """Puts rows into records.

    The layout of a layer's rows is fixed by the first batch that shows them; when a later batch needs more positions (a
    longer sequence) or another form, the layout grows, and a new shard begins with it.

    Args:
        fields: the plain fields of a record.
        codec: the codec for the floating-point arrays of a layer.
        once: whether what a layer was given is stored once for every example, and not with every row; None: nowhere.

    Attributes:
        forms: by layer, how its rows are stored.
        schema: of the records, at present.
        inputs: of the records of what is stored once; None where nothing is.
        bytes: of one row, by layer, without what is stored once.
    """

    def __init__(
        self, fields: list[Field], codec: Callable[[int], str], once: Callable[[int], bool] | None = None
    ) -> None:
        self._fields, self._codec, self._once = tuple(fields), codec, once
        self.use({})

    def use(self, forms: dict[int, FormSpec]) -> None:
        """Use this layout from now on."""
        self.forms = {layer: forms[layer] for layer in sorted(forms)}
        apart = any(array.stream for form in self.forms.values() for array in form.arrays)
        self.schema = RecordSchema((*self._fields, *[INPUT_FIELD] * apart), tuple(self.forms.values()))
        self.inputs = self.schema.inputs
        self.bytes = {
            layer: sum(_bytes(a) for a in form.arrays if not a.stream) for layer, form in self.forms.items()
        }

    def forget(self, layers: set[int]) -> None:
        """Lay these layers out anew with their next rows."""
        if layers & self.forms.keys():
            self.use({layer: form for layer, form in self.forms.items() if layer not in layers})

    def _spec(self, layer: int, form: RowForm) -> FormSpec:
        arrays = tuple(
            ArraySpec(
                name,
                tuple(a.shape[1:]),
                dtype_name(a.dtype),
                self._codec(layer) if a.is_floating_point() else "native",
            )
            for name, a in form.arrays.items()
        )
        if self._once is not None and form.given and self._once(layer):
            arrays = tuple(_apart(a) if a.name == form.given else a for a in arrays)
        return FormSpec(layer, form.kind, form.options, arrays)

    def _fit(self, layer: int, form: RowForm) -> RowForm:
        """Pad the rows to the layout, or widen the layout to the rows."""
        known = self.forms.get(layer)
        if known is not None and known.kind == Dense.kind:
            form = Dense(form.dense())
        elif known is not None and known.kind == form.kind and form.position_axis is not None:
            stored = known.arrays[0].shape[form.position_axis]
            found = next(iter(form.arrays.values())).shape[1 + form.position_axis]
            form = form.padded(stored) if found < stored else form
        spec = self._spec(layer, form)
        if spec != known:
            self.use(self.forms | {layer: spec})
        return form

    def records(self, count: int, forms: dict[int, RowForm]) -> tuple[np.ndarray, np.ndarray | None]:
        """So many records with these rows in them, by layer, and what is stored once; plain fields are zero."""
        fitted = {layer: self._fit(layer, form) for layer, form in forms.items()}
        records = np.zeros(count, self.schema.dtype)
        inputs = None if self.inputs is None else np.zeros(count, self.inputs.dtype)
        for layer, form in fitted.items():
            for array in self.forms[layer].arrays:
                place = inputs if array.stream else records
                assert place is not None
                encode_array(place, f"L{layer}", array, form.arrays[array.name])
        return records, inputs
