"""Runs a function in a child process of its own, so that a crash of the interpreter is a result like any other."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

from megatron.core.errors import UserError

SECONDS = 120  # before a child counts as hanging


def outcome_in_child(function: Callable[[], str]) -> str:
    """What a function came to: `<its result>`, `refused: <message>`, `raised: <traceback>` or `died of signal <n>`."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.close(receiving)
        try:
            result = function()
        except UserError as error:
            result = f"refused: {error}"
        except BaseException:
            result = f"raised: {traceback.format_exc()}"
        with os.fdopen(sending, "wb") as pipe:
            pipe.write(result.encode())
        os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        result = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return result if status == 0 else f"died of signal {-status}"
