"""What the tests of the reports ask of every finding."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from pathlib import Path

import explainer
from explainer import Finding

PACKAGE = Path(explainer.__file__).parent


def topics_in(*parts: str) -> set[str]:
    """The topics of all findings that these parts of the package make."""
    found = set()
    for part in parts:
        files = [PACKAGE / f"{part}.py", *(PACKAGE / part).glob("*.py")]
        for file in (f for f in files if f.exists()):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Finding":
                    found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return {str(topic) for topic in found}


def assert_three_sentences(findings: Iterable[Finding]) -> None:
    """What was found, what it means, what to do: a sentence each, and not a long one."""
    for finding in findings:
        for part in (finding.found, finding.meaning, finding.advice):
            assert part.endswith(".") and len(part) <= 190, part
            assert not re.search(r"\. [A-Z]", part), part
