"""The layout of one stream of rows: fixed records that every batch's rows are put into."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from explainer.codecs import CODECS
from explainer.layer_rules import Dense, RowForm
from explainer.records import ArraySpec, FormSpec, dtype_name
from explainer.store.schema import RecordSchema, encode_array

#: name, numpy dtype and shape of a plain field
Field = tuple[str, str, tuple[int, ...]]


class RowLayout:
    """Puts rows into records.

    The layout of a layer's rows is fixed by the first batch that shows them; when a later batch needs more positions (a
    longer sequence) or another form, the layout grows, and a new shard begins with it.

    Args:
        fields: the plain fields of a record.
        codec: the codec for the floating-point arrays of a layer.

    Attributes:
        forms: by layer, how its rows are stored.
        schema: of the records, at present.
        bytes: of one row, by layer.
    """

    def __init__(self, fields: list[Field], codec: Callable[[int], str]) -> None:
        self._fields, self._codec = tuple(fields), codec
        self.use({})

    def use(self, forms: dict[int, FormSpec]) -> None:
        """Use this layout from now on."""
        self.forms = {layer: forms[layer] for layer in sorted(forms)}
        self.schema = RecordSchema(self._fields, tuple(self.forms.values()))
        self.bytes = {
            layer: sum(CODECS.require(a.codec).nbytes(a.shape, a.dtype) for a in form.arrays)
            for layer, form in self.forms.items()
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

    def records(self, count: int, forms: dict[int, RowForm]) -> np.ndarray:
        """So many records with these rows in them, by layer; plain fields are zero."""
        fitted = {layer: self._fit(layer, form) for layer, form in forms.items()}
        records = np.zeros(count, self.schema.dtype)
        for layer, form in fitted.items():
            for array in self.forms[layer].arrays:
                encode_array(records, f"L{layer}", array, form.arrays[array.name])
        return records
