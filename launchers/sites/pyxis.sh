# A site file (see virtual_environment.sh) for containers by enroot and pyxis: Slurm's own option --container-image.
# Ranks and engines run in the container. The launcher and the rollout client, which need no GPU, run outside, in a
# virtual environment with the same versions of this project and of torch.
SBATCH_PARTITION=gpu
SBATCH_ACCOUNT=my-project
SITE_SBATCH="--gpus-per-node=8"

site_setup() {
    export MEGATRON_DPPO_PYTHON=/shared/envs/megatron_dppo-cpu/bin/python
    # The project, the models and the run's directory under the same paths as outside.
    export MEGATRON_DPPO_SRUN="--container-image=/shared/images/megatron_dppo.sqsh --container-mounts=/shared:/shared --container-workdir=$PWD"
    export MEGATRON_DPPO_STEP_PYTHON=python3
    export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
}
