"""The pages' commands that need a real engine, in the order of docs/README.md: one short run, and what reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.docs.blocks import INDEX, linked_pages, make_sandbox, page_blocks, run

DEADLINE_S = 480.0  # of a block, one of which starts an engine and trains


@pytest.mark.timeout(600)
def test_commands_do_what_the_pages_say(tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path)
    found = [block for page in linked_pages(INDEX) for block in page_blocks(page) if block.info == "sh engines"]
    assert "megatron-dppo train" in found[0].text, "the first makes the run that the others read"
    for block in found:
        run(block, sandbox, DEADLINE_S)
    records = [json.loads(line) for line in (sandbox / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
    # What debug_a_mismatch.md shows as "-" where a run has no such number.
    for name in ("mismatch", "mismatch_without_replay", "mean_abs_pi_minus_mu", "route_agreement", "staleness"):
        assert all(isinstance(record[name], float) for record in records if "loss" in record), name
