"""What the pages say (fenced blocks, code in the text, links, headings), and a directory to run their commands in.

The word after a block's fence says who runs it:

- `sh`: test_pages.py, as pasted, the blocks of a page in order; `sh exits 2` must end with that exit code;
- `sh engines`: tests/engines/test_docs_engines.py, those of all pages in the order of docs/README.md;
- `text` after one of these: lines that its output must have, in this order; a line "..." stands for any others;
- none: nobody runs it (a syntax, a GPU, a cluster, what another target of CI runs); its words are checked all the same.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
INDEX = REPOSITORY / "docs" / "README.md"
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
INFOS = re.compile(r"(sh|sh exits \d+|sh engines|text|python|yaml|)")

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_JOINTS = {"|", "&&", "||", ";"}
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


@dataclass(frozen=True)
class Block:
    """A fenced block. `output`: the `text` block after it, if there is one."""

    where: str
    info: str
    text: str
    output: tuple[str, ...] = ()


def blocks(markdown: str, name: str) -> list[Block]:
    """All fenced blocks of a page called `name`."""
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(markdown):
        where = f"{name}:{markdown.count(chr(10), 0, match.start()) + 1}"
        info, text = match[1].strip(), match[2]
        follows = found and not markdown[end : match.start()].strip()
        if info == "text" and follows and found[-1].info.startswith("sh"):
            before = found.pop()
            found.append(Block(before.where, before.info, before.text, tuple(text.splitlines())))
        found.append(Block(where, info, text))
        end = match.end()
    return found


def page_blocks(page: Path) -> list[Block]:
    """The same of a file."""
    return blocks(page.read_text(), str(page.relative_to(REPOSITORY)))


def code_in_text(markdown: str) -> list[str]:
    """What stands between single backticks; a line's end in it is a space."""
    return [" ".join(found.split()) for found in _CODE.findall(_FENCE.sub("", markdown))]


def links(markdown: str) -> list[str]:
    """Targets of links in the text, those to other sites left out."""
    return [target for target in _LINK.findall(_FENCE.sub("", markdown)) if "://" not in target]


def anchors(markdown: str) -> set[str]:
    """A page's headings as GitHub names them."""
    headings = _HEADING.findall(_FENCE.sub("", markdown))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def linked_pages(page: Path) -> list[Path]:
    """The pages that a page links to, in its order, each once."""
    targets = [page.parent / link.partition("#")[0] for link in links(page.read_text())]
    return list(dict.fromkeys(target.resolve() for target in targets if target.suffix == ".md"))


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of some lines of shell, in words; variables set before them and comments are left out."""
    for line in text.replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a diagram's or a sentence's quotation mark
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            ends = word in _JOINTS or word.endswith(";")
            if word not in _JOINTS and (command or not _ASSIGNMENT.fullmatch(word)):
                command.append(word.removesuffix(";"))
            if ends and command:
                yield command
                command = []


def make_sandbox(path: Path) -> Path:
    """A directory that looks like a checkout whose quickstart has its input, the model untrained."""
    from megatron_dppo.data.addition import sample_problems, write_problems
    from tools.make_quickstart_input import write_initial_model

    for name in ("Makefile", "configs", "docs", "launchers", "megatron_dppo", "tests", "tools"):
        (path / name).symlink_to(REPOSITORY / name)
    quickstart = path / "runs" / "quickstart" / "input"
    quickstart.mkdir(parents=True)
    rng = random.Random(0)
    write_problems(quickstart / "train.jsonl", sample_problems(rng, 256, held_out=False))
    write_problems(quickstart / "heldout.jsonl", sample_problems(rng, 64, held_out=True))
    write_initial_model(quickstart / "model", seed=0)
    return path


def run(block: Block, directory: Path, timeout_s: float) -> None:
    """Runs a block as bash would, with this environment's programs first, and compares exit code and output."""
    env = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(REPOSITORY),
        "COLUMNS": "160",  # of the tables that are printed
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=directory, env=env, timeout=timeout_s, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    exits = re.fullmatch(r"sh exits (\d+)", block.info)
    expected = int(exits[1]) if exits else 0
    assert done.returncode == expected, f"{block.where}: exit code {done.returncode}, not {expected}\n{done.stdout}"
    missing = first_missing(block.output, done.stdout)
    assert missing is None, f"{block.where}: the output has no line {missing!r} there\n{done.stdout}"


def first_missing(expected: tuple[str, ...], output: str) -> str | None:
    """The first of the expected lines that the output does not have; without "..." they follow one another."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    position, anywhere = 0, True
    for wanted in (" ".join(line.split()) for line in expected):
        if wanted == "...":
            anywhere = True
            continue
        within = lines[position:] if anywhere else lines[position : position + 1]
        if wanted not in within:
            return wanted
        position += within.index(wanted) + 1
        anywhere = False
    return None
