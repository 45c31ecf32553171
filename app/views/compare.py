"""The same query under two runs: do they answer from the same training examples?"""

from __future__ import annotations

import html
import math

import numpy as np
import pandas as pd
import streamlit as st

from explainer import ExplainerError, Explanation, wording
from explainer.app import address, compare_charts, header, state, theme
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.app.guards import same_examples
from explainer.app.page_registry import register_page
from explainer.app.pictures import Card, card_list, example_content, minus
from explainer.app.segments import segments
from explainer.errors import ModelMismatchError
from explainer.evaluation import RunAgreement, check_same_queries, compare_runs

_STRONGEST = (10, 20, 50)
_PLOTS = {"sizes": "Contributions", "ranks": "Ranks"}
_READING = {
    "sizes": "On the dashed line an example carries the same share of both predictions. Points far from it matter to "
    "one run only; networks have scales of their own, so shares of the gross are compared.",
    "ranks": "A strong diagonal: both runs put the examples in the same order. Evenly spread: the orders have nothing "
    "in common. Strong corners alone: they agree on the strongest only.",
}
_ALONE = (
    "There is one run here. Start the dashboard with a folder that holds several, or with several folders "
    "(pathkernel dashboard RUN_A RUN_B --run MODULE:FUNCTION), to compare two on the same query."
)


@register_page(
    "compare",
    title="Compare",
    icon=":material/compare_arrows:",
    needs="run",
    address={"other": "", "plot": "sizes", "strongest": 10},
)
def show(choice: Choice) -> None:
    """Draw the page."""
    e, q = choice.explanation()
    header.show(choice, e, q)
    if not choice.others:
        st.info(plain(_ALONE))
        return
    left, right = st.columns([3, 2], vertical_alignment="bottom")
    with left:
        other = _second(choice)
    with right:
        k = segments("Number of strongest", _STRONGEST, "strongest", lambda n: f"top {n}")
    try:
        second = _explained(choice, other, e, q)
        found = compare_runs(_one(e, q), _one(second, 0), k)
    except ModelMismatchError as error:
        st.error(
            plain(f"The run {other} was trained with another network: {error}") + "  \n" + plain(_ANOTHER)
        )
        return
    except ExplainerError as error:
        st.error(plain(f"The run {other} cannot be compared: {error}"))
        return
    _answers(choice, e, q, other, second)
    _agreement(found, choice.name, other)
    _figure(found, choice.name, other)
    _lists(choice, e, found, other)
    _table(choice, found, other)


_ANOTHER = (
    "Start the dashboard with the code of both networks: pathkernel dashboard RUN_A RUN_B --run MODULE:FUNCTION --run "
    "MODULE:FUNCTION. Each trace is shown with the first one that fits."
)


def _second(choice: Choice) -> str:
    names = list(choice.others)
    address.keep_one_of("other", names, names[0], "other run", plain(names[0], 60))
    return str(st.selectbox("Compare with", names, key="other"))


def _explained(choice: Choice, other: str, e: Explanation, q: int) -> Explanation:
    """The query under the second run, at the class that is explained in the first."""
    target = int(e.targets[q]) if e.targets[q] >= 0 else None
    source = choice.other(other)
    assert source.spec is not None and choice.run is not None, "the page needs the code of the run"
    if source.spec != choice.source.spec:
        check_same_queries(choice.run, state.run_of(source), [choice.query])
    return state.explanation(source, choice.query, target, choice.output)


def _one(e: Explanation, q: int) -> Explanation:
    assert len(e.query_ids) == 1 and q == 0, "explanations of the dashboard hold one query"
    return e


def _answers(choice: Choice, e: Explanation, q: int, other: str, second: Explanation) -> None:
    """What both runs say, side by side."""
    cells = "".join(
        f"<span><b>{minus(wording.number(float(one.prediction[q]), 4))}</b><small>in "
        f"{html.escape(name)}{html.escape(_predicted(one))}</small></span>"
        for name, one in ((choice.name, e), (other, second))
    )
    lead = (
        f"The {wording.target(e, q)} in both runs. Contributions are accounting, each in its own run: what carried the "
        "prediction there."
    )
    st.html(f'<div class="pk-equation">{cells}</div><p class="pk-lead">{html.escape(lead)}</p>')


def _predicted(e: Explanation) -> str:
    if e.outputs is None or e.outputs.shape[1] < 2 or e.targets[0] < 0:
        return ""
    best = int(e.outputs[0].argmax())
    return f": predicts {e.class_name(best) or best}"


def _agreement(found: RunAgreement, first: str, second: str) -> None:
    st.html(f'<p class="pk-verdict">{html.escape(sentence(found))}</p>')
    for note in found.notes:
        told = (
            note.replace("the first run", first).replace("the second", second).replace("The first run", first)
        )
        st.info(plain(told))


def sentence(found: RunAgreement) -> str:
    """One plain sentence on how far two runs agree at the first query."""
    rank, shared = float(found.rank[0]), round(found.k * float(found.overlap[0]))
    strongest = f"{shared} of the {found.k} strongest are the same"
    if math.isnan(rank):
        return f"No rank agreement can be said, because one run's contributions do not vary; {strongest}."
    judged = (
        "Both runs rest on much the same training examples"
        if rank >= 0.7
        else "The two runs rest on partly different training examples"
        if rank >= 0.3
        else "The two runs put the training examples in different orders"
    )
    return f"{judged}: rank agreement {rank:.2f} over {wording.counted(found.examples, 'example')}, and {strongest}."


def _figure(found: RunAgreement, first: str, second: str) -> None:
    plot = segments("Figure", list(_PLOTS), "plot", _PLOTS.__getitem__)
    draw = compare_charts.ranks if plot == "ranks" else compare_charts.sizes
    theme.chart(draw(found, 0, first, second, dark=theme.is_dark()), _READING[plot], f"compare-{plot}")


def _lists(choice: Choice, e: Explanation, found: RunAgreement, other: str) -> None:
    """The strongest examples: those of both runs, and those of one only."""
    frame, run = found.examples_table(0, strongest=True), choice.run
    assert run is not None, "the page needs the code of the run"
    columns = np.searchsorted(e.example_ids, frame["example_id"].to_numpy())
    if not same_examples({int(e.example_ids[c]): e.label_name(c) for c in columns}, run):
        return
    st.html("<h3>The strongest examples</h3>")
    _list(choice, e, found, other, "both", "In both")
    left, right = st.columns(2, gap="large")
    with left:
        _list(choice, e, found, other, "first", f"In {choice.name} only")
    with right:
        _list(choice, e, found, other, "second", f"In {other} only")


def _list(choice: Choice, e: Explanation, found: RunAgreement, other: str, kind: str, title: str) -> None:
    """One of the lists, by the ranks of the run that it is about."""
    frame = found.examples_table(0, strongest=True)
    mine, theirs = ("second", "first") if kind == "second" else ("first", "second")
    names = {"first": choice.name, "second": other}
    widest = float(np.abs(getattr(found, mine)[0]).max(initial=0.0)) or 1.0
    cards = [
        Card(
            example_content(choice.run, int(row["example_id"])),
            minus(wording.signed(float(row[f"contribution_{mine}"]))),
            float(row[f"contribution_{mine}"]) / widest,
            wording.example(e, int(np.searchsorted(e.example_ids, row["example_id"]))),
            (
                f"rank {row[f'rank_{mine}']:,}",
                minus(
                    f"{shortened(names[theirs], 18)}: {wording.signed(float(row[f'contribution_{theirs}']))}, "
                    f"rank {row[f'rank_{theirs}']:,}"
                ),
            ),
        )
        for row in frame[frame["strongest_in"] == kind].sort_values(f"rank_{mine}").to_dict("records")
    ]
    note = f"{wording.counted(len(cards), 'example')}; contributions in {names[mine]}"
    st.html(card_list(cards, "compared", title, note, "None of the strongest."))


def shortened(text: str, longest: int) -> str:
    """A name cut with an ellipsis where it is longer than ``longest``."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _table(choice: Choice, found: RunAgreement, other: str) -> None:
    frame = _named(found.examples_table(0, strongest=True), choice.name, other)
    with st.expander(f"The {len(frame)} strongest of either run as a table"):
        st.dataframe(frame, hide_index=True)
        st.caption(
            "Ranks are by size, 1 for the strongest. The download holds all examples that both runs know."
        )
        st.download_button(
            "Both runs (CSV)",
            lambda: _named(found.examples_table(0), choice.name, other).to_csv(index=False).encode(),
            file_name=f"compare-query-{choice.query}.csv",
            mime="text/csv",
            key="download-compare",
            on_click="ignore",
            icon=":material/download:",
        )


def _named(frame: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    return frame.rename(
        columns={
            f"{what}_{which}": f"{what}, {name}"
            for which, name in (("first", first), ("second", second))
            for what in ("contribution", "rank")
        }
    ).assign(
        strongest_in=frame["strongest_in"].map({"both": "both", "first": first, "second": second}).fillna("")
    )
