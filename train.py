"""Fine-tune a published encoder or GPT with Dual LoRA, on classification or on multiple choice.

    python train.py                                              # MiniLM on 28,614 headlines, sarcastic or not
    python train.py --task=arc_easy                              # SmolLM2-135M on a commonsense set of the paper
    python train.py --task=path/to/folder --method=lora --r=16   # one's own train.jsonl and validation.jsonl
    python train.py --task=stsb --model=microsoft/deberta-v3-base
    python train.py --task=commonsense_170k --model=meta-llama/Meta-Llama-3-8B --protocol=instruct
    python train.py --methods=lora,dora,dual_lora --seeds=5      # side by side: one table, with the spread

Every option is a line of Config below; --name=value sets it, --help prints them; what is not set comes from the row of PRESETS
for the model and the task. An encoder, and a GPT on classification, get a head on top, trained with the adapters. A GPT on
multiple choice learns to continue the question with the right answer, and is scored by the likelihood that it gives to each, or
under the instruct protocols by what it writes. out_dir receives metrics.jsonl (its last line is the final result), adapter.pt
(for dual_lora.load_adapter) and checkpoint.pt (for --resume=true).

--methods compares: for each method the learning rate is chosen from --grid on a tenth of the training data that is held out, then
all train with the same seeds, batches and steps. "dual_lora:magnitude=none:r=16" is a method with options of its own, and
--task=sst2,cola:max_steps=1000 are two tasks, the second with an option; over several tasks a method's learning rate is the one with the
best mean. Runs that are there already are not run again, so that an interrupted comparison goes on.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import statistics
import sys
import time
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F

from data import instruct
from data.batches import collate, collate_left, encode_examples, epoch_batches, move
from data.download import model_folder
from data.glue import GLUE
from data.metrics import METRICS, bootstrap_differences, interval, mcnemar, paired_t, score, seeds_needed, standard_error
from data.tasks import MIX, load_task, majority_score
from data.tokenizer import Tokenizer
from dual_lora import (AdaptedLinear, DoRALinear, DualLoRALinear, LoRALinear, adapter_report, apply_adapters, save_adapter,
                       save_atomically, set_warmup, training_cost)
from model import GPT, Classifier, load_pretrained, read_config

METHODS = ("dual_lora", "lora", "dora", "full", "head")
PROTOCOLS = ("likelihood", "instruct", "llm_adapters")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Preset:
    """Values of the options that are not given, and where they come from."""
    learning_rate: dict            # by method
    source: str
    targets: str = "q_proj,v_proj"
    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    init_std: float = 0.02         # the layer's default
    batch_size: int = 32
    max_steps: Optional[int] = None
    epochs: object = None          # a number, or by task; used where max_steps is None
    lr_warmup_steps: int = 0
    lr_warmup_share: float = 0.0   # of all steps, where lr_warmup_steps is 0
    warmup_steps: int = 30
    max_length: int = 128
    eval_interval: int = 250


def rates(dual_lora, lora, dora, full, head):
    return dict(dual_lora=dual_lora, lora=lora, dora=dora, full=full, head=head)


# (model's family, group of tasks) -> Preset; "any" where there is no closer row. The paper publishes neither its learning rates nor
# its warm-up's length for encoders; for the LLaMAs it takes over DoRA's settings.
PRESETS = {
    # rates: the best mean of x0.5, x1, x2 (full: x0.5 to x4) held out on STS-B, sarcasm, SST-2, MRPC (head: sarcasm alone); init_std and alpha: of eight pairs,
    # each tried on two or three of these; 30 steps of warm-up: the best of 0, 30 and 100 on the four
    ("encoder", "any"): Preset(rates(5e-3, 5e-3, 5e-3, 1e-4, 2e-2), "ours: chosen on parts of the training data of STS-B, sarcasm, SST-2 and MRPC (README)", init_std=0.05, max_steps=500),
    ("roberta", "glue"): Preset(
        rates(5e-4, 5e-4, 5e-4, 2e-5, 5e-3), "LoRA's for RoBERTa base (2106.09685, table 9), its alpha and learning rates rounded to one; "
        "Dual LoRA takes LoRA's learning rate, untuned", alpha=8.0, batch_size=16, lr_warmup_share=0.06, warmup_steps=100, max_length=512,
        epochs={"mnli": 30, "sst2": 60, "mrpc": 30, "cola": 80, "qnli": 25, "qqp": 25, "rte": 80, "stsb": 40}),
    ("deberta", "glue"): Preset(
        rates(5e-4, 5e-4, 5e-4, 2e-5, 5e-3), "AdaLoRA's epochs and batch for DeBERTa-v3 base (2303.10512); one learning rate for all tasks, untuned",
        lr_warmup_share=0.1, warmup_steps=100, max_length=256,
        epochs={"mnli": 7, "sst2": 24, "mrpc": 30, "cola": 25, "qnli": 5, "qqp": 5, "rte": 50, "stsb": 25}),
    # rates: the best mean of x0.5, x1, x2 and x4 on 2e-3 (full: 5e-5) held out on ARC-e and Social IQA (head: untuned)
    ("gpt", "any"): Preset(rates(8e-3, 2e-3, 4e-3, 2e-4, 5e-3), "ours: chosen for SmolLM2-135M in 40 steps of 8 on parts of the training data of ARC-e and Social IQA (README); larger models want less",
                           max_steps=200, max_length=256),
    ("llama", "mix"): Preset(
        rates(2e-4, 3e-4, 2e-4, 2e-5, 1e-3), "DoRA's for LLaMA-7B (2402.09353), which the paper takes over; Dual LoRA at DoRA's learning rate",
        targets="q_proj,k_proj,v_proj,up_proj,down_proj", r=32, alpha=64.0, dropout=0.05, batch_size=16, epochs=3, lr_warmup_steps=100,
        warmup_steps=100, max_length=256, eval_interval=100_000),
}
FAMILY = {"gpt2": ("gpt",), "llama": ("llama", "gpt"), "bert": ("encoder",), "roberta": ("roberta", "encoder"),
          "deberta": ("deberta", "encoder"), "deberta-v2": ("deberta", "encoder")}


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    task: str = option("sarcasm", "a task's name, or a folder with train.jsonl and validation.jsonl; with --methods also several, separated by commas")
    data_dir: Optional[str] = option(None, "folder with GLUE's files or LLM-Adapters' clone, instead of fetching; see README")
    model: Optional[str] = option(None, "minilm, smollm2, a Hub name, or a folder with config.json; default: minilm, for multiple choice smollm2")
    method: str = option("dual_lora", "what is trained: " + ", ".join(METHODS))
    methods: Optional[str] = option(None, "compare these instead, separated by commas; each may bring options, as lora:r=16")
    seeds: Optional[int] = option(None, "with --methods: how many seeds each; default 5")
    grid: Optional[str] = option(None, "with --methods: learning rates to choose from, x2 for twice the preset's; default x0.5,x1,x2")
    protocol: str = option("likelihood", "multiple choice by a GPT: likelihood of each choice, instruct (writes its answer), llm_adapters (theirs)")
    train_on_prompt: bool = option(False, "under the instruct protocols: learn the prompt too, as LLM-Adapters does, not the response alone")
    metric: Optional[str] = option(None, "the main one: " + ", ".join(METRICS) + "; default the task's")
    # adapters
    targets: Optional[str] = option(None, "the layers that get an adapter, by the last part of their names")
    r: Optional[int] = option(None, "rank of LoRA and DoRA; Dual LoRA spends the same parameters as r1 = r2 = r / 2")
    r1: Optional[int] = option(None, "rank of Dual LoRA's magnitude group; default r / 2")
    r2: Optional[int] = option(None, "rank of Dual LoRA's direction group; default r / 2")
    alpha: Optional[float] = option(None, "scale: dW is alpha / sqrt(r1 r2) times its factors, LoRA's alpha / r times")
    dropout: Optional[float] = option(None, "on the adapters' input; for Dual LoRA it costs five large products a step instead of three")
    ste: str = option("clip", "the sign's gradient: clip (the paper's), xnor, identity")
    init_std: Optional[float] = option(None, "standard deviation of A, B, C and D at the start")
    magnitude: str = option("relu", "relu, or none to leave the ReLU out")
    direction: str = option("sign", "sign, or none to leave the Sign out")
    warmup_steps: Optional[int] = option(None, "steps in which the factor on dW grows from 0 to 1; default the preset's, a third of the run at most")
    # optimisation
    learning_rate: Optional[float] = option(None, "peak of AdamW's learning rate")
    lr_warmup_steps: Optional[int] = option(None, "steps in which the learning rate grows from 0; it then falls linearly to 0")
    batch_size: Optional[int] = option(None, "examples a step")
    micro_batch_size: Optional[int] = option(None, "examples at once, if not the whole batch; each rebuilds dW, so prefer large ones")
    max_steps: Optional[int] = option(None, "optimiser steps")
    epochs: Optional[float] = option(None, "passes over the training data, where max_steps is not given")
    weight_decay: float = option(0.0, "on the head's matrices, or with method full on all")
    adapter_weight_decay: float = option(0.0, "on the adapters; the sign is blind to the scale of C and D")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")
    # data, evaluation, files
    max_length: Optional[int] = option(None, "tokens; longer texts are cut")
    eval_interval: Optional[int] = option(None, "steps between evaluations; there is one at the end in any case")
    eval_examples: Optional[int] = option(None, "evaluate on the first so many validation examples (of each part); default all")
    held_out: bool = option(False, "validate on a tenth of the training data, kept out of it: to choose options by")
    eval_only: bool = option(False, "evaluate the model as it is, without training; for a GPT on multiple choice")
    log_interval: int = option(10, "steps between progress lines")
    checkpoint_interval: int = option(50, "steps between checkpoints")
    compile: bool = option(False, "torch.compile for the training steps: minutes at the start, then fewer passes over the activations")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    seed: int = option(0, "head, data order, adapters and dropout each draw from their own generator made from it")
    device: str = option("auto", "auto (cuda, then mps, then cpu), or one of these")
    dtype: str = option("auto", "of the products: float32, or bfloat16 by autocast; auto: bfloat16 where CUDA has it")
    weights: str = option("float32", "in which the frozen weights are held: float32, or bfloat16 at half the memory")
    out_dir: str = option("out", "where metrics.jsonl, adapter.pt and checkpoint.pt go")
    resume: bool = option(False, "go on from out_dir/checkpoint.pt if there is one")


# Which options do nothing for which methods: set there, they are an error rather than ignored.
ADAPTER_ONLY = ("targets", "r", "alpha", "dropout", "adapter_weight_decay")
DUAL_ONLY = ("r1", "r2", "ste", "init_std", "magnitude", "direction", "warmup_steps")
BY_PRESET = ("targets", "r", "alpha", "dropout", "init_std", "batch_size", "max_length", "eval_interval")
DEFAULTS = {f.name: f.default for f in dataclasses.fields(Config)}


def idle(method):
    """The options that do nothing for a method."""
    return (DUAL_ONLY if method != "dual_lora" else ()) + (ADAPTER_ONLY if method in ("full", "head") else ())


# ---------------------------------------------------------------------------------------------------------------------
# Options


def parse(arguments):
    """Config from ["--name=value", ...]; ValueError naming the argument and what it should be."""
    kinds, values = [f.name for f in dataclasses.fields(Config)], {}
    for argument in arguments:
        name, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals or name not in kinds:
            raise ValueError(f"{argument!r} is no option: write --name=value with one of {', '.join(kinds)}; --help explains them")
        values[name] = convert(name, text, kind_of_option(name))
    cfg = Config(**values)
    check(cfg)
    return cfg


def kind_of_option(name):
    """str, int, float or bool."""
    hint = typing.get_type_hints(Config)[name]
    return next(kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None))


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
             "direction": ("sign", "none"), "protocol": PROTOCOLS, "metric": (None, *METRICS), "weights": tuple(DTYPES)}
    if "float16" in (cfg.dtype, cfg.weights):
        raise ValueError(f"--{'dtype' if cfg.dtype == 'float16' else 'weights'}=float16: its loss scaler would push every gradient into the sign's clip; use bfloat16 or float32")
    for name, known in names.items():
        if getattr(cfg, name) not in known:
            raise ValueError(f"--{name}={getattr(cfg, name)}: choose from {', '.join(filter(None, known))}")
    at_least = {1: ("seeds", "r", "r1", "r2", "batch_size", "micro_batch_size", "max_steps", "eval_interval", "eval_examples", "log_interval",
                    "checkpoint_interval"),
                0: ("warmup_steps", "lr_warmup_steps", "weight_decay", "adapter_weight_decay", "grad_clip", "seed"), 8: ("max_length",)}
    for low, group in at_least.items():
        for name in group:
            if getattr(cfg, name) is not None and getattr(cfg, name) < low:
                raise ValueError(f"--{name}={getattr(cfg, name)}: it should be at least {low}")
    for name in ("alpha", "init_std", "learning_rate", "epochs"):
        if getattr(cfg, name) is not None and getattr(cfg, name) <= 0:
            raise ValueError(f"--{name}={getattr(cfg, name)}: it should be above 0")
    if not 0 <= (cfg.dropout or 0) < 1:
        raise ValueError(f"--dropout={cfg.dropout}: it should be at least 0 and below 1")
    for name in idle(cfg.method) if cfg.methods is None else ():
        if getattr(cfg, name) != DEFAULTS[name]:
            raise ValueError(f"--{name}={getattr(cfg, name)} does nothing with --method={cfg.method}")
    if cfg.methods is None and cfg.method == "dual_lora" and (cfg.r or 0) % 2 and None in (cfg.r1, cfg.r2):
        raise ValueError(f"--r={cfg.r}: Dual LoRA halves it, r1 = r2 = r / 2; give an even r, or r1 and r2")
    if cfg.learning_rate and cfg.grid:
        raise ValueError(f"--learning_rate={cfg.learning_rate:g} and --grid={cfg.grid}: give one of them")
    for name in ("seeds", "grid"):
        if getattr(cfg, name) is not None and cfg.methods is None:
            raise ValueError(f"--{name}={getattr(cfg, name)} does nothing without --methods")
    if cfg.methods is not None:
        if cfg.method != "dual_lora" or cfg.eval_only:
            raise ValueError("--method and --eval_only do nothing with --methods, which names the methods to train")
        arms(cfg)
        candidates(cfg)
    if cfg.max_steps and cfg.epochs:
        raise ValueError(f"--max_steps={cfg.max_steps} and --epochs={cfg.epochs:g}: give one of them")
    if cfg.weights != "float32" and cfg.method == "full":
        raise ValueError(f"--weights={cfg.weights} with --method=full: weights that are trained stay in float32")
    if cfg.train_on_prompt and cfg.protocol == "likelihood":
        raise ValueError("--train_on_prompt=true does nothing with --protocol=likelihood")


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
# Model


def find_preset(model_type, task):
    """The closest row of PRESETS for config.json's model_type and a task."""
    group = "glue" if task.name in GLUE else "mix" if task.name == MIX else "any"
    return next(PRESETS[family, g] for g in (group, "any") for family in FAMILY[model_type] if (family, g) in PRESETS)


def with_model(cfg, task):
    return dataclasses.replace(cfg, model=cfg.model or ("smollm2" if task.kind == "multiple_choice" else "minilm"))


def preset_for(cfg, task):
    """(Preset, folder of the model)."""
    folder = model_folder(cfg.model)
    return find_preset(read_config(os.path.join(folder, "config.json"))[2], task), folder


def complete(cfg, preset, task):
    """cfg with every option that was not given filled in from the preset."""
    values = {name: getattr(preset, name) for name in BY_PRESET if getattr(cfg, name) is None}
    cfg = dataclasses.replace(cfg, **values)
    max_steps, epochs = cfg.max_steps, cfg.epochs
    if max_steps is None and epochs is None:
        max_steps = preset.max_steps
        epochs = preset.epochs[task.name] if isinstance(preset.epochs, dict) else preset.epochs
    max_steps = max_steps or max(1, round(epochs * max(1, len(task.train) // cfg.batch_size)))
    lr_warmup = preset.lr_warmup_steps or round(preset.lr_warmup_share * max_steps)
    warmup = min(preset.warmup_steps, max(1, max_steps // 3))  # a trial of 20 steps should not end before dW is there
    return dataclasses.replace(cfg, max_steps=max_steps, learning_rate=cfg.learning_rate or preset.learning_rate[cfg.method],
                               warmup_steps=warmup if cfg.warmup_steps is None else cfg.warmup_steps,
                               lr_warmup_steps=lr_warmup if cfg.lr_warmup_steps is None else cfg.lr_warmup_steps)


def build(cfg, folder, task, device):
    """(model, tokenizer): the pre-trained model, a head where the task needs one, adapters, everything else frozen."""
    model = load_pretrained(folder, dtype=DTYPES[cfg.weights], device=device)
    tokenizer = Tokenizer(folder)
    is_gpt = isinstance(model, GPT)
    if not is_gpt and None in (tokenizer.cls, tokenizer.sep):
        raise ValueError(f"{folder}: its vocabulary has no [CLS] and [SEP], which an encoder needs")
    model.checkpoint = cfg.checkpointing
    generative = is_gpt and task.kind == "multiple_choice"
    if cfg.protocol != "likelihood" and not generative:
        raise ValueError(f"--protocol={cfg.protocol} is for a GPT on multiple choice; here it is {cfg.model} on {task.kind.replace('_', ' ')}")
    room = 0 if cfg.protocol == "likelihood" else NEW_TOKENS
    if cfg.max_length + room > model.max_length:
        raise ValueError(f"--max_length={cfg.max_length}: this model has {model.max_length} positions" + (f", {room} of them for the answer" if room else ""))
    if cfg.eval_only and not generative:
        raise ValueError("--eval_only=true would score an untrained head; it is for a GPT on multiple choice, which has none")
    if not generative:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = Classifier(model, 1 if task.kind == "multiple_choice" else task.n_classes)
    elif cfg.method == "head":
        raise ValueError("--method=head trains a new head, and a GPT on multiple choice has none: it is scored by likelihood")
    model.to(device).requires_grad_(cfg.method == "full")
    if cfg.eval_only:
        return model, tokenizer
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
    """Log-probability of each answer token and whether it is the likeliest: (n,), (n,), all rows in a line.

    The vocabulary is wide, so the hidden states of the answers alone go through lm_head. Where they lie is worked out here: a
    mask on the device would have to be asked for its size, and a GPU waited for.
    """
    T = idx.shape[1] - 1
    places = [row * T + t for row, (ids, boundary) in enumerate(rows) for t in range(boundary - 1, len(ids) - 1)]  # t predicts t + 1
    targets = move(torch.tensor([token for ids, boundary in rows for token in ids[boundary:]]), idx.device)
    hidden = model.hidden(idx[:, :-1])  # no mask: padding is on the right, where a causal model does not look
    logits = model.lm_head(hidden.flatten(0, 1)[move(torch.tensor(places), idx.device)]).float()
    return -F.cross_entropy(logits, targets, reduction="none"), logits.argmax(1) == targets


def training_loss(model, task, batch, pad, device):
    """(sum of the loss, number right, both tensors; number of targets, number of tokens) of a batch of examples."""
    return *batch_loss(model, task, batch, pad, device), targets_in(model, batch), sum(len(ids) for ids, _ in rows_in(model, batch))


def batch_loss(model, task, batch, pad, device):
    """(sum of the loss, number right), both tensors. Nothing in here waits for the device."""
    rows = rows_in(model, batch)
    if not isinstance(model, Classifier):
        logprobs, right = answer_logprobs(model, collate(rows, pad, device)[0], rows)
        return -logprobs.sum(), right.sum()
    logits = model(*collate(rows, pad, device)).float()
    if task.kind == "multiple_choice":
        logits = by_choice(logits[:, 0], batch)
    labels = move(torch.tensor([example.label for example in batch]), device)
    if task.n_classes == 1:
        return F.mse_loss(logits[:, 0], labels.float(), reduction="sum"), labels.new_zeros(())
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()


def rows_in(model, batch):
    """What of a batch is learnt from: a GPT on multiple choice continues with the right answer, a head sees all choices."""
    return [row for example in batch for row in (example.rows if isinstance(model, Classifier) else [example.rows[example.label]])]


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


NEW_TOKENS = 32  # LLM-Adapters' number
TOKENS = 8192    # in an evaluation's batch, about


def pad_of(tokenizer):
    """What fills a batch up; masked or never looked at, so that any id will do."""
    return tokenizer.pad if tokenizer.pad is not None else 0


@torch.no_grad()
def evaluate(model, task, examples, tokenizer, device, tokens=TOKENS):
    """The task's metrics on `examples`; rows of nearly one length go together, about `tokens` of them at a time."""
    model.eval()
    predictions, labels = predict(model, task, examples, tokenizer, device, tokens)
    model.train()
    return summarise(task, examples, predictions, labels)


def predict(*args):
    """({"": a prediction an example, other names: other kinds of prediction}, labels)."""
    return (predict_generated if args[2][0].prompt else predict_scored)(*args)


def summarise(task, examples, predictions, labels):
    """{name: value}, of each part of the validation data and their means."""
    values, sets = {}, sorted({example.set for example in examples})
    for name in sets:
        chosen = [i for i, example in enumerate(examples) if example.set == name]
        for kind, given in predictions.items():
            part = metrics_of(task, kind, [given[i] for i in chosen], [labels[i] for i in chosen])
            values.update({f"{metric}_{name}" if len(sets) > 1 else metric: value for metric, value in part.items()})
    if len(sets) == 1:
        return values
    names = dict.fromkeys(key.removesuffix(f"_{name}") for name in sets for key in values if key.endswith(f"_{name}"))
    return {**{name: sum(values[f"{name}_{part}"] for part in sets) / len(sets) for name in names}, **values}


def metrics_of(task, kind, predictions, labels):
    """{name: value} of one kind of prediction."""
    if kind == "failed":  # generated texts without an answer, which count as wrong
        return {"failed_extractions": sum(predictions) / len(predictions)}
    values = score(task.metric, predictions, labels)
    if task.kind == "multiple_choice":  # the place of a choice is no class
        return {f"{task.metric}_{kind}" if kind else task.metric: values[task.metric]}
    return {name: value for name, value in values.items() if name != "f1" or task.n_classes == 2}


def predict_scored(model, task, examples, tokenizer, device, tokens):
    """({"": class, number or choice of each example; "norm": choice by likelihood per byte}, labels)."""
    rows, labels = [row for example in examples for row in example.rows], [example.label for example in examples]
    if not isinstance(model, Classifier):
        scores = score_answers(model, rows, pad_of(tokenizer), device, tokens)
        # by bytes too, since a long answer is improbable however right it is
        per_byte = scores / torch.tensor([n for example in examples for n in example.n_bytes])
        return {"": by_choice(scores, examples).argmax(1).tolist(), "norm": by_choice(per_byte, examples).argmax(1).tolist()}, labels
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scores = torch.empty(len(rows), task.n_classes if task.kind == "classification" else 1)
    while order:
        size = max(1, tokens // len(rows[order[-1]][0]))
        chosen, order = order[-size:], order[:-size]
        scores[chosen] = model(*collate([rows[i] for i in chosen], pad_of(tokenizer), device)).float().cpu()
    if task.kind == "multiple_choice":
        return {"": by_choice(scores[:, 0], examples).argmax(1).tolist()}, labels
    return {"": (scores[:, 0] if task.n_classes == 1 else scores.argmax(1)).tolist()}, labels


@torch.no_grad()
def score_answers(model, rows, pad, device, tokens):
    """Log-likelihood of each row's answer after its prompt (rows,). Rows with one prompt, as the choices of a question, share its
    keys and values: the prompt goes through the model once, then the answers' tokens alone."""
    shared = {}
    for i, (ids, boundary) in enumerate(rows):
        shared.setdefault(tuple(ids[:boundary]), []).append(i)

    def longest(prompt):
        return max(len(rows[i][0]) for i in shared[prompt]) - len(prompt)

    def width(prompts):
        return max(map(len, prompts)) + max(map(longest, prompts))

    order = sorted(shared, key=lambda prompt: (longest(prompt) // 8, len(prompt)))  # neighbours need little padding
    scores = torch.empty(len(rows))
    while order:
        prompts, size = [order.pop()], 0
        while order and width([*prompts, order[-1]]) <= model.max_length:
            size = sum(len(shared[prompt]) for prompt in [*prompts, order[-1]])
            if size * width([*prompts, order[-1]]) > tokens:
                break
            prompts.append(order.pop())
        chosen = [i for prompt in prompts for i in shared[prompt]]
        scores[chosen] = answers_after(model, prompts, [len(shared[prompt]) for prompt in prompts],
                                       [rows[i][0][rows[i][1]:] for i in chosen], pad, device).cpu()
    return scores


def answers_after(model, prompts, counts, answers, pad, device):
    """Log-likelihood (answers,) of `counts[0]` answers after prompts[0], and so on."""
    idx, mask = collate_left(prompts, pad, device)
    cache = [[] for _ in model.layers]
    hidden = model.hidden(idx, mask, cache)[:, -1:]  # (prompts, 1, n_embd), from which an answer's first token is told
    of = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(device)  # (answers,), the prompt of each
    targets, real, _ = collate([(ids, 0) for ids in answers], pad, device)  # (answers, L)
    real = torch.ones_like(targets, dtype=torch.bool) if real is None else real
    hidden = hidden[of]
    if targets.shape[1] > 1:
        for layer in cache:
            layer[:] = [t[of] for t in layer]
        after = model.hidden(targets[:, :-1], torch.cat([mask[of], real[:, :-1]], dim=1), cache)
        hidden = torch.cat([hidden, after], dim=1)  # (answers, L, n_embd)
    logits = model.lm_head(hidden[real]).float()  # the vocabulary is wide: no padding goes through it
    logprobs = -F.cross_entropy(logits, targets[real], reduction="none")
    return torch.zeros(len(answers), device=device).index_add_(0, real.nonzero()[:, 0], logprobs)


def predict_generated(model, task, examples, tokenizer, device, tokens):
    """({"": 1 where the answer written is the right one; "failed": 1 where none was found}, labels of 1)."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    found = [None] * len(examples)
    while order:
        size = max(1, tokens // (len(examples[order[-1]].prompt) + NEW_TOKENS))
        chosen, order = order[-size:], order[:-size]
        idx, mask = collate_left([examples[i].prompt for i in chosen], pad_of(tokenizer), device)
        for i, ids in zip(chosen, model.generate(idx, mask, NEW_TOKENS, tokenizer.eos).tolist()):
            ids = ids[:ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
            found[i] = instruct.extract(examples[i].set or task.name, tokenizer.decode(ids))
    right = [int(answer == example.answer) for answer, example in zip(found, examples)]
    return {"": right, "failed": [int(answer is None) for answer in found]}, [1] * len(examples)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def rate(cfg, step):
    """Learning rate of `step` (from 0): linear warm-up to the peak, then linear decay to 0."""
    if step < cfg.lr_warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.lr_warmup_steps
    return cfg.learning_rate * (cfg.max_steps - step) / (cfg.max_steps - cfg.lr_warmup_steps)


def warmup_factor(cfg, step):
    """Factor on dW at `step`: 0 in the very first forward pass, which is the pre-trained model's."""
    return min(1.0, step / cfg.warmup_steps) if cfg.warmup_steps else 1.0


class Run:
    """What a checkpoint holds: trainable parameters, optimizer, step, random state, counters and the metrics so far."""

    def __init__(self, cfg, model, optimizer):
        self.cfg, self.model, self.optimizer = cfg, model, optimizer
        self.step, self.history = 0, []
        self.outcome = None  # predictions and labels of the last evaluation
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

    def device(self):
        return next(self.model.parameters()).device

    def counters(self):
        """What the adapters' reports remember of the last one."""
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, DualLoRALinear)}
        return {name: {"clip_count": m.clip_count, **m.last} for name, m in layers.items()}

    def save(self):
        cuda = torch.cuda.get_rng_state(self.device()) if self.device().type == "cuda" else None
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
        for name, state in saved["counters"].items():
            layer = self.model.get_submodule(name)
            layer.clip_count.copy_(state["clip_count"])
            layer.last = {key: value for key, value in state.items() if key != "clip_count"}
        torch.set_rng_state(saved["random"])
        if saved["cuda"] is not None and self.device().type == "cuda":
            torch.cuda.set_rng_state(saved["cuda"], self.device())
        self.step, self.history, self.pending = saved["step"], saved["history"], saved["pending"]
        if self.cfg.method == "dual_lora":
            set_warmup(self.model, warmup_factor(self.cfg, self.step))  # a run that is at its end takes no step that would


def train(cfg, task=None):
    """One run, as Config says; returns the final line of metrics.jsonl as a dict, plus seconds and peak_memory (bytes or None), and
    predictions and labels, one a validation example. `task` stands in for the one that cfg names."""
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    task = task or named_task(cfg)
    task = as_judged(task, cfg)
    cfg = with_model(cfg, task)
    preset, folder = preset_for(cfg, task)
    cfg = complete(cfg, preset, task)
    model, tokenizer = build(cfg, folder, task, device)
    is_gpt = isinstance(getattr(model, "backbone", model), GPT)
    how = is_gpt, cfg.max_length, cfg.protocol, cfg.train_on_prompt
    validation = encode_examples(task, task.validation, tokenizer, *how)
    if cfg.eval_only:
        return evaluate_only(cfg, task, model, validation, tokenizer, device, dtype)
    examples = encode_examples(task, task.train, tokenizer, *how)
    run = Run(cfg, model, make_optimizer(model, cfg))
    torch.manual_seed(cfg.seed + 2)  # dropout
    run.start()
    describe(cfg, task, model, device, dtype, len(examples), len(validation), run.step, preset)
    cost = estimate(cfg, task, model, examples, pad_of(tokenizer), device, dtype)
    if cfg.compile:
        compile_steps(model)
    clock = Clock(run.step)
    reset_peak_memory(device)
    loop(run, task, examples, validation, tokenizer, device, dtype, clock)
    seconds, peak, speed = time.time() - clock.began, peak_memory(device), measured(cost, clock, device, dtype)  # before the report's own work
    result = {**finish(run, task, validation, seconds), "seconds": seconds, "peak_memory": peak}
    print(speed, flush=True)
    model.eval()
    with torch.no_grad(), mixed_precision(device, dtype):
        predictions, labels = run.outcome or predict(model, task, validation, tokenizer, device, TOKENS)
    return {**result, "predictions": predictions[""], "labels": labels}


def named_task(cfg):
    task = load_task(cfg.task, cfg.data_dir)
    return with_metric(task, cfg.metric) if cfg.metric else task


def hold_out(task):
    """The task with a tenth of its training data, about 1,000 examples at most, in the place of its validation data; near-duplicates
    stay on one side."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).tolist()
    groups, held = {}, []
    for i in order:
        groups.setdefault(task.key(task.train[i]) if task.key else i, []).append(i)
    while len(held) < min(1000, len(order) // 10) or not held:
        held += groups.pop(next(iter(groups)))
    return dataclasses.replace(task, train=[task.train[i] for group in groups.values() for i in group], validation=[task.train[i] for i in held])


def as_judged(task, cfg):
    """The task with the validation data that cfg scores it on."""
    task = hold_out(task) if cfg.held_out else task
    return dataclasses.replace(task, validation=first_of_each(task.validation, cfg.eval_examples))


def examples_of(held_out):
    return "held-out training examples" if held_out else "validation examples"


def with_metric(task, metric):
    """The task with another main metric; ValueError if it is not one for this kind of task."""
    known = ["accuracy"] if task.kind == "multiple_choice" else ["pearson"] if task.n_classes == 1 else ["accuracy", "matthews"]
    known += ["f1"] if task.kind == "classification" and task.n_classes == 2 else []
    if metric not in known:
        raise ValueError(f"--metric={metric}: {task.name} has {', '.join(known)}")
    return dataclasses.replace(task, metric=metric)


def first_of_each(examples, n):
    """The first n examples of each part of the validation data, all if n is None."""
    seen, kept = {}, []
    for example in examples:
        part = example.get("set", "")
        seen[part] = seen.get(part, 0) + 1
        if n is None or seen[part] <= n:
            kept.append(example)
    return kept


def mixed_precision(device, dtype):
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def evaluate_only(cfg, task, model, validation, tokenizer, device, dtype):
    """What the pre-trained model scores; printed, and returned as the final line without what training adds."""
    with mixed_precision(device, dtype):
        values = evaluate(model, task, validation, tokenizer, device)
    print(f"{task.name}, {cfg.model} as it is: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())
          + f" ({len(validation):,} examples, {protocol(cfg, model)}; the most frequent answer scores {majority_score(task):.4f})")
    return {"final": True, "metric": task.metric, "value": values[task.metric], "validation": values, "protocol": protocol(cfg, model)}


def protocol(cfg, model):
    """How the numbers come about, in words; for the instruct protocols with the template's hash."""
    if isinstance(model, Classifier):
        return "head"
    if cfg.protocol == "likelihood":
        return "likelihood of each choice"
    loss = "prompt and response" if cfg.train_on_prompt else "response alone"
    return f"{cfg.protocol}, template {instruct.template_hash(cfg.protocol)}, greedy, trained on {loss}"


def estimate(cfg, task, model, examples, pad, device, dtype):
    """Print what the first step will cost, counted before it runs; returns training_cost's dict with the step's "tokens", or None.

    A courtesy: where this torch cannot trace the step, as an older one may not on some device, the run goes on and says so.
    """
    batch = [examples[i] for i in epoch_batches(examples, cfg.batch_size, cfg.seed, 0)[0]]
    batch = batch[:cfg.micro_batch_size or len(batch)]
    n = sum(len(ids) for ids, _ in rows_in(model, batch))

    def step():
        with mixed_precision(device, dtype):
            return batch_loss(model, task, batch, pad, device)[0]

    model.train()
    try:
        cost = {**training_cost(model, step), "tokens": n}
    except RuntimeError as error:
        print(f"what a step costs could not be counted here: {' '.join(str(error).split())[:200]}", flush=True)
        return None
    print(f"a pass of {n:,} tokens costs {flops(cost['forward_flops'])} forward, {flops(cost['backward_flops'])} backward, keeps "
          f"{cost['kept_bytes'] / 2**20:,.0f} MiB in between, and passes {cost['passes']:,} times over a matrix of adapted weights' size "
          f"({cost['pass_bytes'] / 2**20:,.0f} MiB); weights {cost['weight_bytes'] / 2**20:,.0f} MiB, gradients and AdamW's moments "
          f"{cost['training_bytes'] / 2**20:,.1f} MiB", flush=True)
    return cost


def flops(n, per=""):
    return f"{n / 1e9:,.3g} GFLOP{per}" if n < 1e12 else f"{n / 1e12:,.3g} TFLOP{per}"


def measured(cost, clock, device, dtype):
    """A line on what the steps took, beside the rate of one large product here and now, which is as fast as this device gets."""
    seconds, peak = clock.trained(), peak_memory(device)
    if not clock.tokens:
        return "no step was run"
    text = f"{clock.tokens / seconds:,.0f} tokens/s"
    if cost:
        reached = (cost["forward_flops"] + cost["backward_flops"]) / cost["tokens"] * clock.tokens / seconds
        text += f", {flops(reached, '/s')} of products, {100 * reached / product_rate(device, dtype):.0f} % of what one large product reaches here"
    return text + (f"; {peak / 2**20:,.0f} MiB of {'GPU memory' if device.type == 'cuda' else 'memory'} at most" if peak else "")


def product_rate(device, dtype):
    """Operations a second of one large matrix product, the best of a few."""
    size, best = 8192 if device.type == "cuda" else 1024, math.inf
    a = torch.ones(size, size, dtype=dtype, device=device)
    for _ in range(5):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for it
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


STATUS = Path("/proc/self/status")


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.exists():
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes since reset_peak_memory: torch's on CUDA, the whole process's on a Linux CPU, None elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if device.type == "cpu" and STATUS.exists() else None
    return int(found[1]) * 1024 if found else None


def compile_steps(model):
    """torch.compile for what training runs; evaluation, with its caches and other shapes, stays as it is. Lengths are dynamic and
    dW's factor is a tensor, so that neither a new batch nor a step of the warm-up compiles anew."""
    backbone = getattr(model, "backbone", model)
    name = "hidden" if isinstance(backbone, GPT) else "forward"
    plain = getattr(backbone, name)
    fast = torch.compile(plain, dynamic=True)
    setattr(backbone, name, lambda *args, **kwargs: (fast if backbone.training else plain)(*args, **kwargs))


def loop(run, task, examples, validation, tokenizer, device, dtype, clock):
    cfg, model, pad = run.cfg, run.model, pad_of(tokenizer)
    params = list(run.trainable().values())
    n_batches = max(1, len(examples) // cfg.batch_size)
    autocast = mixed_precision(device, dtype)
    epoch = None
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
            with autocast, torch.no_grad():
                model.eval()
                run.outcome = predict(model, task, validation, tokenizer, device, TOKENS)
                model.train()
            values = summarise(task, validation, *run.outcome)
            run.record(step=run.step, validation=values)
            print(f"step {run.step}: validation " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()), flush=True)
            if cfg.method in ("dual_lora", "lora", "dora") and not last:  # the final line has the whole report
                run.record(step=run.step, layers=adapter_report(model, spectrum=False))
            clock.pause(time.time() - paused)
        if saving or evaluating:
            run.save()


class Clock:
    def __init__(self, step):
        self.began, self.first, self.tokens, self.marked, self.paused = time.time(), step, 0, (time.time(), 0), 0.0

    def speed(self):
        """Tokens per second since the last call."""
        (then, before), now = self.marked, time.time()
        self.marked = now, self.tokens
        return (self.tokens - before) / max(1e-9, now - then)

    def pause(self, seconds):
        """Leave out of the speed what was spent on an evaluation."""
        self.marked = self.marked[0] + seconds, self.marked[1]
        self.paused += seconds

    def trained(self):
        """Seconds of training since the start."""
        return max(1e-9, time.time() - self.began - self.paused)

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


def describe(cfg, task, model, device, dtype, n_train, n_validation, step, preset):
    adapters, other, total = counts(model)
    print(f"{task.name}: {task.kind.replace('_', ' ')}, {n_train:,} examples to train on, {n_validation:,}{' held-out ones' if cfg.held_out else ''} to validate; "
          f"the most frequent answer scores {majority_score(task):.4f}")
    if task.note:
        print(task.note)
    rank = "" if cfg.method in ("full", "head") else (f" on {cfg.targets}, r1 = {cfg.r1 or cfg.r // 2}, r2 = {cfg.r2 or cfg.r // 2}, alpha {cfg.alpha:g}, "
           f"dropout {cfg.dropout:g}, warm-up {cfg.warmup_steps}" if cfg.method == "dual_lora" else
           f" on {cfg.targets}, r = {cfg.r}, alpha {cfg.alpha:g}, dropout {cfg.dropout:g}")
    print(f"{cfg.model} on {device}, {str(dtype).removeprefix('torch.')}; {cfg.method}{rank}; learning rate {cfg.learning_rate:g}"
          + (f" after {cfg.lr_warmup_steps} steps" if cfg.lr_warmup_steps else "") + f", {cfg.max_steps} steps of {cfg.batch_size}, "
          f"{cfg.max_length} tokens at most, seed {cfg.seed}" + (f"; resumed at step {step}" if step else ""))
    print(f"what is not set comes from a preset: {preset.source}" + (f"; init_std {cfg.init_std:g}" if cfg.method == "dual_lora" else ""))
    layers = sum(isinstance(m, AdaptedLinear) for m in model.modules())
    print(f"trainable: {adapters:,} in {layers} adapted layers + {other:,} = {100 * (adapters + other) / total:.2f} % of {total:,}", flush=True)


def error_of(task, values, validation):
    """Standard error of the main metric among `values`; of a mean over parts from each part's. None where there is no formula."""
    parts = Counter(example.set for example in validation)
    errors = [standard_error(task.metric, values[f"{task.metric}_{name}" if len(parts) > 1 else task.metric], n) for name, n in parts.items()]
    return None if None in errors else math.hypot(*errors) / len(errors)


def finish(run, task, validation, seconds):
    """Save the adapter, print the summary, write the final line; returns it."""
    n_validation = len(validation)
    cfg, (adapters, other, total) = run.cfg, counts(run.model)
    evaluations = [line for line in map(json.loads, run.history) if "validation" in line]
    best = max(evaluations, key=lambda line: line["validation"][task.metric])
    result = {"final": True, "metric": task.metric, "value": evaluations[-1]["validation"][task.metric],
              "validation": evaluations[-1]["validation"], "examples": n_validation,
              "best_value": best["validation"][task.metric], "best_step": best["step"], "majority": majority_score(task),
              "standard_error": error_of(task, evaluations[-1]["validation"], validation),
              "protocol": protocol(cfg, run.model),
              "trainable": adapters + other, "adapters": adapters, "parameters": total, "settings": run.settings}
    path = run.folder / "adapter.pt"
    save_adapter(run.model, path)
    report = adapter_report(run.model) if adapters else {}
    result["report"] = {key: sum(row[key] for row in report.values()) / len(report)
                        for key in next(iter(report.values()), {}) if key not in ("unmoved", "magnitudes")}
    result["layers"] = report
    unmoved = [f"{name}.{key}" for name, row in report.items() for key in row["unmoved"]]
    if not (run.history and json.loads(run.history[-1]).get("final")):
        run.record(**result)
        run.save()

    error = f", standard error {result['standard_error']:.4f}" if result["standard_error"] else ""
    print(f"\n{task.name}, {cfg.method}: {task.metric} {result['value']:.4f} at the last step ({n_validation:,} {examples_of(cfg.held_out)}{error}); "
          f"best {result['best_value']:.4f} at step {result['best_step']}; most frequent answer {result['majority']:.4f}")
    others = {name: value for name, value in result["validation"].items() if name != task.metric}
    if others:
        print(", ".join(f"{name} {value:.4f}" for name, value in others.items()))
    if not isinstance(run.model, Classifier):
        print(f"protocol: {result['protocol']}")
    print(f"trainable parameters {adapters + other:,} ({100 * (adapters + other) / total:.2f} % of {total:,}), {seconds:.0f} seconds")
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
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Several methods side by side


def with_options(text, where, fixed):
    """(name, {option: value}) of "name:option=value:..."; ValueError for what is no option, or one of `fixed`."""
    name, *options = text.strip().split(":")
    values, known = {}, [f.name for f in dataclasses.fields(Config) if f.name not in fixed]
    for item in options:
        option, _, value = item.partition("=")
        if option not in known:
            raise ValueError(f"--{where}: {item!r} is no option of a {where.partition('=')[0].removesuffix('s')}")
        values[option] = convert(option, value, kind_of_option(option))
    return name, values


OF_THE_WHOLE = ("task", "data_dir", "method", "methods", "seeds", "grid", "out_dir", "resume", "seed", "held_out", "eval_only")
OF_THE_TASK = ("model", "metric", "protocol", "eval_examples")  # else the methods' scores would be of different things


def arms(cfg):
    """[(name, Config)] of --methods; ValueError for what is no method, or an option that is none or does nothing there."""
    chosen = []
    for spec in cfg.methods.split(","):
        method, values = with_options(spec, f"methods={cfg.methods}", (*OF_THE_TASK, *OF_THE_WHOLE))
        own = {**dataclasses.asdict(cfg), **dict.fromkeys(("methods", "seeds", "grid")), **{name: DEFAULTS[name] for name in idle(method)}}
        chosen.append((spec.strip(), Config(**{**own, "method": method, **values})))
        check(chosen[-1][1])
        if chosen[-1][0] in [name for name, _ in chosen[:-1]]:
            raise ValueError(f"--methods={cfg.methods}: {spec.strip()} is there twice")
    for name in ADAPTER_ONLY + DUAL_ONLY:
        if getattr(cfg, name) != DEFAULTS[name] and all(name in idle(own.method) for _, own in chosen):
            raise ValueError(f"--{name}={getattr(cfg, name)} does nothing with --methods={cfg.methods}")
    return chosen


def on_task(arm, own, options):
    """A method's Config with a task's options, but for those that do nothing for it; ValueError where the method brings one of them
    too, or where they make no sense together."""
    for name in options:
        if f":{name}=" in arm:
            raise ValueError(f"{name} is an option of the task {options['task']} and of the method {arm}: give it to one of them")
    own = dataclasses.replace(own, **{name: value for name, value in options.items() if name not in idle(own.method)})
    check(own)
    return own


def tasks_of(cfg):
    """[(Task, its options)] of --task, all read, so that a wrong name shows before hours are spent."""
    specs = [(cfg.task, {})] if os.path.isdir(cfg.task) else [
        with_options(text, f"task={cfg.task}", ("learning_rate", *OF_THE_WHOLE)) for text in cfg.task.split(",")]
    needed = [name in (*GLUE, MIX) for name, _ in specs]  # --data_dir is for these, and an error where there is none of them
    chosen = []
    for (name, options), uses in zip(specs, needed):
        options = {**options, "task": name, "data_dir": cfg.data_dir if uses or not any(needed) else None}
        chosen.append((named_task(dataclasses.replace(cfg, **options)), options))
    names = [task.name for task, _ in chosen] + ["mean"] * (len(chosen) > 1)  # their tables, and the one of the means
    if len(set(names)) < len(names):
        raise ValueError(f"--task={cfg.task}: two tables of one name, {next(name for name in names if names.count(name) > 1)}")
    return chosen


def candidates(cfg):
    """The learning rates of --grid as texts, "5e-3" or "x2" for twice the preset's; one, if --learning_rate is given."""
    grid = [f"{cfg.learning_rate!r}"] if cfg.learning_rate else (cfg.grid or "x0.5,x1,x2").split(",")
    for text in grid:
        try:
            good = 0 < float(text.removeprefix("x")) < math.inf
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"--grid={cfg.grid}: {text!r} is no learning rate above 0, nor a factor like x2 on the preset's")
    return list(dict.fromkeys(grid))


def resolve(text, own, task):
    """The number that one of candidates() stands for."""
    if not text.startswith("x"):
        return float(text)
    return float(text[1:]) * preset_for(with_model(own, task), task)[0].learning_rate[own.method]


def compare(cfg):
    """Every method of --methods on every task of --task, seed by seed. Prints and saves a table a task, and of several tasks one with
    their means; returns {task: its table, "mean": that one}."""
    folder, tables, seeds = Path(cfg.out_dir), {}, cfg.seeds or 5
    tasks, methods = tasks_of(cfg), arms(cfg)
    rows = {task.name: [] for task, _ in tasks}
    configs = {(arm, task.name): on_task(arm, own, options) for arm, own in methods for task, options in tasks}
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {arm: choose_rate([(configs[arm, task.name], task) for task, _ in tasks], arm,
                               candidates(own if own.learning_rate else cfg), folder) for arm, own in methods}
    for task, options in tasks:
        judged, tables[task.name] = as_judged(task, dataclasses.replace(cfg, **options)), []
        for arm, _ in methods:
            rates, scores = chosen[arm]
            own = dataclasses.replace(configs[arm, task.name], learning_rate=rates[task.name])
            runs = [attempt(dataclasses.replace(own, seed=cfg.seed + i), arm, task, folder) for i in range(seeds)]
            rows[task.name].append({"method": arm, "learning_rate": own.learning_rate, "grid": scores.get(task.name, {}), "runs": runs})
            tables[task.name].append(tabulate(judged, rows[task.name][-1], rows[task.name][0]))
            (folder / "compare.json").write_text(json.dumps(tables, indent=1))
        show(markdown(judged, tables[task.name]), folder / f"compare-{task.name}.md")
    if len(tasks) > 1:
        tables["mean"] = tabulate_means(tasks, rows)
        (folder / "compare.json").write_text(json.dumps(tables, indent=1))
        show(markdown_means(tasks, tables), folder / "compare.md")
    return tables


def show(text, path):
    print(f"\n{text}", flush=True)
    path.write_text(text, encoding="utf-8")


def choose_rate(each, arm, grid, folder):
    """({task: learning rate}, {task: {learning rate: score}}) for one method, `each` [(its Config for a task, the task)]: the candidate
    of `grid` with the best mean over the tasks on held-out training data. A single candidate needs no run."""
    rates = {text: {task.name: resolve(text, own, task) for own, task in each} for text in grid}
    if len(grid) == 1:
        return rates[grid[0]], {}
    values = {}
    for text in grid:
        runs = [attempt(dataclasses.replace(own, learning_rate=rates[text][task.name], seed=own.seed + 1000, held_out=True),  # no seed that is reported
                        arm, task, folder, "grid") for own, task in each]
        if all(runs):
            values[text] = {task.name: run["value"] for (_, task), run in zip(each, runs)}
    if not values:
        print(f"{arm}: no learning rate of {', '.join(grid)} came to an end on every task; going on with the first", flush=True)
    best = max(values, key=lambda text: sum(values[text].values()), default=grid[0])
    return rates[best], {task.name: {f"{rates[text][task.name]:g}": values[text][task.name] for text in values} for _, task in each}


def in_file_names(arm):
    return re.sub("[^A-Za-z0-9_.=]+", "-", arm)


def fingerprint(cfg, task):
    """8 digits that change with anything that a run's result hangs on: options, those that a preset fills in too, and data."""
    cfg = with_model(cfg, task)
    settings = dataclasses.asdict(complete(cfg, preset_for(cfg, task)[0], task))
    settings = {name: value for name, value in settings.items() if name not in ("out_dir", "resume")}
    return hashlib.sha256(json.dumps([settings, task.train, task.validation], sort_keys=True).encode()).hexdigest()[:8]


def attempt(cfg, arm, task, folder, purpose=None):
    """The result of one run, from its file if it has been run, or None if it failed, which is printed and not the others' end.
    `purpose` stands in the folder's name for the seed."""
    label = f"{task.name}, {arm}, learning rate {cfg.learning_rate:g}, " + "held-out training data, " * cfg.held_out + f"seed {cfg.seed}"
    try:
        place = folder / f"{task.name}-{in_file_names(arm)}-{purpose or cfg.seed}-{fingerprint(cfg, task)}"
        if (place / "result.json").exists():
            return json.loads((place / "result.json").read_text())
        place.mkdir(parents=True, exist_ok=True)
        resumed = (place / "checkpoint.pt").exists()
        with open(place / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            result = train(dataclasses.replace(cfg, out_dir=str(place), resume=True), task)
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"{label}: failed: {' '.join(str(error).split())[:300]}", flush=True)
        return None
    result["seconds"] = None if resumed else result["seconds"]  # of an interrupted run only the last part is known
    (place / "result.tmp").write_text(json.dumps(result))
    (place / "result.tmp").rename(place / "result.json")
    (place / "checkpoint.pt").unlink(missing_ok=True)  # full fine-tuning's is three times the model
    print(f"{label}: {result['metric']} {result['value']:.4f}", flush=True)
    return result


def tabulate(task, row, first):
    """A method's runs as a dict: counts, mean and spread, and how it differs from the first method."""
    done = [run for run in row["runs"] if run]
    values = [run["value"] for run in done]
    line = {"method": row["method"], "learning_rate": row["learning_rate"], "grid": row["grid"], "runs": len(done), "of": len(row["runs"]),
            "metric": task.metric, "values": values, "majority": majority_score(task)}
    if done:
        seconds = [run["seconds"] for run in done if run["seconds"]]
        line.update(trainable=done[0]["trainable"], mean=statistics.mean(values), sd=statistics.stdev(values) if len(values) > 1 else None,
                    best=statistics.mean(run["best_value"] for run in done), examples=done[0]["examples"], standard_error=done[0]["standard_error"],
                    seconds=statistics.mean(seconds) if seconds else None, peak_memory=max(run["peak_memory"] or 0 for run in done),
                    settings=done[0]["settings"])
    pairs = [(ours, theirs) for ours, theirs in zip(row["runs"], first["runs"]) if ours and theirs]
    if row is not first and pairs:
        line.update(over_seeds([ours["value"] - theirs["value"] for ours, theirs in pairs]))
        if not in_parts(task):
            a, b, labels = predictions_of(pairs)
            line.update(bootstrap=interval(bootstrap_differences(task.metric, a, b, labels)))
            line.update(mcnemar=mcnemar(a, b, labels) if task.n_classes > 1 else None)
    return line


def in_parts(task):
    """Whether the metric is a mean over parts of the validation data."""
    return any("set" in example for example in task.validation)


def predictions_of(pairs):
    """(predictions of the ones, of the others, each (seeds, n); labels (n,)) of pairs of runs."""
    return [run["predictions"] for run, _ in pairs], [run["predictions"] for _, run in pairs], pairs[0][0]["labels"]


def over_seeds(differences):
    """How two methods differ, from one difference a seed."""
    mean, low, high, p = paired_t(differences)
    return {"difference": mean, "interval": [low, high], "p": p, "seeds_needed": seeds_needed(differences)}


def tabulate_means(tasks, rows):
    """A dict a method: its mean over the tasks, seed by seed, and how it differs from the first method's."""
    table, names = [], [task.name for task, _ in tasks]
    for i, first in enumerate(rows[names[0]]):
        ours, theirs = [[rows[name][j]["runs"] for name in names] for j in (i, 0)]
        values, others = ({seed: statistics.mean(run["value"] for run in runs) for seed, runs in enumerate(zip(*of)) if all(runs)}
                          for of in (ours, theirs))
        line = {"method": first["method"], "runs": len(values), "of": len(first["runs"]), "values": list(values.values())}
        if values:
            line.update(mean=statistics.mean(values.values()), sd=statistics.stdev(values.values()) if len(values) > 1 else None)
        both = [seed for seed in values if seed in others]
        if i and both:
            line.update(over_seeds([values[seed] - others[seed] for seed in both]))
            if not any(in_parts(task) for task, _ in tasks):  # the examples of each task are drawn anew on their own
                line.update(bootstrap=interval(sum(
                    bootstrap_differences(task.metric, *predictions_of([(a[seed], b[seed]) for seed in both]), seed=k)
                    for k, ((task, _), a, b) in enumerate(zip(tasks, ours, theirs))) / len(tasks)))
        table.append(line)
    return table


def markdown(task, table):
    """The table for people."""
    done = next((line for line in table if line["runs"]), None)
    if done is None:
        return f"{task.name}: no run came to an end"
    error = f", standard error of one number {done['standard_error']:.4f}" if done["standard_error"] else ""
    head = (f"{task.name}: {task.metric} at the last step on {done['examples']:,} {examples_of(done['settings']['held_out'])}{error}; the most frequent answer scores "
            f"{done['majority']:.4f}. Differences are to {table[0]['method']}, paired by seed.")
    lines = ["| method | trainable | learning rate (of) | seeds | mean ± sd | best | difference | 95 % over seeds | p | 95 % over examples | McNemar p | seeds for 0.5 points | s | MiB |",
             "|" + "---|" * 14]
    for line in table:
        grid = f" ({', '.join(line['grid'])})" if line["grid"] else ""
        cells = [line["method"], number(line.get("trainable"), ","), f"{line['learning_rate']:g}{grid}", finished(line), spread(line),
                 number(line.get("best")), number(line.get("difference"), "+.4f"), reach(line.get("interval")), number(line.get("p"), ".3f"),
                 reach(line.get("bootstrap")), number(line.get("mcnemar"), ".3f"), number(line.get("seeds_needed"), ",d"), number(line.get("seconds"), ".0f"),
                 number(line["peak_memory"] / 2**20 if line.get("peak_memory") else None, ",.0f")]
        lines.append("| " + " | ".join(cells) + " |")
    return head + "\n\n" + "\n".join(lines) + "\n"


def markdown_means(tasks, tables):
    """One table of all tasks for people."""
    names = [task.name for task, _ in tasks]
    head = (f"Mean over {', '.join(names)}, at the last step. Differences are to {tables['mean'][0]['method']}, paired by seed; each task's "
            f"column has its metric's mean over seeds ± standard deviation.")
    columns = ["method", *(f"{task.name}, {task.metric}" for task, _ in tasks), "seeds", "mean", "difference", "95 % over seeds", "p",
               "95 % over examples", "seeds for 0.5 points"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for i, line in enumerate(tables["mean"]):
        cells = [line["method"], *(spread(tables[name][i]) for name in names), finished(line), spread(line), number(line.get("difference"), "+.4f"),
                 reach(line.get("interval")), number(line.get("p"), ".3f"), reach(line.get("bootstrap")), number(line.get("seeds_needed"), ",d")]
        lines.append("| " + " | ".join(cells) + " |")
    return head + "\n\n" + "\n".join(lines) + "\n"


# Cells: empty where there is no such number.


def number(value, form=".4f"):
    return "" if value is None else format(value, form)


def spread(line):
    return number(line.get("mean")) + (f" ± {line['sd']:.4f}" if line.get("sd") is not None else "")


def reach(interval):
    return "" if interval is None or None in interval else "{:+.4f} to {:+.4f}".format(*interval)


def finished(line):
    return str(line["runs"]) if line["runs"] == line["of"] else f"{line['runs']} of {line['of']}"


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
        compare(cfg) if cfg.methods else train(cfg)
        return 0
    except KeyboardInterrupt:
        how = "the same command goes on" if cfg.methods else f"--resume=true goes on from the last checkpoint in {cfg.out_dir}, if there was one"
        print(f"train.py: interrupted; {how}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("train.py: out of GPU memory: try a smaller --micro_batch_size, or --checkpointing=true", file=sys.stderr)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
