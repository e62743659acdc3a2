"""From examples to batches of token ids: an example becomes rows, one for classification, one a choice for multiple choice.

Nothing here knows about networks; what a row looks like depends on whether an encoder or a GPT will read it.
"""
from dataclasses import dataclass

import torch

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
    """a and b cut to `room` ids together, the longer one first; a loses its end, or with keep_end its beginning."""
    kept_b = min(len(b), max(room // 2, room - len(a)))
    kept_a = min(len(a), room - kept_b)
    return (a[len(a) - kept_a:] if keep_end else a[:kept_a]), b[:kept_b]


def encoder_row(tokenizer, a, b, max_length, keep_end=False):
    """[CLS] a [SEP], or [CLS] a [SEP] b [SEP] (RoBERTa: two separators between), and where b begins."""
    cls, sep = [tokenizer.cls], [tokenizer.sep]
    between = sep * 2 if tokenizer.double_sep else sep
    if b is None:
        row = cls + a[:max_length - 2] + sep
        return row, len(row)
    a, b = shorten(a, b, max_length - 2 - len(between), keep_end)
    return cls + a + between + b + sep, len(cls + a + between)


def gpt_row(tokenizer, prompt, answer, max_length):
    """The answer after as much of the prompt's end as fits, at least one token; and where the answer begins."""
    first = [tokenizer.bos] if tokenizer.add_bos else []
    answer = answer[:max_length // 2] if len(answer) > max_length // 2 else answer
    prompt = first + prompt[-(max_length - len(answer) - len(first)):]
    prompt = prompt or [tokenizer.bos if tokenizer.bos is not None else tokenizer.eos]
    return prompt + answer, len(prompt)


def instruct_example(example, tokenizer, max_length, protocol, train_on_prompt, name):
    """Example under an instruct protocol: what is trained on, prompt and response, and the prompt to generate from."""
    prompt = tokenizer.encode(instruct.prompt(example["instruction"], protocol, training=True))
    if protocol == "instruct":
        response = tokenizer.encode(example["output"])
    else:  # theirs: one text, in which the template's last space joins the response's first word; as many tokens as the prompt alone has are its
        whole = tokenizer.encode(instruct.prompt(example["instruction"], protocol, training=True) + example["output"])
        prompt, response = whole[:len(prompt)], whole[len(prompt):]
    end = [tokenizer.eos] if tokenizer.eos is not None else []
    row, boundary = gpt_row(tokenizer, prompt, response + end, max_length)
    asked, _ = gpt_row(tokenizer, tokenizer.encode(instruct.prompt(example["instruction"], protocol)), [], max_length)
    return Example([(row, 1 if train_on_prompt else boundary)], 0, prompt=tuple(asked), answer=example["answer"], set=name)


def encode_examples(task, examples, tokenizer, is_gpt, max_length, protocol="likelihood", train_on_prompt=False):
    """list of Example; no row is longer than max_length. ValueError where an example lacks what the protocol needs."""
    known = {}  # the choices of one question share its prompt

    def ids(text):
        if text not in known:
            if len(known) > 10000:
                known.clear()
            known[text] = tokenizer.encode(text)
        return known[text]

    encoded = []
    for example in examples:
        name = example.get("set", "")
        if protocol != "likelihood":
            if "instruction" not in example:
                raise ValueError(f"--protocol={protocol}: {task.name} has examples without \"instruction\", \"output\" and \"answer\"")
            encoded.append(instruct_example(example, tokenizer, max_length, protocol, train_on_prompt, name))
            continue
        if task.kind == "multiple_choice":
            if "choices" not in example:
                raise ValueError(f"{task.name} has examples without \"choices\", which only --protocol=instruct can use")
            prompt = ids(example["prompt"])
            answers = [ids(choice) for choice in example["choices"]]
            rows = [gpt_row(tokenizer, prompt, a, max_length) if is_gpt else encoder_row(tokenizer, prompt, a, max_length, True)
                    for a in answers]
            n_bytes = tuple(max(1, len(choice.strip().encode())) for choice in example["choices"])
        else:
            a, b = ids(example["text_a"]), example.get("text_b")
            if is_gpt:
                rows = [gpt_row(tokenizer, a if b is None else sum(shorten(a, ids("\n" + b), max_length - 1), []), [], max_length)]
            else:
                rows = [encoder_row(tokenizer, a, None if b is None else ids(b), max_length)]
            n_bytes = ()
        encoded.append(Example(rows, example["label"], n_bytes, set=name))
    return encoded


def epoch_batches(examples, batch_size, seed, epoch):
    """Lists of indices: a shuffle by (seed, epoch) alone, so that a resumed run needs no more than its step, grouped by length.

    Sorting whole epochs would show the model all short texts first; sorted within pools of 50 batches, which are then
    shuffled, neighbours in a batch are of nearly one length and the order stays random.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    n_batches = max(1, len(examples) // batch_size)
    order = torch.randperm(len(examples), generator=generator)[:n_batches * batch_size].tolist()
    batches = []
    for start in range(0, len(order), 50 * batch_size):
        pool = sorted(order[start:start + 50 * batch_size], key=lambda i: max(len(ids) for ids, _ in examples[i].rows))
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def move(tensor, device):
    """To the device without waiting for it: from pinned memory a GPU fetches by itself. (A traced tensor has no memory to pin.)"""
    if torch.device(device).type == "cuda" and type(tensor) is torch.Tensor:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(rows, pad, device):
    """idx, mask and token types, each (rows, longest), padded on the right; mask None when there is nothing to mask."""
    longest = max(len(ids) for ids, _ in rows)
    idx = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    lengths = torch.tensor([len(ids) for ids, _ in rows])[:, None]
    starts = torch.tensor([boundary for _, boundary in rows])[:, None]
    position = torch.arange(longest)
    mask, types = position < lengths, ((position >= starts) & (position < lengths)).long()
    whole = all(len(ids) == longest for ids, _ in rows)
    return move(idx, device), None if whole else move(mask, device), move(types, device)


def collate_left(prompts, pad, device):
    """idx and mask (rows, longest) of prompts to generate from, padded on the left."""
    longest = max(map(len, prompts))
    idx = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in prompts])
    mask = torch.arange(longest) >= torch.tensor([longest - len(ids) for ids in prompts])[:, None]
    return move(idx, device), move(mask, device)
