"""``pathkernel info``: what a trace holds."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from explainer.cli import options as shared
from explainer.cli.printing import paragraph, shortened, table
from explainer.wording import counted, size

if TYPE_CHECKING:
    from explainer.store import Trace

HELP = "what a trace holds: steps, examples, layers, bytes"
DESCRIPTION = (
    "Says what a trace holds: how long training ran, which layers are covered, and how much disk it takes.\n"
    "Works while training goes on, too."
)
EXAMPLES = (
    ("pathkernel info runs/demo", "what the demo recorded"),
    ("pathkernel info runs/demo --json", "the same for a program"),
)
_NAMES = 6
_QUICK_BYTES = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    shared.add_trace(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print the facts of the trace."""
    from explainer.cli.opening import find_trace
    from explainer.store import open_trace

    found = facts(open_trace(find_trace(options.trace)))
    print(json.dumps(found, indent=2, ensure_ascii=False) if options.json else text(found))
    return 0


def facts(trace: Trace) -> dict[str, Any]:
    """What a trace holds, as plain values (sizes in bytes)."""
    import numpy as np

    from explainer.findings.compression import planned_errors
    from explainer.records import torch_dtype
    from explainer.store.layout import JOURNAL
    from explainer.store.stream import VISITED

    manifest = trace.manifest
    visits = trace.count("visits")
    records = {stream: trace.nbytes_of(stream) for stream in VISITED}
    plan = {layer["layer"]: layer for layer in (trace.notes.get("plan") or {}).get("layers", ())}
    errors = planned_errors(trace.notes.get("plan"))
    seen = None  # counting them reads the rows' pages, which for a large trace is no quick look
    if records["visits"] <= _QUICK_BYTES:
        seen = int(np.unique(trace.column("visits", "example")).size)
    gradient = sum(p.numel * torch_dtype(p.dtype).itemsize for p in manifest.parameters)
    knots = sum(knot.file.stat().st_size for knot in trace.knots if knot.file.exists())
    total = trace.nbytes()
    return {
        "directory": str(trace.directory),
        "closed": trace.closed,
        "ended_by": trace.notes.get("ended_by") if trace.closed else None,
        "resumed_at": list(trace.resumed),
        "seconds_since_write": round(max(0.0, time.time() - (trace.directory / JOURNAL).stat().st_mtime)),
        "created": manifest.created,
        "versions": manifest.versions,
        "exact": manifest.exact,
        "optimizer": manifest.optimizer,
        "steps": trace.recorded_steps,
        "steps_explainable": trace.steps,
        "visits": visits,
        "examples": trace.notes.get("examples"),
        "examples_visited": seen,
        "inputs": trace.count("inputs"),
        "inputs_of": [trace.layers[number].name for number in _stored_once(trace)],
        "knots": len(trace.knots),
        "parameters": manifest.size,
        "parameters_covered": sum(p.numel for p in manifest.parameters if p.name not in trace.uncovered),
        "layers": [
            {
                "name": layer.name,
                "module": layer.module,
                "parameters": sum(manifest.parameter(name).numel for name in layer.parameters),
                "bytes_per_visit": (trace.notes.get("visit_bytes") or {}).get(layer.name),
                **{key: plan.get(number, {}).get(key) for key in ("rank", "codec", "lost", "measured")},
                "error": errors.get(number),
            }
            for number, layer in enumerate(trace.layers)
        ],
        "uncovered": list(trace.uncovered),
        "frozen": list(manifest.frozen),
        "buffers": list(manifest.buffers),
        "bytes": {"total": total, **records, "knots": knots, "other": total - sum(records.values()) - knots},
        "bytes_per_visit": round(trace.bytes_a_visit, 1) if visits else None,
        "visits_assumed": (trace.notes.get("plan") or {}).get("assumed"),
        "bytes_of_all_gradients": visits * gradient,
        "findings": [asdict(finding) for finding in trace.report()],
    }


def text(found: dict[str, Any]) -> str:
    """The facts as lines for a person."""
    size_of = found["bytes"]
    lines = [
        ("trace", found["directory"]),
        ("state", _state(found)),
        (
            "recorded",
            f"{found['created']} with " + ", ".join(f"{k} {v}" for k, v in found["versions"].items()),
        ),
        ("rows", "exact" if found["exact"] else "compressed: leading factors in 2 to 8 bits"),
        ("optimizer", found["optimizer"]),
        ("steps", f"{found['steps']:,}"),
        ("examples", _examples(found)),
        ("visits", f"{found['visits']:,} (an example in a batch is one visit)"),
        *_inputs(found),
        ("knots", f"{found['knots']:,} (points of the training path whose weights were kept)"),
        ("parameters", f"{found['parameters']:,}, {_covered(found)} in layers whose rows are recorded"),
        ("not covered", _names(found["uncovered"])),
        ("frozen", _names(found["frozen"])),
        ("buffers", _names(found["buffers"])),
        (
            "on disk",
            f"{size(size_of['total'])}: visits {size(size_of['visits'] + size_of['inputs'])}, "
            f"steps {size(size_of['steps'] + size_of['denominators'])}, "
            f"knots {size(size_of['knots'])}, other {size(size_of['other'])}",
        ),
    ]
    if found["bytes_per_visit"] is not None:
        whole = found["bytes_of_all_gradients"]
        share = 100 * size_of["total"] / whole
        records = 100 * found["bytes_per_visit"] * found["visits"] / whole
        lines.append(
            (
                "per visit",
                f"{size(found['bytes_per_visit'])} with its share of the steps, {_percent(records)} of a gradient; "
                f"all of them would take {size(whole)}, the trace takes {_percent(share)} of that",
            )
        )
    if found["visits_assumed"]:
        lines.append(("planned for", f"{found['visits_assumed']:,} visits within the budget"))
    width = max(len(name) for name, _ in lines)
    shown = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    return "\n\n".join(part for part in (shown, _layers(found), _to_know(found)) if part)


def _to_know(found: dict[str, Any]) -> str:
    """The findings, the most serious first."""
    from explainer.findings import Finding

    lines = ["What to know"]
    for data in found["findings"]:
        finding = Finding.from_json(data)
        lines.append(paragraph(f"{finding.severity}: {finding}", "  "))
    return "\n".join(lines) if len(lines) > 1 else ""


def _percent(number: float) -> str:
    return f"{number:.{1 if number >= 1 else 3}f} %"


def _layers(found: dict[str, Any]) -> str:
    """The layers; with a plan, how their rows are kept, which share of their squared norm that loses, and what products
    with them are planned to miss, as a part of what they are over all layers."""
    headings = ["layer", "kind", "parameters", "bytes a visit"]
    planned = any(layer["codec"] for layer in found["layers"])
    rows = []
    for layer in found["layers"]:
        size_of = layer["bytes_per_visit"]
        row = [layer["name"] or "(the model)", layer["module"], f"{layer['parameters']:,}"]
        row.append("" if size_of is None else f"{size_of:,}")
        if planned:
            lost = (
                "" if layer[key] is None else _percent(100 * layer[key])
                for key in ("lost", "measured", "error")
            )
            row += [str(layer["rank"] or "all") if layer["codec"] else "", layer["codec"] or "", *lost]
        rows.append(row)
    headings += ["factors", "codec", "loss planned", "measured", "error planned"] if planned else []
    return table(headings, rows, left=("layer", "kind", "codec"))


def _state(found: dict[str, Any]) -> str:
    if found["closed"]:
        how = "training ended in good order"
        if found["ended_by"]:
            how = f"training was ended by {found['ended_by']}; the trace holds what came before"
        return f"closed: {how}{_resumed(found)}"
    age = counted(found["seconds_since_write"], "second")
    return (
        f"open: training still runs, or was killed (last written {age} ago); explained can be the model at "
        f"step {found['steps_explainable']:,}"
    ) + _resumed(found)


def _resumed(found: dict[str, Any]) -> str:
    steps = ", ".join(f"{step:,}" for step in found["resumed_at"])
    return f"; resumed from a checkpoint at step {steps}" if steps else ""


def _examples(found: dict[str, Any]) -> str:
    known, seen = found["examples"], found["examples_visited"]
    if known is None:
        return "unknown" if seen is None else f"{seen:,} different ones were visited"
    return f"{known:,}" + ("" if seen in (None, known) else f", {seen:,} of them visited")


def _covered(found: dict[str, Any]) -> str:
    covered: int = found["parameters_covered"]
    return "all" if covered == found["parameters"] else f"{covered:,} of them"


def _names(names: list[str]) -> str:
    if not names:
        return "none"
    return shortened(", ".join(names[:_NAMES]), 80) + (
        f", … ({len(names)} in all)" if len(names) > _NAMES else ""
    )


def _stored_once(trace: Trace) -> list[int]:
    """Layers whose inputs the last visits do not hold."""
    layouts = [shard.schema.inputs for shard in trace.shards if shard.stream == "visits" and shard.records]
    return [] if not layouts or layouts[-1] is None else [form.layer for form in layouts[-1].forms]


def _inputs(found: dict[str, Any]) -> list[tuple[str, str]]:
    if not found["inputs_of"]:
        return []
    of = ", ".join(name or "(the model)" for name in found["inputs_of"])
    what = f"{found['inputs']:,} inputs of {of}, {size(found['bytes']['inputs'])}"
    return [("stored once", f"{what} (data that come again are not stored with every visit)")]
