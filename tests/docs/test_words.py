"""What the pages name is there: targets, commands, options, keys of the config, files, pages, headings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from megatron_dppo.cli import app
from megatron_dppo.config import Config
from megatron_dppo.config.loading import ConfigError, load_config
from tests.docs.blocks import (
    INDEX,
    INFOS,
    PAGES,
    REPOSITORY,
    anchors,
    blocks,
    code_in_text,
    commands,
    linked_pages,
    links,
    page_blocks,
)

RECIPE = REPOSITORY / "configs" / "quickstart.yaml"
SECTION = rf"({'|'.join(Config.model_fields)})"
OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=.+")
KEY = re.compile(rf"{SECTION}\.(?!\w+$(?<=\.json))[a-z_.]*[a-z_]")
TAKES_OVERRIDES = {"megatron-dppo", "tools/make_cut.py"}
NUMBERS = {"N": "1", "SECONDS": "1"}  # where a syntax has a placeholder for one
FOLDERS = ("docs", "tests", "tools", "configs", "launchers", "benchmarks", "requirements", "megatron_dppo")
FILE = re.compile(rf"(({'|'.join(FOLDERS)})/[\w./*-]*|[\w./*-]+\.(py|md|sh|sbatch))(::\w+)?")

CLI = typer.main.get_command(app)
UsageError = typer.BadParameter.__mro__[1]  # of the click that typer has brought
MAKEFILE = (REPOSITORY / "Makefile").read_text()


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def written(markdown: str, *, refused: bool = True) -> Iterator[list[str]]:
    """Every command that a page names, in a block or in the text; `refused`: also of blocks that end with an error."""
    for block in blocks(markdown, "page"):
        if block.info in ("", "sh", "sh engines") or (refused and block.info.startswith("sh")):
            yield from commands(block.text)
    for text in code_in_text(markdown):
        yield from commands(text)


# What is wrong with a page, in a line each ----------------------------------------------------------


def wrong_targets(markdown: str) -> Iterator[str]:
    """`make X` whose X, or whose variable, the Makefile does not have."""
    targets = {target for rule in re.findall(r"^([\w./ -]+):(?!=)", MAKEFILE, re.MULTILINE) for target in rule.split()}
    variables = set(re.findall(r"^(\w+) *\??=", MAKEFILE, re.MULTILINE))
    for command in written(markdown):
        if command[0] == "make":
            for word in command[1:]:
                if word.partition("=")[0] not in (variables if "=" in word else targets):
                    yield f"make: no {word}"


def wrong_commands(markdown: str) -> Iterator[str]:
    """`megatron-dppo X` that the program does not take, but for missing arguments."""
    for command in written(markdown):
        if "megatron-dppo" not in command:
            continue
        words = [NUMBERS.get(word, word) for word in _of_syntax(command[command.index("megatron-dppo") + 1 :])]
        try:
            _parse(CLI, CLI.context_class(CLI), words)
        except UsageError as error:
            yield f"{' '.join(command)}: {error.format_message()}"


def _of_syntax(words: list[str]) -> Iterator[str]:
    """A syntax's words as a command's: brackets and dots away, the first of several alternatives."""
    for word in words:
        word = word.strip("[]").removesuffix("...").removesuffix("]")
        if word:
            yield word.split("|")[0]


def _parse(command: Any, context: Any, words: list[str]) -> None:
    """Raises what the program would for these words, values of options included."""
    if hasattr(command, "resolve_command"):  # a group
        if words and not words[0].startswith("-"):
            name, found, rest = command.resolve_command(context, words)
            _parse(found, found.context_class(found, info_name=name, parent=context), rest)
        return
    values, _, _ = command.make_parser(context).parse_args(list(words))
    for parameter in command.params:
        if isinstance(value := values.get(parameter.name), str):
            parameter.process_value(context, value)


def wrong_keys(markdown: str) -> Iterator[str]:
    """KEY=VALUE, and `section.key` in the text, that no recipe can have."""
    for command in written(markdown, refused=False):
        if len(command) == 1 or TAKES_OVERRIDES.intersection(command):
            for word in command:
                if OVERRIDE.fullmatch(word):
                    yield from _faults(word)
    for text in code_in_text(markdown):
        if KEY.fullmatch(text):
            yield from (fault for fault in _faults(f"{text}=") if "unknown key" in fault)


def _faults(override: str) -> list[str]:
    """Of one override; a value in capitals is a placeholder."""
    try:
        load_config(RECIPE, [override], rules=())
    except ConfigError as error:
        placeholder = override.rpartition("=")[2].isupper()
        return [fault for fault in error.faults if not placeholder or "unknown key" in fault]
    return []


def wrong_files(markdown: str) -> Iterator[str]:
    """Files of this project that are not there."""
    words = [word for command in written(markdown) for word in command]
    for word in words:
        match = FILE.fullmatch(word.rstrip(",;:"))
        if match and "/" in match[1] and not _exists(match[1]):
            yield f"no file {word}"


def _exists(name: str) -> bool:
    roots = (REPOSITORY, REPOSITORY / "megatron_dppo", REPOSITORY / "docs")
    return any(next(root.glob(name.rstrip("/")), None) is not None for root in roots)


def wrong_links(markdown: str, page: Path = REPOSITORY / "docs" / "page.md") -> Iterator[str]:
    """Links to files or headings that are not there."""
    for link in links(markdown):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if name and not target.exists():
            yield f"link to {link}: no such file"
        elif anchor and anchor not in anchors(target.read_text() if name else markdown):
            yield f"link to {link}: no such heading"


def wrong_fences(markdown: str) -> Iterator[str]:
    """Words after a fence that say nothing about who runs the block; fences that open or close none."""
    found = blocks(markdown, "page")
    if markdown.count("```") != 2 * len(found):
        yield f"{markdown.count('```')} fences for {len(found)} blocks"
    for block in found:
        if not INFOS.fullmatch(block.info):
            yield f"{block.where}: a block {block.info!r}"


CHECKS = (wrong_targets, wrong_commands, wrong_keys, wrong_files, wrong_fences)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_is_there(page: Path) -> None:
    markdown = page.read_text()
    found = [fault for check in CHECKS for fault in check(markdown)] + list(wrong_links(markdown, page))
    assert found == []


def test_every_task_has_commands_that_are_run() -> None:
    tasks = INDEX.read_text().partition("**Tasks**")[2].partition("**Reference**")[0]
    pages = [INDEX.parent / link for link in links(tasks)]
    assert len(pages) >= 7  # train, convert, choose a layout, metrics, a mismatch, a model, an objective
    idle = [page.name for page in pages if not any(block.info.startswith("sh") for block in page_blocks(page))]
    assert idle == []


def test_the_index_has_every_page() -> None:
    listed = linked_pages(INDEX)
    missing = [page.name for page in PAGES if page not in (INDEX, REPOSITORY / "README.md") and page not in listed]
    assert missing == []


@pytest.mark.parametrize(
    ("check", "markdown", "fault"),
    [
        (wrong_targets, "Say `make tset`.", "make: no tset"),
        (wrong_targets, "```\nmake quickstart ENGIN=sglang\n```\n", "make: no ENGIN=sglang"),
        (wrong_commands, "Say `megatron-dppo tran`.", "megatron-dppo tran: No such command 'tran'."),
        (wrong_commands, "```\nmegatron-dppo plan R --sugest 4x8\n```\n", "No such option: --sugest"),
        (wrong_commands, "```\nmegatron-dppo launch slurm R --kind trian\n```\n", "'trian' is not one of"),
        (wrong_commands, "```sh\nX=1 megatron-dppo plan R \\\n  --no | head\n```\n", "No such option: --no"),
        (wrong_keys, "```\nmegatron-dppo train R training.step=1\n```\n", "did you mean training.steps?"),
        (wrong_keys, "Say `rollout.engine=vlm`.", "rollout.engine: got 'vlm'"),
        (wrong_keys, "It is `rollout.staleness`.", "rollout.staleness: unknown key"),
        (wrong_files, "```\npython tools/make_cuts.py R OUT\n```\n", "no file tools/make_cuts.py"),
        (wrong_files, "See `weights/maping.py`.", "no file weights/maping.py"),
        (wrong_links, "[a](nowhere.md)", "link to nowhere.md: no such file"),
        (wrong_links, "[a](recipes.md#evaluations)", "link to recipes.md#evaluations: no such heading"),
        (wrong_links, "# One thing\n[a](#two-things)", "link to #two-things: no such heading"),
        (wrong_fences, "```shell\ntrue\n```\n", "page:1: a block 'shell'"),
        (wrong_fences, "- one\n  ```sh\n  true\n  ```\n", "2 fences for 0 blocks"),
    ],
)
def test_what_is_not_there_is_found(check: Callable[[str], Iterator[str]], markdown: str, fault: str) -> None:
    (found,) = check(markdown)
    assert fault in found
