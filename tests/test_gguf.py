"""convert_gguf: every quantisation against a scalar reading of its definition, the rotation's row order, and files that are refused."""
import json
import struct

import numpy as np
import pytest
import torch

from data.download import cache_dir
from data.gguf import convert_gguf
from data.tokenizer import Tokenizer, byte_alphabet
from model import GPT

WIDTH, HEADS, KV_HEADS, INNER = 64, 4, 2, 96
KINDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8}


def half(x):
    return struct.unpack("<e", struct.pack("<e", x))[0]


def quantise(kind, values):
    """(bytes, the values that they stand for) of a flat list, a number at a time."""
    raw, read = b"", []
    if kind in ("F32", "F16"):
        layout = "<f" if kind == "F32" else "<e"
        raw = b"".join(struct.pack(layout, v) for v in values)
        return raw, [struct.unpack(layout, struct.pack(layout, v))[0] for v in values]
    for start in range(0, len(values), 32):
        block = values[start:start + 32]
        if kind == "Q8_0":
            scale = half(max(map(abs, block)) / 127)
            integers = [max(-128, min(127, round(v / scale))) for v in block]
            raw += struct.pack("<e32b", scale, *integers)
            read += [scale * q for q in integers]
            continue
        low = half(min(block))
        scale = half((max(block) - low) / 15) if kind == "Q4_1" else half(max(map(abs, block)) / 7)
        zero = low if kind == "Q4_1" else -8 * scale
        integers = [max(0, min(15, round((v - zero) / scale))) for v in block]
        packed = bytes(integers[i] | integers[i + 16] << 4 for i in range(16))
        raw += struct.pack("<e", scale) + (struct.pack("<e", low) if kind == "Q4_1" else b"") + packed
        read += [scale * q + zero for q in integers]
    return raw, read


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry(key, value):
    if isinstance(value, str):
        return string(key) + struct.pack("<I", 8) + string(value)
    if isinstance(value, bool):
        return string(key) + struct.pack("<I?", 7, value)
    if isinstance(value, float):
        return string(key) + struct.pack("<If", 6, value)
    if isinstance(value, int):
        return string(key) + struct.pack("<II", 4, value)
    kind, packed = (8, map(string, value)) if isinstance(value[0], str) else (5, (struct.pack("<i", v) for v in value))
    return string(key) + struct.pack("<IIQ", 9, kind, len(value)) + b"".join(packed)


def metadata():
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "he", "Ġhe"]
    return {"general.architecture": "llama", "llama.embedding_length": WIDTH, "llama.feed_forward_length": INNER, "llama.block_count": 1,
            "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS, "llama.context_length": 64,
            "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
            "tokenizer.ggml.merges": ["h e", "Ġ he"], "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.add_bos_token": False}


def shapes(vocab):
    kv = WIDTH * KV_HEADS // HEADS
    return {"token_embd.weight": (vocab, WIDTH), "output_norm.weight": (WIDTH,), "blk.0.attn_norm.weight": (WIDTH,),
            "blk.0.attn_q.weight": (WIDTH, WIDTH), "blk.0.attn_k.weight": (kv, WIDTH), "blk.0.attn_v.weight": (kv, WIDTH),
            "blk.0.attn_output.weight": (WIDTH, WIDTH), "blk.0.ffn_norm.weight": (WIDTH,), "blk.0.ffn_gate.weight": (INNER, WIDTH),
            "blk.0.ffn_up.weight": (INNER, WIDTH), "blk.0.ffn_down.weight": (WIDTH, INNER)}


def write_gguf(path, kind="Q4_1", meta=None, version=3, kind_number=None):
    """A tiny LLaMA as GGUF; returns {name: the values that the file stands for, as nested in the file}."""
    meta = meta or metadata()
    draw, infos, body, read = np.random.default_rng(0), b"", b"", {}
    rows = shapes(len(metadata()["tokenizer.ggml.tokens"]))
    for name, shape in rows.items():
        this = "F32" if "norm" in name else kind
        raw, values = quantise(this, draw.normal(size=int(np.prod(shape))).tolist())
        read[name] = np.array(values).reshape(shape)
        infos += string(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        infos += struct.pack("<IQ", KINDS[this] if kind_number is None else kind_number, len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    head = b"GGUF" + struct.pack("<IQQ", version, len(rows), len(meta)) + b"".join(entry(k, v) for k, v in meta.items()) + infos
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return read


def convert(path, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    convert_gguf(path, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantisation_stands_for_the_values_of_its_definition(kind, tmp_path):
    read = write_gguf(tmp_path / "m.gguf", kind)
    model = GPT.from_pretrained(convert(tmp_path / "m.gguf", tmp_path))
    layer = model.layers[0]
    for ours, name in ((layer.mlp.down_proj, "blk.0.ffn_down"), (layer.mlp.gate_proj, "blk.0.ffn_gate"), (layer.attention.v_proj, "blk.0.attn_v"),
                       (layer.norm2, "blk.0.ffn_norm"), (model.embed, "token_embd"), (model.norm, "output_norm")):
        np.testing.assert_allclose(ours.weight.detach().numpy(), read[name + ".weight"], rtol=1e-6, atol=1e-6)


def test_q_and_k_are_put_back_for_the_rotation_of_halves(tmp_path):
    read = write_gguf(tmp_path / "m.gguf", "F32")
    attention = GPT.from_pretrained(convert(tmp_path / "m.gguf", tmp_path)).layers[0].attention
    for ours, name, heads in ((attention.q_proj, "attn_q", HEADS), (attention.k_proj, "attn_k", KV_HEADS)):
        size = ours.weight.shape[0] // heads
        for head in range(heads):
            for i in range(size // 2):  # rows 2 i and 2 i + 1 of the file turn together; in our layout i and i + size / 2 do
                for part in (0, 1):
                    expected = read[f"blk.0.{name}.weight"][head * size + 2 * i + part]
                    np.testing.assert_allclose(ours.weight[head * size + i + part * size // 2].detach(), expected, rtol=1e-6)


def test_the_folder_serves_the_fields_own_tools_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_gguf(tmp_path / "m.gguf")
    folder = convert(tmp_path / "m.gguf", tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours, text = Tokenizer(folder), "he the  12 hehe!"
    assert ours.encode(text) == fast.encode(text, add_special_tokens=False) and (ours.bos, ours.eos, ours.pad) == (1, 2, 2)
    idx = torch.tensor([ours.encode(text)])
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(folder)(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_file_cut_short_anywhere_is_named(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    for n in (0, 3, 4, 20, 100, 2000, len(whole) // 2, len(whole) - 100):
        (tmp_path / "m.gguf").write_bytes(whole[:n])
        with pytest.raises(ValueError, match="m.gguf"):
            convert(tmp_path / "m.gguf", tmp_path)


def test_what_is_not_known_is_refused_by_name(tmp_path):
    path = tmp_path / "m.gguf"
    for changes, words in (({"general.architecture": "mamba"}, "'mamba'"), ({"tokenizer.ggml.model": "llama"}, "'llama'"),
                           ({"tokenizer.ggml.pre": "qwen2"}, "qwen2")):
        write_gguf(path, meta={**metadata(), **changes})
        with pytest.raises(ValueError, match=words):
            convert(path, tmp_path)
    write_gguf(path, version=1)
    with pytest.raises(ValueError, match="version 1"):
        convert(path, tmp_path)
    write_gguf(path, kind_number=14)
    with pytest.raises(ValueError, match="ggml type 14; known are F32"):
        convert(path, tmp_path)
    meta = metadata()
    del meta["llama.block_count"]
    write_gguf(path, meta=meta)
    with pytest.raises(ValueError, match="lacks the entry 'llama.block_count'"):
        convert(path, tmp_path)


@pytest.mark.slow
def test_smollm2_says_that_the_capital_of_france_is_paris():
    folder = cache_dir() / "smollm2"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: python data/prepare.py smollm2")
    model, tokenizer = GPT.from_pretrained(folder), Tokenizer(folder)
    prompt = tokenizer.encode("The capital of France is")
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(3):
            ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    assert tokenizer.decode(ids[len(prompt):]).startswith(" Paris")
