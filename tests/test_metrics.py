from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from megatron_dppo.metrics import (
    MetricsWriter,
    Progress,
    plot_learning_curve,
    progress_header,
    progress_row,
    read_metrics,
    write_summary,
)

STEP = {
    "reward": 0.5,
    "accuracy": 0.5,
    "mean_abs_pi_minus_mu": 0.00123,
    "entropy": 0.75,
    "masked_share_positive": 0.01,
    "masked_share_negative": 0.025,
    "response_length": 12.0,
    "seconds/rollout": 1.25,
    "seconds/train": 0.5,
}


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_each_step_is_one_line_flushed_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, STEP)
    writer.write(2, {"reward": math.nan, "entropy": math.inf, "accuracy": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # before close
    assert json.loads(lines[0]) == {"step": 1} | STEP
    assert json.loads(lines[1]) == {"step": 2, "reward": None, "entropy": None, "accuracy": 1.0}
    writer.close()
    with MetricsWriter(tmp_path, tensorboard=False) as resumed:
        resumed.write(3, {"reward": 1.0})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(1, {"reward": 0.25, "entropy": math.nan})
        writer.write(2, {"reward": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.75)]


def test_progress_rows_stand_under_their_header() -> None:
    header, row = progress_header(), progress_row(3, STEP)
    assert " ".join(row.split()) == ("3 0.500 0.500 0.00123 0.750 1.00% 2.50% 12.0 rollout 1.25 train 0.50")
    for title, value in (
        ("reward", "0.500"),
        ("|pi-mu|", "0.00123"),
        ("mask A<0", "2.50%"),
        ("length", "12.0"),
    ):
        assert header.index(title) + len(title) == row.index(value, header.index(title) - 3) + len(value)
    assert progress_row(4, {"reward": 1.0}).split() == ["4", "1.000", *"------"]


def test_the_terminal_shows_rows_and_evaluations(tmp_path: Path) -> None:
    console = quiet()
    progress = Progress(tmp_path / "metrics.jsonl", console)
    progress()  # nothing there yet
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"eval/accuracy_greedy": 0.31, "eval/accuracy_sampled": 0.456})
        progress()
        for step in (1, 2):
            writer.write(step, STEP)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3')  # half a line
        progress()
        progress()
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "    0 held-out accuracy: greedy 0.310, sampled 0.456"
    assert [line.split()[0] for line in lines[1:]] == ["step", "1", "2"]


def test_the_summary_is_whole_or_absent(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", {"accuracy_after": 0.97, "steps": 40, "worst": math.nan})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "accuracy_after": 0.97,
        "steps": 40,
        "worst": None,
    }
    with pytest.raises(TypeError):
        write_summary(tmp_path / "summary.json", {"steps": object()})
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 40


def test_the_learning_curve_is_a_picture_with_every_curve(tmp_path: Path) -> None:
    from matplotlib.image import imread

    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 31):
            evaluated = {"eval/accuracy_greedy": step / 30, "eval/accuracy_sampled": step / 35} if step % 5 == 0 else {}
            writer.write(step, STEP | {"reward": step / 32} | evaluated)
    plot_learning_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    image = imread(tmp_path / "curve.png")
    assert image.shape[:2] == (840, 1320)
    # Ink beyond axes and text: matplotlib's first and second line colours are in all four panels' quadrants.
    blue = (abs(image[..., :3] - [0x1F / 255, 0x77 / 255, 0xB4 / 255]) < 0.02).all(-1)
    for rows in (slice(0, 420), slice(420, 840)):
        for columns in (slice(0, 660), slice(660, 1320)):
            assert blue[rows, columns].sum() > 100
