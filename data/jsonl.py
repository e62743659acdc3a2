"""Examples as JSON, one object a line: reading them with every field checked, and writing them.

Two kinds of example, as dicts:
    classification     {"text_a": str, "text_b": str (optional), "label": class index, or a float for regression}
    multiple choice    {"prompt": str, "choices": [str, ...], "label": index of the right choice}
The full text of a choice is prompt + choice, so a choice begins with its own space. For the instruct protocols an
example also has "instruction", "output" (the response to learn) and "answer" (what to look for in the generated
text); it may have these three alone. "set" names a part of the validation data; parts are scored one by one and
averaged.
"""
import json
import math


def read_lines(path):
    """Yield ("FILE, line N", the line), the place for messages; ValueError where a line is not UTF-8."""
    with path.open("rb") as file:  # lines end at \n alone: a sentence may hold U+2028, at which text would break
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                text = line.rstrip(b"\r\n").decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from None
            yield where, text


def read_jsonl(path):
    """List of (place, example), place being "FILE, line N"; ValueError naming the first bad line."""
    examples = []
    for where, line in read_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        examples.append((where, check_example(record, where)))
    if not examples:
        raise ValueError(f"{path} is empty: it should hold one JSON object a line")
    return examples


def write_jsonl(path, examples):
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            file.write(json.dumps(example, ensure_ascii=False) + "\n")


def check_example(record, where):
    """The fields of `record` that an example has, checked; others are dropped. ValueError beginning with `where`."""
    if not isinstance(record, dict):
        raise ValueError(f'{where}: {shown(record)} is no object; write {{"text_a": ..., "label": ...}}')
    example = {}
    if "set" in record:
        example["set"] = text_field(record, "set", where)
    if "instruction" in record:
        for name in ("instruction", "output", "answer"):
            example[name] = text_field(record, name, where)
        if "choices" not in record:
            return example
    if "choices" in record or "prompt" in record:
        example["prompt"] = text_field(record, "prompt", where)
        choices = record.get("choices")
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f'{where}: "choices" should be a list of at least two texts, and is {shown(choices)}')
        example["choices"] = choices
    else:
        example["text_a"] = text_field(record, "text_a", where)
        if record.get("text_b") is not None:
            example["text_b"] = text_field(record, "text_b", where)
    example["label"] = check_label(record, where, len(example.get("choices", ())))
    return example


def check_label(record, where, n_choices):
    label = record.get("label")
    if isinstance(label, bool) or not isinstance(label, (int, float)) or not math.isfinite(label):
        wrong = f"should be a number, and is {shown(label)}" if "label" in record else "is missing"
        raise ValueError(f'{where}: "label" {wrong}')
    if n_choices and (not isinstance(label, int) or not 0 <= label < n_choices):
        raise ValueError(f"{where}: label {label} is out of range: with {n_choices} choices it is 0 to {n_choices - 1}")
    return label


def text_field(record, name, where):
    if not isinstance(record.get(name), str):
        wrong = f"should be text, and is {shown(record[name])}" if name in record else "is missing"
        raise ValueError(f'{where}: "{name}" {wrong}')
    return record[name]


def shown(value):
    return json.dumps(value)[:40]
