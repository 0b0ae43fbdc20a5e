"""A training that goes on from a checkpoint ends with the bits of one that did not end.

In one process: `test_kill.py` kills processes.
"""

import pytest
from checkpoint import trainer

import jaxsparse as js

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

STEPS = 12


@pytest.mark.parametrize(
    "method",
    [
        "rigl",
        "acdc",
        pytest.param("set_", marks=pytest.mark.exhaustive),
        pytest.param("snfs", marks=pytest.mark.exhaustive),
    ],
)
def test_masks_that_move_go_on_as_they_would_have(method, tmp_path):
    began, changes, whole = trainer.train(tmp_path / "whole", STEPS, method, save_at=())
    assert began == 0
    assert changes >= 3
    # In the step after masks changed, and in one between two changes.
    for number, until in enumerate((5, 8)):
        directory = tmp_path / f"ended_{number}"
        half = trainer.train(directory, STEPS, method, until=until, save_at={until})
        assert half[2] != whole
        assert js.checkpoint.steps(directory) == [until]
        began, later, found = trainer.train(directory, STEPS, method, save_at=())
        assert began == until
        assert half[1] + later == changes
        assert found == whole
