"""The tokenizers equal the field's own on ordinary text, and read the folder's own files or say what is wrong."""
import importlib.util
import json
import sys

import pytest
from conftest import SHARED

from data.tokenizer import Tokenizer, byte_alphabet

TEXTS = ["", " ", "a", " leading", "trailing ", "two  spaces", "a\n\n b\tc\r\n", "It's 1999, isn't it?",
         "12  12 345 6.78",
         "naïve café — “quotes” …", "日本語 text 你好", "привет ΣΑΣ", "emoji 😀 👩‍👩‍👧", "é ½ ﬁne", "עברית हिन्दी ไทย",
         "</s> [SEP] <|endoftext|>", "x" * 120, "the lamp, the LAMP and the lampshade"]
published = pytest.mark.skipif(not (SHARED / "vocab").is_dir(), reason="no shared/data/vocab")


def reference(spec, added_tokens=()):
    """The encoder of the `tokenizers` package for a tokenizer.json; control tokens in a text are text here."""
    tokenizers = pytest.importorskip("tokenizers")
    spec = spec if isinstance(spec, dict) else json.loads(spec)
    theirs = tokenizers.Tokenizer.from_str(json.dumps({**spec, "added_tokens": added_tokens, "post_processor": None}))
    return lambda text: theirs.encode(text, add_special_tokens=False).ids


def assert_equal(folder, encode, round_trip=True):
    """Our ids are those of `encode`, and for GPTs the text comes back. Returns our tokenizer."""
    ours = Tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == encode(text), repr(text)
        assert not round_trip or ours.decode(ours.encode(text)).strip() == text.strip()
    return ours


def write(folder, **files):
    """The folder with files such as tokenizer_json={...}."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        (folder / ".".join(name.rsplit("_", 1))).write_text(text, encoding="utf-8")
    return folder


# Published vocabularies


@published
def test_byte_level_bpe_by_roberta_whose_ids_are_in_another_order_than_its_merges(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = (SHARED / "vocab" / "roberta" / "vocab.json").read_text(encoding="utf-8")
    write(tmp_path, vocab_json=vocab, merges_txt=(SHARED / "gpt2_vocab" / "merges.txt").read_text(encoding="utf-8"))
    theirs = tokenizers.ByteLevelBPETokenizer(f"{tmp_path}/vocab.json", f"{tmp_path}/merges.txt")
    ours = assert_equal(tmp_path, reference(theirs.to_str()))
    assert (ours.cls, ours.pad, ours.sep, ours.double_sep, ours.add_bos) == (0, 1, 2, True, False)


@published
@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece_by_bert(lowercase, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = SHARED / "vocab" / "bert" / "vocab.txt"
    theirs = tokenizers.BertWordPieceTokenizer(str(vocab), lowercase=lowercase)
    write(tmp_path, vocab_txt=vocab.read_text(encoding="utf-8"), tokenizer_config_json={"do_lower_case": lowercase})
    ours = assert_equal(tmp_path, reference(theirs.to_str()), round_trip=False)
    assert (ours.pad, ours.cls, ours.sep, ours.double_sep) == (0, 101, 102, False)


@published
@pytest.mark.parametrize("name, specials", [("llama2", (1, 2, None, True)), ("deberta_v3", (None, None, 0, False))])
def test_sentencepiece_models(name, specials):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = next((SHARED / "vocab" / name).glob("*.model"))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ours = assert_equal(path.parent, theirs.encode, round_trip=False)
    assert (ours.bos, ours.eos, ours.pad, ours.add_bos) == specials


# Small vocabularies by hand


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLIT = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
    {**BYTE_LEVEL, "use_regex": False}]}


def byte_spec(pre_tokenizer=None, **parts):
    """A byte-level tokenizer.json with the bytes at 0 to 255 and a few merges, which tell where words are cut."""
    merges = ["h e", "Ġ he", "1 2", "Ġ 12", "Ġ Ġ", "Ċ Ċ", "ĠĠ 12", "' s"]
    joined = [merge.replace(" ", "") for merge in reversed(merges)]  # ids in another order than merges, as RoBERTa's
    vocab = {token: i for i, token in enumerate([*byte_alphabet(), *joined])}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return {"model": model, "pre_tokenizer": pre_tokenizer or BYTE_LEVEL, **parts}


@pytest.mark.parametrize("pre_tokenizer", [BYTE_LEVEL, DIGITS, SPLIT])
def test_each_way_to_cut_text_before_bpe(pre_tokenizer, tmp_path):
    spec = byte_spec(pre_tokenizer)
    assert_equal(write(tmp_path, tokenizer_json=spec), reference(spec))


def test_control_tokens_have_the_folders_ids_and_a_text_that_spells_one_is_text(tmp_path):
    spec = byte_spec(added_tokens=[{"id": 300, "content": "<|im_end|>"}])
    config = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<new>",
              "added_tokens_decoder": {"301": {"content": "<new>"}}}
    ours = Tokenizer(write(tmp_path, tokenizer_json=spec, tokenizer_config_json=config))
    assert (ours.eos, ours.pad) == (300, 301) and 300 not in ours.encode("<|im_end|>")
    assert ours.decode(ours.encode("<|im_end|>")) == "<|im_end|>"


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("token, spelled", [("<e1>", "<e1>"), ("Covid", "COVID"), ("lamp", "lamp"), ("  ", "  ")])
def test_a_text_with_an_added_token_is_refused_and_others_have_their_ids(kind, token, spelled, tmp_path):
    spec = wordpiece_spec() if kind == "wordpiece" else byte_spec()
    vocab = spec["model"]["vocab"]
    added = [{**ADDED, "id": vocab.get(token, len(vocab)), "content": token, "normalized": True}]
    ours, theirs = Tokenizer(write(tmp_path, tokenizer_json={**spec, "added_tokens": added})), reference(spec, added)
    for text in ("The lamps", f"a {spelled} b", f"a{token}b"):
        if added[0]["id"] in theirs(text):
            with pytest.raises(ValueError, match="is an added token, which is not supported; replace it in"):
                ours.encode(text)
        else:
            assert ours.encode(text) == theirs(text)


@published
def test_added_tokens_of_a_folder_without_tokenizer_json_are_refused_in_texts_unless_they_are_special(tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "spm.model").write_bytes((SHARED / "vocab" / "deberta_v3" / "spm.model").read_bytes())
    special = {"mask_token": "[MASK]", "additional_special_tokens": ["<s1>", {"content": "<s2>"}]}
    ours = Tokenizer(write(tmp_path, added_tokens_json={"[MASK]": 10 ** 6, "<s1>": 1, "<s2>": 2, "<e1>": 3},
                           special_tokens_map_json=special, tokenizer_config_json={"mask_token": None}))
    assert ours.encode("[MASK] <s1> <s2> \ud83d")
    with pytest.raises(ValueError, match="'<e1>' is an added token"):
        ours.encode("a <e1>b")


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
            "special_tokens": {"<s>": {"ids": [300]}}}


@pytest.mark.parametrize("post_processor, config, expected", [
    (None, {}, False), (TEMPLATE, {}, True), (TEMPLATE, {"add_bos_token": False}, False),
    (None, {"tokenizer_class": "LlamaTokenizerFast"}, True)])
def test_bos_is_added_only_where_the_folder_says_so(post_processor, config, expected, tmp_path):
    spec = byte_spec(added_tokens=[{"id": 300, "content": "<s>"}], post_processor=post_processor)
    assert Tokenizer(write(tmp_path, tokenizer_json=spec, tokenizer_config_json=config)).add_bos is expected


PIECES = "[PAD] [UNK] lamp lam ##p ##s ! 你 [CLS] [SEP] É ##t ##é Lamp e ##你".split()
VOCAB_TXT = "\n".join(PIECES)


def wordpiece_spec(**normalizer):
    """tokenizer.json as transformers 5 saves BERT's, beside which there is no vocab.txt."""
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
                  "lowercase": True, **normalizer}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": {piece: i for i, piece in enumerate(PIECES)}}
    return {"model": model, "normalizer": normalizer, "pre_tokenizer": {"type": "BertPreTokenizer"}}


@pytest.mark.parametrize("normalizer", [
    {}, {"handle_chinese_chars": False}, {"strip_accents": False}, {"lowercase": False, "strip_accents": True}])
def test_wordpiece_is_read_from_tokenizer_json_with_its_settings(normalizer, tmp_path):
    spec = wordpiece_spec(**normalizer)
    ours, theirs = Tokenizer(write(tmp_path, tokenizer_json=spec)), reference(spec)
    for text in [*TEXTS, "Lamps lamp你 Été été! e\u0301"]:
        assert ours.encode(text) == theirs(text), text
    assert (ours.pad, ours.cls, ours.sep) == (0, 8, 9)


@pytest.mark.parametrize("settings, text, ids", [
    ({"do_lower_case": False}, "Lamp", [13]), ({"strip_accents": False}, "é", [1]), ({}, "é", [14]),
    ({"tokenize_chinese_chars": False}, "lamp你", [2, 15]), ({}, "Lamps! lamp你 lampx", [2, 5, 6, 2, 7, 1])])
def test_wordpiece_takes_the_longest_piece_after_the_settings_of_tokenizer_config(settings, text, ids, tmp_path):
    folder = write(tmp_path, vocab_txt=VOCAB_TXT, tokenizer_config_json=settings)
    assert Tokenizer(folder).encode(text) == ids


def test_without_sentencepiece_the_way_out_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match="spm.model needs .*: pip install sentencepiece"):
        Tokenizer(write(tmp_path, spm_model="x"))



@pytest.mark.parametrize("files, words", [
    ({"vocab_txt": VOCAB_TXT, "tokenizer_config_json": {"word_tokenizer_type": "mecab"}}, 'tokenizer_type = "mecab"'),
    ({"tokenizer_json": wordpiece_spec(type="Lowercase")}, 'normalizer = "Lowercase"'),
    ({"tokenizer_json": {**byte_spec(), "model": {**byte_spec()["model"], "dropout": 0.1}}}, "dropout = 0.1"),
    ({"tokenizer_json": byte_spec({**BYTE_LEVEL, "add_prefix_space": True})}, "add_prefix_space = true"),
    ({"vocab_json": "{}", "merges_txt": "", "tokenizer_config_json": {"add_prefix_space": True}}, "prefix_space = tr"),
    ({"tokenizer_model": "x", "tokenizer_config_json": {"add_prefix_space": False}}, "add_prefix_space = false"),
    # what cannot be read at all
    ({}, "has no vocabulary that can be read"),
    ({"vocab_json": {"a": 0}, "merges_txt": "a b\n"}, "vocab.json is not byte-level BPE: a merge makes 'ab'"),
    ({"vocab_txt": "a\nb\n"}, r"vocab.txt has no \[UNK\]"),
    ({"tokenizer_json": byte_spec(normalizer={"type": "NFC"})}, "not supported: NFC"),
    ({"tokenizer_json": {"model": {"type": "BPE", "vocab": {"▁": 0}, "merges": []}}}, "beside .* type BPE put the"),
    pytest.param({"spm_model": "x"}, "spm.model is not a sentencepiece model", marks=pytest.mark.skipif(
        importlib.util.find_spec("sentencepiece") is None, reason="needs sentencepiece")),
])
def test_what_cannot_be_read_or_would_give_other_ids_is_refused_by_name(files, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        Tokenizer(write(tmp_path, **files))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


# Vocabulary and weights


def test_a_padding_token_without_a_row_becomes_0(tmp_path):
    folder = write(tmp_path, vocab_txt=VOCAB_TXT, added_tokens_json={"<new>": 16})
    for pad, expected in (("[SEP]", 9), ("<new>", 0), ("<no>", 0)):
        ours = Tokenizer(write(folder, tokenizer_config_json={"pad_token": pad}))
        ours.check(16, is_encoder=True)
        assert ours.pad == expected


@pytest.mark.parametrize("files, n_rows, is_encoder, words", [
    ({"vocab_txt": VOCAB_TXT}, 15, True, "ids up to 15, and the model's embedding 15 rows"),
    ({"tokenizer_json": byte_spec(added_tokens=[{"id": 300, "content": "<s>"}])}, 300, False, "ids up to 300"),
    ({"tokenizer_json": byte_spec()}, 300, True, r"not have \[CLS\] and \[SEP\]"),
    ({"vocab_txt": VOCAB_TXT}, 16, False, "not have a beginning or end of text"),
])
def test_a_vocabulary_that_the_model_cannot_take_is_refused(files, n_rows, is_encoder, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Tokenizer(write(tmp_path, **files)).check(n_rows, is_encoder)
