#!/usr/bin/env bash
# Pretrains on several nodes with plain torchrun. Run it on every node, with the same environment but for NODE_RANK and
# with the same flags; they are those of pretrain_t5.py.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash examples/t5/pretrain_t5_multinode.sh --preset t5-v1_1-xl --bf16 \
#       --tensor-model-parallel-size 2 --data-path /data/my_corpus --save /shared/runs/xl ...
#
# NNODES         number of nodes
# NODE_RANK      number of this node, from 0
# MASTER_ADDR    name or address of node 0, reachable from all nodes
# MASTER_PORT    free port there, 29500 when not given
# GPUS_PER_NODE  processes a node, 8 when not given; a multiple of --tensor-model-parallel-size keeps tensor
#                parallelism inside nodes
#
# --save must be a directory that all nodes share, --data-path must lead to the same data on all of them.
#
# Ctrl-C or SIGTERM on one node or all of them saves and stops the run, within TORCH_ELASTIC_SHUTDOWN_TIMEOUT seconds
# (torch 2.11: 30); a second one gives up the step under way and saves the state before it. A finished run leaves a file
# `finished` in --save. The launcher of a node that got no signal itself may take 5 minutes longer to end.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 1
}

# whole_number NAME MINIMUM: the variable of that name is a number from MINIMUM on
whole_number() {
    if ! [[ ${!1:-} =~ ^[0-9]+$ ]] || ((10#${!1} < $2)); then
        fail "$1 is '${!1:-}'; set it to a whole number from $2 on"
    fi
}

MASTER_PORT=${MASTER_PORT:-29500}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
whole_number NNODES 1
whole_number NODE_RANK 0
whole_number GPUS_PER_NODE 1
whole_number MASTER_PORT 1
((NODE_RANK < NNODES)) || fail "NODE_RANK is $NODE_RANK; it counts from 0, so it must be below NNODES, which is $NNODES"
[[ -n ${MASTER_ADDR:-} ]] || fail "MASTER_ADDR is not set; give the name or address of node 0"
(($# > 0)) || fail "no flags given; name at least a model (--preset) and a dataset (--data-path)"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}

exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" "$ROOT/pretrain_t5.py" "$@"
