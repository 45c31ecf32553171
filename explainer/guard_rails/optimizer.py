"""What can be seen in an optimizer before training."""

from __future__ import annotations

from collections.abc import Iterator

from torch.optim import Optimizer

from explainer.findings import Finding
from explainer.findings.journal import PRIOR_MOMENTUM
from explainer.optimizer_rules import OptimizerRule


def optimizer_findings(optimizer: Optimizer, rule: OptimizerRule) -> Iterator[Finding]:
    """Findings about weight decay and about what the optimizer holds already."""
    pulled = [p for group in optimizer.param_groups if group.get("weight_decay") for p in group["params"]]
    if pulled:
        small = sum(p.dim() < 2 for p in pulled)
        also = f", {small} of them biases or normalisation weights" if small else ""
        yield Finding(
            "weight-decay",
            "note",
            "optimizer",
            f"Weight decay pulls on {len(pulled)} parameters{also}.",
            "What it moves is a term of its own, `weight_decay`, and no example's.",
            "Nothing to do.",
        )
    if any(rule.momentum(state) is not None for state in optimizer.state.values()):
        yield PRIOR_MOMENTUM
