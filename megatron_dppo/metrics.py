"""What a run leaves to be read: metrics.jsonl, TensorBoard events, the progress on the terminal, the learning
curve.

A metric is a number by name. `COLUMNS` names those that the progress row and the figure show; any other goes
to the files just the same. Held-out accuracies are `eval/accuracy_greedy` and `eval/accuracy_sampled`, of a
set with a name `eval/<set>/accuracy_greedy`, `eval/<set>/avg@32` and so on, and the seconds of a phase
`seconds/<phase>`.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from megatron_dppo.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = "metrics.jsonl"  # in a run's directory
REWARD = "reward"
ACCURACY = "accuracy"
MEAN_ABS_PI_MINUS_MU = "mean_abs_pi_minus_mu"
MISMATCH = "mismatch"
ENTROPY = "entropy"
MASKED_POSITIVE = "masked_share_positive"  # of the tokens with A > 0
MASKED_NEGATIVE = "masked_share_negative"  # of the tokens with A < 0
RESPONSE_LENGTH = "response_length"
EVALUATION = "eval/"
SECONDS = "seconds/"


class Column(NamedTuple):
    """A metric in the progress row."""

    key: str
    title: str
    format: str


COLUMNS = (
    Column(REWARD, "reward", "{:.3f}"),
    Column(ACCURACY, "acc", "{:.3f}"),
    Column(MEAN_ABS_PI_MINUS_MU, "|pi-mu|", "{:.5f}"),
    Column(ENTROPY, "entropy", "{:.3f}"),
    Column(MASKED_POSITIVE, "mask A>0", "{:.2%}"),
    Column(MASKED_NEGATIVE, "mask A<0", "{:.2%}"),
    Column(RESPONSE_LENGTH, "length", "{:.1f}"),
)
ROWS_PER_HEADER = 20


class MetricsWriter:
    """Writes each step's metrics to `<directory>/metrics.jsonl` (appended) and to TensorBoard.

    `start`: the first step that comes, where a run goes on. Use as a context manager, or call `close`.
    """

    def __init__(self, directory: Path | str, *, tensorboard: bool, start: int = 0):
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / METRICS
        self._file = self.path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start or None)

    def write(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Records the metrics of `step`. A number that is not finite is null in the file; words go only there."""
        self._file.write(json.dumps({"step": step} | _finite(metrics), allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in metrics.items():
                if not isinstance(value, str) and math.isfinite(value):
                    self._events.add_scalar(name, value, step)
            self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Progress:
    """Shows a run on the terminal from its metrics.jsonl as another process writes it: call it now and then."""

    def __init__(self, path: Path, console: Console):
        self._path, self._console = path, console
        self._position = self._rows = 0

    def __call__(self) -> None:
        """Prints the records that have come since the last call."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                self._position += len(line)
                self._show(json.loads(line))

    def _show(self, record: dict[str, Any]) -> None:
        metrics = {name: value for name, value in record.items() if value is not None}
        # An evaluation is of the weights before the step's training.
        if evaluation_of(metrics):
            self._print(evaluation_row(record["step"], metrics))
        if any(column.key in metrics for column in COLUMNS):
            if self._rows % ROWS_PER_HEADER == 0:
                self._print(progress_header())
            self._rows += 1
            self._print(progress_row(record["step"], metrics))

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def progress_header() -> str:
    """Titles over `progress_row`."""
    return " ".join(["step".rjust(5), *(column.title.rjust(_width(column)) for column in COLUMNS), " seconds"])


def progress_row(step: int, metrics: Mapping[str, float]) -> str:
    """One line: the step, `COLUMNS` ("-" where absent) and the seconds of each phase."""
    cells = [
        (column.format.format(metrics[column.key]) if column.key in metrics else "-").rjust(_width(column))
        for column in COLUMNS
    ]
    seconds = [f"{key.removeprefix(SECONDS)} {v:.2f}" for key, v in metrics.items() if key.startswith(SECONDS)]
    return " ".join([str(step).rjust(5), *cells, " " + " ".join(seconds)]).rstrip()


def evaluation_row(step: int, metrics: Mapping[str, float]) -> str:
    """One line: held-out accuracies."""
    found = [f"{_eval_label(name)} {value:.3f}" for name, value in evaluation_of(metrics).items()]
    return f"{step:5d} held-out accuracy: {', '.join(found)}"


def evaluation_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The held-out accuracies of a record; empty where nothing was evaluated."""
    return {name: value for name, value in record.items() if name.startswith(EVALUATION)}


def _eval_label(name: str) -> str:
    """`greedy`, `aime24/avg@32`."""
    return name.removeprefix(EVALUATION).replace("accuracy_", "")


class Laps:
    """Seconds by phase, since the last restart."""

    def __init__(self) -> None:
        self._started = self._mark = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def end(self, phase: str) -> None:
        """Counts the time since the last call as `phase`'s."""
        now = time.perf_counter()
        self._seconds[phase] += now - self._mark
        self._mark = now

    def restart(self) -> dict[str, float]:
        """What was counted, and the `total` since the last restart; from now on anew."""
        found = {**self._seconds, "total": time.perf_counter() - self._started}
        self._seconds.clear()
        self._started = self._mark = time.perf_counter()
        return found


def write_summary(path: Path | str, summary: Mapping[str, Any]) -> None:
    """Writes the run's summary as JSON, beside and then renamed, so that no reader sees half of it."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in file order. A last line cut short by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            records.append(json.loads(line))
    return records


def keep_records_before(path: Path, start: int) -> None:
    """Drops the records of step `start` and later ones from a metrics.jsonl; written beside and renamed."""
    kept = [record for record in read_metrics(path) if record["step"] < start]
    with replacing(path) as beside:
        beside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def plot_learning_curve(metrics_path: Path | str, png_path: Path | str) -> None:
    """Draws accuracy and reward, |pi - mu|, entropy and the masked share over the steps into a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(metrics_path)
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2, sharex=True)
    accuracy, mismatch, entropy, masked = panels.flat
    _draw(accuracy, records, {REWARD: "training reward"}, color="tab:gray", alpha=0.7)
    evaluated = dict.fromkeys(name for record in records for name in evaluation_of(record))
    _draw(accuracy, records, {name: f"held-out, {_eval_label(name)}" for name in evaluated}, marker="o")
    _draw(mismatch, records, {MEAN_ABS_PI_MINUS_MU: "with the step's updates", MISMATCH: "same weights"})
    _draw(entropy, records, {ENTROPY: "training"})
    _draw(masked, records, {MASKED_POSITIVE: "A > 0", MASKED_NEGATIVE: "A < 0"})
    _label(accuracy, "Reward and held-out accuracy", "share of right answers")
    _label(mismatch, "Mean $|\\pi - \\mu|$ of the sampled tokens", "probability")
    _label(entropy, "Entropy of the policy", "nats per token")
    _label(masked, "Tokens masked by the trust region", "share of the tokens of that sign")
    accuracy.set_ylim(-0.02, 1.02)
    for panel in (mismatch, entropy, masked):
        panel.set_ylim(bottom=0)
    for panel in panels[1]:
        panel.set_xlabel("training step")
    with replacing(png_path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def _draw(panel: Axes, records: list[dict[str, Any]], names: Mapping[str, str], **style: Any) -> None:
    """One line for each metric that was recorded at all."""
    for key, label in names.items():
        points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), label=label, **{"linewidth": 1.6, "markersize": 4, **style})


def _label(panel: Axes, title: str, y: str) -> None:
    panel.set_title(title, fontsize=11)
    panel.set_ylabel(y)
    panel.grid(alpha=0.3)
    if len(panel.get_lines()) > 1:
        panel.legend(fontsize=9)


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinities as None: JSON has no word for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def _width(column: Column) -> int:
    return max(len(column.title), 7)
