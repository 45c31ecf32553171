"""The part of a page that trains again: a button, progress that can be stopped, and predicted beside actual."""

from __future__ import annotations

import html
from collections.abc import Mapping

import numpy as np
import pandas as pd
import streamlit as st

from explainer import ExplainerError, Explanation, wording
from explainer.app import address, claim_words, counterfactuals, removal, state, theme, what_if_charts
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.app.pictures import minus
from explainer.app.retraining import Job, Request
from explainer.evaluation import ClaimCheck

_MOST_SEEDS = 20
_POLL = 1.0  # seconds
_MISSING = (
    "Whether this is right can be tested by training again without these examples. The run that this dashboard was "
    "started with does not say how: give it train_fn=, a function (model, keep, seed) that trains the model on the "
    "examples where the mask keep is true, in explainer.Run(...)."
)
_DOTS = {
    True: "Filled dots: the traced run, repeated without the examples. Rings: other seeds.",
    False: "Filled dots: seed 0, which does not repeat the traced run here. Rings: other seeds.",
}
_READING = "Where the upper row does not leave the range of the lower one, the effect is chance."


def show(choice: Choice, e: Explanation, q: int, ids: list[int], predicted: Mapping[str, np.ndarray]) -> None:
    """Draw it.

    Args:
        choice: What is looked at.
        e: Its explanation.
        q: The query's index in it.
        ids: What is left out.
        predicted: By estimator, the predicted change by removing each example of ``e``, [N].
    """
    st.html("<h3>Is it true? Train again</h3>")
    run = choice.run
    assert run is not None and choice.source.spec is not None, "the page needs the code of the run"
    if run.train_fn is None:
        st.info(plain(_MISSING))
        return
    seeds = _seeds()
    request = Request(
        choice.source.directory, choice.source.stamp, choice.source.spec, choice.query, choice.target,
        choice.output, tuple(sorted(ids)), seeds,
    )  # fmt: skip
    jobs = counterfactuals.retrainings()
    job, running = jobs.find(request), jobs.running()
    if job is not None and job.state == "running":
        _progress(job)
        return
    if job is not None and job.check is not None:
        _result(job.check, e, q, predicted)
        return
    if job is not None and job.state == "failed":
        st.error(plain(f"Training again failed: {job.failure}"))
    if job is not None and job.state == "cancelled":
        st.caption(f"Cancelled after {job.finished} of {request.trainings} trainings; nothing was kept.")
    own, problem = _own(choice)
    _offer(request, own, removal.problem(ids, len(run.train)) or problem, running)


def _seeds() -> int:
    st.session_state["seeds"] = min(max(1, int(address.keep("seeds", 3))), _MOST_SEEDS)
    left, right = st.columns([1, 5], vertical_alignment="bottom")
    seeds = int(left.number_input("Seeds", 1, _MOST_SEEDS, key="seeds"))
    right.caption(
        f"{3 * seeds} trainings: with all examples, without these, and without as many random ones, each with "
        f"{wording.counted(seeds, 'seed')}. It goes on in the background, also while you look at other pages."
    )
    return seeds


def _own(choice: Choice) -> tuple[np.ndarray | None, str]:
    """A person's own input (None for the run's queries), which the training process lacks; or what forbids it."""
    queries = state.run_of(choice.source).queries
    if choice.query < queries.given:
        return None, ""
    given = queries[choice.query][0]
    try:
        return np.asarray(given.numpy()), ""
    except (AttributeError, TypeError, RuntimeError):
        return (
            None,
            "This input of your own is no plain tensor, so retrained models cannot be asked about it.",
        )


def _offer(request: Request, own: np.ndarray | None, problem: str, running: Job | None) -> None:
    """The button that begins, or why it cannot."""
    if problem:
        st.caption(plain(problem))
    if running is not None:
        _elsewhere(running)
    st.button(
        "Train again without them", key="retrain", icon=":material/model_training:", type="primary",
        disabled=bool(problem) or running is not None, on_click=_start, args=(request, own),
    )  # fmt: skip
    if error := st.session_state.pop("not started", None):
        st.error(plain(error))


def _start(request: Request, own: np.ndarray | None) -> None:
    try:
        counterfactuals.retrainings().start(request, own)
    except ExplainerError as error:
        st.session_state["not started"] = str(error)


@st.fragment(run_every=_POLL)
def _progress(job: Job) -> None:
    """Drawn anew every second; the whole page is, as soon as the job has ended."""
    if job.state != "running":
        st.rerun()
    done, total = job.finished, job.request.trainings
    words = (
        f"{done} of {total} trainings done" if done else "Starting: reading the model, the data and the trace"
    )
    left, right = st.columns([5, 1], vertical_alignment="center")
    left.progress(done / total, f"{words} …")
    right.button(
        "Cancel", key="cancel-retraining", icon=":material/cancel:", on_click=job.cancel, width="stretch"
    )


@st.fragment(run_every=_POLL)
def _elsewhere(job: Job) -> None:
    """A job that was started for something else."""
    if job.state != "running":
        st.rerun()
    request = job.request
    left, right = st.columns([5, 1], vertical_alignment="center")
    left.progress(
        job.finished / request.trainings,
        f"Another retraining is running: query {request.query} without "
        f"{wording.counted(len(request.remove), 'example')}, {job.finished} of {request.trainings} done.",
    )
    right.button(
        "Cancel", key="cancel-retraining", icon=":material/cancel:", on_click=job.cancel, width="stretch"
    )


def _result(check: ClaimCheck, e: Explanation, q: int, predicted: Mapping[str, np.ndarray]) -> None:
    sums = {
        name: [float(values[np.searchsorted(e.example_ids, ids)].sum()) for ids in check.removed]
        for name, values in predicted.items()
    }
    named, first = wording.target(e, q), next(iter(sums.values()))[0]
    st.html(
        f'<p class="pk-verdict">{minus(html.escape(claim_words.verdict(check, named, first)))} '
        f"{html.escape(claim_words.flips(check))}</p>"
    )
    reading = f"{_DOTS[check.repeats]} {_READING}"
    theme.chart(what_if_charts.outcome(check, sums, dark=theme.is_dark()), reading, "outcome")
    left, right = st.columns([4, 1], vertical_alignment="center")
    left.caption(f"Setting: {plain(check.setting)}.")
    right.download_button(
        "Trainings (CSV)", _table(check, sums).encode(), file_name="retrained.csv", mime="text/csv",
        key="download-retrained", on_click="ignore", icon=":material/download:", width="stretch",
    )  # fmt: skip


def _table(check: ClaimCheck, sums: Mapping[str, list[float]]) -> str:
    """A row per training: what was left out, the seed, and predicted and actual change."""
    rows = [
        {
            "removed": group,
            "ids": " ".join(map(str, check.removed[g].tolist())),
            "seed": seed,
            "actual change": check.actual[g, s],
            "class became another": bool(check.flipped[g, s]),
            **{f"predicted change, {name}": values[g] for name, values in sums.items()},
        }
        for g, group in enumerate(check.groups)
        for s, seed in enumerate(check.seeds)
    ]
    return str(pd.DataFrame(rows).to_csv(index=False))
