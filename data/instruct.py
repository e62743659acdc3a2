"""The commonsense sets as instructions: what the paper's LLaMA numbers are of, after LLM-Adapters (Hu et al., arXiv 2304.01933).

A question with its choices is an instruction, a template goes around it, the model writes a response, and the first thing in it
that looks like an answer counts. The wording and the white space of the records and templates are theirs, to the letter, since
they change the tokens and so the numbers.
"""
import hashlib
import json
import re


def choose(what, question, words, choices, separator=" "):
    """An instruction that asks for one of `choices`, each named by a word with its number."""
    names = [f"{words}{i}" for i in range(1, len(choices) + 1)]
    listed = separator.join(f"{name.capitalize()}: {choice}" for name, choice in zip(names, choices))
    return f"Please choose the correct {what}: {question}\n\n{listed}\n\nAnswer format: {'/'.join(names)}"


def boolq(doc):
    question = doc["query"].rpartition("\nQuestion: ")[2].removesuffix("\nAnswer:")  # they leave the passage out
    return f"Please answer the following question with true or false, question: {question}\n\nAnswer format: true/false"


def piqa(doc):
    return choose("solution to the question", doc["goal"], "solution", doc["choices"], "\n\n")


def social_iqa(doc):
    return choose("answer to the question", f"{doc['context']} {doc['question']}", "answer", doc["choices"])


def hellaswag(doc):
    """The wheel's text is cleaned: tags such as [step] are gone for good, but the capital that it gave to a begun sentence is not."""
    # A quotation mark or a bracket does not end a sentence here: the begun one may hold 'named " ann "', with spaces.
    begun = re.fullmatch(r"(?s)(.*[.!?] )(\w)([^.!?]*)", doc["query"])
    question = begun[1] + begun[2].lower() + begun[3] if begun else doc["query"]
    return choose("ending to complete the given sentence", question, "ending", [choice.strip() for choice in doc["choices"]])


def winogrande(doc):
    options = f"Option1: {doc['option1']} Option2: {doc['option2']} Answer format: option1/option2"
    return f"Please choose the correct answer to fill in the blank to complete the given sentence: {doc['sentence']}\n\n{options}"


def science(doc):
    """ARC and OpenBookQA."""
    question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return choose("answer to the question", question, "answer", doc["choices"])


# task: its instruction, and the words that an answer is made of
RECORDS = {
    "boolq": (boolq, ("true", "false")), "piqa": (piqa, ("solution",)), "social_iqa": (social_iqa, ("answer",)),
    "hellaswag": (hellaswag, ("ending",)), "winogrande": (winogrande, ("option",)), "arc_easy": (science, ("answer",)),
    "arc_challenge": (science, ("answer",)), "openbookqa": (science, ("answer",)),
}
PATTERNS = {
    "boolq": r"true|false", "piqa": r"solution1|solution2", "social_iqa": r"answer[1-5]", "hellaswag": r"ending[1-4]",
    "winogrande": r"option1|option2", "arc_easy": r"answer[1-5]", "arc_challenge": r"answer[1-5]", "openbookqa": r"answer[1-5]",
}
ANY = "|".join(dict.fromkeys(PATTERNS.values()))

MIX_NOTE = ("the mix is built from the wheel's sets and differs from LLM-Adapters' commonsense_170k: WinoGrande has 40,398 rows instead of "
            "63,238, HellaSwag's text is cleaned, and BoolQ's and the others' order is their own; --data_dir takes the original")


def record(name, doc):
    """{"instruction", "output", "answer"} of a task's raw record `doc`, as LLM-Adapters published them."""
    make, words = RECORDS[name]
    gold = int(doc["answer"]) - 1 if name == "winogrande" else doc["gold"]
    answer = words[gold] if len(words) > 1 else f"{words[0]}{gold + 1}"
    return {"instruction": make(doc), "output": f"the correct answer is {answer}", "answer": answer}


# ---------------------------------------------------------------------------------------------------------------------
# Templates

# Theirs came out of an indented source text, so that most lines begin with 16 spaces; and the one for training has two spaces
# after the first sentence and 16 on an empty line, where the one for evaluation has one and none.
LEFT = " " * 16
TRAINING = ("Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
            f"{LEFT}### Instruction:\n{LEFT}{{}}\n{LEFT}\n{LEFT}### Response:\n{LEFT}")
EVALUATION = ("Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
              f"{LEFT}### Instruction:\n{LEFT}{{}}\n\n{LEFT}### Response:\n{LEFT}")
TEMPLATES = {"instruct": (TRAINING, TRAINING), "llm_adapters": (TRAINING, EVALUATION)}


def prompt(instruction, protocol, training=False):
    """What stands before the response: under "instruct" always the training template; under "llm_adapters" their two, to the letter."""
    return TEMPLATES[protocol][0 if training else 1].replace("{}", instruction)


def template_hash(protocol):
    """12 hexadecimal digits that change with the templates."""
    return hashlib.sha256("\0".join(TEMPLATES[protocol]).encode()).hexdigest()[:12]


def extract(name, generated):
    """The first answer in a generated text, as the task spells it, or None; a task of one's own may use any of the sets' words."""
    found = re.search(PATTERNS.get(name, ANY), generated)
    return found and found[0]


def read_records(path):
    """Examples from a file of theirs, a JSON list of {"instruction", "input", "output", "answer"}; ValueError naming the entry."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path} should hold a JSON list of records, and at least one")
    examples = []
    for number, row in enumerate(rows, 1):
        values = {name: row.get(name) for name in ("instruction", "output", "answer")} if isinstance(row, dict) else {}
        wrong = [name for name in ("instruction", "output", "answer") if not isinstance(values.get(name), str)]
        if wrong:
            raise ValueError(f"{path}, entry {number}: \"{wrong[0]}\" is missing or no text")
        if row.get("input"):
            raise ValueError(f"{path}, entry {number}: \"input\" should be empty; the templates have no place for it")
        examples.append(values)
    return examples
