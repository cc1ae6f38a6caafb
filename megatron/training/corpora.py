"""Opens the corpora of a run: their tokenizer, the ranges of their splits, and the datasets that draw from them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron.core.config import DataConfig, TokenizerConfig
from megatron.core.datasets.blending import Blend, BlendSpec, blend_rates, corpora_of
from megatron.core.datasets.checksums import combined_crc32
from megatron.core.datasets.corpus import SPLITS, Corpus, CorpusRange, open_corpus, split_corpus
from megatron.core.datasets.corpus_cache import is_text, prepare_text
from megatron.core.datasets.denoising import DenoisingPlan, mode_tokenizer
from megatron.core.datasets.indexed_dataset import manifest_path, resolve_prefix
from megatron.core.datasets.loader import Dataset
from megatron.core.datasets.packed_documents import PackedDocumentsDataset
from megatron.core.datasets.t5_dataset import DenoisingDataset, SpecialTokens
from megatron.core.errors import UserError
from megatron.core.tokenizers import Tokenizer, build_tokenizer, load_tokenizer
from megatron.training.config import RunConfig

SHOWN_NAMES = 5  # in a warning about many corpora
MOST_LOOKED_AT = 1000  # documents of a split whose lengths are looked at before they are packed


class Split(NamedTuple):
    """The corpora of a split and their rates in its blend."""

    parts: list[CorpusRange]
    rates: list[int]


class OpenedCorpora(NamedTuple):
    """What a run needs to know of its corpora.

    Attributes:
        tokenizer: That made the ids of all of them, with as many sentinels as the run is to have.
        datasets: By name of the split; None for those without data.
        names: Of the corpora that are trained on.
        fingerprint: What a checkpoint records of the training data.
        warnings: One line each.
    """

    tokenizer: Tokenizer
    datasets: dict[str, Dataset | None]
    names: list[str]
    fingerprint: dict[str, Any]
    warnings: list[str]


def prepare_texts(config: RunConfig) -> None:
    """Tokenize the corpora that are text, unless that was done before."""
    paths = [spec.path for spec in corpora_of(config.data).corpora if is_text(spec.path)]
    tokenizer = _tokenizer_of_flags(config.tokenizer) if paths else None
    for path in paths:
        prepare_text(path, config.tokenizer, config.data, built=tokenizer)


def open_corpora(config: RunConfig) -> OpenedCorpora:
    """Open what the flags name, in constant time for each corpus; text is prepared unless that was done before.

    Args:
        config: The run.

    Raises:
        UserError: a corpus, the blend or the objective is unusable.
    """
    spec = corpora_of(config.data)
    opened = _open_all(spec, config)
    # Data of Megatron-LM do not say what made them; ids outside the vocabulary are refused when they are read.
    telling = [corpus for corpus in opened.values() if corpus.manifest is not None]
    tokenizer = resolve_tokenizer(next(iter([*telling, *opened.values()])), config.tokenizer)
    for corpus in telling[1:]:
        _check_tokenizer(corpus, telling[0], tokenizer)
    special = SpecialTokens.from_tokenizer(tokenizer)
    plan = DenoisingPlan.build(config.data, len(special.sentinel_ids), mode_tokenizer(tokenizer))
    splits, warnings = _splits(spec, opened, config.data, plan)
    datasets = {
        name: _dataset(split, plan, special, config, name) if split.parts else None for name, split in splits.items()
    }
    for name, dataset in datasets.items():
        if isinstance(dataset, PackedDocumentsDataset) and dataset.left_out:
            warnings.append(
                f"{dataset.left_out:,} {name} documents of fewer than 2 tokens cannot be denoised and are left out"
            )
    train = splits["train"]
    fingerprint = _fingerprint(train, divided_by_flag=any(s.split is None for s in spec.shared))
    return OpenedCorpora(tokenizer, datasets, [part.name for part in train.parts], fingerprint, warnings)


def _open_all(spec: BlendSpec, config: RunConfig) -> dict[str, Corpus]:
    """Every corpus, by the path that the user gave."""
    opened: dict[str, Corpus] = {}
    paths: dict[Path, str] = {}  # by prefix
    text = {corpus.path for corpus in spec.corpora if is_text(corpus.path)}
    tokenizer = _tokenizer_of_flags(config.tokenizer) if text else None
    for corpus in spec.corpora:
        if corpus.path in text:
            prefix = prepare_text(corpus.path, config.tokenizer, config.data, built=tokenizer)
        else:
            prefix = resolve_prefix(corpus.path)
        if other := paths.get(prefix):
            if other != corpus.path:
                raise UserError(f"{other} and {corpus.path} are the same corpus, {prefix}; name it once")
            continue
        paths[prefix] = corpus.path
        opened[corpus.path] = open_corpus(prefix)
    return opened


def _tokenizer_of_flags(config: TokenizerConfig) -> Tokenizer | None:
    return build_tokenizer(config) if config.names_tokenizer else None


def _splits(
    spec: BlendSpec, opened: dict[str, Corpus], config: DataConfig, plan: DenoisingPlan
) -> tuple[dict[str, Split], list[str]]:
    """Corpora and rates of each split, and warnings about what is too short to be held out."""
    shortest = 2 if config.packing == "segments" else max(window.raw for window in plan.windows)
    ranges = {s.path: split_corpus(opened[s.path], s.split_weights(config), s.path) for s in spec.shared}
    splits, warnings = {}, []
    for index, name in enumerate(SPLITS):
        # A corpus whose own shares leave this split nothing is not meant for it.
        divided = [(s, ranges[s.path][name]) for s in spec.shared if s.split_weights(config)[index] > 0]
        parts = divided + [(s, _whole(opened[s.path], s.path)) for s in spec.by_split.get(name, ())]
        short = [part for _, part in parts if _is_short(part, shortest, config)]
        if short and name == "train":
            raise UserError(_too_short(short[0], shortest, alone=len(parts) == 1))
        if short:
            flag = f"--split {config.split}" if divided and divided[0][0].split is None else None
            warnings.append(_held_out_warning(name, short, len(parts), shortest, flag))
        kept = [(s, part) for s, part in parts if part not in short]
        tokens = [part.num_tokens for _, part in kept]
        rates = blend_rates(tokens, [s for s, _ in kept], config) if len(kept) > 1 else [1] * len(kept)
        splits[name] = Split([part for _, part in kept], rates)
        if name == "train" and (warning := _unimax_warning(sum(tokens), config)):
            warnings.append(warning)
    if not splits["train"].parts:
        raise UserError("no corpus is for training; give one with --data-path or --train-data-path, or another --split")
    return splits, warnings


def _is_short(part: CorpusRange, shortest: int, config: DataConfig) -> bool:
    """Whether a range has not even one sample."""
    if part.num_tokens < shortest:
        return True
    if config.packing != "segments" or part.num_documents > MOST_LOOKED_AT:
        return False
    return bool(np.diff(part.corpus.document_starts(*part.documents)).max() < shortest)


def _unimax_warning(num_tokens: int, config: DataConfig) -> str | None:
    epochs, budget = config.mixture_max_epochs, config.mixture_budget_tokens
    if epochs is None or budget is None or num_tokens * epochs >= budget:
        return None
    return (
        f"--mixture-budget-tokens {budget} is more than {epochs:g} epochs of all corpora ({num_tokens} tokens); they "
        "are mixed by size, and a run of the whole budget reads them more often than --mixture-max-epochs says"
    )


def _whole(corpus: Corpus, name: str) -> CorpusRange:
    return CorpusRange(corpus, name, (0, corpus.num_documents), (0, corpus.num_tokens))


def _too_short(part: CorpusRange, shortest: int, alone: bool) -> str:
    cure = (
        "use more text, another --split or a smaller --encoder-seq-length"
        if alone
        else "leave it out of the blend, join it with others (tools/merge_datasets.py), or shorten --encoder-seq-length"
    )
    return f"{part.name} has {part.num_tokens} train tokens, but one sample takes {shortest}; {cure}"


def _held_out_warning(name: str, short: list[CorpusRange], num_parts: int, shortest: int, flag: str | None) -> str:
    use = "validation" if name == "valid" else name
    if num_parts == 1:
        leaves = f"{flag} leaves {short[0].num_tokens} of {short[0].name}'s tokens for {use}"
        has = f"{short[0].name} has {short[0].num_tokens} tokens for {use}"
        return f"{leaves if flag else has}, but one sample takes {shortest}; there will be no {use} loss"
    names = ", ".join(part.name for part in short[:SHOWN_NAMES]) + (", ..." if len(short) > SHOWN_NAMES else "")
    return (
        f"{len(short)} of {num_parts} corpora have fewer {use} tokens than the {shortest} of one sample and are left "
        f"out of the {use} loss: {names}"
    )


def _dataset(split: Split, plan: DenoisingPlan, special: SpecialTokens, config: RunConfig, name: str) -> Dataset:
    blend = Blend(split.rates) if len(split.parts) > 1 else None
    seed, data = config.training.seed, config.data
    if data.packing == "segments":
        return PackedDocumentsDataset(split.parts, plan, special, seed, name, blend=blend, window=data.packing_window)
    return DenoisingDataset(
        split.parts, plan, special, seed, name, blend=blend, block_windows=data.shuffle_block_windows
    )


def _fingerprint(train: Split, divided_by_flag: bool) -> dict[str, Any]:
    """What a checkpoint records of the training data, to recognise it.

    Of one corpus that `--split` divides, which the checkpoint records as well, it is that of the corpus; otherwise also
    of which documents are trained on and, in a blend, of who has which share.
    """
    if len(train.parts) == 1 and divided_by_flag:
        return train.parts[0].corpus.describe()
    content = [[_identity(part.corpus), part.documents] for part in train.parts]
    return {
        "num_corpora": len(train.parts),
        "num_documents": sum(part.corpus.num_documents for part in train.parts),
        "num_tokens": sum(part.corpus.num_tokens for part in train.parts),
        "fingerprint": hashlib.sha256(json.dumps([content, train.rates]).encode()).hexdigest()[:16],
    }


def _identity(corpus: Corpus) -> Any:
    """What tells a corpus of a blend from others: the checksum of its ids, the same in one file and in shards.

    Manifests have it, since thousands of corpora could not all be read at hundreds of places.
    """
    files = [(shard.manifest or {}).get("files") for shard in corpus.shards]
    whole = 0
    for described in files:
        ids = described.get("bin") if isinstance(described, dict) else None
        if ids is None:
            return corpus.describe()
        whole = combined_crc32(whole, ids["crc32"], ids["bytes"])
    return [corpus.num_tokens, whole]


def _manifest_entry(corpus: Corpus, *keys: str) -> str:
    """The text under nested `keys` of the corpus's manifest."""
    value: Any = corpus.manifest
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise UserError(
            f"{manifest_path(corpus.prefix)} has no {'.'.join(keys)}; preprocess the corpus again, or remove it "
            "and give --tokenizer-type and --tokenizer-model (or --vocab-file)"
        )
    return value


def resolve_tokenizer(corpus: Corpus, config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of the flags, or else the one that travels with the data; checked against the manifest."""
    if config.names_tokenizer:
        tokenizer, source = build_tokenizer(config), "the tokenizer of the flags"
    elif corpus.manifest is None:
        raise UserError(
            f"{corpus.prefix} has no manifest that names its tokenizer; give --tokenizer-type and --tokenizer-model "
            "(or --vocab-file)"
        )
    else:
        directory = corpus.prefix.parent / _manifest_entry(corpus, "tokenizer_directory")
        tokenizer, source = load_tokenizer(directory), str(directory)
    if corpus.manifest is not None:
        recorded = _manifest_entry(corpus, "tokenizer", "fingerprint")
        if not tokenizer.spells_as(corpus.manifest["tokenizer"]):
            raise UserError(
                f"{source} ({tokenizer.type}, {tokenizer.vocab_size} ids, fingerprint {tokenizer.fingerprint[:12]}) "
                f"is not the one that made {corpus.prefix} (fingerprint {recorded[:12]}); use that one, or preprocess "
                "the corpus again"
            )
    return tokenizer if config.vocab_extra_ids is None else tokenizer.with_sentinels(config.vocab_extra_ids)


def _check_tokenizer(corpus: Corpus, first: Corpus, tokenizer: Tokenizer) -> None:
    """Refuse a corpus whose ids another tokenizer made."""
    assert corpus.manifest is not None
    ours, others = (_manifest_entry(c, "tokenizer", "fingerprint") for c in (first, corpus))
    if ours != others and not tokenizer.spells_as(corpus.manifest["tokenizer"]):
        raise UserError(
            f"{corpus.prefix} was made with another tokenizer (fingerprint {others[:12]}) than {first.prefix} "
            f"({ours[:12]}); preprocess one of them again with the other's tokenizer"
        )
