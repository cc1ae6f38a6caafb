"""Denoising objectives: how many tokens go where. No randomness and no data here.

Three kinds of denoiser, each of a window or document of `raw` tokens:

    spans    random spans are masked (Raffel et al. 2020; the R- and X-denoisers of UL2)
             inputs  mode, kept tokens with a sentinel a span, EOS     targets  sentinel and tokens of each span, EOS
    prefix   the last share of the tokens is the target (UL2's S-denoiser)
             inputs  mode, beginning, EOS                              targets  end, EOS
    uniform  likewise, cut after 1 .. raw - 1 tokens with equal chances (prefix language modelling)

The mode is the text that tells the model which denoiser it sees (Tay et al. 2022), as ids, or nothing.

A span denoiser whose mean span length is at least its noise masks one span, at the end: a prefix denoiser with a
sentinel between beginning and end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron.core.config import DataConfig
from megatron.core.datasets.mixture import Mixture
from megatron.core.errors import UserError
from megatron.core.tokenizers import Tokenizer

_RATE_UNIT = 1 << 32
_LEAST_RATE, _MOST_RATE = 1e-100, 1e100  # any unit will do, and the arithmetic with them stays finite
_FORM = "MODE:MEAN_SPAN:DENSITY[:RATE] or MODE:prefix:DENSITY[:RATE], DENSITY of a prefix possibly 'uniform'"

UL2_DENOISERS = (
    "[NLU]:3:0.15", "[NLU]:8:0.15", "[S2S]:prefix:0.25",
    "[NLG]:3:0.5", "[NLG]:8:0.5", "[NLG]:64:0.15", "[NLG]:64:0.5",
)  # fmt: skip
"""The seven of the UL2 paper's table, at equal rates, with the mode tokens of the published checkpoints."""


class SpanLengths(NamedTuple):
    """Token counts of a denoised window."""

    raw: int
    """Tokens of the window before corruption."""
    inputs: int
    """Encoder tokens: the mode, what is not noise, one sentinel a span, and EOS."""
    targets: int
    """Decoder tokens: the noise, one sentinel a span, and EOS."""
    noise_tokens: int
    """Masked tokens of the window."""
    num_spans: int
    """Sentinels, one for each span of masked tokens; 0 for prefix denoisers."""


@dataclass(frozen=True)
class Denoiser:
    """One way to make inputs and targets.

    Attributes:
        name: What logs call it.
        mean_span_length: Mean tokens of a masked span; None: no spans but a prefix and its continuation.
        noise_density: Share of the tokens that is masked; None: uniform.
        rate: Share of the samples, in any unit.
        mode_ids: Ids before the inputs.
    """

    name: str
    mean_span_length: float | None
    noise_density: float | None
    rate: int = 1
    mode_ids: tuple[int, ...] = ()

    def lengths(self, raw: int) -> SpanLengths:
        """Counts for `raw` tokens, at least 2. Of the uniform kind: the most inputs and the most targets.

        As in Google's `random_spans_noise_mask`, but that a short text has fewer spans where they would touch.
        """
        assert raw >= 2
        if self.noise_density is None:
            return SpanLengths(raw, len(self.mode_ids) + raw, raw, raw - 1, 0)
        noise = min(max(round(raw * self.noise_density), 1), raw - 1)
        spans = 0
        if self.mean_span_length is not None:
            spans = min(max(round(noise / self.mean_span_length), 1), raw - noise)
        return SpanLengths(raw, len(self.mode_ids) + raw - noise + spans + 1, noise + spans + 1, noise, spans)

    def window(self, encoder_seq_length: int) -> SpanLengths:
        """The largest window whose inputs fit `encoder_seq_length` tokens (`random_spans_helper` of Google's t5).

        The inputs fill the row exactly, but for a noise density of 0.5, where they can be one token fewer.

        Raises:
            UserError: No window fits, or the spans are more than the tokens between them.
        """
        raw = _last_that_fits(self.lengths, encoder_seq_length)
        if raw < 2:
            raise UserError(
                f"--encoder-seq-length is {encoder_seq_length}; a sample of {self.name} has at least "
                f"{self.lengths(2).inputs} encoder tokens"
            )
        lengths = self.lengths(raw)
        if self.mean_span_length is None or self.noise_density is None:
            return lengths
        # With half of the tokens noise, Google keeps the targets no longer than the inputs, here those with the mode.
        if self.noise_density == 0.5 and lengths.targets > lengths.inputs:
            lengths = self.lengths(raw - 1)
        wanted, between = round(lengths.noise_tokens / self.mean_span_length), lengths.raw - lengths.noise_tokens
        if wanted > between:
            raise UserError(
                f"a noise density of {self.noise_density:g} with spans of {self.mean_span_length:g} tokens puts "
                f"{wanted} spans between {between} unmasked tokens; lower the density or make the spans longer"
            )
        return lengths


def _last_that_fits(lengths: Callable[[int], SpanLengths], most_inputs: int) -> int:
    """The largest window, at least 2 tokens, with so many inputs at most; 1 when there is none."""
    fits, too_long = 1, 2
    while lengths(too_long).inputs <= most_inputs:
        fits, too_long = too_long, 2 * too_long
    while too_long - fits > 1:  # the inputs never shrink as the window grows
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if lengths(middle).inputs <= most_inputs else (fits, middle)
    return fits


def mode_tokenizer(tokenizer: Tokenizer) -> Callable[[str], tuple[int, ...]]:
    """How the text of a mode becomes ids; what the tokenizer cannot spell raises `UserError`."""

    def tokenize(mode: str) -> tuple[int, ...]:
        ids = tuple(tokenizer.tokenize(mode))
        if not ids or tokenizer.unk_id in ids:
            raise UserError(
                f"--denoisers: the tokenizer {'has unknown ids' if ids else 'has no ids'} for the mode {mode!r}; give "
                "modes that it can spell, or none, as in :3:0.15"
            )
        return ids

    return tokenize


def denoisers_of(config: DataConfig, tokenize: Callable[[str], Sequence[int]]) -> tuple[Denoiser, ...]:
    """The denoisers of the objective.

    Args:
        config: Objective and its flags.
        tokenize: Ids of a mode's text.

    Raises:
        UserError: `--denoisers` cannot be read.
    """
    if config.objective == "prefix-lm":
        return (Denoiser("prefix-uniform", None, None),)
    if config.objective == "ul2":
        return _parse_denoisers(config.denoisers or UL2_DENOISERS, tokenize)
    name = f"span-{config.mean_noise_span_length:g}-{config.noise_density:g}"
    return (Denoiser(name, config.mean_noise_span_length, config.noise_density),)


def _parse_denoisers(texts: Sequence[str], tokenize: Callable[[str], Sequence[int]]) -> tuple[Denoiser, ...]:
    parsed = [_parse_denoiser(text, tokenize) for text in texts]
    unit = _RATE_UNIT / max(rate for _, rate in parsed)
    names = _distinct_names(texts, [denoiser.name for denoiser, _ in parsed])
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"--denoisers has {name} {names.count(name)} times; give it once, with the sum of the rates"
            )
    return tuple(
        replace(denoiser, name=name, rate=max(1, round(rate * unit)))
        for name, (denoiser, rate) in zip(names, parsed, strict=True)
    )


def _distinct_names(texts: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names, with the mode where denoisers differ in nothing else."""
    modes = [text.split(":")[0] or "no-mode" for text in texts]
    return [f"{m}-{n}" if names.count(n) > 1 else n for m, n in zip(modes, names, strict=True)]


def _parse_denoiser(text: str, tokenize: Callable[[str], Sequence[int]]) -> tuple[Denoiser, float]:
    """A denoiser and its rate."""
    fields = text.split(":")
    try:
        mode, kind, density = fields[:3]
        (rate,) = [float(field) for field in fields[3:]] or [1.0]
        mean = None if kind == "prefix" else float(kind)
        share = None if mean is None and density == "uniform" else float(density)
    except ValueError:
        raise UserError(f"--denoisers {text!r}: not of the form {_FORM}") from None
    if (
        not _LEAST_RATE <= rate <= _MOST_RATE
        or (mean is not None and not 1 <= mean < math.inf)
        or not (share is None or 0 < share < 1)
    ):
        raise UserError(
            f"--denoisers {text!r}: a span has at least 1 token, a density lies between 0 and 1, a rate is above 0 "
            f"(from {_LEAST_RATE:g} to {_MOST_RATE:g}); the form is {_FORM}"
        )
    name = f"prefix-{density}" if mean is None else f"span-{mean:g}-{share:g}"
    return Denoiser(name, mean, share, mode_ids=tuple(tokenize(mode)) if mode else ()), rate


@dataclass(frozen=True)
class DenoisingPlan:
    """The denoisers of a run and the rows that they need.

    Attributes:
        denoisers: At least one.
        windows: Counts of a full window of each; with segments, of the longest piece of a document.
        encoder_length: Columns of an encoder row (s_enc).
        decoder_length: Columns of a decoder row (s_dec).
        paired: Two windows a row, of the only denoiser, whose cuts complement each other.
        mixture: Which denoiser window k of the ring has.
    """

    denoisers: tuple[Denoiser, ...]
    windows: tuple[SpanLengths, ...]
    encoder_length: int
    decoder_length: int
    paired: bool
    mixture: Mixture

    @classmethod
    def build(
        cls,
        config: DataConfig,
        num_sentinels: int,
        tokenize: Callable[[str], Sequence[int]] = lambda mode: (0,),
        pad_to_multiple_of: int = 1,
    ) -> DenoisingPlan:
        """Check that the objective fits rows and sentinels.

        Args:
            config: Objective and lengths.
            num_sentinels: That the tokenizer has.
            tokenize: Ids of a mode's text; by default one for each, for plans without a tokenizer.
            pad_to_multiple_of: Pad both rows to a multiple of this.

        Raises:
            UserError: The rows are too short or the sentinels too few.
        """
        denoisers = denoisers_of(config, tokenize)
        windows: tuple[SpanLengths, ...]
        paired = config.packing == "pairs"
        if paired:
            windows, encoder, decoder = _paired(config, denoisers[0])
        else:
            windows = tuple(denoiser.window(config.encoder_seq_length) for denoiser in denoisers)
            if config.packing == "segments":  # any denoiser may get any piece
                longest = min(window.raw for window in windows)
                windows = tuple(denoiser.lengths(longest) for denoiser in denoisers)
            encoder, decoder = (max(getattr(w, side) for w in windows) for side in ("inputs", "targets"))
        _check_sentinels(config, denoisers, windows, num_sentinels)
        if config.decoder_seq_length is not None and config.decoder_seq_length < decoder:
            raise UserError(
                f"--decoder-seq-length is {config.decoder_seq_length}, but --objective {config.objective} with "
                f"--encoder-seq-length {config.encoder_seq_length} needs {decoder}; raise it or leave it out"
            )
        if config.packing == "segments":  # documents fill what the windows would not
            encoder, decoder = config.encoder_seq_length, config.decoder_seq_length or decoder
        mixture = Mixture([denoiser.rate for denoiser in denoisers])
        encoder, decoder = (-(-length // pad_to_multiple_of) * pad_to_multiple_of for length in (encoder, decoder))
        return cls(denoisers, windows, encoder, decoder, paired, mixture)

    @property
    def longest_piece(self) -> int:
        """Most tokens of a document that fit a row under every denoiser."""
        return min(window.raw for window in self.windows)

    @property
    def tokens_per_sample(self) -> float:
        """Encoder and decoder tokens of a row of windows without padding, mean."""
        rates = [denoiser.rate for denoiser in self.denoisers]
        if self.paired:
            return self.encoder_length + self.decoder_length
        of_windows = [
            # Of the uniform kind, the two sides together have the window, the mode and EOS twice.
            w.inputs + w.targets if d.noise_density is not None else w.raw + 2 + len(d.mode_ids)
            for d, w in zip(self.denoisers, self.windows, strict=True)
        ]
        return sum(r * n for r, n in zip(rates, of_windows, strict=True)) / sum(rates)

    def table(self) -> tuple[NDArray[np.float64], list[NDArray[np.int32]]]:
        """For the C++ side: mean span length (0: prefix) and density (0: uniform) `[k, 2]`, and the modes' ids."""
        numbers = [[d.mean_span_length or 0.0, d.noise_density or 0.0] for d in self.denoisers]
        return np.array(numbers, np.float64), [np.array(d.mode_ids, np.int32) for d in self.denoisers]


def _check_sentinels(
    config: DataConfig, denoisers: Sequence[Denoiser], windows: Sequence[SpanLengths], num_sentinels: int
) -> None:
    """Refuse a tokenizer with fewer sentinels than a window has spans."""
    spans, name = max((window.num_spans, denoiser.name) for denoiser, window in zip(denoisers, windows, strict=True))
    if spans > num_sentinels:
        raise UserError(
            f"{name} makes {spans} spans a sample of --encoder-seq-length {config.encoder_seq_length}, but the "
            f"tokenizer has {num_sentinels} sentinels; give --vocab-extra-ids {spans}, make the rows shorter or the "
            "spans longer"
        )


def _paired(config: DataConfig, denoiser: Denoiser) -> tuple[tuple[SpanLengths], int, int]:
    """Window of a paired row, and the lengths of both rows, which it fills exactly.

    Cut after p tokens, one window has p + EOS as inputs; the other, cut after raw - p, has raw - p + EOS.
    """
    raw = config.encoder_seq_length - 2 - 2 * len(denoiser.mode_ids)
    if raw < 2:
        raise UserError(
            f"--encoder-seq-length is {config.encoder_seq_length}; a pair of windows needs at least 6 tokens"
        )
    return (denoiser.lengths(raw),), config.encoder_seq_length, raw + 2
