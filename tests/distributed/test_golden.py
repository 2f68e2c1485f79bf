"""The losses of a fixed tiny run, as they were. A change that moves them has to say so, and to write them anew:

MDPPO_WRITE_GOLDEN=1 python -m pytest tests/distributed/test_golden.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_dppo.weights.layout import Parallel
from tests.distributed.proof import proof
from tests.distributed.rank_pool import RankPool
from tests.distributed.test_layouts import LEAST_MARGIN, MODELS, Case, config, order_of
from tests.tiny_models import tiny_model, write_checkpoint

GOLDEN = Path(__file__).with_name("golden_losses.json")
STEPS = 20
TOLERANCE = 1e-3 if torch.cuda.is_available() else 1e-5  # relative: other processors sum in another order


def test_the_first_losses_are_those_of_before(ranks: RankPool, tmp_path: Path) -> None:
    model, _ = MODELS["moe"]
    path = write_checkpoint(tmp_path / "model", tiny_model(model, seed=5))
    settings = config(Case(Parallel()), path)
    training = settings.training.model_copy(update={"lr": 1e-6})  # routers keep their margin
    settings = settings.model_copy(update={"training": training})
    order = order_of(Case(Parallel()), settings, path, tmp_path)
    (found,) = ranks.run(proof, Parallel(), path, settings, order, STEPS, tmp_path)
    losses = [metrics["loss"] for metrics in found.metrics]
    if os.environ.get("MDPPO_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    assert found.margin >= LEAST_MARGIN
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=TOLERANCE, abs=1e-7)
    assert abs(losses[-1] - losses[0]) > 1e-2
