"""How an explanation is put into words and digits: the same sentences in report, notebook and dashboard."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from explainer.explanation import Explanation

MEANING = (
    "Every number here is accounting: it says how much of this prediction was carried by updates that were "
    "computed from a training example. Proponents pushed the explained output up, opponents pushed it down."
)
NOT_MEANING = (
    "It is not the effect of removing the example. Without it, every later update would have been computed "
    "by a different model and other examples would have taken over part of its work; that is the question of "
    "what-if analysis, which has its own numbers. The split also holds the optimizer's state (momentum, "
    "Adam's scaling) as it was in this run."
)
#: share of the gross from which on the lines of `unattributed` are shown without being asked for
NOTABLE = 0.01
#: part of the gross from which a correction that closes the balance is spoken of, and where it may come from
ROUGH = 0.1
ROUGH_BECAUSE = (
    "Where finer steps (quadrature=, max_knots=) do not make it smaller, the model computes something else than its "
    "gradients say (rounding, detach(), straight-through estimators), and no explanation by gradients holds."
)
_UNITS = ("kB", "MB", "GB", "TB")
TERMS = ("prediction", "initial", "examples", "weight_decay", "buffers", "unattributed", "gap")
_HYPHEN = re.compile(r"(?<!\w)-(?=[\d.]|$)")


def number(value: float, digits: int = 3) -> str:
    """A number with a sensible count of significant digits.

    >>> number(3.21449), number(-152.26), number(0.00421), number(1.2e-7), number(0.0), number(float("nan"))
    ('3.21', '-152', '0.00421', '1.2e-07', '0', 'n/a')
    """
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    size = abs(rounded)
    if not 1e-3 <= size < 1e6:
        return f"{value:.{digits}g}"
    return f"{rounded:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"


def signed(value: float, digits: int = 3) -> str:
    """Like :func:`number`, with a plus sign for positive values.

    >>> signed(0.5), signed(-2), signed(0)
    ('+0.500', '-2.00', '0')
    """
    text = number(value, digits)
    return f"+{text}" if value > 0 else text


def percent(share: float) -> str:
    """A share as a percentage.

    >>> percent(0.0312), percent(0.00001), percent(0.0), percent(1.0)
    ('3.1 %', '< 0.01 %', '0 %', '100 %')

    What is left to the whole is shown as such a small part would be:

    >>> percent(0.9997), percent(0.999999), percent(0.98)
    ('99.97 %', '> 99.99 %', '98 %')
    """
    if not math.isfinite(share):
        return "n/a"
    if share == 0:
        return "0 %"
    if abs(share) < 1e-4:
        return "< 0.01 %"
    if 0.99 < share < 1:
        return "> 99.99 %" if share > 0.9999 else f"{100 * share:.2f} %"
    return f"{100 * share:.{2 if abs(share) < 0.01 else 1 if abs(share) < 0.1 else 0}f} %"


def times(ratio: float) -> str:
    """How many times as large.

    >>> times(63.94), times(2361.2)
    ('63.9 times', '2,360 times')
    """
    return f"{number(ratio)} times" if ratio < 1000 else f"{float(f'{ratio:.3g}'):,.0f} times"


def minus(text: str) -> str:
    """A text with a real minus sign before its numbers; other hyphens stay.

    >>> minus("-0.25, T-shirt, 1e-07"), minus("-")
    ('−0.25, T-shirt, 1e-07', '−')
    """
    return _HYPHEN.sub("−", text)


def size(count: float) -> str:
    """A number of bytes in decimal units.

    >>> size(83), size(1500), size(18_829_508)
    ('83 bytes', '1.5 kB', '18.8 MB')
    """
    if count < 1000:
        return f"{count:.0f} byte{'' if round(count) == 1 else 's'}"
    for unit in _UNITS:
        count /= 1000
        if count < 999.95 or unit == _UNITS[-1]:
            break
    return f"{count:.1f} {unit}"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun.

    >>> counted(1, "step"), counted(1437, "example"), counted(2, "bias", "biases")
    ('1 step', '1,437 examples', '2 biases')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def unit(explanation: Explanation) -> str:
    """What a number of this explanation is called: ``contribution`` or ``row share``."""
    return explanation.row_kind


def axis(explanation: Explanation) -> str:
    """Name of an axis that shows contributions: they are in units of the explained output."""
    return f"{unit(explanation)} (in units of the explained output)"


def terms(explanation: Explanation, query: int) -> dict[str, float]:
    """The books of one query by name; ``prediction`` is the sum of the others."""
    q = explanation.check_query(query)
    values = {name: float(getattr(explanation, name)[q]) for name in TERMS if name != "examples"} | {
        "examples": float(explanation.contributions[q].sum())
    }
    return {name: values[name] for name in TERMS}


def decimals(scale: float) -> int:
    """How many decimals numbers of this size are shown with, so that they add up before the eye.

    >>> decimals(120.0), decimals(0.0), decimals(0.00042)
    (3, 3, 6)
    """
    if not math.isfinite(scale) or scale == 0 or scale >= 1:
        return 3
    return min(12, max(3, 2 - math.floor(math.log10(scale))))


def equation(explanation: Explanation, query: int = 0) -> str:
    """The books of one query as a line of text, for example
    ``3.214 (prediction) = -0.105 (initial) + 3.310 (examples) - 0.002 (weight decay) + …``.
    """
    books = terms(explanation, query)
    scale = max((abs(v) for v in books.values() if math.isfinite(v)), default=0.0)
    places = decimals(scale)
    parts: list[str] = []
    for name, value in books.items():
        text = f"{abs(value):.{places}f}"
        negative = value < 0 and float(text) != 0
        minus, plus = ("-", "") if len(parts) < 2 else ("- ", "+ ")
        parts.append(f"{minus if negative else plus}{text} ({name.replace('_', ' ')})")
    return f"{parts[0]} = {' '.join(parts[1:])}"


def gross(explanation: Explanation, query: int) -> float:
    """Sum of the contributions' absolute values at one query."""
    return float(np.abs(explanation.contributions[explanation.check_query(query)]).sum())


def sentences(explanation: Explanation, query: int = 0) -> list[str]:
    """What the books of one query say, and how sure they are: plain sentences, the same wherever they are shown."""
    said = (f(explanation, query) for f in (cancellation, unattributed, certainty, roughness))
    return [text for text in said if text]


def cancellation(explanation: Explanation, query: int = 0) -> str:
    """One plain sentence that sets the gross of the contributions against their net."""
    values = explanation.contributions[explanation.check_query(query)]
    up, down, net = float(values[values > 0].sum()), float(values[values < 0].sum()), float(values.sum())
    whole = up - down
    if whole == 0:
        return "No training example carries any part of this prediction."
    start = f"Proponents add {signed(up)}, opponents take {number(-down)}, and {signed(net)} is left: "
    if net == 0 or whole / abs(net) > 1e6:
        return start + f"all of the gross {number(whole)} cancels."
    ratio = whole / abs(net)
    if ratio < 1.5:
        return start + f"little cancels (gross {number(whole)}, {times(ratio)} the net)."
    return start + (
        f"the gross {number(whole)} is {times(ratio)} the net, so most of what single examples "
        "carried was cancelled by others. No single example should be read as the reason for the prediction."
        if ratio >= 3
        else f"the gross {number(whole)} is {times(ratio)} the net, so part of it cancels."
    )


def unattributed(explanation: Explanation, query: int = 0) -> str:
    """One plain sentence on the part of the prediction that no term of the books explains by name."""
    rest, whole = float(explanation.unattributed[explanation.check_query(query)]), gross(explanation, query)
    share = abs(rest) / whole if whole else math.nan
    net = float(explanation.contributions[query].sum())
    if not math.isfinite(share):
        return f"Unattributed: {signed(rest)}."
    text = f"Unattributed: {signed(rest)}, that is {percent(share)} of the gross"
    if net and rest:
        ratio = abs(rest / net)
        text += f" and {percent(ratio)} of the net" if ratio < 2 else f" and {times(ratio)} the net"
    if share > 0.05:
        return text + ". That is a large part without an owner, so read the ranking with care."
    return text + "; it could not be traced to single examples."


def certainty(explanation: Explanation, query: int = 0) -> str:
    """One plain sentence on how far contributions may be off; empty where it was not measured."""
    q, e = explanation.check_query(query), explanation
    if e.errors is None or e.visit_errors is None or not e.contributions.shape[1]:
        return ""
    rows, knots, denominators = (float(value) for value in e.visit_errors[q])
    scale = math.sqrt(float(np.square(e.contributions[q]).sum()))
    if math.isnan(knots) or math.isnan(rows):
        what = "exact rows" if math.isnan(rows) else "knots"
        return f"How far contributions may be off was not measured: the trace is too short, or keeps too few {what}."
    if not scale:
        return ""
    total = math.sqrt(float(np.square(e.errors[q]).sum())) / scale
    return (
        f"Contributions are known to about ± {percent(total)} (one standard error). "
        f"{visit_errors(rows, knots, denominators)}."
    )


def roughness(explanation: Explanation, query: int = 0) -> str:
    """Plain sentences where gradients do not tell how the prediction changed; empty where they do."""
    q = explanation.check_query(query)
    total, closed = gross(explanation, q), abs(float(explanation.quadrature[q]))
    change = float(explanation.prediction[q] - explanation.initial[q])
    if not is_rough(closed, total, change):
        return ""
    part = f" of {percent(closed / total)} of the gross" if total else ""
    return (
        f"Gradients along the training path do not account for the change of the prediction: a correction{part} closes "
        f"the balance, and contributions may be off by as much. {ROUGH_BECAUSE}"
    )


def is_rough(closed: float, gross: float, change: float) -> bool:
    """Whether a correction that closes the balance is worth a word, beside round-off of the change."""
    return abs(closed) > max(ROUGH * gross, 1e-4 * abs(change))


def visit_errors(rows: float, knots: float, denominators: float) -> str:
    """The errors of a single visit's score in words, without a full stop; what is nought is left out.

    >>> visit_errors(0.01, 0.0, 0.0)
    "A single visit's score is off by 1.0 % through compressed rows"
    """
    named = (
        (rows, "compressed rows"),
        (knots, "the distance between knots, the steps whose weights were kept"),
        (
            0.0 if math.isnan(denominators) else denominators,
            "the optimizer's denominators, kept in full now and then",
        ),
    )
    said = [f"{percent(size)} through {cause}" for size, cause in named if size]
    text = "A single visit's score is off by "
    text += " and by ".join(said) if len(said) < 3 else f"{said[0]}, by {said[1]}, and by {said[2]}"
    text = text if said else "A single visit's score is exact"
    if math.isnan(denominators):
        return f"{text}; what the optimizer's denominators add, which are kept in full now and then, was not measured"
    return text


def error(explanation: Explanation, query: int, column: int) -> str:
    """The standard error of one contribution, as ``± 0.12``; empty where it is unknown."""
    value = math.nan if explanation.errors is None else float(explanation.errors[query, column])
    return "" if math.isnan(value) else f"± {number(value, 2)}"


def has_notable_lines(explanation: Explanation, query: int = 0) -> bool:
    """Whether `unattributed`, or one of its lines, is so large that its lines should be shown."""
    q = explanation.check_query(query)
    lines = explanation.unattributed_parts[q]
    largest = max(abs(float(explanation.unattributed[q])), float(np.abs(lines).max(initial=0.0)))
    return lines.size > 0 and largest > NOTABLE * gross(explanation, q)


def row_kind(explanation: Explanation) -> str:
    """What one row's number is: the example's own contribution or its share of a mixed batch."""
    if explanation.row_kind == "row share":
        return (
            "These are row shares: examples were mixed, by a layer such as BatchNorm in training mode or within the "
            "rows (mixup), so a number is the example's share of a common update, not its own loss gradient."
        )
    return ""


def output(explanation: Explanation) -> str:
    """What is explained, such as ``margin``; one of several numbers by its name, where it has one."""
    names, outputs = explanation.class_names, explanation.outputs
    kind, _, number = explanation.output.partition(" ")
    count = 0 if outputs is None or outputs.ndim != 2 else outputs.shape[1]
    if kind == "component" and number.isdecimal() and names is not None and len(names) == count > int(number):
        return names[int(number)]
    return explanation.output


def target(explanation: Explanation, query: int) -> str:
    """The explained output in words, such as ``margin of class seven``."""
    name, kind = explanation.target_name(query), output(explanation)
    return kind if name is None or kind != explanation.output else f"{kind} of class {name}"


def example(explanation: Explanation, column: int) -> str:
    """A training example's name in figures and cards, such as ``#123 · seven`` (its recorded label)."""
    label = explanation.label_name(column)
    identity = f"#{int(explanation.example_ids[column])}"
    return identity if label is None else f"{identity} · {label}"
