# Sourced by the scripts beside it, on the first node of an allocation. What a site needs comes from its site file
# (launchers/sites/, docs/slurm.md): nothing here is to be edited.

unset MEGATRON_DPPO_NODES MEGATRON_DPPO_ON # of the way without Slurm, in whoever's environment this was submitted from
if [ -n "${MEGATRON_DPPO_SITE:-}" ]; then
    . "$MEGATRON_DPPO_SITE"
    if declare -F site_setup >/dev/null; then
        site_setup || { echo "$MEGATRON_DPPO_SITE: site_setup failed" >&2; exit 1; }
    fi
fi
set -u # not before: modules and activation scripts read variables that are not there

megatron_dppo=("${MEGATRON_DPPO_PYTHON:-python3}" -m megatron_dppo.cli)
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    export MEGATRON_DPPO_RESTARTED=1 # a run goes on from its own newest checkpoint, whatever the recipe says of resume
fi

# Trains. Before the time limit Slurm sends this shell SIGUSR1 (sbatch --signal=B:USR1@SECONDS): the run saves a
# checkpoint and ends with code 75, and the job goes back into the queue. So it does where the run failed because a node
# is gone, which Slurm itself notices later than the run does.
train_and_requeue() {
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
    if [ "$code" -eq 75 ] || { [ "$code" -eq 1 ] && node_is_gone; }; then
        echo "job $SLURM_JOB_ID goes back into the queue, $(date)"
        if scontrol requeue "$SLURM_JOB_ID"; then
            sleep 60 # Slurm ends this shell
        else
            echo "could not be requeued: submit it again with resume=auto" >&2
        fi
    fi
    return "$code"
}

# A node of the job that does not answer ("*") or is down.
node_is_gone() {
    sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format="%N %T" | grep -E '\*|down|fail'
}
