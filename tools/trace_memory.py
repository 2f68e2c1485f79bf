"""What ranks of the trainer allocate, against what the planner says: the tables of benchmarks/planner.md.

    python tools/trace_memory.py [NAME...]

Real ranks: over gloo on the CPU, torch's allocations followed by its profiler; on GPUs, one a rank, by their
allocator's count. A minute a run. The runs are those of tests/distributed/memory_runs.py, which
`tests/distributed/test_memory.py` checks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    """Prints a line a run, and a rank where they differ."""
    from tests.distributed.memory_runs import CALIBRATION, CHECKS, OTHERS, planned, traced
    from tests.distributed.rank_pool import RankPool

    runs = CALIBRATION | CHECKS | OTHERS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(runs)}; all that have GPUs enough if none is given"
    )
    most = torch.cuda.device_count() or 2
    names = parser.parse_args().names or [name for name, run in runs.items() if run.parallel.ranks <= most]
    pool = RankPool(max(runs[name].parallel.ranks for name in names))
    print("| run | rank | traced MiB | planned MiB | planned / traced |\n|---|---|---|---|---|")
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            found = traced(pool, runs[name], Path(place))
            expected = planned(runs[name], Path(place))
        for rank, (peak, memory) in enumerate(zip(found, expected, strict=True)):
            print(
                f"| {name} | {rank} | {peak / 2**20:.1f} | {memory.peak / 2**20:.1f} | {memory.peak / peak:.3f} |",
                flush=True,
            )
    pool.close()


if __name__ == "__main__":
    main()
