"""`tools/simulate_pipeline.py` as a user runs it."""

import runpy
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/simulate_pipeline.py"
SMALL = "--preset t5-v1_1-small --pipeline-model-parallel-size 2 --num-microbatches 4"


@pytest.fixture
def simulate(monkeypatch, capsys):
    def run(arguments: str, *more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["simulate_pipeline.py", *arguments.split(), *more])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def test_stages_and_busy_fractions(simulate):
    status, output, _ = simulate(f"{SMALL} --pipeline-schedule 1f1b", "--pipeline-layout", "E7|E1 D8")
    assert status == 0
    assert "layout E7|E1 D8" in output and "enc 7, enc norm, dec embed, dec 0-7, dec norm, head" in output
    assert "ranks are busy" in output and "takes" not in output


def test_times_links_and_a_picture(simulate, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "step.png"
    times = []
    for link in ("", "--link-gbytes-per-s 0.001"):
        status, output, error = simulate(f"{SMALL} --tflops 1 {link} --png {picture}")
        assert status == 0, error
        times.append(float(output.split("the step takes ")[1].split()[0]))
    assert times[1] > times[0] and picture.read_bytes().startswith(b"\x89PNG")


def test_measured_costs(simulate):
    status, output, error = simulate(f"{SMALL} --measure --encoder-seq-length 8 --decoder-seq-length 4")
    assert status == 0, error
    assert " ms" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-microbatches 0", "greater than 0"),
        ("--tflops 0", "--tflops is 0; it must be greater than 0"),
        ("--tflops 1 --link-gbytes-per-s 0", "--link-gbytes-per-s is 0; it must be greater than 0"),
        ("--tflops 1 --link-latency-us -1", "must not be less than 0"),
        ("--encoder-seq-length 0", "--encoder-seq-length is 0"),
        ("--pipeline-model-parallel-size 1", "needs at least 2"),
        ("--link-latency-us 3", "add --tflops or --measure"),
        ("--tflops 1 --measure", "remove one"),
        ("--pipeline-schedule dualpipev --num-microbatches 3", "at least 4 microbatches"),
        ("--pipeline-layout E8|D7", "has 7 decoder layers, the model has 8"),
    ],
)
def test_mistakes(simulate, flags, message):
    status, _, error = simulate(f"{SMALL} {flags}")
    assert status == 1 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_missing_flag_is_one_line(simulate):
    status, _, error = simulate("--preset t5-v1_1-small --pipeline-model-parallel-size 2")
    assert status == 2 and "--num-microbatches" in error and error.count("\n") == 1
