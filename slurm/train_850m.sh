#!/bin/bash
# Pretrain Monet-850M:   sbatch slurm/train_850m.sh data.path=SHARDS [hydra overrides]
#SBATCH --job-name=monet-850m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=48:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=slurm-%x-%j.log
source "${SLURM_SUBMIT_DIR:?give this script to sbatch}/slurm/train.sh" 850m "$@"
