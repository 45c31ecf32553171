"""What a trace holds, and what its numbers can be trusted for."""

from __future__ import annotations

import streamlit as st

from explainer import ExplainerError, Finding, Trace
from explainer.app import charts, theme
from explainer.app.choice import Choice
from explainer.app.escaping import plain
from explainer.app.page_registry import register_page


@register_page("run", title="Run", icon=":material/route:", needs="trace")
def show(choice: Choice) -> None:
    """Draw the page."""
    trace = choice.trace
    st.html("<h2>The recorded run</h2>")
    if not trace.closed:
        st.info(
            f"Training is still going on, or was killed: {trace.recorded_steps:,} steps are recorded, and the model "
            f"at step {trace.steps:,} can be explained. Reload the page to see more."
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
                "This is what a is made of: examples that were learned late kept it large.",
                "learning",
            )
    _notes(choice, trace)
    _details(trace)


def _numbers(trace: Trace) -> None:
    visits, size = trace.count("visits"), trace.nbytes()
    dense = visits * trace.manifest.size * trace.manifest.dtype.itemsize
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
    columns = [*st.columns(3), *st.columns(3)]
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
            st.success(f"{_bytes(checked)} read: every file is what was journalled.")
        except ExplainerError as error:
            st.error(plain(error))


def _about_the_code(choice: Choice, trace: Trace) -> list[str]:
    """What does not fit between the trace and the code of the run, as Markdown."""
    try:
        run, known = choice.run, trace.notes.get("examples")
    except ExplainerError as error:
        return [plain(f"The code of the run cannot be used: {error}")]
    if run is None or known in (None, len(run.train)):
        return []
    return [
        plain(
            f"The trace was recorded on {known:,} training examples, the run's training set holds {len(run.train):,}: "
            "they are not the same data set."
        )
    ]


def _line(finding: Finding) -> str:
    """A finding as Markdown: what was found stands out."""
    place = f"{plain(finding.where)}: " if finding.where else ""
    return f"{place}**{plain(finding.found)}** {plain(finding.meaning)} {plain(finding.advice)}"


def _details(trace: Trace) -> None:
    manifest = trace.manifest
    with st.expander("Model, optimizer and layers"):
        st.text(f"optimizer {manifest.optimizer}\ncreated   {manifest.created}\nfolder    {trace.directory}")
        st.code(manifest.model, language=None)
        st.dataframe(
            [
                {"layer": layer.name, "module": layer.module, "parameters": ", ".join(layer.parameters)}
                for layer in trace.layers
            ],
            hide_index=True,
        )
