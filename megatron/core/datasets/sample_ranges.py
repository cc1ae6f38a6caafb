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

    def too_late(self, next_sample: int, dealt_out: int) -> str | None:
        """What to warn of when ids below `next_sample` are in the ranges but were not left out; None when all is well.

        Args:
            next_sample: The first id not dealt out yet.
            dealt_out: How many ids have been; those below `next_sample` that are missing were left out.
        """
        late = [(first, min(last + 1, next_sample) - first) for first, last in self.ranges if first < next_sample]
        if sum(count for _, count in late) <= next_sample - dealt_out:
            return None
        return (
            f"--skip-samples: some of {' '.join(f'{first}-{first + count - 1}' for first, count in late)} have been "
            "trained on already; continue from an earlier checkpoint (--ckpt-step) to leave them out"
        )
