"""Process groups: torch.distributed and Megatron's parallel state, set up once per rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_dppo.backend.device import (
    communication_backend,
    install_stand_in,
    mend_without_transformer_engine,
    select_device,
)
from megatron_dppo.weights.layout import Coordinates, Parallel, coordinates


@dataclass(frozen=True)
class Rank:
    """This process within the job: its number, its place in the grids, and the groups others ask for."""

    rank: int
    parallel: Parallel
    at: Coordinates

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """The tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def is_last_stage(self) -> bool:
        """True on the ranks that hold the head."""
        return self.at.pipeline == self.parallel.pipeline - 1

    @property
    def reports(self) -> bool:
        """True on the ranks whose sums are counted: one for each part of the tokens."""
        return self.is_last_stage and self.at.tensor == 0


def initialise_parallel(parallel: Parallel, seed: int, timeout_s: float = 600.0) -> Rank:
    """Joins the job named by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT and builds Megatron's groups.

    Raises ValueError when WORLD_SIZE is not `parallel.ranks`. Collectives: those of group creation.
    """
    world = int(os.environ["WORLD_SIZE"])
    if world != parallel.ranks:
        raise ValueError(f"ranks: got WORLD_SIZE {world}, expected parallel.ranks = {parallel.ranks}")
    install_stand_in()
    mend_without_transformer_engine()
    select_device()
    dist.init_process_group(communication_backend(), timeout=timedelta(seconds=timeout_s))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    rank = dist.get_rank()
    at = coordinates(parallel, rank)
    _assert_same_grid(at)
    return Rank(rank, parallel, at)


def _assert_same_grid(at: Coordinates) -> None:
    """The layouts are computed from `coordinates`; Megatron must agree about who is who."""
    theirs = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_data_parallel_rank(),
    )
    ours = (at.tensor, at.context, at.data, at.pipeline, at.expert_tensor, at.expert, at.expert_data)
    assert theirs == ours, f"Megatron's rank order changed: {theirs}, expected {ours}"


def finalise_parallel() -> None:
    """Leaves the groups; call it on every rank of a job that ended well."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
