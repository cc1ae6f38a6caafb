#!/usr/bin/env bash
# Pretrains T5 v1.1 base by data parallelism on the GPUs of this node. Further flags are passed on and win.
#
#   DATA_PATH=my_corpus SAVE=runs/base bash examples/t5/pretrain_t5_base_1node.sh --train-iters 100000
#
# DATA_PATH      prefix of a dataset made by tools/preprocess_data.py
# SAVE           directory of the run; the same command again continues it
# GPUS_PER_NODE  processes to start, 8 when not given
#
# Ctrl-C or SIGTERM saves and stops, within TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds (torch 2.11: 30); a second one gives
# up the step under way and saves the state before it. A finished run leaves the file $SAVE/finished.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
: "${DATA_PATH:?is not set; give the prefix of a dataset made by tools/preprocess_data.py}"
: "${SAVE:?is not set; give a directory for checkpoints and metrics}"
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

exec torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" "$ROOT/pretrain_t5.py" \
    --preset t5-v1_1-base --bf16 \
    --micro-batch-size 64 --global-batch-size 2048 --train-iters 65536 \
    --optimizer adamw-scale --lr 2e-2 --lr-warmup-iters 10000 --lr-decay-style cosine \
    --data-path "$DATA_PATH" --save "$SAVE" --save-interval 1000 --log-interval 100 "$@"
