#!/usr/bin/env bash
# From nothing to a small pretrained T5, in about five minutes on two CPU cores: corpus, tokenizer, indexed dataset,
# pretraining on two processes, loss curve, filled-in spans. Run it again and it continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
prepare_environment plot
RUN=${RUN:-quickstart-run}
STEPS=${STEPS:-1500}
mkdir -p "$RUN"

if [ ! -e "$RUN/corpus.jsonl" ]; then
    echo "[1/6] writing a corpus from Python's own documentation"
    python examples/write_corpus.py --output "$RUN/corpus.jsonl"
fi
if [ ! -e "$RUN/tokenizer.model" ]; then
    echo "[2/6] training a SentencePiece unigram tokenizer of 2,000 pieces"
    python tools/train_tokenizer.py --input "$RUN/corpus.jsonl" --output "$RUN/tokenizer.model" --vocab-size 2000
fi
if [ ! -e "$RUN/corpus_text_document.idx" ]; then
    echo "[3/6] tokenizing the corpus into an indexed dataset"
    python tools/preprocess_data.py --input "$RUN/corpus.jsonl" --output-prefix "$RUN/corpus" --workers 2 \
        --tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/tokenizer.model"
fi

echo "[4/6] pretraining a T5 v1.1 of 4 + 4 layers on two processes"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
torchrun --standalone --nproc-per-node 2 pretrain_t5.py \
    --encoder-num-layers 4 --decoder-num-layers 4 --hidden-size 192 --num-attention-heads 6 --kv-channels 32 \
    --ffn-hidden-size 512 --encoder-seq-length 64 --data-path "$RUN/corpus" --split 90,10,0 \
    --micro-batch-size 4 --global-batch-size 8 --train-iters "$STEPS" \
    --optimizer adamw-scale --lr 2e-2 --lr-decay-style cosine --lr-warmup-iters 200 --clip-grad 1.0 \
    --log-interval 50 --eval-interval 500 --save-interval 500 --save "$RUN/checkpoints" "$@"

echo "[5/6] drawing the loss curve"
python tools/plot_metrics.py --output "$RUN/loss.png" "$RUN/checkpoints/metrics.jsonl"

echo "[6/6] comparing with the unigram and filling held-out spans in"
python examples/quickstart_report.py --load "$RUN/checkpoints" --minimum-gain 0.3
