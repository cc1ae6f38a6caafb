"""The quickstart's last step on a run of a few steps."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

from megatron.core.parallel_state import ParallelContext
from megatron.training.arguments import parse_args
from megatron.training.training import pretrain_in

REPORT = Path(__file__).parents[2] / "examples/quickstart_report.py"
FLAGS = shlex.split(
    "--encoder-num-layers 1 --decoder-num-layers 1 --hidden-size 16 --num-attention-heads 2 --kv-channels 8 "
    "--encoder-seq-length 64 --train-iters 2 --eval-iters 0 --split 90,10,0 --hidden-dropout 0.1"
)


def test_report(
    byte_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_args([*FLAGS, "--data-path", str(byte_dataset), "--save", str(tmp_path)]).config
    pretrain_in(ParallelContext(torch.device("cpu")), config)
    for minimum_gain, status in ("-100", 0), ("100", 1):
        command = ["quickstart_report.py", "--load", str(tmp_path), "--minimum-gain", minimum_gain, "--examples", "1"]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(REPORT), run_name="__main__")
        printed = capsys.readouterr()
        assert stopped.value.code == status, printed.err
        assert "model: " in printed.out and "unigram" in printed.out and "nats" in printed.out
