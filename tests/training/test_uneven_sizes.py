"""Sizes that tensor-parallel ranks do not divide evenly: the training and the checkpoints of one process."""

import shlex
from pathlib import Path

from megatron.training.arguments import parse_args
from megatron.training.dry_run import DryRun
from tests.layouts.comparison import LIMITS, checkpoint_tensors, metrics, one_thread, train

# The byte vocabulary of 384 ids gets 385 rows. It and the feed-forward matrices are large enough to be factored.
MODEL = shlex.split(
    "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 128 --num-attention-heads 6 --kv-channels 4 "
    "--ffn-hidden-size 130 --make-vocab-size-divisible-by 5 --encoder-seq-length 37 --split 90,10,0 "
    "--log-interval 1 --eval-iters 0 --micro-batch-size 4 --lr-decay-iters 4"
)
THREE_RANKS = ["--tensor-model-parallel-size", "3"]
OPTIMIZERS = ("adamw-scale", "adafactor")


def test_three_ranks_train_as_one_and_continue_its_run(byte_dataset: Path, tmp_path: Path) -> None:
    def flags(optimizer: str, name: str, steps: int, *others: str) -> list[str]:
        given = ["--optimizer", optimizer, "--save", str(tmp_path / f"{optimizer}-{name}"), "--train-iters", str(steps)]
        return [*MODEL, "--data-path", str(byte_dataset), *given, *others]

    with one_thread():
        for optimizer in OPTIMIZERS:
            assert train(1, [flags(optimizer, "one", 4), flags(optimizer, "begun", 2)]) == [None, None]
        runs = []
        for optimizer in OPTIMIZERS:
            load = ["--load", str(tmp_path / f"{optimizer}-begun"), "--sequence-parallel"]
            runs.append(flags(optimizer, "three", 4, *THREE_RANKS))
            runs.append(flags(optimizer, "continued", 4, *THREE_RANKS, *load))
        assert train(3, runs) == [None] * len(runs)

    loss_limit, limit = LIMITS["fp32"]
    for optimizer in OPTIMIZERS:
        one = tmp_path / f"{optimizer}-one"
        expected, losses = checkpoint_tensors(one), metrics(one, "lm_loss")
        assert expected["model/encoder.layers.0.mlp.wi.weight"].shape == (2 * 130, 128)
        assert expected["model/embedding.word_embeddings.weight"].shape == (385, 128)
        assert optimizer != "adafactor" or any("column_moment" in name and "wo" in name for name in expected)
        for run in ("three", "continued"):
            save = tmp_path / f"{optimizer}-{run}"
            for step, loss in metrics(save, "lm_loss").items():
                assert abs(loss / losses[step] - 1) < loss_limit, (optimizer, run, step)
            found = checkpoint_tensors(save)  # of the shapes in the manifest
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].shape == tensor.shape, name
                assert (found[name] - tensor).norm() <= limit * tensor.norm(), (optimizer, run, name)


def test_padding_is_not_counted() -> None:
    numbers = set()
    for flags in ([], THREE_RANKS):
        config = parse_args(["--preset", "t5-v1_1-small", "--make-vocab-size-divisible-by", "5", *flags]).config
        (rank,) = DryRun(config, config.parallel.tensor_model_parallel_size, 64, 32).ranks()
        numbers.add((rank.num_parameters, rank.owned_parameters))
    assert len(numbers) == 1
