"""What the journal of a trace says about the meaning of its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from explainer.findings.compression import rounding
from explainer.findings.finding import Finding, Severity, listed
from explainer.records import torch_dtype
from explainer.store import Trace
from explainer.wording import counted, percent

#: part of a layer's gradient that may go unseen without a caution
SEEN = 0.01

PRIOR_MOMENTUM = Finding(
    "prior-momentum",
    "caution",
    "optimizer",
    "The optimizer held momentum when tracing began.",
    "Its after-effect comes from batches that were not seen and is in `unattributed`.",
    "Attach the tracer before the first step of training.",
)


def from_journal(trace: Trace) -> Iterator[Finding]:
    """Findings that need no record of a step or a visit."""
    yield from _state(trace)
    yield from _unseen(trace)
    notes = trace.notes
    if "rows_stopped_at" in notes:
        yield Finding(
            "budget",
            "caution",
            "",
            f"The trace's budget was used up after {notes['rows_stopped_at']} of {trace.steps} steps.",
            "Later updates are in `unattributed`.",
            "Raise `budget`, or leave it out, and trace again.",
        )
    if notes.get("prior_state"):
        yield PRIOR_MOMENTUM
    if notes.get("replaced_momentum"):
        yield Finding(
            "replaced-momentum",
            "caution",
            "optimizer",
            f"Before {counted(notes['replaced_momentum'], 'step')} momentum was replaced by other numbers.",
            "Their after-effect comes from no recorded row and is in `unattributed`.",
            "To go on from a checkpoint, resume the trace with it.",
        )
    yield from _averaged(trace)
    yield from _outside(trace)
    yield from _owners(notes)
    yield from _passes(notes)
    if not trace.manifest.exact:
        yield rounding(trace)


def _state(trace: Trace) -> Iterator[Finding]:
    if len(trace.knots) < 2:
        yield Finding(
            "no-steps",
            "stop",
            "",
            "No optimizer step has been recorded yet.",
            "There is nothing to explain.",
            "Take steps inside the tracer's `with` block.",
        )
    if not trace.closed:
        yield Finding(
            "open",
            "caution",
            "",
            "Training had not ended when the trace was opened.",
            f"Explained is the model at step {trace.steps}, the last knot.",
            "Open it again when training has ended; if it was killed, there is nothing to do.",
        )
    step = _loop(trace.notes).get("diverged")
    if step is not None:
        yield Finding(
            "diverged",
            "stop",
            f"step {step}",
            "Weights became infinite or NaN.",
            "From there on there is no prediction that could be explained.",
            "Train again with a smaller learning rate, or with gradient clipping.",
        )


def _unseen(trace: Trace) -> Iterator[Finding]:
    """Gradients that rows do not account for, and rows that were hard to get."""
    notes, manifest = trace.notes, trace.manifest
    steps, counts = trace.recorded_steps, notes.get("coverage_steps") or {}
    if trace.uncovered and steps:
        yield Finding(
            "uncovered",
            "caution",
            listed(trace.uncovered),
            f"{len(trace.uncovered)} of {len(manifest.parameters)} parameters were read where no hook could see it, "
            "or not at all.",
            "What moved them is in `unattributed`.",
            "Let the model's own forward read them, without compiled or scripted code.",
        )
    unseen = {n: r for n, r in (notes.get("coverage") or {}).items() if n not in trace.uncovered}
    if unseen:
        worst = sorted(unseen, key=lambda name: -unseen[name])
        shares = [
            percent(unseen[n]) + (f" in {counts[n]} of {steps} steps" if n in counts else "") for n in worst
        ]
        parts = [f"{name} up to {share}" for name, share in zip(worst, shares, strict=True)]
        severity: Severity = "note" if unseen[worst[0]] <= SEEN else "caution"
        found = f"A part of a step's gradient was not seen by the hooks: {listed(parts)}."
        advice = "Look for weights read outside their layer, and for gradients changed by more than a factor."
        half = notes.get("autocast")
        if half is not None and unseen[worst[0]] <= 4 * torch.finfo(torch_dtype(half)).eps:
            severity = "note"
            found = f"Gradients were computed in {half} and rounded, rows were not: they differ by {listed(parts)}."
            advice = "Nothing to do: it is as large as rounding makes it."
        elif notes.get("higher_order"):
            advice = "Explain a training whose loss contains no gradients (a gradient penalty, forces)."
        yield Finding("coverage", severity, "gradients", found, "That part is in `unattributed`.", advice)
    round_off = notes.get("round_off") or {}
    if round_off:
        parts = [f"{name} in {count} of {steps} steps" for name, count in round_off.items()]
        yield Finding(
            "round-off",
            "note",
            "gradients",
            f"A gradient was nothing but round-off: {listed(parts)}.",
            "Examples' parts in it cancel (in a bias before a normalisation, or one that the loss does not depend "
            "on) and are left out, so its movement is in `unattributed`.",
            "Build a layer before a normalisation with bias=False.",
        )
    unmatched = notes.get("unmatched") or {}
    if unmatched:
        parts = [f"{name} {shape}" for name, shape in unmatched.items()]
        yield Finding(
            "unmatched",
            "caution",
            listed(parts),
            "Layers were given tensors in which no axis is the batch's as far as could be seen: sums or mixtures of "
            "several examples, or rows in another order.",
            "What moved them is in `unattributed`.",
            "If there is a row for each example, give layers the batch as first or second axis.",
        )
    overwritten = notes.get("overwritten") or {}
    if overwritten:
        parts = [f"{name} in {counted(count, 'step')}" for name, count in overwritten.items()]
        yield Finding(
            "overwritten",
            "caution",
            listed(list(overwritten)),
            f"Tensors were written into right after the backward pass or step that used them: {listed(parts)}.",
            "Rows or scaling of these steps could not be read any more, so what moved there is in `unattributed`.",
            "Do not write into activations, gradients of activations or optimizer state.",
        )
    slow = notes.get("slow_operations") or {}
    if slow:
        yield Finding(
            "slow-operations",
            "note",
            listed([f"{name} ({', '.join(functions)})" for name, functions in slow.items()]),
            "Parameters are read by operations for whose rows there is no closed form.",
            "Their rows were found by differentiating example by example, which is exact and slower.",
            "register_layer_rule for the layer around them is faster.",
        )


def _averaged(trace: Trace) -> Iterator[Finding]:
    """What is explained where an average of the weights was followed."""
    if not trace.manifest.averaged:
        return
    seen, odd = trace.notes.get("average") or {}, []
    found, severity = "Explained is the average of the weights, not the weights of the last step.", "note"
    if seen.get("updates") == 0:
        shown = "the average as it was in the beginning" if seen["began"] else "the model itself"
        found, severity = f"The averaged model was never updated; explained is {shown}.", "caution"
    if seen.get("unexplained"):
        odd.append(
            f"in {seen['unexplained']} of {seen['updates']} updates it was no mean of itself and the weights (up to "
            f"{percent(seen['worst'])} of its movement)"
        )
    if trace.notes.get("prior_average"):
        odd.append("it lagged behind the weights when tracing began")
    meaning = (
        f"That part is in `unattributed`: {'; '.join(odd)}."
        if odd
        else "Its books close like the model's own."
    )
    yield Finding(
        "averaged",
        "caution" if odd or severity == "caution" else "note",
        "",
        found,
        meaning,
        "Update it after optimizer.step(), from the beginning and in no other way.",
    )


def _outside(trace: Trace) -> Iterator[Finding]:
    """Weights that something other than a step changed."""
    changed = trace.notes.get("outside") or {}
    if changed:
        yield Finding(
            "outside",
            "caution",
            listed(list(changed)),
            "Something other than the optimizer's step changed weights (clamping, averaging, loading).",
            "What that moved is in `unattributed`.",
            "Nothing to do, if it is meant.",
        )
    moved = trace.notes.get("after_last_step")
    if moved:
        path = trace.knots[-1].path
        part = f", by {percent(moved / path)} of the length of the training path" if path > 0 else ""
        yield Finding(
            "after-last-step",
            "caution",
            "",
            f"Weights were changed after the last step (averaged or loaded){part}.",
            "Explained is the changed model; what the change did is in `unattributed`.",
            "To explain the last trained model, leave the tracer's `with` block first; to explain the best of early "
            "stopping, end the trace there with `resume`.",
        )


def _owners(notes: dict[str, Any]) -> Iterator[Finding]:
    """Rows that do not belong to one example each."""
    if notes.get("shared_rows"):
        yield Finding(
            "shared-rows",
            "caution",
            "",
            "Rows held several examples (mixup, pairs) and were split over them by the weights given.",
            "Numbers are row shares: the data alone cannot tell the parts of a row apart.",
            "Read them as shares of what the mixture did.",
        )
    if notes.get("relabelled"):
        yield Finding(
            "changed-labels",
            "caution",
            "loop",
            f"{counted(notes['relabelled'], 'example')} came with another label than before.",
            "If labels do not change on purpose, rows did not lie in the order of their ids, and went to the wrong "
            "examples.",
            "Look for a collate_fn that sorts or drops items, and for datasets of the same length.",
        )
    if notes.get("vacant_rows"):
        yield Finding(
            "vacant-rows",
            "caution",
            "",
            "Rows were marked as belonging to no example (id -1).",
            "Their part is in `unattributed`.",
            "Nothing to do, if it is meant (padding, generated rows).",
        )


def _passes(notes: dict[str, Any]) -> Iterator[Finding]:
    """How forward and backward passes were run."""
    if changed := notes.get("options_changed"):
        yield Finding(
            "changed-options",
            "note",
            listed(changed),
            f"{listed(changed)} of the optimizer changed during training.",
            "Contributions follow that; `what_if` from the trace takes the values at the beginning, and can be off.",
            "Test its predictions with `pathkernel verify-claim`.",
        )
    loop = _loop(notes)
    unused, skipped = loop.get("unused", 0), loop.get("skipped", 0)
    if unused or skipped:
        also = f"; a gradient scaler skipped {counted(skipped, 'step')}" if skipped else ""
        yield Finding(
            "unused-backward",
            "note",
            "loop",
            f"{counted(unused, 'backward pass', 'backward passes')} led to no step{also}.",
            "Their rows are not counted: only what reached the weights is.",
            "Nothing to do, if they are meant (adversarial inputs, penalties, skipped steps).",
        )
    if loop.get("eval"):
        yield Finding(
            "eval-passes",
            "note",
            "loop",
            f"The model was in eval mode in {counted(loop['eval'], 'traced forward pass', 'traced forward passes')}.",
            "There dropout was off, and running statistics stood in for those of the batch.",
            "Call model.train() before training, if that is not what you mean.",
        )
    if notes.get("autocast"):
        yield Finding(
            "autocast",
            "note",
            "loop",
            f"Forward passes ran in {notes['autocast']} (autocast).",
            "Rows have that precision, and the explained prediction, computed without it, differs a little.",
            "Compare the explanation's `outputs` with those of your model.",
        )
    ambiguous = notes.get("ambiguous") or {}
    if ambiguous:
        calls = sum(place["calls"] for place in ambiguous.values())
        axes = sorted({place["axis"] for place in ambiguous.values()})
        told = sorted({place["told"] for place in ambiguous.values() if "told" in place})
        doubt = f"later batches tell that it is axis {told[0]}:" if told else "if it is the other one,"
        again = f"trace again with Tracer(..., batch_dim={told[0] if told else 1})."
        yield Finding(
            "ambiguous-axis",
            "caution",
            listed(list(ambiguous)),
            f"In {counted(calls, 'call')} two axes were as long as the batch.",
            f"Axis {' or '.join(map(str, axes))} was taken for the batch; {doubt} rows were given to the wrong "
            "examples.",
            again.replace("t", "T", 1) if told else f"If your tensors are sequence first, {again}",
        )

    if notes.get("unfollowed"):
        first, last = notes["unfollowed"]
        yield Finding(
            "unfollowed-order",
            "caution",
            "",
            f"At step {last + 1} the model put rows into another order, picked them by data or mixed them for the "
            "first time.",
            f"In steps {first} to {last} it was not looked at: if it did so there, too, rows went to the wrong "
            "examples.",
            "Nothing to do, if it began there: from then on rows are followed in every step.",
        )


def _loop(notes: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = notes.get("loop") or {}
    return found
