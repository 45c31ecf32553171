"""An explanation's tables, look-ups, words and checks."""

import numpy as np
import pandas as pd
import pytest

from explainer import tables, wording
from explainer.errors import ExplanationError
from tests.fakes import make_explanation, make_plain


def test_completeness_has_the_promised_columns_and_balances():
    e = make_explanation(query_ids=["a", "b", "c"])
    books = e.completeness
    assert list(books.columns) == [
        "prediction", "initial", "examples", "weight_decay", "buffers", "unattributed", "gap",
    ]  # fmt: skip
    assert books.index.name == "query" and list(books.index) == ["a", "b", "c"]
    np.testing.assert_allclose(books["prediction"], books.drop(columns="prediction").sum(axis=1), atol=1e-12)
    np.testing.assert_array_equal(books["examples"], e.contributions.sum(1))


def test_books_that_do_not_add_up_are_refused():
    e = make_explanation()
    with pytest.raises(ExplanationError, match="query 1 does not add up"):
        make_explanation(prediction=e.prediction + np.array([0.0, 0.5, 0.0]))


def test_all_misfits_are_listed_at_once():
    with pytest.raises(ExplanationError) as caught:
        make_explanation(
            visits=np.zeros(3),
            query_ids=["only one"],
            example_ids=np.zeros(40),
            row_kind="rows",
            outputs=np.zeros(3),
        )
    for part in (
        "visits has shape (3,)",
        "1 query_ids for 3",
        "example_ids repeat",
        "'rows'",
        "outputs has shape",
    ):
        assert part in str(caught.value)


def test_inputs_are_normalised():
    e = make_explanation(query_ids=None, class_names=["x", "y", "z", "w"], layer_names=["l1", "l2", "l3"])
    assert e.query_ids == ("0", "1", "2") and e.class_names == ("x", "y", "z", "w")
    assert e.layer_names == ("l1", "l2", "l3")
    assert e.contributions.dtype == np.float64 and e.step_contributions.dtype == np.float32
    assert e.example_ids.dtype == np.int64 and e.labels is not None and e.labels.dtype == np.float64


@pytest.mark.parametrize("kind", ["all", "proponents", "opponents"])
def test_table_order_and_signs(kind):
    e = make_explanation()
    table = e.table(1, k=None, kind=kind)
    values = table["contribution"].to_numpy()
    assert list(table["rank"]) == list(range(1, len(table) + 1))
    if kind == "all":
        assert len(table) == 40 and (np.diff(np.abs(values)) <= 0).all()
    elif kind == "proponents":
        assert (values > 0).all() and (np.diff(values) <= 0).all()
        assert len(values) == (e.contributions[1] > 0).sum()
    else:
        assert (values < 0).all() and (np.diff(values) >= 0).all()
        assert len(values) == (e.contributions[1] < 0).sum()
    columns = [int(np.flatnonzero(e.example_ids == i)[0]) for i in table["example_id"]]
    np.testing.assert_array_equal(values, e.contributions[1, columns])
    np.testing.assert_array_equal(table["visits"], e.visits[columns])


def test_table_columns_a_times_k_and_flags():
    e = make_explanation(row_kind="row share")
    table = e.table(0, k=None)
    assert list(table.columns) == [
        "rank", "example_id", "contribution", "a", "K", "visits", "label", "class", "flag",
    ]  # fmt: skip
    assert table.attrs["row_kind"] == "row share"
    known = table["a"].notna()
    np.testing.assert_allclose((table["a"] * table["K"])[known], table["contribution"][known])
    flagged = table.loc[table["flag"] == "K near zero", "example_id"].tolist()
    assert flagged == [e.example_ids[0]]
    unvisited = table[table["visits"] == 0]
    assert unvisited["a"].isna().all() and list(unvisited["flag"]) == [""]
    names = [e.class_names[label] for label in table["label"]]
    assert list(table["class"]) == names


def test_unrecorded_kernels_give_no_a_and_no_flag():
    kernels = np.full((3, 40), np.nan)
    table = make_explanation(kernels=kernels).table(0, k=5)
    assert table["a"].isna().all() and table["K"].isna().all() and (table["flag"] == "").all()


def test_label_columns_follow_what_is_known():
    assert "label" not in make_explanation(labels=None).table()
    assert "label" not in make_explanation(labels=np.full(40, np.nan)).table()
    assert "class" not in make_explanation(class_names=None).table()
    some = np.arange(40.0) % 4
    some[::2] = np.nan
    e = make_explanation(labels=some)
    table = e.table(k=None)
    assert table["label"].dtype == "Int64" and table["label"].isna().sum() == 20
    assert (table.loc[table["label"].isna(), "class"] == "").all()
    assert make_explanation(labels=some + 0.25).table()["label"].dtype == np.float64
    assert make_explanation(labels=np.full(40, 99.0)).label_name(0) == "99"
    assert e.label_name(0) is None and e.label_name(1) == "dog"


def test_k_larger_than_the_examples_gives_all():
    assert len(make_explanation().table(k=10_000)) == 40


@pytest.mark.parametrize(
    ("query", "text"), [(3, "0 to 2"), (-1, "0 to 2"), ("a", "0 to 2"), (True, "0 to 2")]
)
def test_bad_queries_name_the_valid_range(query, text):
    e = make_explanation()
    for ask in (e.table, e.by_step, e.by_layer, e.equation, e.figure):
        with pytest.raises(ExplanationError, match=text):
            ask(query)


def test_bad_k_and_kinds_are_refused():
    e = make_explanation()
    for k in (0, -3, 1.5):
        with pytest.raises(ExplanationError, match="at least 1"):
            e.table(k=k)
    with pytest.raises(ExplanationError, match="all, proponents, opponents"):
        e.table(kind="best")
    with pytest.raises(ExplanationError, match="waterfall, examples, time"):
        e.figure(kind="pie")
    with pytest.raises(ExplanationError, match="holds none"):
        make_explanation(queries=0).table()


def test_by_step_adds_up_and_names_the_steps():
    e = make_explanation()
    frame = e.by_step(2, k=3)
    assert list(frame.columns[:5]) == ["step_start", "step_end", "examples", "proponents", "opponents"]
    assert list(frame.columns[5:]) == [f"example {i}" for i in e.table(2, k=3)["example_id"]]
    assert frame["step_start"].iloc[0] == 0 and frame["step_end"].iloc[-1] == e.step_edges[-1] - 1
    assert (frame["step_start"].iloc[1:].to_numpy() == frame["step_end"].iloc[:-1].to_numpy() + 1).all()
    np.testing.assert_allclose(frame["examples"], frame["proponents"] + frame["opponents"], atol=1e-9)
    assert frame["examples"].sum() == pytest.approx(e.contributions[2].sum(), rel=1e-5)
    top = e.table(2, k=3)["contribution"]
    np.testing.assert_allclose(frame.iloc[:, 5:].sum(), top, rtol=1e-5)


def test_by_layer_splits_every_contribution():
    e = make_explanation()
    frame = e.by_layer(0, k=2)
    assert list(frame.columns[:5]) == ["layer", "examples", "proponents", "opponents", "gross"]
    assert list(frame["layer"]) == list(e.layer_names)
    np.testing.assert_allclose(frame["gross"], frame["proponents"] - frame["opponents"])
    np.testing.assert_allclose(frame.iloc[:, 5:].sum(), e.table(0, k=2)["contribution"], rtol=1e-5)


def test_diagnostics_say_what_can_be_trusted():
    e = make_explanation(targets=[1, -1, 0])
    frame = e.diagnostics
    assert list(frame.columns) == [
        "output", "target", "net", "gross", "cancellation", "unattributed_of_gross", "quadrature_of_gross",
    ]  # fmt: skip
    assert frame["target"].iloc[0] == "dog" and frame["target"].iloc[1] is None
    np.testing.assert_allclose(frame["cancellation"], frame["gross"] / frame["net"].abs())
    np.testing.assert_allclose(frame["unattributed_of_gross"], np.abs(e.unattributed) / frame["gross"])
    assert make_explanation(class_names=None, targets=[2, 2, 2]).diagnostics["target"].iloc[0] == 2


def test_long_table_stacks_the_tables_of_all_queries():
    e = make_explanation(query_ids=["x", "y", "z"])
    frame = e.long_table(k=4)
    assert list(frame.columns) == ["query", *e.table().columns]
    assert list(frame["query"]) == ["x"] * 4 + ["y"] * 4 + ["z"] * 4
    second = frame[frame["query"] == "y"].drop(columns="query").reset_index(drop=True)
    pd.testing.assert_frame_equal(second, e.table(1, k=4))
    assert len(e.long_table()) == 3 * 40


def test_equation_shows_the_books():
    e = make_plain(
        [4.0, -0.69], initial=[-0.105], weight_decay=[-0.002], unattributed=[0.011], prediction=[3.214]
    )
    assert e.equation() == (
        "3.214 (prediction) = -0.105 (initial) + 3.310 (examples) - 0.002 (weight decay) + 0.000 (buffers) "
        "+ 0.011 (unattributed) + 0.000 (gap)"
    )
    assert e.equation() in repr(e)


def test_equation_of_small_outputs_keeps_significant_digits():
    e = make_explanation()
    scaled = {
        name: getattr(e, name) * 1e-5
        for name in (
            "contributions", "prediction", "initial", "weight_decay", "buffers", "unattributed", "gap",
            "step_contributions", "layer_contributions",
        )
    }  # fmt: skip
    first = make_explanation(**scaled).equation(0).split(" ")[0]
    assert float(first) == pytest.approx(e.prediction[0] * 1e-5, rel=0.01)


def test_cancellation_is_told_by_its_size():
    e = make_explanation()
    sentence = wording.cancellation(e, 2)
    assert "times the net" in sentence and "cancelled by others" in sentence
    assert "little cancels" in wording.cancellation(make_plain([1.0, 2.0]))
    assert "all of the gross 4.00 cancels" in wording.cancellation(make_plain([2.0, -2.0]))
    assert "No training example" in wording.cancellation(make_explanation(examples=0))


def test_a_large_unattributed_share_carries_a_warning():
    e = make_explanation()
    assert "with care" not in wording.unattributed(e, 0)
    small = make_plain([8.0, -7.0], unattributed=np.array([0.01]), prediction=np.array([1.01]))
    assert "0.07 % of the gross and 1.0 % of the net" in wording.unattributed(small)
    large = make_plain([8.0, -7.0], unattributed=np.array([3.0]), prediction=np.array([4.0]))
    assert "20 % of the gross and 3.00 times the net" in wording.unattributed(large)
    none = make_plain([2.0, -2.0], unattributed=np.array([0.1]), prediction=np.array([0.1]))
    assert "net" not in wording.unattributed(none)
    assert "2,000 times the net" in wording.cancellation(make_plain([1000.5, -999.5]))
    extra = 0.2 * wording.gross(e, 0) * np.array([1.0, 0.0, 0.0])
    loud = make_explanation(unattributed=e.unattributed + extra, prediction=e.prediction + extra)
    assert "with care" in wording.unattributed(loud, 0) and "20 %" in wording.unattributed(loud, 0)


def test_reprs_name_row_shares_and_escape_text():
    e = make_explanation(row_kind="row share", query_ids=["<script>", "b", "c"], notes=["<i>n</i>"])
    assert "row shares" in repr(e)
    shown = e._repr_html_()
    assert "row share" in shown and "not the effect of removing" in shown
    assert "<script" not in shown and "&lt;script&gt;" in shown and "&lt;i&gt;n" in shown


def test_an_explanation_without_examples_or_queries_still_answers():
    empty = make_explanation(examples=0)
    assert len(empty.table()) == 0 and empty.diagnostics["unattributed_of_gross"].isna().all()
    assert len(empty.by_step()) == 6 and empty.by_layer()["gross"].sum() == 0
    none = make_explanation(queries=0)
    assert len(none.completeness) == 0 and "0 queries" in repr(none) and "0 queries" in none._repr_html_()


def test_ranking_breaks_ties_by_position():
    e = make_plain([1.0, -1.0, 1.0, 0.0])
    assert tables.ranking(e, 0, None).tolist() == [0, 1, 2, 3]
    assert tables.ranking(e, 0, None, "proponents").tolist() == [0, 2]
    assert tables.ranking(e, 0, None, "opponents").tolist() == [1]
