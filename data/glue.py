"""The eight GLUE tasks from their canonical files: a row each, and write_glue, which makes a task's folder of one.

Labels are numbered as in the Hub's GLUE. The test sets have no labels and are left out. Sentences lose the spaces around them:
every sentence of SST-2 ends with one, which would be a token of its own. $DUAL_LORA_GLUE_URL is a mirror, all files side by side.
"""
import http.client
import os
import shutil
import sys
import tempfile
import time
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

HOST = "https://dl.fbaipublicfiles.com/"
SPLITS = "train", "validation", "validation_mismatched"
ATTEMPTS, PAUSE, TIMEOUT = 3, 2, 60  # seconds


class Row(NamedTuple):
    files: tuple    # at HOST
    folder: str     # inside the zip
    columns: tuple  # label, text_a and, for pairs, text_b: names in the header, or numbers where there is none
    labels: tuple   # in order; none: a number from 0 to 5
    metric: str     # of data/metrics.py; the one in LoRA's tables where GLUE itself takes the mean of two
    counts: tuple   # rows of each split
    parts: tuple = ("train.tsv", "dev.tsv")  # the file of each split
    skip: bool = False  # leave out rows with missing fields


MSR, DEV_IDS = "msr_paraphrase_train.txt", "mrpc_dev_ids.tsv"  # MRPC as published, and the rows of it that GLUE validates on
GLUE = {
    "cola": Row(("glue/data/CoLA.zip",), "CoLA", (1, 3), ("0", "1"), "matthews", (8551, 1043)),
    "sst2": Row(("glue/data/SST-2.zip",), "SST-2", ("label", "sentence"), ("0", "1"), "accuracy", (67349, 872)),
    "mrpc": Row((f"senteval/senteval_data/{MSR}", f"glue/data/{DEV_IDS}"), "MRPC", ("Quality", "#1 String", "#2 String"),
                ("0", "1"), "accuracy", (3668, 408)),
    "stsb": Row(("glue/data/STS-B.zip",), "STS-B", ("score", "sentence1", "sentence2"), (), "pearson", (5749, 1500)),
    "qqp":  Row(("glue/data/QQP-clean.zip",), "QQP", ("is_duplicate", "question1", "question2"), ("0", "1"), "accuracy",
                (363846, 40430), skip=True),
    "mnli": Row(("glue/data/MNLI.zip",), "MNLI", ("gold_label", "sentence1", "sentence2"),
                ("entailment", "neutral", "contradiction"), "accuracy", (392702, 9815, 9832),
                ("train.tsv", "dev_matched.tsv", "dev_mismatched.tsv")),
    "qnli": Row(("glue/data/QNLIv2.zip",), "QNLI", ("label", "question", "sentence"), ("entailment", "not_entailment"),
                "accuracy", (104743, 5463)),
    "rte":  Row(("glue/data/RTE.zip",), "RTE", ("label", "sentence1", "sentence2"), ("entailment", "not_entailment"),
                "accuracy", (2490, 277)),
}


def write_glue(name, folder, data_dir=None):
    """Write train.jsonl and validation.jsonl of the task into `folder`; all is read first. MNLI's two validation sets share a file.

    They come from HOST and then have the official numbers of rows; or from data_dir, which may hold subsets: in our own format
    (cola/train.jsonl ...), as the official folder (CoLA/train.tsv ...), or as the zip file (CoLA.zip).
    """
    from data.tasks import write_jsonl
    row, folder = GLUE[name], Path(folder)
    if data_dir is None:
        with tempfile.TemporaryDirectory(prefix=".making-glue-", dir=folder.parent) as temporary:
            fetch(row, Path(temporary))
            splits = read_official(row, find(name, Path(temporary)))
    elif (Path(data_dir) / name / "train.jsonl").is_file():
        splits = read_ready(row, Path(data_dir) / name)
    else:
        splits = read_official(row, find(name, Path(data_dir)))
    for (split, examples), expected in zip(splits.items(), row.counts):
        if data_dir is None and len(examples) != expected:
            raise ValueError(f"{address(row.files[0])} gives {len(examples):,} {split} examples, and the official number is "
                             f"{expected:,}: it is not used")
        if not examples:
            raise ValueError(f"the {split} set of {name} in {data_dir} is empty")
    if "validation_mismatched" in splits:
        parts = {"matched": splits["validation"], "mismatched": splits.pop("validation_mismatched")}
        splits["validation"] = [{**example, "set": name} for name, examples in parts.items() for example in examples]
    for split, examples in splits.items():
        write_jsonl(folder / f"{split}.jsonl", examples)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def find(name, data_dir):
    """What holds the official folder: data_dir itself, or the zip file in it."""
    row, archive = GLUE[name], data_dir / Path(GLUE[name].files[0]).name
    if (data_dir / row.folder).is_dir():
        return data_dir
    if archive.suffix == ".zip" and archive.is_file():
        return archive
    raise ValueError(f"{data_dir} has neither {name}/train.jsonl nor the folder {row.folder} with {row.parts[0]}"
                     + (f" nor {archive.name}" if archive.suffix == ".zip" else f" or {MSR} and {DEV_IDS}"))


def read_ready(row, folder):
    """{split: examples} from our own format, the labels checked."""
    from data.tasks import read_jsonl
    if not (folder / "validation.jsonl").is_file():
        raise ValueError(f"{folder} has train.jsonl and no validation.jsonl")
    paths = {split: folder / f"{split}.jsonl" for split in SPLITS}
    known = [str(label) for label in range(len(row.labels))]
    return {split: [{**example, "label": number(str(example["label"]), known, f"{path}, line {line}")}
                    for line, example in read_jsonl(path)] for split, path in paths.items() if path.is_file()}


def read_official(row, source):
    """{split: examples} from the published files in `source`, a folder or a zip file."""
    ids = [file for file in (DEV_IDS, "dev_ids.tsv") if (source / row.folder / file).is_file()]
    if not ids:
        return {split: [example(row, *fields) for fields in table(source, f"{row.folder}/{part}", row.columns, row.skip)]
                for split, part in zip(SPLITS, row.parts)}
    held_out = {tuple(fields[:2]) for _, fields in lines(source, f"{row.folder}/{ids[0]}")}
    splits = {"train": [], "validation": []}
    for *fields, id_a, id_b in table(source, f"{row.folder}/{MSR}", (*row.columns, "#1 ID", "#2 ID")):
        splits["validation" if (id_a, id_b) in held_out else "train"].append(example(row, *fields))
    return splits


def example(row, where, label, text_a, text_b=None):
    pair = {} if text_b is None else {"text_b": text_b.strip()}
    return {"text_a": text_a.strip(), **pair, "label": number(label, row.labels, where)}


def number(label, known, where):
    """The place of the label among the `known` ones or, where there are none, the number that it is."""
    if label in known:
        return known.index(label)
    try:
        if not known and 0 <= float(label) <= 5:
            return float(label)
    except ValueError:
        pass
    expected = f"one of {', '.join(known)}" if known else "a number from 0 to 5"
    raise ValueError(f"{where}: unknown label {label[:40]!r}: it is {expected}")


def table(source, member, columns, skip=False):
    """(file and line, the value of each of `columns` ...) for every row."""
    places = None if isinstance(columns[0], str) else columns
    for where, fields in lines(source, member):
        if places is None:
            for name in columns:
                if name not in fields:
                    raise ValueError(f"{where}: the header has no column {name!r}, it has {', '.join(fields)[:200]}")
            places = [fields.index(name) for name in columns]
        # The Hub's reader also ends a line at a lone \r, and so loses both halves: the official number of QQP is without them.
        elif not skip or len(fields) > max(places) and fields[places[0]] and "\r" not in "".join(fields):
            if len(fields) <= max(places):
                raise ValueError(f"{where}: {len(fields)} columns, by its tabs, and there should be at least {max(places) + 1}")
            yield where, *(fields[place] for place in places)


def lines(source, member):
    """(file and line, fields) of a file with tabs: a quote is but a character, and a line ends at \\n alone, not at U+2028."""
    path, number = source / member, 0
    try:
        with open_member(source, member) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").decode("utf-8")
                if line:
                    yield f"{path}, line {number}", line.split("\t")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # reading to the end checks the CRC
        raise ValueError(f"{source} is no whole zip file ({error}): fetch it again") from None


def open_member(source, member):
    try:
        if source.is_dir():
            return open(source / member, "rb")
        with zipfile.ZipFile(source) as archive:
            return archive.open(member)
    except (FileNotFoundError, KeyError):
        raise ValueError(f"{source} has no {member}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Fetching


def address(file):
    mirror = os.environ.get("DUAL_LORA_GLUE_URL")
    return f"{mirror.rstrip('/')}/{Path(file).name}" if mirror else HOST + file


def fetch(row, folder):
    """The row's files, in `folder` as a user would have them."""
    for file in row.files:
        target = folder / ("" if file.endswith(".zip") else row.folder) / Path(file).name
        target.parent.mkdir(exist_ok=True)
        download(address(file), target)


def download(url, path):
    for attempt in range(1, ATTEMPTS + 1):
        started = time.time()
        print(f"fetching {url} ...", end="", flush=True, file=sys.stderr)
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as response, open(path, "wb") as out:
                shutil.copyfileobj(response, out)
            size, expected = path.stat().st_size, int(response.headers["Content-Length"] or -1)
            if expected not in (size, -1):
                raise OSError(f"cut off after {size:,} of {expected:,} bytes")
            print(f" {size / 1e6:.1f} MB in {time.time() - started:.0f} s", file=sys.stderr)
            return
        except (OSError, http.client.HTTPException, ValueError) as error:
            print(f" failed ({error})", file=sys.stderr)
            if attempt == ATTEMPTS or 400 <= getattr(error, "code", 500) < 500:  # a 404 stays one
                raise ValueError(f"could not fetch {url} ({error}): get it elsewhere and give its folder as --data_dir") from None
        time.sleep(PAUSE * attempt)
