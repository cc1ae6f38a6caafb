"""Tokenizers by flags, and those that were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.config import TokenizerConfig
from megatron.core.errors import UserError
from megatron.core.tokenizers.base import CONFIG_NAME, CONFIG_VERSION, Tokenizer, saved_config
from megatron.core.tokenizers.huggingface import adds_sentinels, load_huggingface_tokenizer
from megatron.core.tokenizers.kinds import (
    BertWordPieceCase,
    BertWordPieceLowerCase,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
)

_TYPES: dict[str, Any] = {
    kind.type: kind
    for kind in (SentencePieceTokenizer, HuggingFaceTokenizer, BertWordPieceCase, BertWordPieceLowerCase, ByteTokenizer)
}
# Looked for in a directory, in this order: the SentencePiece model is T5's definition, tokenizer.json derived from it.
_MODEL_NAMES = ("spiece.model", "sentencepiece.model", "tokenizer.model", "tokenizer.json")


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the flags ask for.

    `--tokenizer-type` may be left out where the file name tells it: `*.model` is SentencePiece, `*.json` Hugging Face,
    a directory is one that `Tokenizer.save` wrote or one of `transformers`, or just holds either file.

    Raises:
        UserError: flags are missing or contradict each other, or the file is unusable.
    """
    kind: str | None = config.tokenizer_type
    word_piece = kind in (BertWordPieceCase.type, BertWordPieceLowerCase.type)
    if config.vocab_file is not None and not word_piece:
        raise UserError(
            f"--vocab-file goes with --tokenizer-type {BertWordPieceCase.type} or {BertWordPieceLowerCase.type}"
            + (f", not {kind}; drop one of them" if kind else "; give one of them")
        )
    if config.tokenizer_model is not None:
        path = Path(config.tokenizer_model)
        if path.is_dir() and saved_config(path) is not None:
            return _load_with_flags(path, config)
        if word_piece or kind == ByteTokenizer.type:
            raise UserError(f"--tokenizer-model {path} has no effect with --tokenizer-type {kind}; drop one of them")
        if path.is_dir() and kind != HuggingFaceTokenizer.type and adds_sentinels(path):
            return _of_type(load_huggingface_tokenizer(path, config.vocab_extra_ids), path, kind)
        if path.is_dir():
            path = _model_in_directory(path, kind)
        return _TYPES[kind or _type_of_file(path)](path, config.vocab_extra_ids)
    if kind == ByteTokenizer.type:
        return ByteTokenizer(config.vocab_extra_ids)
    if word_piece:
        if config.vocab_file is None:
            raise UserError(f"--tokenizer-type {kind} needs --vocab-file, a vocabulary with one token a line")
        return _TYPES[str(kind)](config.vocab_file, config.vocab_extra_ids)
    raise UserError("--tokenizer-model is missing; give a SentencePiece .model file, a tokenizer.json or its directory")


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote.

    Raises:
        UserError: the directory is missing, incomplete, or its files changed since.
    """
    directory = Path(directory)
    config = saved_config(directory)
    if config is None:
        raise UserError(f"{directory} holds no {CONFIG_NAME} of a saved tokenizer; give --tokenizer-model")
    kind, extra_ids = _TYPES.get(str(config.get("tokenizer_type"))), config.get("vocab_extra_ids")
    if config.get("version") != CONFIG_VERSION or kind is None or not isinstance(extra_ids, int):
        raise UserError(
            f"{directory / CONFIG_NAME} is damaged or of another version than {CONFIG_VERSION}; copy the directory "
            "again, or use the release that wrote it"
        )
    files = [] if kind.file_name is None else [directory / kind.file_name]
    tokenizer: Tokenizer = kind(*files, extra_ids=extra_ids)
    if tokenizer.fingerprint != config.get("fingerprint"):
        raise UserError(f"{directory}: the tokenizer's files changed since they were saved; copy the directory again")
    return tokenizer


def _load_with_flags(directory: Path, config: TokenizerConfig) -> Tokenizer:
    """A saved tokenizer, with as many sentinels as are asked for; refused when other flags ask for something else."""
    tokenizer = _of_type(load_tokenizer(directory), directory, config.tokenizer_type)
    if config.vocab_file is not None:
        raise UserError(f"--vocab-file {config.vocab_file} has no effect: {directory} has its own; drop one of them")
    return tokenizer if config.vocab_extra_ids is None else tokenizer.with_sentinels(config.vocab_extra_ids)


def _of_type(tokenizer: Tokenizer, directory: Path, kind: str | None) -> Tokenizer:
    """The tokenizer of a directory, refused when `--tokenizer-type` asks for another `kind`."""
    if kind not in (None, tokenizer.type):
        raise UserError(f"--tokenizer-type is {kind} but {directory} holds a {tokenizer.type}; drop it")
    return tokenizer


def _model_in_directory(directory: Path, kind: str | None) -> Path:
    wanted = [name for name in _MODEL_NAMES if kind is None or _type_of_file(Path(name)) == kind]
    for name in wanted:
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"--tokenizer-model {directory} holds none of {', '.join(wanted)}; give the file itself")


def _type_of_file(path: Path) -> str:
    if path.suffix == ".model":
        return SentencePieceTokenizer.type
    if path.suffix == ".json":
        return HuggingFaceTokenizer.type
    raise UserError(f"--tokenizer-model {path} does not tell its kind by its name; give --tokenizer-type")
