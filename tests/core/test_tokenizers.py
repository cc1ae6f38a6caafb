"""Tokenizers: numbering of special and sentinel ids, text that looks like them, saving, bad files."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.core.config import TokenizerConfig
from megatron.core.errors import UserError
from megatron.core.tokenizers import (
    BertWordPieceCase,
    BertWordPieceLowerCase,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    build_tokenizer,
    load_huggingface_tokenizer,
    load_tokenizer,
)

WORDS = "the quick brown fox jumps over the lazy dog while they were watching all of it from a hill of stones and grass"
LINES = [" ".join(WORDS.split()[i % 7 : i % 7 + 9]) + f" {i} <extra_id_{i}></s><pad>." for i in range(200)]
T5_SPECIAL = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}


def train_sentencepiece(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    options = {"vocab_size": 120, "minloglevel": 2, **T5_SPECIAL, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=model, **options)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(folder / "t5.model")
    # mT5 keeps its sentinels in the model, counted down, spelled with the word mark.
    own = [f"\u2581<extra_id_{n}>" for n in (2, 1, 0)]
    train_sentencepiece(folder / "mt5.model", user_defined_symbols=own)
    vocab = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "fox",
        "##es",
        "Fox",
        "[",
        "]",
        "sep",
        "SEP",
        "cafe",
        "<",
    ]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    unigram(folder / "unigram.json", sentinels=3)
    byte_level(folder / "bpe.json")
    return folder


def unigram(path: Path, sentinels: int) -> None:
    """As Hugging Face converts T5: special tokens and sentinels are pieces with the best score of all."""
    names = [f"<extra_id_{n}>" for n in reversed(range(sentinels))]
    letters = [(c, -4.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz<>_/0123456789"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, *((name, 0.0) for name in names)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 2, False))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *names])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))


def byte_level(path: Path) -> None:
    """GPT-2's kind, with dropout left on as after training, a post-processor, and no sentinels."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(dropout=0.5))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>", "<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 1)]
    )
    tokenizer.save(str(path))


BUILD: dict[str, Callable[[Path], Tokenizer]] = {
    "t5": lambda folder: SentencePieceTokenizer(folder / "t5.model"),
    "mt5": lambda folder: SentencePieceTokenizer(folder / "mt5.model"),
    "unigram": lambda folder: HuggingFaceTokenizer(folder / "unigram.json"),
    "bpe": lambda folder: HuggingFaceTokenizer(folder / "bpe.json"),
    "bert": lambda folder: BertWordPieceCase(folder / "vocab.txt"),
    "bert-lower": lambda folder: BertWordPieceLowerCase(folder / "vocab.txt"),
    "bytes": lambda folder: ByteTokenizer(),
}


@pytest.fixture(scope="module", params=BUILD)
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    return BUILD[request.param](folder)


# --- every tokenizer -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40), number=st.integers(0, 2))
def test_text_never_gives_reserved_ids(tokenizer: Tokenizer, text: str, number: int) -> None:
    reserved = {tokenizer.pad_id, tokenizer.eos_id, *tokenizer.sentinel_ids}
    assert len(reserved) == 2 + len(tokenizer.sentinel_ids)
    wide = "".join(chr(ord(c) + 0xFEE0) for c in f"<extra_id_{number}>")  # normalization makes ASCII of it
    for name in (f"<extra_id_{number}>", "</s>", "<pad>", "[SEP]", "[EOS]", "[PAD]", "<|endoftext|>", wide):
        ids = tokenizer.tokenize(text + name)
        assert ids and reserved.isdisjoint(ids), name
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    texts = ["the fox", "", "the the fox <extra_id_0>", " "]
    batch = tokenizer.tokenize_batch(texts)
    assert batch == [tokenizer.tokenize(text) for text in texts]
    assert batch[1] == [] and batch[0]
    assert batch == tokenizer.tokenize_batch(texts)


def test_detokenize_shows_sentinels_and_survives_any_id(tokenizer: Tokenizer) -> None:
    the, fox = tokenizer.tokenize("the"), tokenizer.tokenize("fox")
    first, second = tokenizer.sentinel_ids[:2]
    beyond = tokenizer.vocab_size
    shown = tokenizer.detokenize([*the, first, *fox, second, tokenizer.eos_id, beyond, -1, tokenizer.pad_id])
    # Byte vocabularies keep spaces as ids of their own, word vocabularies put them before words.
    assert shown.replace(" ", "") == f"the<extra_id_0>fox<extra_id_1><id{beyond}><id-1>"
    tokenizer.detokenize(range(-2, tokenizer.vocab_size + 2))
    assert tokenizer.detokenize([]) == ""


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.text("ab <_>0"), min_size=1, max_size=4), data=st.data())
def test_prompts_hold_sentinels(tokenizer: Tokenizer, parts: list[str], data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 2), min_size=len(parts) - 1, max_size=len(parts) - 1))
    text, ids = parts[0], []
    for part, number in zip(parts[1:], numbers, strict=True):
        text += f"<extra_id_{number}>" + part
    for part, number in zip(parts, numbers, strict=False):
        ids += [*tokenizer.tokenize(part if tokenizer.type == "ByteTokenizer" else part.rstrip())]
        ids += [tokenizer.sentinel_ids[number]]
    expected = [tokenizer.tokenize("a"), ids + tokenizer.tokenize(parts[-1]), [tokenizer.sentinel_ids[1]]]
    assert tokenizer.tokenize_prompts(["a", text, "<extra_id_1>"]) == expected


@pytest.mark.parametrize("name", ["<extra_id_200>", "<extra_id_01>", "<extra_id_>", "<extra_id_99999999>"])
def test_prompts_spell_what_is_no_sentinel(tokenizer: Tokenizer, name: str) -> None:
    assert tokenizer.tokenize_prompts([f"the {name} fox"]) == [tokenizer.tokenize(f"the {name} fox")]


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for _ in range(2):  # the second time it replaces what is there
        tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert type(loaded) is type(tokenizer)
    assert loaded.describe() == tokenizer.describe() == json.loads(json.dumps(tokenizer.describe()))
    assert loaded.sentinel_ids == tokenizer.sentinel_ids
    assert loaded.tokenize("the fox") == tokenizer.tokenize("the fox")
    assert (
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path / "saved"))).fingerprint == tokenizer.fingerprint
    )
    # The type may be named as well, whatever the kind.
    both = TokenizerConfig(tokenizer_model=str(tmp_path / "saved"), tokenizer_type=tokenizer.type)  # type: ignore[arg-type]
    assert build_tokenizer(both).fingerprint == tokenizer.fingerprint
    fewer = TokenizerConfig(tokenizer_model=str(tmp_path / "saved"), vocab_extra_ids=2)
    assert build_tokenizer(fewer).fingerprint == tokenizer.with_sentinels(2).fingerprint != tokenizer.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    config["fingerprint"] = "0"
    (tmp_path / "saved" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="changed since"):
        load_tokenizer(tmp_path / "saved")


def test_other_numbers_of_sentinels_move_no_id_of_a_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    before = tokenizer.describe()
    own = tokenizer.with_sentinels(0).vocab_size == tokenizer.vocab_size
    for number in (0, 2, 128):
        if own and number == 128:
            with pytest.raises(UserError, match=r"--vocab-extra-ids is 128 but .* sentinels of its own"):
                tokenizer.with_sentinels(number)
            continue
        other = tokenizer.with_sentinels(number)
        assert len(other.sentinel_ids) == len(set(other.sentinel_ids)) == number
        assert other.tokenize_batch(LINES[:20]) == tokenizer.tokenize_batch(LINES[:20])
        assert other.fingerprint != tokenizer.fingerprint
        assert other.spells_as(before) and tokenizer.spells_as(other.describe())
        assert not other.spells_as(before | {"fingerprint": "0"})
        assert own or other.vocab_size - number == tokenizer.vocab_size - len(tokenizer.sentinel_ids)
        other.save(tmp_path / "other")
        assert load_tokenizer(tmp_path / "other").describe() == other.describe()
        assert other.with_sentinels(len(tokenizer.sentinel_ids)).describe() == before
    assert tokenizer.with_sentinels(len(tokenizer.sentinel_ids)) is tokenizer and tokenizer.describe() == before
    assert not tokenizer.spells_as({}) and not tokenizer.spells_as({"num_sentinels": 10**12, "fingerprint": "0"})


def test_decoder_starts_with_pad(tokenizer: Tokenizer) -> None:
    assert tokenizer.decoder_start_id == tokenizer.pad_id == 0


def test_fingerprints_differ(folder: Path) -> None:
    built = [build(folder) for build in BUILD.values()] + [SentencePieceTokenizer(folder / "t5.model", 99)]
    assert len({tokenizer.fingerprint for tokenizer in built}) == len(built)


# --- numbering -----------------------------------------------------------------------------------------------------


def test_sentencepiece_counts_down_from_the_top(folder: Path) -> None:
    tokenizer = SentencePieceTokenizer(folder / "t5.model")
    # T5's own model has 32,000 pieces: 32099 ... 32000 by the same arithmetic.
    assert tokenizer.vocab_size == 220
    assert tokenizer.sentinel_ids == tuple(range(219, 119, -1))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "t5.model"))
    assert [tokenizer.tokenize(line) for line in LINES] == model.encode(LINES)
    assert SentencePieceTokenizer(folder / "t5.model", 300).sentinel_ids[0] == 419  # UMT5's number
    assert SentencePieceTokenizer(folder / "t5.model", 0).vocab_size == 120


def test_sentencepiece_with_its_own_sentinels(folder: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "mt5.model"))
    own = tuple(model.piece_to_id(f"\u2581<extra_id_{n}>") for n in range(3))
    assert SentencePieceTokenizer(folder / "mt5.model").sentinel_ids == own
    assert SentencePieceTokenizer(folder / "mt5.model", 2).sentinel_ids == own[:2]
    assert SentencePieceTokenizer(folder / "mt5.model").vocab_size == 120
    with pytest.raises(UserError, match="has 3 sentinels of its own"):
        SentencePieceTokenizer(folder / "mt5.model", 4)
    # The plain model finds a sentinel in this text; ours spells it out, and it reads the same.
    text = "the <extra_id_1> fox"
    assert own[1] in model.encode(text)
    tokenizer = SentencePieceTokenizer(folder / "mt5.model")
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_hugging_face_uses_the_files_sentinels_or_appends_them(folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(folder / "unigram.json")
    plain = tokenizers.Tokenizer.from_file(str(folder / "unigram.json"))
    assert tokenizer.sentinel_ids == tuple(plain.token_to_id(f"<extra_id_{n}>") for n in range(3))
    assert tokenizer.vocab_size == plain.get_vocab_size()
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    bpe = HuggingFaceTokenizer(folder / "bpe.json")
    size = tokenizers.Tokenizer.from_file(str(folder / "bpe.json")).get_vocab_size()
    assert bpe.vocab_size == size + 100 and bpe.sentinel_ids == tuple(range(size + 99, size - 1, -1))
    assert (bpe.pad_id, bpe.eos_id, bpe.unk_id) == (0, 1, None)


def test_hugging_face_truncation_padding_dropout_and_template_are_off(folder: Path) -> None:
    text = "the quick brown fox " * 5
    unigram_ids = HuggingFaceTokenizer(folder / "unigram.json").tokenize(text)
    assert len(unigram_ids) > 9 and 0 not in unigram_ids
    bpe = HuggingFaceTokenizer(folder / "bpe.json")
    assert len({tuple(bpe.tokenize(text)) for _ in range(20)}) == 1
    assert bpe.detokenize(bpe.tokenize(text + "</s>")) == text + "</s>"


def test_wordpiece_numbers_as_megatron(folder: Path) -> None:
    tokenizer = BertWordPieceCase(folder / "vocab.txt")
    # 15 lines, then [BOS] 15, [EOS] 16, sentinels counted up.
    assert tokenizer.sentinel_ids == tuple(range(17, 117)) and tokenizer.vocab_size == 117
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 16, 1)
    assert tokenizer.tokenize("the foxes Fox zzz [SEP]") == [5, 6, 7, 8, 1, 9, 12, 10]
    assert tokenizer.detokenize([5, 6, 7, 17, 6]) == "the foxes<extra_id_0> fox"
    lower = BertWordPieceLowerCase(folder / "vocab.txt")
    assert lower.tokenize("THE Fox Caf\u00e9 [SEP]") == [5, 6, 13, 9, 11, 10]


def test_wordpiece_keeps_tokens_the_vocabulary_has(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[EOS]\n<extra_id_0>\nfox\n")
    tokenizer = BertWordPieceCase(tmp_path / "vocab.txt", 2)
    assert (tokenizer.eos_id, tokenizer.sentinel_ids, tokenizer.vocab_size) == (2, (3, 6), 7)


def test_wordpiece_vocabulary_with_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf[PAD]\r\n[UNK]\r\nfox\r\n")
    assert BertWordPieceCase(tmp_path / "vocab.txt", 0).tokenize("fox") == [2]


def test_save_replaces_no_other_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a directory of a saved tokenizer"):
        ByteTokenizer().save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "precious"


def test_bytes_number_as_byt5() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 384 and tokenizer.sentinel_ids == tuple(range(259, 384))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    assert tokenizer.tokenize("h\u00e9") == [107, 198, 172]
    assert ByteTokenizer(100).vocab_size == 359


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


# --- flags and bad files -------------------------------------------------------------------------------------------


def test_type_is_told_by_the_name(folder: Path, tmp_path: Path) -> None:
    def kind(**flags: Any) -> type:
        return type(build_tokenizer(TokenizerConfig(**flags)))

    assert kind(tokenizer_model=str(folder / "t5.model")) is SentencePieceTokenizer
    assert kind(tokenizer_model=str(folder / "bpe.json")) is HuggingFaceTokenizer
    assert kind(tokenizer_type="ByteTokenizer") is ByteTokenizer
    assert kind(tokenizer_type="BertWordPieceCase", vocab_file=str(folder / "vocab.txt")) is BertWordPieceCase
    # A directory as Hugging Face publishes T5: both files, and a tokenizer_config.json that is not ours.
    (tmp_path / "spiece.model").write_bytes((folder / "t5.model").read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((folder / "unigram.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert kind(tokenizer_model=str(tmp_path)) is SentencePieceTokenizer
    assert kind(tokenizer_model=str(tmp_path), tokenizer_type="HuggingFaceTokenizer") is HuggingFaceTokenizer


NAMES = [f"<extra_id_{n}>" for n in range(7)]


@pytest.mark.parametrize(
    ("config", "number"),
    [
        ({}, 100),
        ({"extra_ids": 7}, 7),
        ({"extra_ids": 0}, 0),
        ({"extra_ids": None, "additional_special_tokens": None}, 100),
        ({"additional_special_tokens": ["<s>", *NAMES]}, 7),
        ({"extra_special_tokens": [{"content": name, "lstrip": True} for name in NAMES]}, 7),
        ({"extra_special_tokens": {f"token_{n}": name for n, name in enumerate(NAMES)}}, 7),
        ({"added_tokens_decoder": {str(130 - n): {"content": name} for n, name in enumerate(NAMES)}}, 7),
        ({"extra_ids": 9, "additional_special_tokens": NAMES}, 9),
    ],
)
def test_sentinels_of_a_directory_of_transformers(
    folder: Path, tmp_path: Path, config: dict[str, Any], number: int
) -> None:
    (tmp_path / "spiece.model").write_bytes((folder / "t5.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    flags: dict[str, Any] = {"tokenizer_model": str(tmp_path)}
    tokenizer = build_tokenizer(TokenizerConfig(**flags))
    assert tokenizer.sentinel_ids == tuple(range(119 + number, 119, -1)) and tokenizer.vocab_size == 120 + number
    assert load_huggingface_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    if number == 100:  # nothing is said, so that a flag can say it
        assert len(build_tokenizer(TokenizerConfig(**flags, vocab_extra_ids=5)).sentinel_ids) == 5
    else:
        same = build_tokenizer(TokenizerConfig(**flags, vocab_extra_ids=number))
        assert same.fingerprint == tokenizer.fingerprint
        with pytest.raises(UserError, match=rf"--vocab-extra-ids is 5 but .*config.json says {number}; drop the flag"):
            build_tokenizer(TokenizerConfig(**flags, vocab_extra_ids=5))


def test_directories_of_mt5_and_byt5(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes((folder / "mt5.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 0, "additional_special_tokens": null}')
    flags: dict[str, Any] = {"tokenizer_model": str(tmp_path)}
    own = SentencePieceTokenizer(folder / "mt5.model").sentinel_ids
    assert build_tokenizer(TokenizerConfig(**flags)).sentinel_ids == own and len(own) == 3
    assert build_tokenizer(TokenizerConfig(**flags, vocab_extra_ids=2)).sentinel_ids == own[:2]
    (tmp_path / "spiece.model").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 9}')
    assert build_tokenizer(TokenizerConfig(**flags)).fingerprint == ByteTokenizer(9).fingerprint
    with pytest.raises(UserError, match=r"--tokenizer-type is SentencePieceTokenizer but .* holds a ByteTokenizer"):
        build_tokenizer(TokenizerConfig(**flags, tokenizer_type="SentencePieceTokenizer"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"extra_ids": "many"}', "extra_ids is 'many'; it must be a number"),
        ('{"extra_ids": -1}', "extra_ids is -1"),
        ("[1]", "holds no JSON object"),
        ("{", "cannot be read: Expecting"),
    ],
)
def test_configuration_of_transformers_that_says_nothing(
    folder: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "spiece.model").write_bytes((folder / "t5.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        build_tokenizer(TokenizerConfig(tokenizer_model=str(tmp_path)))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, "--tokenizer-model is missing"),
        ({"tokenizer_model": "none.model"}, "none.model cannot be read: No such file"),
        ({"tokenizer_model": "vocab.txt"}, "--tokenizer-type"),
        ({"tokenizer_model": "empty"}, "empty holds none of spiece.model"),
        ({"tokenizer_model": "garbage.model"}, "garbage.model is not a SentencePiece model"),
        ({"tokenizer_model": "empty.model"}, "empty.model is not a SentencePiece model"),
        ({"tokenizer_model": "garbage.json"}, "garbage.json is not a tokenizer.json"),
        ({"tokenizer_model": "nopad.model"}, "nopad.model has no pad piece"),
        ({"tokenizer_model": "noeos.model"}, "noeos.model has no eos piece"),
        ({"tokenizer_model": "nopad.json"}, "nopad.json has no pad token"),
        ({"vocab_file": "vocab.txt"}, "--tokenizer-type BertWordPieceCase"),
        ({"tokenizer_model": "t5.model", "vocab_file": "vocab.txt"}, "--vocab-file goes with"),
        ({"tokenizer_type": "ByteTokenizer", "vocab_file": "vocab.txt"}, "not ByteTokenizer; drop one"),
        ({"tokenizer_type": "ByteTokenizer", "tokenizer_model": "x.model"}, "--tokenizer-model x.model has no effect"),
        (
            {"tokenizer_type": "BertWordPieceCase", "vocab_file": "vocab.txt", "tokenizer_model": "empty"},
            "--tokenizer-model empty has no effect",
        ),
        ({"tokenizer_type": "BertWordPieceCase"}, "needs --vocab-file"),
        ({"tokenizer_type": "BertWordPieceCase", "vocab_file": "none.txt"}, "none.txt cannot be read"),
        ({"tokenizer_type": "BertWordPieceCase", "vocab_file": "twice.txt"}, "twice.txt:3 repeats '[PAD]' of line 1"),
        ({"tokenizer_type": "BertWordPieceCase", "vocab_file": "nopad.txt"}, "has no [PAD]"),
        ({"tokenizer_type": "BertWordPieceCase", "vocab_file": "garbage.model"}, "is not UTF-8"),
    ],
)
def test_bad_flags_and_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vocab.txt").write_text("[PAD]\n[UNK]\n")
    Path("twice.txt").write_text("[PAD]\n[UNK]\n[PAD]\n")
    Path("nopad.txt").write_text("[UNK]\n")
    Path("empty").mkdir()
    Path("empty.model").touch()
    for name in ("garbage.model", "garbage.json"):
        Path(name).write_bytes(b"\xff{garbage")
    plain = json.loads((folder / "bpe.json").read_text().replace('"<pad>"', '"<other>"'))
    Path("nopad.json").write_text(json.dumps(plain))
    if "model" in expected and "no " in expected:
        train_sentencepiece(Path("nopad.model"), pad_id=-1, eos_id=0, unk_id=1)
        train_sentencepiece(Path("noeos.model"), pad_id=0, eos_id=-1, unk_id=1)
    with pytest.raises(UserError) as caught:
        build_tokenizer(TokenizerConfig(**flags))  # type: ignore[arg-type]
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [-1, 10**12])
def test_impossible_numbers_of_sentinels_are_refused(number: int) -> None:
    with pytest.raises(UserError, match="--vocab-extra-ids"):
        TokenizerConfig(vocab_extra_ids=number)


def test_saved_directory_is_incomplete_or_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no tokenizer_config.json"):
        load_tokenizer(tmp_path / "none")
    SentencePieceTokenizer(folder / "t5.model").save(tmp_path / "saved")
    (tmp_path / "saved" / "spiece.model").unlink()
    with pytest.raises(UserError, match=r"spiece.model cannot be read"):
        load_tokenizer(tmp_path / "saved")
    path = tmp_path / "saved" / "tokenizer_config.json"
    whole = json.loads(path.read_text())
    for damage in ({"vocab_extra_ids": None}, {"tokenizer_type": ["x"]}, {"version": 99}):
        path.write_text(json.dumps(whole | damage))
        with pytest.raises(UserError, match=r"tokenizer_config.json is damaged or of another version"):
            load_tokenizer(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json cannot be read"):
        load_tokenizer(tmp_path / "saved")


def test_importing_loads_no_tokenizer_library() -> None:
    script = "import sys, megatron.core.tokenizers; print({'torch', 'sentencepiece', 'tokenizers'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"
