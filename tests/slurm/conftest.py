from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, running_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One Slurm for all tests."""
    directory: Path = tmp_path_factory.mktemp("slurm")
    with running_cluster(directory) as running:
        yield running
