"""The eight GLUE tasks, a row each, read from GLUE's official layout (CoLA/train.tsv ...), fetched or the user's own.

Labels are numbered as in the Hub's GLUE. The test sets have no labels and are left out. Sentences lose the spaces
around them: every sentence of SST-2 ends with one, which would be a token of its own.
"""
import http.client
import io
import re
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

from data.jsonl import read_lines

HOST = "https://dl.fbaipublicfiles.com/"
# MRPC as Microsoft published it, and the ids of the rows that GLUE validates on
MRPC_ROWS, MRPC_DEV_IDS = "senteval/senteval_data/msr_paraphrase_train.txt", "glue/data/mrpc_dev_ids.tsv"


class GlueTask(NamedTuple):
    folder: str
    columns: tuple  # label, text_a and, for pairs, text_b: names in the header, or numbers where there is none
    counts: tuple   # official number of rows of each split
    classes: tuple  # a file has these names or their numbers; empty for regression, a number from 0 to 5
    metric: str = "accuracy"  # the one in LoRA's tables where GLUE itself takes the mean of two
    archive: str = ""         # the zip file at HOST, if it is not called as the folder
    parts: tuple = ("train.tsv", "dev.tsv")  # the file of each split


ENTAILMENT = "entailment", "not_entailment"
GLUE = {
    "cola": GlueTask("CoLA", (1, 3), (8551, 1043), ("unacceptable", "acceptable"), "matthews"),
    "sst2": GlueTask("SST-2", ("label", "sentence"), (67349, 872), ("negative", "positive")),
    "mrpc": GlueTask("MRPC", ("Quality", "#1 String", "#2 String"), (3668, 408), ("not_equivalent", "equivalent")),
    "stsb": GlueTask("STS-B", ("score", "sentence1", "sentence2"), (5749, 1500), (), "pearson"),
    "qqp":  GlueTask("QQP", ("is_duplicate", "question1", "question2"), (363846, 40430),
                     ("not_duplicate", "duplicate"), archive="QQP-clean"),
    "mnli": GlueTask("MNLI", ("gold_label", "sentence1", "sentence2"), (392702, 9815, 9832),
                     ("entailment", "neutral", "contradiction"),
                     parts=("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")),
    "qnli": GlueTask("QNLI", ("label", "question", "sentence"), (104743, 5463), ENTAILMENT, archive="QNLIv2"),
    "rte":  GlueTask("RTE", ("label", "sentence1", "sentence2"), (2490, 277), ENTAILMENT),
}


def fetch_glue(name, folder):
    """Put the task's files into `folder` in the official layout; ValueError unless all rows are there."""
    task = GLUE[name]
    (folder / task.folder).mkdir()
    if name == "mrpc":
        parts = split_mrpc(download(MRPC_ROWS), download(MRPC_DEV_IDS))
    else:
        address = f"glue/data/{task.archive or task.folder}.zip"
        try:
            with zipfile.ZipFile(io.BytesIO(download(address))) as archive:
                parts = [archive.read(f"{task.folder}/{part}") for part in task.parts]
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{HOST}{address} is not the zip file that it was ({error})") from None
    for part, content in zip(task.parts, parts):
        (folder / task.folder / part).write_bytes(content)
    for examples, official in zip(read_glue(name, folder), (task.counts[0], sum(task.counts[1:]))):
        if len(examples) != official:
            raise ValueError(f"{HOST} gives {len(examples):,} instead of the official {official:,} examples of {name}")


def download(address):
    url = HOST + address
    print(f"fetching {url}", flush=True, file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            return response.read()  # raises where the connection ends early, read(n) would not
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"could not fetch {url} ({error}): if you have GLUE, pass its folder as --data_dir") from None


def split_mrpc(rows, dev_ids):
    """[train.tsv, dev.tsv], bytes. `dev_ids` names the rows to validate on by their two ids, columns 1 and 2."""
    held_out = {tuple(line.split(b"\t")[:2]) for line in dev_ids.splitlines()}
    header, *lines = rows.splitlines(keepends=True)
    parts = [header], [header]
    for line in lines:
        parts[tuple(line.split(b"\t")[1:3]) in held_out].append(line)
    return list(map(b"".join, parts))


def read_glue(name, data_dir):
    """(train, validation) of a task, lists of examples, from a folder in the official layout."""
    task, splits = GLUE[name], []
    for part in task.parts:
        path = Path(data_dir) / task.folder / part
        examples = []
        for where, label, *texts in read_table(path, task.columns, skip_broken=name == "qqp"):
            label = label_number(label, task.classes, where)
            examples.append({**dict(zip(("text_a", "text_b"), map(str.strip, texts))), "label": label})
        splits.append(examples)
        if not examples:
            raise ValueError(f"{path} is empty: it should hold {name}'s examples")
    train, validation, *mismatched = splits
    if mismatched:  # MNLI's two validation sets become parts of one, which are scored one by one
        validation = [{**example, "set": "matched"} for example in validation]
        validation += [{**example, "set": "mismatched"} for example in mismatched[0]]
    return train, validation


def label_number(label, classes, where):
    """The number of a class, which the label names or spells; without classes the number from 0 to 5 that it spells."""
    numbers = {spelled: i for i, name in enumerate(classes) for spelled in (name, str(i))}
    if label in numbers:
        return numbers[label]
    if not classes and re.fullmatch(r"[0-5](\.\d+)?", label):
        return float(label)
    raise ValueError(f"{where}: unknown label {label[:40]!r}: it is {', '.join(numbers) or 'a number from 0 to 5'}")


def read_table(path, columns, skip_broken=False):
    """Yield ("FILE, line N", value of each column ...) for every row of a file with tabs. Quotes mean nothing."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: --data_dir is a folder in GLUE's official layout")
    rows = ((where, line.split("\t")) for where, line in read_lines(path) if line)
    places = columns
    if isinstance(columns[0], str):
        where, header = next(rows, (path, columns))  # that a file is empty is said later
        missing = [name for name in columns if name not in header]
        if missing:
            raise ValueError(f"{where}: the header has no column {missing[0]!r}, it has {', '.join(header)[:200]}")
        places = [header.index(name) for name in columns]
    for where, fields in rows:
        complete = len(fields) > max(places)
        # QQP's official number is without rows that lack a field or a label, or have a \r, where the Hub's reader cuts.
        if skip_broken and (not complete or not fields[places[0]] or "\r" in "".join(fields)):
            continue
        if not complete:
            raise ValueError(f"{where}: {len(fields)} columns, by its tabs; there should be at least {max(places) + 1}")
        yield where, *(fields[place] for place in places)
