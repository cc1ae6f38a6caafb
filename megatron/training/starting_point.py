"""The checkpoint that a run starts from: which one, what of it is taken, and whether the run fits it.

One rule decides between `--load`, `--ckpt-step`, `--finetune`, `--no-load-optim` and what lies in `--save`: the same
command again continues where it stopped. These flags say how a run begins, so they no longer apply once `--save` holds
a checkpoint that was saved under them. (Megatron-LM applies them at every start, which sets a restarted job back.)
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from megatron.core.config import DataConfig, ModelConfig
from megatron.core.dist_checkpointing import (
    CheckpointError,
    first_sound,
    load_checkpoint,
    published_checkpoints,
    read_manifest,
    verify_checkpoint,
)
from megatron.core.errors import UserError
from megatron.core.huggingface import HuggingFaceCheckpoint, check_tokenizer, origin_entries
from megatron.core.optimizer import LearningRateSchedule, Optimizer
from megatron.core.parallel_state import ParallelContext
from megatron.core.tokenizers import Tokenizer
from megatron.training.checkpointing import Progress, training_tensors
from megatron.training.config import GROUPS, CheckpointConfig, RunConfig

CHANGEABLE_MODEL_FIELDS = ("hidden_dropout", "attention_dropout", "init_method_std")
# Fields of the data that decide what a sample is; where files lie, how they are read and at what rates corpora are
# mixed shows in their fingerprints.
_CORPUS_FIELDS = ("objective", "split", "encoder_seq_length", "packing", "shuffle_block_windows")
_SAMPLE_FIELDS = {
    "span-corruption": (*_CORPUS_FIELDS, "noise_density", "mean_noise_span_length"),
    "ul2": (*_CORPUS_FIELDS, "denoisers"),
    "prefix-lm": _CORPUS_FIELDS,
    "text-to-text": (
        "objective", "encoder_seq_length", "decoder_seq_length", "packing", "packing_window", "truncate_targets",
        "mixture_temperature",
    ),
}  # fmt: skip
# Of these, what a new run from the weights takes over with --use-checkpoint-args.
OBJECTIVE_FIELDS = (
    "objective", "encoder_seq_length", "decoder_seq_length", "noise_density", "mean_noise_span_length", "denoisers",
    "packing", "packing_window", "shuffle_block_windows",
)  # fmt: skip
# Flags that name corpora: each of them is given instead of others.
_CORPORA = ("data_path", "data_config", "train_data_path")
SPLITS = {"validation", "test"}  # that are evaluated
SHOWN_STEPS = 5


class Scope(enum.Enum):
    """What a run takes from the checkpoint it starts from."""

    EVERYTHING = "everything"
    NO_OPTIMIZER = "weights and progress"
    WEIGHTS = "weights alone"


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a run starts from.

    Attributes:
        path: Its directory.
        scope: What is taken from it.
        manifest: What it records, but for the placement of its tensors.
        progress: How far the run that starts here has come.
        remark: Why it is not the checkpoint that the flags alone name, if so.
        warnings: What the user has to know about other checkpoints.
        is_huggingface: Whether it is a model of transformers; its manifest then has the architecture alone.
    """

    path: Path
    scope: Scope
    manifest: dict[str, Any]
    progress: Progress
    remark: str = ""
    warnings: tuple[str, ...] = ()
    is_huggingface: bool = False

    @property
    def origin(self) -> dict[str, Any]:
        """What the manifest says of the model of transformers that the weights were once; an export takes it up."""
        return {"huggingface": self.manifest["huggingface"]} if "huggingface" in self.manifest else {}

    def describe(self) -> str:
        """One line for the user."""
        remark = f" ({self.remark})" if self.remark else ""
        if self.is_huggingface:
            return f"starting a new run from the Hugging Face model {self.path}"
        if self.scope is Scope.WEIGHTS:
            return f"starting a new run from the weights of {self.path}{remark}"
        without = " without the state of its optimizer" if self.scope is Scope.NO_OPTIMIZER else ""
        return f"continuing from {self.path}{without}{remark}"


@dataclass(frozen=True)
class _Candidates:
    """Checkpoints of which the first sound one is taken.

    Attributes:
        paths: The newest first; at least one.
        scope: What is taken of it.
        own: Whether they are the run's own, in `--save`.
        remark: As in `StartingPoint`.
        warnings: As in `StartingPoint`.
        are_huggingface: Whether there is one, which is a model of transformers.
    """

    paths: list[Path]
    scope: Scope = Scope.EVERYTHING
    own: bool = False
    remark: str = ""
    warnings: tuple[str, ...] = ()
    are_huggingface: bool = False


def find_starting_point(config: CheckpointConfig, context: ParallelContext) -> StartingPoint | None:
    """The checkpoint that the run starts from, or None when it starts from scratch; all processes call it together.

    The main process chooses; all of them share the reading that verification takes.

    Raises:
        UserError: A checkpoint was asked for and none is sound; on every process.
    """
    candidates = context.on_main(lambda: _candidates(config))
    if candidates is None:
        return None
    if candidates.are_huggingface:
        return context.on_main(lambda: _read_huggingface(candidates.paths[0]))
    path = _first_sound(candidates.paths, context, config.verify_checkpoint)
    return context.on_main(lambda: _read(path, candidates))


def checkpoint_arguments(config: CheckpointConfig) -> tuple[Path, dict[str, Any]]:
    """Field values for `--use-checkpoint-args`: architecture, tokenizer and what a sample is, from the checkpoint.

    A new run from the weights of one takes neither dropout nor tokenizer nor data, which are its own. A Hugging Face
    model gives its architecture alone. Only sizes of files are compared here; the checkpoint is verified when it is
    loaded.

    Returns:
        The checkpoint, and the values by field.

    Raises:
        UserError: There is no checkpoint to take them from.
    """
    start = find_starting_point(replace(config, verify_checkpoint=False), ParallelContext(torch.device("cpu")))
    if start is None:
        raise UserError("--use-checkpoint-args found no checkpoint; give --load, or the flags themselves")
    saved = start.manifest["config"]
    if start.scope is Scope.WEIGHTS:  # a new run, on data of its own
        values = {name: value for name, value in saved["model"].items() if name not in CHANGEABLE_MODEL_FIELDS}
        data = saved.get("data", {})
        return start.path, values | {name: data[name] for name in OBJECTIVE_FIELDS if name in data}
    values = saved["model"] | saved["tokenizer"] | saved["data"] | {"seed": saved["training"].get("seed")}
    of_splits = ("valid_data_path", "test_data_path") if values.get("train_data_path") else ()
    for name in (*_CORPORA, *of_splits):
        values.pop(name, None)
    return start.path, values


def _read(path: Path, candidates: _Candidates) -> StartingPoint:
    manifest = read_manifest(path)
    del manifest["tensors"], manifest["files"]
    try:
        progress = _check_entries(manifest)
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} is not a checkpoint of a training run; use another one") from None
    scope = candidates.scope
    if not manifest["dataset"]:  # a converted model: there is nothing but weights
        scope = Scope.WEIGHTS
    if scope is Scope.NO_OPTIMIZER and candidates.own and manifest["config"]["checkpoint"].get("load_optim") is False:
        scope = Scope.EVERYTHING  # its optimizer has started anew already
    if scope is Scope.WEIGHTS:
        progress = Progress()
    elif scope is Scope.NO_OPTIMIZER:
        progress = replace(progress, loss_scaler={})
    return StartingPoint(path, scope, manifest, progress, candidates.remark, candidates.warnings)


def _read_huggingface(path: Path) -> StartingPoint:
    checkpoint = HuggingFaceCheckpoint(path)
    model = ModelConfig(**checkpoint.model_fields)
    manifest = {"config": {"model": asdict(model)}, **origin_entries(checkpoint.origin)}
    return StartingPoint(path, Scope.WEIGHTS, manifest, Progress(), is_huggingface=True)


def _complete(config: dict[str, Any]) -> None:
    """Give fields that are newer than the checkpoint the values that they stand for there, in place."""
    for group, config_class in GROUPS.items():
        known = {field.name for field in fields(config_class)}
        old = {name: value for name, value in config[group].items() if name in known}
        if old.keys() != known:
            config[group] = asdict(config_class(**old)) | config[group]


def _check_entries(manifest: dict[str, Any]) -> Progress:
    """The progress that a manifest records; KeyError or TypeError if it lacks what a run is started from."""
    progress = Progress(**manifest["progress"])
    _complete(manifest["config"])
    groups = [manifest["config"][name] for name in GROUPS]
    sizes = [manifest["global_batch_size"], manifest["config"]["model"]["vocab_size"]]
    entries = {dict: [*groups, manifest["tokenizer"], manifest["dataset"], manifest["schedule"]], int: sizes}
    for name, default in asdict(Progress()).items():
        entries.setdefault(type(default), []).append(getattr(progress, name))
    entries |= {str: progress.pending_evaluations, float: progress.recent_losses}
    if not all(isinstance(entry, kind) for kind, values in entries.items() for entry in values):
        raise TypeError
    if not all(0 <= count < 2**63 for count in entries[int]) or set(progress.pending_evaluations) - SPLITS:
        raise TypeError
    return progress


def _candidates(config: CheckpointConfig) -> _Candidates | None:
    save = Path(config.save) if config.save else None
    load = Path(config.load) if config.load else None
    if load is not None and save is not None and load.resolve() == save.resolve():
        load = None
    scope = Scope.EVERYTHING if config.load_optim else Scope.NO_OPTIMIZER
    published = _published(save) if save is not None else []
    if load is not None and published:
        return _Candidates(published, remark=f"--save holds it; --load {load} was not read")
    if load is not None:
        if HuggingFaceCheckpoint.is_one(load):
            if config.ckpt_step is not None:
                raise UserError(f"--ckpt-step has no meaning for the Hugging Face model --load {load}; drop it")
            return _Candidates([load], Scope.WEIGHTS, are_huggingface=True)
        scope = Scope.WEIGHTS if config.finetune else scope
        if config.ckpt_step is not None:
            return _Candidates(_at_step(load, config.ckpt_step), scope)
        published = _published(load)
        if not published:
            raise UserError(f"--load {load} holds no checkpoint; correct it, or leave it out to start from scratch")
        return _Candidates(published, scope)
    if config.finetune:
        raise UserError("--finetune needs --load, a directory other than --save; give one, or leave it out to continue")
    if config.ckpt_step is not None:
        if save is None:
            raise UserError("--ckpt-step needs --load or --save, the directory of the checkpoint; give one")
        return _go_back(save, config.ckpt_step, scope)
    return _Candidates(published, scope, own=True) if published else None


def _go_back(save: Path, step: int, scope: Scope) -> _Candidates:
    """The checkpoint of `step` in `--save`, or what a run that went back to it before has saved since."""
    published = _published(save)
    later = [path for path in published if _step(path) > step]
    since = [path for path in later if _was_saved_under(path, "ckpt_step", step)]
    if since:
        remark = f"saved since --ckpt-step {step} was obeyed; to go back again, remove {_names(since)}"
        candidates = [*since, *(path for path in published if _step(path) == step)]
        return _Candidates(candidates, scope, own=True, remark=remark)
    warning = (
        f"{save} holds {_names(later)}, later than --ckpt-step {step}: each stays until this run saves the same step "
        "and replaces it, and a run without --ckpt-step continues from the newest"
    )
    return _Candidates(_at_step(save, step), scope, own=True, warnings=(warning,) if later else ())


def _published(directory: Path) -> list[Path]:
    try:
        return published_checkpoints(directory)
    except OSError as error:
        raise UserError(f"{directory} cannot be read: {error.strerror}; give another --save or --load") from None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("iter_").removesuffix(".replaced"))


def _names(paths: list[Path]) -> str:
    names = [path.name for path in sorted(paths)]
    more = f" and {len(names) - SHOWN_STEPS} more" if len(names) > SHOWN_STEPS else ""
    return ", ".join(names[:SHOWN_STEPS]) + more


def _was_saved_under(path: Path, flag: str, value: Any) -> bool:
    """Whether the run that saved `path` had this value of a checkpoint flag."""
    try:
        return bool(read_manifest(path)["config"]["checkpoint"][flag] == value)
    except (CheckpointError, KeyError, TypeError):
        return False


def _at_step(directory: Path, step: int) -> list[Path]:
    """The checkpoint of `step`, which has to be there."""
    published = _published(directory)
    found = [path for path in published if _step(path) == step]
    if not found:
        there = f"only {_names(published)}" if published else "no checkpoint"
        raise UserError(f"--ckpt-step is {step}, but {directory} holds {there}; choose one that is there")
    return found


def _first_sound(paths: list[Path], context: ParallelContext, checksums: bool) -> Path:
    """The first of `paths` that is sound; those before are passed over with a warning. All processes call it together.

    Raises:
        UserError: There is none; on every process.
    """
    if len(paths) == 1:
        verify_checkpoint(paths[0], context, checksums)  # what is wrong with it says more
        return paths[0]
    found = first_sound(paths, context, checksums)
    if found is None:
        raise UserError(
            f"no checkpoint in {paths[0].parent} is sound ({len(paths)} found); restore one, or use another --save"
        )
    return found


def adopt_settings(
    start: StartingPoint, config: RunConfig, dp_size: int, tokenizer: Tokenizer, vocab_size_given: bool
) -> None:
    """Fill what the flags leave open with the checkpoint's values, in place.

    A continued run keeps the global batch size, so that it can go on with fewer or more processes; a new run from its
    weights keeps the size of the vocabulary.

    Args:
        start: The checkpoint.
        config: The run.
        dp_size: Data-parallel ranks.
        tokenizer: The tokenizer of the data.
        vocab_size_given: Leave the size of the vocabulary as it is.

    Raises:
        UserError: The global batch cannot be divided among `dp_size` ranks, or the vocabulary is too small for the
            tokenizer.
    """
    training = config.training
    if start.is_huggingface:
        _check_ids(start, tokenizer)
    else:
        _check_sentinels(start, tokenizer, vocab_size_given)
    if start.scope is Scope.WEIGHTS:
        size = start.manifest["config"]["model"]["vocab_size"]
        if vocab_size_given:
            return  # compared with the rest of the architecture
        if size < tokenizer.vocab_size:
            raise UserError(
                f"{start.path} has a vocabulary of {size} ids, but the tokenizer of --data-path uses "
                f"{tokenizer.vocab_size}; use data made with a tokenizer of at most {size} ids"
            )
        config.model.vocab_size = size
        config.model.check_vocabulary(config.parallel.tensor_model_parallel_size)
    elif training.global_batch_size is None:
        size, per_pass = start.manifest["global_batch_size"], training.micro_batch_size * dp_size
        if size % per_pass:
            raise UserError(
                f"{start.path} was trained with a global batch of {size} samples, which is not a multiple of "
                f"--micro-batch-size {training.micro_batch_size} x {dp_size} data-parallel processes; change it, or "
                "give --global-batch-size"
            )
        training.global_batch_size = size


def _check_sentinels(start: StartingPoint, tokenizer: Tokenizer, vocab_size_given: bool) -> None:
    """Raise `UserError` when nothing but the number of sentinels keeps the tokenizer from being the checkpoint's.

    A new run from its weights may have as many as the vocabulary has room for.
    """
    saved, number = start.manifest["tokenizer"], len(tokenizer.sentinel_ids)
    has_room = vocab_size_given or tokenizer.vocab_size <= start.manifest["config"]["model"]["vocab_size"]
    if (start.scope is Scope.WEIGHTS and has_room) or saved.get("num_sentinels") == number:
        return
    if tokenizer.spells_as(saved):
        raise UserError(
            f"{start.path} was trained with {saved['num_sentinels']} sentinels, but this run's tokenizer has {number}, "
            f"which are other rows of the embedding; give --vocab-extra-ids {saved['num_sentinels']}"
        )


def _check_ids(start: StartingPoint, tokenizer: Tokenizer) -> None:
    """Raise `UserError` when the tokenizer is not that of a Hugging Face model, as far as its ids tell."""
    special_ids = HuggingFaceCheckpoint(start.path).special_ids
    check_tokenizer(tokenizer, special_ids, start.manifest["config"]["model"]["vocab_size"], start.path)
    if special_ids.decoder_start_id != tokenizer.decoder_start_id:
        raise UserError(
            f"{start.path} starts its decoder with id {special_ids.decoder_start_id}, but training starts it with the "
            f"tokenizer's pad, {tokenizer.decoder_start_id}; such a model can be used, not trained"
        )


def check_compatible(start: StartingPoint, config: RunConfig, description: dict[str, Any]) -> list[str]:
    """Refuse a run that is not the checkpoint's; return one line for each difference that is allowed.

    Args:
        start: The checkpoint.
        config: The run.
        description: Of its tokenizer and dataset, see `TrainingData.describe`.

    Raises:
        UserError: Another architecture; for a run that continues, also another optimizer, tokenizer, dataset, seed or
            other samples, which could not be trained on exactly once.
    """
    path, saved, current = start.path, start.manifest["config"], config.to_dict()
    fixed = {name: value for name, value in current["model"].items() if name not in CHANGEABLE_MODEL_FIELDS}
    _refuse(path, "is of another architecture", saved["model"], fixed, "use its flags, as --use-checkpoint-args does")
    if start.is_huggingface:
        return []
    if start.scope is Scope.WEIGHTS:
        differing = list(_differences(start.manifest["tokenizer"], description["tokenizer"]))
        return [f"not the tokenizer of the weights: {', '.join(differing)}"] if differing else []
    if start.scope is Scope.EVERYTHING:
        ours = {"optimizer": config.optimizer.optimizer}
        _refuse(path, "was trained with another optimizer", saved["optimizer"], ours, "use it, or --no-load-optim")
    for name in ("tokenizer", "dataset"):
        _refuse(
            path, f"was trained with another {name}", start.manifest[name], description[name],
            "use the same, another --save, or --finetune",
        )  # fmt: skip
    samples = {name: current["data"][name] for name in sample_fields(config.data)}
    samples["seed"] = config.training.seed
    _refuse(
        path, "was trained on other samples", saved["data"] | {"seed": saved["training"].get("seed")}, samples,
        "use the same, so that none is repeated, or --finetune",
    )  # fmt: skip
    # As numbers, schedules are compared by `choose_schedule`.
    current["optimizer"] = {n: v for n, v in current["optimizer"].items() if not n.startswith(("lr", "min_lr"))}
    saved["training"]["global_batch_size"] = start.manifest["global_batch_size"]  # a flag, or what it defaulted to
    groups = ("model", "compute", "optimizer", "training")
    differing = [text for group in groups for text in _differences(saved[group], current[group])]
    lines = [f"not as in the run that saved it: {', '.join(differing)}"] if differing else []
    if config.compute.fp8_format is not None and config.compute.fp8_recipe == "delayed":
        lines.append("--fp8-recipe delayed starts with empty histories, of which checkpoints hold nothing")
    return lines


def sample_fields(config: DataConfig) -> tuple[str, ...]:
    """Fields of the data that decide what a sample is, with this objective and packing."""
    names = _SAMPLE_FIELDS[config.objective]
    if config.packing == "segments" and config.objective != "text-to-text":
        names += ("packing_window", "decoder_seq_length")  # documents fill the row that is given
    return names


def choose_schedule(
    start: StartingPoint, schedule: LearningRateSchedule, config: CheckpointConfig
) -> tuple[LearningRateSchedule, list[str]]:
    """The schedule to follow, and warnings about it.

    Args:
        start: The checkpoint.
        schedule: What the flags ask for.
        config: Whether the flags or the checkpoint decide where they differ.

    Raises:
        UserError: A continued run's schedule differs, and no flag decides.
    """
    if start.scope is Scope.WEIGHTS:
        return schedule, []
    try:
        saved = LearningRateSchedule(**start.manifest["schedule"])
    except TypeError:
        raise CheckpointError(f"{start.path} does not record its learning-rate schedule; use another one") from None
    before, now = saved.describe(), schedule.describe()
    common = [name for name in before if name in now]
    differing = [f"{name} {before[name]} -> {now[name]}" for name in common if before[name] != now[name]]
    if not differing:
        return schedule, []
    difference = f"the learning-rate schedule is not that of {start.path} ({', '.join(differing)})"
    if config.use_checkpoint_opt_param_scheduler:
        return saved, [f"{difference}; the checkpoint's is followed"]
    if config.override_opt_param_scheduler or start.scope is Scope.NO_OPTIMIZER:
        return schedule, [f"{difference}; the flags are followed"]
    kept = ""
    if saved.unit == schedule.unit and saved.lr_decay != schedule.lr_decay:
        kept = f"--lr-decay-{'iters' if saved.unit == 'iterations' else 'samples'} {saved.lr_decay} keeps its length, "
    raise UserError(
        f"{difference}; {kept}--override-opt_param-scheduler follows the flags, --use-checkpoint-opt_param-scheduler "
        "the checkpoint"
    )


def load_starting_point(start: StartingPoint, optimizer: Optimizer) -> None:
    """Load the tensors that the run takes into the optimizer's parameters and state; all processes call it together.

    Raises:
        CheckpointError: A file is missing or damaged, or tensors do not fit.
    """
    tensors = training_tensors(optimizer)
    if start.is_huggingface:
        named = zip(optimizer.names, optimizer.parameters, strict=True)
        HuggingFaceCheckpoint(start.path).fill(named, ModelConfig(**start.manifest["config"]["model"]))
        optimizer.refresh_copies()
        return
    everything = start.scope is Scope.EVERYTHING
    if not everything:
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}
    load_checkpoint(start.path, tensors, strict=everything, cast=not everything)
    optimizer.refresh_copies()


def _refuse(path: Path, problem: str, saved: dict[str, Any], current: dict[str, Any], cure: str) -> None:
    differing = list(_differences(saved, current))
    if differing:
        raise UserError(f"{path} {problem} ({', '.join(differing)}); {cure}")


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    """`name saved -> current` for each value of `current` that `saved` has otherwise."""
    return (f"{name} {saved.get(name)} -> {value}" for name, value in current.items() if saved.get(name) != value)
