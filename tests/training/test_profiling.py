"""`--profile`: traces, and the summary of where a step's time goes."""

import gzip
import json
import math
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.distributed import GradientNorm
from megatron.core.errors import NumericalError, UserError
from megatron.core.parallel_state import ParallelContext
from megatron.training import profiling
from megatron.training.arguments import parse_args
from megatron.training.config import LoggingConfig
from megatron.training.profile_summary import (
    CATEGORIES,
    Phase,
    Segment,
    describe,
    difference,
    group_of,
    innermost,
    intersection,
    merged,
    summarize,
)
from megatron.training.profiling import StepProfiler
from megatron.training.training import pretrain_in
from tests.distributed import run_distributed

TINY = shlex.split(
    "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 16 --num-attention-heads 2 --kv-channels 8 "
    "--encoder-seq-length 32 --log-interval 1 --eval-interval 4 --eval-iters 1 --split 90,10,0 --train-iters 6"
)


def event(name: str, start: float, end: float, cat: str = "cpu_op", thread: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "pid": 7, "tid": thread, "ts": start, "dur": end - start}


def phase(name: str, start: float, end: float) -> dict[str, Any]:
    return event(name, start, end, "user_annotation")


def test_interval_arithmetic() -> None:
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4), (9, 9)]) == [(0, 4), (5, 6)]
    assert intersection([(0, 4), (6, 9)], [(1, 2), (3, 7)]) == [(1, 2), (3, 4), (6, 7)]
    assert difference([(0, 4), (6, 9)], [(-1, 1), (2, 3), (5, 7), (10, 11)]) == [(1, 2), (3, 4), (7, 9)]
    assert (
        difference([(2, 3)], [(0, 9)]) == [] and difference([], [(0, 1)]) == [] and difference([(0, 1)], []) == [(0, 1)]
    )


def test_an_instant_belongs_to_the_innermost_operator() -> None:
    """An autograd node is no operator, and what a collective calls is part of it."""
    events = [
        event("autograd::engine::evaluate_function: MmBackward0", 0, 10),
        event("MmBackward0", 1, 9),
        event("aten::matmul", 2, 6),
        event("aten::mm", 3, 5),
        event("c10d::_reduce_scatter_base_", 12, 16),
        event("aten::copy_", 13, 14),
    ]
    assert innermost(events) == [
        Segment(2, 3, "aten::matmul"), Segment(3, 5, "aten::mm"), Segment(5, 6, "aten::matmul"),
        Segment(12, 13, "c10d::_reduce_scatter_base_"), Segment(13, 14, "c10d::_reduce_scatter_base_"),
        Segment(14, 16, "c10d::_reduce_scatter_base_"),
    ]  # fmt: skip


def test_summary_of_a_cpu_trace() -> None:
    """Milliseconds: a step of 100 and one of 60, an evaluation of 20 in the first."""
    ms = 1000.0
    events = [
        phase(Phase.STEP, 0, 100 * ms),
        phase(Phase.DATA, 0, 10 * ms),
        phase(Phase.FORWARD_BACKWARD, 10 * ms, 60 * ms),
        event("aten::mm", 12 * ms, 32 * ms),
        event("c10d::allreduce_", 32 * ms, 33 * ms),
        event("gloo:all_reduce", 28 * ms, 50 * ms, "user_annotation", thread=2),  # 28 to 32 beside the product
        event("aten::add_", 40 * ms, 44 * ms),
        event("aten::mm", 0, 90 * ms, thread=3),  # of another thread: no part of the step
        phase(Phase.OPTIMIZER, 60 * ms, 70 * ms),
        event("aten::_foreach_mul_", 61 * ms, 69 * ms),
        phase(Phase.EVALUATION, 75 * ms, 95 * ms),
        event("aten::mm", 76 * ms, 90 * ms),
        phase(Phase.STEP, 100 * ms, 160 * ms),
        event("aten::mm", 100 * ms, 160 * ms),
    ]
    summary = summarize(events)
    assert summary is not None and summary.steps == 2 and summary.step_time_ms == 70
    assert summary.times_ms == {
        "compute": (20 + 4 + 60) / 2, "communication_exposed": (18 - 4) / 2, "data_wait": 10 / 2,
        "optimizer": 10 / 2, "rest": (140 - 84 - 14 - 10 - 10) / 2,
    }  # fmt: skip
    operators = {operator.name: operator for operator in summary.operators}
    assert operators["aten::mm"] == ("aten::mm", "matrix products", 40, 1)
    assert operators["gloo:all_reduce"] == ("gloo:all_reduce", "collectives", 11, 0.5)
    assert operators["aten::_foreach_mul_"].group == "optimizer"
    assert summary.groups_ms == {
        "matrix products": 40,
        "collectives": 11,
        "optimizer": 4,
        "elementwise and reductions": 2,
    }
    assert summarize([event("aten::mm", 0, 1)]) is None


def test_a_function_computes_unless_it_waits() -> None:
    """The head's loss runs kernels that are no operators; a function of tensor parallelism waits for its sum."""
    summary = summarize(
        [
            phase(Phase.STEP, 0, 20_000),
            event("_HeadLoss", 1000, 6000),
            event("aten::mm", 2000, 4000),
            event("_Reduce", 7000, 10_000),
            event("c10d::allreduce_", 7000, 8000),
            event("gloo:all_reduce", 7000, 9500, "user_annotation", thread=2),
            event("autograd::engine::evaluate_function: _HeadLossBackward", 11_000, 15_000),
            event("_HeadLossBackward", 12_000, 14_000),
            event("MmBackward0", 16_000, 19_000),  # encloses an operator that is not in this trace
        ]
    )
    assert summary is not None and summary.times_ms == {
        "compute": 5 + 0.5 + 2, "communication_exposed": 2.5, "data_wait": 0, "optimizer": 0, "rest": 10,
    }  # fmt: skip
    assert summary.groups_ms["autograd functions"] == 3 + 2 + 2


def test_messages_that_are_awaited_together_count_once() -> None:
    waits = [event("gloo:recv", start, 8000, "user_annotation", thread=2) for start in (0, 1000, 2000)]
    summary = summarize([phase(Phase.STEP, 0, 10_000), event("aten::mm", 4000, 10_000), *waits])
    assert summary is not None and summary.times_ms["communication_exposed"] == 4
    assert summary.operators[0] == ("gloo:recv", "collectives", 8, 3) and summary.groups_ms["collectives"] == 8


def test_summary_of_a_gpu_trace() -> None:
    """The timeline is that of the kernels; the host runs ahead of them, and out of the step before its last one."""
    events = [
        phase(Phase.STEP, 0, 100),
        phase(Phase.DATA, 0, 20),
        event("aten::mm", 20, 25),
        event("c10d::allreduce_", 25, 27),
        event("Memcpy HtoD", 15, 20, "gpu_memcpy", 20),
        event("sm90_xmma_gemm_bf16", 22, 60, "kernel", 20),
        event("ncclDevKernel_AllReduce_Sum", 50, 75, "kernel", 21),
        event(Phase.OPTIMIZER, 80, 95, "gpu_user_annotation", 20),
        event("multi_tensor_apply_kernel", 80, 90, "kernel", 20),
        event(Phase.OPTIMIZER, 105, 120, "gpu_user_annotation", 20),
        event("multi_tensor_apply_kernel", 106, 120, "kernel", 20),
    ]
    summary = summarize(events)
    assert summary is not None
    assert summary.times_ms == pytest.approx(
        {"compute": 0.043, "communication_exposed": 0.015, "data_wait": 0.015, "optimizer": 0.030, "rest": 0.017}
    )
    assert [operator.group for operator in summary.operators] == [
        "matrix products", "collectives", "optimizer", "copies, casts, fills",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::addmm", "matrix products"),
        ("megatron_t5::attention_backward", "attention kernels"),
        ("megatron_t5::rms_norm", "elementwise and reductions"),
        ("aten::_to_copy", "copies, casts, fills"),
        ("_c10d_functional::wait_tensor", "collectives"),
        ("gloo:recv", "collectives"),
        ("aten::_fused_adamw_", "optimizer"),
        ("compiled graph", "compiled graphs"),
        ("_RMSNormBackward", "autograd functions"),
        ("aten::view", "other operators"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_the_summary_adds_up_to_the_measured_time(tmp_path: Path) -> None:
    config = LoggingConfig(profile=True, profile_step_start=2, profile_step_end=4, profile_dir=str(tmp_path / "traces"))
    profiler = StepProfiler(config, None, ParallelContext(torch.device("cpu")))
    x, row, times_s = torch.randn(200, 200), {}, []
    for step in range(1, 6):
        profiler.before_step(step)
        times_s.append(time.perf_counter())
        with profiler.phase(Phase.STEP):
            with profiler.phase(Phase.DATA):
                time.sleep(0.05)
            for _ in range(20):
                x @ x
            with profiler.phase(Phase.OPTIMIZER):
                time.sleep(0.02)
        times_s.append(time.perf_counter())
        if profiler.ends_with(step):
            row = profiler.finish(step)
    elapsed_ms = (times_s[5] - times_s[2]) * 1e3  # from the start of step 2 to the end of step 3
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["rank0_steps2-4.json.gz"]
    assert row["profile_steps"] == 2
    times = {category: row[f"profile_{category}_ms"] for category in CATEGORIES}
    assert sum(times.values()) == pytest.approx(row["profile_step_time_ms"])
    assert row["profile_step_time_ms"] == pytest.approx(elapsed_ms / 2, rel=0.05)
    assert times["data_wait"] >= 50 and times["optimizer"] >= 20
    assert times["compute"] > 0 and times["communication_exposed"] == 0


def test_phases_cost_nothing_outside_the_window() -> None:
    profiler = StepProfiler(LoggingConfig(), None, ParallelContext(torch.device("cpu")))
    profiler.before_step(10)
    assert not profiler.is_open and profiler.phase(Phase.DATA) is profiler.phase(Phase.STEP)
    start = time.perf_counter()
    for _ in range(1000):
        with profiler.phase(Phase.DATA):
            pass
    assert time.perf_counter() - start < 0.05  # 50 us a phase; it is 0.2 where nothing else runs


def train(arguments: list[str]) -> None:
    config = parse_args(arguments).config
    pretrain_in(ParallelContext.create(config.parallel, torch.device("cpu")), config)


def profile_rows(save: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "profile_steps" in row]


def test_a_run_is_profiled_where_it_was_asked_for(
    byte_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The window holds an evaluation; a stop ends it early; a run that goes on past it records nothing."""
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path), "--profile"]
    window = ["--profile-step-start", "3", "--profile-step-end", "7"]
    train([*flags, *window, "--exit-interval", "5", "--save-interval", "4"])
    output = capsys.readouterr().out
    assert "profile of steps 3 to 5" in output and "waiting for data" in output
    assert output.count("slowed by the profiler") == 3
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank0_steps3-6.json.gz"
    names = {e["name"] for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert names >= {value for name, value in vars(Phase).items() if name.isupper()}
    (row,) = profile_rows(tmp_path)
    assert row["iteration"] == 5 and row["profile_steps"] == 3
    assert row["profile_step_time_ms"] == pytest.approx(sum(row[f"profile_{name}_ms"] for name in CATEGORIES))
    assert min(row.values()) >= 0 and row["profile_compute_ms"] > 0 and row["profile_optimizer_ms"] > 0
    train([*flags, "--profile-step-start", "2", "--profile-step-end", "4"])
    assert len(list((tmp_path / "profile").iterdir())) == 1 and profile_rows(tmp_path) == [row]


def _train_rank(rank: int, flags: list[str]) -> None:
    train(flags)


def test_every_rank_writes_its_trace(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path), "--profile", "--profile-dir"]
    flags += [str(tmp_path / "traces"), "--profile-step-start", "2", "--profile-step-end", "4"]
    run_distributed(_train_rank, 2, [*flags, "--tensor-model-parallel-size", "2"])
    assert {path.name for path in (tmp_path / "traces").iterdir()} == {f"rank{r}_steps2-4.json.gz" for r in (0, 1)}
    (row,) = profile_rows(tmp_path)
    assert row["profile_communication_exposed_ms"] > 0 and row["profile_compute_ms"] > 0


def test_ranks_that_do_not_record_take_part(byte_dataset: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path), "--profile", "--profile-ranks", "1"]
    run_distributed(_train_rank, 2, [*flags, "--profile-step-start", "2", "--profile-step-end", "3"])
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank1_steps2-3.json.gz"]
    assert len(profile_rows(tmp_path)) == 1


def test_the_ranges_over_ranks_are_told() -> None:
    fast = summarize([phase(Phase.STEP, 0, 2000), event("aten::mm", 0, 1000)])
    slow = summarize([phase(Phase.STEP, 0, 2000), event("aten::mm", 0, 1500)])
    assert fast is not None and slow is not None
    lines = describe({0: fast, 3: slow}, 10, 10)
    assert lines[0] == "profile of steps 10 to 10: 2.0 ms a step on rank 0, and the range over 2 ranks"
    assert lines[1].split() == ["compute", "1.0", "ms", "50.0%", "1.0", "to", "1.5"]


def test_a_profiler_that_fails_is_said_and_the_run_goes_on(
    byte_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    flags = [*TINY, "--data-path", str(byte_dataset), "--profile", "--profile-step-start", "2"]
    train([*flags, "--profile-step-end", "3", "--profile-dir", str(tmp_path / "file")])
    captured = capsys.readouterr()
    assert "the profile of rank 0 could not be made" in captured.err and "step 6/6" in captured.out

    def refuse(**arguments: object) -> None:
        raise RuntimeError("no profiler here")

    monkeypatch.setattr(profiling, "profile", refuse)
    train([*flags, "--profile-step-end", "3"])
    captured = capsys.readouterr()
    assert "could not be begun: no profiler here" in captured.err and "step 6/6" in captured.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--profile --profile-step-start 0", "--profile-step-start is 0"),
        ("--profile --profile-step-start 12", "--profile-step-end 12 is not beyond --profile-step-start 12"),
        ("--profile --profile-step-end 10", "--profile-step-end 10 is not beyond --profile-step-start 10"),
        ("--profile-dir x", "--profile-dir needs --profile"),
        ("--profile-ranks 0", "--profile-ranks needs --profile"),
        ("--profile-step-start 10", "--profile-step-start needs --profile"),
        ("--profile-step-end 12", "--profile-step-end needs --profile"),
        ("--profile --profile-ranks -1", "--profile-ranks -1 is no rank"),
    ],
)
def test_mistakes(flags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args([*TINY, "--data-path", "x", *flags.split()])


def test_a_window_beyond_the_run_is_warned_of(
    byte_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train([*TINY, "--data-path", str(byte_dataset), "--profile", "--train-iters", "1"])
    assert "--profile-step-start 10 is beyond the last step" in capsys.readouterr().err


def test_a_rank_that_there_is_not(byte_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.training.training.DistributedModel", None)  # it is told before there is a model
    with pytest.raises(UserError, match="--profile-ranks 4 is beyond the last of 1 ranks"):
        train([*TINY, "--data-path", str(byte_dataset), "--profile", "--profile-ranks", "0", "4"])


def test_a_run_that_fails_within_the_window_is_profiled(
    byte_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = GradientNorm(torch.tensor(math.nan), torch.zeros(0), [])
    monkeypatch.setattr("megatron.training.training.measure_gradients", lambda *_: bad)
    flags = [*TINY, "--data-path", str(byte_dataset), "--save", str(tmp_path), "--max-consecutive-skips", "1"]
    with pytest.raises(NumericalError):
        train([*flags, "--profile", "--profile-step-start", "1", "--profile-step-end", "4"])
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank0_steps1-3.json.gz"]
    assert [row["profile_steps"] for row in profile_rows(tmp_path)] == [2]
