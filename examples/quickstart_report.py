"""Last step of the quickstart: compares the trained model with the unigram and fills held-out spans in.

python examples/quickstart_report.py --load runs/tiny --minimum-gain 0.3
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from megatron.core.datasets.loader import T5Loader
from megatron.core.datasets.t5_dataset import DenoisingDataset
from megatron.core.dist_checkpointing import latest_checkpoint, load_checkpoint, read_manifest
from megatron.core.errors import UserError
from megatron.core.inference.generation import generate
from megatron.core.inference.generation_config import GenerationConfig
from megatron.core.models.T5.special_ids import SpecialIds
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.parallel_state import ParallelContext
from megatron.training.arguments import run_command_line
from megatron.training.config import RunConfig
from megatron.training.data import TrainingData, open_data
from megatron.training.evaluation import evaluate, special_token_mask
from megatron.training.model_setup import DistributedModel

CONTEXT = ParallelContext(device=torch.device("cpu"))


def load_model(path: Path, config: RunConfig) -> DistributedModel:
    """The model of a training checkpoint, in this one process."""
    model = DistributedModel(config, CONTEXT, plan=None, num_microbatches=1)
    load_checkpoint(path, {f"model/{p.name}": p.parameter for p in model.parameters}, strict=False)
    return model


def unigram_cross_entropy(data: TrainingData, loader: T5Loader, num_samples: int) -> float:
    """Cross-entropy, in nats, of the validation noise tokens under the training split's token frequencies."""
    assert isinstance(data.train, DenoisingDataset)
    ((corpus, _, _, tokens),) = data.train.parts
    ids = np.concatenate(corpus.pieces)[slice(*tokens)]
    counts = np.bincount(ids, minlength=data.special.vocab_size) + 1.0  # add-one smoothing
    log_probabilities = torch.from_numpy(np.log(counts / counts.sum()))
    is_special = special_token_mask(data.special, data.special.vocab_size, CONTEXT.device)
    labels = torch.cat([batch.labels[batch.labels >= 0] for batch in loader.evaluation_batches(num_samples)]).long()
    noise = labels[~is_special[labels]]
    return -log_probabilities[noise].mean().item()


def spans(ids: list[int], data: TrainingData) -> dict[int, str]:
    """Text of each span of a target row, by sentinel."""
    found: dict[int, list[int]] = {}
    current: list[int] = []
    for token in ids:
        if token == data.special.eos_id:
            break
        if token in data.special.sentinel_ids:
            current = found.setdefault(token, [])
        else:
            current.append(token)
    return {sentinel: data.tokenizer.detokenize(span).strip() for sentinel, span in found.items()}


def filled_in(inputs: list[int], fills: dict[int, str], data: TrainingData) -> str:
    """The input text with `[fill]` in place of each sentinel."""
    parts: list[str] = []
    text: list[int] = []
    for token in inputs:
        if token in data.special.sentinel_ids or token == data.special.eos_id:
            parts.append(data.tokenizer.detokenize(text))
            text = []
            if token != data.special.eos_id:
                parts.append(f"[{fills.get(token, '')}]")
        else:
            text.append(token)
    return " ".join(" ".join(parts).split())


def examples(model: T5Model, data: TrainingData, count: int) -> Iterator[tuple[str, str]]:
    """Held-out rows filled in by the model, and as they were."""
    assert data.valid is not None
    batch = data.valid.batch(np.arange(count))
    inputs = torch.from_numpy(batch.encoder_input_ids)
    special = SpecialIds(data.special.pad_id, data.special.eos_id, data.special.decoder_start_id)
    outputs = generate(model, inputs, special, GenerationConfig(max_new_tokens=data.valid.decoder_length)).ids
    for row, output, label in zip(inputs.tolist(), outputs.tolist(), batch.labels.tolist(), strict=True):
        yield filled_in(row, spans(output, data), data), filled_in(row, spans(label, data), data)


def main() -> None:
    """Print the comparison and the examples; fail when the model is not clearly better than the unigram."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, metavar="DIR", help="save directory of the run")
    parser.add_argument("--minimum-gain", type=float, default=0.3, metavar="NATS", help="least gain over the unigram")
    parser.add_argument("--examples", type=int, default=4, metavar="N", help="held-out rows to fill in")
    arguments = parser.parse_args()
    path = latest_checkpoint(Path(arguments.load))
    if path is None:
        raise UserError(f"--load {arguments.load} holds no checkpoint")
    config = RunConfig.from_dict(read_manifest(path)["config"])
    data, model = open_data(config), load_model(path, config)
    if data.valid is None:
        raise UserError("the run has no validation split; train with a larger one (--split)")

    loader = T5Loader(data.valid, micro_batch_size=32, num_microbatches=1, dp_rank=0, dp_size=1)
    num_samples = data.valid.windows_per_epoch
    is_special = special_token_mask(data.special, config.model.padded_vocab_size, CONTEXT.device)
    result = evaluate(model, loader, num_samples, is_special, CONTEXT)
    unigram = unigram_cross_entropy(data, loader, num_samples)
    for filled, truth in examples(model.stages[0].eval(), data, arguments.examples):
        print(f"model: {filled}\ntruth: {truth}\n")
    gain = unigram - result.noise_lm_loss
    print(f"validation loss per noise token ({result.num_noise_tokens:,} tokens, {num_samples:,} samples):")
    print(f"  unigram  {unigram:.3f} nats\n  model    {result.noise_lm_loss:.3f} nats, {gain:.3f} lower")
    if gain < arguments.minimum_gain:
        raise UserError(
            f"the model is only {gain:.3f} nat below the unigram; {arguments.minimum_gain} was to be reached"
        )


if __name__ == "__main__":
    run_command_line(main)
