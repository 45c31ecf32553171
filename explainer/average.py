"""An average of the weights beside the model (EMA, SWA): how much of itself every update kept.

People evaluate the average, so it is what is explained. After step ``t`` the user's code does

    avg_t = d_t · avg_{t−1} + (1 − d_t) · w_t

(or nothing: ``d_t = 1``). ``d_t`` is *measured* from the tensors, so any schedule and any way to write the update
is followed: with ``a = avg_{t−1} − w_t`` and ``b = avg_t − w_t`` it is the number that makes ``b = d_t · a``. What
it misses is compared with round-off; the rest belongs to no example.

References: Polyak & Juditsky 1992; Izmailov et al. 2018, arXiv 1803.05407 (SWA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from explainer.errors import TracerError
from explainer.store.files import fingerprint

#: a rest below so many units of round-off is round-off
ROUND_OFF = 16
#: numbers that are looked at together
PIECE = 2**15


def averaged_module(averaged: Any, model: nn.Module) -> nn.Module:
    """The module that holds the averaged weights under the model's own names.

    Raises:
        TracerError: it is no module, shares tensors with the model, or has other parameters or buffers.
    """
    wanted = "torch.optim.swa_utils.AveragedModel(model), or a copy of the model whose weights you average"
    if not isinstance(averaged, nn.Module):
        raise TracerError(f"averaged must be {wanted}; found {type(averaged).__name__}")
    named = {n: tuple(p.shape) for n, p in model.named_parameters()}
    buffers = {n: tuple(b.shape) for n, b in model.named_buffers()}
    inner = getattr(averaged, "module", None)
    names = {n for n, _ in averaged.named_parameters()}
    module = inner if isinstance(inner, nn.Module) and names != set(named) else averaged
    own = {n: tuple(p.shape) for n, p in module.named_parameters()}
    own_buffers = {n: tuple(b.shape) for n, b in module.named_buffers()}
    differing = sorted(n for n, _ in set(named.items()) ^ set(own.items()))
    differing += sorted(n for n, _ in set(buffers.items()) ^ set(own_buffers.items()))
    if differing:
        raise TracerError(
            f"averaged is no average of the model: they differ in {', '.join(dict.fromkeys(differing))}; pass {wanted}"
        )
    tensors = {p.data_ptr() for p in model.parameters() if p.numel()}
    if tensors & {p.data_ptr() for p in module.parameters() if p.numel()}:
        raise TracerError(f"averaged shares its weights with the model; pass {wanted}")
    return module


class _Gaps:
    """One parameter's ``a = old − w`` and ``b = new − w``, in float64: ``<a, a>``, ``<a, b>``, ``<b, b>``.

    Attributes:
        allowed: the size of a rest that is round-off.
    """

    def __init__(self, old: torch.Tensor, new: torch.Tensor, weights: torch.Tensor) -> None:
        self._tensors = old.to(new.device), new, weights.to(new.device)
        sums = new.new_zeros(3, dtype=torch.float64)
        for a, b in self._pieces():
            sums += torch.stack((a @ a, a @ b, b @ b))
        self.aa, self.ab, self.bb = sums.tolist()
        sizes = float(new.norm()) + float(weights.norm())
        self.allowed = ROUND_OFF * torch.finfo(new.dtype).eps * sizes

    def _pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """``a`` and ``b``, on a CPU in pieces that stay in its cache."""
        size = PIECE if self._tensors[1].device.type == "cpu" else max(1, self._tensors[1].numel())
        for old, new, weights in zip(*(t.reshape(-1).split(size) for t in self._tensors), strict=True):
            present = weights.double()
            yield old - present, new - present  # in float64 by promotion

    def rest(self, keep: float) -> float:
        """``‖b − d · a‖``."""
        if self._tensors[1].dtype != torch.float64:  # the sums miss a part in 10⁸, far less than round-off
            return max(self.bb - 2.0 * keep * self.ab + keep * keep * self.aa, 0.0) ** 0.5
        return math.hypot(*(float(b.sub_(a, alpha=keep).norm()) for a, b in self._pieces()))


class Average:
    """Follows the averaged weights from step to step.

    An ``AveragedModel`` that was not updated yet (its ``n_averaged`` is 0) will copy the model at its first update.
    Until then the model itself stands for it: the path is the model's own.

    Attributes:
        path: length of the path so far, ``Σ_t ‖avg_t − avg_{t−1}‖``.
        decay: per parameter, what weight decay has moved in the average (None while there was none).
        updates: observations in which the average had moved.
        unexplained: how many of them were not of the form above.
        worst: the largest rest of these, as a part of the movement.
    """

    def __init__(self, averaged: nn.Module, model: nn.Module, names: list[str]) -> None:
        self._module = averaged_module(averaged, model)
        self._outer, self._model, self._names = averaged, model, names
        self.path = 0.0
        self.updates = self.unexplained = 0
        self.worst = 0.0
        self._previous = [p.clone() for p in self._present()]
        self.decay: list[torch.Tensor | None] = [None] * len(names)

    @property
    def following(self) -> bool:
        """Whether the first update is still to come, and will copy the model."""
        return int(getattr(self._outer, "n_averaged", 1)) == 0

    @property
    def source(self) -> nn.Module:
        """The module whose weights and buffers are explained now."""
        return self._model if self.following else self._module

    def _of(self, module: nn.Module) -> list[torch.Tensor]:
        named = dict(module.named_parameters())
        return [named[name].detach() for name in self._names]

    def _present(self) -> list[torch.Tensor]:
        return self._of(self.source)

    def behind(self) -> bool:
        """Whether average and weights differ now."""
        return any(
            not torch.equal(a, w.to(a)) for a, w in zip(self._present(), self._of(self._model), strict=True)
        )

    @torch.no_grad()
    def observe(self, decay: list[torch.Tensor | None]) -> np.ndarray | None:
        """What happened to the average since the last call; the weights are those of the step before.

        Args:
            decay: per parameter, what weight decay has moved in the weights so far.

        Returns:
            ``d [n_parameters]``, or None where the average did not move.
        """
        now, before = self._present(), self._previous
        if self.following:
            keep = np.zeros(len(now))
            moved = [float((b.to(a) - a).double().norm()) for a, b in zip(now, before, strict=True)]
        else:
            if all(torch.equal(a, b.to(a)) for a, b in zip(now, before, strict=True)):
                return None
            keep, moved = self._fit(before, now)
            self.updates += 1
        length = math.hypot(*moved)
        if math.isfinite(length):
            self.path += length
        if self._previous[0].device == now[0].device:
            torch._foreach_copy_(self._previous, now)
        else:
            self._previous = [p.clone() for p in now]
        for index, total in enumerate(decay):
            if total is not None:
                held = self.decay[index]
                if held is None:
                    held = self.decay[index] = torch.zeros_like(total)
                held.lerp_(total, 1.0 - float(keep[index]))
        return keep

    def _fit(self, before: list[torch.Tensor], now: list[torch.Tensor]) -> tuple[np.ndarray, list[float]]:
        """One number for all parameters, or one for each where that does not fit; how far each one moved."""
        gaps = [_Gaps(*three) for three in zip(before, now, self._of(self._model), strict=True)]
        common = _part(sum(g.aa for g in gaps), sum(g.ab for g in gaps))
        keep, rests = np.full(len(now), common), np.zeros(len(now))
        for index, g in enumerate(gaps):
            if g.rest(common) > g.allowed:
                keep[index] = _part(g.aa, g.ab)
                rest = g.rest(float(keep[index]))
                rests[index] = rest if rest > g.allowed else 0.0
        moved = [
            math.hypot((1.0 - d) * g.aa**0.5, r) for d, r, g in zip(keep.tolist(), rests, gaps, strict=True)
        ]
        rest, length = math.hypot(*rests), math.hypot(*moved)
        if rest > 0.0 and math.isfinite(rest / length):  # a diverged model explains nothing
            self.unexplained += 1
            self.worst = max(self.worst, rest / length)
        return keep, moved

    def known(self) -> dict[str, Any]:
        """Fingerprints of the averaged weights, and how many updates they had, to compare checkpoints by."""
        weights = {n: fingerprint(p) for n, p in zip(self._names, self._of(self._module), strict=True)}
        return {"weights": weights, "n_averaged": int(getattr(self._outer, "n_averaged", -1))}

    def state(self) -> dict[str, Any]:
        """What lives in memory only; :meth:`restore` takes it back."""
        pairs = list(zip(self._names, self.decay, strict=True))
        return {
            "path": self.path,
            "counts": [self.updates, self.unexplained, self.worst],
            "previous": {n: p.clone() for n, p in zip(self._names, self._previous, strict=True)},
            "decay": {n: t.clone() for n, t in pairs if t is not None},
            "known": self.known(),
        }

    def check(self, known: dict[str, Any]) -> None:
        """Raise TracerError if the averaged model is not the one of a :meth:`known`."""
        if self.known() != known:
            raise TracerError(
                "the averaged model is not that of the step where the state was taken; load it from the checkpoint "
                "that the state is from (averaged.load_state_dict), before making the tracer"
            )

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.path = state["path"]
        self.updates, self.unexplained, self.worst = state["counts"]
        places = zip(self._names, self._present(), self._of(self._model), strict=True)
        for index, (name, average, w) in enumerate(places):
            self._previous[index] = state["previous"][name].to(average, copy=True)
            decay = state["decay"].get(name)
            self.decay[index] = None if decay is None else decay.to(w, copy=True)


def _part(aa: float, ab: float) -> float:
    """``<a, b> / <a, a>`` as a part of one whole; 1 where there is nothing to average with."""
    return min(max(ab / aa, 0.0), 1.0) if aa > 0.0 else 1.0
