"""Whether a job's processes run where its launcher does, as the environment and the config say."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_dppo.config.rules import RULES, Rule, submission_rules

if TYPE_CHECKING:
    from megatron_dppo.config import ClusterConfig

JOB_VARIABLE = "SLURM_JOB_ID"
# A site's, in the environment of the batch script:
SRUN_VARIABLE = "MEGATRON_DPPO_SRUN"  # words for srun, such as a container's options
STEP_VARIABLE = "MEGATRON_DPPO_STEP"  # words before the command of every step, such as `apptainer exec --nv IMAGE`
RESTARTED_VARIABLE = "MEGATRON_DPPO_RESTARTED"  # the batch script's: this is not the job's first start


def elsewhere(cluster: ClusterConfig, environ: Mapping[str, str] = os.environ) -> bool:
    """On several machines, or in containers that Slurm's steps enter and the launcher does not."""
    contained = JOB_VARIABLE in environ and any(environ.get(name) for name in (SRUN_VARIABLE, STEP_VARIABLE))
    return cluster.machines > 1 or contained


def rules_of_job(cluster: ClusterConfig) -> Sequence[Rule]:
    """What the launcher can check of a job that it starts."""
    return submission_rules(cluster) if elsewhere(cluster) else RULES
