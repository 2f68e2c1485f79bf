# A site file (see virtual_environment.sh) for containers by apptainer: a command before the one of every step.
# Ranks and engines run in the container. The launcher and the rollout client, which need no GPU, run outside, in a
# virtual environment with the same versions of this project and of torch.
SBATCH_PARTITION=gpu
SBATCH_ACCOUNT=my-project
SITE_SBATCH="--gres=gpu:8"

site_setup() {
    module load apptainer || return 1
    export MEGATRON_DPPO_PYTHON=/shared/envs/megatron_dppo-cpu/bin/python
    export MEGATRON_DPPO_STEP="apptainer exec --nv --bind /shared /shared/images/megatron_dppo.sif"
    export MEGATRON_DPPO_STEP_PYTHON=python3
    export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
}
