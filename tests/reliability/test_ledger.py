"""The counted test of changing layouts, over a few or over all of them."""

import pytest

from tests.reliability.ledger import LAYOUTS, QUICK, count


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(LAYOUTS, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_samples_losses_and_state_survive_a_change_of_the_layout_at_every_resume(layouts) -> None:
    rows = count(layouts)
    assert [row["trials"] for row in rows] == [len(layouts), len(layouts), 1]
    assert all(row["passed"] == row["trials"] for row in rows), rows
