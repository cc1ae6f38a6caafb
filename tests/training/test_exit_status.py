"""How the tools end."""

import pytest

from megatron.core.errors import UserError
from megatron.training.arguments import exit_status


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("--input is missing"), 1, "error: --input is missing"),
        (OSError(28, "No space left on device"), 1, "error: my_output: No space left on device"),
        (OSError(13, "Permission denied", "there"), 1, "error: there: Permission denied"),
        (KeyboardInterrupt(), 130, "stopped by hand"),
    ],
)
def test_failures_are_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def program() -> None:
        raise error

    assert exit_status(program, output="my_output", interrupted="stopped by hand") == status
    assert capsys.readouterr().err == line + "\n"


def test_success_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: "a result", output="my_output", interrupted="") == 0
    assert capsys.readouterr().err == ""
