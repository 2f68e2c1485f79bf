"""Which checkpoints a run has: their names, what they say of themselves, and which are kept. Reads no tensor."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DIRECTORY = "checkpoints"  # in a run's
DESCRIPTION = "training.json"  # in a checkpoint; written last
QUEUE = "queue"  # in a checkpoint: batches that were sampled and not yet trained
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint says of itself. `step`: steps done, which is also the version of its weights and the next
    step's place in the data: prompts and seeds follow from it and the run's seed.
    """

    step: int
    seed: int
    model_type: str
    dtype: str
    distributed_optimizer: bool
    layout: str
    megatron_core: str


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the state after `step` steps lies."""
    return run_dir / DIRECTORY / f"step-{step:06d}"


def read_state(path: Path) -> TrainingState:
    """Raises ValueError where there is no complete checkpoint."""
    try:
        found: dict[str, Any] = json.loads((path / DESCRIPTION).read_text(encoding="utf-8"))
        return TrainingState(**{field.name: found[field.name] for field in fields(TrainingState)})
    except (OSError, ValueError, KeyError) as error:
        expected = f"auto, never or a complete checkpoint, such as {checkpoint_path(Path('RUN_DIR'), 50)}"
        raise ValueError(f"resume: got {path}, expected {expected}: {error}") from None


def queue_path(checkpoint: Path, step: int) -> Path:
    """Where a checkpoint has the batch that waits to be trained in `step`."""
    return checkpoint / QUEUE / f"step-{step:06d}.safetensors"


def queued_batches(checkpoint: Path) -> dict[int, Path]:
    """The batches that wait in a checkpoint, by step."""
    paths = (checkpoint / QUEUE).glob("step-*.safetensors")
    return {int(match[1]): path for path in paths if (match := _NAME.fullmatch(path.stem))}


def start_of(resume: Path | str) -> int:
    """Steps done before a run: `resume` as the launcher has resolved it, a checkpoint or "never"."""
    return 0 if resume == "never" else read_state(Path(resume)).step


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Oldest first."""
    found = {
        int(match[1]): path
        for path in (run_dir / DIRECTORY).glob("step-*")
        if (match := _NAME.fullmatch(path.name)) and (path / DESCRIPTION).is_file()
    }
    return [found[step] for step in sorted(found)]


def remove_old_checkpoints(run_dir: Path, keep: int) -> None:
    """All but the newest `keep` (and what a kill left unfinished)."""
    for path in complete_checkpoints(run_dir)[:-keep]:
        with contextlib.suppress(OSError):  # somebody reads it: next time
            path.rename(path.with_name(path.name + ".tmp"))  # not complete from one moment to the next
    for path in (run_dir / DIRECTORY).glob("step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def check_resumable(
    state: TrainingState, *, model_type: str, dtype: str, distributed_optimizer: bool, seed: int
) -> None:
    """Raises ValueError naming everything in which a run cannot go on from a checkpoint. Its layout may differ."""
    wanted = {"model_type": model_type, "dtype": dtype, "distributed_optimizer": distributed_optimizer, "seed": seed}
    keys = {"dtype": "model.dtype", "distributed_optimizer": "parallel.distributed_optimizer", "seed": "run.seed"}
    faults = [
        f"{keys.get(name, name)}: got {value}, expected the checkpoint's {getattr(state, name)}"
        for name, value in wanted.items()
        if getattr(state, name) != value
    ]
    if faults:
        raise ValueError("resume: " + "; ".join(faults))
