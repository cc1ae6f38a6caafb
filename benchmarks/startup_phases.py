"""Runs `pretrain_t5.py` with the flags given to this program until its first step is done; tells how long what took.

`startup.py` starts this, once a process. The environment variable `STARTUP_BEGAN` holds the time (`time.time()`) at
which the command was given and `STARTUP_OUTPUT` the directory for the result, `RANK.json`: seconds by phase.
"""

from __future__ import annotations

import time

STARTED = time.time()

import json  # noqa: E402  (the interpreter's own start ends above)
import os  # noqa: E402
import runpy  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

PROGRAM = Path(__file__).parents[1] / "pretrain_t5.py"

seconds: dict[str, float] = {}


def timed(owner: Any, name: str, phase: str, then: Callable[[], object] = lambda: None) -> None:
    """Count the time of `owner.name`, a function, as `phase`; phases do not overlap. `then` comes after each call."""
    function = getattr(owner, name)

    def replacement(*arguments: Any, **options: Any) -> Any:
        begin, inside = time.time(), sum(seconds.values())
        result = function(*arguments, **options)
        seconds[phase] = seconds.get(phase, 0.0) + time.time() - begin - (sum(seconds.values()) - inside)
        then()
        return result

    setattr(owner, name, replacement)


def imports() -> None:
    """What `pretrain_t5.py` imports when its flags are good, in its order, and the phases that follow."""
    begin = time.time()
    import torch

    seconds["import torch"] = time.time() - begin
    begin = time.time()
    from megatron.training import model_setup, training

    seconds["import ours"] = time.time() - begin
    timed(torch.distributed, "init_process_group", "process group")
    timed(training, "open_data", "open data")
    timed(model_setup, "build_stages", "build on meta")
    timed(torch.nn.Module, "to_empty", "initial values")
    timed(model_setup, "initialize_parameters", "initial values")
    timed(training, "build_optimizer", "optimizer")
    timed(training.Trainer, "start", "outputs")
    timed(training.Prefetcher, "step_batch", "first batch")
    timed(training.Trainer, "train_step", "first step", then=finish)


def finish() -> NoReturn:
    """Write the result and end here."""
    total = time.time() - float(os.environ["STARTUP_BEGAN"])
    rows = seconds | {"rest": total - sum(seconds.values()), "total": total}
    Path(os.environ["STARTUP_OUTPUT"], f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(rows))
    os._exit(0)


def main() -> None:
    """Run the program."""
    seconds["interpreter"] = STARTED - float(os.environ["STARTUP_BEGAN"])
    begin = time.time()
    from megatron.training import arguments

    seconds["flags"] = time.time() - begin
    timed(arguments, "parse_args", "flags", then=imports)
    sys.argv[0] = str(PROGRAM)
    runpy.run_path(str(PROGRAM), run_name="__main__")


if __name__ == "__main__":
    main()
