"""Ranges of sample ids that a run leaves out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.errors import UserError

# Ids beyond 18 digits do not fit into 64 bits once more are dealt out after them.
_RANGE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")


@dataclass(frozen=True)
class SampleRanges:
    """Ids that are not dealt out, as inclusive ranges `(first, last)`, ascending, disjoint and not adjacent."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def parse(cls, texts: Sequence[str] | None) -> SampleRanges:
        """From the values of `--skip-samples`, in any order; ranges that overlap or touch become one.

        Raises:
            UserError: A text is not `first-last` with first <= last.
        """
        given = []
        for text in texts or ():
            match = _RANGE.fullmatch(text)
            if match is None or int(match[1]) > int(match[2]):
                raise UserError(f"--skip-samples {text} is no range of sample ids; write first-last, such as 4096-4103")
            given.append((int(match[1]), int(match[2])))
        merged: list[tuple[int, int]] = []
        for first, last in sorted(given):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = merged[-1][0], max(last, merged[-1][1])
            else:
                merged.append((first, last))
        return cls(tuple(merged))

    def deal(self, first_sample: int, count: int) -> list[tuple[int, int]]:
        """Inclusive ranges of the next `count` (at least one) ids that are dealt out from `first_sample` on."""
        dealt = []
        for first, last in self.ranges:
            if first >= first_sample + count:
                break
            if first > first_sample:
                dealt.append((first_sample, first - 1))
                count -= first - first_sample
            first_sample = max(first_sample, last + 1)
        return [*dealt, (first_sample, first_sample + count - 1)]

    def too_late(self, next_sample: int) -> str | None:
        """What to warn of when samples before `next_sample` have been dealt out already; None when all is well."""
        late = [f"{first}-{last}" for first, last in self.ranges if first < next_sample]
        if not late:
            return None
        return (
            f"--skip-samples {' '.join(late)}: samples up to {next_sample - 1} have been dealt out already and stay "
            "trained on; continue from an earlier checkpoint (--ckpt-step) to leave them out"
        )
