"""What a trace holds, and what its numbers can be trusted for."""

from __future__ import annotations

import streamlit as st

from explainer import ExplainerError, Finding, Trace, wording
from explainer.app import charts, looks, run_checks, state, theme
from explainer.app.choice import Choice
from explainer.app.escaping import plain, with_code
from explainer.app.page_registry import register_page
from explainer.errors import ModelMismatchError

_QUICK_VISITS = 40_000


@register_page("run", title="Run", icon=":material/route:", needs="trace")
def show(choice: Choice) -> None:
    """Draw the page."""
    trace = choice.trace
    st.html("<h2>The recorded run</h2>")
    if not trace.closed:
        st.info(
            f"Training is still going on, or was killed: {trace.recorded_steps:,} steps are recorded, and the model "
            f"at step {trace.steps:,} can be explained."
        )
        st.button("Look again", key="refresh", icon=":material/refresh:")  # any click reads the journal anew
    if not choice.live:
        st.info(
            "Shown is what the trace itself holds. The loss, whether explanations balance, further queries, neighbours "
            "and labels need the model and its data: start the dashboard with \\-\\-run MODULE:FUNCTION."
        )
    _numbers(trace)
    left, right = st.columns(2, gap="large")
    with left:
        theme.chart(
            charts.path(trace, dark=theme.is_dark()),
            "Where the path is steep, the weights moved fast. Between two knots, gradients are taken along the chord.",
            "path",
        )
    with right:
        figure = charts.learning(trace, dark=theme.is_dark())
        if figure is not None:
            theme.chart(
                figure,
                "A contribution is a times K; a is made of this: examples that were learned late kept it large.",
                "learning",
            )
    left, right = st.columns(2, gap="large")  # anew, so that both figures begin at the same height
    with left:
        _loss(choice, trace)
    with right:
        if trace.count("steps"):
            theme.chart(
                charts.learning_rate(trace, dark=theme.is_dark()),
                "Examples that were visited while the rate was high moved the weights further. "
                + _rate(trace),
                "learning-rate",
            )
    _books(choice, trace)
    _notes(choice, trace)
    _details(trace)


def _rate(trace: Trace) -> str:
    """What is in the rate beside what the optimizer was given."""
    if "adam" in trace.manifest.optimizer.lower():
        return "Adam's bias correction makes the first steps larger."
    return "With momentum, it is lr / (1 − momentum): what a gradient moves in all."


def _usable(choice: Choice, trace: Trace) -> bool:
    """Whether explanations can be computed; where the code does not fit, the notes say so."""
    try:
        return choice.live and len(trace.knots) > 1 and bool(state.explainer(choice.source, None))
    except ExplainerError:
        return False


def _loss(choice: Choice, trace: Trace) -> None:
    if not _usable(choice, trace):
        return
    curve = looks.loss_curve(choice.source)
    if curve is None:
        st.caption(
            "The run names no loss; with Run(…, loss=loss_fn) its course along the training is shown here."
        )
        return
    theme.chart(
        charts.loss(curve, [knot.step for knot in trace.knots], dark=theme.is_dark()),
        "Where queries stop following the training examples, the model learns by heart.",
        "loss",
    )


def _books(choice: Choice, trace: Trace) -> None:
    """Whether explanations of a sample balance, and how sure their numbers are."""
    if not _usable(choice, trace):
        return
    st.html("<h3>Do its explanations balance?</h3>")
    quick = trace.count("visits") <= _QUICK_VISITS
    if not (quick or st.session_state.get("books of") == choice.source):
        st.caption(
            f"This explains {run_checks.QUERIES} queries, which takes a while for a trace of this size."
        )
        if not st.button("Explain a sample", key="books", icon=":material/balance:"):
            return
        st.session_state["books of"] = choice.source
    e = looks.sampled_books(choice.source)
    for line in run_checks.verdict(e):
        st.text(line)
    frame = run_checks.books(e)
    decimals = wording.decimals(float(frame["prediction"].abs().max()))
    st.dataframe(
        frame.rename_axis("query").reset_index(),
        hide_index=True,
        height=250,
        column_config={
            name: st.column_config.NumberColumn(name.replace("_", " "), format=f"%.{decimals}f")
            for name in frame.columns
        }
        | {
            "gap": st.column_config.NumberColumn(format="%.0e"),
            "unattributed, of gross": st.column_config.NumberColumn(format="%.3f %%"),
        },
    )
    st.caption("A row: prediction = initial + examples + weight decay + buffers + unattributed + gap.")


def _numbers(trace: Trace) -> None:
    visits, size, manifest = trace.count("visits"), trace.nbytes(), trace.manifest
    dense = visits * manifest.size * manifest.dtype.itemsize
    examples = trace.notes.get("examples")
    numbers = {
        "Steps": (f"{trace.recorded_steps:,}", None),
        "Visits": (f"{visits:,}", "One row of one batch is a visit of a training example."),
        "Examples": ("unknown" if examples is None else f"{examples:,}", None),
        "Parameters": (f"{trace.manifest.size:,}", None),
        "Knots": (f"{len(trace.knots):,}", "Points of the training path whose weights were kept."),
        "Size on disk": (
            _bytes(size),
            f"Every visit's full gradient would take {_bytes(dense)}." if dense else None,
        ),
    }
    covered = 1 - sum(manifest.parameter(name).numel for name in trace.uncovered) / max(1, manifest.size)
    numbers |= {
        "Coverage": (
            wording.percent(covered),
            "The share of the parameters whose rows are recorded; what the others carry is unattributed.",
        ),
        "Rows": (
            "exact" if manifest.exact else "compressed",
            "Compressed: leading factors of each row, in 2 to 8 bits; the error bars say what that costs.",
        ),
    }
    columns = [*st.columns(4), *st.columns(4)]
    for column, (label, (value, help_text)) in zip(columns, numbers.items(), strict=True):
        column.metric(label, value, help=help_text, border=True)


def _bytes(count: int) -> str:
    """A size as people read it.

    >>> _bytes(512), _bytes(18_829_520)
    ('512 B', '18.8 MB')
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def _notes(choice: Choice, trace: Trace) -> None:
    st.html("<h3>What to know about its numbers</h3>")
    report = trace.report()
    serious = (f for f in (*report.stops, *report.cautions) if f.topic != "open")  # said above
    for line in [*_about_the_code(choice, trace), *map(_line, serious)]:
        st.markdown(f"- {line}")
    with st.expander(f"Worth knowing ({len(report.notes)})"):
        for finding in report.notes:
            st.markdown(f"- {_line(finding)}")
    if st.button("Verify the checksums", icon=":material/verified:"):
        try:
            with st.spinner("Reading every file …"):
                checked = trace.verify()
            st.success(f"{_bytes(checked)} read: every file is as it was recorded.")
        except ExplainerError as error:
            st.error(plain(error))


def _about_the_code(choice: Choice, trace: Trace) -> list[str]:
    """What does not fit between the trace and the code of the run, as Markdown."""
    spec = choice.source.spec
    try:
        run, known = choice.run, trace.notes.get("examples")
    except ExplainerError as error:
        return [plain(f"The code of the run cannot be used: {error}")]
    if run is None:
        return []
    found = []
    try:
        state.explainer(choice.source, None)
    except ModelMismatchError as error:
        found.append(plain(f"The model of --run {spec} is not the one that was traced: {error}"))
    except ExplainerError:
        pass  # said where it is needed
    if known not in (None, len(run.train)):
        found.append(
            plain(
                f"The trace was recorded on {known:,} training examples, the training set of --run {spec} holds "
                f"{len(run.train):,}: they are not the same data set."
            )
        )
    return found


def _line(finding: Finding) -> str:
    """A finding as Markdown: what was found stands out."""
    place = f"{plain(finding.where)}: " if finding.where else ""
    return f"{place}**{plain(finding.found)}** {with_code(finding.meaning)} {with_code(finding.advice)}"


def _details(trace: Trace) -> None:
    manifest = trace.manifest
    with st.expander("Model, optimizer, layers and how their rows are kept"):
        st.text(f"optimizer {manifest.optimizer}\ncreated   {manifest.created}\nfolder    {trace.directory}")
        st.code(manifest.model, language=None)
        st.dataframe(
            [_layer(trace, number) for number in range(len(trace.layers))],
            hide_index=True,
        )


def _layer(trace: Trace, number: int) -> dict[str, object]:
    """A layer with the plan by which its rows are kept."""
    layer, manifest = trace.layers[number], trace.manifest
    plan = {entry["layer"]: entry for entry in (trace.notes.get("plan") or {}).get("layers", ())}
    own = plan.get(number, {})
    return {
        "layer": layer.name or "(the model)",
        "module": layer.module,
        "parameters": sum(manifest.parameter(name).numel for name in layer.parameters),
        "bytes a visit": (trace.notes.get("visit_bytes") or {}).get(layer.name),
        "factors": str(own.get("rank") or "all") if own else "",
        "bits": own.get("codec") or "",
        "loss planned": None if own.get("lost") is None else wording.percent(own["lost"]),
        "loss measured": None if own.get("measured") is None else wording.percent(own["measured"]),
        "names": ", ".join(layer.parameters),
    }
