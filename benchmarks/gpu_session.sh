#!/usr/bin/env bash
# Everything that is to be seen on a machine with a GPU, in stages that each end within nine minutes.
#
#   bash benchmarks/gpu_session.sh STAGE...
#
# Results go to $OUT (./gpu-results): STAGE.log and the stage's rows as STAGE.jsonl, each row as soon as it is there, so
# that a stage that is cut off leaves what it has. What is large or only of use to later stages goes to $WORK (a folder
# of the system's temporary one): a corpus, runs that later calls continue, compiled kernels. Nothing is downloaded;
# torch with CUDA, Triton, a C++ compiler, pybind11, sentencepiece and pytest (best with pytest-timeout) have to be there,
# and transformers for the comparisons. PYTHON names the interpreter (python3).
#
# stage             about     what
# build             1 min     the C++ extensions, and versions of all that matters
# tests             5 min     tests that need a GPU
# attention         6 min     attention forward and backward beside torch's
# variants          6 min     tile sizes of the attention kernels
# elementwise       4 min     norms, gates and the loss beside torch's
# products          2 min     products in FP8, accumulated weight gradients
# step-base         8 min     the whole step at 512/114 beside Hugging Face, base; likewise step-large and step-xl
# step-fp8          6 min     the whole step at xl's shapes in FP8
# trainer           2 min     the trainer itself: MFU of its metrics, and a profile of its step
# convergence       8 min     2,000 steps of base in bf16 and fp32; again to go on, two calls are enough
# convergence-long  4 min     the same with rows of 2,048 tokens, 500 steps
#
# With half an hour: build tests, attention, step-base, step-xl, convergence; then whatever time is left for.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd)
WORK=${WORK:-${TMPDIR:-/tmp}/megatron-t5-gpu}
PYTHON=${PYTHON:-python3}
mkdir -p "$WORK"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$WORK/inductor} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$WORK/triton}

# limited SECONDS COMMAND...: ends it, and what it has started, when it takes longer.
limited() {
    timeout --kill-after=10 "$@" || {
        local status=$?
        [ $status -ne 124 ] || echo "error: cut off after $1 s"
        return $status
    }
}

corpus() {
    local prefix=$WORK/corpus
    if [ ! -e "$prefix"_text_document.json ]; then
        "$PYTHON" benchmarks/source_corpus.py --output "$WORK/sources.jsonl" --megabytes 64
        "$PYTHON" benchmarks/source_corpus.py --output "$WORK/sample.jsonl" --megabytes 4
        "$PYTHON" tools/train_tokenizer.py --input "$WORK/sample.jsonl" --output "$WORK/tokenizer.model" \
            --vocab-size 8000
        "$PYTHON" tools/preprocess_data.py --input "$WORK/sources.jsonl" --output-prefix "$prefix" --overwrite \
            --tokenizer-type SentencePieceTokenizer --tokenizer-model "$WORK/tokenizer.model"
    fi
}

converge() { # NAME MINUTES FLAGS...
    local name=$1 minutes=$2
    shift 2
    corpus
    limited 530 "$PYTHON" benchmarks/convergence.py --data-path "$WORK/corpus" --runs "$WORK/$name" \
        --output "$OUT/$name.jsonl" --minutes "$minutes" "$@"
}

step() { # NAME MINUTES FLAGS...
    local name=$1 minutes=$2
    shift 2
    limited 530 "$PYTHON" benchmarks/gpu_step.py --output "$OUT/$name.jsonl" --minutes "$minutes" "$@"
}

stage() {
    case $1 in
    build)
        limited 300 "$PYTHON" setup.py -q build_ext --inplace
        "$PYTHON" - <<'END'
import importlib.metadata as metadata
import torch
names = ("torch", "triton", "transformers", "transformer_engine", "apex", "torchao", "numpy", "sentencepiece", "pytest")
for name in names:
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
for index in range(torch.cuda.device_count()):
    properties = torch.cuda.get_device_properties(index)
    print(f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.1f} GiB, {properties.multi_processor_count} "
          f"multiprocessors, capability {properties.major}.{properties.minor}")
print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
END
        nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv || true
        ;;
    tests)
        local each=() # a test that hangs leaves time for the others
        if "$PYTHON" -c "import pytest_timeout" 2> /dev/null; then each=(--timeout 240); fi
        # shellcheck disable=SC2046
        limited 530 "$PYTHON" -m pytest -m gpu -ra --durations=15 -p no:cacheprovider "${each[@]}" \
            $(grep -rlE 'mark\.gpu' tests --include='test_*.py' | sort)
        ;;
    attention) limited 480 "$PYTHON" benchmarks/attention.py --output "$OUT/attention.jsonl" ;;
    variants) limited 480 "$PYTHON" benchmarks/attention.py --variants --output "$OUT/variants.jsonl" ;;
    elementwise) limited 480 "$PYTHON" benchmarks/elementwise.py --output "$OUT/elementwise.jsonl" ;;
    products) limited 300 "$PYTHON" benchmarks/fp8_products.py --output "$OUT/products.jsonl" ;;
    step-base) step step-base 8 --preset t5-v1_1-base ;;
    step-large) step step-large 8 --preset t5-v1_1-large ;;
    step-xl)
        step step-xl 8 --preset t5-v1_1-xl --rounds 3 --steps 2 --contenders "ours compiled" \
            "Hugging Face SDPA compiled" "Hugging Face SDPA compiled, half the rows" "ours compiled, twice the rows" \
            "ours, accumulation fusion" "ours compiled, CUDA graphs"
        ;;
    step-fp8) step step-fp8 8 --preset t5-v1_1-xl --rounds 3 --steps 2 --contenders "ours compiled" fp8 ;;
    trainer)
        corpus
        rm -rf "$WORK/trainer"
        limited 300 "$PYTHON" pretrain_t5.py --preset t5-v1_1-base --vocab-size 32128 --data-path "$WORK/corpus" \
            --bf16 --compile --micro-batch-size 64 --global-batch-size 128 --train-iters 60 --eval-iters 0 \
            --hidden-dropout 0 --attention-dropout 0 --log-interval 20 --metrics-file "$WORK/trainer/metrics.jsonl" \
            --profile --profile-step-start 45 --profile-step-end 47 --profile-dir "$WORK/trainer/profile"
        cp "$WORK/trainer/metrics.jsonl" "$OUT/trainer.jsonl"
        ;;
    convergence) converge convergence 7 ;;
    convergence-long) converge convergence-long 7 --length 2048 --rows 2 --steps 500 ;;
    *)
        echo "error: $1 is no stage; they are in the first lines of $0" >&2
        return 2
        ;;
    esac
}

[ $# -gt 0 ] || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
failed=()
for name in "$@"; do
    echo "== $name, $(date -u +%FT%TZ)" | tee -a "$OUT/$name.log"
    set +e  # here alone: within `||`, the stage itself would go on after a command that fails
    (set -e; stage "$name") 2>&1 | tee -a "$OUT/$name.log"
    status=${PIPESTATUS[0]}
    set -e
    echo "== $name ended with status $status, $(date -u +%FT%TZ)" | tee -a "$OUT/$name.log"
    [ $status -eq 0 ] || failed+=("$name")
done
[ ${#failed[@]} -eq 0 ] || { echo "error: failed: ${failed[*]}" >&2; exit 1; }
