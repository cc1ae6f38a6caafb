"""Blends of corpora: which ones, how much of each, and which of them gives sample n.

After any number of samples of a blend, each corpus has given its share of them, rounded up or down. Sample n is found
without an index of the samples before it, so that neither start-up nor memory depends on the length of the training,
and no sample on how many are trained on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron.core.config import DataConfig, flag_name
from megatron.core.datasets.blending_helpers import BlendOrder
from megatron.core.datasets.corpus import SPLITS
from megatron.core.datasets.corpus_sources import HUB_PREFIX
from megatron.core.errors import UserError

LEAST_SHARE = Fraction(1, 2**27)  # of a corpus in a blend; finding a sample takes time in proportion to 1 / share

_KEYS = ("path", "weight", "split")
_MOST_RATE = 2**53
_RATE_UNIT = 2**40  # of the largest rate, where rates are rounded


class Blend:
    """An endless stream of draws from datasets in given proportions: a pure function of the position.

    Before position k, a dataset with share p has had floor(p * k) or ceil(p * k) draws, for every k. Positions that
    ascend from call to call are quickest; any other costs a walk of `block_length` positions at most.

    Attributes:
        rates: Shares of the datasets, as given.
        block_length: At least 4,096, and a little more than the reciprocal of the least share.
    """

    def __init__(self, rates: Sequence[int]) -> None:
        """Prepare the stream.

        Args:
            rates: Positive shares of the datasets, in any unit; whole numbers, which no platform rounds differently.
                None may be below `LEAST_SHARE` of their sum.
        """
        divisor = math.gcd(*rates)
        self.rates = tuple(rates)
        self._order = BlendOrder(np.array([rate // divisor for rate in rates], np.int64))
        self.block_length = self._order.block_length

    def __reduce__(self) -> tuple[type[Blend], tuple[tuple[int, ...]]]:
        return Blend, (self.rates,)

    def draws(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Dataset of each position `[m]` of the stream, and how many earlier positions were the same dataset's."""
        return self._order.draws(positions)

    def counts(self, position: int) -> NDArray[np.int64]:
        """Draws of each dataset before `position`.  # [d]"""
        return self._order.counts(position)


class CorpusSpec(NamedTuple):
    """A corpus as the user named it."""

    path: str
    """A prefix, or a file of text."""
    weight: float | None = None
    """Share of the samples, in any unit; None unless the user gave weights."""
    split: str | None = None
    """Shares of its documents for training, validation and test, where not those of `--split`."""

    def split_weights(self, config: DataConfig) -> tuple[float, float, float]:
        """Shares of its documents for training, validation and test, summing to 1."""
        return config.split_weights(self.split)


class BlendSpec(NamedTuple):
    """The corpora of a run."""

    shared: list[CorpusSpec]
    """Corpora whose documents are divided among training, validation and test."""
    by_split: dict[str, list[CorpusSpec]]
    """Corpora of which all documents are for one of "train", "valid" and "test"."""

    @property
    def corpora(self) -> list[CorpusSpec]:
        """All corpora, those of several splits as often."""
        return [*self.shared, *(corpus for split in SPLITS for corpus in self.by_split.get(split, ()))]

    def of_split(self, split: str) -> list[CorpusSpec]:
        """All corpora of one of "train", "valid" and "test", in the order of the blend."""
        return self.shared + self.by_split.get(split, [])


def corpora_of(config: DataConfig) -> BlendSpec:
    """The corpora that the flags name.

    Raises:
        UserError: there are none, or they are named in a way that cannot be meant; names the flag, or the file and
            the entry.
    """
    if config.data_config:
        spec = _corpora_of_file(config, Path(config.data_config))
        source = f"--data-config {config.data_config}"
    else:
        shared = _corpora_of_values("--data-path", config.data_path)
        flags = {split: f"{split}_data_path" for split in SPLITS}
        by_split = {split: _corpora_of_values(flag_name(name), getattr(config, name)) for split, name in flags.items()}
        spec = BlendSpec(shared, {split: corpora for split, corpora in by_split.items() if corpora})
        source = "--data-path" if shared else "--train-data-path"
    if not spec.of_split("train"):
        raise UserError(
            "--data-path is missing; give prefixes of datasets made by tools/preprocess_data.py, or files of text"
            if not config.data_config
            else f"{source} has no corpora to train on; add a list 'corpora' or 'train'"
        )
    for split in SPLITS:
        _check_blend(source, spec.of_split(split), config)
    return spec


def _check_blend(source: str, specs: Sequence[CorpusSpec], config: DataConfig) -> None:
    """Refuse weights for some corpora only, weights beside another rule, and corpora that are named twice."""
    weighted = [spec for spec in specs if spec.weight is not None]
    if weighted and len(weighted) < len(specs):
        without = next(spec for spec in specs if spec.weight is None)
        raise UserError(
            f"{source}: {weighted[0].path} has a weight but {without.path} has none; give each of them one, or none"
        )
    rules = {"mixture_temperature": config.mixture_temperature != 1.0}
    rules["mixture_max_epochs"] = config.mixture_max_epochs is not None
    for name, given in rules.items():
        if weighted and given:
            raise UserError(f"{flag_name(name)} is for corpora without weights, but {source} has some; drop one")
    if all(rules.values()):
        raise UserError("--mixture-temperature and --mixture-max-epochs are both given; choose one")
    seen: dict[Path, str] = {}
    for spec in specs:
        place = _place(source, spec.path)
        if place in seen:
            raise UserError(f"{source} has {spec.path} twice; name it once, with a larger weight if that is meant")
        seen[place] = spec.path


def _place(source: str, path: str) -> Path:
    """Where a path leads, for comparison."""
    try:
        os.fsencode(path)
        return Path(path).resolve()
    except ValueError as error:  # a NUL, or half of a character: what no file can be called
        raise UserError(f"{source}: path {path!r} cannot be one ({error}); mend it") from None


def _number(text: str) -> float | None:
    """The number that `text` can be read as."""
    try:
        return float(text)
    except ValueError:
        return None


def _corpora_of_values(flag: str, values: Sequence[str]) -> list[CorpusSpec]:
    """Corpora of a flag's values: paths, or weights and paths in turn."""
    if all(_number(value) is None for value in values):
        return [CorpusSpec(path) for path in values]
    specs = []
    for n in range(0, len(values), 2):
        text, weight = values[n], _number(values[n])
        if weight is None:
            number = next(value for value in values if _number(value) is not None)
            raise UserError(
                f"{flag}: {text} has no weight before it, but {number} is one; give each corpus a weight, or none "
                f"(a path that looks like a number is written ./{number})"
            )
        if n + 1 == len(values):
            raise UserError(f"{flag}: weight {text} has no path after it (one that is meant as a path: ./{text})")
        path = values[n + 1]
        if _number(path) is not None:
            raise UserError(f"{flag}: {path} follows weight {text}; a path is due (one that is meant as it: ./{path})")
        specs.append(CorpusSpec(path, _checked_weight(f"{flag}: weight {text} of {path}", weight)))
    return specs


def _checked_weight(what: str, weight: float) -> float:
    if not 0.0 < weight < math.inf:
        raise UserError(f"{what} must be a number greater than 0; leave a corpus out that is not wanted")
    return weight


def _corpora_of_file(config: DataConfig, file: Path) -> BlendSpec:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--data-config {file} cannot be read: {error.strerror}") from error
    except RecursionError:
        raise UserError(f"--data-config {file} is not YAML that can be read: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--data-config {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"--data-config {file} must have lists 'corpora', or 'train', 'valid' and 'test', of corpora")
    lists: dict[str, list[CorpusSpec]] = {}
    for section, entries in content.items():
        where = f"--data-config {file}"
        if section not in ("corpora", *SPLITS):
            raise UserError(f"{where} has an unknown key {section!r}; {_hint(section, ('corpora', *SPLITS))}")
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{where}: {section} is {entries!r}; it must be a list of corpora, each with a path")
        lists[section] = [
            _corpus_of_entry(f"{where}, {section} {n}", entry, file, config, divided=section == "corpora")
            for n, entry in enumerate(entries, start=1)
        ]
    return BlendSpec(lists.pop("corpora", []), lists)


def _hint(key: object, known: Sequence[str]) -> str:
    nearest = get_close_matches(str(key), known, 1)
    return f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(known)}"


def _corpus_of_entry(where: str, entry: Any, file: Path, config: DataConfig, divided: bool) -> CorpusSpec:
    """The corpus of one entry of the YAML file; its path counts from the file's folder, but for the hub's."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected keys and values such as 'path: books', found {entry!r}")
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"{where} has an unknown key {key!r}; {_hint(key, _KEYS)}")
    path, weight, split = (entry.get(key) for key in _KEYS)
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}: path is {path!r}; it must be text, in quotes where YAML takes it for more")
    if "weight" in entry:
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"{where}: weight is {weight!r}; it must be a number")
        weight = _checked_weight(f"{where}: weight {weight}", weight)
    if not path.startswith(HUB_PREFIX):
        path = str(file.parent / path)
    if "split" not in entry:
        return CorpusSpec(path, weight)
    if not divided:
        raise UserError(f"{where} has a split, but all of it is for one; drop the split, or list it under 'corpora'")
    spec = CorpusSpec(path, weight, str(split))
    try:
        spec.split_weights(config)
    except UserError as error:
        raise UserError(f"{where}: split is {split!r}; give up to three shares such as '969,30,1'") from error
    return spec


def blend_rates(tokens: Sequence[int], specs: Sequence[CorpusSpec], config: DataConfig) -> list[int]:
    """Shares of the samples that corpora give, in whole numbers for `Blend`.

    The weights where there are some: exactly, as long as they are decimals of less than 16 digits. Else shares by
    UniMax if `--mixture-max-epochs` is given, or in proportion to size ** (1 / temperature).

    Args:
        tokens: Size of each corpus, none 0.
        specs: Of the same corpora, as `corpora_of` has checked them.
        config: `--mixture-temperature`, `--mixture-max-epochs` and `--mixture-budget-tokens`.

    Raises:
        UserError: a share is below `LEAST_SHARE`, which names the corpus.
    """
    assert len(tokens) == len(specs) and tokens and min(tokens) > 0
    shares: list[Fraction]
    if specs[0].weight is not None:
        # As the decimal that was written, not as the binary number next to it.
        shares = [Fraction(repr(spec.weight)) for spec in specs]
    elif config.mixture_max_epochs is not None:
        assert config.mixture_budget_tokens is not None
        shares = unimax(tokens, config.mixture_budget_tokens, Fraction(repr(config.mixture_max_epochs)))
    elif config.mixture_temperature == 1.0:
        shares = [Fraction(size) for size in tokens]
    else:
        # Rounded to what platforms agree on.
        largest, exponent = max(tokens), 1 / config.mixture_temperature
        shares = [Fraction(round(_RATE_UNIT * (size / largest) ** exponent)) for size in tokens]
    total = sum(shares)
    for spec, size, share in zip(specs, tokens, shares, strict=True):
        if share < LEAST_SHARE * total:
            raise UserError(
                f"{spec.path} ({size} tokens) would have a share of {float(share / total):.1e} of the samples, and "
                f"{float(LEAST_SHARE):.1e} is the least; leave it out, merge it with others, or give it more weight"
            )
    return _whole_numbers(shares)


def unimax(tokens: Sequence[int], budget: int, max_epochs: Fraction) -> list[Fraction]:
    """Tokens that each corpus gives to a budget: the same from all, but from none more than `max_epochs` of it.

    If the budget exceeds what all together may give, each gives what it may. Chung et al. 2023 (UniMax).

    Args:
        tokens: Size of each corpus.
        budget: Tokens to give.
        max_epochs: Most epochs of a corpus.
    """
    given, left = [Fraction(0)] * len(tokens), Fraction(budget)
    smallest_first = sorted(range(len(tokens)), key=lambda n: tokens[n])
    for place, n in enumerate(smallest_first):
        given[n] = min(left / (len(tokens) - place), tokens[n] * max_epochs)
        left -= given[n]
    return given


def _whole_numbers(shares: Sequence[Fraction]) -> list[int]:
    """The shares in the coarsest unit in which all are whole, or rounded where the numbers would be too large."""
    unit = math.lcm(*(share.denominator for share in shares))
    rates = [share.numerator * (unit // share.denominator) for share in shares]
    divisor = math.gcd(*rates)
    rates = [rate // divisor for rate in rates]
    largest = max(rates)
    if largest <= _MOST_RATE and sum(rates) <= 2**62:
        return rates
    # Halves up. With a share of LEAST_SHARE a rate still has 13 bits.
    return [(2 * rate * _RATE_UNIT + largest) // (2 * largest) for rate in rates]
