"""Fine-tune a published encoder or GPT with Dual LoRA, on classification or on multiple choice.

    python train.py                                              # MiniLM on 28,614 headlines, sarcastic or not
    python train.py --task=arc_easy                              # SmolLM2-135M on a commonsense set of the paper
    python train.py --task=path/to/folder --method=lora --r=16   # one's own train.jsonl and validation.jsonl

Every option is a line of Config below; --name=value sets it, --help prints them. An encoder, and a GPT on classification, get
a head on top, trained with the adapters. A GPT on multiple choice learns to continue the question with the right answer,
and is scored by the likelihood that it gives to each. out_dir receives metrics.jsonl (its last line is the final result),
adapter.pt (for dual_lora.load_adapter) and checkpoint.pt (for --resume=true).
"""
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F

from data.download import model_folder
from data.tasks import load_task, majority_score, score
from data.tokenizer import Tokenizer
from dual_lora import (AdaptedLinear, DoRALinear, DualLoRALinear, LoRALinear, adapter_report, apply_adapters, save_adapter,
                       save_atomically, set_warmup)
from model import GPT, Classifier, load_pretrained

METHODS = ("dual_lora", "lora", "dora", "full", "head")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Learning rates for (method, kind of model) when --learning_rate is not given; how they were chosen is in the README.
LEARNING_RATES = {
    "encoder": {"dual_lora": 5e-3, "lora": 5e-3, "dora": 5e-3, "full": 1e-4, "head": 2e-2},
    "gpt":     {"dual_lora": 2e-3, "lora": 1e-3, "dora": 1e-3, "full": 5e-5, "head": 5e-3},
}
MAX_STEPS = {"encoder": 500, "gpt": 200}


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    task: str = option("sarcasm", "a task's name, or a folder with train.jsonl and validation.jsonl")
    model: Optional[str] = option(None, "minilm, smollm2, or a folder with config.json; default: minilm, for multiple choice smollm2")
    method: str = option("dual_lora", "what is trained: " + ", ".join(METHODS))
    # adapters
    targets: str = option("q_proj,v_proj", "the layers that get an adapter, by the last part of their names")
    r: int = option(8, "rank of LoRA and DoRA; Dual LoRA spends the same parameters as r1 = r2 = r / 2")
    r1: Optional[int] = option(None, "rank of Dual LoRA's magnitude group; default r / 2")
    r2: Optional[int] = option(None, "rank of Dual LoRA's direction group; default r / 2")
    alpha: float = option(16.0, "scale: dW is alpha / sqrt(r1 r2) times its factors, LoRA's alpha / r times")
    dropout: float = option(0.0, "on the adapters' input; for Dual LoRA it costs five large products a step instead of three")
    ste: str = option("clip", "the sign's gradient: clip (the paper's), xnor, identity")
    init_std: float = option(0.02, "standard deviation of A, B, C and D at the start")
    magnitude: str = option("relu", "relu, or none to leave the ReLU out")
    direction: str = option("sign", "sign, or none to leave the Sign out")
    warmup_steps: int = option(30, "steps in which the factor on dW grows from 0 to 1")
    # optimisation
    learning_rate: Optional[float] = option(None, "peak of AdamW's learning rate; default by method and kind of model, printed")
    lr_warmup_steps: int = option(0, "steps in which the learning rate grows from 0; it then falls linearly to 0")
    batch_size: int = option(32, "examples a step")
    micro_batch_size: Optional[int] = option(None, "examples at once, if not the whole batch; each rebuilds dW, so prefer large ones")
    max_steps: Optional[int] = option(None, "optimiser steps; default 500 for an encoder, 200 for a GPT")
    weight_decay: float = option(0.0, "on the head's matrices, or with method full on all")
    adapter_weight_decay: float = option(0.0, "on the adapters; the sign is blind to the scale of C and D")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")
    # data, evaluation, files
    max_length: int = option(128, "tokens; longer texts are cut")
    eval_interval: int = option(250, "steps between evaluations; there is one at the end in any case")
    eval_examples: Optional[int] = option(None, "evaluate on the first so many validation examples; default all")
    log_interval: int = option(10, "steps between progress lines")
    checkpoint_interval: int = option(50, "steps between checkpoints")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    seed: int = option(0, "head, data order, adapters and dropout each draw from their own generator made from it")
    device: str = option("auto", "auto (cuda, then mps, then cpu), or one of these")
    dtype: str = option("auto", "of the products: float32, or bfloat16 by autocast; auto: bfloat16 where CUDA has it")
    out_dir: str = option("out", "where metrics.jsonl, adapter.pt and checkpoint.pt go")
    resume: bool = option(False, "go on from out_dir/checkpoint.pt if there is one")


# Which options do nothing for which methods: set there, they are an error rather than ignored.
ADAPTER_ONLY = ("targets", "r", "alpha", "dropout", "adapter_weight_decay")
DUAL_ONLY = ("r1", "r2", "ste", "init_std", "magnitude", "direction", "warmup_steps")


# ---------------------------------------------------------------------------------------------------------------------
# Options


def parse(arguments):
    """Config from ["--name=value", ...]; ValueError naming the argument and what it should be."""
    kinds, values = typing.get_type_hints(Config), {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or name not in kinds:
            raise ValueError(f"{argument!r} is no option: write --name=value with one of {', '.join(kinds)}; --help explains them")
        kind = next(k for k in typing.get_args(kinds[name]) or (kinds[name],) if k is not type(None))
        values[name] = convert(name, text, kind)
    cfg = Config(**values)
    check(cfg)
    return cfg


def convert(name, text, kind):
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--{name}={text}: true or false")
        return text.lower() == "true"
    try:
        value = kind(text)
    except ValueError:
        raise ValueError(f"--{name}={text}: it should be a {'whole number' if kind is int else 'number'}") from None
    if kind is float and not math.isfinite(value):
        raise ValueError(f"--{name}={text}: it should be a finite number")
    return value


def check(cfg):
    """Raise ValueError for values that make no sense, alone or together."""
    names = {"method": METHODS, "dtype": ("auto", *DTYPES), "ste": ("clip", "xnor", "identity"), "magnitude": ("relu", "none"),
             "direction": ("sign", "none")}
    if cfg.dtype == "float16":
        raise ValueError("--dtype=float16: its loss scaler would push every gradient into the sign's clip; use bfloat16 or float32")
    for name, known in names.items():
        if getattr(cfg, name) not in known:
            raise ValueError(f"--{name}={getattr(cfg, name)}: choose from {', '.join(known)}")
    at_least = {1: ("r", "r1", "r2", "batch_size", "micro_batch_size", "max_steps", "eval_interval", "eval_examples", "log_interval",
                    "checkpoint_interval"),
                0: ("warmup_steps", "lr_warmup_steps", "weight_decay", "adapter_weight_decay", "grad_clip", "seed"), 8: ("max_length",)}
    for low, group in at_least.items():
        for name in group:
            if getattr(cfg, name) is not None and getattr(cfg, name) < low:
                raise ValueError(f"--{name}={getattr(cfg, name)}: it should be at least {low}")
    for name in ("alpha", "init_std", "learning_rate"):
        if getattr(cfg, name) is not None and getattr(cfg, name) <= 0:
            raise ValueError(f"--{name}={getattr(cfg, name)}: it should be above 0")
    if not 0 <= cfg.dropout < 1:
        raise ValueError(f"--dropout={cfg.dropout}: it should be at least 0 and below 1")
    idle = (DUAL_ONLY if cfg.method != "dual_lora" else ()) + (ADAPTER_ONLY if cfg.method in ("full", "head") else ())
    for f in dataclasses.fields(Config):
        if f.name in idle and getattr(cfg, f.name) != f.default:
            raise ValueError(f"--{f.name}={getattr(cfg, f.name)} does nothing with --method={cfg.method}")
    if cfg.method == "dual_lora" and cfg.r % 2 and None in (cfg.r1, cfg.r2):
        raise ValueError(f"--r={cfg.r}: Dual LoRA halves it, r1 = r2 = r / 2; give an even r, or r1 and r2")


def usage():
    lines = [__doc__.strip(), "", "Options and their defaults:"]
    for f in dataclasses.fields(Config):
        default = "" if f.default is None else str(f.default).lower() if isinstance(f.default, bool) else f.default
        lines.append(f"  --{f.name}={default}".ljust(32) + f.metadata["help"])
    return "\n".join(lines)


def pick_device(name):
    """torch.device for "auto" or a name; ValueError when this machine has no such device."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, here in there.items() if here))
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there.get(kind) or (index and not (index.isdecimal() and int(index) < count)):
        raise ValueError(f"--device={name}: not on this machine, which has {', '.join(kind for kind, here in there.items() if here)}")
    return torch.device(name)


def pick_dtype(name, device):
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if bf16 else torch.float32
    return DTYPES[name]


# ---------------------------------------------------------------------------------------------------------------------
# Data: an example becomes rows of token ids, one for classification, one a choice for multiple choice


@dataclass
class Example:
    rows: list        # of (ids, boundary): where text_b, or the answer, begins
    label: float
    n_bytes: list     # length of each choice, for accuracy_norm


def shorten(a, b, room, keep_end=False):
    """a and b cut to `room` ids together, the longer one first; a loses its end, or with keep_end its beginning."""
    kept_b = min(len(b), max(room // 2, room - len(a)))
    kept_a = min(len(a), room - kept_b)
    return (a[len(a) - kept_a:] if keep_end else a[:kept_a]), b[:kept_b]


def encoder_row(tokenizer, a, b, max_length, keep_end=False):
    """[CLS] a [SEP], or [CLS] a [SEP] b [SEP] (RoBERTa: two separators between), and where b begins."""
    cls, sep = [tokenizer.cls], [tokenizer.sep]
    between = sep * 2 if tokenizer.cls == tokenizer.bos else sep
    if b is None:
        row = cls + a[:max_length - 2] + sep
        return row, len(row)
    a, b = shorten(a, b, max_length - 2 - len(between), keep_end)
    return cls + a + between + b + sep, len(cls + a + between)


def gpt_row(tokenizer, prompt, answer, max_length):
    """The answer after as much of the prompt's end as fits, at least one token; and where the answer begins."""
    first = [tokenizer.bos] if tokenizer.add_bos else []
    prompt = prompt or first or [tokenizer.bos if tokenizer.bos is not None else tokenizer.eos]
    answer = answer[:max_length // 2] if len(answer) > max_length // 2 else answer
    prompt = first + prompt[-(max_length - len(answer) - len(first)):]
    return prompt + answer, len(prompt)


def encode_examples(task, examples, tokenizer, is_gpt, max_length):
    """list of Example; no row is longer than max_length."""
    known = {}  # the choices of one question share its prompt

    def ids(text):
        if text not in known:
            if len(known) > 10000:
                known.clear()
            known[text] = tokenizer.encode(text)
        return known[text]

    encoded = []
    for example in examples:
        if task.kind == "multiple_choice":
            prompt = ids(example["prompt"])
            answers = [ids(choice) for choice in example["choices"]]
            rows = [gpt_row(tokenizer, prompt, a, max_length) if is_gpt else encoder_row(tokenizer, prompt, a, max_length, True)
                    for a in answers]
            n_bytes = [max(1, len(choice.strip().encode())) for choice in example["choices"]]
        else:
            a, b = ids(example["text_a"]), example.get("text_b")
            if is_gpt:
                rows = [gpt_row(tokenizer, a if b is None else sum(shorten(a, ids("\n" + b), max_length - 1), []), [], max_length)]
            else:
                rows = [encoder_row(tokenizer, a, None if b is None else ids(b), max_length)]
            n_bytes = [1]
        encoded.append(Example(rows, example["label"], n_bytes))
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


def collate(rows, pad, device):
    """idx, mask and token types, each (rows, longest), padded on the right; mask None when there is nothing to mask."""
    longest = max(len(ids) for ids, _ in rows)
    idx = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    lengths = torch.tensor([len(ids) for ids, _ in rows])[:, None]
    starts = torch.tensor([boundary for _, boundary in rows])[:, None]
    position = torch.arange(longest)
    mask, types = position < lengths, ((position >= starts) & (position < lengths)).long()
    whole = all(len(ids) == longest for ids, _ in rows)
    return idx.to(device), None if whole else mask.to(device), types.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Model


def build(cfg, task, device):
    """(model, tokenizer): the pre-trained model, a head where the task needs one, adapters, everything else frozen."""
    folder = model_folder(cfg.model)
    model = load_pretrained(folder)
    tokenizer = Tokenizer(folder)
    is_gpt = isinstance(model, GPT)
    if not is_gpt and None in (tokenizer.cls, tokenizer.sep):
        raise ValueError(f"{folder}: its vocabulary has no [CLS] and [SEP], which an encoder needs")
    limit = model.max_length
    if cfg.max_length > limit:
        raise ValueError(f"--max_length={cfg.max_length}: this model has {limit} positions")
    model.checkpoint = cfg.checkpointing
    if not (is_gpt and task.kind == "multiple_choice"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = Classifier(model, 1 if task.kind == "multiple_choice" else task.n_classes)
    elif cfg.method == "head":
        raise ValueError("--method=head trains a new head, and a GPT on multiple choice has none: it is scored by likelihood")
    model.to(device).requires_grad_(cfg.method == "full")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed + 1)
        add_adapters(model, cfg)
    if isinstance(model, Classifier):
        model.head.requires_grad_(True)
    return model, tokenizer


def add_adapters(model, cfg):
    targets = [target.strip() for target in cfg.targets.split(",")]
    if cfg.method == "dual_lora":
        apply_adapters(model, targets, r1=cfg.r1 or cfg.r // 2, r2=cfg.r2 or cfg.r // 2, alpha=cfg.alpha, dropout=cfg.dropout,
                       ste=cfg.ste, init_std=cfg.init_std, magnitude=cfg.magnitude, direction=cfg.direction)
    elif cfg.method in ("lora", "dora"):
        layer = LoRALinear if cfg.method == "lora" else DoRALinear
        apply_adapters(model, targets, layer=layer, r=cfg.r, alpha=cfg.alpha, dropout=cfg.dropout)


def make_optimizer(model, cfg):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    adapters = [p for name, p in named if "lora_" in name]
    matrices = [p for name, p in named if "lora_" not in name and p.ndim > 1]
    rest = [p for name, p in named if "lora_" not in name and p.ndim <= 1]
    groups = [(adapters, cfg.adapter_weight_decay), (matrices, cfg.weight_decay), (rest, 0.0)]
    return torch.optim.AdamW([{"params": params, "weight_decay": decay} for params, decay in groups if params], lr=cfg.learning_rate)


def answer_logprobs(model, idx, rows):
    """Log-probability of each answer token and whether it is the likeliest: (n,), (n,), and its row (n,), all rows in a line.

    The vocabulary is wide, so the hidden states of the answers alone go through lm_head.
    """
    position = torch.arange(idx.shape[1] - 1, device=idx.device)
    starts = torch.tensor([boundary - 1 for _, boundary in rows], device=idx.device)[:, None]
    ends = torch.tensor([len(ids) - 1 for ids, _ in rows], device=idx.device)[:, None]
    counts = (position >= starts) & (position < ends)  # (rows, T - 1): position t predicts token t + 1
    hidden = model.hidden(idx[:, :-1])  # no mask: padding is on the right, where a causal model does not look
    logits, targets = model.lm_head(hidden[counts]).float(), idx[:, 1:][counts]
    return -F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets, counts.nonzero()[:, 0]


def training_loss(model, task, batch, pad, device):
    """(sum of the loss, number right, both tensors; number of targets, number of tokens) of a batch of examples."""
    if not isinstance(model, Classifier):
        rows = [example.rows[example.label] for example in batch]
        idx, _, _ = collate(rows, pad, device)
        logprobs, right, _ = answer_logprobs(model, idx, rows)
        return -logprobs.sum(), right.sum(), targets_in(model, batch), sum(len(ids) for ids, _ in rows)
    rows = [row for example in batch for row in example.rows]
    n_tokens = sum(len(ids) for ids, _ in rows)
    logits = model(*collate(rows, pad, device)).float()
    if task.kind == "multiple_choice":
        logits = by_choice(logits[:, 0], batch)
    labels = torch.tensor([example.label for example in batch], device=device)
    if task.n_classes == 1:
        return F.mse_loss(logits[:, 0], labels.float(), reduction="sum"), labels.new_zeros(()), len(batch), n_tokens
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum(), len(batch), n_tokens


def targets_in(model, batch):
    """What a batch's loss is the mean over: answer tokens for a GPT on multiple choice, else examples."""
    if isinstance(model, Classifier):
        return len(batch)
    return sum(len(ids) - boundary for ids, boundary in (example.rows[example.label] for example in batch))


def by_choice(scores, batch):
    """scores (rows,) as (examples, most choices), -inf where an example has fewer."""
    table = scores.new_full((len(batch), max(len(example.rows) for example in batch)), -math.inf)
    for i, part in enumerate(scores.split([len(example.rows) for example in batch])):
        table[i, :len(part)] = part
    return table


@torch.no_grad()
def evaluate(model, task, examples, pad, device, tokens=8192):
    """The task's metrics on `examples`; rows of nearly one length go together, about `tokens` of them at a time."""
    model.eval()
    rows = [row for example in examples for row in example.rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scores = torch.empty(len(rows), task.n_classes if isinstance(model, Classifier) and task.kind == "classification" else 1)
    while order:
        size = max(1, tokens // len(rows[order[-1]][0]))
        chosen, order = order[-size:], order[:-size]
        part = [rows[i] for i in chosen]
        idx, mask, types = collate(part, pad, device)
        if isinstance(model, Classifier):
            scores[chosen] = model(idx, mask, types).float().cpu()
        else:
            logprobs, _, row = answer_logprobs(model, idx, part)
            scores[chosen] = torch.zeros(len(part), device=device).index_add_(0, row, logprobs).cpu()[:, None]
    model.train()
    labels = [example.label for example in examples]
    if task.kind == "classification":
        return score(task.metric, (scores[:, 0] if task.n_classes == 1 else scores.argmax(1)).tolist(), labels)
    values = score(task.metric, by_choice(scores[:, 0], examples).argmax(1).tolist(), labels)
    if not isinstance(model, Classifier):  # by bytes, since a long answer is improbable however right it is
        per_byte = scores[:, 0] / torch.tensor([n for example in examples for n in example.n_bytes])
        values["accuracy_norm"] = score(task.metric, by_choice(per_byte, examples).argmax(1).tolist(), labels)["accuracy"]
    return values


# ---------------------------------------------------------------------------------------------------------------------
# The run


def rate(cfg, step):
    """Learning rate of `step` (from 0): linear warm-up, linear decay to 0."""
    grow = min(1.0, (step + 1) / cfg.lr_warmup_steps) if cfg.lr_warmup_steps else 1.0
    return cfg.learning_rate * grow * (1 - step / cfg.max_steps)


def warmup_factor(cfg, step):
    """Factor on dW at `step`: 0 in the very first forward pass, which is the pre-trained model's."""
    return min(1.0, step / cfg.warmup_steps) if cfg.warmup_steps else 1.0


class Run:
    """What a checkpoint holds: trainable parameters, optimizer, step, random state, counters and the metrics so far."""

    def __init__(self, cfg, model, optimizer):
        self.cfg, self.model, self.optimizer = cfg, model, optimizer
        self.step, self.history = 0, []
        self.pending = []  # of each step since the last progress line: (step, loss, number right, number of targets)
        self.folder = Path(cfg.out_dir)
        self.settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out_dir", "resume")}

    def record(self, **values):
        """A line of metrics.jsonl. No clock in it: the same run twice writes the same file."""
        self.history.append(json.dumps(values))
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(self.history[-1] + "\n")

    def trainable(self):
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def counters(self):
        return {name: m.clip_count for name, m in self.model.named_modules() if isinstance(m, DualLoRALinear)}

    def save(self):
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        save_atomically({"settings": self.settings, "step": self.step, "history": self.history,
                         "parameters": {name: p.detach() for name, p in self.trainable().items()},
                         "optimizer": self.optimizer.state_dict(), "counters": self.counters(),
                         "random": torch.get_rng_state(), "cuda": cuda,
                         "pending": [(step, loss.cpu(), right.cpu(), n) for step, loss, right, n in self.pending]}, self.folder / "checkpoint.pt")

    def start(self):
        """An empty out_dir, or with resume the state of its checkpoint; ValueError if that is another run's or no whole file."""
        path = self.folder / "checkpoint.pt"
        if self.cfg.resume and path.exists():
            self.restore(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ["adapter.pt"] + ([] if self.step else ["checkpoint.pt"]):  # nothing of an earlier run stays behind as this one's
            (self.folder / name).unlink(missing_ok=True)
        lines = "".join(line + "\n" for line in self.history)
        (self.folder / "metrics.jsonl").write_text(lines, encoding="utf-8")

    def restore(self, path):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            different = [f"{name} was {saved['settings'].get(name)}, is {value}" for name, value in self.settings.items()
                         if saved["settings"].get(name) != value]
        except Exception as error:
            raise ValueError(f"{path} is cut short, or no checkpoint of train.py ({type(error).__name__}): "
                             f"remove it, or run without --resume") from None
        if different:
            raise ValueError(f"{path} is of a run with other options ({'; '.join(different)}): use these, or run without --resume")
        with torch.no_grad():
            for name, p in self.trainable().items():
                p.copy_(saved["parameters"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name, counter in self.counters().items():
            counter.copy_(saved["counters"][name])
        torch.set_rng_state(saved["random"])
        if saved["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved["cuda"])
        self.step, self.history, self.pending = saved["step"], saved["history"], saved["pending"]


def train(cfg):
    """One run, as Config says; returns the final line of metrics.jsonl as a dict, plus seconds and peak_memory (bytes, CUDA)."""
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    task = load_task(cfg.task)
    cfg = dataclasses.replace(cfg, model=cfg.model or ("smollm2" if task.kind == "multiple_choice" else "minilm"))
    model, tokenizer = build(cfg, task, device)
    kind = "gpt" if isinstance(getattr(model, "backbone", model), GPT) else "encoder"
    cfg = dataclasses.replace(cfg, learning_rate=cfg.learning_rate or LEARNING_RATES[kind][cfg.method],
                              max_steps=cfg.max_steps or MAX_STEPS[kind])
    pad = tokenizer.pad if tokenizer.pad is not None else 0
    examples = encode_examples(task, task.train, tokenizer, kind == "gpt", cfg.max_length)
    validation = encode_examples(task, task.validation[:cfg.eval_examples], tokenizer, kind == "gpt", cfg.max_length)
    run = Run(cfg, model, make_optimizer(model, cfg))
    torch.manual_seed(cfg.seed + 2)  # dropout
    run.start()
    describe(cfg, task, model, device, dtype, len(examples), len(validation), run.step)
    started = time.time()
    loop(run, task, examples, validation, pad, device, dtype)
    return finish(run, task, len(validation), time.time() - started, device)


def loop(run, task, examples, validation, pad, device, dtype):
    cfg, model = run.cfg, run.model
    params = list(run.trainable().values())
    n_batches = max(1, len(examples) // cfg.batch_size)
    autocast = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()
    epoch, clock = None, Clock(run.step)
    model.train()
    while run.step < cfg.max_steps:
        if epoch != run.step // n_batches:
            epoch = run.step // n_batches
            batches = epoch_batches(examples, cfg.batch_size, cfg.seed, epoch)
        batch = [examples[i] for i in batches[run.step % n_batches]]
        if cfg.method == "dual_lora":
            set_warmup(model, warmup_factor(cfg, run.step))
        for group in run.optimizer.param_groups:
            group["lr"] = rate(cfg, run.step)

        # The loss is a mean over the whole batch's targets, however many pieces it is computed in.
        total, size = targets_in(model, batch), cfg.micro_batch_size or len(batch)
        for piece in (batch[i:i + size] for i in range(0, len(batch), size)):
            with autocast:
                loss, right, n, n_tokens = training_loss(model, task, piece, pad, device)
            (loss / total).backward()
            run.pending.append((run.step, loss.detach(), right, n))
            clock.tokens += n_tokens
        if cfg.grad_clip:
            torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1

        last = run.step == cfg.max_steps
        evaluating = last or run.step % cfg.eval_interval == 0
        saving = last or run.step % cfg.checkpoint_interval == 0
        if evaluating or saving or run.step % cfg.log_interval == 0:
            check_losses(run)  # before anything is saved: a checkpoint is always a good one
        if run.step % cfg.log_interval == 0 or last:
            report_progress(run, task, clock)
            run.pending = []
        if evaluating:
            if cfg.method == "dual_lora":
                set_warmup(model, warmup_factor(cfg, run.step))
            paused = time.time()
            with autocast:
                values = evaluate(model, task, validation, pad, device)
            run.record(step=run.step, validation=values)
            print(f"step {run.step}: validation " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()), flush=True)
            clock.pause(time.time() - paused)
        if saving or evaluating:
            run.save()


class Clock:
    def __init__(self, step):
        self.began, self.first, self.tokens, self.marked = time.time(), step, 0, (time.time(), 0)

    def speed(self):
        """Tokens per second since the last call."""
        (then, before), now = self.marked, time.time()
        self.marked = now, self.tokens
        return (self.tokens - before) / max(1e-9, now - then)

    def pause(self, seconds):
        """Leave out of the speed what was spent on an evaluation."""
        self.marked = self.marked[0] + seconds, self.marked[1]

    def left(self, step, max_steps):
        seconds = (time.time() - self.began) / (step - self.first) * (max_steps - step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def check_losses(run):
    """Losses are looked at here and not in every step: to look is to wait for the GPU."""
    losses = torch.tensor([loss.item() for _, loss, _, _ in run.pending])
    for (step, *_), finite in zip(run.pending, losses.isfinite().tolist()):
        if not finite:
            kept = run.folder / "checkpoint.pt"
            raise FloatingPointError(f"the loss became NaN or infinite at step {step}; a lower --learning_rate may help. "
                                     + (f"The last good state is in {kept}" if kept.exists() else "There was no checkpoint yet"))


def report_progress(run, task, clock):
    n = sum(n for *_, n in run.pending)
    loss = sum(loss.item() for _, loss, _, _ in run.pending) / n
    values = {"step": run.step, "loss": loss, "learning_rate": rate(run.cfg, run.step - 1)}
    text = f"step {run.step}/{run.cfg.max_steps} | loss {loss:.4f}"
    if task.n_classes > 1:
        name = "accuracy" if isinstance(run.model, Classifier) else "token_accuracy"
        values[name] = sum(right.item() for _, _, right, _ in run.pending) / n
        text += f" | {name.replace('_', ' ')} {values[name]:.3f}"
    run.record(**values)
    print(f"{text} | {clock.speed():,.0f} tokens/s | {clock.left(run.step, run.cfg.max_steps)} left", flush=True)


def counts(model):
    """(adapter, other trainable, all) parameters."""
    named = list(model.named_parameters())
    adapters = sum(p.numel() for name, p in named if "lora_" in name)
    return adapters, sum(p.numel() for _, p in named if p.requires_grad) - adapters, sum(p.numel() for _, p in named)


def describe(cfg, task, model, device, dtype, n_train, n_validation, step):
    adapters, other, total = counts(model)
    print(f"{task.name}: {task.kind.replace('_', ' ')}, {n_train:,} examples to train on, {n_validation:,} to validate; "
          f"the most frequent answer scores {majority_score(task):.4f}")
    print(f"{cfg.model} on {device}, {str(dtype).removeprefix('torch.')}; {cfg.method}, learning rate {cfg.learning_rate:g}, "
          f"{cfg.max_steps} steps of {cfg.batch_size}, seed {cfg.seed}" + (f"; resumed at step {step}" if step else ""))
    layers = sum(isinstance(m, AdaptedLinear) for m in model.modules())
    print(f"trainable: {adapters:,} in {layers} adapted layers + {other:,} = {100 * (adapters + other) / total:.2f} % of {total:,}", flush=True)


def finish(run, task, n_validation, seconds, device):
    """Save the adapter, print the summary, write the final line; returns it with seconds and peak_memory."""
    cfg, (adapters, other, total) = run.cfg, counts(run.model)
    evaluations = [line for line in map(json.loads, run.history) if "validation" in line]
    best = max(evaluations, key=lambda line: line["validation"][task.metric])
    result = {"final": True, "metric": task.metric, "value": evaluations[-1]["validation"][task.metric],
              "validation": evaluations[-1]["validation"], "examples": n_validation,
              "best_value": best["validation"][task.metric], "best_step": best["step"], "majority": majority_score(task),
              "protocol": "likelihood of each choice" if not isinstance(run.model, Classifier) else "head",
              "trainable": adapters + other, "adapters": adapters, "parameters": total, "settings": run.settings}
    path = run.folder / "adapter.pt"
    save_adapter(run.model, path)
    report = adapter_report(run.model) if adapters else {}
    result["report"] = {key: sum(row[key] for row in report.values()) / len(report)
                        for key in next(iter(report.values()), {}) if key != "unmoved"}
    unmoved = [f"{name}.{key}" for name, row in report.items() for key in row["unmoved"]]
    if not (run.history and json.loads(run.history[-1]).get("final")):
        run.record(**result)
        run.save()

    print(f"\n{task.name}, {cfg.method}: {task.metric} {result['value']:.4f} at the last step ({n_validation:,} validation examples); "
          f"best {result['best_value']:.4f} at step {result['best_step']}; most frequent answer {result['majority']:.4f}")
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    print(f"trainable parameters {adapters + other:,} ({100 * (adapters + other) / total:.2f} % of {total:,}), {seconds:.0f} seconds"
          + (f", {peak / 2**20:,.0f} MiB of GPU memory at most" if peak else ""))
    means = result["report"]
    if "frozen" in means:
        print(f"dW, mean over {len(report)} layers: {100 * means['frozen']:.1f} % frozen, {100 * means['flips_since_start']:.1f} % of signs flipped, "
              f"{100 * means['clipped']:.2g} % of sign gradients clipped, effective rank {means['effective_rank']:.0f}, "
              f"|dW| / |W0| {means['relative_norm']:.3f}")
    elif means:
        print(f"dW, mean over {len(report)} layers: effective rank {means['effective_rank']:.1f}, |dW| / |W0| {means['relative_norm']:.3f}")
    if unmoved:
        print(f"{len(unmoved)} adapter tensors never moved: {', '.join(unmoved[:3])}" + (" ..." if len(unmoved) > 3 else ""))
    if cfg.method == "dual_lora" and warmup_factor(cfg, run.step) < 1:
        print(f"the run ended inside the warm-up: dW stands at {warmup_factor(cfg, run.step):.2f} of its size, and so in the file")
    print(f"{path} holds what was trained: dual_lora.load_adapter puts it on the base model")
    return {**result, "seconds": seconds, "peak_memory": peak}


def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        print(usage())
        return 0
    try:
        cfg = parse(arguments)
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    try:
        train(cfg)
        return 0
    except KeyboardInterrupt:
        print(f"train.py: interrupted; --resume=true goes on from {os.path.join(cfg.out_dir, 'checkpoint.pt')}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("train.py: out of GPU memory: try a smaller --micro_batch_size, or --checkpointing=true", file=sys.stderr)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
