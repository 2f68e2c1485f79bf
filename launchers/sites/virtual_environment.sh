# A site file: bash, given as `megatron-dppo launch slurm CONFIG --site FILE`. Copy one of these and adapt it.
#
# Variables are read at submission. SBATCH_*: sbatch's own ("INPUT ENVIRONMENT VARIABLES" of its manual); SITE_SBATCH:
# further words for sbatch, the last on its command line.
SBATCH_PARTITION=gpu
SBATCH_ACCOUNT=my-project
SBATCH_TIMELIMIT=24:00:00
SITE_SBATCH="--gres=gpu:8"

# Called on the first node before anything starts; what is exported here reaches every process of the job.
site_setup() {
    module load cuda/13.0 || return 1
    # A virtual environment that all nodes see; by default it is the one in which `launch slurm` was called.
    export MEGATRON_DPPO_PYTHON=/shared/envs/megatron_dppo/bin/python

    # NCCL and gloo over the fabric: names of this site's devices.
    export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
    export NCCL_IB_HCA=mlx5
}
