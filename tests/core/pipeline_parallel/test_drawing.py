import pytest

from megatron.core.errors import UserError
from megatron.core.pipeline_parallel.drawing import draw_timelines
from megatron.core.pipeline_parallel.simulator import StageCosts, step_simulator

pytest.importorskip("matplotlib")


def timelines():
    cases = [("gpipe", 1), ("zbv", 2), ("dualpipev", 2)]
    return [(name, step_simulator(name, 2, v, 4).timeline(StageCosts.from_forward([1.0] * 2 * v))) for name, v in cases]


def test_a_picture_is_written(tmp_path):
    draw_timelines(timelines(), tmp_path / "all.png")
    draw_timelines(timelines()[:1], tmp_path / "one.png", unit="ms")
    for name in ("all.png", "one.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="give a file such as timeline"):
        draw_timelines(timelines(), tmp_path / "picture.nothing")
    with pytest.raises(UserError, match="give a file such as timeline"):
        draw_timelines(timelines(), tmp_path / "missing" / "picture.png")
