#!/bin/bash
# Collect an atlas of a model's experts on a cluster: one task per GPU, each reads its share of the documents.
#
#   sbatch --nodes=2 slurm/collect.sh MODEL SHARDS... --out ATLAS
#
# All nodes need the model, the shards and --out on a shared file system. A job that was killed or preempted goes on
# where it stopped when it is requeued or when the same sbatch command is given again, also with other --nodes.
#SBATCH --job-name=monet-collect
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail

# A batch script runs from Slurm's copy of it, so paths are those of the submission.
cd "${SLURM_SUBMIT_DIR:?give this script to sbatch}"
if [[ -x .venv/bin/monet-experts ]]; then PATH="$PWD/.venv/bin:$PATH"; fi
exec srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" monet-experts collect "$@"
