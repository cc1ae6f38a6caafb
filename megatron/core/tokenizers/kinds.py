"""The kinds of tokenizers: SentencePiece, Hugging Face `tokenizer.json`, BERT WordPiece, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from megatron.core.errors import UserError, one_line
from megatron.core.tokenizers.base import (
    DEFAULT_EXTRA_IDS,
    Spelling,
    Tokenizer,
    choose_sentinels,
    descending,
    import_tokenizers,
    own_sentinels,
    read_model_file,
)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (T5, mT5, UMT5 and `tools/train_tokenizer.py`).

    Megatron-LM's tokenizer of this name appends `<CLS> <SEP> <EOD> <MASK>` behind the pieces, which T5's own
    numbering does not have: data that Megatron-LM tokenized with it has other ids at the end of documents.

    Raises:
        UserError: the model cannot be read, or has no eos or pad piece, or fewer sentinels than asked for.
    """

    type = "SentencePieceTokenizer"
    file_name = "spiece.model"

    def __init__(self, model: str | Path, extra_ids: int | None = None, content: bytes | None = None) -> None:
        import sentencepiece

        content = read_model_file(model, "--tokenizer-model") if content is None else content
        wrong = UserError(f"--tokenizer-model {model} is not a SentencePiece model; give a .model file")
        if not content:  # which the library takes for "no model yet"
            raise wrong
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise wrong from error
        size = self._model.vocab_size()
        pieces = {self._model.id_to_piece(i): i for i in range(size)}
        own = own_sentinels(pieces)
        appended = 0 if own else (DEFAULT_EXTRA_IDS if extra_ids is None else extra_ids)
        super().__init__(
            content=content,
            vocab_size=size + appended,
            pad_id=self._special(model, "pad", self._model.pad_id(), pieces, ("<pad>", "[PAD]")),
            eos_id=self._special(model, "eos", self._model.eos_id(), pieces, ("</s>", "<eos>", "[EOS]")),
            unk_id=self._model.unk_id(),
            sentinels=choose_sentinels(own, extra_ids, model) if own else descending(size, appended),
        )
        self._spelling = Spelling({i: self._model.id_to_piece(i) for i in own}, pieces, self.unk_id)

    @staticmethod
    def _special(
        model: str | Path, name: str, found: int, pieces: Mapping[str, int], spellings: tuple[str, ...]
    ) -> int:
        if found >= 0:
            return found
        for spelling in spellings:
            if spelling in pieces:
                return pieces[spelling]
        raise UserError(
            f"--tokenizer-model {model} has no {name} piece; T5 needs one: "
            f"train with tools/train_tokenizer.py, or spm_train --{name}_id"
        )

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on one thread."""
        return self._spelling.apply(self._model.encode(texts, out_type=int, num_threads=1))

    def tokenize_to_arrays(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids of each text, on one thread, and never as Python numbers."""
        if not texts or not hasattr(self._model, "encode_as_numpy"):  # older versions
            return super().tokenize_to_arrays(texts)
        rows = self._model.encode_as_numpy(texts, num_threads=1)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return self._spelling.apply_to_arrays(np.concatenate(rows), lengths)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def _starts_word(self, token: int) -> bool:
        return self._model.id_to_piece(token).startswith("\u2581")


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` package; truncation, padding, dropout are off.

    Attributes:
        backend: The package's tokenizer.

    Raises:
        UserError: the file cannot be read, or names no eos or pad token, or fewer sentinels than asked for.
    """

    type = "HuggingFaceTokenizer"
    file_name = "tokenizer.json"

    _EOS_NAMES = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[EOS]", "[SEP]")
    _PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
    _UNK_NAMES = ("<unk>", "[UNK]")

    def __init__(self, file: str | Path, extra_ids: int | None = None, content: bytes | None = None) -> None:
        content = read_model_file(file, "--tokenizer-model") if content is None else content
        tokenizers = import_tokenizers()
        try:
            self.backend = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the package raises bare Exception
            raise UserError(f"--tokenizer-model {file} is not a tokenizer.json: {one_line(error)}") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True  # "</s>" in text is five characters, not the special token
        if getattr(self.backend.model, "dropout", None):
            self.backend.model.dropout = None
        vocab = self.backend.get_vocab(with_added_tokens=True)
        size = max(vocab.values(), default=-1) + 1
        own = own_sentinels(vocab)
        appended = 0 if own else (DEFAULT_EXTRA_IDS if extra_ids is None else extra_ids)
        super().__init__(
            content=content,
            vocab_size=size + appended,
            pad_id=self._special(file, "pad", vocab, self._PAD_NAMES),
            eos_id=self._special(file, "eos", vocab, self._EOS_NAMES),
            unk_id=next((vocab[name] for name in self._UNK_NAMES if name in vocab), None),
            sentinels=choose_sentinels(own, extra_ids, file) if own else descending(size, appended),
        )
        # Unigram vocabularies list the special tokens among their pieces, and so find them in plain text.
        reserved = {i: self.backend.id_to_token(i) for i in (*own, self.pad_id, self.eos_id)}
        self._spelling = Spelling(reserved, vocab, self.unk_id)

    @staticmethod
    def _special(file: str | Path, name: str, vocab: Mapping[str, int], spellings: tuple[str, ...]) -> int:
        for spelling in spellings:
            if spelling in vocab:
                return vocab[spelling]
        raise UserError(
            f"--tokenizer-model {file} has no {name} token (looked for {' '.join(spellings)}); add one to the file"
        )

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return self._spelling.apply([encoding.ids for encoding in encodings])

    def _decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def _starts_word(self, token: int) -> bool:
        name = self.backend.id_to_token(token) or ""
        if type(self.backend.decoder).__name__ == "WordPiece":
            return not name.startswith("##")
        return name.startswith("\u2581")


class _BertWordPieceTokenizer(Tokenizer):
    """BERT's basic tokenizer and WordPiece over a `vocab.txt`, numbered as Megatron-LM does.

    `[BOS]`, `[EOS]` and the sentinels are appended to the vocabulary in this order, each unless it is there already;
    the eos (Megatron-LM's end of document) is `[EOS]`.

    Attributes:
        backend: A tokenizer of the package `tokenizers`, without what is appended to the vocabulary.

    Raises:
        UserError: the file cannot be read, repeats a token, or lacks `[UNK]` or `[PAD]`.
    """

    file_name = "vocab.txt"
    lowercase: ClassVar[bool]

    def __init__(self, vocab_file: str | Path, extra_ids: int | None = None, content: bytes | None = None) -> None:
        content = read_model_file(vocab_file, "--vocab-file") if content is None else content
        tokenizers = import_tokenizers()
        vocab = self._parse(vocab_file, content)
        model = tokenizers.models.WordPiece(dict(vocab), unk_token="[UNK]", max_input_chars_per_word=200)
        self.backend = tokenizers.Tokenizer(model)
        self.backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=self.lowercase)
        self.backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        self.backend.decoder = tokenizers.decoders.WordPiece(cleanup=False)
        count = DEFAULT_EXTRA_IDS if extra_ids is None else extra_ids
        for token in ("[BOS]", "[EOS]", *(f"<extra_id_{n}>" for n in range(count))):
            vocab.setdefault(token, len(vocab))
        super().__init__(
            content=content,
            vocab_size=len(vocab),
            pad_id=vocab["[PAD]"],
            eos_id=vocab["[EOS]"],
            unk_id=vocab["[UNK]"],
            sentinels=tuple(vocab[f"<extra_id_{n}>"] for n in range(count)),
        )
        self._names = {i: token for token, i in vocab.items()}

    @staticmethod
    def _parse(vocab_file: str | Path, content: bytes) -> dict[str, int]:
        try:
            lines = [line.strip() for line in content.decode("utf-8-sig").rstrip().split("\n")]
        except UnicodeDecodeError as error:
            raise UserError(f"--vocab-file {vocab_file} is not UTF-8 text: {error}") from error
        vocab: dict[str, int] = {}
        for number, token in enumerate(lines, start=1):
            if token in vocab:
                raise UserError(
                    f"--vocab-file {vocab_file}:{number} repeats {token!r} of line {vocab[token] + 1}; remove one"
                )
            vocab[token] = number - 1
        for token in ("[UNK]", "[PAD]"):
            if token not in vocab:
                raise UserError(f"--vocab-file {vocab_file} has no {token}; give a BERT vocabulary, one token a line")
        return vocab

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text. BERT's basic tokenizer splits at brackets, so `[SEP]` in text is three words."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self.backend.decode([i for i in ids if i in self._names], skip_special_tokens=False)

    def _starts_word(self, token: int) -> bool:
        return not self._names[token].startswith("##")


class BertWordPieceCase(_BertWordPieceTokenizer):
    """Cased BERT WordPiece."""

    type = "BertWordPieceCase"
    lowercase = False


class BertWordPieceLowerCase(_BertWordPieceTokenizer):
    """Uncased BERT WordPiece: lower case, accents stripped."""

    type = "BertWordPieceLowerCase"
    lowercase = True


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes in ByT5's numbering: pad 0, eos 1, unk 2, byte b is b + 3, then the sentinels.

    Hugging Face's ByT5Tokenizer gives ByT5's 125 spare embedding rows (259 to 383) to `<extra_id_0>` upwards; so does
    this class. Google's checkpoints were pretrained with sentinels counted down from 258 instead, which are the ids of
    bytes that occur in text (the last 100 byte values); that is not done here, since a document could then hold one.
    """

    type = "ByteTokenizer"
    file_name = None
    spaces_belong_to_words = False

    OFFSET = 3
    BYT5_EXTRA_IDS = 125

    def __init__(self, extra_ids: int | None = None) -> None:
        count = self.BYT5_EXTRA_IDS if extra_ids is None else extra_ids
        first = self.OFFSET + 256
        super().__init__(
            content=b"", vocab_size=first + count, pad_id=0, eos_id=1, unk_id=2,
            sentinels=tuple(range(first, first + count)),
        )  # fmt: skip

    def _with_sentinels(self, count: int) -> ByteTokenizer:
        return ByteTokenizer(count)

    def tokenize_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text."""
        return [[byte + self.OFFSET for byte in text.encode()] for text in texts]

    def tokenize_to_arrays(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids of each text."""
        encoded = [text.encode() for text in texts]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32) + np.int32(self.OFFSET), lengths

    def _decode(self, ids: list[int]) -> str:
        return bytes(i - self.OFFSET for i in ids if i >= self.OFFSET).decode(errors="replace")
