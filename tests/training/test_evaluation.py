"""Validation losses: which tokens they count, and for which denoiser."""

import shlex
from collections import defaultdict
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from megatron.core.config import DataConfig
from megatron.core.datasets.corpus import open_corpus, split_corpus
from megatron.core.datasets.denoising import DenoisingPlan
from megatron.core.datasets.indexed_dataset import IndexedDatasetWriter
from megatron.core.datasets.loader import Dataset, T5Loader, TensorBatch
from megatron.core.datasets.packed_documents import PackedDocumentsDataset
from megatron.core.datasets.t5_dataset import DenoisingDataset, SpecialTokens
from megatron.core.parallel_state import ParallelContext
from megatron.core.parameters import local_tensor
from megatron.training.arguments import parse_args
from megatron.training.evaluation import EvaluationResult, evaluate, kinds_of_targets, special_token_mask
from megatron.training.model_setup import DistributedModel
from tests.distributed import run_distributed

SPECIAL = SpecialTokens(vocab_size=120, pad_id=0, eos_id=1, decoder_start_id=0, sentinel_ids=tuple(range(119, 99, -1)))
PADDED_VOCAB = 128
MODES = {"R": 2, "X": 3, "S": 4}
FIRST_TOKEN = 5  # of the text


class LossIsTheLabel:
    """In place of a `DistributedModel`: each token's cross-entropy is its id, so that a mean tells what it is over."""

    counts_loss = True

    def __init__(self, evaluation_microbatches: int) -> None:
        self.evaluation_microbatches = evaluation_microbatches
        self.modes: list[bool] = []

    def train_mode(self, training: bool) -> None:
        self.modes.append(training)

    def token_losses(self, batch: TensorBatch) -> Tensor:
        assert len(batch.labels) == 4 * self.evaluation_microbatches and self.modes == [False]
        return batch.labels.clamp(min=0).float()


def dataset_of(folder: Path, config: DataConfig) -> DenoisingDataset | PackedDocumentsDataset:
    random = np.random.default_rng(0)
    lengths = random.integers(4, 90, 100) if config.packing == "segments" else [3_000]
    with IndexedDatasetWriter(folder / "corpus", np.uint16) as writer:
        for length in lengths:
            writer.add_document(random.integers(FIRST_TOKEN, 100, length).astype(np.uint16))
        writer.finalize()
    part = split_corpus(open_corpus(folder / "corpus"), (1.0, 0.0, 0.0), "corpus")["train"]
    plan = DenoisingPlan.build(config, len(SPECIAL.sentinel_ids), lambda mode: (MODES[mode],))
    if config.packing == "segments":
        return PackedDocumentsDataset([part], plan, SPECIAL, 1, "train", window=32)
    return DenoisingDataset([part], plan, SPECIAL, seed=1)


def evaluated(dataset: Dataset, num_samples: int, microbatches: int) -> EvaluationResult:
    loader = T5Loader(dataset, micro_batch_size=4, num_microbatches=2)
    is_special = special_token_mask(SPECIAL, PADDED_VOCAB, torch.device("cpu"))
    model = LossIsTheLabel(microbatches)
    result = evaluate(model, loader, num_samples, is_special, ParallelContext(torch.device("cpu")))  # type: ignore[arg-type]
    assert model.modes == [False, True] and result is not None
    return result


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("num_samples", [1, 7, 8, 9])
def test_noise_loss_leaves_sentinels_and_end_out(num_samples: int, microbatches: int, tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, DataConfig(encoder_seq_length=64))
    result = evaluated(dataset, num_samples, microbatches)
    labels = dataset.batch(np.arange(num_samples)).labels
    noise = labels[(labels >= 2) & (labels < 100)]
    (window,) = dataset.plan.windows  # type: ignore[union-attr]
    assert result.num_targets == labels.size == num_samples * window.targets
    assert result.num_noise_tokens == noise.size == num_samples * window.noise_tokens
    assert result.lm_loss == pytest.approx(labels.mean())
    assert result.noise_lm_loss == pytest.approx(noise.mean())
    assert result.lm_loss_by_kind == {"span-3-0.15": result.lm_loss}


@pytest.mark.parametrize("packing", ["none", "segments"])
@pytest.mark.parametrize("num_samples", [2, 13, 30])
def test_losses_of_each_denoiser(num_samples: int, packing: Literal["none", "segments"], tmp_path: Path) -> None:
    denoisers = ["R:3:0.15:2", "X:8:0.5", "S:prefix:0.25"]
    config = DataConfig(objective="ul2", denoisers=denoisers, encoder_seq_length=64, packing=packing)
    dataset = dataset_of(tmp_path, config)
    labels_by_mode: dict[int, list[int]] = defaultdict(list)
    for sample in range(num_samples):
        row = dataset.batch(np.array([sample]))
        sides = (row.encoder_input_ids, row.encoder_segment_ids), (row.labels, row.decoder_segment_ids)
        (inputs, of_inputs), (labels, of_labels) = (
            (ids[0], np.ones_like(ids[0]) if segments is None else segments[0]) for ids, segments in sides
        )
        for segment in range(1, of_labels.max() + 1):
            mode = int(inputs[of_inputs == segment][0])
            labels_by_mode[mode] += [label for label in labels[of_labels == segment].tolist() if label >= 0]
    names = dict(zip(MODES.values(), dataset.kinds, strict=True))
    for microbatches in (1, 2):
        result = evaluated(dataset, num_samples, microbatches)
        assert result.num_targets == sum(map(len, labels_by_mode.values()))
        assert result.lm_loss_by_kind.keys() == {names[mode] for mode in labels_by_mode}
        for mode, own in labels_by_mode.items():
            assert result.lm_loss_by_kind[names[mode]] == pytest.approx(np.mean(own))
        assert result.lm_loss == pytest.approx(np.mean([*chain(*labels_by_mode.values())]))


def test_kinds_of_targets_in_segments() -> None:
    labels = torch.tensor([[5, 6, 7, -100], [8, -100, -100, -100], [-100] * 4])
    segments = torch.tensor([[1, 1, 2, 0], [1, 0, 0, 0], [0] * 4], dtype=torch.int32)
    batch = TensorBatch(labels, labels, labels, segments, segments)
    kinds = kinds_of_targets(torch.tensor([[3, 0], [1, -1], [-1, -1]], dtype=torch.int32), batch)
    assert kinds.tolist() == [[3, 3, 0, -1], [1, -1, -1, -1], [-1] * 4]
    only_padding = kinds_of_targets(
        torch.zeros(3, 0, dtype=torch.int32), batch._replace(decoder_segment_ids=segments * 0)
    )
    assert only_padding.tolist() == [[-1] * 4] * 3


TINY = shlex.split(
    "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 16 --num-attention-heads 2 --kv-channels 8 "
    "--vocab-size 128 --global-batch-size 4 --data-path x"
)


def losses_of_changing_parameters(strategy: str) -> tuple[list[float], bool]:
    """Summed losses of two evaluations, the parameters being halved in between; whether all are whole afterwards."""
    config = parse_args([*TINY, "--data-parallel-sharding-strategy", strategy]).config
    context = ParallelContext.create(config.parallel, torch.device("cpu"))
    model = DistributedModel(config, context, None, num_microbatches=1)
    model.train_mode(False)
    generator = torch.Generator().manual_seed(1)
    batch = TensorBatch(*(torch.randint(3, 120, (2, length), generator=generator) for length in (8, 6, 6)))
    found = []
    for _ in range(2):
        losses = model.token_losses(batch)
        found.append(0.0 if losses is None else losses.sum().item())
        with torch.no_grad():
            for parameter in model.parameters:
                local_tensor(parameter.parameter).mul_(0.5)
    whole = any(not isinstance(parameter, DTensor) for stage in model.stages for parameter in stage.parameters())
    return found, whole


def _losses_by_strategy(rank: int, strategies: list[str]) -> list[tuple[list[float], bool]]:
    return [losses_of_changing_parameters(strategy) for strategy in strategies]


def test_evaluations_see_the_present_parameters_and_hold_no_others() -> None:
    """FSDP2 keeps what it has gathered until a backward pass, which an evaluation has not."""
    expected, _ = losses_of_changing_parameters("no_shard")
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    strategies = ["no_shard", "optim", "optim_grads", "optim_grads_params"]
    for found in run_distributed(_losses_by_strategy, 2, strategies):
        for strategy, (losses, whole) in zip(strategies, found, strict=True):
            assert losses == pytest.approx(expected, rel=1e-5) and whole == (strategy == "no_shard")
