"""SentencePiece's kinds of vocabulary: "▁" stands for a space, and a character without a piece becomes its bytes.

Two ways in, both without special tokens, both reading text that spells one ("</s>") as text:
- SentencePiece: tokenizer.model (LLaMA-1 and -2, TinyLlama) and spm.model (DeBERTa-v2 and -v3), by the `sentencepiece` package, which
  is imported here and only here. The ids are the package's own, which these models were trained on.
- MetaspaceBPE: the same BPE from tokenizer.json, with nothing installed, equal to what `tokenizers` makes of that file.
The field has more than one reading of these files, and the choice is sentencepiece's own, which the models were trained with. On real
LLaMA-like vocabularies the published tokenizer.json (Prepend, Replace) agrees with it on any text, " a" with its space in front kept
beside the one put there included. Not followed: transformers 5 where it builds the tokenizer from the .model itself, since it drops that
space, prefers pieces of several spaces, and leaves NFKC out of DeBERTa's; and DeBERTa's fast tokenizer of transformers 4, which differs
in invisible characters at the ends of a text and in ties. A tokenizer.json is always read as it stands.
"""
import heapq
import re
from functools import lru_cache
from itertools import groupby

BYTE = re.compile("<0x[0-9A-F]{2}>")


def whole_characters(text):
    """text with surrogate pairs joined; lone surrogates, which no UTF-8 text can hold, become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def join_pairs(ids, merges):
    """BPE: ids joined in pairs, lowest rank first and then from the left; merges is {(left, right): (rank, joined)}.

    A heap, since a text may be one long word. Entries are left in it when their pair has changed, and told by what they would make.
    """
    n = len(ids)
    ids, before, after = list(ids), list(range(-1, n - 1)), list(range(1, n + 1))
    heap = [(*merges[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in merges]
    heapq.heapify(heap)
    while heap:
        _, joined, i = heapq.heappop(heap)
        j = after[i]
        if ids[i] is None or j == n or merges.get((ids[i], ids[j]), (0, None))[1] != joined:
            continue
        ids[i], ids[j], after[i] = joined, None, after[j]
        if after[i] < n:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < n and (ids[left], ids[right]) in merges:
                heapq.heappush(heap, (*merges[ids[left], ids[right]], left))
    return [i for i in ids if i is not None]


def text_of(pieces, prefixed):
    """The text of pieces. Bytes that are not UTF-8 become one U+FFFD each; the space that encoding put in front is taken off."""
    parts = []
    for is_bytes, run in groupby(pieces, key=lambda piece: BYTE.fullmatch(piece) is not None):
        run = list(run)
        try:
            parts.append(bytes(int(piece[3:5], 16) for piece in run).decode() if is_bytes else "".join(run).replace("▁", " "))
        except UnicodeDecodeError:
            parts.append("\ufffd" * len(run))
    text = "".join(parts)
    return text.removeprefix(" ") if prefixed else text


class SentencePiece:
    """A sentencepiece model file, by the package. added is {token: id} of what the folder adds to it."""

    def __init__(self, path, added):
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(f"{path} can only be read by a package that is not installed: pip install sentencepiece") from None
        content = path.read_bytes()
        try:
            if not ends_whole(content):
                raise RuntimeError
            self.model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise ValueError(f"{path} is not a sentencepiece model, or is cut short or damaged") from None
        self.ids = {**{self.model.id_to_piece(i): i for i in range(self.model.vocab_size())}, **added}
        self.tokens = {i: piece for piece, i in self.ids.items()}
        self.prefixed = "".join(self.model.encode("a", out_type=str)).startswith("▁")

    def encode(self, text):
        return self.model.encode(whole_characters(text))

    def decode(self, ids):
        return text_of([self.tokens[i] for i in ids], self.prefixed)


def ends_whole(content):
    """Whether the file goes past its pieces. Cut between two of them it would load, with fewer pieces and without its normalizer."""
    fields, i = set(), 0
    while i < len(content):
        fields.add(content[i] >> 3)  # 1: a piece, 2: how it was trained, 3: the normalizer
        length, shift, i = 0, 0, i + 1
        while i < len(content) and content[i] > 127:
            length, shift, i = length | (content[i] & 127) << shift, shift + 7, i + 1
        i += 1 + (length | content[i] << shift) if i < len(content) else 1
    return i == len(content) and {1, 2, 3} <= fields


class MetaspaceBPE:
    """tokenizer.json's BPE over characters, of a text in which every space is "▁"."""

    def __init__(self, spec, where):
        model, added = spec["model"], {token["content"]: token["id"] for token in spec.get("added_tokens", [])}
        vocab = model["vocab"]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        missing = [token for left, right in pairs for token in (left, right, left + right) if token not in vocab]
        if missing:
            raise ValueError(f"{where}: the vocabulary lacks {missing[0]!r}, which its merges use")
        # No text joins into a control token, though its letters may be there to be joined ("</" and "s>").
        self.merges = {(vocab[left], vocab[right]): (rank, vocab[left + right])
                       for rank, (left, right) in enumerate(pairs) if left + right not in added}
        self.ids = {**vocab, **added}
        self.tokens = {i: token for token, i in self.ids.items()}
        self.bytes = {byte: vocab[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in vocab and model.get("byte_fallback")}
        self.unknown, self.fuse = vocab.get(model.get("unk_token")), model.get("fuse_unk")
        self.prefix, split = spaces_of(spec, where)
        # Where no piece goes on past the end of a word, words can be cut apart first and remembered; the ids are the same.
        drops = self.unknown is None and len(self.bytes) < 256  # and what stood on either side then meets
        apart = not drops and "▁" in vocab and not any(re.search("[^▁]▁", left + right) for left, right in pairs)
        self.cut = re.compile("▁[^▁]*|[^▁]+" if split else "▁*[^▁]+|▁+" if apart else r"(?s:.+)").findall
        self.word = lru_cache(maxsize=200_000)(self.pieces)

    def encode(self, text):
        text = whole_characters(text).replace(" ", "▁")
        if text and (self.prefix == "always" or self.prefix == "missing" and not text.startswith("▁")):
            text = "▁" + text
        return [i for word in self.cut(text) for i in self.word(word)]

    def pieces(self, word):
        ids = []
        for character in word:
            spelled = [self.ids.get(character)]
            if spelled == [None]:
                spelled = [self.bytes.get(byte) for byte in character.encode()]
            if None not in spelled:
                ids += spelled
            elif self.unknown is not None and not (self.fuse and ids and ids[-1] == self.unknown):
                ids.append(self.unknown)
        return join_pairs(ids, self.merges)

    def decode(self, ids):
        return text_of([self.tokens[i] for i in ids], self.prefix != "never")


def spaces_of(spec, where):
    """(whether "▁" is put in front: always, where it is missing, or never; whether words are cut apart), of the two published kinds."""
    normalizer, pre = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    prepend, replace = {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if not pre and steps in ([prepend, replace], [replace]):
        return "always" if prepend in steps else "never", False
    if not steps and pre.get("type") == "Metaspace" and pre.get("replacement") == "▁":
        scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
        return "never" if scheme == "never" else "missing", pre.get("split", True)
    found = [step.get("type") for step in [*steps, pre] if step]
    raise ValueError(f"{where}: {' + '.join(map(str, found)) or 'no treatment of spaces'} is not supported for BPE with '▁'; known are "
                     f"Prepend + Replace, Replace, and Metaspace")
