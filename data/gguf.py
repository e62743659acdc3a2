"""SmolLM2's GGUF file as a folder in the Hub's layout: config.json, pytorch_model.bin, tokenizer.json and its settings.

Reads what that one file holds: LLaMA architecture, tensors in F32, Q8_0 and Q4_1, byte-level BPE.
"""
import io
import json
import struct

import numpy as np
import torch

SCALARS = {4: "<I", 5: "<i", 6: "<f", 7: "<?"}
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # of the first tensor, in bytes

# ggml type: (name, values in a block, bytes of a block)
TYPES = {0: ("F32", 1, 4), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}

NAMES = {  # GGUF's: the Hub's
    "token_embd":  "model.embed_tokens",
    "output_norm": "model.norm",
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
HEADS = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
CONTROL = 3  # token type of <|endoftext|> and the like
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def convert_gguf(path, folder):
    """Write the model in the file `path` into the existing `folder`. The hash of its wheel vouches for the file."""
    raw = np.fromfile(path, dtype=np.uint8)
    meta, tensors = read_header(raw)
    state = {}
    for name, (shape, kind, start) in tensors.items():
        *layer, part, suffix = name.split(".")  # blk.0.attn_q.weight
        prefix = f"model.layers.{layer[1]}." if layer else ""
        array = dequantise(raw, shape, kind, start)
        if part in HEADS:
            array = to_half_rotation(array, meta[HEADS[part]])
        state[f"{prefix}{NAMES[part]}.{suffix}"] = array
    write_folder(meta, state, folder)


def read_header(raw):
    """(metadata, {name: (shape, ggml type, first byte)}), shapes in PyTorch's order."""
    file = io.BytesIO(raw)
    file.seek(8)  # after the magic and the version
    n_tensors, n_entries = read_scalar(file, "<Q"), read_scalar(file, "<Q")
    meta = {}
    for _ in range(n_entries):
        key = read_string(file)
        meta[key] = read_value(file, read_scalar(file, "<I"))
    infos = {}
    for _ in range(n_tensors):
        name, n_dims = read_string(file), read_scalar(file, "<I")
        shape = tuple(read_scalar(file, "<Q") for _ in range(n_dims))[::-1]
        infos[name] = shape, read_scalar(file, "<I"), read_scalar(file, "<Q")
    first = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    return meta, {name: (shape, kind, first + offset) for name, (shape, kind, offset) in infos.items()}


def read_scalar(file, layout):
    (value,) = struct.unpack(layout, file.read(struct.calcsize(layout)))
    return value


def read_string(file):
    return file.read(read_scalar(file, "<Q")).decode("utf-8")


def read_value(file, kind):
    if kind == STRING:
        return read_string(file)
    if kind == ARRAY:
        kind, length = read_scalar(file, "<I"), read_scalar(file, "<Q")
        return [read_value(file, kind) for _ in range(length)]
    return read_scalar(file, SCALARS[kind])


def dequantise(raw, shape, kind, start):
    """float32 array of `shape`. A quantised block is a scale (and for Q4_1 a minimum) in float16, then 32 integers."""
    name, per_block, size = TYPES[kind]
    count = int(np.prod(shape)) // per_block
    blocks = raw[start:start + count * size].reshape(count, size)
    if name == "F32":
        return blocks.view("<f4").reshape(shape)
    scale = blocks[:, :2].view("<f2").astype(np.float32)  # (count, 1)
    if name == "Q8_0":
        return (scale * blocks[:, 2:].view(np.int8)).reshape(shape)
    minimum = blocks[:, 2:4].view("<f2").astype(np.float32)
    values = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)  # low halves are the first 16 values
    return (scale * values.astype(np.float32) + minimum).reshape(shape)


def to_half_rotation(array, n_heads):
    """GGUF orders the rows of q and k for rotating neighbours (0 1), (2 3), ...; the Hub's layout rotates the halves
    (0 h/2), (1 h/2 + 1), ..."""
    split = array.reshape(n_heads, -1, 2, array.shape[1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(array.shape)


def write_folder(meta, state, folder):
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    special = {name: meta[f"tokenizer.ggml.{key}_token_id"]
               for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(tokens),
        "hidden_size": meta["llama.embedding_length"], "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"], "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": meta["llama.rope.freq_base"], "tie_word_embeddings": True,
        **{f"{name}_token_id": i for name, i in special.items()},
    }
    tokenizer = {
        "added_tokens": [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, kind in enumerate(types) if kind == CONTROL],
        "pre_tokenizer": {"type": "Sequence",
                          "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": meta["tokenizer.ggml.merges"]},
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": meta["tokenizer.ggml.add_bos_token"],
                **{f"{name}_token": tokens[i] for name, i in special.items()}}
    for name, content in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    # In float32: a 4-bit integer times a float16 scale plus a float16 minimum does not fit into 16 bits.
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, folder / "pytorch_model.bin")
