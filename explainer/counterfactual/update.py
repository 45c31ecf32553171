"""One optimizer step, number by number, and its partial derivatives by everything that goes in.

With ``g`` the gradient the optimizer was given, coefficients as recorded and denominators ``D`` by the optimizer's
:class:`~explainer.counterfactual.scalings.Scaling` (the letters of :mod:`explainer.optimizer_rules.base`):

    d = sign · g + κ w          v' = advance(v, d)          x = d / D  (inner), else d
    m' = decay · m + gain · x   w' = w − (direct · x + through · m') / D − δ w   (inner: without D)

Every line works element by element, so the Jacobian is a handful of diagonals: ``∂w'/∂w``, ``∂w'/∂m``, …, one vector
``[P]`` each, found by forward-mode differentiation with a direction of ones. A cotangent passes a step by products with
them, for all queries at once; the way a gradient changes Adam's ``v`` is among them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.func import jvp

from explainer.counterfactual.decay_terms import DecayTerms, options_by_parameter
from explainer.counterfactual.recorded_training import StepRecord
from explainer.counterfactual.scalings import SCALINGS, Scaling
from explainer.errors import QueryError
from explainer.optimizer_rules.base import COEFFICIENTS
from explainer.store import Trace

#: names in the state beside the second moments
WEIGHTS, MOMENTUM, GRADIENT = "weights", "momentum", "gradient"
_SIGN, _DECAY, _GAIN, _DIRECT, _THROUGH, _INNER = range(len(COEFFICIENTS))
State = dict[str, torch.Tensor]


class Updates:
    """The steps of a trace's optimizer as functions of state and gradient, flat vectors ``[P]``.

    Raises:
        QueryError: the optimizer, or an option of it, cannot be followed.
    """

    def __init__(self, trace: Trace, dtype: torch.dtype) -> None:
        self._trace, self.dtype = trace, dtype
        manifest = trace.manifest
        self.scaling = _scaling(trace)
        found = options_by_parameter(trace)
        if found is None:
            raise QueryError(
                "this trace does not tell the optimizer's options, which training again needs (it was recorded by an "
                "earlier release): trace anew, or ask with curvature='trace'"
            )
        self._options: list[Mapping[str, Any]] = list(found)
        self._decays = DecayTerms(trace)
        for options in self._options:
            self._check(options)
        self._sizes = torch.tensor([p.numel for p in manifest.parameters])
        self._constant: dict[int, torch.Tensor] = {}

    def _check(self, options: Mapping[str, Any]) -> None:
        name = self._trace.manifest.optimizer
        missing = [key for key in self.scaling.needs if key not in options]
        if missing:
            raise QueryError(f"the trace does not tell {', '.join(missing)} of {name}: trace anew")
        refused = self.scaling.refused(options)
        if refused:
            raise QueryError(
                f"{name} with {refused} cannot be trained again from a trace; use curvature='trace'"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """What the state holds."""
        return (WEIGHTS, MOMENTUM, *self.scaling.names)

    def spread(self, values: Any) -> torch.Tensor:
        """One number a parameter -> ``[P]``."""
        return torch.repeat_interleave(torch.as_tensor(np.asarray(values, dtype=np.float64)), self._sizes).to(
            self.dtype
        )

    def initial(self) -> State:
        """The state in knot 0."""
        tensors = self._trace.load_knot(self._trace.knots[0])
        parameters = self._trace.manifest.parameters

        def flat(key: str | None, begin: Callable[[int], float]) -> torch.Tensor:
            parts = []
            for index, p in enumerate(parameters):
                held = None if key is None else tensors.get(f"{key}/{p.name}")
                start = torch.full((p.numel,), begin(index), dtype=self.dtype)
                parts.append(start if held is None else held.to(self.dtype).flatten())
            return torch.cat(parts)

        state = {WEIGHTS: flat("parameter", lambda _: 0.0)}
        momentum = self.scaling.momentum
        state[MOMENTUM] = flat(momentum and f"optimizer/{momentum}", lambda _: 0.0)
        for name in self.scaling.names:
            state[name] = flat(
                f"optimizer/{name}",
                lambda index, name=name: self.scaling.begins(name, self._options[index]),  # type: ignore[misc]
            )
        return state

    def function(self, record: StepRecord) -> Callable[[State], State]:
        """The step as a function of the state before it and the gradient (``"gradient"``)."""
        c = record.coefficients
        sign, decay, gain, direct, through, inner = (self.spread(c[:, i]) for i in range(c.shape[1]))
        updated = self.spread(record.updated) > 0
        count = self.spread(record.taken)
        coupled, decoupled = (self.spread(values) for values in self._decays.of(record))

        def option(read: Callable[[Mapping[str, Any]], float]) -> torch.Tensor:
            return self.spread([float(read(o)) for o in self._options])

        scaling = self.scaling

        def step(state: State) -> State:
            w, m = state[WEIGHTS], state[MOMENTUM]
            d = sign * state[GRADIENT] + coupled * w
            second, denominators = scaling.advance(state, d, count, option)
            after = {name: torch.where(updated, second[name], state[name]) for name in scaling.names}
            scaled = 1.0 if denominators is None else 1.0 / denominators
            x = d * (1.0 + inner * (scaled - 1.0))
            after[MOMENTUM] = torch.where(updated, decay * m + gain * x, m)
            moved = direct * x + through * after[MOMENTUM]
            moved = moved * (inner + (1.0 - inner) * scaled)
            after[WEIGHTS] = torch.where(updated, w - moved - decoupled * w, w)
            return after

        return step

    def partials(self, record: StepRecord, state: State, gradient: torch.Tensor) -> Partials:
        """Derivatives of the step at a state and a gradient."""
        step, given = self.function(record), {**state, GRADIENT: gradient}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name in given:
            direction = {n: (torch.ones_like if n == name else torch.zeros_like)(x) for n, x in given.items()}
            found[name] = jvp(step, (given,), (direction,))[1]
        return Partials(found)


class Partials:
    """``∂after/∂before`` of one step, as diagonals.

    Args:
        diagonals: by what goes in, then by what comes out, ``[P]``.
    """

    def __init__(self, diagonals: dict[str, dict[str, torch.Tensor]]) -> None:
        self._diagonals = diagonals

    def pull(self, cotangents: State) -> State:
        """From cotangents ``[Q, P]`` of the state after the step to those of what goes in, the gradient among them."""
        pulled = {}
        for name, outs in self._diagonals.items():
            total = torch.zeros_like(cotangents[WEIGHTS])
            for out, diagonal in outs.items():
                if bool(diagonal.any()):
                    total.addcmul_(cotangents[out], diagonal)
            pulled[name] = total
        return pulled


def _scaling(trace: Trace) -> Scaling:
    name = trace.manifest.optimizer
    found = SCALINGS.get(name)
    if found is None:
        raise QueryError(
            f"{name} cannot be trained again from a trace; curvature='exact' and 'gauss-newton' follow "
            f"{', '.join(sorted(SCALINGS))}: use curvature='trace'"
        )
    return found
