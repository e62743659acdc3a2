"""GGUF to a folder in the Hub's layout, once: config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

Reads what SmolLM2-135M's file holds: LLaMA architecture, tensors in F32, F16, Q8_0, Q4_0 or Q4_1, a byte-level BPE vocabulary.
Other architectures, quantisations and vocabularies are refused by name.
"""
import json
import struct
from pathlib import Path

import numpy as np

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9

# ggml type: (name, values in a block, bytes of a block)
TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}

# GGUF's names to the Hub's
NAMES = {
    "token_embd.weight":  "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight":      "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm":   "input_layernorm",
    "attn_q":      "self_attn.q_proj",
    "attn_k":      "self_attn.k_proj",
    "attn_v":      "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm":    "post_attention_layernorm",
    "ffn_gate":    "mlp.gate_proj",
    "ffn_up":      "mlp.up_proj",
    "ffn_down":    "mlp.down_proj",
}
CONTROL = 3  # token type of <|endoftext|> and the like

# tokenizer.ggml.pre: what cuts text before BPE
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {
    "gpt-2":  BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
}


def convert_gguf(path, folder):
    """Write the model in the GGUF file `path` into the existing `folder`; ValueError naming the file if it cannot be read whole."""
    path, folder = Path(path), Path(folder)
    raw = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else b""
    try:
        meta, tensors = read_header(raw, path)
        state = {}
        for name, (shape, kind, start) in tensors.items():
            state[hub_name(name, path)] = unpermute(name, dequantise(raw, shape, kind, start), meta)
        write_folder(meta, state, folder, path)
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path} is cut short, or no GGUF file ({error})") from None
    except KeyError as error:
        raise ValueError(f"{path} lacks the entry {error}") from None


class Reader:
    def __init__(self, raw):
        self.raw, self.at = raw, 0

    def scalar(self, layout):
        (value,) = struct.unpack_from(layout, self.raw, self.at)
        self.at += struct.calcsize(layout)
        return value

    def string(self):
        length = self.scalar("<Q")
        if length > len(self.raw) - self.at:
            raise IndexError(f"a text of {length} bytes at byte {self.at}")
        self.at += length
        return bytes(self.raw[self.at - length:self.at]).decode("utf-8")

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, length = self.scalar("<I"), self.scalar("<Q")
            if length > len(self.raw) - self.at:
                raise IndexError(f"a list of {length} entries at byte {self.at}")
            return [self.value(kind) for _ in range(length)]
        if kind not in SCALARS:
            raise IndexError(f"unknown value type {kind} at byte {self.at}")
        return self.scalar(SCALARS[kind])


def read_header(raw, path):
    """(metadata, {name: (shape, ggml type, first byte)}), shapes in PyTorch's order."""
    if bytes(raw[:4]) != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it begins with {bytes(raw[:4])!r}")
    reader = Reader(raw)
    reader.at = 4
    version, n_tensors, n_entries = reader.scalar("<I"), reader.scalar("<Q"), reader.scalar("<Q")
    if version not in (2, 3):
        raise ValueError(f"{path} is GGUF version {version}; 2 and 3 are known")
    meta = {}
    for _ in range(n_entries):
        key = reader.string()
        meta[key] = reader.value(reader.scalar("<I"))
    if meta.get("general.architecture") != "llama":
        raise ValueError(f"{path} holds architecture {meta.get('general.architecture')!r}; only 'llama' is known")
    tensors = {}
    for _ in range(n_tensors):
        name, n_dims = reader.string(), reader.scalar("<I")
        shape = tuple(reader.scalar("<Q") for _ in range(n_dims))[::-1]
        kind, offset = reader.scalar("<I"), reader.scalar("<Q")
        if kind not in TYPES:
            raise ValueError(f"{path}: tensor {name} has ggml type {kind}; known are {', '.join(row[0] for row in TYPES.values())}")
        tensors[name] = shape, kind, offset
    alignment = meta.get("general.alignment", 32)
    first = -(-reader.at // alignment) * alignment
    return meta, {name: (shape, kind, first + offset) for name, (shape, kind, offset) in tensors.items()}


def dequantise(raw, shape, kind, start):
    """float32 array of `shape`. A quantised block is a scale (and for Q4_1 a minimum) in float16, then 32 small integers."""
    _, per_block, size = TYPES[kind]
    count = int(np.prod(shape, dtype=np.int64)) // per_block
    if start + count * size > len(raw):
        raise IndexError(f"{start + count * size - len(raw)} bytes are missing at the end")
    blocks = np.asarray(raw[start:start + count * size]).reshape(count, size)
    name = TYPES[kind][0]
    if per_block == 1:
        return blocks.view("<f4" if name == "F32" else "<f2").astype(np.float32).reshape(shape)
    scale = blocks[:, :2].view("<f2").astype(np.float32)  # (blocks, 1)
    if name == "Q8_0":
        return (scale * blocks[:, 2:].view(np.int8)).astype(np.float32).reshape(shape)
    nibbles = blocks[:, 4 if name == "Q4_1" else 2:]
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32)  # low halves are the first 16 values
    minimum = blocks[:, 2:4].view("<f2").astype(np.float32) if name == "Q4_1" else -8 * scale
    return (scale * values + minimum).reshape(shape)


def hub_name(name, path):
    if name in NAMES:
        return NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_NAMES and parts[3] in ("weight", "bias"):
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ValueError(f"{path}: tensor {name} belongs to no LLaMA layer that is known here")


def unpermute(name, array, meta):
    """GGUF stores the rows of q and k for rotation of neighbours (0 1), (2 3), ...; the Hub's layout turns (0 h/2), (1 h/2 + 1), ..."""
    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for part, key in heads.items():
        if f".{part}." in name:
            n = meta.get(key, meta["llama.attention.head_count"])
            split = array.reshape(n, array.shape[0] // n // 2, 2, *array.shape[1:])
            return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(array.shape)
    return array


def write_folder(meta, state, folder, path):
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    pre = meta.get("tokenizer.ggml.pre", "gpt-2")
    if meta["tokenizer.ggml.model"] != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(f"{path} holds vocabulary {meta['tokenizer.ggml.model']!r} ({pre}); known is 'gpt2' with {', '.join(PRE_TOKENIZERS)}")
    bos, eos = meta.get("tokenizer.ggml.bos_token_id"), meta.get("tokenizer.ggml.eos_token_id")
    pad = meta.get("tokenizer.ggml.padding_token_id", eos)
    width, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tokens), "hidden_size": width,
        "intermediate_size": meta["llama.feed_forward_length"], "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads, "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads), "head_dim": width // heads,
        "max_position_embeddings": meta["llama.context_length"], "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": meta.get("llama.rope.freq_base", 10000.0), "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in state, "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad,
        "torch_dtype": "float32",
    }
    control = [i for i, kind in enumerate(types) if kind == CONTROL]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                          "special": True} for i in control],
        "pre_tokenizer": PRE_TOKENIZERS[pre], "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": meta["tokenizer.ggml.merges"]},
    }
    special = {f"{name}_token": tokens[i] for name, i in (("bos", bos), ("eos", eos), ("pad", pad)) if i is not None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)), **special}
    for name, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    write_safetensors(state, folder / "model.safetensors")


def write_safetensors(state, path):
    """float32 throughout: a 4-bit integer times a float16 scale plus a float16 minimum does not fit into 16 bits."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, array in state.items():
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for array in state.values():
            file.write(array.astype("<f4", copy=False).tobytes())
