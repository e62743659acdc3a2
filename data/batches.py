"""From examples to batches of token ids. An example is one row, or for multiple choice one row for each choice.

Nothing here knows about networks; what a row looks like depends on whether an encoder or a GPT will read it.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.utils.rnn import pad_sequence

from data import instruct


@dataclass
class Example:
    rows: list            # of (ids, boundary): where text_b, or the answer, begins
    label: float          # class, number, or index of the right choice
    n_bytes: tuple = ()   # length of each choice, for accuracy_norm
    prompt: tuple = ()    # ids to generate from, under the instruct protocols
    answer: str = ""      # what should be found in the generated text
    set: str = ""         # the part of the validation data that it counts for


def shorten(a, b, room, keep_end=False):
    """a and b cut to `room` ids together, the longer one first. a loses its end, or with keep_end its beginning."""
    kept_b = min(len(b), max(room // 2, room - len(a)))
    kept_a = min(len(a), room - kept_b)
    return (a[len(a) - kept_a:] if keep_end else a[:kept_a]), b[:kept_b]


def encoder_row(tokenizer, a, b, max_length, keep_end=False):
    """[CLS] a [SEP], or [CLS] a [SEP] b [SEP] (RoBERTa: two separators between), and where b begins."""
    cls, sep = [tokenizer.cls], [tokenizer.sep]
    if b is None:
        row = cls + a[:max_length - 2] + sep
        return row, len(row)
    between = sep * 2 if tokenizer.double_sep else sep
    a, b = shorten(a, b, max_length - 2 - len(between), keep_end)
    return cls + a + between + b + sep, len(cls + a + between)


def gpt_row(tokenizer, prompt, answer, max_length):
    """As much of the prompt's end as fits, at least one token, then the answer; and where the answer begins."""
    first = [tokenizer.bos] if tokenizer.add_bos else []
    answer = answer[:max_length // 2]
    prompt = first + prompt[-(max_length - len(answer) - len(first)):]
    if not prompt:
        prompt = [tokenizer.bos if tokenizer.bos is not None else tokenizer.eos]
    return prompt + answer, len(prompt)


def encode_examples(task, examples, tokenizer, is_gpt, max_length, protocol="likelihood", train_on_prompt=False):
    """List of Example; no row is longer than max_length. ValueError where an example lacks what the protocol needs."""
    encode = lru_cache(maxsize=10_000)(tokenizer.encode)  # the choices of one question share its prompt
    encoded = []
    for example in examples:
        if protocol != "likelihood":
            if "instruction" not in example:
                raise ValueError(f'--protocol={protocol}: {task.name} has examples without "instruction", "output" '
                                 f'and "answer"')
            encoded.append(instruct_example(example, tokenizer, max_length, protocol, train_on_prompt))
        elif task.kind == "multiple_choice":
            if "choices" not in example:
                raise ValueError(f'{task.name} has examples without "choices", which only --protocol=instruct can use')
            encoded.append(choice_example(example, tokenizer, encode, is_gpt, max_length))
        else:
            encoded.append(classification_example(example, tokenizer, encode, is_gpt, max_length))
    return encoded


def classification_example(example, tokenizer, encode, is_gpt, max_length):
    a, b = encode(example["text_a"]), example.get("text_b")
    if not is_gpt:
        row = encoder_row(tokenizer, a, None if b is None else encode(b), max_length)
    elif b is None:
        row = gpt_row(tokenizer, a, [], max_length)
    else:
        a, b = shorten(a, encode("\n" + b), max_length - 1)
        row = gpt_row(tokenizer, a + b, [], max_length)
    return Example([row], example["label"], set=example.get("set", ""))


def choice_example(example, tokenizer, encode, is_gpt, max_length):
    prompt, rows = encode(example["prompt"]), []
    for choice in example["choices"]:
        if is_gpt:
            rows.append(gpt_row(tokenizer, prompt, encode(choice), max_length))
        else:
            rows.append(encoder_row(tokenizer, prompt, encode(choice), max_length, keep_end=True))
    n_bytes = tuple(max(1, len(choice.strip().encode())) for choice in example["choices"])
    return Example(rows, example["label"], n_bytes, set=example.get("set", ""))


def instruct_example(example, tokenizer, max_length, protocol, train_on_prompt):
    """What is trained on, prompt and response; and the prompt to generate from."""
    template = instruct.prompt(example["instruction"], protocol, training=True)
    prompt = tokenizer.encode(template)
    if protocol == "instruct":
        response = tokenizer.encode(example["output"])
    else:
        # LLM-Adapters encode one text, in which the template's last space joins the response's first word. The first
        # len(prompt) tokens count as the prompt.
        whole = tokenizer.encode(template + example["output"])
        prompt, response = whole[:len(prompt)], whole[len(prompt):]
    end = [tokenizer.eos] if tokenizer.eos is not None else []
    row, boundary = gpt_row(tokenizer, prompt, response + end, max_length)
    asked = tokenizer.encode(instruct.prompt(example["instruction"], protocol))
    asked, _ = gpt_row(tokenizer, asked, [], max_length)
    return Example([(row, 1 if train_on_prompt else boundary)], 0, prompt=tuple(asked), answer=example["answer"],
                   set=example.get("set", ""))


def epoch_batches(examples, batch_size, seed, epoch):
    """Lists of indices, texts of similar length together. The order depends on (seed, epoch) alone, so a resumed run
    needs to know no more than its step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    n_batches = max(1, len(examples) // batch_size)
    order = torch.randperm(len(examples), generator=generator)[:n_batches * batch_size].tolist()
    batches = []
    # Sorting a whole epoch would show all short texts first: so pools of 50 batches are sorted, the batches shuffled.
    for start in range(0, len(order), 50 * batch_size):
        pool = order[start:start + 50 * batch_size]
        pool.sort(key=lambda i: max(len(ids) for ids, _ in examples[i].rows))
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def move(tensor, device):
    """To the device without waiting: a GPU fetches from pinned memory by itself."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(rows, pad, device):
    """idx, mask and token types, each (rows, longest), padded on the right; mask is None if there is no padding."""
    longest = max(len(ids) for ids, _ in rows)
    idx = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    lengths = torch.tensor([len(ids) for ids, _ in rows])[:, None]
    boundaries = torch.tensor([boundary for _, boundary in rows])[:, None]
    position = torch.arange(longest)
    mask = position < lengths
    types = ((position >= boundaries) & mask).long()
    return move(idx, device), None if mask.all() else move(mask, device), move(types, device)


def collate_left(prompts, pad, device):
    """idx and mask, each (rows, longest), of prompts to generate from, padded on the left."""
    longest = max(map(len, prompts))
    idx = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts])
    mask = torch.arange(longest) >= torch.tensor([longest - len(ids) for ids in prompts])[:, None]
    return move(idx, device), move(mask, device)


def by_choice(scores, batch):
    """scores (rows,) as (examples, most choices), -inf where an example has fewer."""
    parts = scores.split([len(example.rows) for example in batch])
    return pad_sequence(parts, batch_first=True, padding_value=-math.inf)


def batches_by_length(lengths, tokens=8192):
    """Lists of indices, the longest first, so that a batch has little padding and about `tokens` tokens."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    while order:
        size = max(1, tokens // lengths[order[-1]])
        yield order[-size:]
        order = order[:-size]
