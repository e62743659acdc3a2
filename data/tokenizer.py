"""Text to token ids and back, from the files of a model's folder; nothing is fetched.

    tokenizer = Tokenizer(folder); ids = tokenizer.encode("some text"); tokenizer.decode(ids)

A folder is read from the first of these that it holds:
    vocab.txt                      WordPiece (BERT, MiniLM), by the class below
    tokenizer.json                 WordPiece, or byte-level BPE by tiktoken (GPT-2, RoBERTa, LLaMA-3, SmolLM2)
    vocab.json and merges.txt      byte-level BPE by tiktoken (GPT-2, RoBERTa, DeBERTa)
    tokenizer.model or spm.model   LLaMA-1 and -2, DeBERTa-v2 and -v3 by sentencepiece

Ids are those of the field's `tokenizers`, except for characters that are younger than one of the two Unicode tables
and for rare tokens that the merges alone do not reach. Text that spells a special token ("[SEP]") stays text, on
purpose: control tokens come from the program alone. A text with another added token ("<e1>") is refused, and so is a
setting that changes the ids and is not known here.
"""
import json
import re
import string
import unicodedata
from functools import lru_cache
from pathlib import Path

import tiktoken

from data.jsonl import read_json

# The usual names of the special tokens, unless the folder says otherwise. The order matters: RoBERTa's vocabulary also
# has GPT-2's <|endoftext|>, which means nothing there.
SPECIAL = {
    "bos": ("<|begin_of_text|>", "<s>", "<|endoftext|>"),
    "eos": ("<|end_of_text|>", "</s>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
}

# Settings that change the ids, with the only values of them that are supported.
CONFIG = {"word_tokenizer_type": ("basic",), "subword_tokenizer_type": ("wordpiece",), "do_basic_tokenize": (True,),
          "never_split": ([],), "clean_text": (True,), "split_by_punct": (False,), "sp_model_kwargs": ({},)}
SENTENCEPIECE = {"do_lower_case": (False,), "add_prefix_space": (True,)}
BYTE_LEVEL = {"dropout": (None, 0), "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, ""),
              "byte_fallback": (False,), "add_prefix_space": (False,)}
WORDPIECE = {"unk_token": ("[UNK]",), "continuing_subword_prefix": ("##",), "max_input_chars_per_word": (100,),
             "clean_text": (True,), "normalizer": ("BertNormalizer",), "pre_tokenizer": ("BertPreTokenizer",)}


class Tokenizer:
    """bos, eos, pad, cls, sep: ids, or None where the vocabulary has no such token.

    add_bos: whether the model expects bos before a text. double_sep: whether two separators stand between a pair of
    texts, as in RoBERTa. ValueError names the folder or file that cannot be read.
    """

    def __init__(self, folder):
        self.folder = folder = Path(folder)
        spec = json_if_there(folder / "tokenizer.json")
        settings = {}
        for file in ("special_tokens_map.json", "tokenizer_config.json"):
            for name, value in json_if_there(folder / file).items():
                if value is not None:  # a token is a text, or a dict with it
                    settings[name] = value.get("content", value) if isinstance(value, dict) else value
        require(CONFIG, settings, folder / "tokenizer_config.json")
        self.vocabulary = read_vocabulary(folder, spec, settings)
        ids = json_if_there(folder / "added_tokens.json")  # which does not say what is special
        added = [{**token, "id": int(i)} for i, token in settings.get("added_tokens_decoder", {}).items()]
        added += spec.get("added_tokens", [])
        ids.update((token["content"], token["id"]) for token in added)
        special = [token for token in added if token.get("special")] + settings.get("additional_special_tokens", [])
        special += [settings.get(f"{role}_token", "") for role in (*SPECIAL, "unk", "mask")]
        words = sorted(ids.keys() - {token["content"] if isinstance(token, dict) else token for token in special})
        ignore_case = re.IGNORECASE if getattr(self.vocabulary, "lower", False) else 0
        self.added_words = re.compile("|".join(map(re.escape, words)), ignore_case) if words else None
        ids.update(self.vocabulary.ids)
        for name, usual in SPECIAL.items():
            names = [settings[f"{name}_token"]] if f"{name}_token" in settings else usual
            setattr(self, name, next((ids[token] for token in names if token in ids), None))
        self.double_sep = self.cls is not None and self.cls == ids.get("<s>")
        self.add_bos = self.bos is not None and adds_bos(folder, spec, settings, self.bos)

    def check(self, n_rows, is_encoder):
        """ValueError unless a model whose embedding has n_rows rows can take all ids. A padding token without a row
        becomes 0: padding is masked, so any row will do."""
        largest = max([*self.vocabulary.ids.values(), *(i for i in (self.bos, self.eos, self.cls, self.sep) if i)])
        if largest >= n_rows:
            raise ValueError(f"{self.folder}: the vocabulary has ids up to {largest:,}, and the model's embedding "
                             f"{n_rows:,} rows: they do not belong together")
        if None in (self.cls, self.sep) if is_encoder else self.bos is self.eos is None:
            missing = "[CLS] and [SEP], which an encoder" if is_encoder else "a beginning or end of text, which a GPT"
            raise ValueError(f"{self.folder}: the vocabulary does not have {missing} reads")
        if self.pad is None or self.pad >= n_rows:
            self.pad = 0

    def encode(self, text):
        """List of ids, without special tokens. ValueError for a text with an added token that is not special."""
        found = self.added_words and self.added_words.search(text)
        if found:
            raise ValueError(f"{self.folder}: {found[0]!r} is an added token, which is not supported; replace it in "
                             f"the texts, as in {text[max(0, found.start() - 30):found.end() + 30]!r}")
        return self.vocabulary.encode(text)

    def decode(self, ids):
        """Text of the ids. Special tokens, and ids beyond the vocabulary, may be left out."""
        return self.vocabulary.decode(list(map(int, ids)))


def read_vocabulary(folder, spec, settings):
    where, model = folder / "tokenizer.json", spec.get("model") or {}
    kind = model.get("type", "BPE" if "merges" in model else None)
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        ids = {token.rstrip("\r"): i for i, token in enumerate(lines) if token}
        return WordPiece(ids, wordpiece_settings(spec, settings, where), folder / "vocab.txt")
    if kind == "WordPiece":
        return WordPiece(model["vocab"], wordpiece_settings(spec, settings, where), where)
    if kind == "BPE" and "▁" not in model["vocab"]:  # else LLaMA-1 or -2, whose tokenizer.model is read below
        require(BYTE_LEVEL, {**model, **settings}, where)
        return BPE(model["vocab"], model["merges"], byte_level_pattern(spec, where), where)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line.strip() and not line.startswith("#version")]
        require(BYTE_LEVEL, settings, folder / "tokenizer_config.json")
        return BPE(json_if_there(folder / "vocab.json"), merges, GPT2_PATTERN, folder / "vocab.json")
    for path in (folder / "tokenizer.model", folder / "spm.model"):
        if path.is_file():
            require(SENTENCEPIECE, settings, folder / "tokenizer_config.json")
            return SentencePiece(path)
    beside = f"; beside a tokenizer.json of type {kind} put the model's tokenizer.model or spm.model, from the Hub"
    raise ValueError(f"{folder} has no vocabulary that can be read: vocab.txt, tokenizer.json, vocab.json with "
                     f"merges.txt, tokenizer.model or spm.model{beside if model else ''}")


def json_if_there(path):
    """The dict in a JSON file, {} where there is no such file."""
    return read_json(path) if path.is_file() else {}


def require(allowed, settings, where):
    """ValueError unless each of the `allowed` settings that is set has one of its allowed values."""
    for name, values in allowed.items():
        if name in settings and settings[name] not in values:
            value = json.dumps(settings[name])[:60]
            raise ValueError(f"{where}: {name} = {value} is not supported, and gives other ids")


def adds_bos(folder, spec, settings, bos):
    """Whether the model expects bos before a text. The first that says so decides: tokenizer_config.json, LLaMA's own
    class (which always adds it), tokenizer.json's template, a LLaMA's tokenizer.model that is all there is."""
    if "add_bos_token" in settings:
        return bool(settings["add_bos_token"])
    if str(settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
        return True
    for step in steps_of(spec.get("post_processor")):
        if step.get("single"):
            first = step["single"][0].get("SpecialToken", {}).get("id")
            return step.get("special_tokens", {}).get(first, {}).get("ids") == [bos]
    return not spec and (folder / "tokenizer.model").is_file()


def steps_of(part):
    """The steps of a tokenizer.json's normalizer, pre_tokenizer or post_processor, each a dict."""
    if not part:
        return []
    return next((part[steps] for steps in ("normalizers", "pretokenizers", "processors") if steps in part), [part])


# ---- The kinds of vocabulary -----------------------------------------------------------------------------------------

# A word is a contraction's end, or letters, digits or other signs with one space before them. White space is a word of
# its own, but \s+(?!\S) leaves its last character to the word behind it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# SmolLM2 cuts out every digit and applies GPT-2's pattern to what lies between. As one pattern: digits stand alone,
# without the space before them; spaces before a digit stay together, where \s+(?!\S) would leave one over.
DIGITS_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


class BPE:
    """Byte-level byte-pair encoding by tiktoken: text is cut into words by `pattern`, then neighbours are joined.

    subtle: tiktoken joins the neighbours whose sum has the lowest rank, and knows no other order. So the rank of a
    piece is the place of its merge, whatever its id (RoBERTa's ids go by frequency), and ids are looked up afterwards.
    """

    def __init__(self, vocab, merges, pattern, where):
        self.ids, alphabet = vocab, byte_alphabet()
        # {piece: id, or None}: the 256 bytes, of which SmolLM2 lacks some, then what merges make, in their order
        pieces = {bytes([byte]): vocab.get(character) for character, byte in alphabet.items()}
        for merge in merges:
            token = merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
            if token not in vocab or not alphabet.keys() >= set(token):
                raise ValueError(f"{where} is not byte-level BPE: a merge makes {token!r}, which is no token")
            pieces.setdefault(bytes(alphabet[character] for character in token), vocab[token])
        self.id_of_rank = list(pieces.values())
        self.bytes_of_id = {i: piece for piece, i in pieces.items()}
        self.encoding = tiktoken.Encoding("folder", pat_str=pattern, special_tokens={},
                                          mergeable_ranks={piece: rank for rank, piece in enumerate(pieces)})

    def encode(self, text):
        ids = [self.id_of_rank[rank] for rank in self.encoding.encode_ordinary(text)]
        return [i for i in ids if i is not None]

    def decode(self, ids):
        return b"".join(self.bytes_of_id.get(i, b"") for i in ids).decode("utf-8", "replace")


def byte_alphabet():
    """{character: byte}. GPT-2's files write each byte as a printable character; the others are shifted past 255."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {**{chr(byte): byte for byte in plain}, **{chr(256 + i): byte for i, byte in enumerate(shifted)}}


def byte_level_pattern(spec, where):
    """What cuts text into words by a byte-level tokenizer.json."""
    *first, last = steps_of(spec.get("pre_tokenizer")) or [{}]
    require(BYTE_LEVEL, last, where)
    types = [str(step.get("type")) for step in [*steps_of(spec.get("normalizer")), *first, last]]
    regex = last.get("use_regex", True)
    if types == ["ByteLevel"] and regex:
        return GPT2_PATTERN
    if types == ["Digits", "ByteLevel"] and first[0].get("individual_digits"):
        return DIGITS_PATTERN
    if types == ["Split", "ByteLevel"] and not regex and "Regex" in first[0]["pattern"]:
        if first[0]["behavior"] == "Isolated" and not first[0].get("invert"):
            return first[0]["pattern"]["Regex"]
    raise ValueError(f"{where}: this normalizer and pre_tokenizer are not supported: {' + '.join(types)}")


class SentencePiece:
    """A sentencepiece model file, by the package that these models were trained with."""

    def __init__(self, path):
        try:
            import sentencepiece
            self.model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except ImportError:
            raise ValueError(f"{path} needs a package that is not installed: pip install sentencepiece") from None
        except RuntimeError:
            raise ValueError(f"{path} is not a sentencepiece model, or is damaged") from None
        self.ids = {self.model.id_to_piece(i): i for i in range(self.model.vocab_size())}

    def encode(self, text):
        return self.model.encode(text.encode("utf-8", "replace").decode())  # half an emoji, which JSON may hold, is "?"

    def decode(self, ids):
        return self.model.decode([i for i in ids if i < len(self.ids)])


def wordpiece_settings(spec, settings, where):
    """The settings of tokenizer_config.json, completed by tokenizer.json's where there is one."""
    if not spec:
        return settings
    normalizer, cut = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    types = {"normalizer": normalizer.get("type"), "pre_tokenizer": cut.get("type")}
    require(WORDPIECE, {**(spec.get("model") or {}), **normalizer, **types}, where)
    names = {"lowercase": "do_lower_case", "handle_chinese_chars": "tokenize_chinese_chars"}
    return {**{names.get(name, name): value for name, value in normalizer.items() if value is not None}, **settings}


class WordPiece:
    """BERT's: clean the text, drop accents, lower-case, cut it at spaces and punctuation. Then take from each word the
    longest piece that the vocabulary has, again and again; "##" marks a piece that is not the first."""

    def __init__(self, ids, settings, where):
        if "[UNK]" not in ids:
            raise ValueError(f"{where} has no [UNK], the token for words that it cannot spell")
        self.ids = ids
        self.lower = settings.get("do_lower_case", True)
        self.strip_accents = settings.get("strip_accents", self.lower)
        self.chinese = settings.get("tokenize_chinese_chars", True)
        self.pieces = lru_cache(maxsize=200_000)(self.split_word)

    def encode(self, text):
        return [i for word in self.words(text) for i in self.pieces(word)]

    def words(self, text):
        text = "".join(cleaned(c, self.chinese) for c in text)
        if self.strip_accents:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        if self.lower:
            text = "".join(c.lower() for c in text)  # one by one, since str.lower knows a final sigma
        return "".join(f" {c} " if is_punctuation(c) else c for c in text).split()

    def split_word(self, word):
        if len(word) > 100:  # BERT's own limit
            return [self.ids["[UNK]"]]
        ids, start, end = [], 0, len(word)
        while start < end:
            piece = ("##" if start else "") + word[start:end]
            if piece in self.ids:
                ids.append(self.ids[piece])
                start, end = end, len(word)
            else:
                end -= 1
        return ids if start == len(word) else [self.ids["[UNK]"]]


@lru_cache(maxsize=100_000)
def cleaned(character, chinese):
    """A space for white space, nothing for control characters. With chinese, such characters are words of their own."""
    if character in "\t\n\r":
        return " "
    if character == "\ufffd" or unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    if chinese and unicodedata.name(character, "").startswith(("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")):
        return f" {character} "
    return " " if character.isspace() else character


@lru_cache(maxsize=100_000)
def is_punctuation(character):
    """All of ASCII's symbols count, $ and ^ among them."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")
