"""Text to token ids and back, from a model folder's own files; nothing is fetched.

    tokenizer = Tokenizer(folder); ids = tokenizer.encode("some text"); tokenizer.decode(ids)

Byte-level BPE (GPT-2, RoBERTa, DeBERTa, LLaMA-3, SmolLM2) runs in tiktoken, on ranks built from merges.txt, tokenizer.json or Meta's
own tokenizer.model; WordPiece (BERT, MiniLM), from vocab.txt or tokenizer.json, is here; what came from sentencepiece (LLaMA-1 and -2,
TinyLlama, DeBERTa-v2 and -v3) is in spm.py. All give what the field's `tokenizers` gives without special tokens, with one difference
on purpose: text that spells a special token ("[SEP]", "<|endoftext|>") is text. Control tokens come from the program, never from
a headline that happens to contain them. Lone surrogates, which no UTF-8 text can hold, become U+FFFD.
A folder with more than one form is read from vocab.txt, else tokenizer.json, else vocab.json and merges.txt, else the .model file.
Left out: finding tokens that someone added to a published vocabulary, which are spelt by the others; Unigram from tokenizer.json
(DeBERTa-v3 needs its spm.model), and .model files of other families, whose ids are shifted.
"""
import base64
import json
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

import tiktoken

from data.spm import MetaspaceBPE, SentencePiece, join_pairs, whole_characters


class Tokenizer:
    """encode, decode, vocab_size; bos, eos, pad, cls, sep: ids or None; add_bos: whether the model expects bos before a text;
    double_sep: whether two separators stand between a pair of texts, as RoBERTa has it.

    ValueError naming the folder, or the file, when it holds no vocabulary that can be read.
    """

    def __init__(self, folder):
        folder = Path(folder)
        spec, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
        self.model = read_model(folder, spec, settings)
        self.vocab_size = len(self.model.ids)
        # In this order, since RoBERTa's vocabulary also has GPT-2's <|endoftext|>, which means nothing there.
        names = {"bos": ["<|begin_of_text|>", "<s>", "<|endoftext|>"], "eos": ["<|end_of_text|>", "</s>", "<|endoftext|>"],
                 "pad": ["[PAD]", "<pad>"], "cls": ["[CLS]", "<s>"], "sep": ["[SEP]", "</s>"]}
        for source in (read_json(folder / "special_tokens_map.json"), settings):
            for name in names:
                token = source.get(f"{name}_token")
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    names[name] = [token]
        for name, tokens in names.items():
            setattr(self, name, next((self.model.ids[token] for token in tokens if token in self.model.ids), None))
        self.double_sep = self.cls is not None and self.cls == self.model.ids.get("<s>")
        self.add_bos = self.bos is not None and adds_bos(folder, spec, settings, self.bos)

    def encode(self, text):
        """list of ids of a str, without special tokens."""
        return self.model.encode(text)

    def decode(self, ids):
        """str of a sequence of ids; ValueError for an id that the vocabulary does not have."""
        ids = list(map(int, ids))
        unknown = [i for i in ids if i not in self.model.tokens]
        if unknown:
            raise ValueError(f"token id {unknown[0]} is not in the vocabulary of {self.vocab_size}")
        return self.model.decode(ids)


def read_model(folder, spec, settings):
    """The folder's vocabulary, from the first of its files that holds one."""
    where, model = folder / "tokenizer.json", spec.get("model") or {}
    added = read_json(folder / "added_tokens.json")
    added.update({token["content"]: int(i) for i, token in settings.get("added_tokens_decoder", {}).items()})
    if (folder / "vocab.txt").is_file():
        return WordPiece({**added, **read_vocab(folder / "vocab.txt")}, settings, folder / "vocab.txt")
    if "merges" in model and "▁" in model["vocab"]:
        return MetaspaceBPE(spec, where)
    own = {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
    if "merges" in model:
        return ByteBPE(model["vocab"], model["merges"], pattern_of(spec, folder), own, prefix_space(spec), where,
                       bool(model.get("ignore_merges")))
    if model.get("type") == "WordPiece":
        return WordPiece({**own, **model["vocab"]}, wordpiece_settings(spec, where), where)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab, merges = read_json(folder / "vocab.json"), read_merges(folder / "merges.txt")
        if len(vocab) > 1.01 * len(merges) + 256 + 16:
            raise ValueError(f"{folder / 'merges.txt'} has {len(merges)} merges for the {len(vocab)} tokens of vocab.json: it is cut short")
        return ByteBPE(vocab, merges, GPT2_PATTERN, added, bool(settings.get("add_prefix_space")), folder / "merges.txt")
    for name in ("tokenizer.model", "spm.model", "original/tokenizer.model"):
        if (folder / name).is_file():
            return read_dot_model(folder / name, settings, added)
    if model:
        raise ValueError(f"{where} holds a {model.get('type')} vocabulary, which is read from the sentencepiece file that it was made from: "
                         f"put spm.model beside it")
    found = [path.name for path in folder.glob("*.model")]
    raise ValueError(f"{folder} has no vocabulary: vocab.txt, tokenizer.json, vocab.json with merges.txt, tokenizer.model or spm.model"
                     f"{f' ({found[0]} is of a kind that is not supported)' if found else ''}")


def read_dot_model(path, settings, added):
    """LLaMA-3's ranks, a text file, or a sentencepiece model; DeBERTa has one id more than its spm.model."""
    with path.open("rb") as lines:
        if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", lines.readline(1000)):
            return read_llama3(path)
    model = SentencePiece(path, added)
    if path.name == "spm.model":
        if settings.get("do_lower_case") or settings.get("split_by_punct"):
            raise ValueError(f"{path.parent / 'tokenizer_config.json'}: do_lower_case and split_by_punct are not supported with spm.model")
        mask = model.ids.setdefault("[MASK]", model.model.vocab_size())
        model.tokens.setdefault(mask, "[MASK]")
    return model


def read_json(path):
    """The dict in a JSON file, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return content


def read_merges(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line.strip() and not line.startswith("#version")]
    for merge in merges:
        if len(merge.split()) != 2:
            raise ValueError(f"{path}: {merge!r} should be two tokens with a space between")
    return merges


def adds_bos(folder, spec, settings, bos):
    """Some LLaMA-3 folders say it in the tokenizer's template, others in tokenizer_config.json; LLaMA's own class always does, and
    a tokenizer.model alone says nothing."""
    if settings.get("add_bos_token") is not None:
        return bool(settings["add_bos_token"])
    if str(settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
        return True
    post = spec.get("post_processor") or {}
    for part in post.get("processors", [post]):
        for piece in part.get("single", [])[:1]:
            ids = part.get("special_tokens", {}).get(piece.get("SpecialToken", {}).get("id"), {}).get("ids")
            return ids == [bos]
    return not spec and ((folder / "tokenizer.model").is_file() or (folder / "original" / "tokenizer.model").is_file())


# ---------------------------------------------------------------------------------------------------------------------
# Byte-level BPE

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# SmolLM2 cuts out every digit before it applies GPT-2's pattern to what lies between. In one pattern: digits stand alone, without
# the space before them; and since a piece ends at a digit, a run of spaces there is whole, where \s+(?!\S) would leave one over.
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
                  r"|\s+(?!\S)|\s+")
LLAMA3_RANKS = 128_000
LLAMA3_NAMES = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
                "reserved_special_token_2", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]


def read_llama3(path):
    """Meta's tokenizer.model, lines of a token in base64 and its rank; 256 control tokens, which the file does not name, follow."""
    letter = {byte: character for character, byte in byte_alphabet().items()}
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        vocab = {"".join(letter[byte] for byte in base64.b64decode(token, validate=True)): int(rank) for token, rank in lines}
    except ValueError:
        raise ValueError(f"{path} is damaged: its lines should be a token in base64 and a rank") from None
    if sorted(vocab.values()) != list(range(LLAMA3_RANKS)):
        raise ValueError(f"{path} holds {len(vocab)} ranks; only LLaMA-3's, 0 to {LLAMA3_RANKS - 1}, are known: "
                         f"it is another model's or cut short")
    names = LLAMA3_NAMES + [f"reserved_special_token_{i}" for i in range(3, 3 + 256 - len(LLAMA3_NAMES))]
    control = {f"<|{name}|>": LLAMA3_RANKS + i for i, name in enumerate(names)}
    joined = sorted((token for token in vocab if len(token) > 1), key=vocab.get)
    return ByteBPE(vocab, joined, LLAMA3_PATTERN, control, False, path, True)


def pattern_of(spec, folder):
    """The regular expression that a tokenizer.json's pre_tokenizer amounts to; ValueError for kinds that are not byte-level BPE's."""
    pre = spec.get("pre_tokenizer") or {}
    steps = [{k: v for k, v in step.items() if k not in ("add_prefix_space", "trim_offsets")} for step in pre.get("pretokenizers", [pre])]
    byte_level = {"type": "ByteLevel", "use_regex": True}
    steps = [{"use_regex": True, **step} if step.get("type") == "ByteLevel" else step for step in steps]
    if spec.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []}):
        raise ValueError(f"{folder / 'tokenizer.json'}: a normalizer ({spec['normalizer'].get('type')}) is not supported for byte-level BPE")
    if steps == [byte_level]:
        return GPT2_PATTERN
    if steps == [{"type": "Digits", "individual_digits": True}, byte_level]:
        return DIGITS_PATTERN
    if len(steps) == 2 and steps[0].get("type") == "Split" and steps[1] == {**byte_level, "use_regex": False}:
        split = steps[0]
        if "Regex" in split.get("pattern", {}) and split.get("behavior") == "Isolated" and not split.get("invert"):
            return split["pattern"]["Regex"]
    raise ValueError(f"{folder / 'tokenizer.json'}: pre_tokenizer {' + '.join(str(step.get('type')) for step in steps)} is not supported; "
                     f"known are ByteLevel, Digits + ByteLevel, and Split by a regular expression + ByteLevel")


def prefix_space(spec):
    pre = spec.get("pre_tokenizer") or {}
    return any(step.get("type") == "ByteLevel" and step.get("add_prefix_space") for step in pre.get("pretokenizers", [pre]))


def byte_alphabet():
    """{printable character: byte}: GPT-2's vocabulary files write bytes so; those without a printable form are shifted past 255."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + i): byte for i, byte in enumerate(shifted)}}


class ByteBPE:
    """BPE over bytes. tiktoken joins the pair of lowest rank, so it is given ranks in the order of the merges; ids may be in any
    other order (RoBERTa's are by frequency).

    subtle: tiktoken takes a piece of text that is a token as a whole for that token, and joins any pair whose sum is one. LLaMA-3
    means it so (ignore_merges, here `whole`). Elsewhere only the merges in the list count, and a few tokens may not come out of their
    own bytes by them; those are taken apart again. That is exact on trained vocabularies; a list of merges made up at random can differ.
    """

    def __init__(self, vocab, merges, pattern, added, prefix, where, whole=False):
        alphabet = byte_alphabet()
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        self.prefix, self.whole = prefix, whole
        self.ids = {**vocab, **added}
        order = dict.fromkeys([*alphabet, *map("".join, pairs)])
        missing = [token for token in map("".join, pairs) if token not in vocab]
        missing += [token for pair in pairs for token in pair if token not in order]
        if missing:
            raise ValueError(f"{where}: the vocabulary lacks {missing[0]!r}, which its merges use")
        if any(character not in alphabet for token in order for character in token):
            raise ValueError(f"{where}: the vocabulary is not byte-level BPE (a merge holds a character outside its alphabet)")
        spelled = {token: bytes(alphabet[character] for character in token) for token in order}
        self.id_of_rank = [vocab.get(token) for token in order]  # SmolLM2 lacks some bytes; the reference drops them
        self.bpe = tiktoken.Encoding("folder", pat_str=pattern, special_tokens={},
                                     mergeable_ranks={spelled[token]: rank for rank, token in enumerate(order)})
        self.tokens = {i: spelled.get(token, token.encode()) for token, i in self.ids.items()}
        if not whole:
            self.rank = {token: rank for rank, token in enumerate(order)}
            self.order = list(order)
            self.merges = {(self.rank[left], self.rank[right]): (i, self.rank[left + right]) for i, (left, right) in enumerate(pairs)}
            self.parts = lru_cache(maxsize=None)(self.rejoined)

    def rejoined(self, rank):
        return join_pairs([self.rank[character] for character in self.order[rank]], self.merges)

    def encode(self, text):
        text = " " + text if self.prefix and text and not text.startswith(" ") else text
        ranks = self.bpe.encode_ordinary(text)
        if not self.whole:
            ranks = [part for rank in ranks for part in self.parts(rank)]
        return [i for i in map(self.id_of_rank.__getitem__, ranks) if i is not None]

    def decode(self, ids):
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", "replace")


# ---------------------------------------------------------------------------------------------------------------------
# WordPiece

# The reference knows marks, punctuation and format characters as of Unicode 8 and takes younger ones for letters, whatever the
# tables of the Python at hand say. These are the younger ones, up to Unicode 18, found by comparing every code point.
YOUNGER = """5c8-5c9 61d 7fd 890-891 897-89f 8ca-8e2 9fd-9fe a76 afa-aff b53-b55 c04 c3c c77 c84 d00 d3b-d3c d81 eba ece 180f 1885-1886
1abf-1af0 1b4e-1b4f 1b7d-1b7f 1df6-1dfb 2e43-2e4f 2e52-2e5d 2e60-2e63 a82c a8c5 a8ff a9bd 10d24-10d27 10d69-10d6e 10eab-10ead
10ecb-10ed0 10ef0-10eff 10f46-10f50 10f55-10f59 10f82-10f89 11070 11073-11074 110c2 110cd 111c9 111cf 1123e 11241 1133b 113bb-113c0
113ce 113d0 113d2 113d4-113d5 113d7-113d8 113e1-113e2 11438-1143f 11442-11444 11446 1144b-1144f 1145a-1145b 1145d-1145e 11660-1166c
116b9 1182f-11837 11839-1183b 1193b-1193c 1193e 11943-11946 119d4-119d7 119da-119db 119e0 119e2 11a01-11a0a 11a33-11a38 11a3b-11a47
11a51-11a56 11a59-11a5b 11a8a-11a96 11a98-11a9c 11a9e-11aa2 11b00-11b09 11b60 11b62-11b64 11b66 11be1 11c30-11c36 11c38-11c3d 11c3f
11c41-11c45 11c70-11c71 11c92-11ca7 11caa-11cb0 11cb2-11cb3 11cb5-11cb6 11d31-11d36 11d3a 11d3c-11d3d 11d3f-11d45 11d47 11d90-11d91
11d95 11d97 11df0 11ef3-11ef4 11ef7-11ef8 11f00-11f01 11f36-11f3a 11f40 11f42-11f4f 11f5a 11fff 12ff1-12ff2 13430-13440 13447-13455
1611e-16129 1612d-1612f 16d6d-16d6f 16e97-16e9a 16f4f 16fe2 16fe4 1cf00-1cf2d 1cf30-1cf46 1d127-1d128 1d25b-1d25c 1e000-1e006
1e008-1e018 1e01b-1e021 1e023-1e024 1e026-1e02a 1e08f 1e130-1e136 1e2ae 1e2ec-1e2ef 1e4ec-1e4ef 1e5ee-1e5ef 1e5ff 1e6e3 1e6e6
1e6ee-1e6ef 1e6f5 1e944-1e94a 1e95e-1e95f"""
YOUNGER = {code for first, _, last in (item.partition("-") for item in YOUNGER.split()) for code in range(int(first, 16), int(last or first, 16) + 1)}
SPACES = {*range(0x9, 0xE), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000}
# Capitals younger than some Pythons' tables, with their small letters.
YOUNGER_CASE = {0x1C89: 0x1C8A, 0xA7CB: 0x264, 0xA7CC: 0xA7CD, 0xA7CE: 0xA7CF, 0xA7D2: 0xA7D3, 0xA7D4: 0xA7D5, 0xA7DA: 0xA7DB, 0xA7DC: 0x19B,
                **{c: c + 0x20 for c in range(0x10D50, 0x10D66)}, **{c: c + 0x1B for c in range(0x16EA0, 0x16EB9)}}
CHINESE = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B81F), (0x2B920, 0x2CEAF),
           (0x2F800, 0x2FA1F))  # the gap before 0x2B920 is the reference's


def category(character):
    if character == "\u1734":
        return "Mn"  # as it was in Unicode 8
    return "Lo" if ord(character) in YOUNGER else unicodedata.category(character)


@lru_cache(maxsize=100_000)
def cleaned(character):
    """What cleaning leaves of a character: nothing of controls, a plain space for spaces."""
    if character in "\t\n\r":
        return " "
    if character in "\0\ufffd" or category(character) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    return " " if ord(character) in SPACES else character


@lru_cache(maxsize=100_000)
def is_punctuation(character):
    """ASCII's symbols count, $ and ^ and the like; so do two that were punctuation in Unicode 8."""
    ascii_symbol = character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    return ascii_symbol or category(character).startswith("P") or character in "\u166d\U000111c9"


def is_chinese(character):
    return any(first <= ord(character) <= last for first, last in CHINESE)


def read_vocab(path):
    lines = path.read_text(encoding="utf-8").split("\n")
    return {token.rstrip("\r"): i for i, token in enumerate(lines) if token}


def wordpiece_settings(spec, where):
    """What tokenizer_config.json says of a WordPiece folder, out of tokenizer.json; ValueError where it is not BERT's way."""
    normalizer, pre, model = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}, spec["model"]
    if (normalizer.get("type"), pre.get("type"), normalizer.get("clean_text")) != ("BertNormalizer", "BertPreTokenizer", True):
        raise ValueError(f"{where}: WordPiece is supported with BertNormalizer, cleaning, and BertPreTokenizer only")
    if (model.get("continuing_subword_prefix", "##"), model.get("max_input_chars_per_word", 100)) != ("##", 100):
        raise ValueError(f"{where}: WordPiece is supported with '##' and words of up to 100 characters only")
    return {"do_lower_case": normalizer.get("lowercase", True), "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True), "unk_token": model.get("unk_token")}


class WordPiece:
    """BERT's: clean, put spaces around Chinese characters, drop accents, lower-case, cut at spaces and punctuation; then take from
    each word the longest piece that the vocabulary has, again and again ("##" marks a piece that is not the first)."""

    def __init__(self, vocab, settings, where):
        self.ids = dict(vocab)
        self.tokens = {i: token for token, i in self.ids.items()}
        unknown = settings.get("unk_token") or "[UNK]"
        unknown = unknown["content"] if isinstance(unknown, dict) else unknown
        if unknown not in self.ids:
            raise ValueError(f"{where} has no {unknown}, the token for words that it cannot spell")
        self.unknown = self.ids[unknown]
        self.lower = settings.get("do_lower_case", True)
        self.accents_off = self.lower if settings.get("strip_accents") is None else settings["strip_accents"]
        self.chinese = settings.get("tokenize_chinese_chars", True)
        self.longest = max(map(len, self.ids))
        self.word = lru_cache(maxsize=200_000)(self.pieces)

    def encode(self, text):
        return [i for word in self.words(text) for i in self.word(word)]

    def words(self, text):
        text = whole_characters(text)
        text = "".join(map(cleaned, text))
        if not text.isascii():
            if self.chinese:
                text = "".join(f" {c} " if is_chinese(c) else c for c in text)
            if self.accents_off:
                text = "".join(c for c in unicodedata.normalize("NFD", text) if category(c) != "Mn")
        if self.lower:  # a character at a time: no final sigma
            text = text.lower() if text.isascii() else "".join(c.lower() for c in text).translate(YOUNGER_CASE)
        words, current = [], []
        for c in text:
            if ord(c) in SPACES or is_punctuation(c):
                if current:
                    words.append("".join(current))
                    current = []
                if ord(c) not in SPACES:
                    words.append(c)
            else:
                current.append(c)
        return words + ["".join(current)] if current else words

    def pieces(self, word):
        if len(word) > 100:  # BERT's own limit
            return [self.unknown]
        ids, start = [], 0
        while start < len(word):
            for end in range(min(len(word), start + self.longest), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.ids:
                    break
            else:
                return [self.unknown]
            ids.append(self.ids[piece])
            start = end
        return ids

    def decode(self, ids):
        return " ".join(self.tokens[i] for i in ids).replace(" ##", "")
