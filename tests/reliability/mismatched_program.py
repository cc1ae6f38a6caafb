"""`pretrain_t5.py` of which the last rank is started differently: `mismatched_program.py DIFFERENCE flags...`.

DIFFERENCE is a flag and its value, which come after the others, or `version=...`, the version of this package there.
"""

from __future__ import annotations

import os
import runpy
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

if __name__ == "__main__":
    difference, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        if difference.startswith("version="):
            import megatron

            megatron.__version__ = difference.removeprefix("version=")
        else:
            arguments += shlex.split(difference)
    program = str(ROOT / "pretrain_t5.py")
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
