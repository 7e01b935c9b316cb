"""What layers of the language model read, for methods that act inside the vision tower."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import zoo
from winnow.bench.meters import read_by_layer
from winnow.core.budget import Budget
from winnow.core.plan import Plan
from winnow.core.registry import method_class
from winnow.engine.compress import compress


@pytest.mark.parametrize("slug", ["tome", "flowcut", "auroracap"])
def test_blocks_of_the_tower_are_no_layers_of_the_language_model(slug):
    content = zoo.tokens_of("llava_clip", "A")
    plan = Plan.of(method_class(slug).configured().at_budget(Budget(5), content))
    with torch.no_grad(), compress(zoo.model("llava_clip"), plan) as handle:
        handle.model(**zoo.inputs("llava_clip", zoo.SINGLE))
        ledger, item = handle.last, handle.last.items[0]
    assert any(point.startswith(("blocks[1]", "blocks[2]")) for point, _, _ in item.reductions)
    read = read_by_layer(item, len(ledger.layer_tokens))
    assert len(read) == len(ledger.layer_tokens)
    assert all(np.array_equal(np.sort(ids[ids >= 0]), np.sort(item.kept.numpy())) for ids in read)
