"""Flags: generation from the dataclasses, precedence, Megatron-LM's other flags, mistakes."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.core.config import flag_name
from megatron.core.errors import UserError
from megatron.training.arguments import build_parser, format_config, options, parse_args, run_command_line
from megatron.training.config import FLAG_GROUPS, GROUPS, RunConfig
from megatron.training.megatron_flags import MEGATRON_FLAGS, NoEffect, Refused

SMALL = ["--encoder-num-layers", "2", "--hidden-size", "64", "--num-attention-heads", "4"]
ROOT = Path(__file__).parents[2]


def test_every_field_is_a_flag_with_help() -> None:
    fields = {field.name for group in FLAG_GROUPS.values() for field in dataclasses.fields(group)}
    generated = list(options())
    assert {option.name for option in generated} == fields
    assert len(generated) == len(fields), "two dataclasses have a field of the same name"
    assert all(len(option.help) > 15 for option in generated)
    text = build_parser().format_help()
    for option in generated:
        assert "--" + option.name.replace("_", "-") in text


def test_flags_reach_their_fields() -> None:
    config = parse_args(
        [*SMALL, "--seq-length", "128", "--bf16", "--lr", "3e-4", "--data-path", "a", "--disable-bias-linear"]
    ).config
    assert config.model.hidden_size == 64 and config.model.decoder_num_layers == 2 and config.model.kv_channels == 16
    assert config.data.encoder_seq_length == 128 and config.data.data_path == ["a"]
    assert config.compute.bf16 and config.optimizer.lr == 3e-4 and not config.model.add_bias_linear


def test_preset_then_config_file_then_flag_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: t5-v1_1-small\nhidden-size: 256\nlr: 1.0e-3\nseq-length: 96\n")
    parsed = parse_args(["--config", str(file), "--lr", "5e-3"])
    assert parsed.config.model.num_attention_heads == 6 and parsed.sources["num_attention_heads"] == "preset"
    assert parsed.config.model.hidden_size == 256 and parsed.sources["hidden_size"] == "config file"
    assert parsed.config.optimizer.lr == 5e-3 and parsed.sources["lr"] == "flag"
    assert parsed.config.data.encoder_seq_length == 96
    assert parsed.sources["seed"] == "default"


def test_printed_config_reads_back_to_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset", "mt5-small", "--split", "9,1", "--data-path", "1 odd: name", "--min-lr", "1e-5"]
    with pytest.raises(SystemExit) as stopped:
        parse_args([*flags, "--print-config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    file = tmp_path / "run.yaml"
    file.write_text(printed)
    expected = parse_args(flags).config
    expected.model.vocab_size = None  # the preset's gives way to the tokenizer's, from the file as from the flags
    assert parse_args(["--config", str(file)]).config == expected
    assert "hidden_size: 512" in printed and "# preset" in printed and "# flag" in printed


def test_run_config_survives_json_values() -> None:
    config = parse_args([*SMALL, "--train-samples", "100"]).config
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


def test_a_value_that_asks_for_what_happens_anyway_is_accepted() -> None:
    assert not parse_args([*SMALL, "--context-parallel-size", "1", "--expert-model-parallel-size", "1"]).warnings
    with pytest.raises(UserError, match="--context-parallel-size"):
        parse_args([*SMALL, "--context-parallel-size", "2"])


def test_megatron_spellings_are_translated() -> None:
    config = parse_args([*SMALL, "--swiglu", "--optimizer", "adam", "--attention-backend", "fused"]).config
    assert config.model.activation_function == "gated-silu"
    assert config.optimizer.optimizer == "adamw" and config.compute.attention_backend == "sdpa"


def test_flags_without_effect_warn_once() -> None:
    warnings = parse_args([*SMALL, "--num-workers", "4", "--max-position-embeddings", "512"]).warnings
    assert len(warnings) == 2
    assert warnings[0].startswith("--num-workers has no effect") and "--max-position-embeddings" in warnings[1]


@pytest.mark.parametrize("flag", [flag for flag, meaning in MEGATRON_FLAGS.items() if isinstance(meaning, NoEffect)])
def test_every_flag_without_effect_warns_and_leaves_the_others_alone(flag: str) -> None:
    values = ["1"] if MEGATRON_FLAGS[flag].values else []
    parsed = parse_args([*SMALL, flag, *values, "--train-iters", "3"])
    assert [line.split(" has no effect: ")[0] for line in parsed.warnings] == [flag]
    assert parsed.config == parse_args([*SMALL, "--train-iters", "3"]).config


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["--use-distributed-optimizer", "--data-parallel-sharding-strategy", "no_shard"],
            "--use-distributed-optimizer",
        ),
        (["--swiglu", "--activation-function", "relu"], "--swiglu"),
        (["--pipeline-schedule", "zbv"], "--pipeline-schedule"),
        (["--initial-loss-scale", "65536", "--bf16"], "--initial-loss-scale"),
    ],
)
def test_flags_that_others_leave_without_effect_warn(flags: list[str], named: str) -> None:
    (warning,) = parse_args([*SMALL, *flags]).warnings
    assert warning.startswith(f"{named} has no effect")


@pytest.mark.parametrize(
    "flags",
    [
        ["--use-distributed-optimizer", "--data-parallel-sharding-strategy", "optim"],
        ["--pipeline-schedule", "zbv", "--pipeline-model-parallel-size", "2"],
        ["--initial-loss-scale", "65536", "--fp16"],
    ],
)
def test_flags_with_effect_do_not_warn(flags: list[str]) -> None:
    assert not parse_args([*SMALL, *flags]).warnings


def test_fields_and_megatrons_other_flags_do_not_overlap() -> None:
    assert not set(MEGATRON_FLAGS) & {flag_name(option.name) for option in options()}


@pytest.mark.parametrize("flag", [flag for flag, meaning in MEGATRON_FLAGS.items() if isinstance(meaning, Refused)])
def test_refused_megatron_flags_say_why(flag: str) -> None:
    with pytest.raises(UserError, match=f"^{flag} is Megatron-LM's and does not work here: .{{10,}}"):
        parse_args([*SMALL, flag])


def test_small_lr_with_the_default_optimizer_is_pointed_out() -> None:
    assert any("--optimizer adam" in line for line in parse_args([*SMALL, "--lr", "0.0001"]).warnings)
    assert not parse_args([*SMALL, "--lr", "0.0001", "--optimizer", "adam"]).warnings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hiden-size", "4"], "did you mean --hidden-size"),
        (["--hidden", "4"], "unknown argument --hidden"),
        ([*SMALL, "stray"], "unknown argument stray"),
        (["--hidden-size"], "expected one argument"),
    ],
)
def test_flag_syntax_exits_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--encoder-num-layers is missing"),
        ([*SMALL, "--lr", "fast"], "--lr is 'fast'; it must be a number"),
        ([*SMALL, "--train-iters", "1.5"], "--train-iters is '1.5'; it must be a whole number"),
        ([*SMALL, "--train-iters", "-3"], "--train-iters is -3; it must be greater than 0"),
        ([*SMALL, "--optimizer", "sgd"], "--optimizer sgd: T5 does not train"),
        ([*SMALL, "--normalization", "BatchNorm"], "choose from RMSNorm, LayerNorm"),
        ([*SMALL, "--train-iters", "5", "--train-samples", "40"], "both set the length"),
        ([*SMALL, "--lr-decay-samples", "40"], "needs --train-samples"),
        ([*SMALL, "--position-embedding-type", "learned_absolute", "--seq-length", "600"], "512 learned positions"),
        ([*SMALL, "--split", "1,2,x"], "--split is '1,2,x'"),
        ([*SMALL, "--noise-density", "1.2"], "--noise-density is 1.2"),
        ([*SMALL, "--fp16", "--bf16"], "--fp16 and --bf16"),
        ([*SMALL, "--sequence-parallel"], "--sequence-parallel needs --tensor-model-parallel-size above 1"),
        ([*SMALL, "--tensor-model-parallel-size", "3"], "--num-attention-heads"),
        ([*SMALL, "--recompute-num-layers", "2"], "needs --recompute-granularity full"),
        (["--hidden-size", "65", "--encoder-num-layers", "1", "--num-attention-heads", "4"], "--kv-channels"),
        ([*SMALL, "--min-lr", "3"], "--min-lr 3.0 is above --lr"),
        ([*SMALL, "--hidden-dropout", "nan"], "--hidden-dropout is"),
        ([*SMALL, "--lr", "inf"], "--lr is 'inf'; it must be a finite number"),
        (["--config", "/nonexistent.yaml"], "No such file"),
        (["--preset", "t5-v1_1-tiny"], "--preset is 't5-v1_1-tiny'; choose from t5-v1_0-small"),
    ],
)
def test_values_that_cannot_work_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_args(arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hidden_sise: 3", "unknown name 'hidden_sise'; did you mean hidden_size"),
        (b"[1, 2]", "must map flag names to values"),
        (b"a: [", "is not YAML"),
        (b"\xff\xfe\x00bad\x80", "is not YAML"),
        (b"bf16: 3", "must be true or false"),
        (b"hidden_size: true", "must be a whole number"),
        (b"hidden_size: [3]", "must be a whole number"),
        (b"preset: t6", "choose from"),
        (b"micro_batch_size:", "micro_batch_size has no value"),
        (b"train_iters: .inf", "must be a whole number"),
    ],
)
def test_unreadable_config_files_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        parse_args(["--config", str(file), *SMALL])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_sources_cover_every_field() -> None:
    parsed = parse_args(SMALL)
    assert set(parsed.sources) == {option.name for option in options() if option.group in GROUPS}
    assert format_config(parsed.config, parsed.sources).count("#") == len(parsed.sources)


@pytest.mark.parametrize("prints", [True, False])
def test_a_mistake_of_one_process_alone_is_told_too(
    prints: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)

    def main() -> None:
        raise UserError("file is missing")

    with pytest.raises(SystemExit) as stopped:
        run_command_line(main, is_printing_process=prints)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: file is missing\n"
    assert len(waits) == (0 if prints else 1)


def test_help_imports_no_torch() -> None:
    code = (
        "import runpy, sys; sys.argv = ['pretrain_t5.py', '--help']\n"
        "try: runpy.run_path('pretrain_t5.py', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--encoder-num-layers" in result.stdout
