"""train.py on toy models: every method on every kind of task, the same numbers again, resumed at any moment, and bad input in one line."""
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.utils.flop_counter import FlopCounterMode

import dual_lora
import train
from data import batches, instruct
from data.gguf import write_safetensors
from data.tasks import TASKS, load_task
from data.tokenizer import Tokenizer, byte_alphabet
from dual_lora import load_adapter
from model import BERT_NAMES, DEBERTA_NAMES, GPT, LLAMA_NAMES, Classifier, Encoder, EncoderConfig, GPTConfig, load_pretrained

ROOT = Path(train.__file__).resolve().parent
WORDS = "[PAD] [UNK] [CLS] [SEP] good bad fine poor a the film was very not and so plot music scene actor".split()


def save_model(folder, model, names, config):
    folder.mkdir()
    state, parameters = {}, dict(model.named_parameters())
    for i in range(len(model.layers)):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                if f"{ours.format(i=i)}.{kind}" in parameters:
                    state[f"{theirs.format(i=i)}.{kind}"] = parameters[f"{ours.format(i=i)}.{kind}"].detach().numpy()
    write_safetensors(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def write_task(folder, kind, n=60):
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", n), ("validation", 23)):
        lines = []
        for _ in range(count):
            words = [WORDS[8 + i] for i in torch.randint(12, (int(torch.randint(1, 9, (1,), generator=draw)),), generator=draw).tolist()]
            label = int(torch.randint(2, (1,), generator=draw))
            text = " ".join(words + [["bad", "good"][label]])
            lines.append({"classification": {"text_a": text, "label": label},
                          "pairs": {"text_a": text, "text_b": " ".join(words[::-1]), "label": label},
                          "regression": {"text_a": text, "label": label + 0.5},
                          "choice": {"prompt": text, "choices": [" poor", " fine", " so so"][:2 + len(words) % 2], "label": label},
                          "instruct": {"instruction": f"{text}?", "output": f"the correct answer is option{label + 1}", "answer": f"option{label + 1}",
                                       "prompt": text, "choices": [" bad", " good"], "label": label, "set": "winogrande" if label else "piqa"}}[kind])
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder with models `bert` and `llama` and tasks of every kind, all tiny."""
    root = tmp_path_factory.mktemp("toys")
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(len(WORDS), 2, 2, 16, 32, 64))
    save_model(root / "bert", encoder, BERT_NAMES, {"model_type": "bert", "vocab_size": len(WORDS), "num_hidden_layers": 2, "hidden_size": 16,
                                                    "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64})
    (root / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    gpt = GPT(GPTConfig(258, 2, 2, 16, 32, 1024, learned_positions=False, rms_norm=True, gated=True, activation="silu", attention_bias=False, mlp_bias=False))
    save_model(root / "llama", gpt, {**LLAMA_NAMES, "lm_head": "none"},
               {"model_type": "llama", "vocab_size": 258, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32,
                "max_position_embeddings": 1024, "tie_word_embeddings": True, "rms_norm_eps": 1e-5})
    vocab = {character: i for i, character in enumerate(byte_alphabet())}
    spec = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"},
            "added_tokens": [{"id": 256, "content": "<s>"}, {"id": 257, "content": "</s>"}]}
    (root / "llama" / "tokenizer.json").write_text(json.dumps(spec))
    deberta = Encoder(EncoderConfig(len(WORDS), 2, 2, 16, 32, 64, 0, learned_positions=False, relative=("c2p", "p2c"), relative_span=32,
                                    relative_buckets=32, relative_furthest=64, relative_shared=True, relative_norm=True))
    save_model(root / "deberta", deberta, {theirs: ours for theirs, ours in DEBERTA_NAMES.items() if "in_proj" not in theirs and "_bias" not in theirs},
               {"model_type": "deberta-v2", "vocab_size": len(WORDS), "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
                "intermediate_size": 32, "max_position_embeddings": 64, "relative_attention": True, "pos_att_type": "c2p|p2c", "position_buckets": 32,
                "share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0})
    (root / "deberta" / "vocab.txt").write_text("\n".join(WORDS))
    for kind in ("classification", "pairs", "regression", "choice", "instruct"):
        write_task(root / kind, kind)
    return root


BASE = ["--max_steps=6", "--batch_size=8", "--eval_interval=3", "--log_interval=2", "--checkpoint_interval=2", "--warmup_steps=3", "--device=cpu",
        "--learning_rate=0.01", "--max_length=64"]


def arguments(toys, out, model="bert", task="classification", method="dual_lora", *more):
    base = [a for a in BASE if method == "dual_lora" or "warmup_steps" not in a]
    return [f"--model={toys / model}", f"--task={toys / task}", f"--method={method}", f"--out_dir={out}", *base, *more]


def run(*args):
    assert train.main(arguments(*args)) == 0
    return [json.loads(line) for line in (Path(args[1]) / "metrics.jsonl").read_text().splitlines()]


# What a run does


@pytest.mark.parametrize("model, task", [("bert", "classification"), ("bert", "pairs"), ("bert", "regression"), ("bert", "choice"),
                                         ("deberta", "pairs"), ("llama", "classification"), ("llama", "pairs"), ("llama", "regression"), ("llama", "choice")])
@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_runs_on_every_kind_of_task_and_its_file_restores_the_result(model, task, method, toys, tmp_path, capsys):
    if (model, task, method) == ("llama", "choice", "head"):
        assert train.main(arguments(toys, tmp_path, model, task, method)) == 1
        assert "--method=head" in capsys.readouterr().err
        return
    lines = run(toys, tmp_path, model, task, method)
    final, shown = lines[-1], capsys.readouterr().out
    assert final["final"] is True and final["metric"] == ("pearson" if task == "regression" else "accuracy")
    assert f"{final['metric']} {final['value']:.4f} at the last step" in shown and f"{final['trainable']:,}" in shown and "adapter.pt" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.pt", "checkpoint.pt", "metrics.jsonl"]
    assert ("frozen" in final["report"]) == (method == "dual_lora")

    # the file, put on a fresh base model with another head, scores the same
    spec = load_task(str(toys / task))
    fresh = load_pretrained(toys / model)
    if not (model == "llama" and task == "choice"):
        fresh = Classifier(fresh, 1 if task == "choice" else spec.n_classes)
    load_adapter(fresh, tmp_path / "adapter.pt")
    examples = train.encode_examples(spec, spec.validation, Tokenizer(toys / model), model == "llama", 64)
    values = train.evaluate(fresh, spec, examples, Tokenizer(toys / model), torch.device("cpu"))
    assert values == pytest.approx(final["validation"], abs=1e-6)


# Protocols, parts and metrics


@pytest.mark.parametrize("protocol", ["instruct", "llm_adapters"])
def test_a_gpt_learns_to_write_its_answer_and_every_number_says_how_it_came_about(protocol, toys, tmp_path, capsys, monkeypatch):
    """Every label is one option's, so that 120 steps suffice to write it; untrained, nothing can be extracted."""
    task = tmp_path / "task"
    task.mkdir()
    for split in ("train", "validation"):
        lines = [json.loads(line) for line in (toys / "instruct" / f"{split}.jsonl").read_text().splitlines()]
        lines = [{**line, "set": "piqa" if i % 2 else "winogrande"} for i, line in enumerate(lines) if line["label"]]
        (task / f"{split}.jsonl").write_text("".join(json.dumps({**line, "output": "option2", "answer": "option2"}) + "\n" for line in lines))
    args = [f"--model={toys / 'llama'}", f"--task={task}", f"--protocol={protocol}", f"--out_dir={tmp_path / 'out'}", "--max_length=640",
            "--device=cpu", "--eval_examples=3"]
    before = train.train(train.parse([*args, "--eval_only=true"]))
    assert before["validation"]["failed_extractions"] == 1 and before["value"] == 0 and not (tmp_path / "out").exists()
    assert train.main([*args, "--method=full", "--max_steps=120", "--learning_rate=0.01", "--batch_size=8"]) == 0
    final = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    if protocol == "instruct":  # theirs asks in another template than it trained on, which upsets so small a model
        # winogrande's answers are option1 or option2; piqa's are solution1 or solution2, so that there nothing is found
        assert final["validation"]["accuracy_winogrande"] == 1 and final["validation"]["failed_extractions_piqa"] == 1 and final["value"] == 0.5
    assert final["examples"] == 6 and final["protocol"].startswith(f"{protocol}, template {instruct.template_hash(protocol)}")
    shown = capsys.readouterr().out
    assert final["protocol"] in shown and "failed_extractions" in shown and "trained on response alone" in shown


def test_under_instruct_the_training_text_begins_with_the_evaluations_prompt_and_the_loss_is_on_the_response(toys):
    spec, tokenizer = load_task(str(toys / "instruct")), Tokenizer(toys / "llama")
    for on_prompt in (False, True):
        for example, raw in zip(train.encode_examples(spec, spec.train[:5], tokenizer, True, 1000, "instruct", on_prompt), spec.train):
            (ids, boundary), = example.rows
            n = len(example.prompt)
            assert tuple(ids[:n]) == example.prompt and tokenizer.decode(ids[n:-1]) == raw["output"] and ids[-1] == tokenizer.eos
            assert boundary == (1 if on_prompt else n) and raw["instruction"] in tokenizer.decode(ids)


@pytest.mark.parametrize("on_prompt", [False, True])
def test_under_llm_adapters_the_row_is_the_joint_texts_own_tokens(on_prompt, toys, tmp_path):
    """Their template ends in spaces, and the last one makes a token with the response's first word; the loss is on as many as are left."""
    spec = load_task(str(toys / "instruct"))
    shutil.copytree(toys / "llama", tmp_path / "llama")
    content = json.loads((tmp_path / "llama" / "tokenizer.json").read_text())
    content["model"]["vocab"].update({"Ġt": 258, "ĠĠ": 259})
    content["model"]["merges"] = ["Ġ t", "Ġ Ġ"]
    (tmp_path / "llama" / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(tmp_path / "llama")
    for example, raw in zip(train.encode_examples(spec, spec.train[:5], tokenizer, True, 1000, "llm_adapters", on_prompt), spec.train):
        prompt = instruct.prompt(raw["instruction"], "llm_adapters", training=True)
        (ids, boundary), = example.rows
        assert ids[:-1] == tokenizer.encode(prompt + raw["output"]) != tokenizer.encode(prompt) + tokenizer.encode(raw["output"])
        assert ids[-1] == tokenizer.eos and boundary == (1 if on_prompt else len(tokenizer.encode(prompt)))


def test_near_duplicates_are_not_held_out_from_each_other(toys):
    task = load_task(str(toys / "classification"))
    plain = train.hold_out(task)
    task.key = lambda example: example["text_a"].split()[0]
    held = train.hold_out(task)
    for whole in (plain, held):
        assert sorted(map(json.dumps, whole.train + whole.validation)) == sorted(map(json.dumps, task.train)) and len(whole.validation) >= 6
    twins = [{task.key(example) for example in whole.train} & {task.key(example) for example in whole.validation} for whole in (plain, held)]
    assert twins[0] and not twins[1]
    assert all(TASKS[name].key for name in ("sarcasm", "quartz")), "which bring their keys"


def test_of_a_mean_over_parts_the_standard_error_is_that_of_the_mean(toys, tmp_path):
    task, examples = load_task(str(toys / "instruct")), [batches.Example([], 0, set=name) for name in ["a"] * 100 + ["b"] * 25]
    values = {"accuracy": 0.65, "accuracy_a": 0.5, "accuracy_b": 0.8}
    assert train.error_of(task, values, examples) == pytest.approx((0.25 / 100 + 0.16 / 25) ** 0.5 / 2)
    assert train.error_of(task, {"accuracy": 0.5}, examples[:100]) == pytest.approx(0.05)
    assert train.error_of(dataclasses.replace(task, metric="f1"), {"f1": 0.5}, examples[:100]) is None
    final = run(toys, tmp_path, "llama", "instruct")[-1]
    assert final["standard_error"] == train.error_of(task, final["validation"], [batches.Example([], 0, set=example["set"]) for example in task.validation])


def test_parts_of_the_validation_data_are_scored_apart_and_averaged(toys, tmp_path, capsys):
    values = run(toys, tmp_path, "llama", "instruct")[-1]["validation"]
    assert values["accuracy"] == pytest.approx((values["accuracy_piqa"] + values["accuracy_winogrande"]) / 2)
    assert values["accuracy_norm"] == pytest.approx((values["accuracy_norm_piqa"] + values["accuracy_norm_winogrande"]) / 2)
    assert "accuracy_piqa" in capsys.readouterr().out


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "f1"])
def test_the_main_metric_can_be_chosen_and_the_others_stand_beside_it(metric, toys, tmp_path):
    final = run(toys, tmp_path, "bert", "classification", "dual_lora", f"--metric={metric}")[-1]
    assert final["metric"] == metric and final["value"] == final["validation"][metric] and set(final["validation"]) == {"accuracy", "matthews", "f1"}
    assert (final["standard_error"] is None) == (metric != "accuracy")


def test_glue_comes_from_data_dir_with_its_own_metric(toys, tmp_path, capsys):
    (tmp_path / "glue").mkdir()
    (tmp_path / "glue" / "cola").symlink_to(toys / "classification")
    args = [a for a in arguments(toys, tmp_path / "out") if "--task" not in a]
    assert train.main([*args, "--task=cola", f"--data_dir={tmp_path / 'glue'}"]) == 0
    assert "cola, dual_lora: matthews" in capsys.readouterr().out
    assert train.main([*args, "--task=rte", f"--data_dir={tmp_path / 'glue'}"]) == 1
    assert "has neither rte/train.jsonl" in capsys.readouterr().err


def test_every_family_and_group_of_tasks_has_a_preset_with_its_source(toys):
    for family in train.FAMILY:
        for name in ("sarcasm", "cola", "arc_easy", train.MIX):
            task = dataclasses.replace(load_task(str(toys / "choice")), name=name, train=[{}] * 1000)
            preset = train.find_preset(family, task)
            cfg = train.complete(train.Config(), preset, task)
            assert preset.source and cfg.max_steps >= 1 and cfg.learning_rate > 0 and None not in (cfg.targets, cfg.r, cfg.max_length, cfg.lr_warmup_steps)
    glue = dataclasses.replace(task, name="rte")
    assert train.complete(train.Config(), train.find_preset("roberta", glue), glue).max_steps == 80 * (1000 // 16)
    warmups = {steps: train.complete(train.Config(max_steps=steps), train.find_preset("bert", task), task).warmup_steps for steps in (1, 20, 89, 90, 1000)}
    assert warmups == {1: 1, 20: 6, 89: 29, 90: 30, 1000: 30}, "a third of the run at most"
    given = train.complete(train.Config(epochs=2, r=4, learning_rate=1.0, max_length=9), train.find_preset("llama", task), task)
    assert (given.max_steps, given.r, given.learning_rate, given.max_length, given.alpha) == (2 * (1000 // 16), 4, 1.0, 9, 64.0)


def test_what_comes_from_a_preset_is_printed_at_the_start(toys, tmp_path, capsys):
    args = [a for a in arguments(toys, tmp_path) if "warmup" not in a and "learning_rate" not in a]
    assert train.main(args) == 0
    shown = capsys.readouterr().out
    assert "dual_lora on q_proj,v_proj, r1 = 4, r2 = 4, alpha 16, dropout 0, warm-up 2; learning rate 0.005, 6 steps of 8, 64 tokens at most" in shown
    assert "comes from a preset: ours" in shown


def test_frozen_weights_in_bfloat16_train_and_adapters_stay_float32(toys, tmp_path):
    for model, task in (("bert", "classification"), ("llama", "choice")):
        run(toys, tmp_path / model, model, task, "dual_lora", "--weights=bfloat16")
        state = torch.load(tmp_path / model / "adapter.pt", weights_only=True)["state"]
        assert all(value.dtype == torch.float32 for name, value in state.items() if "lora_" in name)


@pytest.mark.parametrize("model, task, option, words", [
    ("bert", "choice", "--protocol=instruct", "--protocol=instruct is for a GPT on multiple choice"),
    ("llama", "choice", "--protocol=instruct", 'examples without "instruction"'), ("bert", "classification", "--eval_only=true", "untrained head"),
    ("bert", "classification", "--metric=pearson", "--metric=pearson: classification has accuracy, matthews, f1"),
    ("llama", "instruct", "--protocol=instruct --max_length=1000", "1024 positions, 32 of them for the answer"),
    ("llama", "choice", "--metric=f1", "--metric=f1: choice has accuracy"), ("bert", "classification", "--data_dir=x", "--data_dir=x does nothing")])
def test_what_does_not_fit_together_is_one_line(model, task, option, words, toys, tmp_path, capsys):
    assert train.main([*arguments(toys, tmp_path / "out", model, task), *option.split()]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_training_learns_what_there_is_to_learn(toys, tmp_path):
    lines = run(toys, tmp_path, "bert", "classification", "dual_lora", "--max_steps=150", "--targets=q_proj,v_proj,up_proj,down_proj",
                "--eval_interval=150", "--learning_rate=0.02", "--r=8")
    assert lines[-1]["value"] >= 0.95 > 0.7 > lines[-1]["majority"]


def test_the_same_seed_writes_the_same_file_and_another_does_not(toys, tmp_path):
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(toys, tmp_path / name, "bert", "classification", "dual_lora", f"--seed={seed}", "--dropout=0.2")
        files.append((tmp_path / name / "metrics.jsonl").read_bytes())
    assert files[0] == files[1] != files[2]


def test_the_first_forward_pass_is_the_pretrained_models(toys, tmp_path):
    first = [run(toys, tmp_path / m, "bert", "classification", m, "--log_interval=1")[0]["loss"] for m in ("dual_lora", "lora", "dora", "head", "full")]
    assert first == pytest.approx([first[0]] * 5, abs=1e-6), "one head, one batch, and nothing added yet"


def test_methods_see_the_same_batches_and_start_from_the_same_head(toys, tmp_path, monkeypatch):
    seen = {}
    for method in ("dual_lora", "lora", "full"):
        batches, heads, original = [], [], train.training_loss

        def spy(model, task, batch, pad, device):
            heads.append(model.head.weight.detach().clone())
            batches.append([example.rows for example in batch])
            return original(model, task, batch, pad, device)

        monkeypatch.setattr(train, "training_loss", spy)
        run(toys, tmp_path / method, "bert", "classification", method)
        monkeypatch.setattr(train, "training_loss", original)
        seen[method] = batches, heads[0]
    assert seen["dual_lora"][0] == seen["lora"][0] == seen["full"][0] and len(seen["lora"][0]) == 6
    assert torch.equal(seen["dual_lora"][1], seen["lora"][1]) and torch.equal(seen["full"][1], seen["lora"][1])


@pytest.mark.parametrize("model, task", [("bert", "classification"), ("llama", "choice"), ("bert", "choice")])
def test_micro_batches_and_checkpointing_do_not_change_the_numbers(model, task, toys, tmp_path):
    whole = run(toys, tmp_path / "whole", model, task)
    for name, option in (("micro", "--micro_batch_size=3"), ("check", "--checkpointing=true")):
        pieces = run(toys, tmp_path / name, model, task, "dual_lora", option)
        assert [line["loss"] for line in pieces if "loss" in line] == pytest.approx([line["loss"] for line in whole if "loss" in line], rel=1e-4)


def test_bfloat16_runs_and_lands_near(toys, tmp_path):
    wide = run(toys, tmp_path / "a", "llama", "choice")
    narrow = run(toys, tmp_path / "b", "llama", "choice", "dual_lora", "--dtype=bfloat16")
    assert narrow[0]["loss"] != wide[0]["loss"] and narrow[0]["loss"] == pytest.approx(wide[0]["loss"], rel=0.02)


def test_only_what_the_method_trains_has_moved(toys, tmp_path):
    base = Classifier(load_pretrained(toys / "bert"), 2).state_dict()
    for method in ("dual_lora", "head", "full"):
        run(toys, tmp_path / method, "bert", "classification", method)
        state = torch.load(tmp_path / method / "adapter.pt", weights_only=True)["state"]
        assert {n for n in state if "lora_" not in n} == (set(base) if method == "full" else {"head.weight", "head.bias"})
        assert any("lora_" in name for name in state) == (method == "dual_lora")


def test_weight_decay_leaves_adapters_and_vectors_alone_unless_asked():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    dual_lora.apply_adapters(model, ["q_proj"], r1=2, r2=2)
    model.head.requires_grad_(True)
    for asked in (0.0, 0.3):
        groups = train.make_optimizer(model, train.Config(learning_rate=1.0, weight_decay=0.1, adapter_weight_decay=asked)).param_groups
        assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(asked, 4), (0.1, 1), (0.0, 1)]


def test_a_fresh_run_leaves_nothing_of_the_one_before(toys, tmp_path, monkeypatch):
    run(toys, tmp_path)

    def fails(*args):
        raise ValueError("at the first step")

    monkeypatch.setattr(train, "training_loss", fails)
    assert train.main(arguments(toys, tmp_path)) == 1
    assert not (tmp_path / "adapter.pt").exists() and "final" not in (tmp_path / "metrics.jsonl").read_text()


# Data


def examples_of(toys, model, task, max_length=64):
    spec = load_task(str(toys / task))
    return train.encode_examples(spec, spec.train, Tokenizer(toys / model), model == "llama", max_length)


def test_batches_hold_every_example_once_an_epoch_and_little_padding(toys):
    examples = examples_of(toys, "llama", "choice") * 10
    epochs = [train.epoch_batches(examples, 8, seed=1, epoch=e) for e in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert sorted(i for batch in epochs[0] for i in batch) == list(range(600)) and all(len(batch) == 8 for batch in epochs[0])
    lengths = [[len(examples[i].rows[0][0]) for i in batch] for batch in epochs[0]]
    assert sum(map(sum, lengths)) > 0.9 * sum(8 * max(batch) for batch in lengths)
    assert len(train.epoch_batches(examples[:5], 8, 0, 0)) == 1, "fewer examples than a batch"


class Letters:
    """A tokenizer of one id a character."""
    cls, sep, bos, eos, pad, add_bos, double_sep = 1, 2, None, 3, 0, False, False

    def encode(self, text):
        return [ord(c) for c in text]


def test_encoder_rows_have_their_control_tokens_and_fit():
    tokenizer, a, b = Letters(), list(range(10, 20)), list(range(30, 33))
    assert batches.encoder_row(tokenizer, a, None, 6) == ([1, 10, 11, 12, 13, 2], 6)
    assert batches.encoder_row(tokenizer, a, b, 9) == ([1, 10, 11, 12, 2, 30, 31, 32, 2], 5)
    assert batches.encoder_row(tokenizer, a, b, 9, keep_end=True)[0] == [1, 17, 18, 19, 2, 30, 31, 32, 2]
    tokenizer.double_sep = True  # as RoBERTa's
    assert batches.encoder_row(tokenizer, a, b, 99) == ([1, *a, 2, 2, *b, 2], 13)
    for length in range(8, 20):
        for pair in (([], []), (a, []), ([], a), (a, a)):
            row, boundary = batches.encoder_row(tokenizer, *pair, length)
            assert len(row) <= length and row[boundary - 1] == 2


def test_gpt_rows_keep_the_answer_and_the_prompts_end():
    tokenizer = Letters()
    assert batches.gpt_row(tokenizer, [1, 2, 3, 4, 5], [8, 9], 5) == ([3, 4, 5, 8, 9], 3)
    assert batches.gpt_row(tokenizer, [1, 2], [4, 5, 6, 7, 8], 4) == ([1, 2, 4, 5], 2)
    assert batches.gpt_row(tokenizer, [], [8], 9) == ([3, 8], 1), "something must come before the first answer token"
    tokenizer.bos, tokenizer.add_bos = 7, True
    assert batches.gpt_row(tokenizer, [1, 2, 3], [8], 4) == ([7, 2, 3, 8], 3) and batches.gpt_row(tokenizer, [], [8], 4) == ([7, 8], 1)


def test_very_long_and_empty_texts_are_fine(toys, tmp_path):
    lines = [{"text_a": "good " * 20_000, "label": 1}, {"text_a": "", "label": 0}, {"text_a": "a" * 100_000, "text_b": "", "label": 0}] * 3
    choice = [{"prompt": "x" * 100_000, "choices": ["", "y" * 100_000], "label": 0}, {"prompt": "", "choices": ["", " b"], "label": 1}] * 3
    for name, content in (("text", lines), ("choice", choice)):
        (tmp_path / name).mkdir()
        for split in ("train", "validation"):
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
        for model in ("bert", "llama"):
            out = tmp_path / f"{name}-{model}"
            args = [a for a in arguments(toys, out, model) if "task" not in a]
            assert train.main([*args, f"--task={tmp_path / name}", "--max_length=32", "--max_steps=2"]) == 0


def test_the_training_loss_is_the_models_own_with_the_prompt_masked(toys):
    model, examples = load_pretrained(toys / "llama"), examples_of(toys, "llama", "choice")[:5]
    loss, _, n, _ = train.training_loss(model, load_task(toys / "choice"), examples, 0, torch.device("cpu"))
    rows = [example.rows[example.label] for example in examples]
    idx, _, _ = train.collate(rows, 0, torch.device("cpu"))
    targets = torch.full_like(idx, -100)
    for r, (ids, boundary) in enumerate(rows):
        targets[r, boundary - 1:len(ids) - 1] = torch.tensor(ids[boundary:])
    torch.testing.assert_close(loss / n, model(idx, targets)[1])


@pytest.mark.parametrize("model, task", [("bert", "classification"), ("llama", "choice"), ("bert", "choice"), ("llama", "pairs")])
def test_a_score_does_not_depend_on_its_batch(model, task, toys, monkeypatch):
    spec, backbone = load_task(str(toys / task)), load_pretrained(toys / model)
    whole = backbone if (model, task) == ("llama", "choice") else Classifier(backbone, 1 if task == "choice" else 2)
    examples, seen = examples_of(toys, model, task), []
    monkeypatch.setattr(train, "score", lambda metric, predictions, labels: seen.append(predictions) or {"accuracy": 0.0})
    for tokens in (1, 300, 10**6):
        train.evaluate(whole, spec, examples, Tokenizer(toys / model), torch.device("cpu"), tokens)
    assert seen[0] == seen[-1] or seen[:len(seen) // 3] == seen[-(len(seen) // 3):]


def test_accuracy_norm_divides_by_bytes(toys):
    class Fixed(nn.Module):
        pass

    spec = load_task(toys / "choice")
    model = load_pretrained(toys / "llama")
    examples = examples_of(toys, "llama", "choice")
    values = train.evaluate(model, spec, examples, Tokenizer(toys / "llama"), torch.device("cpu"))
    right = 0
    for example in examples:
        scores = []
        for (ids, boundary), n_bytes in zip(example.rows, example.n_bytes):
            logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)[0]
            scores.append(sum(logprobs[t - 1, ids[t]].item() for t in range(boundary, len(ids))) / n_bytes)
        right += scores.index(max(scores)) == example.label
    assert values["accuracy_norm"] == pytest.approx(right / len(examples))


# Resuming


class Stop(Exception):
    pass


@pytest.mark.parametrize("model, task, method", [("bert", "classification", "dual_lora"), ("llama", "choice", "dora"), ("bert", "classification", "full")])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_run_that_stops_anywhere_resumes_to_the_same_file(model, task, method, step, toys, tmp_path, monkeypatch):
    more = ["--log_interval=4", "--checkpoint_interval=1"]  # so that checkpoints fall between progress lines
    more += ["--dropout=0.2"] if method != "full" else []
    run(toys, tmp_path / "whole", model, task, method, *more)
    original = train.check_losses

    def stop(run):
        original(run)
        if run.step >= step:
            raise Stop

    monkeypatch.setattr(train, "check_losses", stop)
    with pytest.raises(Stop):
        train.main(arguments(toys, tmp_path / "cut", model, task, method, *more))
    monkeypatch.setattr(train, "check_losses", original)
    torch.manual_seed(99)
    run(toys, tmp_path / "cut", model, task, method, *more, "--resume=true")
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    ours, theirs = (torch.load(tmp_path / name / "adapter.pt", weights_only=True)["state"] for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()


def test_what_the_clip_has_cut_is_counted_across_an_interruption(toys, tmp_path, monkeypatch):
    def tight(g_d, DC, ste, clip_count):  # counts what has a gradient: on a toy model the real clip never bites
        clip_count += torch.tensor([(g_d != 0).sum(), g_d.numel()])
        return g_d

    monkeypatch.setattr(dual_lora, "clip_and_count", tight)
    more = ["--checkpoint_interval=1"]
    whole = run(toys, tmp_path / "whole", "bert", "classification", "dual_lora", *more)[-1]["report"]["clipped"]
    original = train.check_losses

    def stop(run):
        original(run)
        if run.step == 5:
            raise Stop

    monkeypatch.setattr(train, "check_losses", stop)
    with pytest.raises(Stop):
        train.main(arguments(toys, tmp_path / "cut", "bert", "classification", "dual_lora", *more))
    monkeypatch.setattr(train, "check_losses", original)
    resumed = run(toys, tmp_path / "cut", "bert", "classification", "dual_lora", *more, "--resume=true")
    assert 0 < whole == resumed[-1]["report"]["clipped"]


def test_the_learning_rate_rises_then_falls_to_zero_and_is_what_the_optimizer_uses(toys, tmp_path, monkeypatch):
    used, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: used.append({g["lr"] for g in self.param_groups}) or step(self))
    run(toys, tmp_path, "bert", "classification", "lora", "--max_steps=8", "--lr_warmup_steps=4")
    assert all(len(rates) == 1 for rates in used)
    used = [rates.pop() for rates in used]
    assert used == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.0075, 0.005, 0.0025]), "the peak is reached"
    assert train.rate(train.Config(learning_rate=1.0, lr_warmup_steps=9, max_steps=8), 7) == pytest.approx(8 / 9)


def test_a_finished_run_resumed_is_finished(toys, tmp_path, capsys):
    run(toys, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(toys, tmp_path, "bert", "classification", "dual_lora", "--resume=true")
    assert (tmp_path / "metrics.jsonl").read_bytes() == before and (tmp_path / "adapter.pt").exists()


def test_a_run_that_ended_inside_the_warmup_is_resumed_with_dW_as_it_stood(toys, tmp_path):
    args = [*arguments(toys, tmp_path), "--warmup_steps=30"]
    first = train.train(train.parse(args))
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)
    again = train.train(train.parse([*args, "--resume=true"]))
    assert torch.load(tmp_path / "adapter.pt", weights_only=True)["layers"] == saved["layers"] and "0.2" in str(saved["layers"])
    assert again["predictions"] == first["predictions"] and again["report"]["relative_norm"] == first["report"]["relative_norm"] < 0.03


def test_a_killed_process_resumes_to_the_same_file(toys, tmp_path):
    more = ["--max_steps=40", "--checkpoint_interval=3"]
    command = [sys.executable, str(ROOT / "train.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command + arguments(toys, tmp_path / "whole", "bert", "classification", "dual_lora", *more), check=True, env=environment,
                   stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command + arguments(toys, tmp_path / "cut", "bert", "classification", "dual_lora", *more), env=environment,
                               stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "checkpoint.pt").exists():
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = subprocess.run(command + arguments(toys, tmp_path / "cut", "bert", "classification", "dual_lora", *more, "--resume=true"), env=environment,
                             capture_output=True, text=True, check=True)
    assert "resumed at step" in resumed.stdout
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def test_resuming_without_a_checkpoint_starts_afresh_and_with_another_runs_is_refused(toys, tmp_path, capsys):
    run(toys, tmp_path, "bert", "classification", "dual_lora", "--resume=true")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert train.main(arguments(toys, tmp_path, "bert", "classification", "dual_lora", "--resume=true", "--alpha=8")) == 1
    error = capsys.readouterr().err
    assert "alpha was 16.0, is 8.0" in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:1000])
    assert train.main(arguments(toys, tmp_path, "bert", "classification", "dual_lora", "--resume=true")) == 1
    assert "checkpoint.pt is cut short" in capsys.readouterr().err


# Faults and bad input


def test_a_loss_that_becomes_nan_names_the_step_and_keeps_the_last_good_checkpoint(toys, tmp_path, monkeypatch, capsys):
    original, calls = train.training_loss, []

    def poisoned(*args):
        loss, *rest = original(*args)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 5 else 1), *rest

    monkeypatch.setattr(train, "training_loss", poisoned)
    assert train.main(arguments(toys, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "NaN or infinite at step 4;" in error and "checkpoint.pt" in error and error.count("\n") == 1
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 4 and all(p.isfinite().all() for p in saved["parameters"].values())
    assert not (tmp_path / "adapter.pt").exists()


def test_a_full_disk_is_one_line_and_no_half_file(toys, tmp_path, monkeypatch, capsys):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert train.main(arguments(toys, tmp_path)) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and error.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("option, words", [
    ("--tusk=sarcasm", "'--tusk=sarcasm' is no option: write --name=value with one of task, data_dir, model"), ("sarcasm", "no option"), ("--task", "no option"),
    ("--method=qlora", "--method=qlora: choose from dual_lora, lora, dora, full, head"), ("--ste=soft", "clip, xnor, identity"),
    ("--r=three", "--r=three: it should be a whole number"), ("--max_steps=1e3", "whole number"), ("--alpha=nan", "finite"), ("--alpha=inf", "finite"),
    ("--alpha=0", "above 0"), ("--learning_rate=-1", "above 0"), ("--learning_rate=x", "a number"), ("--batch_size=0", "at least 1"), ("--r=0", "at least 1"),
    ("--r=7", "--r=7: Dual LoRA halves it"), ("--dropout=1", "below 1"), ("--init_std=0", "above 0"), ("--max_length=2", "at least 8"),
    ("--resume=yes", "--resume=yes: true or false"), ("--dtype=float16", "--dtype=float16: its loss scaler"), ("--dtype=int8", "float32, bfloat16"),
    ("--epochs=3", "give one of them"), ("--epochs=0", "above 0"), ("--protocol=chat", "likelihood, instruct, llm_adapters"),
    ("--metric=bleu", "choose from accuracy"), ("--train_on_prompt=true", "does nothing with --protocol=likelihood"), ("--weights=float16", "--weights=float16"),
    ("--seed=-1", "at least 0"), ("--weight_decay=-0.1", "at least 0"), ("--direction=up", "sign, none")])
def test_a_bad_option_is_one_line_with_what_would_be_right(option, words, toys, tmp_path, capsys):
    assert train.main([*arguments(toys, tmp_path / "out"), option]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("method, option", [("lora", "--ste=xnor"), ("lora", "--r1=2"), ("full", "--r=4"), ("head", "--targets=v_proj"), ("dora", "--warmup_steps=3")])
def test_an_option_that_would_do_nothing_is_refused(method, option, toys, tmp_path, capsys):
    assert train.main([*arguments(toys, tmp_path / "out", "bert", "classification", method), option]) == 2
    assert f"{option} does nothing with --method={method}" in capsys.readouterr().err


@pytest.mark.parametrize("option, words", [
    ("--task=nothing", "unknown task 'nothing': it is one of sarcasm"), ("--model=nothing", "model 'nothing' is none of minilm, smollm2 and no folder; as a name on the Hub: could not reach"),
    ("--targets=q_proj,typo", "target 'typo' matches no linear layer of this model: choose from down_proj, head, k_proj"),
    ("--targets=", "at least one name"), ("--device=cuda:99", "--device=cuda:99: not on this machine, which has"), ("--device=quantum", "not on this machine"),
    ("--max_length=65", "--max_length=65: this model has 64 positions"), ("--model={toys}/classification", "config.json is not there"),
    ("--task={toys}/bert", "has no train.jsonl")])
def test_what_is_not_there_is_one_line_and_leaves_nothing(option, words, toys, tmp_path, capsys):
    assert train.main([*arguments(toys, tmp_path / "out"), option.format(toys=toys)]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") <= 2 and not (tmp_path / "out").exists()


def test_an_out_dir_that_is_a_file_is_one_line(toys, tmp_path, capsys):
    (tmp_path / "out").write_text("x")
    assert train.main(arguments(toys, tmp_path / "out")) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_help_names_every_option(capsys):
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}=" in shown for name in train.Config.__dataclass_fields__)


def test_the_program_imports_nothing_but_its_four_packages():
    code = ("import sys; before = set(sys.modules); sys.path.insert(0, %r); import train; "
            "print(*{m.partition('.')[0] for m in sys.modules} & {'transformers', 'peft', 'tokenizers', 'scipy', 'safetensors', 'datasets'})" % str(ROOT))
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_each_evaluation_logs_what_dW_is_like_layer_by_layer(toys, tmp_path):
    lines = run(toys, tmp_path, "bert", "classification", "dual_lora", "--eval_interval=2", "--learning_rate=0.05")
    logged, final = [line for line in lines if "layers" in line and "final" not in line], lines[-1]
    assert [line["step"] for line in logged] == [2, 4] and len(final["layers"]) == 4
    for name, row in final["layers"].items():
        assert {"frozen", "effective_rank", "magnitudes", "flips_since_start"} <= set(row) and "q_proj" in name or "v_proj" in name
        flips = [line["layers"][name]["flips_since_last"] for line in logged]
        assert flips[0] == logged[0]["layers"][name]["flips_since_start"] and all(0 <= flip <= 1 for flip in flips)


# Speed and cost


def counted(step, layers):
    """(operations of products forward, all, bytes kept by storage, out in r of every use of a layer) of a step that is really run."""
    kept, products, low_rank = {}, FlopCounterMode(display=False), []
    hooks = [m.register_forward_hook(lambda m, *_: low_rank.append(m.weight.numel() * (m.config["r1"] + m.config["r2"])))
             for m in layers if isinstance(m, dual_lora.DualLoRALinear)]

    def keep(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), products:
        loss = step()
        forward = products.get_total_flops()
        loss.backward()
    for hook in hooks:
        hook.remove()
    return forward, products.get_total_flops(), kept, sum(low_rank)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model, task", [("bert", "regression"), ("deberta", "pairs"), ("llama", "choice"), ("llama", "pairs")])
@pytest.mark.parametrize("method, dropout", [("dual_lora", 0.0), ("dual_lora", 0.1), ("lora", 0.0), ("dora", 0.1), ("full", None)])
def test_what_a_step_costs_is_known_before_it_runs_and_it_asks_for_no_tensors_value(model, task, dtype, method, dropout, toys):
    """training_cost would fail at a question such as .item(), for which a GPU has to be waited for."""
    spec, device = load_task(str(toys / task)), torch.device("cpu")
    cfg = train.Config(task=str(toys / task), model=str(toys / model), method=method, dropout=dropout, targets="q_proj,up_proj", r=4, alpha=8.0,
                       init_std=0.02, max_length=64)
    net, tokenizer = train.build(cfg, toys / model, spec, device)
    examples = train.encode_examples(spec, spec.train[:8], tokenizer, model == "llama", 64)
    net.train()

    def step():
        with train.mixed_precision(device, dtype):
            return train.training_loss(net, spec, examples, train.pad_of(tokenizer), device)[0]

    before = {name: t.clone() for name, t in [*net.named_parameters(), *net.named_buffers()]}
    cost, state = dual_lora.training_cost(net, step), torch.get_rng_state()
    assert all(torch.equal(t, before[name]) and t.grad is None for name, t in net.named_parameters()), "counting changes nothing"
    layers = [m for m in net.modules() if isinstance(m, dual_lora.AdaptedLinear)]
    forward, both, kept, low_rank = counted(step, layers)
    own = {t.untyped_storage()._cdata for t in [*net.parameters(), *net.buffers()]}
    assert cost["kept_bytes"] == sum(size for storage, size in kept.items() if storage not in own)
    assert cost["forward_flops"] == forward + 2 * low_rank and cost["backward_flops"] == both - forward + 6 * low_rank
    if dtype == torch.float32 and model != "deberta":  # autocast casts every weight, and DeBERTa's distances pass through q_proj too
        assert cost["passes"] == {("dual_lora", 0.0): 5, ("dual_lora", 0.1): 3, ("lora", 0.0): 0, ("dora", 0.1): 6, ("full", None): 0}[method, dropout] * len(layers)
    assert torch.equal(state, torch.get_rng_state()) or dropout, "and draws no random numbers"


@pytest.mark.parametrize("model, task, method", [("bert", "classification", "dual_lora"), ("llama", "choice", "dual_lora"), ("deberta", "pairs", "dual_lora"),
                                                 ("bert", "classification", "dora"), ("llama", "pairs", "lora"), ("bert", "pairs", "full")])
def test_compiled_steps_give_the_same_numbers_and_nothing_is_compiled_anew(model, task, method, toys, tmp_path, monkeypatch):
    compile, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(len(graphs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compile(f, dynamic=dynamic, backend=backend))
    torch._dynamo.reset()
    more = ["--max_steps=20", "--eval_interval=10"] + (["--warmup_steps=15"] if method == "dual_lora" else [])
    eager = run(toys, tmp_path / "eager", model, task, method, *more)
    fast = run(toys, tmp_path / "fast", model, task, method, *more, "--compile=true")
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (eager, fast)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 10
    state = load_pretrained(toys / model).state_dict()
    assert all("_orig_mod" not in name for name in torch.load(tmp_path / "fast" / "adapter.pt", weights_only=True)["state"]) and state
    assert 1 <= len(graphs) <= 4, "one with a mask and one without, at most in two parts; not one a step, a length or a factor"


@pytest.mark.slow
def test_steps_compiled_for_real_give_the_same_numbers(toys, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = []
    for more in ([], ["--compile=true"]):
        lines = run(toys, tmp_path / f"out{len(more)}", "bert", "classification", "dual_lora", "--max_steps=20", "--eval_interval=10", "--warmup_steps=15", *more)
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.parametrize("budget", [20, 200, 8192])
def test_choices_that_share_a_prompt_have_the_likelihoods_of_each_alone(budget, toys):
    model = load_pretrained(toys / "llama")
    draw = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(256, (n,), generator=draw).tolist()

    rows = []
    for n, answers in ((5, (1, 1)), (9, (3, 1, 7)), (1, (20, 2)), (40, (4,)), (9, (2, 2, 2, 2))):
        prompt = ids(n)
        rows += [(prompt + ids(m), n) for m in answers]
    rows.append((rows[0][0], rows[0][1]))  # the same question again
    alone = []
    for row, boundary in rows:
        logprobs = model(torch.tensor([row]))[0][0].log_softmax(-1)
        alone.append(sum(logprobs[boundary - 1 + i, token].item() for i, token in enumerate(row[boundary:])))
    assert train.score_answers(model, rows, 0, torch.device("cpu"), budget).tolist() == pytest.approx(alone, abs=1e-4)


def test_rows_are_put_together_only_as_far_as_the_positions_reach(toys):
    """A long prompt with a short answer and a short one with a long answer fit alone, and would not side by side."""
    model = GPT(GPTConfig(258, 1, 2, 16, 32, 64)).eval()
    rows = [([1] * 60 + [2] * 4, 60), ([1] * 50 + [2] * 6, 50), ([3] * 4 + [5] * 60, 4)]
    scores = train.score_answers(model, rows, 0, torch.device("cpu"), 8192)
    assert scores.tolist() == pytest.approx([train.score_answers(model, [row], 0, torch.device("cpu"), 8192).item() for row in rows], abs=1e-4)


def test_the_speed_the_memory_and_the_share_of_the_devices_best_are_reported(toys, tmp_path, capsys):
    assert train.main(arguments(toys, tmp_path)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"a pass of \d+ tokens costs [\d.]+ GFLOP forward, [\d.]+ GFLOP backward, keeps \d+ MiB .* passes 20 times over", shown)
    assert re.search(r"\d tokens/s, [\d.e-]+ GFLOP/s of products, \d+ % of what one large product reaches here", shown)
    result = train.train(train.parse(arguments(toys, tmp_path)))
    assert result["peak_memory"] is None if sys.platform != "linux" else 1e8 < result["peak_memory"] < 1e11


def test_a_step_that_cannot_be_counted_is_run_all_the_same(toys, tmp_path, capsys, monkeypatch):
    plain = train.batch_loss

    def asks(*args):
        loss, right = plain(*args)
        return (loss, right) if loss.item() > 0 else None

    monkeypatch.setattr(train, "batch_loss", asks)
    assert train.main(arguments(toys, tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "could not be counted here" in shown and re.search(r"\n[\d,]+ tokens/s; [\d,]+ MiB of memory at most", shown)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_no_step_waits_for_the_gpu(toys, tmp_path, monkeypatch):
    loss = train.training_loss

    def strict(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return loss(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "training_loss", strict)
    for model, task in (("bert", "classification"), ("llama", "choice"), ("deberta", "pairs")):
        assert train.main([a for a in arguments(toys, tmp_path / model, model, task) if "device" not in a] + ["--device=cuda"]) == 0
