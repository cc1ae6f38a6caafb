"""Blends of corpora as a user runs them: what is refused and logged, and resuming in the middle of their epochs."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from megatron.core.config import TokenizerConfig
from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess
from megatron.core.errors import UserError
from megatron.training.arguments import parse_args
from megatron.training.corpora import OpenedCorpora, open_corpora
from megatron.training.epochs import EpochLog
from tests.layouts.comparison import checkpoint_tensors, metrics, train

SHAPE = shlex.split(
    "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 32 --num-attention-heads 2 --kv-channels 8 "
    "--ffn-hidden-size 48 --encoder-seq-length 64 --log-interval 1 --eval-iters 1 --global-batch-size 8 "
    "--micro-batch-size 4 --lr-decay-iters 8 --eval-interval 100"
)
SIZES = {"large": 60, "small": 6, "tiny": 2}  # documents


def write_corpus(prefix: Path, documents: int, **tokenizer: Any) -> Path:
    text = prefix.with_suffix(".txt")
    text.write_text("".join(f"{prefix.name} {n} " + "abc " * 175 + "\n" for n in range(documents)))
    config = TokenizerConfig(**{"tokenizer_type": "ByteTokenizer"} | tokenizer)
    preprocess(PreprocessConfig(input=[str(text)], output_prefix=str(prefix), tokenizer=config))
    return prefix


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("corpora")
    return {name: str(write_corpus(folder / name, documents)) for name, documents in SIZES.items()}


def opened(*flags: str) -> OpenedCorpora:
    return open_corpora(parse_args([*SHAPE, *flags]).config)


def test_a_blend_in_a_run(corpora: dict[str, str], tmp_path: Path) -> None:
    """Two processes, resumed by one in the middle of every epoch, have the samples and weights of one process."""
    blend = ["--data-path", "5", corpora["large"], "2", corpora["small"], "1", corpora["tiny"], "--split", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ends = [["--save", str(whole), "--train-iters", "40"], ["--save", str(parts), "--train-iters", "25"]]
    run = [*SHAPE, *blend, "--lr-decay-iters", "40"]
    assert train(1, [[*run, *ends[0]]]) == [None]
    assert train(2, [[*run, *ends[1]]]) == [None]
    assert train(1, [[*run, "--save", str(parts), "--train-iters", "40"]]) == [None]
    expected = checkpoint_tensors(whole)
    for name, tensor in checkpoint_tensors(parts).items():
        assert (tensor - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max() + 1e-7
    for name, weight, windows in (("large", 5, 591), ("small", 2, 59), ("tiny", 1, 19)):
        found = metrics(parts, f"epochs/{corpora[name]}")
        assert found == metrics(whole, f"epochs/{corpora[name]}")
        assert found[40] == pytest.approx(320 * weight / 8 / windows, rel=0.05)


def test_a_corpus_that_is_read_again_is_told(corpora: dict[str, str]) -> None:
    dataset = opened("--data-path", "1", corpora["large"], "1", corpora["tiny"], "--split", "1").datasets["train"]
    assert dataset is not None
    log = EpochLog(dataset, list(corpora.values())[::2], next_sample=0)
    assert log.news(36) is None
    assert log.news(48) == f"read again from the start: {corpora['tiny']} (epoch 2)"
    assert log.news(60) is None


def test_many_corpora_log_the_extremes(corpora: dict[str, str], tmp_path: Path) -> None:
    names = [str(write_corpus(tmp_path / f"c{n}", 1)) for n in range(65)]
    run = [*SHAPE, "--data-path", *names, "--split", "1", "--train-iters", "1", "--save", str(tmp_path / "run")]
    assert train(1, [run]) == [None]
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0 == row["epochs_min"] < row["epochs_max"] < 1 and not any(key.startswith("epochs/") for key in row)


def test_another_blend_is_refused(corpora: dict[str, str], tmp_path: Path) -> None:
    run = [*SHAPE, "--split", "1", "--save", str(tmp_path / "run")]
    blend = ["--data-path", "2", corpora["large"], "1", corpora["small"]]
    assert train(1, [[*run, *blend, "--train-iters", "1"]]) == [None]
    for other in (["2", corpora["small"], "1", corpora["large"]], ["3", corpora["large"], "1", corpora["small"]]):
        (message,) = train(1, [[*run, "--data-path", *other, "--train-iters", "2"]])
        assert message is not None and "was trained with another dataset" in message
    assert train(1, [[*run, "--data-path", "4", blend[2], "2", blend[4], "--train-iters", "2"]]) == [None]


def test_other_documents_of_the_same_corpus_are_refused(corpora: dict[str, str], tmp_path: Path) -> None:
    run = [*SHAPE, "--save", str(tmp_path / "run")]
    assert train(1, [[*run, "--data-path", corpora["large"], "--train-iters", "1"]]) == [None]
    (message,) = train(1, [[*run, "--train-data-path", corpora["large"], "--train-iters", "2"]])
    assert message is not None and "was trained with another dataset" in message


def test_splits_of_a_blend(corpora: dict[str, str]) -> None:
    """A corpus too small to be divided is trained on; validation has the others, and says so."""
    blend = opened("--data-path", *corpora.values(), "--split", "90,10")
    assert blend.names == list(corpora.values())
    assert len(blend.datasets["valid"].parts) == 2  # type: ignore[union-attr]
    (warning,) = blend.warnings
    assert "1 of 3 corpora have fewer validation tokens than the 70 of one sample" in warning
    assert warning.endswith(corpora["tiny"])
    apart = opened("--train-data-path", corpora["large"], "--valid-data-path", corpora["small"], corpora["tiny"])
    assert len(apart.datasets["train"].parts) == 1 and len(apart.datasets["valid"].parts) == 2  # type: ignore[union-attr]
    assert apart.datasets["test"] is None and not apart.warnings


def test_held_out_corpora_that_are_too_short_are_named(corpora: dict[str, str], tmp_path: Path) -> None:
    short = str(write_corpus(tmp_path / "short", 1))
    flags = ["--seq-length", "900", "--train-data-path", corpora["large"], "--valid-data-path", short]
    assert opened(*flags).warnings == [
        f"{short} has 708 tokens for validation, but one sample takes 999; there will be no validation loss"
    ]
    blend = tmp_path / "blend.yaml"
    blend.write_text(f"corpora: [{{path: {corpora['large']}}}]\nvalid: [{{path: {short}}}]\n")
    found = opened("--seq-length", "900", "--data-config", str(blend), "--split", "100,0,0")
    assert found.datasets["valid"] is None and found.warnings == [
        f"{short} has 708 tokens for validation, but one sample takes 999; there will be no validation loss"
    ]


def test_a_corpus_whose_own_split_has_no_share_for_training(corpora: dict[str, str], tmp_path: Path) -> None:
    blend = tmp_path / "blend.yaml"
    blend.write_text(f"corpora: [{{path: {corpora['large']}}}, {{path: {corpora['small']}, split: '0,100'}}]\n")
    found = opened("--data-config", str(blend), "--split", "100")
    assert found.names == [corpora["large"]] and not found.warnings
    assert [part.name for part in found.datasets["valid"].parts] == [corpora["small"]]  # type: ignore[union-attr]


def test_documents_of_one_token_are_not_validated_on(corpora: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "single.txt"
    text.write_text("a\nb\n")
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer")
    preprocess(PreprocessConfig(input=[str(text)], output_prefix=str(tmp_path / "single"), tokenizer=tokenizer))
    flags = ["--packing", "segments", "--train-data-path", corpora["large"], "--valid-data-path"]
    found = opened(*flags, str(tmp_path / "single"))
    assert found.datasets["valid"] is None and "there will be no validation loss" in found.warnings[0]


def test_a_corpus_in_shards_is_the_same_corpus(corpora: dict[str, str], tmp_path: Path) -> None:
    shards = str(tmp_path / "large")
    config = TokenizerConfig(tokenizer_type="ByteTokenizer")
    preprocess(
        PreprocessConfig(input=[corpora["large"] + ".txt"], output_prefix=shards, tokenizer=config, shard_tokens=10_000)
    )
    whole, sharded = (opened("--data-path", large, corpora["small"]) for large in (corpora["large"], shards))
    assert len(sharded.datasets["train"].parts[0].corpus.shards) > 2  # type: ignore[union-attr]
    assert whole.fingerprint == sharded.fingerprint


def test_a_first_corpus_that_does_not_tell_its_tokenizer(corpora: dict[str, str], tmp_path: Path) -> None:
    """The others are still held against the tokenizer of the flags."""
    untold = write_corpus(tmp_path / "untold", 5)
    Path(f"{untold}_text_document.json").unlink()
    words = {"tokenizer_type": "BertWordPieceCase", "vocab_file": _vocabulary(tmp_path)}
    other = str(write_corpus(tmp_path / "other", 5, **words))
    flags = ["--split", "1", "--tokenizer-type", "ByteTokenizer", "--data-path", str(untold)]
    assert len(opened(*flags, corpora["large"]).names) == 2
    with pytest.raises(UserError, match="is not the one that made"):
        opened(*flags, other)


def test_unimax_says_when_its_limit_cannot_hold(corpora: dict[str, str]) -> None:
    flags = ["--data-path", *corpora.values(), "--split", "1", "--mixture-max-epochs", "2", "--mixture-budget-tokens"]
    assert not opened(*flags, "50000").warnings
    (warning,) = opened(*flags, "1000000").warnings
    assert warning.startswith("--mixture-budget-tokens 1000000 is more than 2 epochs of all corpora")


def test_mistakes(corpora: dict[str, str], tmp_path: Path) -> None:
    large = corpora["large"]
    other = str(
        write_corpus(tmp_path / "other", 5, tokenizer_type="BertWordPieceCase", vocab_file=_vocabulary(tmp_path))
    )
    mistakes: dict[str, list[str]] = {
        "was made with another tokenizer": [large, other],
        "are the same corpus": [large, f"{large}_text_document"],
        "neither .* exists": [large, str(tmp_path / "absent")],
        "leave it out of the blend": [large, str(write_corpus(tmp_path / "short", 1)), "--seq-length", "900"],
    }
    for message, values in mistakes.items():
        with pytest.raises(UserError, match=message) as error:
            opened("--data-path", *values, "--split", "1")
        assert "\n" not in str(error.value)


def _vocabulary(folder: Path) -> str:
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789"]))
    return str(path)
