#!/usr/bin/env bash
# The study on Slurm: sbatch deploy/slurm.sh [options of `robustness-grid run`]
#
# Run it in the environment that has the project. GRID_RESULTS (default: results) is on storage that
# all nodes share. Five minutes before the time limit the run is stopped, and the job is queued
# again: it continues where it stopped.
#SBATCH --job-name=robustness-grid
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
limit=$(((${SLURM_JOB_END_TIME:-9999999999} - ${SLURM_JOB_START_TIME:-0}) / 60))
if ((limit < 10)); then # the signal would stop each run as it starts, and queue it again for ever
    echo "a time limit of $limit minutes: it must be 10 or more, as with sbatch --time=12:00:00" >&2
    exit 2
fi
export GRID_RESULTS="${GRID_RESULTS:-$PWD/results}"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 MLFLOW_DISABLE_TELEMETRY=true
mkdir -p "$GRID_RESULTS"
driver="$GRID_RESULTS/driver-$SLURM_JOB_ID.pid"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))
again=

stop() { # the head's node is the one that this script runs on
    again=yes
    [ ! -f "$driver" ] || kill -TERM "$(cat "$driver")"
}
trap stop USR1

srun --ntasks-per-node=1 ray symmetric-run --address "$head:$port" \
    --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    bash -c 'echo $$ > "$0" && exec robustness-grid run "$@"' "$driver" "$@" &
step=$!
while kill -0 "$step" 2> /dev/null; do # a signal ends a wait, not the step
    wait "$step"
    code=$?
done
rm -f "$driver"
[ -z "$again" ] || exec scontrol requeue "$SLURM_JOB_ID"
exit "$code"
