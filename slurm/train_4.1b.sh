#!/bin/bash
# Pretrain Monet-4.1B:   sbatch slurm/train_4.1b.sh data.path=SHARDS [hydra overrides]
#SBATCH --job-name=monet-4.1b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=72:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=slurm-%x-%j.log
source "${SLURM_SUBMIT_DIR:?give this script to sbatch}/slurm/train.sh" 4.1b "$@"
