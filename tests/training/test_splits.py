"""What is left out of a run when a split has too little data."""

from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.t5_dataset import DenoisingDataset
from megatron.core.errors import UserError
from megatron.training.arguments import parse_args
from megatron.training.corpora import OpenedCorpora, open_corpora


def opened(prefix: Path, *flags: str) -> OpenedCorpora:
    return open_corpora(
        parse_args(
            ["--preset", "t5-v1_1-small", "--data-path", str(prefix), "--encoder-seq-length", "64", *flags]
        ).config
    )


def test_splits_are_runs_of_the_corpus(byte_dataset: Path) -> None:
    corpora = opened(byte_dataset, "--split", "80,15,5")
    ranges = []
    for name in ("train", "valid", "test"):
        dataset = corpora.datasets[name]
        assert isinstance(dataset, DenoisingDataset) and dataset.name == name
        ranges.append(dataset.parts[0].tokens)
    assert corpora.warnings == []
    assert ranges[0][0] == 0 and ranges[0][1] == ranges[1][0] and ranges[1][1] == ranges[2][0]


def test_empty_validation_warns_and_trains(byte_dataset: Path) -> None:
    """Megatron's published T5 split leaves nothing for validation when there are few documents."""
    corpora = opened(byte_dataset, "--split", "99982,9,9")
    assert corpora.datasets["valid"] is None and corpora.datasets["test"] is None
    assert len(corpora.warnings) == 2
    assert "--split 99982,9,9 leaves 0 of" in corpora.warnings[0]
    assert "for validation, but one sample takes 70; there will be no validation loss" in corpora.warnings[0]
    train = corpora.datasets["train"]
    assert train is not None and train.batch(np.arange(2)).labels.shape[0] == 2


def test_splits_not_asked_for_do_not_warn(byte_dataset: Path) -> None:
    corpora = opened(byte_dataset, "--split", "1")
    assert (corpora.datasets["valid"], corpora.datasets["test"], corpora.warnings) == (None, None, [])


def test_a_corpus_shorter_than_one_window_is_refused(byte_dataset: Path) -> None:
    with pytest.raises(UserError, match=r"train tokens, but one sample takes \d+; use more text, another --split"):
        opened(byte_dataset, "--encoder-seq-length", "500000", "--mean-noise-span-length", "5000")
