#!/usr/bin/env bash
# Every benchmark that needs a GPU, in one go of under 10 minutes; tables and a plot come to lie in
# benchmarks/results/<machine>/. The last one keeps what it measured until its time was over.
#
#   PYTHON=python3    the interpreter that has the project's packages
set -uo pipefail
cd "$(dirname "$0")/.."

# SECONDS counts those of this script
run() {
    local limit=$1
    shift
    echo "\$ python -m $*"
    timeout "$limit" "${PYTHON:-python}" -m "$@" --save || failed=$?
}

failed=0
run 90 benchmarks.ops
run 60 benchmarks.recompute
run 190 benchmarks.train_gpu --steps 3
run 130 benchmarks.train_gpu --config configs/llama_7b.yaml --micro_batch 2 --accumulate 16 \
    --steps 2 --who ours
run $((570 - SECONDS)) benchmarks.attention
exit "$failed"
