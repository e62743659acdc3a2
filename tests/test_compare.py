"""Comparisons: matched parameters, learning rates from held-out training data, statistics, and nothing run twice or lost."""
import dataclasses
import json
import shutil

import pytest
import torch

import train
from data.metrics import paired_t
from data.tasks import load_task
from tests.test_train import toys  # noqa: F401  (a fixture)


def arguments(toys, out, methods, *more):
    grid = [] if any("learning_rate" in option or "grid" in option for option in more) else ["--grid=1e-3,3e-2"]
    return [f"--model={toys / 'bert'}", f"--task={toys / 'classification'}", f"--methods={methods}", f"--out_dir={out}", "--device=cpu", "--seeds=3",
            "--max_steps=8", "--batch_size=8", "--max_length=64", *grid, *more]


def run(*args):
    assert train.main(arguments(*args)) == 0
    return json.loads((args[1] / "compare.json").read_text())


def test_methods_are_compared_with_matched_parameters_the_same_seeds_and_their_own_learning_rates(toys, tmp_path, capsys):
    table = run(toys, tmp_path, "lora,dual_lora,dual_lora:magnitude=none:r=4,full")["classification"]
    lora, dual, loha, full = table
    assert lora["trainable"] == dual["trainable"] > loha["trainable"] and full["trainable"] > dual["trainable"]
    assert loha["settings"]["magnitude"] == "none" and dual["settings"]["magnitude"] == "relu" and lora["settings"]["method"] == "lora"
    for line in table:
        assert set(line["grid"]) == {"0.001", "0.03"} and line["grid"][f"{line['learning_rate']:g}"] == max(line["grid"].values())
        assert line["runs"] == 3 and len(line["values"]) == 3 and line["mean"] == pytest.approx(sum(line["values"]) / 3)
    mean, low, high, p = paired_t([a - b for a, b in zip(dual["values"], lora["values"])])
    assert (dual["difference"], dual["interval"], dual["p"]) == (mean, [low, high], p) and "difference" not in lora
    assert dual["bootstrap"][0] <= mean <= dual["bootstrap"][1] and 0 <= dual["mcnemar"] <= 1
    shown, text = capsys.readouterr().out, (tmp_path / "compare-classification.md").read_text()
    assert text in shown and "| dual_lora:magnitude=none:r=4 |" in text and f"{dual['mean']:.4f} ± {dual['sd']:.4f}" in text
    assert shown.count("held-out training data") == 8 and shown.count(", seed ") == 20


def test_a_method_without_a_spread_of_its_own_equals_itself(toys, tmp_path):
    first, again = run(toys, tmp_path, "lora,lora:alpha=16", "--learning_rate=0.01")["classification"]
    assert again["values"] == first["values"] and again["difference"] == 0 and again["p"] == 1 and again["bootstrap"] == [0, 0] and again["mcnemar"] == 1
    assert again["grid"] == {} and again["learning_rate"] == 0.01


def seen_by(monkeypatch):
    """[(training examples, validation examples)] of the runs that follow, as JSON lines."""
    seen, original = [], train.encode_examples

    def spy(task, examples, *rest):
        seen.append(sorted(map(json.dumps, examples)))
        return original(task, examples, *rest)

    monkeypatch.setattr(train, "encode_examples", spy)
    return seen


def test_learning_rates_are_chosen_without_the_validation_data(toys, tmp_path, monkeypatch):
    task, seen = load_task(str(toys / "classification")), seen_by(monkeypatch)
    whole, validation = sorted(map(json.dumps, task.train)), sorted(map(json.dumps, task.validation))
    run(toys, tmp_path, "lora")
    assert len(seen) == 10 and seen[4:] == [validation, whole] * 3, "two rates, then three seeds"
    for held_out, rest in (seen[:2], seen[2:4]):
        assert sorted(held_out + rest) == whole and len(held_out) == 6


def test_a_run_can_be_held_out_by_hand(toys, tmp_path, monkeypatch, capsys):
    whole, seen = sorted(map(json.dumps, load_task(str(toys / "classification")).train)), seen_by(monkeypatch)
    args = [a for a in arguments(toys, tmp_path, "lora", "--held_out=true") if a.partition("=")[0] not in ("--methods", "--seeds", "--grid")]
    assert train.main(args) == 0
    out = capsys.readouterr().out
    assert "54 examples to train on, 6 held-out ones to validate" in out and "6 held-out training examples" in out
    assert sorted(seen[0] + seen[1]) == whole and len(seen[0]) == 6
    del seen[:]
    table = run(toys, tmp_path / "several", "lora,dual_lora", "--held_out=true", "--grid=x1")["classification"]
    assert len(seen) == 12 and all(sorted(a + b) == whole for a, b in zip(seen[::2], seen[1::2])) and table[1]["examples"] == 6
    assert "on 6 held-out training examples" in capsys.readouterr().out


def test_what_has_been_run_is_not_run_again_and_an_interrupted_comparison_goes_on(toys, tmp_path, monkeypatch, capsys):
    whole = run(toys, tmp_path / "whole", "lora,dual_lora")
    calls, original = [], train.training_loss

    def dies(*args):
        calls.append(1)
        if len(calls) == 45:  # in the middle of a run
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(train, "training_loss", dies)
    half = [*arguments(toys, tmp_path / "half", "lora,dual_lora"), "--checkpoint_interval=3"]
    assert train.main(half) == 1 and "interrupted; the same command goes on" in capsys.readouterr().err
    assert train.main(half) == 0
    steps = len(calls)
    assert 80 <= steps <= 84, "ten runs of eight steps, and at most three of them again"
    table = json.loads((tmp_path / "half" / "compare.json").read_text())["classification"]
    assert [line["values"] for line in table] == [line["values"] for line in whole["classification"]]
    assert train.main(half) == 0 and len(calls) == steps, "nothing is run twice"
    assert train.main([*half, "--seeds=4"]) == 0 and len(calls) == steps + 16, "one seed more is one run a method more"


def test_a_failed_run_is_told_and_does_not_lose_the_rest(toys, tmp_path, monkeypatch, capsys):
    original = train.Run.start

    def fails(self):
        if self.cfg.method == "dual_lora" and self.cfg.seed == 1:
            raise OSError(28, "No space left on device")
        return original(self)

    monkeypatch.setattr(train.Run, "start", fails)
    lora, dual = run(toys, tmp_path, "lora,dual_lora", "--learning_rate=0.01")["classification"]
    assert (dual["runs"], dual["of"], lora["runs"]) == (2, 3, 3)
    assert dual["difference"] == pytest.approx(sum(dual["values"]) / 2 - (lora["values"][0] + lora["values"][2]) / 2), "paired by seed"
    shown = capsys.readouterr().out
    assert "classification, dual_lora, learning rate 0.01, seed 1: failed: [Errno 28] No space left on device" in shown and "| 2 of 3 |" in shown


def test_a_method_that_fails_at_every_rate_does_not_lose_the_others(toys, tmp_path, monkeypatch, capsys):
    original = train.Run.start

    def fails(self):
        if self.cfg.method == "lora":
            raise OSError(28, "No space left on device")
        return original(self)

    monkeypatch.setattr(train.Run, "start", fails)
    lora, dual = run(toys, tmp_path, "lora,dual_lora", "--seeds=1")["classification"]
    assert lora["runs"] == 0 and dual["runs"] == 1 and len(dual["grid"]) == 2 and "difference" not in dual
    shown = capsys.readouterr().out
    assert "lora: no learning rate of 1e-3, 3e-2 came to an end" in shown and "| lora |  | 0.001 | 0 of 1 |" in shown


@pytest.mark.parametrize("task", ["regression", "choice", "instruct"])
def test_every_kind_of_task_can_be_compared(task, toys, tmp_path):
    model = toys / ("bert" if task == "regression" else "llama")
    args = [a for a in arguments(toys, tmp_path, "head,lora" if task == "regression" else "full,lora", f"--model={model}", "--learning_rate=0.01")
            if "--task" not in a]
    assert train.main([*args, f"--task={toys / task}"]) == 0
    line = json.loads((tmp_path / "compare.json").read_text())[task][1]
    assert line["runs"] == 3 and ("bootstrap" in line) == (task != "instruct") and (line.get("mcnemar") is None) == (task != "choice")


def test_several_tasks_give_a_table_each_and_one_of_their_means(toys, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(toys)
    args = [a for a in arguments(toys, tmp_path, "lora,full", "--learning_rate=0.01") if "--task" not in a]
    assert train.main([*args, "--task=classification,pairs:max_steps=3"]) == 0
    tables = json.loads((tmp_path / "compare.json").read_text())
    assert set(tables) == {"classification", "pairs", "mean"}
    assert [tables[name][0]["settings"]["max_steps"] for name in ("classification", "pairs")] == [8, 3]
    for i, line in enumerate(tables["mean"]):
        assert line["values"] == pytest.approx([(a + b) / 2 for a, b in zip(tables["classification"][i]["values"], tables["pairs"][i]["values"])])
    lora, full = tables["mean"]
    mean, low, high, p = paired_t([a - b for a, b in zip(full["values"], lora["values"])])
    assert (full["difference"], full["interval"], full["p"]) == (mean, [low, high], p) and "difference" not in lora
    assert full["bootstrap"][0] <= mean <= full["bootstrap"][1] and full["bootstrap"][0] < full["bootstrap"][1]
    text = (tmp_path / "compare.md").read_text()
    assert text in capsys.readouterr().out and "pairs, accuracy" in text and f"{full['mean']:.4f} ± {full['sd']:.4f}" in text


def test_over_several_tasks_a_method_has_the_rate_with_the_best_mean(toys, tmp_path, monkeypatch):
    """On one task alone another rate is better; factors are on each method's own preset."""
    scores = {("classification", 0.0025): 0.8, ("classification", 0.005): 0.7, ("pairs", 0.0025): 0.5, ("pairs", 0.005): 0.7}
    seen = []

    def instead(cfg, arm, task, folder, purpose=None):
        seen.append((task.name, cfg.learning_rate, cfg.held_out))
        return {"value": scores.get((task.name, cfg.learning_rate), 0.1), "best_value": 0, "examples": 1, "trainable": 1, "seconds": 1, "peak_memory": 1,
                "standard_error": 0.1, "settings": {"held_out": False}, "predictions": [0], "labels": [0]}

    monkeypatch.chdir(toys)
    monkeypatch.setattr(train, "attempt", instead)
    args = [a for a in arguments(toys, tmp_path, "lora,full", "--seeds=1") if "--task" not in a and "--grid" not in a]
    assert train.main([*args, "--task=classification,pairs"]) == 0
    tables = json.loads((tmp_path / "compare.json").read_text())
    lora, full = tables["classification"]
    preset = train.PRESETS["encoder", "any"].learning_rate
    assert preset["lora"] == 0.005, "the scores above are for this"
    assert lora["grid"] == {"0.0025": 0.8, "0.005": 0.7, "0.01": 0.1} and lora["learning_rate"] == tables["pairs"][0]["learning_rate"] == 0.005
    assert list(full["grid"]) == [f"{preset['full'] * factor:g}" for factor in (0.5, 1, 2)]
    assert [held_out for *_, held_out in seen] == [True] * 12 + [False] * 4
    seen.clear()
    assert train.main([*args, "--task=classification,pairs", "--grid=x1"]) == 0
    assert seen == [(task, preset[method], False) for task in ("classification", "pairs") for method in ("lora", "full")], "a single rate needs no choice"


def test_data_dir_is_for_the_tasks_that_read_it(toys, tmp_path, monkeypatch):
    seen, task = [], load_task(str(toys / "classification"))
    monkeypatch.setattr(train, "load_task", lambda name, data_dir: seen.append((name, data_dir)) or dataclasses.replace(task, name=name))
    for tasks in ("sst2,sarcasm", "sarcasm"):
        train.tasks_of(train.parse([f"--task={tasks}", "--methods=lora", "--data_dir=here"]))
    assert seen == [("sst2", "here"), ("sarcasm", None), ("sarcasm", "here")], "where none reads it, load_task says so"


@pytest.mark.parametrize("second, name", [("pairs:max_steps=3", "pairs"), ("mean", "mean")])
def test_two_tables_of_one_name_are_one_line(second, name, toys, tmp_path, monkeypatch, capsys):
    """A task twice, and a folder called like the table of the means."""
    shutil.copytree(toys / "pairs", tmp_path / "pairs")
    shutil.copytree(toys / "pairs", tmp_path / "mean")
    monkeypatch.chdir(tmp_path)
    args = [a for a in arguments(toys, tmp_path / "out", "lora") if "--task" not in a]
    assert train.main([*args, f"--task=pairs,{second}"]) == 1
    assert f"two tables of one name, {name}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_was_run_on_other_data_or_with_another_preset_is_run_again(toys, tmp_path, monkeypatch):
    calls, original = [], train.train
    monkeypatch.setattr(train, "train", lambda cfg, task: calls.append(cfg.seed) or original(cfg, task))
    shutil.copytree(toys / "classification", tmp_path / "data")
    args = [f"--task={tmp_path / 'data'}" if "--task" in a else a for a in arguments(toys, tmp_path / "out", "dual_lora", "--seeds=1", "--grid=x1")]
    preset, runs = train.PRESETS["encoder", "any"], []
    for change in (lambda: None, lambda: None, lambda: monkeypatch.setitem(train.PRESETS, ("encoder", "any"), dataclasses.replace(preset, init_std=0.03)),
                   lambda: (tmp_path / "data" / "train.jsonl").open("a").write('{"text_a": "a good film", "label": 1}\n')):
        change()
        assert train.main(args) == 0
        runs.append(len(calls))
    assert runs == [1, 1, 2, 3]


def test_options_of_the_task_reach_the_methods_that_have_them_and_no_other(toys, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "train", lambda cfg, task: seen.append(cfg) or (_ for _ in ()).throw(ValueError("enough")))
    monkeypatch.chdir(toys)
    args = [a for a in arguments(toys, tmp_path, "lora,dual_lora,full", "--seeds=1", "--grid=x1") if "--task" not in a]
    assert train.main([*args, "--task=classification:r=4:init_std=0.01,pairs"]) == 0
    assert [(cfg.method, cfg.r, cfg.init_std) for cfg in seen] == [("lora", 4, None), ("dual_lora", 4, 0.01), ("full", None, None)] + [
        (method, None, None) for method in ("lora", "dual_lora", "full")]


@pytest.mark.parametrize("options, methods, words", [
    ("max_steps=-3", "lora", "--max_steps=-3: it should be at least 1"), ("r=3", "lora,dual_lora", "--r=3: Dual LoRA halves it"), ("epochs=1", "lora", "give one of them"),
    ("r=4", "lora,lora:r=8", "r is an option of the task pairs and of the method lora:r=8"), ("ste=soft", "dual_lora", "clip, xnor, identity")])
def test_options_of_a_task_are_checked_before_anything_runs(options, methods, words, toys, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(toys)
    args = [a for a in arguments(toys, tmp_path / "out", methods) if "--task" not in a]
    assert train.main([*args, f"--task=pairs:{options}"]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_odd_rank_is_for_methods_that_do_not_halve_it(toys, tmp_path):
    assert train.parse(arguments(toys, tmp_path, "lora,dora", "--r=5")).r == 5


@pytest.mark.parametrize("task", ["sst2:seed=1", "sst2:learning_rate=1", "sst2:depth=2", "sst2:held_out=true"])
def test_an_option_that_no_task_can_have_is_one_line(task, toys, tmp_path, capsys):
    args = [a for a in arguments(toys, tmp_path / "out", "lora") if "--task" not in a]
    assert train.main([*args, f"--task={task}"]) == 1
    assert f"--task={task}: '{task.partition(':')[2]}' is no option of a task" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("methods, more, words", [
    ("lora,qlora", (), "--method=qlora: choose from"), ("lora:depth=3", (), "'depth=3' is no option of a method"), ("lora:r1=4", (), "--r1=4 does nothing with --method=lora"),
    ("lora:seed=3", (), "no option of a method"), ("lora,full:metric=f1", (), "'metric=f1' is no option of a method"), ("lora:protocol=instruct", (), "no option of a method"),
    ("lora:held_out=true", (), "no option of a method"), ("lora:eval_examples=3", (), "no option of a method"), ("lora:eval_only=true", (), "no option of a method"),
    ("lora,dora", ("--ste=xnor",), "--ste=xnor does nothing with --methods=lora,dora"), ("full", ("--r=4",), "--r=4 does nothing with --methods=full"),
    ("lora,dual_lora", ("--r=5",), "--r=5: Dual LoRA halves it"), ("lora", ("--learning_rate=0.1", "--grid=x1"), "give one of them"), ("lora,lora", (), "lora is there twice"), ("lora:r=x", (), "--r=x: it should be a whole number"),
    ("lora", ("--grid=1e-3,x",), "--grid=1e-3,x: 'x' is no learning rate"), ("lora", ("--grid=x0",), "'x0' is no learning rate above 0"), ("lora", ("--grid=inf",), "'inf'"), ("lora", ("--seeds=0",), "at least 1"), ("lora", ("--method=dora",), "--methods")])
def test_what_cannot_be_compared_is_one_line(methods, more, words, toys, tmp_path, capsys):
    assert train.main(arguments(toys, tmp_path / "out", methods, *more)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_seeds_and_grid_do_nothing_alone_and_say_so(capsys):
    for option in ("--seeds=3", "--grid=1e-3"):
        assert train.main([option]) == 2 and f"{option} does nothing without --methods" in capsys.readouterr().err


def test_the_same_batches_and_head_for_every_method(toys, tmp_path, monkeypatch):
    seen, original = {}, train.training_loss

    def spy(model, task, batch, *rest):
        key = "full" if all(p.requires_grad for p in model.parameters()) else "lora"
        seen.setdefault(key, []).append([example.rows for example in batch])
        seen.setdefault(f"{key} head", model.head.weight.detach().clone())
        return original(model, task, batch, *rest)

    monkeypatch.setattr(train, "training_loss", spy)
    run(toys, tmp_path, "lora,full", "--learning_rate=0.001")
    assert seen["lora"] == seen["full"] and torch.equal(seen["lora head"], seen["full head"])
