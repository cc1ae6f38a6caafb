"""`pretrain_t5.py` that takes its time after a number of steps: `paced_program.py FILE flags...`.

FILE holds the number; each later step takes `SLOW_STEP_S` until the number is raised. So a test can do something to a
run at a step of its choice.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SLOW_STEP_S = 1.0

if __name__ == "__main__":
    pace, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    from megatron.training.training import Trainer

    train_step = Trainer.train_step

    def paced(trainer: Trainer, *args: Any) -> bool:
        if trainer.progress.iteration >= int(Path(pace).read_text()):
            time.sleep(SLOW_STEP_S)
        return train_step(trainer, *args)

    Trainer.train_step = paced  # type: ignore[method-assign]
    program = str(ROOT / "pretrain_t5.py")
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
