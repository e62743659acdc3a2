"""The eight GLUE tasks, a row each, from their canonical files or from a folder of the user's.

Labels are numbered as in the Hub's GLUE. The test sets have no labels and are left out. Sentences lose the spaces
around them: every sentence of SST-2 ends with one, which would be a token of its own.
"""
import http.client
import sys
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from data.jsonl import read_jsonl, read_lines

HOST = "https://dl.fbaipublicfiles.com/"
SPLITS = "train", "validation", "validation_mismatched"


class Row(NamedTuple):
    files: tuple    # at HOST
    folder: str     # inside the zip file
    columns: tuple  # label, text_a and, for pairs, text_b: names in the header, or numbers where there is none
    counts: tuple   # official number of rows of each split
    labels: tuple = ("0", "1")  # in order; empty for regression, a number from 0 to 5
    metric: str = "accuracy"    # the one in LoRA's tables where GLUE itself takes the mean of two
    parts: tuple = ("train.tsv", "dev.tsv")  # the file of each split


# MRPC as Microsoft published it, and the ids of the rows that GLUE validates on
MSR, DEV_IDS = "msr_paraphrase_train.txt", "mrpc_dev_ids.tsv"
ENTAILMENT = "entailment", "not_entailment"
GLUE = {
    "cola": Row(("glue/data/CoLA.zip",), "CoLA", (1, 3), (8551, 1043), metric="matthews"),
    "sst2": Row(("glue/data/SST-2.zip",), "SST-2", ("label", "sentence"), (67349, 872)),
    "mrpc": Row((f"senteval/senteval_data/{MSR}", f"glue/data/{DEV_IDS}"), "MRPC",
                ("Quality", "#1 String", "#2 String"), (3668, 408)),
    "stsb": Row(("glue/data/STS-B.zip",), "STS-B", ("score", "sentence1", "sentence2"), (5749, 1500), (), "pearson"),
    "qqp":  Row(("glue/data/QQP-clean.zip",), "QQP", ("is_duplicate", "question1", "question2"), (363846, 40430)),
    "mnli": Row(("glue/data/MNLI.zip",), "MNLI", ("gold_label", "sentence1", "sentence2"), (392702, 9815, 9832),
                ("entailment", "neutral", "contradiction"),
                parts=("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")),
    "qnli": Row(("glue/data/QNLIv2.zip",), "QNLI", ("label", "question", "sentence"), (104743, 5463), ENTAILMENT),
    "rte":  Row(("glue/data/RTE.zip",), "RTE", ("label", "sentence1", "sentence2"), (2490, 277), ENTAILMENT),
}


def fetch_glue(name, scratch):
    """(train, validation), lists of examples, fetched into `scratch`; ValueError unless all rows are there."""
    row = GLUE[name]
    for file in row.files:
        path = scratch / ("" if file.endswith(".zip") else row.folder) / Path(file).name
        path.parent.mkdir(parents=True, exist_ok=True)
        download(HOST + file, path)
    splits = read_glue(name, scratch)
    for split, examples, expected in zip(SPLITS, splits, (row.counts[0], sum(row.counts[1:]))):
        if len(examples) != expected:
            raise ValueError(f"{HOST}{row.files[0]} gives {len(examples):,} {split} examples; the official number is "
                             f"{expected:,}, so it is not used")
    return splits


def download(url, path):
    print(f"fetching {url}", flush=True, file=sys.stderr)
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            path.write_bytes(response.read())  # read() raises where the connection ends early, read(n) would not
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"could not fetch {url} ({error}): if you have it, pass its folder as --data_dir") from None


def read_glue(name, data_dir):
    """(train, validation) of a task, lists of examples, from the user's folder. It may hold subsets, in one of three
    forms: ours (cola/train.jsonl ...), the official folder (CoLA/train.tsv ...), or the zip file (CoLA.zip)."""
    row, data_dir = GLUE[name], Path(data_dir)
    archive = data_dir / Path(row.files[0]).name
    if (data_dir / name / "train.jsonl").is_file():
        splits = read_own(name, data_dir / name)
    elif (data_dir / row.folder).is_dir():
        splits = read_official(name, data_dir)
    elif archive.suffix == ".zip" and archive.is_file():
        splits = read_official(name, archive)
    else:
        other = f" nor {archive.name}" if archive.suffix == ".zip" else ""
        raise ValueError(f"{data_dir} has neither {name}/train.jsonl nor {row.folder}/{row.parts[0]}{other}")
    for split, examples in splits.items():
        if not examples:
            raise ValueError(f"the {split} set of {name} in {data_dir} is empty")
    train, validation, *mismatched = splits.values()
    if mismatched:  # MNLI's two validation sets become parts of one, which are scored one by one
        validation = [{**example, "set": "matched"} for example in validation]
        validation += [{**example, "set": "mismatched"} for example in mismatched[0]]
    return train, validation


def read_own(name, folder):
    """{split: examples} from JSONL files, with the row's labels: STS-B's are numbers even where all are whole."""
    known = [str(i) for i in range(len(GLUE[name].labels))]
    splits = {}
    for split in SPLITS:
        path = folder / f"{split}.jsonl"
        if path.is_file():
            splits[split] = [{**example, "label": label_number(str(example["label"]), known, where)}
                             for where, example in read_jsonl(path)]
        elif split == "validation":
            raise ValueError(f"{folder} has train.jsonl and no validation.jsonl")
    return splits


def read_official(name, path):
    """{split: examples} from the published files in a folder or a zip file."""
    row, splits = GLUE[name], {}
    try:
        folder = (zipfile.Path(path) if path.is_file() else path) / row.folder
        for ids in (folder / DEV_IDS, folder / "dev_ids.tsv"):
            if ids.is_file():
                return read_mrpc(folder / MSR, ids)
        for split, part in zip(SPLITS, row.parts):
            rows = read_table(folder / part, row.columns, skip_incomplete=name == "qqp")
            splits[split] = [make_example(row, *fields) for fields in rows]
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is no whole zip file ({error}): fetch it again") from None
    return splits


def read_mrpc(path, ids):
    """MRPC is one file; a second one, `ids`, names the rows to validate on by their two ids."""
    row, splits = GLUE["mrpc"], {"train": [], "validation": []}
    held_out = {tuple(line.split("\t")[:2]) for _, line in read_lines(ids)}
    for *fields, id_a, id_b in read_table(path, (*row.columns, "#1 ID", "#2 ID")):
        splits["validation" if (id_a, id_b) in held_out else "train"].append(make_example(row, *fields))
    return splits


def make_example(row, where, label, text_a, text_b=None):
    pair = {} if text_b is None else {"text_b": text_b.strip()}
    return {"text_a": text_a.strip(), **pair, "label": label_number(label, row.labels, where)}


def label_number(label, known, where):
    """The label's index among the known ones; without known ones the number from 0 to 5 that it spells."""
    if label in known:
        return known.index(label)
    try:
        if not known and 0 <= float(label) <= 5:
            return float(label)
    except ValueError:
        pass
    expected = f"one of {', '.join(known)}" if known else "a number from 0 to 5"
    raise ValueError(f"{where}: unknown label {label[:40]!r}: it is {expected}")


def read_table(path, columns, skip_incomplete=False):
    """Yield ("FILE, line N", value of each column ...) for every row of a file with tabs. Quotes mean nothing."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
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
        # QQP has broken rows. The Hub's reader also ends a line at a lone \r and drops both halves; so the official
        # number of rows is without those.
        if skip_incomplete and not (complete and fields[places[0]] and "\r" not in "".join(fields)):
            continue
        if not complete:
            raise ValueError(f"{where}: {len(fields)} columns, by its tabs; there should be at least {max(places) + 1}")
        yield where, *(fields[place] for place in places)
