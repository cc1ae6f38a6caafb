"""Validation losses: which tokens they count."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.core.config import DataConfig
from megatron.core.datasets.loader import T5Loader, TensorBatch
from megatron.core.datasets.t5_dataset import SpanCorruptionDataset, SpecialTokens
from megatron.core.parallel_state import ParallelContext
from megatron.training.evaluation import evaluate, special_token_mask

SPECIAL = SpecialTokens(vocab_size=120, pad_id=0, eos_id=1, decoder_start_id=0, sentinel_ids=tuple(range(119, 99, -1)))
PADDED_VOCAB = 128


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


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("num_samples", [1, 7, 8, 9])
def test_noise_loss_leaves_sentinels_and_end_out(num_samples: int, microbatches: int) -> None:
    tokens = np.random.default_rng(0).integers(2, 100, 3_000).astype(np.uint16)
    dataset = SpanCorruptionDataset(tokens, (0, tokens.size), SPECIAL, DataConfig(encoder_seq_length=64), seed=1)
    loader = T5Loader(dataset, micro_batch_size=4, num_microbatches=2)
    is_special = special_token_mask(SPECIAL, PADDED_VOCAB, torch.device("cpu"))
    model = LossIsTheLabel(microbatches)
    result = evaluate(model, loader, num_samples, is_special, ParallelContext(device=torch.device("cpu")))
    assert model.modes == [False, True]
    labels = dataset.batch(np.arange(num_samples)).labels
    noise = labels[(labels >= 2) & (labels < 100)]
    assert result.num_targets == labels.size == num_samples * dataset.lengths.targets
    assert result.num_noise_tokens == noise.size == num_samples * dataset.lengths.noise_tokens
    assert result.lm_loss == pytest.approx(labels.mean())
    assert result.noise_lm_loss == pytest.approx(noise.mean())
