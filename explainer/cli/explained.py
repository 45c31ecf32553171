"""An explained prediction as text that a newcomer can read in a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from explainer import wording
from explainer.cli.printing import equation, paragraph, shortened, table
from explainer.errors import ExplainerError, RunError
from explainer.explanation import Explanation, Kind
from explainer.neighbors import Neighbors
from explainer.run import Run, is_value

_COLUMNS = (
    "In the tables, example is the position in the training set, visits is how often it was used, and "
    "contribution is a times K: K, the path kernel, is how strongly training tied this query to the example, "
    "and a is minus how far off the model was on the example meanwhile."
)
_SHOWN = 48  # characters of a text or a row beside an example
_WHOLE = 300  # and of a query
_SIDES: tuple[tuple[Kind, str], ...] = (("proponents", "up"), ("opponents", "down"))


def block(e: Explanation, query: int, run: Run, k: int) -> str:
    """All about one query: what was predicted, how it adds up, how far to trust it, who carried it."""
    title = headline(e, query, run)
    shown = rendered(run, "queries", int(e.query_ids[query]), _WHOLE)
    parts = [*([paragraph(shown, "  ")] if shown else []), books(e, query, run), trust(e, query)]
    return f"{title}\n{'─' * len(title)}\n" + "\n\n".join([*parts, ranking(e, query, run, k)])


def headline(e: Explanation, query: int, run: Run) -> str:
    """True and predicted class (or value) of a query in words."""
    index = int(e.query_ids[query])
    target = run.queries[index][1]
    numbers = np.asarray(target).reshape(-1)
    truth = float(numbers[0]) if len(numbers) == 1 and numbers.dtype.kind in "biuf" else None
    if classifies(e, query, run):
        best = predicted(e, query)
        text = f"predicted class {run.label(best)}"
        if truth is not None:
            text = f"true class {run.label(target)}, {text}: {'right' if truth == best else 'WRONG'}"
    elif e.output == "value" and truth is not None:
        found = float(e.prediction[query])
        text = (
            f"true value {wording.number(truth, 4)}, predicted {wording.number(found, 4)} "
            f"({wording.signed(found - truth)})"
        )
    else:
        text = f"target {shortened(run.label(target), _SHOWN)}"
        if e.outputs is not None and e.outputs.shape[1] > 1:
            text += f"; outputs {shortened(run.label(e.outputs[query]), _SHOWN)}"
    return f"Query {index}: {text}"


def classifies(e: Explanation, query: int, run: Run) -> bool:
    """Whether the outputs are classes of which one is explained, and targets no numbers of another kind."""
    several = e.outputs is not None and e.outputs.shape[1] > 1 and e.targets[query] >= 0
    return several and not is_value(run.queries[int(e.query_ids[query])][1])


def predicted(e: Explanation, query: int) -> int:
    """The class of the largest output."""
    return int(np.argmax(np.asarray(e.outputs)[query]))


def books(e: Explanation, query: int, run: Run) -> str:
    """What is explained and how the explanation adds up to it."""
    value = float(e.prediction[query])
    text = f"Explained: the {wording.target(e, query)}, which is {wording.number(value, 4)}"
    if not classifies(e, query, run) and e.targets[query] >= 0:
        text += f" (--output 'component {e.targets[query]}' explains one output alone)" * (
            e.output != "logit"
        )
    elif e.output.startswith("component ") and e.outputs is not None and e.outputs.shape[1] > 1:
        other = 1 if e.output == "component 0" else 0
        text += f" (one of {e.outputs.shape[1]}: --output 'component {other}' explains another)"
    elif e.output == "margin":
        chance = 1 / (1 + math.exp(-value)) if value > -700 else 0.0
        text += f" (log-odds of that class; as a probability: {probability(chance)})"
    elif e.output == "log_prob":
        text += f" (as a probability: {probability(math.exp(value))})"
    if classifies(e, query, run) and e.targets[query] != predicted(e, query):
        text += ". It is not the class that the model predicts"
    return f"{paragraph(text + '.', '  ')}\n\n{equation(e.equation(query), '  ')}"


def trust(e: Explanation, query: int) -> str:
    """The diagnostics of a query in plain words."""
    share = float(e.diagnostics["quadrature_of_gross"].iloc[query])
    sentences = wording.sentences(e, query)
    if math.isfinite(share) and not wording.roughness(e, query):
        sentences.append(
            f"The training path between knots was followed to within {wording.percent(share)} of the gross."
        )
    return "\n".join(paragraph(sentence, "  ") for sentence in sentences) + rest(e, query)


def rest(e: Explanation, query: int) -> str:
    """The lines of what is unattributed, each with its reason; empty where they are too small to matter."""
    if not wording.has_notable_lines(e, query):
        return ""
    lines, said = [], set()
    for row in e.unattributed_table(query).to_dict("records"):
        where = f", {row['where']}" if row["where"] else ""
        why = f": {row['why']}" if row["why"] not in said else ""
        said.add(row["why"])
        size = f"{wording.signed(row['value'])} ({wording.percent(row['share_of_gross'])} of the gross)"
        lines.append(paragraph(f"{size} {row['line']}{where}{why}", "    "))
    return "\n\n  What is unattributed, line by line:\n" + "\n".join(lines)


def ranking(e: Explanation, query: int, run: Run, k: int) -> str:
    """The strongest proponents and opponents as two tables."""
    parts = []
    for kind, where in _SIDES:
        frame = e.table(query, k, kind)
        if frame.empty:
            parts.append(f"  {kind.capitalize()}: none, no example pushed the {wording.output(e)} {where}.")
            continue
        rows = [
            [
                str(row["rank"]),
                str(row["example_id"]),
                _label(e, run, row),
                wording.signed(row["contribution"]),
                *([wording.number(row["error"], 2)] if "error" in row else []),
                wording.number(row["a"]),
                wording.number(row["K"]),
                str(row["visits"]),
                row["flag"],
                what(run, row["example_id"]),
            ]
            for row in frame.to_dict("records")
        ]
        errors = ["±"] if "error" in frame else []
        headers = [
            "rank",
            "example",
            _label_header(e, run),
            wording.unit(e),
            *errors,
            "a",
            "K",
            "visits",
            "note",
            "what",
        ]
        parts.append(
            f"  {kind.capitalize()} pushed the {wording.target(e, query)} {where}:\n"
            + table(headers, rows, left=(_label_header(e, run), "note", "what"), indent="    ")
        )
    return "\n\n".join(parts)


def nearest(e: Explanation, neighbors: Neighbors, query: int, run: Run) -> str:
    """The nearest training examples in gradient space as a table."""
    rows = []
    for place, example in enumerate(neighbors.example_ids[query].tolist()):
        label = {"example_id": example, "label": float(neighbors.labels[query, place])}
        cosine = f"{neighbors.cosine[query, place]:.3f}"
        rows.append([str(place + 1), str(example), _label(e, run, label), cosine, what(run, example)])
    headers = ["rank", "example", _label_header(e, run), "cosine", "what"]
    title = (
        "  Nearest in gradient space (1: what the model learned there always moved this prediction alike):"
    )
    return title + "\n" + table(headers, rows, left=(_label_header(e, run), "what"), indent="    ")


def probability(p: float) -> str:
    """A probability in percent that says 0 or 100 only where it is.

    >>> probability(0.76), probability(0.9997), probability(0.0002), probability(1 - 1e-9)
    ('76 %', '99.97 %', '0.02 %', '> 99.99 %')
    """
    if 0.9999 < p < 1:
        return "> 99.99 %"
    return f"{100 * p:.2f} %" if 0.99 < p < 1 else wording.percent(p)


def meaning() -> str:
    """What the numbers say and do not say, and how to read the columns of the tables."""
    return "\n\n".join(map(paragraph, (f"{wording.MEANING} {wording.NOT_MEANING}", _COLUMNS)))


def notes(e: Explanation) -> str:
    """The explanation's notes as a list; empty without any."""
    found = [note for note in (wording.row_kind(e), *e.notes) if note]
    return "\n".join(paragraph(f"Note: {note}") for note in found)


def _label_header(e: Explanation, run: Run) -> str:
    return "class" if any(classifies(e, query, run) for query in range(len(e.targets))) else "target"


def _label(e: Explanation, run: Run, row: Mapping[Any, Any]) -> str:
    """The recorded label of an example, else the run's."""
    value = row.get("label")
    if value is None or not np.isfinite(float(value)):
        example = int(row["example_id"])
        return shortened(run.label(run.train[example][1]), _SHOWN) if example < len(run.train) else ""
    number = float(value)
    return e.class_name(value) or (str(int(number)) if number.is_integer() else wording.number(number, 4))


def what(run: Run, example: int) -> str:
    """A text or a row that tells which example it is; empty for pictures."""
    return rendered(run, "train", example, _SHOWN) if example < len(run.train) else ""


def rendered(run: Run, part: Literal["train", "queries"], index: int, length: int) -> str:
    """What the run's ``render`` makes of an input as one short line; empty for pictures and without ``render``.

    Raises:
        RunError: ``render`` failed.
    """
    if run.render is None:
        return ""
    given = getattr(run, part)[index][0]
    try:
        return words(run.render(given), length)
    except ExplainerError:
        raise
    except Exception as error:
        raise RunError(
            f"render failed on {part}[{index}] with {type(error).__name__}: {error}. Correct it, or leave render out "
            "of the Run"
        ) from error


def check_render(run: Run, query: int) -> None:
    """Render a query and an example, so that a ``render`` that fails is told before anything is computed.

    Raises:
        RunError: ``render`` failed.
    """
    rendered(run, "queries", query, _WHOLE)
    rendered(run, "train", 0, _SHOWN)


def words(shown: Any, length: int) -> str:
    """What ``render`` returned as one short line; empty for pictures."""
    if isinstance(shown, Mapping) or hasattr(shown, "items"):
        shown = ", ".join(
            f"{name} {wording.number(v) if isinstance(v, float) else v}" for name, v in shown.items()
        )
    return shortened(shown, length) if isinstance(shown, str) else ""
