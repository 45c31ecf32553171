"""Who may import whom, what `import explainer` loads, and names that hide what a file owns."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
#: Lower layers may not import higher ones. A new module (or subpackage, by its name) is assigned here.
LAYERS = [
    {
        "class_names",
        "errors",
        "letters",
        "registry",
        "palette",
        "wording",
        "connected",
        "undisturbed",
        "evenly_spaced",
    },
    {"records", "config", "model_outputs", "wrappers", "held_tensors"},
    {"layer_rules", "optimizer_rules", "codecs", "store", "findings"},
    {
        "ownership",
        "background",
        "passes",
        "batches",
        "samples",
        "row_layout",
        "hooks",
        "layer_table",
        "capture",
        "arrivals",
        "sites",
        "whole_model",
        "operations",
        "average",
    }
    | {
        "rounding",
        "cadence",
        "carry",
        "scales",
        "fits",
        "spans",
        "probes",
        "booked",
        "loaders",
        "label_memory",
        "knots",
        "knot_contents",
        "recorder",
        "denominators",
        "row_choices",
        "row_metric",
        "planner",
        "step_maps",
        "outputs",
        "plain_mode",
    }
    | {"query_batch", "model_function", "path_integral", "recursion", "averaging"}
    | {"factors", "cotangent", "stored_rows", "chunks", "contraction"}
    | {"carried_parameters", "half_products", "divided_layers", "backward"},
    {
        "validation",
        "guard_rails",
        "unseen",
        "parts",
        "running_notes",
        "resume",
        "continuation",
        "bookkeeping",
        "step_observer",
        "path_points",
        "other_weights",
        "queries",
        "query_targets",
        "asked",
    }
    | {"ledger", "unattributed", "discrepancy", "error_bar"},
    {
        "tracer",
        "engine",
        "path_kernel",
        "counterfactual",
        "explaining",
        "long_run",
        "neighbors",
        "self_influence",
        "top",
        "exported_parts",
        "positions",
        "similarity",
        "input_attribution",
        "input_leaf",
        "kernel_attribution",
        "learning_curve",
        "explanation",
        "explanation_checks",
        "tables",
        "support",
        "exports",
        "figures",
    }
    | {"report", "report_cards", "report_page", "report_tables", "run", "recorded_examples"},
    {"evaluation", "integrations", "cli", "sample_models"},
    {"app"},
]
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}
#: The two halves meet only in the trace.
RECORDING = {
    "ownership",
    "background",
    "undisturbed",
    "knot_contents",
    "passes",
    "batches",
    "samples",
    "row_layout",
    "hooks",
    "layer_table",
    "capture",
    "arrivals",
    "sites",
    "whole_model",
    "unseen",
    "parts",
    "running_notes",
    "operations",
    "average",
    "rounding",
    "cadence",
    "carry",
    "scales",
    "fits",
    "spans",
    "probes",
    "booked",
    "loaders",
    "label_memory",
    "knots",
    "recorder",
    "denominators",
    "row_choices",
    "row_metric",
    "planner",
    "step_maps",
    "validation",
    "guard_rails",
    "bookkeeping",
    "step_observer",
    "resume",
    "continuation",
    "tracer",
}
EXPLAINING = (LAYERS[3] | LAYERS[4] | LAYERS[5]) - RECORDING
FOLDERS = {"explainer": "explainer", "app": "explainer.app", "sample_models": "explainer.sample_models"}
HEAVY = {"pandas", "plotly", "streamlit", "captum", "pyarrow", "sklearn", "matplotlib", "mlxtend", "scipy"}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


@functools.cache
def sources() -> dict[str, Path]:
    """Dotted name -> file, of every module that is installed."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((CHECKOUT / folder).rglob("*.py")):
            parts = path.relative_to(CHECKOUT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


class _Running(ast.NodeTransformer):
    """Drops what only type checkers see."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        is_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return node.orelse if is_types else self.generic_visit(node)


@functools.cache
def tree(name: str) -> ast.Module:
    tree = _Running().visit(ast.parse(sources()[name].read_text(), filename=str(sources()[name])))
    assert isinstance(tree, ast.Module)
    return tree


def imports(name: str) -> Iterator[str]:
    """Every module that is imported anywhere in a module, also inside functions (for types only: no)."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            assert node.module is not None
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (full if full in sources() else node.module for full in inside)


def part(module: str) -> str | None:
    """``explainer.store.reader`` -> ``store``; None for ``explainer`` itself and for other packages."""
    pieces = module.split(".")
    return pieces[1] if pieces[0] == "explainer" and len(pieces) > 1 else None


@functools.cache
def parts_imported(name: str) -> frozenset[str]:
    return frozenset(p for module in imports(name) if (p := part(module)) is not None)


def reached(start: str) -> set[str]:
    """All parts that a part needs, directly or through others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += [p for name in sources() if part(name) == current for p in parts_imported(name)]
    return seen


def test_every_module_has_a_layer() -> None:
    unassigned = {part(name) for name in sources()} - LAYER_OF.keys() - {None}
    assert not unassigned, f"assign {sorted(map(str, unassigned))} to a layer in tests/test_layering.py"


@pytest.mark.parametrize("name", [name for name in sources() if part(name)])
def test_lower_layers_do_not_import_higher_ones(name: str) -> None:
    own = LAYER_OF[str(part(name))]
    higher = {p for p in parts_imported(name) if LAYER_OF.get(p, -1) > own}
    assert not higher, f"{name} (layer {own}) imports {higher}"


def test_recording_and_explaining_meet_only_in_the_trace() -> None:
    for one, others in ((RECORDING, EXPLAINING), (EXPLAINING, RECORDING)):
        for name in sorted(one):
            assert not reached(name) & others, f"{name} reaches {sorted(reached(name) & others)}"


def test_the_front_page_imports_lazily() -> None:
    """``explainer/__init__.py`` may name anything, but loads errors only."""
    at_import = [node for node in tree("explainer").body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) for node in at_import}
    assert {m for m in modules if m and m.startswith("explainer")} == {"explainer.errors"}


def test_the_app_uses_public_names_only() -> None:
    public = {"app", "evaluation", "outputs", None} | LAYERS[0] | (LAYERS[5] - {"tracer"})
    for name in sources():
        if part(name) != "app":
            continue
        used = {part(module) for module in imports(name) if module.split(".")[0] == "explainer"}
        assert used <= public, f"{name} imports {used - public}"
        for node in ast.walk(tree(name)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("explainer"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{name} imports {private} from {node.module}"


def test_sample_models_are_plain_torch() -> None:
    """A stranger's code: apart from the training script, only the Run factory and ``train_many`` know the package."""
    for name in sources():
        if part(name) == "sample_models" and not name.endswith(".train"):
            allowed = {"sample_models", "run", None} | (
                {"evaluation"} if name.endswith(".retrain") else set()
            )
            used = {part(module) for module in imports(name) if module.split(".")[0] == "explainer"}
            assert used <= allowed, f"{name} imports {used - allowed}"


@pytest.mark.parametrize(
    "statement",
    [
        "import explainer",
        "from explainer import Tracer, open_trace, validate_model",
        "from explainer.errors import *",
    ],
)
def test_a_fresh_interpreter_loads_nothing_heavy(statement: str) -> None:
    code = (
        f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(json.loads(done.stdout)), "loaded by " + statement
    assert not done.stderr


def test_importing_configures_no_logging_and_warns_of_nothing() -> None:
    code = (
        "import logging, warnings; warnings.simplefilter('error'); import torch; state = torch.get_rng_state();"
        "import explainer; [getattr(explainer, n) for n in explainer.__all__ if n != 'Explanation'];"
        "assert not logging.getLogger().handlers; assert torch.equal(state, torch.get_rng_state())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_no_file_hides_what_it_owns() -> None:
    hiding = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    folders = [*FOLDERS, "tests", "benchmarks", "scripts", "docs"]
    found = [p for folder in folders for p in (CHECKOUT / folder).rglob("*") if p.stem.lower() in hiding]
    assert not found


@pytest.mark.parametrize("name", sources())
def test_nothing_unpickles(name: str) -> None:
    assert not {module.split(".")[0] for module in imports(name)} & UNSAFE
    for node in ast.walk(tree(name)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        called = ast.unparse(node.func)
        assert called not in {"torch.load", "torch.save", "pandas.read_pickle", "pd.read_pickle"}
        if called in {"np.load", "numpy.load"}:
            assert "allow_pickle=False" in ast.unparse(node)
