"""A fault in the middle of an update, of either engine's workers. For tests only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def at_box(reload: Any, after: int, what: Callable[..., Any]) -> None:
    """Does `what` with the next box once `after` boxes are taken; the update after that is sound again."""
    sound, taken = reload.place, 0

    def faulty(*args: Any) -> None:
        nonlocal taken
        if taken == after:
            reload.place = sound
            what(*args)
        taken += 1
        sound(*args)

    reload.place = faulty
