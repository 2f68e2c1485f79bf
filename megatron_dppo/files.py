"""Files that are there whole or not at all, and what to say of one that is not what was expected."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LFS_POINTER = b"version https://git-lfs"


class UnreadableFile(ValueError):
    """A file that is there and does not hold what it should; the message names it."""


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write to, which takes its place at the end; after an error `path` is as it was."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises UnreadableFile where the file holds anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnreadableFile(f"{path}: is not JSON{pointer_note(path)}: {error}") from None
    if not isinstance(found, dict):
        raise UnreadableFile(f"{path}: got a JSON {type(found).__name__}, expected an object")
    return found


def pointer_note(path: Path) -> str:
    """What to add to an error about a file that git left for `git lfs` to fetch; nothing for others."""
    with path.open("rb") as file:
        pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    return " (it is a git-lfs pointer: `git lfs pull` fetches the file)" if pointer else ""


def absent(kind: str, path: Path) -> str:
    """That there is no `kind` ("file" or "directory") at `path`, and what else; a relative path with where from."""
    if path.exists():
        return f"{path} is a {'directory' if path.is_dir() else 'file'}"
    return f"no {kind} {path}" if path.is_absolute() else f"no {kind} {path} in {Path.cwd()}"
