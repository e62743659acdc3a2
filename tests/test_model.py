"""The properties of model.py: equal to transformers, padding inert, weights loaded whole or refused."""
import json
import struct

import pytest
import torch
import torch.nn as nn

from model import GPT, Classifier, Encoder, EncoderConfig, GPTConfig, load_pretrained

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99,
            layer_norm_eps=0.1)  # as all settings here, no default: what config.json says is read
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=128, layer_norm_epsilon=0.1)
LLAMA = dict(SIZE, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=0.1)
DEBERTA = dict(SIZE, max_position_embeddings=512, relative_attention=True, pos_att_type="p2c|c2p", type_vocab_size=0,
               position_biased_input=False)
BUCKETS = dict(DEBERTA, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True)
LINEAR = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_theta": 5000.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}

# name: (transformers' class without its suffix, suffix, config)
GPTS = {
    "gpt2":          ("GPT2", "LMHeadModel", GPT2),
    "gpt2, upcast":  ("GPT2", "LMHeadModel", dict(GPT2, reorder_and_upcast_attn=True, attn_implementation="eager")),
    "llama":         ("Llama", "ForCausalLM", LLAMA),
    "llama, linear": ("Llama", "ForCausalLM", dict(LLAMA, rope_parameters=LINEAR)),
    "llama, llama3": ("Llama", "ForCausalLM", dict(LLAMA, rope_parameters=LLAMA3)),
    "llama, tied":   ("Llama", "ForCausalLM", dict(LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True,
                                                  head_dim=16)),
}
ENCODERS = {
    "bert":       ("Bert", "Model", dict(SIZE, max_position_embeddings=64)),
    "roberta":    ("Roberta", "Model", dict(SIZE, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1)),
    "deberta v1": ("Deberta", "Model", dict(DEBERTA, max_position_embeddings=64)),
    "deberta v2": ("DebertaV2", "Model", dict(BUCKETS, conv_kernel_size=3, conv_act="gelu")),
    "deberta v3": ("DebertaV2", "Model", BUCKETS),
    "deberta, own projections": ("DebertaV2", "Model", dict(BUCKETS, share_att_key=False, position_biased_input=True)),
}


def reference(row, folder):
    """A random model of transformers, saved to `folder`, its norms and biases away from their initial values too."""
    transformers = pytest.importorskip("transformers")
    name, suffix, config = row
    torch.manual_seed(0)
    model = getattr(transformers, name + suffix)(getattr(transformers, name + "Config")(**config)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return model


def tiny(family):
    """A small model whose weights are so wide that a GPT's greedy continuations do not repeat one token."""
    llama = dict(learned_positions=False, rms_norm=True, gated=True, activation="silu", n_kv_head=2)
    deberta = dict(n_positions=512, n_types=0, learned_positions=False, relative=True, relative_span=32,
                   relative_buckets=32, relative_furthest=512, relative_shared=True, relative_norm=True, conv_kernel=3)
    torch.manual_seed(1)
    if family in ("gpt2", "llama"):
        model = GPT(GPTConfig(99, 2, 4, 32, 48, 64, **(llama if family == "llama" else {})))
    else:
        model = Encoder(EncoderConfig(99, 2, 4, 32, 48, **(deberta if family == "deberta" else {"n_positions": 64})))
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.4)
    return model.eval()


def pad(texts, left=False):
    """Texts (1, n) as one batch and its mask."""
    T = max(text.shape[1] for text in texts)
    idx, mask = torch.zeros(len(texts), T, dtype=torch.long), torch.zeros(len(texts), T, dtype=torch.bool)
    for i, text in enumerate(texts):
        place = slice(T - text.shape[1], T) if left else slice(0, text.shape[1])
        idx[i, place], mask[i, place] = text, True
    return idx, mask


def texts(*lengths):
    return [torch.randint(2, 99, (1, n)) for n in lengths]


def close(a, b, tolerance=1e-4):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# Equal to transformers


@pytest.mark.parametrize("kind", GPTS)
@torch.no_grad()
def test_a_gpt_equals_transformers_padding_on_the_left_included(kind, tmp_path):
    theirs = reference(GPTS[kind], tmp_path)
    if kind == "llama, llama3":  # as folders from before transformers 5 have it
        config = json.loads((tmp_path / "config.json").read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"], config["rope_scaling"] = rope.pop("rope_theta"), {"type": rope.pop("rope_type"), **rope}
        (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_pretrained(tmp_path)
    idx = torch.randint(99, (3, 100))
    close(ours(idx)[0], theirs(idx).logits)
    idx, mask = pad(texts(12, 7, 1), left=True)
    expected = theirs(idx, attention_mask=mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    close(ours(idx, mask=mask)[0][mask], expected[mask])
    assert ours.bfloat16()(idx, mask=mask)[0].isfinite().all()


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_an_encoder_equals_transformers_padded_batches_included(kind, tmp_path):
    theirs = reference(ENCODERS[kind], tmp_path)
    ours = load_pretrained(tmp_path)
    for T, left in ((1, False), (2, False), (60, True), (300, False), (512, True)):
        if T > ours.max_length:
            continue
        idx, mask = pad(texts(T, (T + 1) // 2, 1), left)
        idx[~mask] = 1  # RoBERTa's reference finds its positions by this id
        types = torch.randint(2, idx.shape)  # which BERT alone has
        known = {"token_type_ids": types} if kind == "bert" else {}
        expected = theirs(idx, attention_mask=mask.long(), **known).last_hidden_state
        close(ours(idx, mask, types)[mask], expected[mask])
        close(ours(idx[:1]), theirs(idx[:1]).last_hidden_state)
    assert ours.bfloat16()(idx, mask, types).isfinite().all()


# What holds without a reference


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_the_log_probabilities_of_answers_are_those_of_each_text_alone_and_the_loss_is_their_mean(family):
    model, rows, starts = tiny(family), texts(12, 7, 2), (5, 1, 1)
    idx, mask = pad(rows)
    seen = []
    model.lm_head.register_forward_hook(lambda layer, args, out: seen.append(len(args[0])))
    is_answer = mask & (torch.arange(12) >= torch.tensor(starts)[:, None])
    logprobs = model.answer_logprobs(idx, is_answer)
    assert seen == [7 + 6 + 1], "lm_head sees no other tokens"
    answers = torch.cat([row[0, start:] for row, start in zip(rows, starts)])
    whole = torch.cat([model(row)[0].log_softmax(-1)[0, start - 1:-1] for row, start in zip(rows, starts)])  # (14, 99)
    close(logprobs, whole[torch.arange(14), answers])
    close(model(idx, idx.masked_fill(~is_answer, -100).roll(-1, dims=1))[1], -logprobs.mean())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_a_batch_generates_what_each_row_does_alone_and_without_a_cache(family):
    model, rows = tiny(family), texts(1, 7, 12)
    together = model.generate(*pad(rows, left=True), 20)
    for row, new in zip(rows, together):
        for _ in range(20):
            row = torch.cat([row, model(row)[0][:, -1:].argmax(-1)], dim=1)
        assert torch.equal(new, row[0, -20:]) and len(new.unique()) > 3


def test_after_eos_a_row_generates_nothing_else():
    model = tiny("gpt2")
    idx, mask = pad(texts(1, 7, 12), left=True)
    free = model.generate(idx, mask, 20)
    eos = free[0, 3].item()
    stopped = model.generate(idx, mask, 20, eos)
    for new, line in zip(stopped.tolist(), free.tolist()):
        end = line.index(eos) if eos in line else 20
        assert new[:end] == line[:end] and set(new[end:]) <= {eos}
    alone = model.generate(idx[:1], mask[:1], 20, eos)
    assert alone.tolist() == [free[0].tolist()[:alone.shape[1]]] and alone[0, -1] == eos, "it ends with the last row"


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@torch.no_grad()
def test_a_classifier_reads_an_encoders_mean_or_a_gpts_last_token_whatever_the_batch(kind):
    model, rows = Classifier(tiny(kind), 3), texts(3, 9, 20, 1)
    alone = torch.cat([model(row) for row in rows])  # (4, 3)
    read = [model.backbone(row).mean(1) if kind == "bert" else model.backbone.hidden(row)[:, -1] for row in rows]
    close(alone, model.head(torch.cat(read)), 1e-5)
    close(model(*pad(rows)), alone, 1e-5)
    if kind != "bert":  # whose positions count padding on the left
        close(model(*pad(rows, left=True)), alone, 1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "deberta"])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(kind):
    model, (idx, mask) = tiny(kind).train(), pad(texts(30, 20))
    kept, gradients = [], []
    for model.gradient_checkpointing in (False, True):
        n_bytes = []
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: n_bytes.append(t.nbytes) or t, lambda t: t):
            out = model.hidden(idx, mask) if isinstance(model, GPT) else model(idx, mask)
        out.square().mean().backward()
        kept.append(sum(n_bytes))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert kept[1] < kept[0] / 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", ["llama", "deberta"])
def test_compiled_one_graph_serves_every_length(kind):
    model, graphs = tiny(kind).train(), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    forward = model.hidden if isinstance(model, GPT) else model.forward
    compiled = torch.compile(forward, dynamic=True, fullgraph=True, backend=count)
    for T in (17, 9, 30):
        idx, mask = pad(texts(T, T // 2))
        close(compiled(idx, mask), forward(idx, mask))
    assert len(graphs) == 1


def test_too_long_a_text_and_generation_after_padding_are_one_clear_error_each():
    roberta = Encoder(EncoderConfig(99, 1, 4, 32, 48, n_positions=66, position_offset=2))
    for model in (roberta, tiny("gpt2")):
        model(torch.ones(1, 64, dtype=torch.long))
        with pytest.raises(ValueError, match="65 tokens: this model has 64 positions"):
            model(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="pad on the left"):
        tiny("gpt2").generate(*pad(texts(4, 3)))


# Files


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_shards_and_bin_files_and_names_without_prefix_hold_the_same_model(tmp_path):
    theirs = reference(GPTS["llama"], tmp_path / "whole")
    ours = load_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2 and same(ours, load_pretrained(tmp_path / "shards"))

    state = list({name.removeprefix("model."): p for name, p in theirs.state_dict().items()}.items())
    bins = tmp_path / "bins"
    theirs.config.save_pretrained(bins)
    for file, part in (("a.bin", state[:9]), ("b.bin", state[9:])):
        torch.save(dict(part), bins / file)
    (bins / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"one": "a.bin", "other": "b.bin"}}))
    assert same(ours, load_pretrained(bins))

    shards[1].unlink()
    with pytest.raises(ValueError, match="model-00002.*is not there"):
        load_pretrained(tmp_path / "shards")


@pytest.mark.parametrize("row, extra", [
    (("Bert", "ForSequenceClassification", ENCODERS["bert"][2]), {}),
    (("Bert", "ForPreTraining", ENCODERS["bert"][2]), {"bert.embeddings.position_ids": torch.arange(64)}),
    (("DebertaV2", "ForMaskedLM", BUCKETS), {"deberta.embeddings.position_embeddings.weight": torch.zeros(512, 32),
                                             "lm_predictions.lm_head.bias": torch.zeros(99)})])
def test_heads_of_other_tasks_and_buffers_and_the_oldest_names_are_no_obstacle(row, extra, tmp_path, capsys):
    theirs = reference(row, tmp_path)
    capsys.readouterr()
    ours, idx = load_pretrained(tmp_path), torch.randint(99, (2, 20))
    note = f"{tmp_path}: the fine-tuned head there (classifier) is not used, only the layers below it\n"
    assert capsys.readouterr().err == (note if "Classification" in row[1] else "")
    close(ours(idx), theirs.base_model(idx).last_hidden_state)
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): p
             for name, p in theirs.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save({**state, **extra}, tmp_path / "pytorch_model.bin")
    assert same(ours, load_pretrained(tmp_path))


def write(path, tensors):
    """A safetensors file of float32 tensors, by hand."""
    header, end = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.numpy().tobytes() for t in tensors.values()))


TINY = {"model_type": "gpt2", "vocab_size": 20, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16}


@pytest.fixture
def gpt2(tmp_path):
    """(folder with a tiny GPT-2, written without anyone's library, its tensors)."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    shapes = {"wte.weight": (20, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for name, shape in {"ln_1": (8,), "ln_2": (8,), "attn.c_attn": (8, 24), "attn.c_proj": (8, 8),
                        "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}.items():
        shapes[f"h.0.{name}.weight"], shapes[f"h.0.{name}.bias"] = shape, shape[-1:]
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    write(tmp_path / "model.safetensors", tensors)
    return tmp_path, tensors


def test_every_projection_is_a_linear_layer_of_the_same_name_in_every_family():
    def names(model):
        return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    assert names(tiny("gpt2")) == projections | {"lm_head"}
    assert names(tiny("llama")) == projections | {"gate_proj", "lm_head"}
    assert names(tiny("bert")) == names(tiny("deberta")) == projections


def test_a_tied_weight_may_lie_under_either_name_or_both_and_stays_shared(gpt2):
    folder, tensors = gpt2
    weight = tensors["wte.weight"]
    tensors["lm_head.weight"] = weight
    for _ in range(2):
        write(folder / "model.safetensors", tensors)
        model = load_pretrained(folder)
        assert torch.equal(model.embed.weight, weight) and model.lm_head.weight is model.embed.weight
        tensors.pop("wte.weight", None)


@pytest.mark.parametrize("change, message", [
    ({"h.0.ln_1.bias": None}, "no tensor for layers.0.norm1.bias"),
    ({"h.0.extra.weight": torch.zeros(1)}, "'h.0.extra.weight', for which this model has no place"),
    ({"h.0.attn.c_attn.weight": torch.zeros(8, 23)}, r"c_attn.weight' of shape \(8, 23\) does not fit"),
    ({"lm_head.weight": torch.zeros(20, 8)}, "'lm_head.weight' is the second one for lm_head.weight, and differs")])
def test_missing_unexpected_and_misshapen_tensors_are_named_with_their_file(gpt2, change, message):
    folder, tensors = gpt2
    write(folder / "model.safetensors", {k: v for k, v in {**tensors, **change}.items() if v is not None})
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(folder)
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_file_cut_short_is_named(gpt2):
    folder, _ = gpt2
    whole = (folder / "model.safetensors").read_bytes()
    for content in [whole[:0], whole[:5], whole[:100], whole[:-1], whole + b"x", whole.replace(b"F32", b"F99", 1)]:
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors"):
            load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(whole)
    with pytest.raises(ValueError, match="pytorch_model.bin is cut short"):
        load_pretrained(folder)


@pytest.mark.parametrize("content, message", [
    ('{"model_type": "gpt2"', "not JSON"), ('{"model_type": "mamba"}', "'mamba' is not known; known are gpt2, llama"),
    (json.dumps({**TINY, "activation_function": "mish"}), "activation 'mish' is not known"),
    ('{"model_type": "llama", "rope_scaling": {"type": "dynamic"}}', "RoPE scaling 'dynamic' is not supported"),
    ('{"model_type": "llama", "rope_parameters": {"rope_type": "linear"}}', "lacks 'factor'"),
    ('{"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}', "partial_rotary_factor is 0.5"),
    ('{"model_type": "bert", "position_embedding_type": "alibi"}', "position_embedding_type is 'alibi'; only 'abs"),
    # switches that change what the same tensors give
    (json.dumps({**TINY, "scale_attn_weights": False}), "scale_attn_weights is False; only True is supported"),
    ('{"model_type": "bert", "is_decoder": true}', "is_decoder is True; only False is supported"),
    (json.dumps({"model_type": "deberta", **DEBERTA, "relative_attention": False}), "relative_attention is False"),
    (json.dumps({"model_type": "deberta", **DEBERTA, "pos_att_type": ["c2p"]}), "pos_att_type")])
def test_a_config_that_cannot_be_used_is_refused_in_one_line(gpt2, content, message):
    (gpt2[0] / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(gpt2[0])
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_loading_casts_the_weights_and_draws_no_random_numbers(gpt2):
    state = torch.get_rng_state()
    model = load_pretrained(gpt2[0], dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert torch.equal(state, torch.get_rng_state())
