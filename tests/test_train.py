"""train.py on toy models: every method, protocol and kind of task; the same numbers again; one line for bad input."""
import copy
import dataclasses
import functools
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import model
import train
from data.download import cache_dir
from data.jsonl import write_jsonl
from data.tasks import load_task
from data.tokenizer import Tokenizer, byte_alphabet
from dual_lora import DualLoRALinear, apply_adapters, load_adapter, merged
from model import Classifier, load_pretrained, read_config

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
                "classification": {"text_a": text, "label": label},
                "regression": {"text_a": text, "label": label + 0.5},
                "choice": {"prompt": text, "choices": [" poor", " fine", " so so"][:2 + len(words) % 2],
                           "label": label},
                "instruct": {"instruction": f"{text}?", "output": f"the correct answer is option{label + 1}",
                             "answer": f"option{label + 1}"}}[kind])
        write_jsonl(folder / f"{split}.jsonl", examples)


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
    for kind in ("classification", "regression", "choice", "instruct"):
        write_task(root / kind, kind)
    return root


def arguments(toys, out, *more, model="bert", task="classification"):
    defaults = ["--max_steps=6", "--batch_size=8", "--eval_interval=3", "--log_interval=2", "--checkpoint_interval=2",
                "--device=cpu", "--learning_rate=0.01", "--lr_warmup_steps=0"]
    return [f"--model={toys / model}", f"--task={toys / task}", f"--out_dir={out}", *defaults, *more]


def run(toys, out, *more, **kind):
    """The lines of metrics.jsonl."""
    assert train.main(arguments(toys, out, *more, **kind)) == 0
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    return [line["loss"] for line in lines if "loss" in line]


def fails(arguments, status, capsys):
    """main's one line of complaint."""
    assert train.main(arguments) == status
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1
    return error


def encoded(toys, model, task):
    """(task, its validation examples, tokenizer)."""
    task, tokenizer = load_task(toys / task), Tokenizer(toys / model)
    return task, train.encode_examples(task, task.validation, tokenizer, model == "llama", 64), tokenizer


@pytest.fixture
def spy(monkeypatch):
    """spy(name, note): from now on note(*arguments) is called before train's function of that name."""
    def install(name, note):
        function = getattr(train, name)

        def noted(*args):
            note(*args)
            return function(*args)

        monkeypatch.setattr(train, name, noted)

    return install


# ---- Learning --------------------------------------------------------------------------------------------------------


METHODS = ("dual_lora", "lora", "dora", "full", "linear_probe")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_moves_only_what_it_trains(method, toys, tmp_path, spy):
    seen = []
    spy("make_optimizer", lambda model, cfg: seen.append((copy.deepcopy(model), model)))
    lines = run(toys, tmp_path, f"--method={method}", "--max_steps=60", "--eval_interval=60", "--log_interval=20")
    assert losses(lines)[-1] < 0.95 * losses(lines)[0]
    before, after = (dict(model.named_parameters()) for model in seen[0])
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    adapters = {name for name in before if "lora_" in name}
    expected = {"full": set(before) - {"backbone.position_embed.weight"},  # rows beyond the longest text stay
                "linear_probe": {"head.weight", "head.bias"}}.get(method, adapters | {"head.weight", "head.bias"})
    assert moved - {"backbone.position_embed.weight"} == expected
    assert bool(adapters) == (method in ("dual_lora", "lora", "dora"))


def test_training_learns_what_there_is_to_learn(toys, tmp_path):
    targets = "--targets=q_proj,v_proj,up_proj,down_proj"
    final = run(toys, tmp_path, "--max_steps=150", "--eval_interval=150", "--learning_rate=0.02", targets)[-1]
    assert final["value"] >= 0.95


@pytest.mark.parametrize("model, task", [("bert", "classification"), ("bert", "regression"), ("bert", "choice"),
                                         ("llama", "classification"), ("llama", "choice")])
def test_every_kind_of_task_runs_and_the_saved_adapter_scores_the_same(model, task, toys, tmp_path, capsys):
    final = run(toys, tmp_path, model=model, task=task)[-1]
    assert final["final"] is True and final["metric"] == ("pearson" if task == "regression" else "accuracy")
    assert f"{final['metric']} {final['value']:.4f} at the last step" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.pt", "checkpoint.pt", "metrics.jsonl"]
    spec, examples, tokenizer = encoded(toys, model, task)
    fresh = load_pretrained(toys / model)
    if (model, task) != ("llama", "choice"):
        fresh = Classifier(fresh, 1 if task == "choice" else spec.n_classes)
    with merged(load_adapter(fresh, tmp_path / "adapter.pt").eval()), torch.no_grad():
        predictions = train.predict(fresh, spec, examples, tokenizer, CPU)
    assert train.summarise(spec, examples, predictions) == pytest.approx(final["validation"], abs=1e-6)


def test_every_method_starts_at_the_pretrained_model_with_one_head_and_sees_the_same_batches(toys, tmp_path, spy):
    seen, first = [], []
    spy("loss_and_right", lambda model, task, batch, *args: seen.append([example.rows for example in batch]))
    for method in METHODS:
        more = [f"--method={method}", "--max_steps=9", "--log_interval=1"]
        first.append(losses(run(toys, tmp_path / method, *more))[0])
    assert first == pytest.approx([first[0]] * 5, abs=1e-6)  # nothing added yet
    assert len(seen) == 45 and seen == 5 * seen[:9]


def test_no_steps_evaluate_the_base_model(toys, tmp_path):
    final = run(toys, tmp_path, "--max_steps=0", "--init_std=5", model="llama", task="choice")[-1]
    spec, examples, tokenizer = encoded(toys, "llama", "choice")
    with torch.no_grad():
        predictions = train.predict(load_pretrained(toys / "llama"), spec, examples, tokenizer, CPU)
    assert final["validation"] == train.summarise(spec, examples, predictions)


def test_held_out_validates_on_training_data_that_is_not_trained_on(toys, tmp_path, spy):
    seen = []
    spy("encode_examples", lambda task, examples, *args: seen.append([json.dumps(example) for example in examples]))
    final = run(toys, tmp_path, "--held_out=true")[-1]
    trained, validated = seen
    assert final["examples"] == len(validated) == 6
    assert sorted(trained + validated) == sorted(map(json.dumps, load_task(toys / "classification").train))


def test_evaluation_happens_in_plain_layers_and_leaves_the_adapters_in_place(toys, tmp_path, spy):
    seen = []

    def look(name, model):
        modules = list(model.modules())
        seen.append((name, sum(isinstance(m, DualLoRALinear) for m in modules), {m.training for m in modules}))

    spy("predict", lambda model, *args: look("evaluation", model))
    spy("training_step", lambda run, *args: look("step", run.model))
    run(toys, tmp_path)
    assert seen == ([("step", 4, {True})] * 3 + [("evaluation", 0, {False})]) * 2


# ---- A GPT on multiple choice ----------------------------------------------------------------------------------------


def test_the_likelihood_of_an_answer_is_transformers_sum_of_its_log_probabilities(toys):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(toys / "llama").eval()
    ours, (spec, examples, tokenizer) = load_pretrained(toys / "llama"), encoded(toys, "llama", "choice")
    examples = examples[:8]
    rows = [row for example in examples for row in example.rows]
    expected = []
    for ids, start in rows:  # one at a time, without padding
        logprobs = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(sum(logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))))
    logprobs, _ = train.answer_logprobs(ours, rows, 0, CPU)
    sums = [part.sum().item() for part in logprobs.split([len(ids) - start for ids, start in rows])]
    assert sums == pytest.approx(expected, abs=1e-4)
    best = {"main": [], "per_byte": []}
    for example in examples:
        scores = [expected.pop(0) for _ in example.rows]
        best["main"].append(scores.index(max(scores)))
        scores = [score / n for score, n in zip(scores, example.n_bytes)]
        best["per_byte"].append(scores.index(max(scores)))
    with torch.no_grad():
        assert train.predict(ours, spec, examples, tokenizer, CPU) == best


def test_the_training_loss_is_the_models_own_on_the_right_answers_tokens(toys):
    model, (spec, examples, _) = load_pretrained(toys / "llama"), encoded(toys, "llama", "choice")
    rows = [example.rows[example.label] for example in examples]
    idx, _, _ = train.collate(rows, 0, CPU)
    targets = torch.full_like(idx, -100)
    for row, (ids, start) in enumerate(rows):
        targets[row, start - 1:len(ids) - 1] = torch.tensor(ids[start:])
    loss, _ = train.loss_and_right(model, spec, examples, 0, CPU)
    torch.testing.assert_close(loss / train.count_targets(model, examples), model(idx, targets)[1])


@pytest.mark.parametrize("protocol", ["instruct", "llm_adapters"])
def test_the_instruct_protocols_train_and_count_what_cannot_be_read(protocol, toys, tmp_path):
    lines = run(toys, tmp_path, f"--protocol={protocol}", "--max_steps=8", "--eval_examples=3", "--eval_interval=8",
                "--method=full", "--max_length=640", model="llama", task="instruct")
    final = lines[-1]
    assert losses(lines)[-1] < losses(lines)[0]
    assert final["validation"] == {"accuracy": 0.0, "failed_extractions": 1.0}  # too few steps to write an answer
    assert final["settings"]["protocol"] == protocol and final["settings"]["train_on_prompt"] is False


def test_a_written_answer_is_read_up_to_the_end_token(toys):
    class Writer(nn.Module):
        def generate(self, idx, mask, max_new_tokens, eos):
            texts = ["it is option2", "who knows", "option1, not option2"]
            ids = [tokenizer.encode(text) + [eos] + tokenizer.encode("option1") for text in texts[:len(idx)]]
            return torch.tensor([row + [eos] * (40 - len(row)) for row in ids])

    task, tokenizer = load_task(toys / "instruct"), Tokenizer(toys / "llama")
    records = [{**task.validation[0], "instruction": "same", "answer": "option2"}] * 3
    examples = train.encode_examples(task, records, tokenizer, True, 640, "instruct")
    predictions = train.predict_written(Writer(), task, examples, tokenizer, CPU)
    assert predictions == {"main": [1, 0, 0], "failed": [0, 1, 0]}


# ---- The same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, task", [("bert", "classification"), ("bert", "choice"), ("llama", "choice")])
def test_micro_batches_and_checkpointing_do_not_change_the_numbers(kind, task, toys, tmp_path, monkeypatch):
    whole = run(toys, tmp_path / "whole", model=kind, task=task)
    calls, checkpoint = [], model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs))
    for option, n_calls in (("--micro_batch_size=3", 0), ("--checkpointing=true", 12)):  # two layers in six steps
        pieces = run(toys, tmp_path / "pieces", option, model=kind, task=task)
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
    state = torch.load(tmp_path / "fast" / "adapter.pt", weights_only=True)["state"]
    assert list(state) == list(torch.load(tmp_path / "plain" / "adapter.pt", weights_only=True)["state"])


def test_bfloat16_runs_and_lands_near_and_adapters_stay_float32(toys, tmp_path):
    wide = run(toys, tmp_path / "wide", model="llama", task="choice")
    for option in ("--dtype=bfloat16", "--weights=bfloat16"):
        narrow = run(toys, tmp_path / "narrow", option, model="llama", task="choice")
        assert losses(narrow)[0] != losses(wide)[0] and losses(narrow)[0] == pytest.approx(losses(wide)[0], rel=0.02)
        state = torch.load(tmp_path / "narrow" / "adapter.pt", weights_only=True)["state"]
        assert {value.dtype for value in state.values()} == {torch.float32}


def test_the_same_command_writes_the_same_file_and_another_seed_or_dropout_other_losses(toys, tmp_path):
    files, found = [], []
    for more in (["--seed=3"], ["--seed=3"], ["--seed=4"], ["--seed=3", "--dropout=0.3"]):
        found.append(losses(run(toys, tmp_path, *more, "--scale_warmup_steps=2"))[0])
        files.append((tmp_path / "metrics.jsonl").read_text())
    assert files[0] == files[1] and len(set(found)) == 3


# ---- Resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, more", [({}, ["--dropout=0.2"]), ({"model": "llama", "task": "choice"}, []),
                                        ({}, ["--method=full"])])
@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_interrupted_anywhere_resumes_to_the_same_files(kind, more, step, toys, tmp_path, spy, capsys):
    more = [*more, "--log_interval=4", "--checkpoint_interval=1"]  # checkpoints fall between progress lines
    run(toys, tmp_path / "whole", *more, **kind)
    stops = [step]

    def interrupt(run, *args):
        if run.step in stops:
            stops.clear()
            raise KeyboardInterrupt

    spy("training_step", interrupt)
    error = fails(arguments(toys, tmp_path / "cut", *more, **kind), 1, capsys)
    assert "--resume=true goes on" in error
    torch.manual_seed(99)
    run(toys, tmp_path / "cut", *more, "--resume=true", **kind)
    assert (tmp_path / "cut" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    ours, theirs = (torch.load(tmp_path / name / "adapter.pt", weights_only=True)["state"] for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_process_resumes_to_the_same_file_and_leaves_no_other(toys, tmp_path):
    more = ["--max_steps=200", "--scale_warmup_steps=190", "--eval_interval=100", "--checkpoint_interval=3",
            "--dropout=0.1"]
    out = tmp_path / "cut"
    process = subprocess.Popen([sys.executable, train.__file__, *arguments(toys, out, *more)],
                               stdout=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists():
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert '"final"' not in (out / "metrics.jsonl").read_text()
    run(toys, out, *more, "--resume=true")
    run(toys, tmp_path / "whole", *more)
    assert (out / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["adapter.pt", "checkpoint.pt", "metrics.jsonl"]


def test_a_finished_run_resumed_stays_finished_and_a_fresh_one_starts_empty(toys, tmp_path, spy):
    lines = run(toys, tmp_path)
    assert run(toys, tmp_path, "--resume=true") == lines
    files = []
    spy("training_step", lambda *args: files.append({path.name: path.stat().st_size for path in tmp_path.iterdir()}))
    run(toys, tmp_path)
    assert files[0] == {"metrics.jsonl": 0}


def test_resuming_with_other_options_or_a_damaged_checkpoint_is_refused_and_changes_nothing(toys, tmp_path, capsys):
    run(toys, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    error = fails(arguments(toys, tmp_path, "--resume=true", "--alpha=8", "--seed=2"), 1, capsys)
    assert "another alpha, seed" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    for length in (0, 1000, len(before["checkpoint.pt"]) // 2):
        (tmp_path / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:length])
        error = fails(arguments(toys, tmp_path, "--resume=true"), 1, capsys)
        assert "checkpoint.pt is cut short" in error
    assert (tmp_path / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


# ---- Schedules and presets -------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_then_falls_and_the_optimizer_uses_it(toys, tmp_path, monkeypatch):
    used, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda self: used.append([group["lr"] for group in self.param_groups]) or step(self))
    run(toys, tmp_path, "--max_steps=8", "--lr_warmup_steps=4")
    rates = [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert used == [[pytest.approx(0.01 * rate)] * 2 for rate in rates]


@pytest.mark.parametrize("steps, factors", [(4, [0, 0.25, 0.5, 0.75, 1, 1]), (0, [1] * 6)])
def test_the_factor_on_dw_grows_from_0_to_1_and_the_layers_have_it(steps, factors, toys, tmp_path, spy):
    seen = []
    spy("loss_and_right", lambda model, *args: seen.append(
        {m.warmup.item() for m in model.modules() if isinstance(m, DualLoRALinear)}))
    run(toys, tmp_path, f"--scale_warmup_steps={steps}")
    assert seen == [{factor} for factor in factors]


def test_adapters_are_never_decayed():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    apply_adapters(model, ["q_proj"], r1=2, r2=2)
    model["head"].requires_grad_(True)
    groups = train.make_optimizer(model, train.Config(learning_rate=1.0, weight_decay=0.1)).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.1, 1), (0.0, 5)]


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "deberta-v2", "gpt2", "llama"])
def test_every_family_has_a_preset_that_sets_every_option(family, toys):
    for name in (*train.GLUE, train.MIX, "anything"):
        task = dataclasses.replace(load_task(toys / "classification"), name=name)
        preset = train.find_preset(family, task)
        assert preset["source"]
        for method in train.METHODS:
            cfg = train.complete(train.parse([f"--method={method}"]), preset, task, 512)
            unset = {key for key, value in vars(cfg).items() if value is None}
            assert unset == {"data_dir", "model", "metric", "epochs", "micro_batch_size", "eval_examples"}


def test_the_first_preset_that_fits_is_taken_and_options_that_are_set_win(toys):
    task = dataclasses.replace(load_task(toys / "classification"), name="rte")  # 60 examples
    preset = train.find_preset("roberta", task)
    assert "RoBERTa" in preset["source"] and "MiniLM" in train.find_preset("bert", task)["source"]
    cfg = train.complete(train.parse([]), preset, task, 512)
    assert cfg.max_steps == preset["epochs"]["rte"] * (60 // cfg.batch_size) and (cfg.r1, cfg.r2) == (4, 4)
    cfg = train.complete(train.parse(["--epochs=2", "--r=6", "--r2=5", "--batch_size=10"]), preset, task, 512)
    assert (cfg.max_steps, cfg.r1, cfg.r2, cfg.batch_size) == (12, 3, 5, 10)


def test_max_length_is_cut_to_the_models_positions(toys, tmp_path):
    assert run(toys, tmp_path)[-1]["settings"]["max_length"] == 64  # the preset's is 128


# ---- Faults and bad input --------------------------------------------------------------------------------------------


def test_a_loss_that_becomes_nan_is_one_line_and_the_last_good_checkpoint_stays(toys, tmp_path, monkeypatch, capsys):
    calls, loss_and_right = [], train.loss_and_right

    def poisoned(*args):
        loss, right = loss_and_right(*args)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 5 else 1), right

    monkeypatch.setattr(train, "loss_and_right", poisoned)
    assert "NaN or infinite at step 6" in fails(arguments(toys, tmp_path), 1, capsys)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 4 and all(p.isfinite().all() for p in saved["parameters"].values())
    assert not (tmp_path / "adapter.pt").exists()


def test_a_full_disk_is_one_line_and_no_half_file(toys, tmp_path, full_disk, capsys):
    full_disk()
    assert "No space left on device" in fails(arguments(toys, tmp_path), 1, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("option, words", [
    ("--tusk=sarcasm", "--tusk=sarcasm"), ("sarcasm", "sarcasm"), ("--task", "--task"),
    ("--method=qlora", "qlora"), ("--ste=soft", "clip"), ("--r=three", "three"), ("--max_steps=1e3", "1e3"),
    ("--resume=yes", "yes"), ("--dtype=float16", "float32"), ("--protocol=chat", "likelihood"),
    ("--alpha=nan", "--alpha=nan"), ("--alpha=0", "--alpha=0.0: it should be above 0"),
    ("--learning_rate=-1", "above 0"), ("--batch_size=0", "above 0"), ("--seed=-1", "at least 0"),
    ("--r=7", "--r=7: Dual LoRA halves it"), ("--epochs=3", "give one of them"),
    ("--train_on_prompt=true", "does nothing with --protocol=likelihood"),
    ("--method=lora --ste=xnor", "--ste=xnor does nothing with --method=lora"),
    ("--method=dora --r1=2", "--r1=2 does nothing with --method=dora"),
    ("--method=full --r=4", "--r=4 does nothing with --method=full"),
    ("--method=linear_probe --targets=v_proj", "--targets=v_proj does nothing"),
    ("--method=full --weights=bfloat16", "--weights=bfloat16 with --method=full")])
def test_a_bad_option_is_one_line_and_status_2(option, words, toys, tmp_path, capsys):
    assert words in fails([*arguments(toys, tmp_path / "out"), *option.split()], 2, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, words", [
    ("--task=nothing", "unknown task 'nothing': it is one of sarcasm"),
    ("--task={toys}/bert", "has no train.jsonl"), ("--model=nothing", "model 'nothing' is no folder"),
    ("--model={toys}/choice", "has no vocabulary that can be read"), ("--data_dir=x", "--data_dir=x does nothing"),
    ("--targets=q_proj,typo", "target 'typo' matches no linear layer: choose from down_proj, head, k_proj"),
    ("--device=quantum", "--device=quantum: this machine has"), ("--metric=pearson", "accuracy"),
    ("--scale_warmup_steps=7", "the run ends before"), ("--protocol=instruct", "is for a GPT on multiple choice"),
    ("--max_length=65", "--max_length=65: this model takes at most 64"),
    ("--model={toys}/llama --task={toys}/choice --protocol=instruct", 'examples without "instruction"'),
    ("--model={toys}/llama --task={toys}/choice --method=linear_probe", "has none")])
def test_what_is_not_there_or_does_not_fit_is_one_line_and_status_1(option, words, toys, tmp_path, capsys):
    assert words in fails([*arguments(toys, tmp_path / "out"), *option.format(toys=toys).split()], 1, capsys)
    assert not (tmp_path / "out").exists()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in train.Config.__dataclass_fields__)


# ---- Slow ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task, needs, least", [("sarcasm", ("minilm", "sarcasm"), 0.75),
                                                ("arc_easy", ("smollm2", "commonsense-arc_easy"), 0.5)])
def test_the_default_commands_learn(task, needs, least, tmp_path):
    if not all((cache_dir() / name).is_dir() for name in needs):
        pytest.skip(f"{cache_dir()} lacks one of {', '.join(needs)}: run train.py once")
    small = ["--batch_size=8", "--max_steps=20", "--eval_examples=100"] if task == "arc_easy" else []
    options = [f"--task={task}", f"--out_dir={tmp_path}", "--max_steps=60", "--eval_examples=500", *small]
    assert train.main(options) == 0
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["value"] > least
