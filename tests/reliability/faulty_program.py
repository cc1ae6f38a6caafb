"""`pretrain_t5.py` of which one rank fails once: `faulty_program.py FAULT PHASE RANK FOLDER flags...`.

FAULT is one of `FAULTS`, PHASE one of `paused_program`'s. The rank leaves the file `FOLDER/fault` when it fails, and
does not fail where there is one already.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = ("hang", "freeze", "exit", "raise", "kill")
PURPOSE = "a fault on purpose"


def fail(fault: str) -> None:
    """End this process, or stop it from going on, in one of the ways of `FAULTS`."""
    if fault == "hang":
        time.sleep(600)
    elif fault == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "exit":
        os._exit(0)
    elif fault == "raise":
        raise ValueError(PURPOSE)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(f"no fault {fault}, or one that did not end this process")


if __name__ == "__main__":
    fault, phase, rank, folder, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    from tests.reliability.paused_program import arrange

    mark = Path(folder, "fault")
    if os.environ["RANK"] == rank and not mark.exists():

        def fail_once() -> None:
            mark.touch()
            fail(fault)

        arrange(phase, fail_once)
    program = str(ROOT / "pretrain_t5.py")
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
