#!/usr/bin/env bash
# A capture as a Slurm job array: each task is one static rank with its own engine and GPUs. No task waits for another, so they
# may start at any time, on any nodes that share the input and the cache's directory. Submit it again after any failure or
# preemption: it resumes with the unpublished units.
#
#   sbatch --array=0-7 configs/slurm-capture.sh configs/capture-text.yaml
#
# A signal some minutes before the time limit lets each task finish and publish its current unit and exit with status 0. Make
# units shorter than that (shards.unit_chars).
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

# exec, so that the signal reaches kdcache and not this shell. The array starts at 0, so that a task's index is its rank.
exec srun kdcache capture "$config" --rank "$SLURM_ARRAY_TASK_ID" --world-size "$SLURM_ARRAY_TASK_COUNT" "$@"
