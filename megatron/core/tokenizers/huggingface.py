"""Tokenizers in directories of `transformers`.

A SentencePiece model there says nothing of sentinels that are not among its pieces: tokenizer_config.json does, as
`extra_ids` or by their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.errors import UserError
from megatron.core.file_utils import read_json
from megatron.core.tokenizers.base import CONFIG_NAME, MAX_EXTRA_IDS, Tokenizer, own_sentinels
from megatron.core.tokenizers.kinds import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer

SENTENCE_PIECE, TOKENIZER_JSON = "spiece.model", "tokenizer.json"
BYTE_CLASS = "ByT5Tokenizer"
_NAMED = ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder")


def has_tokenizer(path: Path) -> bool:
    """Whether a directory of `transformers` has a tokenizer."""
    return any((path / name).is_file() for name in (SENTENCE_PIECE, TOKENIZER_JSON, CONFIG_NAME))


def load_huggingface_tokenizer(path: Path, extra_ids: int | None = None) -> Tokenizer:
    """Our tokenizer for a directory of `transformers`, of the same ids.

    The SentencePiece model is taken where there is one: tokenizer.json is derived from it.

    Args:
        path: The directory.
        extra_ids: Sentinels that `--vocab-extra-ids` asks for; None: those that the directory has.

    Raises:
        UserError: There is no tokenizer of a kind that T5 has, its file is unusable, or its sentinels are not as many
            as are asked for.
    """
    config = _config(path)
    if _is_of_bytes(config):
        return ByteTokenizer(_number_of_sentinels(config, extra_ids, path))
    if (path / SENTENCE_PIECE).is_file():
        file = path / SENTENCE_PIECE
        # An mT5 says that it adds none: they are among its pieces.
        own = config.get("extra_ids") == 0 and _has_own_sentinels(SentencePieceTokenizer, file)
        return SentencePieceTokenizer(file, extra_ids if own else _number_of_sentinels(config, extra_ids, path))
    if (path / TOKENIZER_JSON).is_file():
        file = path / TOKENIZER_JSON
        none = extra_ids is None and not _has_own_sentinels(HuggingFaceTokenizer, file)
        return HuggingFaceTokenizer(file, 0 if none else extra_ids)
    raise UserError(
        f"{path} holds no tokenizer of a T5 ({SENTENCE_PIECE}, {TOKENIZER_JSON}, or a {CONFIG_NAME} of "
        f"{BYTE_CLASS}); copy it there"
    )


def adds_sentinels(path: Path) -> bool:
    """Whether tokenizer_config.json decides on sentinels in this directory; a tokenizer.json has all in itself."""
    return (path / SENTENCE_PIECE).is_file() or _is_of_bytes(_config(path))


def _config(path: Path) -> dict[str, Any]:
    return read_json(path / CONFIG_NAME) if (path / CONFIG_NAME).is_file() else {}


def _is_of_bytes(config: dict[str, Any]) -> bool:
    return config.get("tokenizer_class") == BYTE_CLASS


def _number_of_sentinels(config: dict[str, Any], asked_for: int | None, path: Path) -> int | None:
    """How many sentinels to add: as `config` says, else as many as asked for; None for the kind's usual number."""
    found = config.get("extra_ids")
    if found is None:
        found = _named_sentinels(config) or asked_for
    if found is None:
        return None
    if type(found) is not int or not 0 <= found <= MAX_EXTRA_IDS:
        raise UserError(f"{path / CONFIG_NAME}: extra_ids is {found!r}; it must be a number up to {MAX_EXTRA_IDS}")
    if asked_for not in (None, found):
        raise UserError(f"--vocab-extra-ids is {asked_for} but {path / CONFIG_NAME} says {found}; drop the flag")
    return found


def _named_sentinels(config: dict[str, Any]) -> int:
    """Sentinels among the tokens that `config` names, which stand there as text or with properties."""
    names = set()
    for key in _NAMED:
        tokens = config.get(key)
        for token in tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else ():
            names.add(str(token.get("content") if isinstance(token, dict) else token))
    return len(own_sentinels(dict.fromkeys(names, 0)))


def _has_own_sentinels(kind: type[SentencePieceTokenizer | HuggingFaceTokenizer], file: Path) -> bool:
    """Whether the vocabulary itself has sentinels, so that asking for one adds none."""
    return kind(file, 1).vocab_size == kind(file, 0).vocab_size
