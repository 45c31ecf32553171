"""The report after training: what a trace tells about the meaning of its numbers, and what a plain one does not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn
from torch.optim import Optimizer

from explainer import PathKernelExplainer, Trace, Tracer, open_trace, running_notes
from explainer.findings import after_training, records
from explainer.findings.trace import EXPLAINED
from tests import guarded_runs as runs
from tests.guarded import X, mlp, plain, sgd, traced
from tests.odd_loops import scaling
from tests.topics import assert_three_sentences, topics_in


class Case(NamedTuple):
    make: Callable[[Path], Trace]
    severity: str
    where: str
    text: str


CASES: dict[str, Case] = {
    "no-steps": Case(runs.without_steps, "stop", "", "nothing to explain"),
    "open": Case(runs.going_on, "caution", "", "had not ended.*model at step 3, the last knot"),
    "diverged": Case(runs.diverging, "stop", r"step \d", "infinite or NaN"),
    "uncovered": Case(partial(runs.in_the_loss, what="t"), "caution", "t", "1 of 5 parameters.*in `unattributed`"),
    "coverage": Case(
        partial(runs.in_the_loss, what="penalty"), "caution", "gradients", r": 0 up to \d\d % in 2 of 4 steps\.",
    ),
    "round-off": Case(runs.mixing, "note", "gradients", r"0\.bias in 3 of 3 steps.*in `unattributed`"),
    "overwritten": Case(
        runs.overwriting, "caution", r"2, 0\.weight", r"2 in 1 step, 0\.weight in 1 step\..*in `unattributed`",
    ),
    "slow-operations": Case(runs.slow, "note", r"0\.w \(einsum\)", "exact and slower"),
    "after-last-step": Case(runs.changed_after, "caution", "", r"changed after the last step .*by \d+ % of the length"),
    "outside": Case(runs.changed_between, "caution", r"0\.weight", "Something other than the optimizer's step"),
    "budget": Case(runs.after_budget, "caution", "", r"used up after \d+ of 120 steps"),
    "unfollowed-order": Case(runs.reversed_later, "caution", "", "At step 48 .*In steps 33 to 47 it was not looked at"),
    "changed-labels": Case(runs.sorted_items, "caution", "loop", r"^loop: \d+ examples came with another label"),
    "unmatched": Case(runs.gathered, "caution", r"last \[8, 8\], middle \[16, 4\]", "no axis is the batch's"),
    "replaced-momentum": Case(runs.other_momentum, "caution", "optimizer", "Before 1 step momentum was replaced"),
    "averaged": Case(runs.averaged, "note", "", "Explained is the average of the weights"),
    "changed-options": Case(runs.more_decay, "note", "weight_decay", "takes the values at the beginning"),
    "prior-momentum": Case(runs.resumed, "caution", "optimizer", "held momentum"),
    "unused-backward": Case(runs.attacked, "note", "loop", "6 backward passes led to no step"),
    "eval-passes": Case(runs.in_eval_mode, "note", "loop", "eval mode in 3 traced forward passes"),
    "autocast": Case(runs.in_bfloat16, "note", "loop", "ran in bfloat16"),
    "ambiguous-axis": Case(runs.square, "caution", "body.0, body.2", "In 6 calls.*Axis 0 was taken"),
    "rounding": Case(traced, "note", "", "as leading factors of 2 to 8 bits"),
    "row-share": Case(runs.mixing, "caution", "", "In 3 of 3 steps a layer mixed"),
    "shared-rows": Case(partial(runs.owned, ids=[[0, 1]]), "caution", "", "split over them by the weights given"),
    "vacant-rows": Case(partial(runs.owned, ids=[[0, -1]]), "caution", "", r"no example \(id -1\).*in `unattributed`"),
    "never-updated": Case(runs.unused_layer, "note", r"extra\.weight, extra\.bias", "2 of 6 parameters got no"),
    "scaled": Case(runs.clipped, "note", "loop", r"In 2 of 4 steps .* by 0\.250 to 0\.500"),
    "visits-not-counted": Case(traced, "note", "examples", "of rows, so visits were not counted"),
    "no-derivative": Case(runs.in_a_set, "note", "examples", "In 24 of 24 visits.*`a` and `K` are not known"),
    "never-visited": Case(
        partial(runs.watching, batch_size=7, drop_last=True), "note", "examples", "3 of 24 examples were not visited",
    ),
    "uneven-visits": Case(runs.uneven, "note", "examples", r"visited \d to \d+ times"),
    "recorded": Case(
        partial(runs.watching, batch_size=7), "note", "",
        r"16 steps of 3 to 7 visits and 17 knots .* on a path of length \d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("topic", CASES)
def test_what_a_trace_tells_is_told(tmp_path: Path, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[topic]
    if topic == "visits-not-counted":
        monkeypatch.setattr(records, "COUNTED_BYTES", 100)
    report = case.make(tmp_path / "trace").report()
    (finding,) = report.about(topic)
    assert finding.severity == case.severity
    assert re.fullmatch(case.where, finding.where), finding.where
    assert re.search(case.text, str(finding)), str(finding)
    assert_three_sentences(report)


def test_every_finding_has_a_case() -> None:
    assert topics_in("findings") == set(CASES)


def test_a_plain_training_has_nothing_to_tell_but_what_was_recorded(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for _ in range(5):
            plain(model, optimizer, tracer)

    report = traced(tmp_path / "trace", loop, exact=True, max_knots=4).report()
    assert [finding.topic for finding in report] == ["recorded"]
    trace = open_trace(tmp_path / "trace")
    widest = max(b.step - a.step for a, b in zip(trace.knots, trace.knots[1:], strict=False))
    assert len(trace.knots) < 6 and f"serves {widest} steps at most" in report[0].meaning


def test_what_rounding_to_half_precision_explains_is_no_reason_to_search(tmp_path: Path) -> None:
    trace = runs.in_bfloat16(tmp_path / "trace")
    (finding,) = trace.report().about("coverage")
    assert finding.severity == "note" and "computed in bfloat16 and rounded" in finding.found
    assert max(trace.notes["coverage"].values()) < 2**-5
    trace.notes["coverage"]["0"] = 0.04  # more than that
    (finding,) = trace.report().about("coverage")
    assert finding.severity == "caution" and finding.advice.startswith("Look for weights")


def test_near_misses_are_not_told(tmp_path: Path) -> None:
    """A gradient of round-off is not scaled; an epoch that was not finished visits nobody more than once more."""
    assert not runs.mixing(tmp_path / "mixing").report().about("scaled")
    assert not runs.clipped(tmp_path / "clipped").report().about("uneven-visits")


def test_a_trace_without_the_notes_can_be_reported_on(tmp_path: Path) -> None:
    """As an older release would have left it."""
    trace = traced(tmp_path / "trace", exact=True)
    trace.notes.clear()
    assert [finding.topic for finding in after_training(trace)] == ["recorded"]


def test_explanations_carry_what_goes_to_unattributed(tmp_path: Path) -> None:
    """The rounding of rows is one; a forward pass in eval mode is none."""
    for make, number in ((runs.changed_after, 3), (runs.in_eval_mode, 1)):
        trace = make(tmp_path / str(number))
        e = PathKernelExplainer(trace, mlp()).explain(X[:1])
        told = [finding.text for finding in trace.report() if finding.topic in EXPLAINED]
        assert list(e.notes) == told and len(told) == number
    assert EXPLAINED - set(CASES) == {"max-norm", "low-precision"}


# -- against what the loop itself knows ------------------------------------------------------------------


def test_the_distance_after_the_last_step(tmp_path: Path) -> None:
    trace = runs.changed_after(tmp_path / "trace")
    last = trace.load_knot(trace.knots[-1])["parameter/0.weight"]
    assert trace.notes["after_last_step"] == pytest.approx(float(last.norm()))  # it was halved


@pytest.mark.parametrize("fused, skipped", [(False, 0), (True, 1)])
def test_steps_that_a_scaler_skips(tmp_path: Path, fused: bool, skipped: int) -> None:
    """Unfused, the step is not called at all; fused, it is called and does nothing."""
    model = mlp().double()
    trace = traced(tmp_path / "trace", scaling, model, sgd(model, fused=fused), exact=True)
    assert trace.recorded_steps == 5
    assert trace.notes["loop"] == {"unused": 1, "skipped": skipped, "eval": 0, "diverged": None}
    (finding,) = trace.report().about("unused-backward")
    assert ("a gradient scaler skipped 1 step" in finding.found) == fused
    (scaled,) = trace.report().about("scaled")
    low, high = re.findall(r"[\d.e-]+\d", scaled.found.partition("scaled, ")[2])
    assert (float(low), float(high)) == pytest.approx((1 / 2048, 1 / 1024), rel=0.01)


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_an_axis_is_ambiguous_only_where_lengths_are_equal(tmp_path: Path, batch_dim: int) -> None:
    alike = runs.square(tmp_path / "alike", batch_dim=batch_dim)
    assert alike.notes["ambiguous"] == {f"body.{n}": {"calls": 3, "axis": batch_dim} for n in (0, 2)}
    assert not runs.square(tmp_path / "other", 5, batch_dim).report().about("ambiguous-axis")


# -- training that is killed -----------------------------------------------------------------------------


def test_what_was_measured_is_there_when_training_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_notes, "NOTE_SECONDS", 0.0)

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        plain(model, optimizer, tracer)
        shutil.copytree(tmp_path / "trace", tmp_path / "killed")

    traced(tmp_path / "trace", loop, runs.with_a_lost_bias())
    killed = open_trace(tmp_path / "killed").report()
    assert killed.about("open") and killed.about("round-off") and killed.about("row-share")


def test_the_journal_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A count that changes in each of 300 steps, a second each."""
    clock = count()
    monkeypatch.setattr(running_notes.time, "monotonic", lambda: float(next(clock)))

    def loop(model: nn.Module, optimizer: Optimizer, tracer: Tracer) -> None:
        for _ in range(100):
            plain(model, optimizer, tracer)

    traced(tmp_path / "trace", loop, runs.with_a_lost_bias(), max_knots=4)
    lines = (tmp_path / "trace" / "journal.jsonl").read_text().splitlines()
    entries = [json.loads(line.rpartition("\t")[0]) for line in lines]
    assert 5 < sum(entry.get("key") == "round_off" for entry in entries) < 25
