#!/bin/bash
# Tokenize a corpus on a cluster: one task of `monet-data shards` per element of the array, then the merge.
#
#   sbatch --array=0-63 slurm/prepare_data.sh conf/data_prep/fineweb_edu.yaml --tokenizer TOKENIZER --out data/fineweb
#
# All nodes need the sources and --out on a shared file system. A task that was killed or preempted resumes where it
# stopped when it is requeued or when the same sbatch command is given again; finished tasks return immediately.
#SBATCH --job-name=monet-data
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%x-%A_%a.log
set -euo pipefail

# A batch script runs from Slurm's copy of it, so paths are those of the submission.
cd "${SLURM_SUBMIT_DIR:?give this script to sbatch}"
if [[ -x .venv/bin/monet-data ]]; then PATH="$PWD/.venv/bin:$PATH"; fi
: "${SLURM_ARRAY_TASK_ID:?submit it as an array: sbatch --array=0-63 slurm/prepare_data.sh ...}"

out=""
arguments=("$@")
for ((i = 0; i < $#; i++)); do
  case "${arguments[i]}" in
    --out) out="${arguments[i + 1]:-}" ;;
    --out=*) out="${arguments[i]#--out=}" ;;
  esac
done

if [[ "$SLURM_ARRAY_TASK_ID" == "$SLURM_ARRAY_TASK_MIN" && "${SLURM_RESTART_COUNT:-0}" == 0 && -n "$out" ]]; then
  # Where compute nodes may not submit jobs, run the merge by hand after the last task.
  sbatch --job-name=monet-merge --dependency="afterok:$SLURM_ARRAY_JOB_ID" --kill-on-invalid-dep=yes \
    --nodes=1 --ntasks=1 --cpus-per-task=1 --output="slurm-%x-%j.log" --export=ALL --chdir="$PWD" \
    --wrap="$(printf '%q merge %q' "$(command -v monet-data)" "$out")" \
    || echo "submit by hand after the array: monet-data merge $out"
fi

cpus=${SLURM_CPUS_PER_TASK:-1} # srun does not take it from sbatch
exec srun --kill-on-bad-exit=1 --cpus-per-task="$cpus" monet-data shards "$@" --workers "$cpus" \
  --task "$((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN))" --tasks "$SLURM_ARRAY_TASK_COUNT"
