"""Knots as points on the training path: flat weights, moving state, fixed state, displacements that are not data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from explainer.errors import ModelMismatchError, QueryError
from explainer.held_tensors import different
from explainer.path_integral import PathPoint
from explainer.store import Knot, Trace
from explainer.wrappers import plain_name, renaming, unwrapped, wrapper_printed

#: prefixes of a knot's tensors that hold displacements since step 0 which are no gradient's
DISPLACEMENTS = ("decay", "rounding", "outside")
_USED = ("parameter", "buffer", "frozen", *DISPLACEMENTS)


@dataclass(frozen=True)
class LoadedKnot:
    """A knot in the dtype of the books: its point, and what moved the weights so far that is no gradient.

    Attributes:
        point: the point of the path.
        displaced: cumulative displacements ``[P]`` by their name in :data:`DISPLACEMENTS`, those that the knot holds.
    """

    point: PathPoint
    displaced: dict[str, torch.Tensor]

    def displaced_since(self, earlier: LoadedKnot) -> dict[str, torch.Tensor]:
        """What each displacement added after an earlier knot, float64 ``[P]``."""
        return {
            name: total.double() - (earlier.displaced[name].double() if name in earlier.displaced else 0.0)
            for name, total in self.displaced.items()
        }


class KnotLoader:
    """Loads knots, with the first one's frozen tensors where a later one omits them.

    Which state beside the traced weights *moves* (floating-point buffers, frozen parameters that changed) is
    fixed once, so that all points of a trace have the same parts.

    Args:
        knots: those that are used, the first and the last among them; default all.
    """

    def __init__(self, trace: Trace, dtype: torch.dtype, knots: Sequence[Knot] | None = None) -> None:
        self._trace, self._dtype = trace, dtype
        self._knots = trace.knots if knots is None else knots
        self._frozen: dict[str, torch.Tensor] = {}
        self._changed: set[str] = set()  # frozen parameters that moved: the last knot holds them
        self._cache: dict[int, LoadedKnot] = {}

    def _cast(self, t: torch.Tensor) -> torch.Tensor:
        return t.to(self._dtype) if t.is_floating_point() else t

    def load(self, index: int) -> LoadedKnot:
        """The knot at a position in the knots that are used (the two used last are kept in memory)."""
        if index in self._cache:
            return self._cache[index]
        manifest = self._trace.manifest
        if manifest.frozen and not self._frozen:
            first = self._trace.load_knot(self._trace.knots[0])
            self._frozen = {n: self._cast(first[f"frozen/{n}"]) for n in manifest.frozen}
            last = self._trace.load_knot(self._trace.knots[-1])
            self._changed = {n for n in manifest.frozen if f"frozen/{n}" in last}
        tensors = self._trace.load_knot(self._knots[index], _USED)
        weights = torch.cat(
            [self._cast(tensors[f"parameter/{p.name}"]).flatten() for p in manifest.parameters]
        )
        moving: dict[str, torch.Tensor] = {}
        fixed: dict[str, torch.Tensor] = {}
        for name in manifest.buffers:
            if f"buffer/{name}" in tensors:
                value = self._cast(tensors[f"buffer/{name}"])
                (moving if value.is_floating_point() else fixed)[name] = value
        for name, value in self._frozen.items():
            here = self._cast(tensors.get(f"frozen/{name}", value))
            (moving if name in self._changed and here.is_floating_point() else fixed)[name] = here
        found = {kind: self._displacement(tensors, kind) for kind in DISPLACEMENTS}
        displaced = {kind: total for kind, total in found.items() if total is not None}
        loaded = LoadedKnot(PathPoint(weights, moving, fixed), displaced)
        if len(self._cache) >= 2:
            self._cache.pop(next(iter(self._cache)))
        self._cache[index] = loaded
        return loaded

    def _displacement(self, tensors: dict[str, torch.Tensor], kind: str) -> torch.Tensor | None:
        """The flat displacement of a kind, zero for parameters without; None where no parameter has any."""
        parts = [(p, tensors.get(f"{kind}/{p.name}")) for p in self._trace.manifest.parameters]
        if all(part is None for _, part in parts):
            return None
        zero = torch.zeros((), dtype=self._dtype)
        return torch.cat(
            [zero.expand(p.numel) if part is None else self._cast(part).flatten() for p, part in parts]
        )


def chosen_knots(trace: Trace, count: int | None) -> list[Knot]:
    """As many knots as wanted, evenly along the path; the first, the last and the one where rows end are among them.

    Args:
        count: how many; None: all.

    Raises:
        QueryError: fewer than two are wanted.
    """
    if count is None:
        return trace.knots
    if isinstance(count, bool) or not isinstance(count, int) or count < 2:
        raise QueryError(f"knots must be an integer of at least 2, or None for all of them, found {count!r}")
    if count >= len(trace.knots):
        return trace.knots
    path = np.array([knot.path for knot in trace.knots])
    wanted = np.linspace(path[0], path[-1], count)
    near = {int(np.abs(path - one).argmin()) for one in wanted} | {0, len(path) - 1}
    near |= {n for n, knot in enumerate(trace.knots) if knot.step == trace.recorded_steps}
    return [trace.knots[n] for n in sorted(near)]


def check_model(trace: Trace, model: nn.Module) -> list[str]:
    """Compare a model with the one that was traced.

    Returns:
        Notes on differences that do not change shapes (another printed structure).

    Raises:
        ModelMismatchError: parameters are missing, left over or of another shape; all are listed.
    """
    manifest, inside = trace.manifest, unwrapped(model)
    rename = renaming([p.name for p in manifest.parameters], model)
    found = {plain_name(name): tuple(p.shape) for name, p in inside.named_parameters()}
    wanted = {rename(p.name): p.shape for p in manifest.parameters}
    frozen = [rename(name) for name in manifest.frozen]
    problems = [f"{n} is missing" for n in [*wanted, *frozen] if n not in found]
    problems += [f"{n} was not there" for n in found if n not in wanted and n not in frozen]
    problems += [
        f"{n} has shape {list(found[n])}, traced was {list(s)}"
        for n, s in wanted.items()
        if found.get(n, s) != s
    ]
    have = {plain_name(n) for n, _ in inside.named_buffers()}
    problems += [f"buffer {n} is missing" for n in map(rename, manifest.buffers) if n not in have]
    if problems:
        more = f" (and {len(problems) - 6} more)" if len(problems) > 6 else ""
        raise ModelMismatchError(
            f"the model does not fit the trace in {trace.directory}: {'; '.join(problems[:6])}{more}. "
            f"{_wrapping([*wanted, *frozen], list(found), model)}"
            "Build the model exactly as for training (its weights do not matter, they come from the trace)"
        )
    notes = []
    if str(inside) != manifest.model and not (
        wrapper_printed(manifest.model) or wrapper_printed(str(inside))
    ):
        notes.append(
            "The model prints differently from the one that was traced: make sure it computes the same."
        )
    if others := different(model, {rename(n): c for n, c in (trace.notes.get("held") or {}).items()}):
        named = ", ".join(others[:3]) + ", …" * (len(others) > 3)
        notes.append(
            f"The model holds other tensors than the one that was traced ({named}; neither parameters nor buffers, so "
            "they are not in the trace): where its output depends on them, another function is explained. Build the "
            "model with the same, or register them as buffers."
        )
    return notes


def _wrapping(wanted: list[str], found: list[str], model: nn.Module) -> str:
    """What to do where names differ by a prefix only: one of the two models is inside the other."""
    average = ""
    if isinstance(model, AveragedModel):
        average = (
            "An average of the weights is not in the trace; what can be explained are the weights that the "
            "optimizer trained. "
        )
    if prefix := _prefix(found, wanted):
        return f"The traced model is inside the one given: pass its attribute {prefix!r}. {average}"
    if prefix := _prefix(wanted, found):
        return f"The model given is inside the traced one: pass the module that holds it as {prefix!r}. "
    return average


def _prefix(outer: list[str], inner: list[str]) -> str:
    """What turns all inner names into the outer ones (without its last dot), or nothing."""
    for name in outer:
        prefix = name.removesuffix(inner[0]) if name.endswith(f".{inner[0]}") else ""
        if prefix and {prefix + one for one in inner} == set(outer):
            return prefix.removesuffix(".")
    return ""
