#!/usr/bin/env bash
# From text to a sentence of a trained Monet in five minutes on two cores. Nothing is downloaded: the text is what
# every Python installation has (sources, docstrings, licences), found at run time. Started again, it resumes.
# usage: examples/quickstart.sh [FOLDER]        with monet-* on the PATH
set -euo pipefail
out=${1:-quickstart}
seconds_at_start=$SECONDS
step() { printf '\n== %s\n' "$1"; }

step "1/5 tokenizer: SentencePiece, 4096 pieces"
monet-data tokenizer python --max-bytes 8M --vocab-size 4096 --out "$out/tokenizer"
step "2/5 shards: memory-mapped, Megatron's format"
monet-data shards python --max-bytes 24M --tokenizer "$out/tokenizer" --out "$out/shards"
step "3/5 training: a nano Monet, 256 x 256 experts per layer, DeepSpeed"
monet-train experiment=quickstart data.path="$out/shards" run.dir="$out/run"
step "4/5 export: a Hugging Face folder"
monet-export "$out/run" "$out/hf" --force
step "5/5 one sentence"
monet-generate "$out/hf" --prompt "def " --max-new-tokens 40 --temperature 0.8 --seed 1

python - "$out" $((SECONDS - seconds_at_start)) <<'PYTHON'
import json
import sys

out, seconds = sys.argv[1], int(sys.argv[2])
records = [json.loads(line) for line in open(f"{out}/run/metrics.jsonl")]
losses = [record["loss"] for record in records if "loss" in record]
held_out = [record["eval_loss"] for record in records if "eval_loss" in record]
print(f"""
== done in {seconds} s
run folder   {out}/run   (config.yaml, metrics.jsonl, checkpoints/, wandb/)
model        {out}/hf    (AutoModelForCausalLM.from_pretrained("{out}/hf", trust_remote_code=True))
loss         {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}; held out {held_out[-1]:.3f}
next         .venv/bin/monet-generate {out}/hf --prompt 'class ' --max-new-tokens 80
             .venv/bin/monet-train experiment=quickstart data.path={out}/shards run.dir={out}/run \\
                 train.max_steps=2000""")
if losses[-1] > losses[0] - 1:
    sys.exit("error: the loss did not fall; please open an issue with the run folder's config.yaml and metrics.jsonl")
PYTHON
