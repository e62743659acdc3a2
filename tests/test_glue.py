"""GLUE: tiny files of each task in the published formats, from a folder, a zip file and a server that misbehaves."""
import json
import os
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data import glue
from data.glue import DEV_IDS, GLUE, MSR, write_glue
from data.metrics import METRICS
from data.tasks import load_task

QUOTED, SEPARATED = 'He said "no', "one\u2028still\x0b\x85one"  # what csv's quoting and str.splitlines would break
PAIR = (QUOTED, SEPARATED)


def tsv(header, *rows):
    return "".join("\t".join(row) + "\n" for row in (([header.split()] if isinstance(header, str) else header) + list(rows)))


def mnli(label, n):
    return ["7", "31193", "31193n", "government", "( b )", "( b )", "(ROOT)", "(ROOT)", *PAIR, *["neutral"] * n, label]


MNLI_HEADER = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse sentence1 sentence2 "
MSR_HEADER = [["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]]
MSR_ROWS = [["1", "702876", "702977", *PAIR], ["0", "2108705", "2108831", *PAIR], ["1", "1330381", "1330521", *PAIR],
            ["0", "702977", "702876", *PAIR], ["0", "702876", "2108831", *PAIR]]
# What the published files look like: {name in the zip: text}, and the labels that come of them, in order, split by split.
RAW = {
    "cola": ({"CoLA/train.tsv": tsv([], ["gj04", "1", "", QUOTED], ["gj04", "0", "*", SEPARATED]), "CoLA/dev.tsv": tsv([], ["r-67", "0", "*", QUOTED])},
             [[1, 0], [0]]),
    "sst2": ({"SST-2/train.tsv": tsv("sentence label", [QUOTED + " ", "0"], [SEPARATED, "1"]), "SST-2/dev.tsv": tsv("sentence label", [QUOTED, "1"])},
             [[0, 1], [1]]),
    "mrpc": ({f"MRPC/{MSR}": "\ufeff" + tsv(MSR_HEADER, *MSR_ROWS).replace("\n", "\r\n"), f"MRPC/{DEV_IDS}": "2108705\t2108831\n702876\t702977\n"},
             [[1, 0, 0], [1, 0]]),
    "stsb": ({f"STS-B/{part}.tsv": tsv("index genre filename year old_index source1 source2 sentence1 sentence2 score",
                                       *(["0", "main-captions", "MSRvid", "2012test", "1", "none", "none", *PAIR, score] for score in scores))
              for part, scores in (("train", ("5.000", "3.8", "0")), ("dev", ("2.75",)))}, [[5.0, 3.8, 0.0], [2.75]]),
    "qqp": ({"QQP/train.tsv": tsv("id qid1 qid2 question1 question2 is_duplicate", ["1", "2", "3", *PAIR, "0"], ["4", "5", "6", "half a question"],
                                  ["another half", "1"], ["7", "8", "9", *PAIR, "1"], ["7", "8", "9", *PAIR, ""], ["7", "8", "9", "a\rb", "c", "1"]),
             "QQP/dev.tsv": tsv("id qid1 qid2 question1 question2 is_duplicate", ["1", "2", "3", *PAIR, "1"])}, [[0, 1], [1]]),
    "mnli": ({"MNLI/train.tsv": tsv(MNLI_HEADER + "label1 gold_label", mnli("contradiction", 1), mnli("entailment", 1), mnli("neutral", 1))}
             | {f"MNLI/dev_{part}.tsv": tsv(MNLI_HEADER + "label1 label2 label3 label4 label5 gold_label", *(mnli(label, 5) for label in labels))
                for part, labels in (("matched", ["entailment"]), ("mismatched", ["contradiction", "neutral"]))}, [[2, 0, 1], [0], [2, 1]]),
    "qnli": ({"QNLI/train.tsv": tsv("index question sentence label", ["0", *PAIR, "entailment"], ["1", *PAIR, "not_entailment"]),
              "QNLI/dev.tsv": tsv("index question sentence label", ["0", *PAIR, "not_entailment"])}, [[0, 1], [1]]),
    "rte": ({"RTE/train.tsv": tsv("index sentence1 sentence2 label", ["0", *PAIR, "not_entailment"], ["1", *PAIR, "entailment"]),
             "RTE/dev.tsv": tsv("index sentence1 sentence2 label", ["0", *PAIR, "entailment"])}, [[1, 0], [0]]),
}
ZIPS = {"cola": "CoLA.zip", "sst2": "SST-2.zip", "stsb": "STS-B.zip", "qqp": "QQP-clean.zip", "mnli": "MNLI.zip", "qnli": "QNLIv2.zip", "rte": "RTE.zip"}


def lay_out(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def written(folder):
    """Examples of the training and of each validation set, in order; "set" says which of MNLI's two."""
    assert sorted(os.listdir(folder)) == ["train.jsonl", "validation.jsonl"], "and nothing else"
    train, validation = ([json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")]
                         for name in ("train", "validation"))
    sets = list(dict.fromkeys(example.get("set", "") for example in validation))
    assert sets in ([""], ["matched", "mismatched"])
    return [train] + [[{key: value for key, value in example.items() if key != "set"} for example in validation if example.get("set", "") == name]
                      for name in sets]


def labels(folder):
    return [[example["label"] for example in part] for part in written(folder)]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "making" / "out").mkdir(parents=True)
    return tmp_path / "making" / "out"


class Server(ThreadingHTTPServer):
    """Serves `files` {path: bytes}; `answers`, while there are any, come first: a status, half of a file, no length, or silence."""
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.answers, self.asked, self.over = {}, [], [], threading.Event()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, answer = self.server, self.server.answers.pop(0) if self.server.answers else None
        server.asked.append(self.path)
        if answer == "silence":
            return server.over.wait(10)
        if isinstance(answer, int) or self.path not in server.files:
            return self.send_error(answer or 404)
        content = server.files[self.path]
        self.send_response(200)
        if answer != "no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:len(content) // 2] if answer == "cut" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("DUAL_LORA_GLUE_URL", f"http://127.0.0.1:{server.server_port}/mirror")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(glue, "PAUSE", 0)
        monkeypatch.setattr(glue, "TIMEOUT", 0.3)
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def publish(server, name, tmp_path, monkeypatch, files=None):
    """The task on the server as it is at HOST; the official counts become those of the tiny files."""
    files = files or RAW[name][0]
    if name in ZIPS:
        server.files[f"/mirror/{ZIPS[name]}"] = zipped(tmp_path / "published.zip", files).read_bytes()
    else:
        server.files |= {f"/mirror/{Path(file).name}": text.encode() for file, text in files.items()}
    monkeypatch.setitem(GLUE, name, GLUE[name]._replace(counts=tuple(len(part) for part in RAW[name][1])))


# Each task, each way


@pytest.mark.parametrize("name", GLUE)
def test_each_task_from_its_address(name, server, out, tmp_path, monkeypatch, capfd):
    publish(server, name, tmp_path, monkeypatch)
    write_glue(name, out)
    assert labels(out) == RAW[name][1] and sorted(os.listdir(out.parent)) == ["out"], "no download stays behind"
    assert sorted(server.asked) == sorted(server.files) and "fetching http" in capfd.readouterr().err


@pytest.mark.parametrize("name", GLUE)
def test_each_task_from_the_official_folder(name, out, tmp_path):
    write_glue(name, out, str(lay_out(tmp_path / "mine", RAW[name][0])))
    assert labels(out) == RAW[name][1]


@pytest.mark.parametrize("name", ZIPS)
def test_each_task_from_the_zip_file(name, out, tmp_path):
    zipped(tmp_path / ZIPS[name], RAW[name][0])
    write_glue(name, out, tmp_path)
    assert labels(out) == RAW[name][1]


@pytest.mark.parametrize("name", GLUE)
def test_each_task_from_our_own_format_and_as_a_task(name, out, tmp_path):
    write_glue(name, out, lay_out(tmp_path / "mine", RAW[name][0]))
    (tmp_path / "ours").mkdir()
    out.rename(tmp_path / "ours" / name)
    out.mkdir()
    write_glue(name, out, tmp_path / "ours")
    assert written(out) == written(tmp_path / "ours" / name)
    if name not in ("cola", "mrpc"):
        task = load_task(str(out))
        assert task.n_classes == (len(GLUE[name].labels) or 1)


@pytest.mark.parametrize("name", GLUE)
def test_sentences_keep_quotes_and_odd_separators_and_lose_spaces_around(name, out, tmp_path):
    write_glue(name, out, lay_out(tmp_path / "mine", RAW[name][0]))
    for example in sum(written(out), []):
        if name in ("cola", "sst2"):
            assert example["text_a"] in (QUOTED, SEPARATED) and "text_b" not in example
        else:
            assert (example["text_a"], example["text_b"]) == PAIR


@pytest.mark.parametrize("name", GLUE)
def test_windows_line_ends_and_a_byte_order_mark_change_nothing(name, out, tmp_path):
    files = {file: "\ufeff" + text.removeprefix("\ufeff").replace("\r", "").replace("\n", "\r\n") + "\r\n" for file, text in RAW[name][0].items()}
    if name == "qqp":  # the row with a lone \r has none now
        files["QQP/train.tsv"] = files["QQP/train.tsv"].replace("ab\tc\t1", "ab\tc")
    write_glue(name, out, lay_out(tmp_path / "mine", files))
    assert labels(out) == RAW[name][1]


def test_mrpc_is_split_by_pairs_of_ids_under_either_name_or_comes_already_split(out, tmp_path):
    files = dict(RAW["mrpc"][0])
    files["MRPC/dev_ids.tsv"] = files.pop(f"MRPC/{DEV_IDS}")
    write_glue("mrpc", out, lay_out(tmp_path / "a", files))
    assert labels(out) == RAW["mrpc"][1]
    write_glue("mrpc", out, lay_out(tmp_path / "b", {"MRPC/train.tsv": "\ufeff" + tsv(MSR_HEADER, *MSR_ROWS[:3]), "MRPC/dev.tsv": tsv(MSR_HEADER, MSR_ROWS[3])}))
    assert labels(out) == [[1, 0, 1], [0]]


def test_the_table_is_the_official_one():
    counts = {"cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408), "stsb": (5749, 1500), "qqp": (363846, 40430),
              "mnli": (392702, 9815, 9832), "qnli": (104743, 5463), "rte": (2490, 277)}
    assert {name: row.counts for name, row in GLUE.items()} == counts
    assert {name: row.metric for name, row in GLUE.items() if row.metric != "accuracy"} == {"cola": "matthews", "stsb": "pearson"}
    assert all(row.metric in METRICS and len(row.parts) == len(row.counts) for row in GLUE.values())


def test_addresses(monkeypatch):
    monkeypatch.delenv("DUAL_LORA_GLUE_URL", raising=False)
    addresses = [glue.address(file) for row in GLUE.values() for file in row.files]
    assert set(addresses) == {f"https://dl.fbaipublicfiles.com/glue/data/{file}" for file in (*ZIPS.values(), "mrpc_dev_ids.tsv")} | {
        "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt"}
    monkeypatch.setenv("DUAL_LORA_GLUE_URL", "http://mirror/x/")
    assert glue.address("glue/data/CoLA.zip") == "http://mirror/x/CoLA.zip"


# What can be wrong


@pytest.mark.parametrize("name", GLUE)
def test_another_number_of_rows_is_refused_from_the_address_only(name, server, out, tmp_path, monkeypatch):
    publish(server, name, tmp_path, monkeypatch)
    for i, split in enumerate(("train", "validation", "validation_mismatched")[:len(GLUE[name].counts)]):
        counts = GLUE[name].counts
        with monkeypatch.context() as patch:
            patch.setitem(GLUE, name, GLUE[name]._replace(counts=(*counts[:i], 1234, *counts[i + 1:])))
            with pytest.raises(ValueError, match=rf"{Path(GLUE[name].files[0]).name} gives {counts[i]} {split} examples, .* 1,234: it is not used"):
                write_glue(name, out)
            assert os.listdir(out) == [], "all or nothing"
            write_glue(name, out, lay_out(tmp_path / "mine", RAW[name][0]))
            assert labels(out) == RAW[name][1]
            [file.unlink() for file in out.iterdir()]


RTE = RAW["rte"][0]
BAD = [  # what is wrong in the folder, and the words of the error
    ("rte", {"RTE/dev.tsv": RTE["RTE/dev.tsv"]}, "has no RTE/train.tsv"),
    ("rte", {"RTE/train.tsv": RTE["RTE/train.tsv"]}, "has no RTE/dev.tsv"),
    ("mnli", {k: v for k, v in RAW["mnli"][0].items() if "mismatched" not in k}, "has no MNLI/dev_mismatched.tsv"),
    ("rte", {"x": ""}, "has neither rte/train.jsonl nor the folder RTE with train.tsv nor RTE.zip"),
    ("mrpc", {"x": ""}, f"has neither mrpc/train.jsonl nor the folder MRPC with train.tsv or {MSR} and {DEV_IDS}"),
    ("mrpc", {f"MRPC/{DEV_IDS}": "1\t2\n"}, f"has no MRPC/{MSR}"),
    ("mrpc", {f"MRPC/{MSR}": "x"}, "has no MRPC/train.tsv"),
    ("rte", {**RTE, "RTE/train.tsv": RTE["RTE/train.tsv"] + "2\tonly\n"}, "train.tsv, line 4: 2 columns, by its tabs, and there should be at least 4"),
    ("cola", {**RAW["cola"][0], "CoLA/dev.tsv": "gj04\t1\n"}, "dev.tsv, line 1: 2 columns"),
    ("rte", {**RTE, "RTE/train.tsv": RTE["RTE/train.tsv"] + "\n2\ta\tb\tentails\n"},
     "train.tsv, line 5: unknown label 'entails': it is one of entailment, not_entailment"),
    ("cola", {**RAW["cola"][0], "CoLA/dev.tsv": "gj04\t2\t\tx\n"}, "line 1: unknown label '2': it is one of 0, 1"),
    ("mnli", {**RAW["mnli"][0], "MNLI/dev_matched.tsv": RAW["mnli"][0]["MNLI/dev_matched.tsv"].replace("\tentailment\n", "\t-\n")}, "unknown label '-'"),
    *(("stsb", {**RAW["stsb"][0], "STS-B/dev.tsv": RAW["stsb"][0]["STS-B/dev.tsv"].replace("2.75", score)},
       f"dev.tsv, line 2: unknown label '{score}': it is a number from 0 to 5") for score in ("x", "", "nan", "5.1", "-1")),
    ("qqp", {**RAW["qqp"][0], "QQP/dev.tsv": RAW["qqp"][0]["QQP/dev.tsv"].replace("\t1\n", "\t2\n")}, "line 2: unknown label '2'"),
    ("rte", {**RTE, "RTE/train.tsv": "sentence1\tsentence2\nx\ty\n"}, "line 1: the header has no column 'label', it has sentence1, sentence2"),
    ("rte", {**RTE, "RTE/dev.tsv": ""}, "the validation set of rte in .* is empty"),
    ("rte", {**RTE, "RTE/dev.tsv": "index\tsentence1\tsentence2\tlabel\n"}, "the validation set of rte in .* is empty"),
    ("rte", {**RTE, "RTE/dev.tsv": RTE["RTE/dev.tsv"].encode() + b"1\t\xff\tb\tentailment\n"}, r"dev.tsv, line 3: not UTF-8 \(invalid start byte at byte 2"),
    ("rte", {"rte/train.jsonl": '{"text_a": "x", "label": 0}\n'}, "rte has train.jsonl and no validation.jsonl"),
    ("rte", {"rte/train.jsonl": '{"text_a": "x", "label": 0}\n{"text_a": "x", "label": 2}\n', "rte/validation.jsonl": '{"text_a": "x", "label": 0}\n'},
     "train.jsonl, line 2: unknown label '2': it is one of 0, 1"),
    ("rte", {"rte/train.jsonl": "{", "rte/validation.jsonl": ""}, "train.jsonl, line 1: not JSON"),
    ("rte", {"RTE.zip": b"PK\x03\x04 cut off"}, "RTE.zip is no whole zip file .*fetch it again"),
]


@pytest.mark.parametrize("name, files, words", BAD)
def test_each_error_says_what_and_where_and_writes_nothing(name, files, words, out, tmp_path):
    mine = lay_out(tmp_path / "mine", files)
    with pytest.raises(ValueError, match=words) as error:
        write_glue(name, out, mine)
    assert "\n" not in str(error.value) and (str(mine) in str(error.value)) and os.listdir(out) == []


def test_the_mismatched_set_may_be_missing_from_our_own_format(out, tmp_path):
    write_glue("mnli", out, lay_out(tmp_path, {f"mnli/{split}.jsonl": '{"text_a": "x", "text_b": "y", "label": 2}\n' for split in ("train", "validation")}))
    assert labels(out) == [[2], [2]]


def test_regression_in_our_own_format_stays_regression_with_whole_numbers(out, tmp_path):
    write_glue("stsb", out, lay_out(tmp_path, {f"stsb/{split}.jsonl": '{"text_a": "x", "text_b": "y", "label": 5}\n' for split in ("train", "validation")}))
    assert labels(out) == [[5.0], [5.0]] and "5.0" in (out / "train.jsonl").read_text()


def test_a_zip_file_with_a_flipped_bit_or_without_a_member_is_refused(out, tmp_path):
    with zipfile.ZipFile(tmp_path / "RTE.zip", "w") as archive:
        for name, text in RTE.items():
            archive.writestr(name, text)
    content = (tmp_path / "RTE.zip").read_bytes()
    (tmp_path / "RTE.zip").write_bytes(content.replace(b"He said", b"He sayd", 1))
    with pytest.raises(ValueError, match="RTE.zip is no whole zip file .Bad CRC-32 for file 'RTE/train.tsv'"):
        write_glue("rte", out, tmp_path)
    zipped(tmp_path / "RTE.zip", {"RTE/train.tsv": RTE["RTE/train.tsv"], "dev.tsv": RTE["RTE/dev.tsv"]})
    with pytest.raises(ValueError, match="RTE.zip has no RTE/dev.tsv"):
        write_glue("rte", out, tmp_path)
    assert os.listdir(out) == []


@pytest.mark.parametrize("answers, asked", [([500, 503], 3), (["silence"], 2), (["cut"], 2), (["cut", 500], 3), (["no length"], 1)])
def test_a_server_that_fails_at_first_is_asked_again(answers, asked, server, out, tmp_path, monkeypatch):
    publish(server, "rte", tmp_path, monkeypatch)
    server.answers, started = answers, time.time()
    write_glue("rte", out)
    assert labels(out) == RAW["rte"][1] and len(server.asked) == asked and time.time() - started < 5


@pytest.mark.parametrize("answers, words, asked", [
    ([404], "HTTP Error 404: Not Found", 1), ([403], "HTTP Error 403", 1), ([500] * 3, "HTTP Error 500", 3),
    (["cut"] * 3, r"cut off after [\d,]+ of [\d,]+ bytes", 3)])
def test_a_failed_download_names_the_address_the_reason_and_the_way_out(answers, words, asked, server, out, tmp_path, monkeypatch):
    publish(server, "rte", tmp_path, monkeypatch)
    server.answers = answers
    with pytest.raises(ValueError, match=rf"could not fetch http://127.0.0.1:\d+/mirror/RTE.zip .*{words}.*--data_dir") as error:
        write_glue("rte", out)
    assert len(server.asked) == asked and os.listdir(out) == [] and os.listdir(out.parent) == ["out"] and "\n" not in str(error.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "no address"])
def test_no_server_at_all(url, out, monkeypatch):
    monkeypatch.setenv("DUAL_LORA_GLUE_URL", url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(glue, "PAUSE", 0)
    with pytest.raises(ValueError, match=rf"could not fetch {url}/RTE.zip .*--data_dir"):
        write_glue("rte", out)


def test_a_page_instead_of_the_file_is_refused(server, out, tmp_path, monkeypatch):
    publish(server, "rte", tmp_path, monkeypatch)
    server.files["/mirror/RTE.zip"] = b"<html>please log in</html>"
    with pytest.raises(ValueError, match="RTE.zip is no whole zip file"):
        write_glue("rte", out)


# The real data, where somebody has them

REAL = Path(os.environ.get("DUAL_LORA_GLUE") or "there is none")


@pytest.mark.skipif(not REAL.is_dir(), reason="DUAL_LORA_GLUE names no folder with <task>/train.jsonl or the official files")
@pytest.mark.parametrize("name", GLUE)
def test_real_data_have_the_official_counts(name, out):
    if not (REAL / name).is_dir() and not (REAL / GLUE[name].folder).is_dir():
        pytest.skip(f"{REAL} has no {name}")
    write_glue(name, out, REAL)
    parts = written(out)
    assert tuple(map(len, parts)) == GLUE[name].counts[:len(parts)]
    seen = {example["label"] for part in parts for example in part}
    assert seen == set(range(len(GLUE[name].labels))) if GLUE[name].labels else (min(seen), max(seen)) == (0, 5)
