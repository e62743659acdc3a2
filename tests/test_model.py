"""The properties of model.py: equal to the field's own implementation, padding inert, the future invisible, files whole or refused."""
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
import torch.nn as nn

from model import LLAMA_NAMES, GPT, Classifier, Encoder, EncoderConfig, GPTConfig, distance_rows, load_pretrained

SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
ROPE = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7, "mscale_all_dim": 0.9,
                    "beta_fast": 16, "beta_slow": 2},
    "longrope": {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 32, "long_factor": [1.5, 2.0, 2.5, 3.0],
                 "short_factor": [1.0, 1.0, 1.1, 1.2]},
}


# As published: v1 base, v2 xlarge (convolution, shared keys, buckets), v3; and what their configs allow besides.
DEBERTA = {
    "v1": ("deberta", dict(**SIZE, max_position_embeddings=64, relative_attention=True, pos_att_type=["c2p", "p2c"],
                           position_biased_input=False, type_vocab_size=0)),
    "v2": ("deberta-v2", dict(**SIZE, max_position_embeddings=512, relative_attention=True, pos_att_type="p2c|c2p", position_buckets=256,
                              position_biased_input=False, type_vocab_size=0, norm_rel_ebd="layer_norm", share_att_key=True,
                              conv_kernel_size=3, conv_act="gelu", attention_head_size=8)),
    "v3": ("deberta-v2", dict(**SIZE, max_position_embeddings=512, relative_attention=True, pos_att_type="p2c|c2p", position_buckets=256,
                              position_biased_input=False, type_vocab_size=0, norm_rel_ebd="layer_norm", share_att_key=True)),
    "v2, no buckets": ("deberta-v2", dict(**SIZE, max_position_embeddings=64, relative_attention=True, pos_att_type="c2p|p2c", type_vocab_size=2)),
    "v2, one term": ("deberta-v2", dict(**SIZE, max_position_embeddings=64, relative_attention=True, pos_att_type="p2c", position_buckets=8,
                                        embedding_size=24, conv_kernel_size=5, conv_groups=2, conv_act="tanh")),
}


def reference(family, folder, **changes):
    """A random model of the field's own, saved to `folder`, every parameter away from its initial value."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, **changes)
        model = transformers.GPT2LMHeadModel(config)
    elif family == "llama":
        config = transformers.LlamaConfig(**SIZE, num_key_value_heads=2, max_position_embeddings=changes.pop("max_position_embeddings", 64),
                                          rope_parameters={"rope_theta": 10000.0, **changes.pop("rope", ROPE["default"])}, **changes)
        model = transformers.LlamaForCausalLM(config)
    elif family == "deberta":
        model = transformers.DebertaModel(transformers.DebertaConfig(**DEBERTA["v1"][1], **changes))
    elif family == "deberta-v2":
        model = transformers.DebertaV2Model(transformers.DebertaV2Config(**changes))
    elif family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**SIZE, max_position_embeddings=64, **changes))
    else:
        model = transformers.RobertaModel(transformers.RobertaConfig(**SIZE, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, **changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model.eval().save_pretrained(folder)
    return model


@torch.no_grad()
def assert_gpt_equal(ours, theirs, lengths=(1, 9, 60)):
    for T in lengths:
        idx = torch.randint(99, (3, T))
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)
        hidden = theirs(idx, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(ours.hidden(idx), hidden, atol=1e-4, rtol=1e-4)


# Small models of our own


def tiny_config(learned=True, **changes):
    base = dict(learned_positions=True) if learned else dict(learned_positions=False, rms_norm=True, gated=True, activation="silu", n_kv_head=2)
    return GPTConfig(99, 2, 4, 32, 48, 64, **{**base, **changes})


def tiny_gpt(learned=True, **changes):
    torch.manual_seed(0)
    model = GPT(tiny_config(learned, **changes))
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model.eval()


def tiny_deberta(**changes):
    return EncoderConfig(99, 2, 4, 32, 48, **{**dict(n_positions=64, n_types=0, learned_positions=False, relative=("c2p", "p2c"), relative_span=32,
                                                     relative_buckets=32, relative_furthest=512, relative_shared=True, relative_norm=True), **changes})


# Equality


def test_gpt2_equals_the_reference(tmp_path):
    theirs = reference("gpt2", tmp_path)
    assert_gpt_equal(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("kind", ROPE)
def test_llama_equals_the_reference_under_every_rope_scaling(kind, tmp_path):
    theirs = reference("llama", tmp_path, rope=ROPE[kind], max_position_embeddings=128 if kind != "dynamic" else 64)
    assert_gpt_equal(GPT.from_pretrained(tmp_path), theirs, (1, 9, 33, 100))


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 16},
                                     {"hidden_act": "gelu"}, {"rms_norm_eps": 0.1}])
def test_llamas_variants_equal_the_reference(changes, tmp_path):
    theirs = reference("llama", tmp_path, **changes)
    ours = GPT.from_pretrained(tmp_path)
    assert_gpt_equal(ours, theirs)
    assert (ours.lm_head.weight is ours.embed.weight) == changes.get("tie_word_embeddings", False)


def test_rope_settings_of_older_files_mean_the_same(tmp_path):
    theirs = reference("llama", tmp_path, rope={"rope_theta": 5000.0, **ROPE["llama3"]})
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = rope.pop("rope_theta"), {"type": rope.pop("rope_type"), **rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_gpt_equal(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
@torch.no_grad()
def test_encoders_equal_the_reference_padded_batches_included(family, act, tmp_path):
    theirs = reference(family, tmp_path, hidden_act=act)
    ours = Encoder.from_pretrained(tmp_path)
    for T in (1, 9, 64):
        idx, lengths = torch.randint(2, 99, (4, T)), torch.tensor([T, max(1, T // 2), 1, max(1, T - 1)])
        mask = torch.arange(T) < lengths[:, None]
        idx[~mask] = 1  # RoBERTa's reference finds its positions by this id
        types = torch.randint(2, (4, T)) * (family == "bert")
        expected = theirs(idx, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
        torch.testing.assert_close(ours(idx, mask, types)[mask], expected[mask], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(idx[:1]), theirs(idx[:1]).last_hidden_state, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", DEBERTA)
@torch.no_grad()
def test_debertas_equal_the_reference_at_every_length_padded_batches_included(kind, tmp_path):
    family, settings = DEBERTA[kind]
    theirs = reference(family, tmp_path, **({} if kind == "v1" else settings))
    ours = Encoder.from_pretrained(tmp_path)
    longest = settings["max_position_embeddings"]
    for T in (1, 2, 9, 60, 129, 300, 512):
        if T > longest:
            continue
        idx, mask = torch.randint(99, (3, T)), torch.ones(3, T, dtype=torch.long)
        mask[1, (T + 1) // 2:] = 0
        mask[2, :T // 3] = 0  # padding on the left
        expected = theirs(idx, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(ours(idx, mask)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(idx), theirs(idx).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_buckets_are_exact_nearby_shared_far_off_and_end_in_the_last():
    cfg = Encoder(tiny_deberta()).config
    rows = distance_rows(cfg, 512) - cfg.relative_span  # of distances -511 to 511
    assert rows[511 - 16:511 + 17].tolist() == list(range(-16, 17)), "one row a distance up to half the buckets"
    assert rows.tolist() == sorted(rows.tolist()) and (rows + rows.flip(0) == 0)[1:-1].all(), "symmetric and in order"
    far = rows[511 + 17:]
    assert far[0] == 17 and far[-1] == 31 and len(far.unique()) == 15
    assert (distance_rows(cfg, 2000) == 0).sum() > 1 and distance_rows(cfg, 2000).max() == 63, "what is further off shares the outermost rows"


@pytest.mark.parametrize("kind", ["v1", "v2"])
@torch.no_grad()
def test_debertas_heads_and_leftovers_are_no_obstacle_and_names_may_lack_the_prefix(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file
    family, settings = DEBERTA[kind]
    config, cls = ((transformers.DebertaConfig, transformers.DebertaForMaskedLM) if kind == "v1"
                   else (transformers.DebertaV2Config, transformers.DebertaV2ForSequenceClassification))
    theirs = cls(config(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("deberta.") for name in tensors) and any(not name.startswith("deberta.") for name in tensors)
    ours = Encoder.from_pretrained(tmp_path)
    idx = torch.randint(99, (2, 20))
    torch.testing.assert_close(ours(idx), theirs.deberta(idx).last_hidden_state, atol=1e-4, rtol=1e-4)
    bare = {name.removeprefix("deberta."): value for name, value in tensors.items()}
    bare["embeddings.position_ids"] = torch.arange(64)[None]
    bare["embeddings.position_embeddings.weight"] = torch.randn(64, 32)  # published v3 files hold it, unused
    bare["lm_predictions.lm_head.bias"] = torch.randn(99)
    write(tmp_path / "model.safetensors", {name: value for name, value in bare.items() if value.is_floating_point()})
    torch.testing.assert_close(Encoder.from_pretrained(tmp_path)(idx), ours(idx), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_deberta_in_half_precision_stays_finite_on_rows_of_nothing_but_padding_and_at_512(dtype):
    torch.manual_seed(0)
    model = Encoder(tiny_deberta(n_positions=512)).to(dtype).eval()
    for p in model.parameters():
        p.mul_(8)  # scores in the hundreds
    mask = torch.ones(2, 512, dtype=torch.bool)
    mask[1] = False
    assert model(torch.randint(99, (2, 512)), mask).isfinite().all()


def test_a_deberta_learns_through_its_table_and_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = Encoder(tiny_deberta(conv_kernel=3)).train()
    idx, mask = torch.randint(99, (2, 30)), torch.ones(2, 30, dtype=torch.bool)
    mask[1, 20:] = False

    def gradients():
        model.zero_grad()
        model(idx, mask).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    assert model.distances.weight.grad.abs().sum() > 0
    model.checkpoint = True
    for a, b in zip(plain, gradients(), strict=True):
        assert torch.equal(a, b)


# Generation


def prompts(lengths=(1, 7, 12)):
    """Random prompts of these lengths, as rows and as one batch padded on the left with its mask."""
    rows = [torch.randint(1, 99, (1, n)) for n in lengths]
    idx, mask = torch.zeros(len(rows), max(lengths), dtype=torch.long), torch.zeros(len(rows), max(lengths), dtype=torch.bool)
    for i, row in enumerate(rows):
        idx[i, -row.shape[1]:], mask[i, -row.shape[1]:] = row, True
    return rows, idx, mask


@torch.no_grad()
def greedy_without_cache(model, idx, n):
    for _ in range(n):
        idx = torch.cat([idx, model(idx)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx[:, -n:]


def scrambled(model):
    """Weights wide enough that a greedy continuation does not repeat one token."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.4)
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt2", *ROPE])
def test_generating_with_the_cache_equals_generating_without_it(kind):
    learned = kind == "gpt2"
    rope = {} if learned else {**ROPE[kind], "type": ROPE[kind]["rope_type"]}
    if kind == "longrope":  # all within the pre-trained length: what was cached keeps its rotation
        rope.update(original_max_position_embeddings=64)
    model = scrambled(GPT(tiny_config(learned, rope=rope)))
    rows, _, _ = prompts()
    for row in rows:
        expected = greedy_without_cache(model, row, 24)
        assert len(set(expected[0].tolist())) > 3
        assert torch.equal(model.generate(row, max_new_tokens=24), expected)


@pytest.mark.parametrize("learned", [True, False])
def test_a_batch_generates_what_its_rows_generate_one_by_one(learned):
    model = scrambled(GPT(tiny_config(learned)))
    rows, idx, mask = prompts()
    together = model.generate(idx, mask, max_new_tokens=20)
    for row, line in zip(rows, together):
        assert torch.equal(model.generate(row, max_new_tokens=20)[0], line)


def test_generation_equals_the_references(tmp_path):
    theirs = reference("llama", tmp_path, max_position_embeddings=64)
    ours = GPT.from_pretrained(tmp_path)
    _, idx, mask = prompts()
    expected = theirs.generate(idx, attention_mask=mask.long(), max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(ours.generate(idx, mask, max_new_tokens=15), expected[:, idx.shape[1]:])


def test_generation_ends_at_the_stop_token_and_says_nothing_after_it():
    model = scrambled(GPT(tiny_config(True)))
    rows, idx, mask = prompts()
    free = model.generate(idx, mask, max_new_tokens=20)
    stop = free[0, 3].item()
    stopped = model.generate(idx, mask, max_new_tokens=20, stop=stop)
    for line, before in zip(stopped.tolist(), free.tolist()):
        end = before.index(stop) if stop in before else len(line)
        assert line[:end] == before[:len(line)][:end] and set(line[end:]) <= {stop}
    assert model.generate(rows[0], max_new_tokens=20, stop=model.generate(rows[0], max_new_tokens=1).item()).shape == (1, 1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_padded_gpt_batches_equal_the_reference_on_either_side(family, tmp_path):
    theirs = reference(family, tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    idx = torch.randint(99, (3, 12))
    for mask in (torch.arange(12) < torch.tensor([[12], [7], [1]]), torch.arange(12) >= torch.tensor([[0], [5], [11]])):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = theirs(idx, attention_mask=mask.long(), position_ids=positions).logits
        torch.testing.assert_close(ours(idx, mask=mask)[0][mask], expected[mask], atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_references(tmp_path):
    theirs, idx = reference("gpt2", tmp_path), torch.randint(99, (3, 12))
    targets = torch.cat([idx[:, 1:], torch.full((3, 1), -100)], 1)
    targets[0, :5] = -100
    expected = theirs(idx, labels=torch.where(torch.cat([torch.full((3, 1), -100), targets[:, :-1]], 1) >= 0, idx, -100)).loss
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(idx, targets)[1], expected)


# What holds without a reference


@pytest.mark.parametrize("learned", [True, False])
@torch.no_grad()
def test_the_future_is_invisible(learned):
    model, idx = tiny_gpt(learned), torch.randint(99, (2, 40))
    changed = idx.clone()
    changed[:, 25:] = torch.randint(99, (2, 15))
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :25], after[:, :25], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 25:], after[:, 25:], atol=1e-2)


@pytest.mark.parametrize("learned", [True, False])
@torch.no_grad()
def test_padding_is_inert_and_a_row_of_nothing_else_is_finite(learned):
    model, text = tiny_gpt(learned), torch.randint(99, (1, 10))
    alone = model(text)[0]
    for filler in (0, 7):
        pads = torch.full((1, 5), filler)
        left = model(torch.cat([pads, text], 1), mask=torch.tensor([[False] * 5 + [True] * 10]))[0][:, 5:]
        right = model(torch.cat([text, pads], 1))[0][:, :10]
        torch.testing.assert_close(left, alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(right, alone, atol=1e-5, rtol=1e-5)
    assert model(text, mask=torch.zeros(1, 10, dtype=torch.bool))[0].isfinite().all()


@torch.no_grad()
def test_a_classifiers_scores_do_not_depend_on_the_batch(tmp_path):
    reference("bert", tmp_path)
    torch.manual_seed(0)
    texts = [torch.randint(2, 99, (n,)) for n in (3, 9, 20, 1)]
    padded = nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.arange(20) < torch.tensor([len(t) for t in texts])[:, None]
    for backbone in (Encoder.from_pretrained(tmp_path), tiny_gpt(), tiny_gpt(False)):
        model = Classifier(backbone, 3)
        alone = torch.cat([model(t[None]) for t in texts])
        torch.testing.assert_close(model(padded, mask), alone, atol=1e-5, rtol=1e-5)
        assert alone.shape == (4, 3) and model(padded, torch.zeros_like(mask)).isfinite().all()


@torch.no_grad()
def test_a_gpt_classifier_reads_the_last_real_token_on_either_side_of_the_padding():
    model, text = Classifier(tiny_gpt(), 2), torch.randint(99, (1, 6))
    left = model(torch.cat([torch.zeros(1, 4, dtype=torch.long), text], 1), torch.tensor([[False] * 4 + [True] * 6]))
    torch.testing.assert_close(left, model(text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_bfloat16_is_finite_and_near(dtype, tmp_path):
    reference("bert", tmp_path)
    idx, mask = torch.randint(99, (2, 30)), torch.arange(30) < torch.tensor([[30], [4]])
    encoder = Encoder.from_pretrained(tmp_path, dtype=dtype)
    assert encoder(idx, mask).dtype == dtype and Classifier(encoder, 2)(idx, mask).isfinite().all()
    for learned in (True, False):
        model = tiny_gpt(learned)
        expected = model(idx)[0]
        assert (model.to(dtype)(idx)[0] - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("learned", [True, False])
def test_checkpointing_gives_the_same_gradients_to_the_bit(learned):
    model, idx = tiny_gpt(learned).train(), torch.randint(99, (2, 20))
    gradients = []
    for model.checkpoint in (False, True):
        model.zero_grad()
        model(idx, idx)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_checkpointing_keeps_less():
    def kept(model):
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t):
            model(torch.zeros(2, 60, dtype=torch.long))
        return sum(total)

    model = tiny_gpt().train()
    plain = kept(model)
    model.checkpoint = True
    assert kept(model) < plain / 2


def test_too_long_a_text_is_one_clear_error(tmp_path):
    reference("roberta", tmp_path)
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.max_length == 64 and encoder(torch.full((1, 64), 5)).shape == (1, 64, 32)
    for model in (encoder, tiny_gpt()):
        with pytest.raises(ValueError, match="65 tokens: this model has 64 positions"):
            model(torch.zeros(1, 65, dtype=torch.long))


def test_every_projection_has_the_same_name_in_both_classes(tmp_path):
    reference("bert", tmp_path)
    names = {name.rpartition(".")[2] for name, m in Encoder.from_pretrained(tmp_path).named_modules() if isinstance(m, nn.Linear)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    gpt = {name.rpartition(".")[2] for name, m in tiny_gpt(False).named_modules() if isinstance(m, nn.Linear)}
    assert gpt == names | {"gate_proj", "lm_head"}


# Files


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_shards_and_pickles_and_prefixes_hold_the_same_model(tmp_path):
    theirs = reference("llama", tmp_path / "whole")
    ours = GPT.from_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    torch.save({name.removeprefix("model."): p for name, p in theirs.state_dict().items()}, tmp_path / "bin" / "pytorch_model.bin")
    assert same(ours, GPT.from_pretrained(tmp_path / "shards")) and same(ours, load_pretrained(tmp_path / "bin"))
    next((tmp_path / "shards").glob("*-00002*")).unlink()
    with pytest.raises(ValueError, match="00002.*is not there"):
        GPT.from_pretrained(tmp_path / "shards")


def test_heads_of_other_tasks_and_old_names_are_no_obstacle(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(transformers.BertConfig(**SIZE, max_position_embeddings=64))
    model.save_pretrained(tmp_path)
    ours = Encoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): p
           for name, p in model.state_dict().items()}
    torch.save({**old, "bert.embeddings.position_ids": torch.arange(64)}, tmp_path / "pytorch_model.bin")
    assert same(ours, Encoder.from_pretrained(tmp_path))


def write(path, tensors):
    """A safetensors file of float32 tensors, written by hand."""
    header, at = {}, 0
    for name, t in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(t.numpy().tobytes() for t in tensors.values()))


@pytest.fixture
def folder(tmp_path):
    """A tiny GPT-2, written without anyone's library, with its tensors."""
    config = {"model_type": "gpt2", "vocab_size": 20, "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shapes = {"wte.weight": (20, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for name, shape in {"ln_1": (8,), "ln_2": (8,), "attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}.items():
        shapes[f"h.0.{name}.weight"], shapes[f"h.0.{name}.bias"] = shape, shape[-1:]
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    write(tmp_path / "model.safetensors", tensors)
    return tmp_path, tensors


def test_gpt2s_fused_projection_is_split_and_turned(folder):
    path, tensors = folder
    attention = GPT.from_pretrained(path).layers[0].attention
    joined = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(joined, tensors["h.0.attn.c_attn.weight"].t())
    assert torch.equal(attention.v_proj.bias, tensors["h.0.attn.c_attn.bias"][16:])


def test_a_tied_weight_may_lie_under_either_name_or_both(folder):
    path, tensors = folder
    for change in (lambda t: t.update({"lm_head.weight": t["wte.weight"]}), lambda t: t.pop("wte.weight")):
        expected = tensors["wte.weight"]
        change(tensors)
        write(path / "model.safetensors", tensors)
        assert torch.equal(GPT.from_pretrained(path).embed.weight, expected)
        tensors["wte.weight"] = expected


def test_weights_inside_of_a_checkpoint_are_told_from_damage(folder):
    path, tensors = folder
    (path / "model.safetensors").unlink()
    torch.save({"model": tensors, "step": 3}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin holds no tensor, but model, step"):
        GPT.from_pretrained(path)


def test_generating_after_padding_on_the_right_is_refused_and_no_token_is_none():
    model, idx = tiny_gpt().eval(), torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(idx, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]))
    assert model.generate(idx, max_new_tokens=0).shape == (2, 0)


def test_an_embedding_that_is_shared_stays_shared(folder):
    model = GPT.from_pretrained(folder[0])
    assert model.lm_head.weight is model.embed.weight and "lm_head.weight" not in dict(model.named_parameters())


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("h.0.ln_1.bias"), "no tensor for layers.0.norm1.bias"),
    (lambda t: t.update({"h.0.extra.weight": torch.zeros(1)}), "'h.0.extra.weight'"),
    (lambda t: t.update({"h.1.ln_1.weight": torch.zeros(8)}), "'h.1.ln_1.weight'"),
    (lambda t: t.update({"wte.weight": torch.zeros(20, 7)}), r"'wte.weight' has shape \(20, 7\).*\(20, 8\)"),
    (lambda t: t.update({"h.0.attn.c_attn.weight": torch.zeros(8, 23)}), r"c_attn.weight' has shape \(8, 23\)"),
    (lambda t: t.update({"ln_f.bias": torch.zeros(())}), "ln_f.bias"), (lambda t: t.clear(), "it holds no tensor"),
    (lambda t: t.update({"lm_head.weight": t["wte.weight"] + 1}), "'lm_head.weight' is the second one for lm_head.weight, and another"),
    (lambda t: t.update({"transformer.wte.weight": t["wte.weight"] * 0}), "the second one for embed.weight")])
def test_missing_extra_and_misshapen_tensors_are_named_with_their_file(folder, change, words):
    path, tensors = folder
    change(tensors)
    write(path / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=words) as error:
        GPT.from_pretrained(path)
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_file_cut_short_or_damaged_is_named(folder):
    path, _ = folder
    whole = (path / "model.safetensors").read_bytes()
    cases = [whole[:n] for n in (0, 5, 100, len(whole) // 2, len(whole) - 1)] + [whole + b"x", struct.pack("<Q", 2**60) + whole[8:],
                                                                               whole.replace(b'"F32"', b'"F99"', 1)]
    for content in cases:
        (path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="model.safetensors"):
            GPT.from_pretrained(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        GPT.from_pretrained(path)
    (path / "pytorch_model.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        GPT.from_pretrained(path)


@pytest.mark.parametrize("content, words", [
    ("{", "not JSON"), ("[]", "model_type None"), ('{"model_type": "mamba"}', "'mamba' is not known; known are gpt2, llama, bert, roberta"),
    ('{"model_type": "gpt2"}', "lacks 'vocab_size'"),
    ('{"model_type": "gpt2", "vocab_size": 9, "n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 4, "activation_function": "mish"}', "'mish'"),
    ('{"model_type": "llama", "rope_scaling": {"type": "spiral"}}', "'spiral'"), (None, "config.json is not there")])
def test_a_config_that_cannot_be_used_is_named(folder, content, words):
    path, _ = folder
    (path / "config.json").unlink() if content is None else (path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        load_pretrained(path)
    assert "config.json" in str(error.value)


def test_the_wrong_class_is_told_which_one_fits(folder):
    with pytest.raises(ValueError, match="GPT.from_pretrained, not Encoder"):
        Encoder.from_pretrained(folder[0])


def test_weights_of_another_precision_are_cast_and_loading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    model = GPT.from_pretrained(folder[0], dtype=torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state()) and {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training


PEAK = r"""
import re, sys, torch
sys.path.insert(0, sys.argv[2])
from model import GPT
def peak(): return 1024 * int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
GPT.from_pretrained(sys.argv[3])  # a small one first, so that what the libraries take for themselves is not counted
before = peak()
GPT.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loading_needs_memory_for_the_model_and_one_shard_at_most(kind, tmp_path, folder):
    """Eight shards of float32 and a model in bfloat16: reading all of them first would take three times the model."""
    cfg = GPTConfig(4096, 16, 8, 512, 1024, 64, learned_positions=False, rms_norm=True, gated=True, attention_bias=False, mlp_bias=False, tied=False)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(cfg).named_parameters()}
    theirs = {ours.format(i=i): their.format(i=i) for i in range(16) for their, ours in LLAMA_NAMES.items()}
    tensors = {theirs[name.rpartition(".")[0]] + ".weight": torch.full(shape, 0.01) for name, shape in shapes.items()}
    big, names = tmp_path / "big", list(tensors)
    big.mkdir()
    suffix, weight_map = ("safetensors", {}) if kind == "safetensors" else ("bin", {})
    single = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    for shard in range(8):
        part = {name: tensors[name] for name in names[shard::8]}
        file = f"{single.rpartition('.')[0]}-{shard}.{suffix}"
        (write if kind == "safetensors" else torch.save)(*((big / file, part) if kind == "safetensors" else (part, big / file)))
        weight_map.update(dict.fromkeys(part, file))
    (big / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (big / "config.json").write_text(json.dumps(dict(model_type="llama", vocab_size=4096, num_hidden_layers=16, num_attention_heads=8, hidden_size=512,
                                                     intermediate_size=1024, max_position_embeddings=64, tie_word_embeddings=False)))
    n_bytes = 2 * sum(t.numel() for t in tensors.values())
    shard_bytes = max(path.stat().st_size for path in big.iterdir())
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    run = subprocess.run([sys.executable, "-c", PEAK, str(big), root, str(folder[0])], capture_output=True, text=True, check=True)
    grown = int(run.stdout)
    assert 0.8 * n_bytes < grown < n_bytes + shard_bytes + 8e6, (grown, n_bytes, shard_bytes)
