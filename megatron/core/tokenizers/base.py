"""What every tokenizer has in common, and what they are saved as."""

from __future__ import annotations

import abc
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from itertools import chain, groupby
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron.core.errors import UserError, one_line
from megatron.core.file_utils import fsync_directory, make_directory, partial_path, replace_directory, write_durably

CONFIG_NAME = "tokenizer_config.json"
CONFIG_FORMAT = "megatron-t5 tokenizer"
CONFIG_VERSION = 1
DEFAULT_EXTRA_IDS = 100
MAX_EXTRA_IDS = 1_000_000
_SENTINEL = re.compile("\u2581?<extra_id_([0-9]+)>")
_PROMPT_SENTINEL = re.compile("<extra_id_(0|[1-9][0-9]{0,6})>")


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
        type: Value of `--tokenizer-type`.
        vocab_size: Every id in use, sentinels included, not padded.
        pad_id: Id of the padding.
        eos_id: Id of the end of a sequence and, with `--append-eod`, of a document.
        unk_id: Id of what the vocabulary cannot spell; None when it spells everything.
        sentinel_ids: Ids that stand for masked spans, in order of use.
        fingerprint: sha256 over everything that determines the ids.
        content: The file of the vocabulary; empty when there is none.
    """

    type: ClassVar[str]
    file_name: ClassVar[str | None]  # the one file that `save` copies
    spaces_belong_to_words: ClassVar[bool] = True  # so that a masked word takes the space before it along

    def __init__(
        self,
        *,
        content: bytes,
        vocab_size: int,
        pad_id: int,
        eos_id: int,
        unk_id: int | None,
        sentinels: tuple[int, ...],
    ) -> None:
        self.vocab_size, self.pad_id, self.eos_id, self.unk_id = vocab_size, pad_id, eos_id, unk_id
        self.sentinel_ids = sentinels
        self._sentinel_names = {sentinel: f"<extra_id_{n}>" for n, sentinel in enumerate(sentinels)}
        self.content = content
        numbering = [self.type, vocab_size, pad_id, eos_id, unk_id, list(sentinels)]
        self.fingerprint = hashlib.sha256(json.dumps(numbering).encode() + b"\n" + content).hexdigest()

    @property
    def decoder_start_id(self) -> int:
        """First input of the decoder: the padding, as in T5."""
        return self.pad_id

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without special ids."""
        return self.tokenize_batch([text])[0]

    @abc.abstractmethod
    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special ids."""

    def tokenize_to_arrays(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The ids of `tokenize_batch` as arrays, which takes a part of the time where the library makes no lists.

        Returns:
            Ids of all texts end to end.  # [sum(lengths)]
            Ids of each text.  # [len(texts)]
        """
        rows = self.tokenize_batch(texts)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths

    def tokenize_prompts(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts that a person wrote for the model: `<extra_id_n>` in one is sentinel n; eos is not appended.

        White space before a sentinel is left out where the vocabulary counts a space to the word behind it. What has
        the form of a sentinel but no such number is text.
        """
        rows = [self._split_at_sentinels(text) for text in texts]
        ids = iter(self.tokenize_batch([part for row in rows for part in row if isinstance(part, str)]))
        return [[i for part in row for i in (next(ids) if isinstance(part, str) else [part])] for row in rows]

    def _split_at_sentinels(self, text: str) -> list[str | int]:
        """Texts, and ids of the sentinels between them."""
        parts: list[str | int] = []
        begin = 0
        for match in _PROMPT_SENTINEL.finditer(text):
            if int(match[1]) >= len(self.sentinel_ids):
                continue
            before = text[begin : match.start()]
            parts += [before.rstrip() if self.spaces_belong_to_words else before, self.sentinel_ids[int(match[1])]]
            begin = match.end()
        return [*parts, text[begin:]]

    def detokenize(self, ids: Iterable[int]) -> str:
        """Readable text: sentinels as `<extra_id_n>`, ids outside the vocabulary as `<id n>`; pad and eos left out."""
        parts: list[str] = []
        for ordinary, run in groupby((int(i) for i in ids), key=self._is_ordinary):
            if ordinary:
                pieces = list(run)
                space = " " if parts and self._starts_word(pieces[0]) else ""
                parts.append(space + self._decode(pieces).removeprefix(space))
            else:
                parts += [self._name(i) for i in run if i not in (self.pad_id, self.eos_id)]
        return "".join(parts)

    def describe(self) -> dict[str, Any]:
        """What a manifest or checkpoint records of the tokenizer, as JSON values."""
        return {
            "type": self.type,
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "eos_id": self.eos_id,
            "unk_id": self.unk_id,
            "decoder_start_id": self.decoder_start_id,
            "num_sentinels": len(self.sentinel_ids),
            "first_sentinel_id": self.sentinel_ids[0] if self.sentinel_ids else None,
            "fingerprint": self.fingerprint,
        }

    def with_sentinels(self, count: int) -> Tokenizer:
        """The same tokenizer with `count` sentinels: the ids of all texts stay what they are.

        Where sentinels are counted down from the top, `<extra_id_0>` itself gets another id.

        Raises:
            UserError: The sentinels are part of the vocabulary, which has fewer.
        """
        if count == len(self.sentinel_ids):
            return self
        other = self._with_sentinels(count)
        assert (other.pad_id, other.eos_id, other.unk_id) == (self.pad_id, self.eos_id, self.unk_id)
        return other

    def _with_sentinels(self, count: int) -> Tokenizer:
        kind: Any = type(self)
        tokenizer: Tokenizer = kind(self.file_name, extra_ids=count, content=self.content)
        return tokenizer

    def spells_as(self, description: Mapping[str, Any]) -> bool:
        """Whether the tokenizer that `description` is of gives the same ids to all texts, whatever its sentinels.

        Args:
            description: Of `describe`, perhaps from a file.
        """
        if description.get("fingerprint") == self.fingerprint:
            return True
        count = description.get("num_sentinels")
        if type(count) is not int or not 0 <= count <= MAX_EXTRA_IDS:
            return False
        try:
            return self.with_sentinels(count).fingerprint == description.get("fingerprint")
        except UserError:
            return False

    def save(self, directory: str | Path) -> None:
        """Write a directory that `load_tokenizer` reads, replacing one that exists; it appears whole or not at all.

        Raises:
            UserError: there is something else under this name.
        """
        directory = Path(directory)
        require_replaceable(directory)
        partial = partial_path(directory)
        shutil.rmtree(partial, ignore_errors=True)
        make_directory(directory.parent)
        partial.mkdir()
        config = {
            "format": CONFIG_FORMAT,
            "version": CONFIG_VERSION,
            "tokenizer_type": self.type,
            "file": self.file_name,
            "vocab_extra_ids": len(self.sentinel_ids),
            "fingerprint": self.fingerprint,
        }
        try:
            if self.file_name is not None:
                write_durably(partial / self.file_name, self.content)
            write_durably(partial / CONFIG_NAME, (json.dumps(config, indent=2) + "\n").encode())
            fsync_directory(partial)
            replace_directory(partial, directory)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of a run of ordinary ids."""

    def _starts_word(self, token: int) -> bool:
        """Whether a space belongs before this id, which decoding drops at the start of a run."""
        return False

    def _is_ordinary(self, token: int) -> bool:
        known = 0 <= token < self.vocab_size
        return known and token not in self._sentinel_names and token not in (self.pad_id, self.eos_id)

    def _name(self, token: int) -> str:
        return self._sentinel_names.get(token, f"<id {token}>")


class Spelling:
    """Replaces reserved ids that a vocabulary found in text by the ids of their characters."""

    def __init__(self, reserved: dict[int, str], vocab: Mapping[str, int], unk_id: int | None) -> None:
        # A character that is no piece of its own is unknown, or left out where there is no unknown id.
        character_ids = {c: vocab.get(c, unk_id) for name in reserved.values() for c in name}
        self._spelled = {
            token: [i for c in name if (i := character_ids[c]) is not None and i not in reserved]
            for token, name in reserved.items()
        }

    def apply(self, rows: list[list[int]]) -> list[list[int]]:
        """The rows without reserved ids."""
        if not self._spelled:
            return rows
        spelled = self._spelled
        return [
            row if spelled.keys().isdisjoint(row) else [i for token in row for i in spelled.get(token, (token,))]
            for row in rows
        ]

    def apply_to_arrays(
        self, ids: NDArray[np.int32], lengths: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The rows without reserved ids; rows end to end, and the length of each."""
        if not self._spelled or not ids.size:
            return ids, lengths
        is_reserved = np.zeros(max(int(ids.max()), *self._spelled) + 1, bool)
        is_reserved[list(self._spelled)] = True
        if not is_reserved[ids].any():
            return ids, lengths
        rows = self.apply([row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])])
        return np.array([i for row in rows for i in row], np.int32), np.array([len(row) for row in rows], np.int64)


def require_replaceable(directory: str | Path) -> None:
    """Check that `Tokenizer.save` may write here: nothing is there, or a tokenizer that it wrote.

    Raises:
        UserError: there is something else.
    """
    directory = Path(directory)
    if directory.is_symlink() or (directory.exists() and saved_config(directory) is None):
        raise UserError(f"{directory} is not a directory of a saved tokenizer, and would be replaced by one; move it")


def saved_config(directory: Path) -> dict[str, Any] | None:
    """Our tokenizer_config.json; None when it is missing or Hugging Face's file of the same name."""
    try:
        config = json.loads((directory / CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / CONFIG_NAME} cannot be read: {one_line(error)}") from error
    return config if isinstance(config, dict) and config.get("format") == CONFIG_FORMAT else None


def own_sentinels(vocab: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, ... as far as the vocabulary has them without a gap."""
    numbered = {int(match[1]): i for token, i in vocab.items() if (match := _SENTINEL.fullmatch(token))}
    count = next(n for n in range(len(numbered) + 1) if n not in numbered)
    return tuple(numbered[n] for n in range(count))


def choose_sentinels(own: tuple[int, ...], extra_ids: int | None, file: str | Path) -> tuple[int, ...]:
    """The first `extra_ids` of a vocabulary's own sentinels; all when it is None."""
    if extra_ids is not None and extra_ids > len(own):
        raise UserError(
            f"--vocab-extra-ids is {extra_ids} but {file} has {len(own)} sentinels of its own; ask for fewer"
        )
    return own[:extra_ids]


def descending(size: int, count: int) -> tuple[int, ...]:
    """Ids of `count` sentinels behind a vocabulary of `size`, the last one first."""
    return tuple(range(size + count - 1, size - 1, -1))


def read_model_file(path: str | Path, flag: str) -> bytes:
    """What the file that `flag` names holds."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from error


def import_tokenizers() -> Any:
    """The package `tokenizers` with its submodules."""
    # Its thread pool deadlocks in forked processes and competes with preprocessing's own; parallelism is the caller's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers
    import tokenizers.decoders
    import tokenizers.models
    import tokenizers.normalizers
    import tokenizers.pre_tokenizers

    return tokenizers
