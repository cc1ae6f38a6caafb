"""Joins datasets of one tokenizer: into one dataset, or as the shards of one corpus without copying where possible."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core.datasets.corpus import open_corpus, publish_sharded
from megatron.core.datasets.file_copies import link_or_copy
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.indexed_format import (
    bin_path,
    encode_manifest,
    idx_path,
    is_dataset,
    is_sharded,
    manifest_path,
    remove_dataset,
    require_own_manifest,
    shard_prefix,
)
from megatron.core.datasets.indexed_writer import IndexedDatasetWriter, publish_prepared, remove_partials
from megatron.core.datasets.output_lock import output_locked
from megatron.core.datasets.preprocessing_output import manifest_of, tokenizer_directory
from megatron.core.datasets.preprocessing_workers import signals_wait
from megatron.core.errors import UserError
from megatron.core.file_utils import fsync_directory, partial_path, replace_directory, write_durably
from megatron.core.tokenizers import load_tokenizer, require_replaceable


def find_datasets(inputs: Sequence[str]) -> list[Path]:
    """Prefixes that `--input` means: of a directory, those of all datasets in it, sorted by name.

    Raises:
        UserError: something is no dataset.
    """
    prefixes: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            names = {file.stem for file in path.iterdir() if file.suffix in (".bin", ".idx")}
            if not names:
                raise UserError(f"--input {text}: no .idx in this directory; give one with datasets, or prefixes")
            prefixes += [path / name for name in sorted(names)]
        elif is_dataset(path):
            prefixes.append(path)
        else:
            raise UserError(f"--input {text}: neither a directory nor a dataset: {idx_path(path)} does not exist")
    return prefixes


def open_alike(prefixes: Sequence[Path]) -> list[IndexedDataset]:
    """The datasets of these prefixes, all shards of sharded ones; of one dtype and one tokenizer.

    Raises:
        UserError: two differ, one is named twice (also as a shard of its corpus), or one cannot be opened.
    """
    datasets = [shard for prefix in prefixes for shard in open_corpus(prefix).shards]
    counts = Counter(dataset.prefix.resolve() for dataset in datasets)
    for dataset in datasets:
        count = counts[dataset.prefix.resolve()]
        if count > 1:
            raise UserError(f"--input names {dataset.prefix} {count} times; its documents would be repeated")
    first = datasets[0]
    for other in datasets[1:]:
        if _tokenizer_of(other) != _tokenizer_of(first):
            raise UserError(
                f"{first.prefix} and {other.prefix} have different tokenizers ({_tokenizer_name(first)}, "
                f"{_tokenizer_name(other)}); preprocess one of them again"
            )
        if other.dtype != first.dtype:
            raise UserError(
                f"{first.prefix} holds {first.dtype.name} ids, {other.prefix} {other.dtype.name}; preprocess one of "
                "them again"
            )
    return datasets


def _tokenizer_of(dataset: IndexedDataset) -> Any:
    return (dataset.manifest or {}).get("tokenizer")


def _tokenizer_name(dataset: IndexedDataset) -> str:
    tokenizer = _tokenizer_of(dataset)
    if not isinstance(tokenizer, dict):
        return "not recorded"
    return f"{tokenizer.get('type')} with fingerprint {str(tokenizer.get('fingerprint'))[:12]}"


def merge(datasets: Sequence[IndexedDataset], output_prefix: str | Path, overwrite: bool = False) -> IndexedDataset:
    """Write all documents, in this order, as one dataset; returns it.

    Its files are those of preprocessing all texts at once, but for `run` in the manifest, which tells preprocessing
    what it has done itself. Entries of the manifests that contradict each other are left out of the new one.

    Args:
        datasets: From `open_alike`.
        output_prefix: Path without `.bin` and `.idx`.
        overwrite: Replace a dataset that exists.

    Raises:
        UserError: the output exists, is an input, would replace what is no dataset, or a dataset is damaged.
    """
    prefix = Path(output_prefix)
    _check_output(datasets, [prefix], overwrite)
    with (
        output_locked(prefix) as lock,
        IndexedDatasetWriter(prefix, datasets[0].dtype, overwrite, is_locked=True) as writer,
    ):
        lock.take_over()
        for dataset in datasets:
            writer.add_dataset(dataset)
        with _tokenizer_prepared(datasets[0], prefix) as entries:
            writer.prepare(_joined_manifest(datasets, entries))
            with signals_wait():
                _remove_old(prefix)
                _publish_tokenizer(prefix)
                writer.publish()
    return IndexedDataset(prefix)


def merge_as_shards(
    datasets: Sequence[IndexedDataset], output_prefix: str | Path, overwrite: bool = False
) -> Counter[str]:
    """Make datasets, in this order, the shards of one corpus; no ids are read or written where hard links work.

    Args:
        datasets: From `open_alike`, all with a manifest.
        output_prefix: Prefix of the corpus.
        overwrite: Replace a dataset that exists.

    Returns:
        How many files were "linked", "reflinked" or "copied".

    Raises:
        UserError: the output exists, is an input, would replace what is no dataset, or a dataset has no manifest.
    """
    prefix = Path(output_prefix)
    shards = [shard_prefix(prefix, number) for number in range(len(datasets))]
    _check_output(datasets, [prefix, *shards], overwrite)
    for dataset in datasets:
        if dataset.manifest is None:
            raise UserError(f"{dataset.prefix} has no manifest, as shards have; leave out --as-shards")
    ways: Counter[str] = Counter()
    with output_locked(prefix) as lock, _tokenizer_prepared(datasets[0], prefix) as entries:
        _check_output(datasets, [prefix, *shards], overwrite)
        lock.take_over()
        try:
            for dataset, shard in zip(datasets, shards, strict=True):
                remove_partials(shard)
                for path in (bin_path, idx_path):
                    ways[link_or_copy(path(dataset.prefix), partial_path(path(shard)))] += 1
                assert dataset.manifest is not None
                content = encode_manifest(dataset.manifest | entries)
                write_durably(partial_path(manifest_path(shard)), content)
            with signals_wait():
                _remove_old(prefix)
                _publish_tokenizer(prefix)
                try:
                    for shard in shards:
                        publish_prepared(shard)
                    publish_sharded(prefix, len(shards), _shared_entries(datasets) | entries)
                except BaseException:
                    for shard in shards:
                        remove_dataset(shard)
                    raise
        finally:
            for shard in shards:
                remove_partials(shard)
    return ways


def _check_output(datasets: Sequence[IndexedDataset], names: Sequence[Path], overwrite: bool) -> None:
    """Refuse an output that exists, is an input, or would replace what is none of ours; `names` are its prefixes."""
    prefix = names[0]
    replaces_shards = len(names) > 1 or is_sharded(prefix)
    for dataset in datasets:
        if dataset.prefix.resolve() == prefix.resolve() or (replaces_shards and _is_shard(dataset.prefix, prefix)):
            raise UserError(f"--input {dataset.prefix} would be replaced by the output; give another --output-prefix")
    for name in names:
        if is_dataset(name) and not overwrite:
            raise UserError(f"{name} exists; give another --output-prefix, or --overwrite to replace it")
        require_own_manifest(name)
    require_replaceable(tokenizer_directory(prefix))


def _is_shard(prefix: Path, corpus: Path) -> bool:
    """Whether a prefix is that of a shard of this corpus, whatever its number."""
    name, start = prefix.name, f"{corpus.name}-"
    is_one = name.startswith(start) and name[len(start) :].isdigit()
    return is_one and prefix.parent.resolve() == corpus.parent.resolve()


def _remove_old(prefix: Path) -> None:
    """Remove the older dataset of this prefix, before its tokenizer goes: no data stands beside one not its own."""
    remove_dataset(prefix)
    fsync_directory(prefix.parent)


@contextmanager
def _tokenizer_prepared(dataset: IndexedDataset, prefix: Path) -> Iterator[dict[str, Any]]:
    """Copy the tokenizer of a dataset to the temporary name of the output's; gives what manifests say of it.

    Raises:
        UserError: the copy beside the dataset is not the one that its manifest names.
    """
    recorded = _tokenizer_of(dataset)
    if recorded is None:
        yield {}
        return
    assert dataset.manifest is not None
    name = dataset.manifest.get("tokenizer_directory")
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"{manifest_path(dataset.prefix)}: tokenizer_directory is {name!r}, not a name beside it")
    tokenizer = load_tokenizer(dataset.prefix.parent / name)
    if tokenizer.describe() != recorded:
        raise UserError(
            f"{dataset.prefix.parent / name} is not the tokenizer that {manifest_path(dataset.prefix)} describes; "
            "copy it again"
        )
    partial = partial_path(tokenizer_directory(prefix))
    try:
        tokenizer.save(partial)
        yield manifest_of(prefix, {"tokenizer": recorded})
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there once it is published


def _publish_tokenizer(prefix: Path) -> None:
    directory = tokenizer_directory(prefix)
    if partial_path(directory).exists():
        replace_directory(partial_path(directory), directory)


def _shared_entries(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    """What the manifests say of how the texts were read, as far as they agree, and all their inputs."""
    manifests = [dataset.manifest or {} for dataset in datasets]
    entries = {
        key: manifests[0][key]
        for key in ("json_key", "append_eod")
        if all(key in manifest and manifest[key] == manifests[0].get(key) for manifest in manifests)
    }
    inputs = [manifest.get("inputs") for manifest in manifests]
    return entries | {"inputs": [source for sources in inputs if isinstance(sources, list) for source in sources]}


def _joined_manifest(datasets: Sequence[IndexedDataset], tokenizer: dict[str, Any]) -> dict[str, Any] | None:
    if all(dataset.manifest is None for dataset in datasets):
        return None
    return _shared_entries(datasets) | tokenizer
