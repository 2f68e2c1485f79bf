"""The pages' commands that need no engine, run as a reader would paste them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, Block, make_sandbox, page_blocks, run

DEADLINE_S = 400.0  # of a block: commands of a few seconds each, on a machine that may be busy


def to_run(page: Path) -> list[Block]:
    return [block for block in page_blocks(page) if block.info == "sh" or block.info.startswith("sh exits")]


@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=lambda page: page.name)
def test_commands_do_what_the_page_says(page: Path, tmp_path: Path) -> None:
    sandbox = make_sandbox(tmp_path)
    for block in to_run(page):
        run(block, sandbox, DEADLINE_S)


def test_a_command_that_fails_or_prints_something_else_is_found(tmp_path: Path) -> None:
    run(Block("here", "sh", "echo one; echo two; echo three", ("one", "...", "three")), tmp_path, DEADLINE_S)
    run(Block("here", "sh exits 3", "exit 3"), tmp_path, DEADLINE_S)
    for info, text, output in (
        ("sh", "false; true", ()),
        ("sh", "false | true", ()),
        ("sh", "echo $NOT_SET", ()),
        ("sh exits 2", "true", ()),
        ("sh", "echo one; echo two; echo three", ("one", "three")),
        ("sh", "echo two; echo one", ("one", "...", "two")),
    ):
        with pytest.raises(AssertionError, match="^here: "):
            run(Block("here", info, text, output), tmp_path, DEADLINE_S)
