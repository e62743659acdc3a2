"""Examples as JSON, one object a line, read with every field checked.

    classification     {"text_a": str, "text_b": str (optional), "label": the class, text or a whole number}
    regression         the same, with labels that have a decimal point
    multiple choice    {"prompt": str, "choices": [str, ...], "label": index of the right choice}
The full text of a choice is prompt + choice, so a choice begins with its own space. For the instruct protocol an
example also has "instruction", "output" (the response to learn) and "answer" (to be found in it); it may have these
alone. "set" names a part of the validation data, parts are scored one by one and averaged. Other fields are not read.
"""
import json

FORM, PREDICTION_FORM = '{"text_a": "a text", "label": 1}', '"a text", in quotes, or {"text_a": "a text"}'


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


def read_json(path):
    """What a JSON file holds."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # the last is of [[[[[[ ...
        raise ValueError(f"{path} is not there, or is not JSON that can be read ({error})") from None


def read_jsonl(path, labelled=True):
    """List of (place, example), place being "FILE, line N"; ValueError naming the first bad line. labelled=False:
    examples to predict from, whose "label", "output" and "answer" are not read; a line may be a text alone."""
    refuse_table(path, labelled)
    form = FORM if labelled else PREDICTION_FORM
    examples = []
    for where, line in read_lines(path):
        if not line.strip():
            raise ValueError(f"{where}: the line is blank; remove it")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON that can be read ({error}); a line is {form}") from None
        if isinstance(record, str) and not labelled:
            record = {"text_a": record}
        examples.append((where, check_example(record, where, labelled)))
    if not examples:
        raise ValueError(f"{path} is empty; a line is {form}")
    return examples


def refuse_table(path, labelled=True):
    """ValueError for a CSV or TSV file, with the command that turns it into JSONL."""
    if path.suffix.lower() in (".csv", ".tsv"):
        tabs = ", delimiter='\\t'" if path.suffix.lower() == ".tsv" else ""
        label, file = (", label=row['LABEL']", "train.jsonl") if labelled else ("", "texts.jsonl")
        raise ValueError(
            f"{path} is a table, and should be JSONL: python -c \"import csv, json; [print(json.dumps(dict(text_a="
            f"row['TEXT']{label}))) for row in csv.DictReader(open('{path}', encoding='utf-8-sig'){tabs})]\" > {file}, "
            f"with the names of your columns for {'TEXT and LABEL; for regression float(...)' if labelled else 'TEXT'}")


def check_example(record, where, labelled=True):
    """The fields of `record` that an example has, checked; others are dropped. ValueError beginning with `where`."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: {shown(record)} is no object such as {FORM if labelled else PREDICTION_FORM}")
    names = ["set"] if "set" in record else []
    if "instruction" in record:
        names += ["instruction", "output", "answer"] if labelled else ["instruction"]
        if record.get("input"):
            raise ValueError(f'{where}: "input" has no place in the prompt; write it at the end of "instruction"')
    if "choices" in record:
        names += ["prompt"]
    elif "instruction" not in record:
        names += ["text_a"] if record.get("text_b") is None else ["text_a", "text_b"]
    for name in names:
        if not isinstance(record.get(name), str):
            wrong = f"should be text, and is {shown(record[name])}" if name in record else "is missing"
            raise ValueError(f'{where}: "{name}" {wrong}')
    example = {name: record[name] for name in names}
    if "choices" in record:
        example["choices"] = choices = record["choices"]
        texts = choices if isinstance(choices, list) else []
        if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f'{where}: "choices" should be two texts or more, none empty, and is {shown(choices)}')
    if labelled and ("choices" in example or "text_a" in example):
        example["label"] = check_label(record.get("label"), where, len(example.get("choices", ())))
    return example


def check_label(label, where, n_choices):
    """The index of a choice; or where there are none a number, or text without needless white space."""
    if n_choices:
        if type(label) is not int or not 0 <= label < n_choices:
            raise ValueError(f"{where}: label {shown(label)} is out of range: with {n_choices} choices it is 0 to "
                             f"{n_choices - 1}")
    elif isinstance(label, str) and label.strip():
        label = " ".join(label.split())  # "good " and "good" are one class
    elif type(label) not in (int, float) or not abs(label) < 1e38:
        raise ValueError(f'{where}: "label" should be text or a number that fits float32, and is {shown(label)}')
    return label


def shown(value):
    return json.dumps(value, default=str)[:40]
