"""Command-line flags, generated from the configuration dataclasses.

Values come, in rising precedence, from the defaults, those of the objective, a `--preset`, a checkpoint
(`--use-checkpoint-args`, or `--load` of a Hugging Face model), a `--config` file and the flags; where each came from is
remembered for `--print-config`. Exit codes: 1 for a value that cannot work,
2 for a flag that does not exist. Nothing here imports torch before a checkpoint is to be read, so that `--help` and
mistakes are answered quickly.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import os
import signal
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from megatron.core.config import flag_name
from megatron.core.errors import CommunicationError, RunError, UserError
from megatron.core.models.T5.t5_presets import PRESETS
from megatron.training.config import (
    FLAG_GROUPS,
    GROUPS,
    OBJECTIVE_DEFAULTS,
    CheckpointConfig,
    DryRunConfig,
    RunConfig,
)
from megatron.training.megatron_flags import MEGATRON_FLAGS, MEGATRON_VALUES, NoEffect, Refused, Translated

EXIT_FLAG_SYNTAX = 2
EXIT_SIGNAL = 128  # and the signal's number
OTHER_PROCESS_PRINTS_WITHIN_S = 10.0  # a busy machine needs seconds to end the process that has printed


@dataclass(frozen=True)
class Option:
    """One configuration field as a flag.

    Attributes:
        name: Field name.
        group: Key of the dataclass in `FLAG_GROUPS`.
        type: `bool`, `int`, `float`, `str`, or `list` (of strings).
        choices: Permitted values, or None.
        aliases: Further spellings.
        negative: Flag that sets a boolean to False.
        default: Default value, for the help.
        help: The field's docstring.
    """

    name: str
    group: str
    type: type
    choices: tuple[str, ...] | None
    aliases: tuple[str, ...]
    negative: str | None
    default: Any
    help: str


@dataclass(frozen=True)
class ParsedArguments:
    """Result of `parse_args`.

    Attributes:
        config: The run's configuration.
        dry_run: Whether and how to look at the run only.
        sources: Where each field's value came from: `flag`, `config file`, `checkpoint`, `preset`, `objective` or
            `default`.
        warnings: One line for each flag that has no effect.
    """

    config: RunConfig
    dry_run: DryRunConfig
    sources: dict[str, str]
    warnings: list[str]


def field_docstrings(config_class: type) -> dict[str, str]:
    """The string literal under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            docs[statement.target.id] = following.value.value  # type: ignore[union-attr, attr-defined]
    return docs


def _scalar_type(annotation: Any) -> tuple[type, tuple[str, ...] | None]:
    """Reduce `int | None`, `Literal[...]`, `list[str]` and the like to (type, choices)."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        (annotation,) = (arg for arg in typing.get_args(annotation) if arg is not type(None))
    if typing.get_origin(annotation) is Literal:
        return str, typing.get_args(annotation)
    return typing.get_origin(annotation) or annotation, None


@functools.cache
def options() -> tuple[Option, ...]:
    """Every field of every configuration dataclass."""
    return tuple(_options())


def _options() -> Iterator[Option]:
    for group, config_class in FLAG_GROUPS.items():
        hints, docs = typing.get_type_hints(config_class), field_docstrings(config_class)
        for field in dataclasses.fields(config_class):
            kind, choices = _scalar_type(hints[field.name])
            negative = field.metadata.get("negative")
            if kind is bool and negative is None:
                negative = "--no-" + flag_name(field.name)[2:]
            default = None if field.default is dataclasses.MISSING else field.default
            aliases = field.metadata.get("aliases", ())
            yield Option(field.name, group, kind, choices, aliases, negative, default, docs[field.name])


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, the nearest flag for a misspelt one, and no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; exits with 2 when it has a flag that does not exist."""
        parsed, unknown = self.parse_known_args(args, namespace)
        known_flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in unknown:
            flag = word.split("=")[0]
            hint = _nearest(flag, known_flags) if flag.startswith("-") else "; values follow a flag"
            self.error(f"unknown argument {flag}{hint} (--help lists all)")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(EXIT_FLAG_SYNTAX, f"{self.prog}: {message}\n")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Parser whose namespace holds only the flags that were given."""
    parser = Parser(
        prog=prog,
        argument_default=argparse.SUPPRESS,
        usage="%(prog)s [flags]",
        description="Pretrain a T5 model.",
    )
    parser.add_argument("--preset", metavar="NAME", help=f"published shape: {', '.join(PRESETS)}")
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of flag names and values; flags on the command line win"
    )
    parser.add_argument("--print-config", action="store_true", help="print every value, where it came from, and exit")
    for group in FLAG_GROUPS:
        add_group_flags(parser, group)
    for flag, meaning in MEGATRON_FLAGS.items():
        values: dict[str, Any] = {"nargs": "*"} if isinstance(meaning, Refused) else {"action": "store_true"}
        if isinstance(meaning, NoEffect) and meaning.values:
            values = {"nargs": meaning.values}
        parser.add_argument(flag, help=argparse.SUPPRESS, **values)
    return parser


def add_group_flags(parser: argparse.ArgumentParser, group: str) -> None:
    """Add the flags of one configuration dataclass, by its key in `FLAG_GROUPS`; `group_config` reads them."""
    doc = (FLAG_GROUPS[group].__doc__ or "").strip().split("\n")[0]
    argument_group = parser.add_argument_group(group, doc)
    for option in options():
        if option.group == group:
            _add_option(argument_group, option)


def add_input_flags(parser: argparse.ArgumentParser) -> Any:
    """Add the flags that name the raw text, the same for all tools that read it; returns their group for more."""
    group = parser.add_argument_group("input")
    group.add_argument(
        "--input", nargs="+", required=True, metavar="FILE",
        help="files, directories or quoted glob patterns: .jsonl/.json/.ndjson (one JSON object a line) or .txt, also "
        ".gz and .zst; .parquet, .arrow, a directory that datasets saved, hf://NAME[:CONFIGURATION][@SPLIT]",
    )  # fmt: skip
    group.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys of the texts (text)")
    formats = ["auto", "jsonl", "text", "parquet", "arrow"]
    group.add_argument("--input-format", choices=formats, default="auto", help="auto: by file name")
    return group


def group_config(flags: dict[str, Any], group: str) -> Any:
    """Take the flags of one configuration dataclass out of `flags` (a parsed namespace) and build it.

    Raises:
        UserError: A value cannot work.
    """
    names = {option.name: option for option in options() if option.group == group}
    given = {name: value for name in names if (value := flags.pop(name, None)) is not None}
    return FLAG_GROUPS[group](**{name: _convert(names[name], value, flag_name(name)) for name, value in given.items()})


def _add_option(group: Any, option: Option) -> None:
    text = option.help.replace("%", "%%")
    if option.default is not None and "Default:" not in text:
        text += f" (default: {option.default})"
    flags = (flag_name(option.name), *option.aliases)
    if option.type is bool:
        group.add_argument(*flags, action="store_true", dest=option.name, help=text)
        group.add_argument(option.negative, action="store_false", dest=option.name, help="the opposite")
    elif option.type is list:
        group.add_argument(*flags, nargs="+", dest=option.name, help=text)
    else:
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else option.type.__name__.upper()
        group.add_argument(*flags, dest=option.name, metavar=metavar, help=text)


def _convert(option: Option, value: Any, origin: str) -> Any:
    """Check and convert one value from a flag (text) or a config file (YAML scalar)."""
    if value is None:
        if option.default is not None:
            raise UserError(f"{origin} has no value; give one, or remove it for the default {option.default}")
        return None
    if option.type is list:
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    if option.type is bool:
        if not isinstance(value, bool):
            raise UserError(f"{origin} is {value!r}; it must be true or false")
        return value
    if option.choices:
        renamed = MEGATRON_VALUES.get((option.name, str(value)), value)
        if isinstance(renamed, Refused):
            raise UserError(f"{origin} {value}: {renamed.reason}")
        if renamed not in option.choices:
            raise UserError(f"{origin} is {value!r}; choose from {', '.join(option.choices)}")
        return renamed
    if isinstance(value, bool | list | dict):
        raise UserError(f"{origin} is {value!r}; it must be {_KIND[option.type]}")
    try:
        number = option.type(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{origin} is {value!r}; it must be {_KIND[option.type]}") from None
    if option.type is int and isinstance(value, float) and value != number:
        raise UserError(f"{origin} is {value!r}; it must be {_KIND[int]}")
    if option.type is float and not math.isfinite(number):
        raise UserError(f"{origin} is {value!r}; it must be a finite number")
    return number


_KIND = {int: "a whole number", float: "a number", str: "text"}


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean {near[0]}?" if near else ""


def _read_config_file(path: str, by_name: dict[str, Option]) -> dict[str, Any]:
    """Field values of a YAML file: a flat mapping, or one level of the groups that --print-config prints."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a readable YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not YAML: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds {type(content).__name__}; it must map flag names to values")
    flat: dict[str, Any] = {}
    for key, value in content.items():
        entries = value if key in GROUPS and isinstance(value, dict) else {key: value}
        flat.update({str(name).removeprefix("--").replace("-", "_"): item for name, item in entries.items()})
    aliases = {a[2:].replace("-", "_"): o.name for o in by_name.values() for a in o.aliases}
    values = {}
    for key, value in flat.items():
        name = aliases.get(key, key)
        if name != "preset" and name not in by_name:
            raise UserError(f"--config {path}: unknown name {key!r}{_nearest(name, [*by_name, *aliases])}")
        values[name] = value if name == "preset" else _convert(by_name[name], value, f"{path}: {key}")
    return values


def _megatron_flags(given: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """Take Megatron-LM's other flags out of `given`; return the fields they stand for."""
    translated = {}
    for flag, meaning in MEGATRON_FLAGS.items():
        value = given.pop(flag[2:].replace("-", "_"), None)
        if value is None:
            continue
        if isinstance(meaning, Refused):
            if value == [meaning.obeyed]:
                continue
            raise UserError(f"{flag} is Megatron-LM's and does not work here: {meaning.reason}")
        if isinstance(meaning, Translated):
            direct = given.get(meaning.field, meaning.value)
            if direct != meaning.value:
                warnings.append(f"{flag} has no effect: {flag_name(meaning.field)} {direct} is given too")
            translated[meaning.field] = meaning.value
        else:
            warnings.append(f"{flag} has no effect: {meaning.reason}")
    return translated


_FP16_ONLY = {"loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"}


def _ineffective(config: RunConfig, sources: dict[str, str]) -> Iterator[str]:
    """Warnings about fields that were set and change nothing under the other values."""
    given = {name for name, source in sources.items() if source in ("flag", "config file")}
    kind = config.model.position_embedding_type
    only_with = {"max_position_embeddings": "learned_absolute", "rotary_base": "rope", "rotary_percent": "rope"}
    only_with |= dict.fromkeys(("relative_attention_num_buckets", "relative_attention_max_distance"), "relative")
    for name in sorted(given & set(only_with)):
        if kind != only_with[name]:
            yield f"{flag_name(name)} has no effect with --position-embedding-type {kind}"
    if config.parallel.pipeline_model_parallel_size == 1 and "pipeline_schedule" in given:
        yield "--pipeline-schedule has no effect without --pipeline-model-parallel-size above 1"
    optimizer = config.optimizer
    if not config.compute.fp16:
        for name in sorted(given & _FP16_ONLY):
            yield f"{flag_name(name)} has no effect without --fp16"
    if optimizer.optimizer == "adafactor":
        for name in sorted(given & {"adam_beta1", "adam_beta2", "adam_eps"}):
            yield f"{flag_name(name)} has no effect with --optimizer adafactor"
    small_lr = "lr" in given and optimizer.lr < 1e-3
    if optimizer.optimizer == "adamw-scale" and "optimizer" not in given and small_lr:
        yield (
            f"--lr {optimizer.lr:g} is meant for plain Adam; the default --optimizer adamw-scale multiplies steps by "
            "the weights' RMS and wants about 2e-2 (give --optimizer adam for Megatron-LM's behaviour)"
        )


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> ParsedArguments:
    """Turn a command line into a configuration.

    `--help` and `--print-config` print and exit with 0; a flag that does not exist exits with 2.

    Raises:
        UserError: A value cannot work.
    """
    parser = build_parser(prog)
    given = vars(parser.parse_args(argv))
    print_only, config_file = given.pop("print_config", False), given.pop("config", None)
    dry_run: DryRunConfig = group_config(given, "dry_run")
    by_name = {option.name: option for option in options() if option.group in GROUPS}
    warnings: list[str] = []
    translated = _megatron_flags(given, warnings)
    from_file = _read_config_file(config_file, by_name) if config_file else {}
    preset = given.pop("preset", from_file.pop("preset", None))
    if preset is not None and preset not in PRESETS:
        raise UserError(f"--preset is {preset!r}; choose from {', '.join(PRESETS)}")
    flags = {name: _convert(by_name[name], value, flag_name(name)) for name, value in given.items()}
    layers: dict[str, dict[str, Any]] = {
        "preset": dict(PRESETS[preset]) if preset else {},
        "checkpoint": _checkpoint_values(from_file | flags, by_name),
        "config file": from_file,
        "flag": translated | flags,
    }
    layers = {"objective": _objective_defaults(layers)} | layers
    config, sources = _assemble(layers, by_name)
    warnings += _ineffective(config, sources)
    if print_only:
        print(format_config(config, sources))
        parser.exit(0)
    return ParsedArguments(config, dry_run, sources, warnings)


def _objective_defaults(layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Defaults of the objective that `layers` end up with; its learning rate only goes with its optimizer."""
    merged: dict[str, Any] = {}
    for values in layers.values():
        merged |= values
    defaults = dict(OBJECTIVE_DEFAULTS.get(merged.get("objective", ""), {}))
    if merged.get("optimizer", defaults.get("optimizer")) != defaults.get("optimizer"):
        defaults.pop("lr", None)
    if merged.get("lr_warmup_iters") or merged.get("lr_warmup_samples"):
        defaults.pop("lr_warmup_fraction", None)
    return defaults


def _checkpoint_values(given: dict[str, Any], by_name: dict[str, Option]) -> dict[str, Any]:
    """What is taken from the checkpoint that the `given` values name, with `--use-checkpoint-args` or always."""
    if not given.get("use_checkpoint_args") and not Path(given.get("load") or "", "config.json").is_file():
        return {}
    from megatron.training.starting_point import checkpoint_arguments  # imports torch

    names = {option.name for option in by_name.values() if option.group == "checkpoint"}
    path, values = checkpoint_arguments(CheckpointConfig(**{n: v for n, v in given.items() if n in names}))
    if given.get("objective", values.get("objective")) != values.get("objective"):
        of_its_objective = ("decoder_seq_length", "denoisers", "packing", "shuffle_block_windows")
        values = {n: v for n, v in values.items() if n not in of_its_objective}
    return {n: _convert(by_name[n], v, f"{path}: {flag_name(n)}") for n, v in values.items() if n in by_name}


def _assemble(layers: dict[str, dict[str, Any]], by_name: dict[str, Option]) -> tuple[RunConfig, dict[str, str]]:
    """Merge the layers (later ones win) into a configuration; also tell each field's source."""
    merged: dict[str, Any] = {}
    sources = dict.fromkeys(by_name, "default")
    for source, values in layers.items():
        merged |= values
        sources |= dict.fromkeys(values, source)
    groups: dict[str, Any] = {}
    for group, config_class in GROUPS.items():
        groups[group] = config_class(**{n: v for n, v in merged.items() if by_name[n].group == group})
    return RunConfig(**groups), sources


def format_config(config: RunConfig, sources: dict[str, str]) -> str:
    """The configuration as YAML that `--config` reads back, with the source of each value as a comment."""
    lines = []
    for group, values in config.to_dict().items():
        lines.append(f"{group}:")
        for name, value in values.items():
            text = yaml.safe_dump({name: value}, default_flow_style=True, width=10**6).strip()[1:-1]
            if name == "vocab_size" and sources[name] == "preset":
                text = f"# {text}"  # training takes the tokenizer's unless told otherwise; so must the printed file
            lines.append(f"  {text:<48} # {sources[name]}")
    return "\n".join(lines)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise KeyboardInterrupt as SIGINT does, with their number.

    From then on all are ignored, so that neither the clean-up nor the exit status is disturbed by a second one.
    """
    interrupted = False

    def interrupt(number: int, frame: object) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        for caught in before:
            signal.signal(caught, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {n: signal.getsignal(n) for n in caught if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        if not interrupted:
            for number, handler in before.items():
                signal.signal(number, handler)


def exit_status(program: Callable[[], object], output: str, interrupted: str) -> int:
    """Run a tool's `program`; a mistake, a file that fails and a signal become one line on stderr and an exit status.

    The signals are SIGINT (Ctrl-C), SIGTERM and SIGUSR1; `program` sees each as a KeyboardInterrupt.

    Args:
        program: The tool.
        output: What it writes, named when a file error (a full disk, say) names no file.
        interrupted: The line after a signal.
    """
    try:
        with _signals_interrupt():
            program()
    except UserError as error:
        message, status = f"error: {error}", error.exit_status
    except OSError as error:
        message, status = f"error: {error.filename or output}: {error.strerror or error}", UserError.exit_status
    except KeyboardInterrupt as interrupt:
        message, status = interrupted, EXIT_SIGNAL + (interrupt.args[0] if interrupt.args else signal.SIGINT)
    else:
        return 0
    print(message, file=sys.stderr)
    return status


def run_command_line(main: Callable[[], int | None], is_printing_process: bool = True) -> NoReturn:
    """Run `main` as a program: `UserError` and `RunError` become one line on stderr and an exit status.

    A mistake mostly shows on every process of a node. One of them prints it; torchrun ends the others when that one
    has failed, and whoever is still there after a while has a mistake of its own to report.
    """
    try:
        sys.exit(main() or 0)
    except CommunicationError as error:  # each process saw something else of it
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Without the clean-up of an orderly end, which would wait for processes that are gone.
        os._exit(error.exit_status)
    except (UserError, RunError) as error:
        if not is_printing_process:
            time.sleep(OTHER_PROCESS_PRINTS_WITHIN_S)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
