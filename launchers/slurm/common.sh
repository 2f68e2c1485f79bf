# Sourced by the scripts beside it, on the first node of an allocation. What a site needs comes from its site file
# (launchers/sites/, docs/slurm.md): nothing here is to be edited.
set -u

if [ -n "${MEGATRON_DPPO_SITE:-}" ]; then
    . "$MEGATRON_DPPO_SITE"
    if declare -F site_setup >/dev/null; then
        site_setup || { echo "$MEGATRON_DPPO_SITE: site_setup failed" >&2; exit 1; }
    fi
fi

megatron_dppo=("${MEGATRON_DPPO_PYTHON:-python3}" -m megatron_dppo.cli)

# Trains; goes on from the newest checkpoint where this is not the job's first start. Before the time limit Slurm sends
# this shell SIGUSR1 (sbatch --signal=B:USR1@SECONDS): the run saves a checkpoint and ends with code 75, and the job
# goes back into the queue.
train_and_requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
        set -- "$@" resume=auto
    fi
    echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST, $(date)"
    "${megatron_dppo[@]}" train "$@" &
    local head=$! signalled=yes code=0
    trap 'signalled=yes; kill -USR1 "$head" 2>/dev/null' USR1
    trap 'signalled=yes; kill -TERM "$head" 2>/dev/null' TERM
    while [ -n "$signalled" ]; do # a signal ends `wait` before its time
        signalled=
        wait "$head"
        code=$?
    done
    if [ "$code" -eq 75 ]; then
        echo "job $SLURM_JOB_ID goes back into the queue, $(date)"
        if scontrol requeue "$SLURM_JOB_ID"; then
            sleep 60 # Slurm ends this shell
        else
            echo "could not be requeued: submit it again with resume=auto" >&2
        fi
    fi
    return "$code"
}
