#!/usr/bin/env bash
# Trains a small T5 with UL2's mixture of denoisers, in a few minutes on two CPU cores: corpus, tokenizer, indexed
# dataset, training on two processes, validation loss of each denoiser. Run it again and it continues where it stopped.
# Further flags go to pretrain_t5.py.
#
# RUN    directory of the run, runs/ul2 when not given
# STEPS  steps to train for
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source tools/environment.sh
prepare_environment plot
RUN=${RUN:-runs/ul2}
STEPS=${STEPS:-500}
mkdir -p "$RUN"

if [ ! -e "$RUN/corpus.jsonl" ]; then
    echo "[1/5] writing a corpus from Python's own documentation"
    python examples/write_corpus.py --output "$RUN/corpus.jsonl"
fi
if [ ! -e "$RUN/tokenizer.model" ]; then
    echo "[2/5] training a SentencePiece unigram tokenizer of 2,000 pieces"
    python tools/train_tokenizer.py --input "$RUN/corpus.jsonl" --output "$RUN/tokenizer.model" --vocab-size 2000
fi
if [ ! -e "$RUN/corpus_text_document.idx" ]; then
    echo "[3/5] tokenizing the corpus into an indexed dataset"
    python tools/preprocess_data.py --input "$RUN/corpus.jsonl" --output-prefix "$RUN/corpus" --workers 2 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/tokenizer.model"
fi

echo "[4/5] training a T5 v1.1 of 4 + 4 layers on two processes"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun --standalone --nproc-per-node 2 pretrain_t5.py --objective ul2 \
    --encoder-num-layers 4 --decoder-num-layers 4 --hidden-size 192 --num-attention-heads 6 --kv-channels 32 \
    --ffn-hidden-size 512 --encoder-seq-length 128 --data-path "$RUN/corpus" --split 90,10,0 \
    --micro-batch-size 4 --global-batch-size 8 --train-iters "$STEPS" \
    --optimizer adamw-scale --lr 2e-2 --lr-decay-style cosine --lr-warmup-iters 100 --clip-grad 1.0 \
    --log-interval 50 --eval-interval $(((STEPS + 4) / 5)) --eval-iters 40 --save-interval "$STEPS" --save "$RUN" "$@"

echo "[5/5] validation loss of each denoiser"
python examples/ul2/losses.py "$RUN/metrics.jsonl"
