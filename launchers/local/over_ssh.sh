#!/usr/bin/env bash
# NODE COMMAND...: runs the command on a node over ssh, for jobs on several nodes without Slurm (docs/slurm.md). With a
# terminal there (-tt), so that what runs ends when this ends.
set -eu
node=$1
shift
exec ssh -tt -o BatchMode=yes "$node" "exec $(printf '%q ' "$@")"
