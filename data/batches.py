"""From examples to batches of token ids. An example is one row, or for multiple choice one row for each choice.

Nothing here knows about networks; what a row looks like depends on whether an encoder or a GPT will read it.
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from data import instruct

SHORTEST = 8  # max_length: room for the special tokens, and for one token of each of two texts
SEED_STRIDE = 1_000_003  # no run counts so far, so seed * SEED_STRIDE + count is another number for each pair of them


class Row(NamedTuple):
    ids: list
    start: int  # where the second part begins: text_b, or the answer


@dataclass
class Example:
    rows: list            # of Row
    label: float | None   # index of the class or of the right choice, or a number; None where it is to be predicted
    n_bytes: tuple = ()   # length of each choice, for accuracy_norm
    prompt: tuple = ()    # ids to generate from, under the instruct protocol
    answer: str = ""      # what should be found in the generated text
    subset: str = ""      # the part of the validation data that it counts for; "set" in a file
    cut: bool = False     # whether a text was shortened to max_length


def encode_continued(encode, prompt, continuations):
    """(ids of the prompt, [ids of each continuation]), each text encoded whole and then cut.

    subtle: a space at the seam is one token with the word behind it, and SentencePiece puts a space before whatever it
    encodes. So the cut is where the prompt's own tokens end in the whole, without the white space at its end. All
    continuations are cut at one place: if one of them changes the prompt's last token, that token counts in each.
    """
    alone = encode(prompt.rstrip())
    wholes = [encode(prompt + continuation) for continuation in continuations]
    start = 0  # how many ids all of them begin with
    for ids in zip(alone, *wholes):
        if len(set(ids)) > 1:
            break
        start += 1
    return alone[:start], [whole[start:] for whole in wholes]


def shorten(a, ends, room, keep_end=False):
    """a and each of `ends`, cut so that a with any of them has at most `room` ids, and whether anything was cut.

    An end gets half of the room and what a leaves over; a gets the rest. All ends follow the same a, so that choices
    are compared after the same text. An end is cut at its end, and so is a, or with keep_end at its beginning.
    """
    longest = max(map(len, ends))
    kept = min(longest, max(room // 2, room - len(a)))
    kept_a = min(len(a), room - kept)
    shortened = a[len(a) - kept_a:] if keep_end else a[:kept_a]
    return shortened, [end[:kept] for end in ends], len(a) + longest > room


def encoder_rows(tokenizer, a, ends, max_length, keep_end=False):
    """A Row for each end, [CLS] a [SEP] end [SEP] (RoBERTa: two separators between), and whether anything was cut."""
    cls, sep = [tokenizer.cls], [tokenizer.sep]
    between = sep * 2 if tokenizer.double_sep else sep
    a, ends, cut = shorten(a, ends, max_length - 2 - len(between), keep_end)
    first = cls + a + between
    return [Row(first + end + sep, len(first)) for end in ends], cut


def gpt_rows(tokenizer, a, ends, max_length, keep_end=True):
    """A Row for each end, a and the end, and whether anything was cut."""
    begin = [tokenizer.bos] if tokenizer.add_bos else []
    if not begin and not a:  # some token has to predict an end's first one
        begin = [tokenizer.eos if tokenizer.bos is None else tokenizer.bos]
    a, ends, cut = shorten(a, ends, max_length - len(begin), keep_end)
    return [Row(begin + a + end, len(begin + a)) for end in ends], cut


def encode_examples(examples, tokenizer, is_gpt, max_length, protocol="likelihood", train_on_prompt=False):
    """List of Example; no row is longer than max_length. ValueError where an example lacks what the protocol needs."""
    if max_length < SHORTEST:
        raise ValueError(f"--max_length={max_length} leaves no room for a text: it should be at least {SHORTEST}")
    if protocol == "instruct":
        return [instruct_example(example, tokenizer, max_length, train_on_prompt) for example in examples]
    encode = lru_cache(maxsize=10_000)(tokenizer.encode)  # MNLI's and QNLI's examples share their first texts
    return [(text_example if "text_a" in example else choice_example)(example, tokenizer, encode, is_gpt, max_length)
            for example in examples]


def text_example(example, tokenizer, encode, is_gpt, max_length):
    """One row. Texts lose their ends, but a GPT's single text its beginning: the last token is what its head reads."""
    a, b = example["text_a"], example.get("text_b")
    if is_gpt and b is None:
        rows, cut = gpt_rows(tokenizer, encode(a), [[]], max_length)
    elif is_gpt:
        rows, cut = gpt_rows(tokenizer, *encode_continued(tokenizer.encode, a, ["\n" + b]), max_length, keep_end=False)
    elif b is None:
        ids, _, cut = shorten(encode(a), [[]], max_length - 2)
        rows = [Row([tokenizer.cls, *ids, tokenizer.sep], len(ids) + 2)]
    else:
        rows, cut = encoder_rows(tokenizer, encode(a), [encode(b)], max_length)
    return Example(rows, example.get("label"), subset=example.get("set", ""), cut=cut)


def choice_example(example, tokenizer, encode, is_gpt, max_length):
    """A row for each choice. The prompt loses its beginning, since the question stands at its end."""
    if "choices" not in example:
        raise ValueError('an example has no "choices", which --protocol=likelihood needs')
    prompt, choices = example["prompt"], example["choices"]
    if is_gpt:
        prompt_ids, ends = encode_continued(tokenizer.encode, prompt, choices)
        rows, cut = gpt_rows(tokenizer, prompt_ids, ends, max_length)
    else:
        ends = [encode(choice) for choice in choices]
        rows, cut = encoder_rows(tokenizer, encode(prompt), ends, max_length, keep_end=True)
    for choice, end in zip(choices, ends):
        if not choice.strip() or not end:  # nothing to score: it would have probability 1
            raise ValueError(f"the choice {choice!r} has no tokens, after the prompt {prompt[-60:]!r}")
    n_bytes = tuple(len(choice.strip().encode("utf-8", "replace")) for choice in choices)
    return Example(rows, example.get("label"), n_bytes, subset=example.get("set", ""), cut=cut)


def instruct_example(example, tokenizer, max_length, train_on_prompt):
    """What is trained on, prompt and response; and the prompt to generate from. The template ends in white space, which
    the model writes itself, so the prompt's tokens do not depend on the response."""
    if "instruction" not in example:
        raise ValueError('--protocol=instruct needs examples with "instruction", "output" and "answer"')
    prompt = instruct.prompt(example["instruction"])
    prompt, responses = encode_continued(tokenizer.encode, prompt, [example.get("output", "")])
    end = [] if tokenizer.eos is None else [tokenizer.eos]  # learnt even after a response that was cut
    (row,), cut = gpt_rows(tokenizer, prompt, responses, max_length - len(end))
    (asked,), _ = gpt_rows(tokenizer, prompt, [[]], max_length)
    # The label is the row to learn, which is the only one.
    return Example([Row(row.ids + end, 1 if train_on_prompt else row.start)], 0, prompt=tuple(asked.ids),
                   answer=example.get("answer", ""), subset=example.get("set", ""), cut=cut)


def epoch_batches(examples, batch_size, seed, epoch):
    """Lists of indices, texts of similar length together. The order depends on (seed, epoch) alone, so a resumed run
    needs to know no more than its step."""
    generator = torch.Generator().manual_seed(seed * SEED_STRIDE + epoch)
    n_batches = max(1, len(examples) // batch_size)
    order = torch.randperm(len(examples), generator=generator)[:n_batches * batch_size].tolist()
    batches = []
    # Sorting a whole epoch would show all short texts first: so pools of 50 batches are sorted, the batches shuffled.
    for start in range(0, len(order), 50 * batch_size):
        pool = order[start:start + 50 * batch_size]
        pool.sort(key=lambda i: max(len(row.ids) for row in examples[i].rows))
        batches += [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def move(tensor, device):
    """To the device without waiting: a GPU fetches from pinned memory by itself."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def collate(rows, pad, device):
    """idx, mask and in_second_part, each (rows, longest), padded on the right. in_second_part: 1 in a row's second
    part, else 0. mask is None if there is no padding."""
    longest = max(len(row.ids) for row in rows)
    idx = torch.tensor([row.ids + [pad] * (longest - len(row.ids)) for row in rows])
    lengths = torch.tensor([len(row.ids) for row in rows])[:, None]
    starts = torch.tensor([row.start for row in rows])[:, None]
    place = torch.arange(longest)
    mask = place < lengths
    in_second_part = ((place >= starts) & mask).long()
    return move(idx, device), None if mask.all() else move(mask, device), move(in_second_part, device)


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
