#!/usr/bin/env bash
# From the text that every machine with Python has to a trained model, in public commands only.
# Run it again and finished parts are skipped; remove data/quickstart and runs/quickstart to start over.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/${VENV:-.venv}/bin:$PATH"
# Two processes share the cores; torchrun would otherwise warn and set one thread each.
cores=$(python -c 'import os; print(os.cpu_count() or 2)')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 1) / 2))}
# Without it, workers restarted by torchrun may read the addresses of dead ones (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

echo_run() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

data=data/quickstart
for source in github docs manual packages; do
    # what is installed may have changed since; a finished corpus stays as it is
    [ -e "$data/documents/$source/stats.json" ] && continue
    echo_run python -m llama.corpus run --config configs/corpus/installed.yaml --part "$source" \
        --output "$data/documents/$source"
done
echo_run python -m tokenizer.train --config configs/tokenizer.yaml --vocab_size 4096 \
    --input "$data/documents" --mixture configs/mixtures/quickstart.yaml \
    --output "$data/tokenizer"
echo_run python -m llama.data.tokenize --input "$data/documents" --tokenizer "$data/tokenizer" \
    --output "$data/tokens" --valid_per_10k 500
if grep -qs '"done"' runs/quickstart/EXIT_REASON; then
    printf '\nruns/quickstart is trained already: remove it to train again\n'
else
    echo_run torchrun --nproc-per-node 2 --signals-to-handle SIGTERM,SIGINT,SIGUSR1,SIGUSR2 train.py
fi
echo_run python -m llama.report runs/quickstart
echo_run python -m llama.generate runs/quickstart --prompt 'def main(' --max_tokens 100 --seed 0

cat <<'TABLE'

what lies where
  data/quickstart/documents/    text, one JSON object a line, per source
  data/quickstart/tokenizer/    tokenizer.model (SentencePiece)
  data/quickstart/tokens/       token shards per source, train and valid
  runs/quickstart/metrics.jsonl every number of the run
  runs/quickstart/report.html   curves, mixture, samples; loss.png beside it
  runs/quickstart/ckpt/         checkpoints

next
  source .venv/bin/activate
  python -m llama.generate runs/quickstart --prompt 'class '
  python -m llama.data.ledger runs/quickstart --step 10
  python -m llama.convert runs/quickstart exports/quickstart --to hf
  python -m llama                              every command
  docs/own-data.md                             your own text to your own model
TABLE
