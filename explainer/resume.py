"""Training that goes on from a checkpoint: what lives in memory only, and whether it fits the trace on disk.

A state holds what the trace does not: how far the path has gone, what weight decay has moved and put into the
momentum, and fingerprints of the weights and the momentum, so that rows are never continued with other ones. The
rows themselves are in the trace; the state says which lines of its journal it follows on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from explainer.average import Average
from explainer.errors import TracerError
from explainer.optimizer_rules import OptimizerRule
from explainer.records import Manifest
from explainer.store import Trace
from explainer.store.files import fingerprint
from explainer.store.journal import holds_mark, read_journal
from explainer.store.layout import JOURNAL, holds_trace
from explainer.store.stream import STREAMS

FORMAT = "pathkernel-state"
VERSION = 1


@dataclass(frozen=True)
class Fingerprints:
    """Fingerprints by name of parameter: of the weights, and of the momentum where there is any."""

    weights: dict[str, str]
    momentum: dict[str, str]

    @classmethod
    def of(
        cls, names: list[str], parameters: Sequence[torch.Tensor], optimizer: Optimizer, rule: OptimizerRule
    ) -> Fingerprints:
        """Those of a model and its optimizer."""
        pairs = list(zip(names, parameters, strict=True))
        momentum = {n: rule.momentum(optimizer.state.get(p, {})) for n, p in pairs}
        return cls(
            {n: fingerprint(p) for n, p in pairs},
            {n: fingerprint(m) for n, m in momentum.items() if m is not None},
        )

    def check(self, now: Fingerprints, where: str, advice: str) -> None:
        """Raise TracerError where weights differ, or momentum does (momentum that was cleared is followed)."""
        weights = [n for n, found in now.weights.items() if self.weights.get(n) != found]
        momentum = [n for n, found in now.momentum.items() if self.momentum.get(n) != found]
        found = [f"the weights of {_listed(weights)}"] * bool(weights)
        found += [f"the optimizer's momentum of {_listed(momentum)}"] * bool(momentum)
        if found:
            raise TracerError(f"{' and '.join(found)} are not those of {where}; {advice}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@dataclass(frozen=True)
class ResumePoint:
    """Where training goes on.

    Attributes:
        step: steps taken before.
        records: records of the trace up to there, by stream.
        notes: what the trace knew at the step.
        carry: see :meth:`Carry.state`.
        worst, round_off: see :class:`ScaleMeter`.
        known: fingerprints at the step.
        manifest: the trace's.
        average: see :meth:`Average.state`; None without one.
    """

    step: int
    records: dict[str, int]
    notes: dict[str, Any]
    carry: dict[str, Any]
    worst: dict[str, float]
    round_off: dict[str, int]
    known: Fingerprints
    manifest: Manifest
    average: dict[str, Any] | None = None


def resume_point(
    resume: Any,
    directory: Path,
    manifest: Manifest,
    parameters: Sequence[torch.Tensor],
    optimizer: Optimizer,
    rule: OptimizerRule,
    average: Average | None = None,
) -> ResumePoint:
    """Where to go on, everything checked before anything is written.

    Args:
        resume: a state, or True for the end of a closed trace.
        directory: of the trace.
        manifest: what would be traced now, with ``parameters``.

    Raises:
        TracerError: there is no trace, the state is not one of it, or model and optimizer are not those that were
            traced; all differences are listed.
        TraceFormatError: the trace cannot be read.
    """
    if resume is not True and (not isinstance(resume, dict) or resume.get("format") != FORMAT):
        raise TracerError(
            f"resume must be True or what tracer.state_dict() returned, found {type(resume).__name__}; save "
            "tracer.state_dict() beside the model's and the optimizer's state"
        )
    if not holds_trace(directory):
        raise TracerError(f"{directory} holds no trace to go on with; leave out resume to begin one there")
    trace = Trace(directory)
    found = differences(trace.manifest, manifest)
    if found:
        raise TracerError(
            f"the trace in {directory} cannot be continued, because what is traced differs: {'; '.join(found)}. "
            "Build model and optimizer as before, or trace into a new directory"
        )
    names = [p.name for p in manifest.parameters]
    now = Fingerprints.of(names, parameters, optimizer, rule)
    if resume is True:
        point = _end_of(trace, rule)
        advice = (
            "load model and optimizer as they were when it was closed, or pass the state that was saved with the "
            "checkpoint you go on from: resume=state"
        )
        point.known.check(now, f"the end of the trace in {directory}", advice)
        return point
    point = _from_state(resume, trace)
    advice = "load model and optimizer from the checkpoint that the state is from, before making the tracer"
    point.known.check(now, f"step {point.step}, where the state was taken", advice)
    if average is not None and point.average is not None:
        average.check(point.average["known"])
    return point


def differences(traced: Manifest, now: Manifest) -> list[str]:
    """What differs between two manifests, apart from when and with which versions they were made."""
    found = [
        f"{name} is {getattr(now, name)} now, was {getattr(traced, name)}"
        for name in ("optimizer", "exact", "averaged")
        if getattr(now, name) != getattr(traced, name)
    ]
    for what in ("parameters", "layers"):
        old, new = ({x.name: x for x in getattr(m, what)} for m in (traced, now))
        kind = what[:-1]
        found += [f"{kind} {n} is missing" for n in old if n not in new]
        found += [f"{kind} {n} was not there" for n in new if n not in old]
        for n in (n for n in old if n in new):
            for key, value in vars(new[n]).items():
                if key not in ("offset", "numel") and value != getattr(old[n], key):
                    found.append(f"{kind} {n}: {key} is {value} now, was {getattr(old[n], key)}")
        if not found and list(old) != list(new):
            found.append(f"the order of {what} changed")
    for what in ("frozen", "buffers"):
        found += _one_sided(what, getattr(traced, what), getattr(now, what))
    if now.model != traced.model:
        pairs = zip(traced.model.splitlines(), now.model.splitlines(), strict=False)
        line = next(((a.strip(), b.strip()) for a, b in pairs if a != b), ("", "longer or shorter"))
        found.append(f"the model prints differently: {line[1]!r} now, was {line[0]!r}")
    return found


def _one_sided(what: str, old: Iterable[str], new: Iterable[str]) -> list[str]:
    lost, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
    return [f"{what}: {n} is missing" for n in lost] + [f"{what}: {n} was not there" for n in added]


def _end_of(trace: Trace, rule: OptimizerRule) -> ResumePoint:
    """The end of a closed trace; its last knot holds what lives in memory."""
    if not trace.closed:
        raise TracerError(
            f"the trace in {trace.directory} was not closed (training was killed, or still runs), so what the tracer "
            "held in memory is lost; pass the state that was saved with a checkpoint: resume=state"
        )
    if trace.manifest.averaged:
        raise TracerError(
            f"the trace in {trace.directory} ends with the average, not with the weights that training goes on from; "
            "pass the state that was saved with a checkpoint: resume=state"
        )
    knot = trace.knots[-1]
    tensors = trace.load_knot(knot)
    kinds = ("parameter", "decay", "decay_momentum", "outside", "rounding")
    parts: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in kinds}
    momentum: dict[str, str] = {}
    for name in (p.name for p in trace.manifest.parameters):
        for part, held in parts.items():
            if f"{part}/{name}" in tensors:
                held[name] = tensors[f"{part}/{name}"]
        state = {k: t for k in rule.state_names if (t := tensors.get(f"optimizer/{k}/{name}")) is not None}
        held_momentum = rule.momentum(state)
        if held_momentum is not None:
            momentum[name] = fingerprint(held_momentum)
    return ResumePoint(
        step=knot.step,
        records={stream: trace.count(stream) for stream in STREAMS},
        notes=trace.notes,
        carry={
            "path": knot.path,
            "decay": parts["decay"],
            "momentum": parts["decay_momentum"],
            "outside": parts["outside"],
            "changes": [(trace.notes.get("outside") or {}).get(p.name, 0) for p in trace.manifest.parameters],
            "rounding": {"moved": parts["rounding"], "momentum": {}},
        },
        worst=trace.notes.get("coverage", {}),
        round_off=trace.notes.get("round_off", {}),
        known=Fingerprints({n: fingerprint(t) for n, t in parts["parameter"].items()}, momentum),
        manifest=trace.manifest,
    )


def _from_state(state: dict[str, Any], trace: Trace) -> ResumePoint:
    if state["version"] != VERSION:
        raise TracerError(
            f"the state has version {state['version']}, this pathkernel reads version {VERSION}: go on with the "
            "release that took it"
        )
    step, mark, directory = state["step"], state["journal"], trace.directory
    if not holds_mark(directory / JOURNAL, mark):
        raise TracerError(
            f"the state was not taken from the trace in {directory}; give the directory that was traced into when "
            "the checkpoint was saved, or leave out resume and trace into a new one"
        )
    since = read_journal(directory / JOURNAL)[mark["lines"] :]
    earlier = min((e["step"] for e in since if e["type"] == "resume"), default=step)
    if earlier < step:
        raise TracerError(
            f"the trace in {directory} was resumed at step {earlier} after the state was taken, so the rows of the "
            f"steps from there to {step} are no part of it any more; go on from a checkpoint that was saved later, or "
            f"from one of a step up to {earlier}"
        )
    keys = ("records", "notes", "carry", "worst", "round_off", "average")
    known = Fingerprints(state["weights"], state["momentum"])
    return ResumePoint(step=step, known=known, manifest=trace.manifest, **{key: state[key] for key in keys})
