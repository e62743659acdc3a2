"""GLUE: tiny files in the published formats, from a folder and from an address."""
import os
import zipfile

import pytest
from conftest import SHARED

from data import glue
from data.glue import GLUE, fetch_glue, read_glue
from data.tasks import load_task

A, B = 'He said "no', "one\u2028still\x0b\x85one"  # what csv's quoting and str.splitlines would break


def tsv(header, *rows):
    return "".join("\t".join(row) + "\n" for row in [header.split()] * bool(header) + list(rows))


def mnli(*labels):
    header = "index genre sentence1 sentence2 label1 gold_label"
    return tsv(header, *(["7", "government", A, B, "neutral", label] for label in labels))


MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
MRPC_TRAIN = tsv("", ["0", "2108705", "2108831", A, B], ["1", "702977", "702876", A, B])
MRPC_DEV = tsv("", ["1", "702876", "702977", A, B])
QQP = "id question1 question2 is_duplicate"
# task: (its published files, the labels that come of them, split by split)
RAW = {
    "cola": ({"CoLA/train.tsv": tsv("", ["gj04", "1", "", A], ["gj04", "0", "*", B]),
              "CoLA/dev.tsv": tsv("", ["r-67", "0", "*", A])}, [[1, 0], [0]]),
    "sst2": ({"SST-2/train.tsv": tsv("sentence label", [A + " ", "0"], [B, "1"]),
              "SST-2/dev.tsv": tsv("sentence label", [A, "1"])}, [[0, 1], [1]]),
    "mrpc": ({"MRPC/train.tsv": f"\ufeff{MRPC}\r\n{MRPC_TRAIN}", "MRPC/dev.tsv": f"{MRPC}\n{MRPC_DEV}"}, [[0, 1], [1]]),
    "stsb": ({"STS-B/train.tsv": tsv("index sentence1 sentence2 score", ["0", A, B, "5.000"], ["1", A, B, "0"]),
              "STS-B/dev.tsv": tsv("index sentence1 sentence2 score", ["0", A, B, "2.75"])}, [[5.0, 0.0], [2.75]]),
    "qqp": ({"QQP/train.tsv": tsv(QQP, ["1", A, B, "0"], ["2", "half"], ["3", A, B, "1"], ["4", A, B, ""],
                                  ["5", "a\rb", "c", "1"]),
             "QQP/dev.tsv": tsv(QQP, ["1", A, B, "1"])}, [[0, 1], [1]]),
    "mnli": ({"MNLI/train.tsv": mnli("contradiction", "entailment", "neutral"),
              "MNLI/dev_matched.tsv": mnli("entailment"), "MNLI/dev_mismatched.tsv": mnli("neutral")},
             [[2, 0, 1], [0, 1]]),
    "qnli": ({"QNLI/train.tsv": tsv("index question sentence label", ["0", A, B, "entailment"],
                                    ["1", A, B, "not_entailment"]),
              "QNLI/dev.tsv": tsv("index question sentence label", ["0", A, B, "not_entailment"])}, [[0, 1], [1]]),
    "rte": ({"RTE/train.tsv": tsv("index sentence1 sentence2 label", ["0", A, B, "not_entailment"],
                                  ["1", A, B, "entailment"]),
             "RTE/dev.tsv": tsv("index sentence1 sentence2 label", ["0", A, B, "entailment"])}, [[1, 0], [0]]),
}


def write_files(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


def publish(name, tmp_path, monkeypatch):
    """The task's files at an address; their numbers of rows become the official ones."""
    files, (train, validation) = RAW[name]
    if name == "mrpc":  # one file, and the ids of the rows to validate on
        write_files(tmp_path / "host", {glue.MRPC_ROWS: f"\ufeff{MRPC}\r\n{MRPC_DEV}{MRPC_TRAIN}",
                                        glue.MRPC_DEV_IDS: "702876\t702977\n"})
    else:
        archive = {"qqp": "QQP-clean", "qnli": "QNLIv2"}.get(name, GLUE[name].folder)
        write_zip(tmp_path / "host" / "glue" / "data" / f"{archive}.zip", files)
    counts = (3, 1, 1) if name == "mnli" else (len(train), len(validation))
    monkeypatch.setattr(glue, "HOST", (tmp_path / "host").as_uri() + "/")
    monkeypatch.setitem(GLUE, name, GLUE[name]._replace(counts=counts))


@pytest.mark.parametrize("name", GLUE)
def test_each_task_is_fetched_and_read_quotes_and_odd_separators_kept(name, tmp_path, monkeypatch):
    publish(name, tmp_path, monkeypatch)
    fetch_glue(name, tmp_path)
    splits = read_glue(name, tmp_path)
    assert [[example["label"] for example in split] for split in splits] == RAW[name][1]
    texts = {text for example in splits[0] for text in (example["text_a"], example.get("text_b")) if text}
    assert texts == {A, B}, "without the spaces around them"


@pytest.mark.parametrize("content, words", [
    (None, "gives 1 instead of the official 1,234 examples of rte"),
    (b"PK cut", "RTE.zip is not the zip file that it was")])
def test_what_is_not_the_official_file_is_refused(content, words, tmp_path, monkeypatch):
    publish("rte", tmp_path, monkeypatch)
    monkeypatch.setitem(GLUE, "rte", GLUE["rte"]._replace(counts=(2, 1234)))
    if content:
        (tmp_path / "host" / "glue" / "data" / "RTE.zip").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        fetch_glue("rte", tmp_path)


def test_a_fetched_task_is_kept_in_the_cache(tmp_path, monkeypatch):
    publish("rte", tmp_path, monkeypatch)
    monkeypatch.setenv("DUAL_LORA_CACHE", str(tmp_path / "cache"))
    first = load_task("rte")
    (tmp_path / "host").rename(tmp_path / "gone")
    assert load_task("rte") == first
    assert sorted(os.listdir(tmp_path / "cache" / "official-rte" / "RTE")) == ["dev.tsv", "train.tsv"]


def test_a_failed_download_names_the_address_and_the_way_out_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(glue, "HOST", (tmp_path / "nothing").as_uri() + "/")
    monkeypatch.setenv("DUAL_LORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="could not fetch file:.*RTE.zip .*--data_dir"):
        load_task("rte")
    assert os.listdir(tmp_path / "cache") == []


def test_a_task_has_its_rows_metric_and_class_names_and_mnlis_validation_two_sets(tmp_path):
    stsb, mnli = (load_task(name, write_files(tmp_path, RAW[name][0])) for name in ("stsb", "mnli"))
    assert (stsb.metric, stsb.kind, stsb.n_outputs) == ("pearson", "regression", 1)
    assert (mnli.classes, mnli.n_outputs) == (["entailment", "neutral", "contradiction"], 3)
    assert [example["set"] for example in mnli.validation] == ["matched", "mismatched"]


RTE = RAW["rte"][0]


@pytest.mark.parametrize("name, files, words", [
    ("rte", {"RTE/dev.tsv": RTE["RTE/dev.tsv"]}, "train.tsv is missing: --data_dir is a folder in GLUE's official"),
    ("rte", {**RTE, "RTE/train.tsv": RTE["RTE/train.tsv"] + "2\tonly\n"}, "train.tsv, line 4: 2 columns, by its tabs"),
    ("rte", {**RTE, "RTE/train.tsv": RTE["RTE/train.tsv"] + "\n2\ta\tb\tentails\n"},
     "train.tsv, line 5: unknown label 'entails': it is entailment, 0, not_entailment, 1"),
    ("rte", {**RTE, "RTE/train.tsv": "sentence1\tsentence2\nx\ty\n"}, "line 1: the header has no column 'label'"),
    ("rte", {**RTE, "RTE/dev.tsv": ""}, "dev.tsv is empty"),
    ("stsb", {**RAW["stsb"][0], "STS-B/dev.tsv": RAW["stsb"][0]["STS-B/dev.tsv"].replace("2.75", "x")},
     "dev.tsv, line 2: unknown label 'x': it is a number from 0 to 5"),
])
def test_what_is_wrong_is_said_with_file_and_line(name, files, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        read_glue(name, write_files(tmp_path, files))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.skipif(not (SHARED / "glue").is_dir(), reason="no shared/data/glue")
@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb", "rte"])
def test_real_data_have_the_official_counts(name):
    task = load_task(name, SHARED / "glue")
    assert (len(task.train), len(task.validation)) == GLUE[name].counts
