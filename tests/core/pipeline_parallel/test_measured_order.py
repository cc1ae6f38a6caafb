"""Real processes whose work is sleep put the schedules into the simulator's order."""

import pytest

from benchmarks.pipeline_real import contradictions, run


@pytest.mark.slow
def test_schedules_take_the_time_that_was_simulated():
    rows = run(forward_ms=300.0, rounds=3)
    assert contradictions(rows) == []
    by_name = {row["contender"]: row["measured_s"] for row in rows}
    assert by_name["1f1b"] < 0.95 * by_name["1f1b, stacks apart, best split"]
    assert by_name["zbv, 2 a rank"] < 0.9 * by_name["1f1b"]
