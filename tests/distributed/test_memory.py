"""The planner's peak of every rank against what torch allocates there; `tools/trace_memory.py` prints the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed.memory_runs import CALIBRATION, CHECKS, planned, traced
from tests.distributed.rank_pool import RankPool


@pytest.mark.parametrize("name", [*CHECKS, *(CALIBRATION if "MDPPO_ALL_PAIRS" in os.environ else ())])
def test_peaks_are_as_planned(ranks: RankPool, name: str, tmp_path: Path) -> None:
    """The constants were frozen on the three of `CALIBRATION`; a plan is within a tenth of the trace on all."""
    run = (CALIBRATION | CHECKS)[name]
    found = traced(ranks, run, tmp_path)
    expected = [memory.peak for memory in planned(run, tmp_path)]
    assert expected == pytest.approx(found, rel=0.1)
