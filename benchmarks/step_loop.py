"""The trainer itself beside the bare step: the speed that `pretrain_t5.py` reports on a dataset of the same shape."""

from __future__ import annotations

import json
import random
import shlex
import statistics
import string
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from step_contender import ROOT, Case
from step_processes import StepProcess, environment

WARM_UP_STEPS, STEPS = 5, 10  # of a run of the trainer; reported every LOG_INTERVAL steps
LOG_INTERVAL = 5
DOCUMENTS, WORDS_OF_A_DOCUMENT = 2000, 400
SENTINELS = 200


def write_corpus(folder: Path) -> Path:
    """A small prepared dataset of random words as bytes; its prefix."""
    from megatron.core.config import TokenizerConfig
    from megatron.core.datasets.preprocessing import PreprocessConfig, preprocess

    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(5000)]
    texts = (" ".join(draw.choices(words, k=WORDS_OF_A_DOCUMENT)) for _ in range(DOCUMENTS))
    source, prefix = folder / "corpus.jsonl", folder / "corpus"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer = TokenizerConfig(tokenizer_type="ByteTokenizer", vocab_extra_ids=SENTINELS)
    with Path(folder, "preprocess.log").open("w", encoding="utf-8") as log:
        preprocess(PreprocessConfig(input=[str(source)], output_prefix=str(prefix), tokenizer=tokenizer), log)
    return prefix


def run_trainer(case: Case, prefix: Path, max_cpu_isa: str | None) -> float:
    """Tokens a second over the steps after the warm-up, of the metrics that a run writes.

    Raises:
        SystemExit: The run failed.
    """
    from megatron.core.models.T5.t5_presets import PRESETS

    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder, "metrics.jsonl")
        command = [sys.executable, str(ROOT / "pretrain_t5.py"), *case.flags(), "--data-path", str(prefix)]
        command += ["--vocab-size", str(PRESETS[case.preset]["vocab_size"]), "--split", "1", "--eval-iters", "0"]
        command += ["--train-iters", str(WARM_UP_STEPS + STEPS), "--log-interval", str(LOG_INTERVAL)]
        command += ["--metrics-file", str(metrics)]
        done = subprocess.run(
            command, env=environment(case.threads, max_cpu_isa), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(
                "\n".join([*done.stderr.splitlines()[-15:], f"error: the trainer failed: {shlex.join(command)}"])
            )
        rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    later = [row for row in rows if "tokens_per_s" in row and row["iteration"] > WARM_UP_STEPS]
    assert len(later) == STEPS // LOG_INTERVAL
    tokens = round(later[0]["tokens_per_s"] * later[0]["step_time_ms"] / 1e3)
    if tokens != case.tokens:
        raise SystemExit(
            f"error: the trainer's steps have {tokens} tokens, the bare ones {case.tokens}; "
            "give --batch the decoder length that the trainer chooses"
        )
    return statistics.harmonic_mean(row["tokens_per_s"] for row in later)


def loop_rows(base: Case, rounds: int, max_cpu_isa: str | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The row of a shape and precision, and what was measured with; trainer and steps take turns.

    Two bare steps are measured: the one of the other rows, and one that also computes the gradients' norm and clips
    them, as the trainer does. Runs of the trainer are whole processes, its first steps left out; the bare steps'
    processes wait meanwhile.
    """
    bare, clipped = replace(base, code="ours"), replace(base, code="ours", clips=True)
    rates: dict[str, list[float]] = {"trainer": [], "step": [], "clipped_step": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        StepProcess("bare step", bare, max_cpu_isa) as bare_process,
        StepProcess("bare step with clipping", clipped, max_cpu_isa) as clipped_process,
    ):
        prefix = write_corpus(Path(folder))
        described = bare_process.ask("describe")
        for process in (bare_process, clipped_process):
            process.ask(WARM_UP_STEPS)
        for _ in range(rounds):
            rates["trainer"].append(run_trainer(base, prefix, max_cpu_isa))
            rates["step"].append(base.tokens / bare_process.ask(STEPS)["seconds"])
            rates["clipped_step"].append(base.tokens / clipped_process.ask(STEPS)["seconds"])
    medians = {name: statistics.median(of_name) for name, of_name in rates.items()}
    row = {
        "preset": base.preset,
        "precision": base.precision,
        **{f"{name}_tokens_per_s": round(median, 1) for name, median in medians.items()},
        **{
            f"{name}_tokens_per_s_range": [round(end(of_name), 1) for end in (min, max)]
            for name, of_name in rates.items()
        },
        "trainer_to_step": round(medians["trainer"] / medians["step"], 4),
        "trainer_to_clipped_step": round(medians["trainer"] / medians["clipped_step"], 4),
        "batch": [base.rows, base.encoder_length, base.decoder_length],
        "threads": base.threads,
        "rounds": rounds,
        "steps_of_a_run": STEPS,
    }
    return [row], described
