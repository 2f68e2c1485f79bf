S="configs/quickstart.yaml run.dir=/tmp/newcomer/run training.steps=2 training.minibatches=1 rollout.prompts_per_step=8 rollout.samples_per_prompt=4 evaluation.prompts=16 evaluation.sampled=false logging.plot=false"
mine() { ps -eo pid,ppid,pgid,etimes,args | grep -E "/work/wt/newcomer|/tmp/newcomer" | grep -v grep; ls -d /dev/shm/megatron_dppo-* /dev/shm/psm* /dev/shm/sem* 2>/dev/null; }
