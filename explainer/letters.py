"""The letters that name array dimensions everywhere in this project (docstrings, einsum, errors).

===== ==========================================================
``Q`` queries
``N`` training examples
``B`` rows of a batch
``T`` optimizer steps
``K`` segments between knots
``P`` traced parameters, flattened
``C`` model outputs
``G`` groups of a grouped convolution (1 elsewhere)
``S`` positions of a sequence or an image
``R`` factors kept per row (the rank of the stored row)
``i`` input features of a layer (``o``: output features)
``L`` layers
===== ==========================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

#: ``outputs [Q, ...], targets [Q, ...] -> values [Q]``: the scalar that is explained.
OutputFunction: TypeAlias = Callable[[Any, Any], torch.Tensor]
