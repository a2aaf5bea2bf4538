#!/usr/bin/env bash
# A capture as a Slurm job array: each task is one static rank with an engine and GPUs of its own. No task waits for another, so
# they may start at any time, on any nodes that share the input and the cache's directory. Submit it again after any failure or
# preemption: it goes on with the units that are not published.
#
#   sbatch --array=0-7 configs/slurm-capture.sh configs/capture-text.yaml
#
# A signal some minutes before the time limit lets each task finish the unit in its hands, publish it and end with status 0: make
# a unit shorter than that (shards.unit_chars).
#SBATCH --job-name=kdcache
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --requeue
set -euo pipefail

config=$1
shift

# exec: the signal is for kdcache and not for this shell. From 0, so that rank is the index of the array's task.
exec srun kdcache capture "$config" --rank "$SLURM_ARRAY_TASK_ID" --world-size "$SLURM_ARRAY_TASK_COUNT" "$@"
