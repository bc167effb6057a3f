# Sourced by train_*.sh:   source slurm/train.sh MODEL [hydra overrides]
#
# One task per GPU, started by srun: ranks come from Slurm, a dead task ends the job, signals reach every rank.
# Before the time limit (--signal=B:USR1@300) the ranks finish their step, save and end, and the job is requeued; the
# same command then resumes from the newest checkpoint. On preemption and after a node failure Slurm itself does that
# (--requeue). scancel ends the job for good; the ranks save then too, if KillWait leaves them the time.
set -euo pipefail

# A batch script runs from Slurm's copy of it, so paths are those of the submission.
cd "${SLURM_SUBMIT_DIR:?give this script to sbatch}"
if [[ -x .venv/bin/monet-train ]]; then PATH="$PWD/.venv/bin:$PATH"; fi

model=$1
shift
overrides=("$@")
if [[ " $* " != *" model="* ]]; then overrides=("model=$model" "${overrides[@]}"); fi

echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST"
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" monet-train "${overrides[@]}" &
step=$!

stopping=""
trap 'stopping=yes; kill -USR1 "$step"' USR1
trap 'kill -USR1 "$step"' TERM

# wait returns early when a trapped signal arrives
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do
  status=0
  wait "$step" || status=$?
done

# 75: stopped by a signal, after saving. srun ends the ranks that leave after the first one (143, 137); all have saved
# by then.
if [[ -n $stopping && " 75 137 143 " == *" $status "* ]]; then
  echo "saved before the time limit; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
