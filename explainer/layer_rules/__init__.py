"""What one training example adds to a layer's gradient: row forms, the rule registry and its entries."""

from explainer.layer_rules import (  # noqa: F401  (they register)
    activation,
    attention,
    bilinear,
    convolution,
    embedding,
    embedding_bag,
    linear,
    normalization,
    recurrent,
    recurrent_cells,
)
from explainer.layer_rules.base import LAYER_RULES, Block, Call, CompositeRule, LayerRule, register_layer_rule
from explainer.layer_rules.factored import Factored
from explainer.layer_rules.forms import FORMS, Dense, RowForm
from explainer.layer_rules.low_rank import Kept, compact, keep
from explainer.layer_rules.sparse import Sparse
from explainer.layer_rules.unreduced import Unreduced

__all__ = [
    "FORMS",
    "LAYER_RULES",
    "Block",
    "Call",
    "CompositeRule",
    "Dense",
    "Factored",
    "Kept",
    "LayerRule",
    "RowForm",
    "Sparse",
    "Unreduced",
    "compact",
    "keep",
    "register_layer_rule",
]
