"""The tokenizers equal the field's own on any text, and read the folder's own files or say what is wrong."""
import json
import os
import random

import pytest

from data.download import cache_dir
from data.tokenizer import DIGITS_PATTERN, Tokenizer, byte_alphabet

ALPHABETS = ["abcdefgh ABC", "  \t\n\r\x0b\x0c\x85\u2028\xa0\u3000", "0123456789½Ⅷ٣²", "'\"`.,;:!?-_#[]()<>|/\\@$%^&*+=~", "éèüñçåßøÅİıŞﬁſΣσς",
             "你好世界日本語한국어", "👩‍👩‍👧‍👦🏽🇩🇪☺️", "\u0301\u0308\u0327\u20e3\u200d\ufe0f\u0600\u061c\u200b\ufeff\x00\x01\x7f\xad\ufffd", "'s't're've'm'll'd",
             "नमस्ते ไทย עברית العربية", "\u1734\u166d\U000111c9\u2e43\ua7cb"]
TEXTS = ["", " ", "a", "It's 1999, isn't  it?", "a  1", " ½", "x\n\n 12  3\n", "naïve café", "日本 2024", "</s> [SEP] <|endoftext|>", "a" * 101,
         "a\u0301" * 60, "don't!!!...", "\tend ", "ΑΣ", "İstanbul", "\u3000word\u3000"]


def texts(n, seed=0):
    """Mean strings: mixtures of a few alphabets, and now and then any code point at all."""
    draw = random.Random(seed)
    yield from TEXTS
    for _ in range(n):
        some = [draw.choice(ALPHABETS) for _ in range(draw.randint(1, 4))]
        anything = [chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x40000)])) for _ in range(2)]
        yield "".join(draw.choice(draw.choice(some)) if draw.random() < 0.95 else draw.choice(anything) for _ in range(draw.randint(1, 24)))


def code_points():
    return (chr(code) for code in range(0x40000) if not 0xD800 <= code < 0xE000)


def train_bpe(folder, pre_tokenizer, seed=0):
    """A byte-level BPE vocabulary trained by the field's library, as tokenizer.json; returns its tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts(3000, seed), trainer)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def pre_tokenizers(kind):
    pre = pytest.importorskip("tokenizers").pre_tokenizers
    from tokenizers import Regex
    llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return {"gpt2": pre.ByteLevel(add_prefix_space=False), "prefixed": pre.ByteLevel(add_prefix_space=True),
            "smollm": pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]),
            "llama3": pre.Sequence([pre.Split(Regex(llama3), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)])}[kind]


def assert_equal(ours, theirs, n=3000, every=False):
    for text in texts(n, seed=1):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    for character in code_points() if every else "":
        text = f"a{character}b 1{character}{character} "
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, hex(ord(character))


@pytest.mark.parametrize("kind", ["gpt2", "prefixed", "smollm", "llama3"])
def test_byte_level_bpe_equals_the_reference(kind, tmp_path):
    theirs = train_bpe(tmp_path, pre_tokenizers(kind))
    ours = Tokenizer(tmp_path)
    assert_equal(ours, theirs)
    for text in texts(300, seed=2):
        assert ours.decode(ours.encode(text)).removeprefix(" ") == text.removeprefix(" ")


def test_ids_in_another_order_than_the_merges_are_kept(tmp_path):
    theirs = train_bpe(tmp_path, pre_tokenizers("gpt2"))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    shuffled = dict(zip(vocab, random.Random(0).sample(range(len(vocab)), len(vocab))))
    (tmp_path / "roberta").mkdir()
    (tmp_path / "roberta" / "vocab.json").write_text(json.dumps({**shuffled, "<s>": 900, "<pad>": 901, "</s>": 902}))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    (tmp_path / "roberta" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    ours, text = Tokenizer(tmp_path / "roberta"), "some text, 12 !"
    assert ours.encode(text) == [shuffled[theirs.id_to_token(i)] for i in theirs.encode(text).ids] and ours.decode(ours.encode(text)) == text
    assert (ours.cls, ours.bos, ours.pad, ours.sep, ours.eos) == (900, 900, 901, 902, 902)


def bert(folder, **settings):
    """A WordPiece vocabulary trained by the field's library; returns its tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.BertWordPieceTokenizer(**{"lowercase": True, **settings})
    tokenizer.train_from_iterator(texts(3000), vocab_size=600, min_frequency=1, limit_alphabet=300, show_progress=False)
    tokenizer.save_model(str(folder))
    plain = tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), **{"lowercase": True, **settings})
    spec = json.loads(plain.to_str())
    spec["added_tokens"] = []  # text that spells a control token is text here
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize("settings", [{}, {"lowercase": False}, {"strip_accents": False}, {"lowercase": False, "strip_accents": True},
                                      {"handle_chinese_chars": False}])
def test_wordpiece_equals_the_reference(settings, tmp_path):
    theirs = bert(tmp_path, **settings)
    names = {"lowercase": "do_lower_case", "handle_chinese_chars": "tokenize_chinese_chars"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({names.get(k, k): v for k, v in settings.items()}))
    assert_equal(Tokenizer(tmp_path), theirs)


def test_a_token_added_to_a_wordpiece_vocabulary_has_its_id(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\na\n")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PADX]", "added_tokens_decoder": {"9": {"content": "[PADX]"}, "1": {"content": "[CLS]"}}}')
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.pad, tokenizer.cls, tokenizer.decode([9])) == (9, 1, "[PADX]")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["minilm", "smollm2", "bert", "gpt2"])
def test_every_code_point_equals_the_reference(kind, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path
    if kind == "bert":
        theirs = bert(tmp_path)
    elif kind == "gpt2":
        theirs = train_bpe(tmp_path, pre_tokenizers("gpt2"))
    else:
        folder = cache_dir() / kind
        if not folder.is_dir():
            pytest.skip(f"{folder} is not there: python data/prepare.py {kind}")
        spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        theirs = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": [], "truncation": None, "padding": None}))
    assert_equal(Tokenizer(folder), theirs, 100_000, every=True)


def test_text_that_spells_a_control_token_is_text(tmp_path):
    theirs = bert(tmp_path)
    ours = Tokenizer(tmp_path)
    assert ours.sep not in ours.encode("a [SEP] b") and len(ours.encode("[SEP]")) >= 3
    assert ours.encode("[SEP]") == theirs.encode("[SEP]", add_special_tokens=False).ids
    (tmp_path / "vocab.txt").unlink()
    train_bpe(tmp_path, pre_tokenizers("smollm"))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"] = [{"id": 700, "content": "<|im_end|>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}, "pad_token": None}))
    ours = Tokenizer(tmp_path)
    assert ours.eos == 700 and 700 not in ours.encode("<|im_end|>") and ours.decode(ours.encode("<|im_end|>")) == "<|im_end|>"
    assert ours.decode([700]) == "<|im_end|>" and (ours.bos, ours.pad, ours.cls, ours.sep) == (None, None, None, None)


@pytest.mark.parametrize("text", ["a" * 100_000, "a " * 50_000, " " * 100_000, "é" * 100_000, "1" * 100_000, "\n" * 100_000, "!" * 100_000, "你" * 100_000])
def test_long_texts_take_no_time(text, tmp_path):
    import time
    train_bpe(tmp_path, pre_tokenizers("smollm"))
    (tmp_path / "wp").mkdir()
    (tmp_path / "wp" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n##a\n!\n你\n1\n##1\n")
    for tokenizer in (Tokenizer(tmp_path), Tokenizer(tmp_path / "wp")):
        began = time.time()
        tokenizer.encode(text)
        assert time.time() - began < 5


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_lone_surrogates_become_the_replacement_character(kind, tmp_path):
    if kind == "bpe":
        train_bpe(tmp_path, pre_tokenizers("gpt2"))
    else:
        (tmp_path / "vocab.txt").write_text("[UNK]\na\n##b\nb\n")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb") and tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_bos_is_added_only_where_the_folder_says_so(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = train_bpe(tmp_path, pre_tokenizers("gpt2"))
    theirs.add_special_tokens(["<s>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    assert not Tokenizer(tmp_path).add_bos
    theirs.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", theirs.token_to_id("<s>"))])
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).add_bos
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": false}')
    assert not Tokenizer(tmp_path).add_bos


def test_the_byte_alphabet_names_each_byte_once():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256)) and alphabet["Ġ"] == 32 and alphabet["Ċ"] == 10
    assert DIGITS_PATTERN.count(r"\p{N}") == 3


def spec_with(**changes):
    letters = {character: i for i, character in enumerate(byte_alphabet())}
    return json.dumps({"model": {"type": "BPE", "vocab": letters, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}, **changes})


@pytest.mark.parametrize("files, words", [
    ({}, "has no vocabulary"), ({"spm.model": "x"}, "sentencepiece"), ({"tokenizer.json": "{"}, "tokenizer.json is not JSON"),
    ({"tokenizer.json": spec_with(pre_tokenizer={"type": "Metaspace"})}, "Metaspace is not supported"),
    ({"tokenizer.json": spec_with(normalizer={"type": "NFC"})}, "NFC"),
    ({"tokenizer.json": spec_with(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]})}, "lacks 'ab'"),
    ({"vocab.txt": "a\nb\n"}, r"vocab.txt has no \[UNK\]"), ({"vocab.json": "[]", "merges.txt": ""}, "vocab.json should hold")])
def test_folders_that_cannot_be_read_are_named(files, words, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) or "lacks" in str(error.value)


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(spec_with())
    with pytest.raises(ValueError, match="token id 999"):
        Tokenizer(tmp_path).decode([999])


@pytest.mark.skipif("GPT2_VOCAB" not in os.environ, reason="set GPT2_VOCAB to a folder with GPT-2's vocab.json and merges.txt")
def test_gpt2s_own_vocabulary():
    tokenizers = pytest.importorskip("tokenizers")
    folder = os.environ["GPT2_VOCAB"]
    ours = Tokenizer(folder)
    theirs = tokenizers.ByteLevelBPETokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt")
    assert_equal(ours, theirs, 5000)
    assert ours.encode("Hello world") == [15496, 995] and ours.eos == 50256 and ours.vocab_size == 50257
