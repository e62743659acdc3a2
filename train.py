"""Fine-tune a published encoder or GPT on a task: with Dual LoRA, with LoRA, all its weights, or a head alone.

    python train.py                                              # all-MiniLM-L6-v2 on headlines, sarcastic or not
    python train.py --task=arc_easy                              # SmolLM2-135M-Instruct on questions with choices
    python train.py --task=path/to/folder --method=lora --r=16   # your own train.jsonl; data/jsonl.py has the format
    python train.py --predict=texts.jsonl --out_dir=out/sarcasm-dual_lora

Every option is a line of Config. Set it with --name=value. An encoder gets a head on top, and so does a GPT on
classification. A GPT on multiple choice learns to continue the question with the right answer.
A run keeps checkpoint.pt in --out_dir, for --resume=true, and writes its losses to metrics.jsonl. In the end it leaves
adapter.pt, what was trained, and the result as the last line of metrics.jsonl, for --predict.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
import typing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data import instruct, runs
from data.batches import (SEED_STRIDE, batches_by_length, by_choice, collate, collate_left, encode_examples,
                          epoch_batches)
from data.download import model_folder
from data.jsonl import read_jsonl
from data.metrics import METRICS, summarise
from data.tasks import TASKS, first_of_each, load_task
from data.tokenizer import Tokenizer
from dual_lora import (AdaptedLinear, DualLoRA, LoRA, apply_adapters, load_adapter, merge_adapters, merged,
                       save_adapter, save_atomically, set_warmup)
from model import GPT, Classifier, load_pretrained

# ---- Options ---------------------------------------------------------------------------------------------------------

# A method: the adapter that apply_adapters puts in, and the options that go to it. tests/evidence/methods.py adds more.
METHODS = {
    "dual_lora": (DualLoRA, ("r1", "r2", "alpha", "dropout", "init_std")),
    "lora": (LoRA, ("r", "alpha", "dropout")),
    "full": (None, ()),          # every weight
    "linear_probe": (None, ()),  # the head alone
}
PROTOCOLS = ("likelihood", "instruct")
DTYPES = ("float32", "bfloat16")
FULL_NAMES = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}


def option(default, help, choices=None):
    shown = "" if default in (None, False) else f" (default {default})"
    return field(default=default, metadata={"help": help + shown, "choices": choices})


@dataclass
class Config:
    task: str = option("sarcasm", "a task's name, or a folder with train.jsonl and perhaps validation.jsonl")
    data_dir: str | None = option(None, "folder with GLUE's files, or LLM-Adapters' clone, to read instead of fetching")
    model: str | None = option(None, "minilm, smollm2 (the default on multiple choice), a Hub name or a folder")
    method: str = option("dual_lora", "what is trained", METHODS)
    protocol: str = option("likelihood", "for a GPT on multiple choice: score the choices, or generate", PROTOCOLS)
    train_on_prompt: bool = option(False, "under instruct: learn the prompt too, as LLM-Adapters does")
    metric: str | None = option(None, "the metric to report first, if not the task's own", METRICS)
    # adapters
    targets: str = option("q_proj,v_proj", "layers that get an adapter, by the last part of their names")
    r: int = option(8, "rank of LoRA; Dual LoRA takes r1 = r2 = r / 2, at equal parameters")
    r1: int | None = option(None, "rank of Dual LoRA's magnitude group, if not r / 2")
    r2: int | None = option(None, "rank of Dual LoRA's direction group, if not r / 2")
    alpha: float = option(16.0, "scale of dW, which is what an adapter adds to a layer's weight W0")
    dropout: float = option(0.0, "dropout on the adapters' input")
    init_std: float | None = option(None, "spread of Dual LoRA's four matrices at the start; default 0.05 (GPT: 0.02)")
    scale_warmup_steps: int | None = option(None, "steps until Dual LoRA's dW counts in full; default 30 or fewer")
    # optimisation
    learning_rate: float | None = option(None, "AdamW's, at its peak; default by model and method")
    lr_warmup_steps: int | None = option(None, "steps in which the rate rises, then it falls to 0; default 6 %% of all")
    batch_size: int = option(32, "examples a step")
    micro_batch_size: int | None = option(None, "examples at once, if not all of a step; dW is built anew for each")
    max_steps: int | None = option(None, "steps, whatever the data's size; default 560 (GPT: 200); 0: the base model")
    epochs: float | None = option(None, "passes over the data, instead of max_steps; a last smaller batch is left out")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")
    # data, evaluation, files
    max_length: int | None = option(None, "tokens of a text or pair; longer ones are cut; default 128 (GPT: 256)")
    eval_interval: int | None = option(None, "steps between evaluations, besides the one at the end")
    eval_examples: int | None = option(None, "evaluate on the first so many validation examples of each set")
    held_out: bool = option(False, "validate on held-out training data: tune with this")
    log_interval: int = option(10, "steps between progress lines")
    checkpoint_interval: int = option(50, "steps between checkpoints")
    compile: bool = option(False, "torch.compile the training step: half a minute or more at the start, then faster")
    gradient_checkpointing: bool = option(False, "form activations again in the backward pass: less memory, more time")
    seed: int = option(0, "for the head, the adapters, the data order and dropout, each with a generator of its own")
    device: str = option("auto", "auto takes cuda, else mps, else cpu")
    dtype: str = option("auto", "number format to compute in; auto: bfloat16 on a GPU that has it", ("auto", *DTYPES))
    weights: str = option("float32", "number format of the frozen weights", DTYPES)
    out_dir: str | None = option(None, "the run's folder; default out/TASK-METHOD")
    resume: bool = option(False, "go on from the folder's checkpoint, if it has one, with that run's options")
    overwrite: bool = option(False, "start anew where another run is; its files stay until there are new ones")
    predict: str | None = option(None, "a JSONL file, or - for standard input: what the run in out_dir says of it")
    given: frozenset | None = None  # no option: the names of those that were given, be it at their default

    def __post_init__(self):
        if self.given is None:
            self.given = frozenset(f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        if self.out_dir is None:
            self.out_dir = f"out/{Path(self.task).resolve().name}-{self.method}"
        for name in ("task", "model", "data_dir"):  # a folder's whole path: --resume and --predict may start elsewhere
            path = getattr(self, name)
            if path is not None and path not in (*TASKS, *FULL_NAMES) and os.path.isdir(path):
                setattr(self, name, os.path.abspath(path))


def settings_of(cfg):
    """The options that make a run what it is, {name: value}."""
    return {name: value for name, value in vars(cfg).items()
            if name not in ("out_dir", "resume", "overwrite", "predict", "given")}


# ---- Defaults: what is not set, by kind of model. Each row was measured with one small model. ------------------------

ENCODERS = {"init_std": 0.05, "max_length": 128, "max_steps": 560,
            "learning_rate": {"dual_lora": 2e-3, "lora": 1e-3, "full": 5e-5, "linear_probe": 2e-2}}
GPTS = {"init_std": 0.02, "max_length": 256, "max_steps": 200,
        "learning_rate": {"dual_lora": 4e-3, "lora": 2e-3, "full": 2e-4, "linear_probe": 5e-3}}
NEW_TOKENS = 32  # of a written answer; LLM-Adapters' number


def with_defaults(cfg, measured, longest):
    """cfg with defaults in place of None. measured: ENCODERS or GPTS; longest: the most tokens that the model takes."""
    longest -= NEW_TOKENS if cfg.protocol == "instruct" else 0
    if (cfg.max_length or 0) > longest:
        raise ValueError(f"--max_length={cfg.max_length}: this model takes at most {longest} tokens")
    steps = measured["max_steps"] if cfg.max_steps is None else cfg.max_steps
    rates = measured["learning_rate"]  # LoRA's for a method of tests/evidence
    values = {"max_steps": steps, "max_length": min(measured["max_length"], longest), "init_std": measured["init_std"],
              "learning_rate": rates.get(cfg.method, rates["lora"]), "lr_warmup_steps": round(0.06 * steps),
              "r1": cfg.r // 2, "r2": cfg.r // 2,
              "scale_warmup_steps": min(30, max(1, steps // 3))}  # a trial of 20 steps should see dW in full
    return dataclasses.replace(cfg, **{name: value for name, value in values.items() if getattr(cfg, name) is None})


# ---- Model -----------------------------------------------------------------------------------------------------------


def pick_device(cfg):
    """cfg without "auto"; ValueError for a device that this machine lacks."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind in kinds if kinds[kind]]
    device = there[0] if cfg.device == "auto" else cfg.device
    if device.partition(":")[0] not in there:
        raise ValueError(f"--device={device}: this machine has {', '.join(there)}")
    dtype = cfg.dtype
    if dtype == "auto":  # cards before compute capability 8, such as a T4, only emulate bfloat16
        fast = device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] >= 8
        dtype = "bfloat16" if fast else "float32"
    return dataclasses.replace(cfg, device=device, dtype=dtype)


def load_base(cfg):
    """(tokenizer, the pre-trained GPT or Encoder) of cfg.model."""
    folder = model_folder(cfg.model)
    tokenizer, base = Tokenizer(folder), load_pretrained(folder, getattr(torch, cfg.weights), cfg.device)
    tokenizer.check(base.embed.num_embeddings, not isinstance(base, GPT))
    return tokenizer, base


def add_trained(cfg, base, kind, n_outputs, file=None):
    """The model to train: base, with a head where the task needs one, and with adapters. All else is frozen. What is
    trained is new, or from `file`, an adapter.pt."""
    has_head = not (isinstance(base, GPT) and kind == "multiple_choice")
    if has_head and cfg.protocol == "instruct":
        raise ValueError(f"--protocol=instruct is for a GPT on multiple choice, and this is {cfg.model} on {kind}")
    if cfg.method == "linear_probe" and not has_head:
        raise ValueError("--method=linear_probe trains a head, and a GPT on multiple choice has none")
    torch.manual_seed(cfg.seed)
    model = Classifier(base, n_outputs).to(cfg.device) if has_head else base
    model.requires_grad_(cfg.method == "full")
    adapter, options = METHODS[cfg.method]
    if adapter and file is None:
        torch.manual_seed(cfg.seed + 1)
        targets = [target.strip() for target in cfg.targets.split(",")]
        apply_adapters(model, targets, adapter, **{name: getattr(cfg, name) for name in options})
    elif adapter:
        load_adapter(model, file)  # the head too
    elif file is not None:  # by full or linear_probe: the trained parameters alone
        model.load_state_dict(model.state_dict() | runs.read_tensors(file))
    if has_head:
        model.head.requires_grad_(True)
    return model.train()


def encode(cfg, base, tokenizer, examples):
    """The examples as rows of ids; no row is longer than cfg.max_length."""
    return encode_examples(examples, tokenizer, isinstance(base, GPT), cfg.max_length, cfg.protocol,
                           cfg.train_on_prompt)


def adapted(model):
    """The layers with an adapter. full and linear_probe have none, and verbs such as `merged` refuse that."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


def autocast_of(cfg):
    """The context of the products: bfloat16, or nothing, since not every torch knows autocast on every device."""
    kind = torch.device(cfg.device).type
    return torch.autocast(kind, torch.bfloat16) if cfg.dtype == "bfloat16" else contextlib.nullcontext()


def compile_training(model):
    """torch.compile for each block, in training: all share one graph. Evaluation has other shapes, merged weights."""
    def choose(block, plain, compiled, *args, **kwargs):
        return (compiled if block.training else plain)(*args, **kwargs)

    for block in getattr(model, "backbone", model).layers:
        block.forward = partial(choose, block, block.forward, torch.compile(block.forward, dynamic=True))


# ---- Loss and evaluation. A batch is a list of examples. An example has one row of ids, or one for each choice. ------


def batch_loss(model, kind, batch, pad, device):
    """Sum of the losses of a batch: over examples, or for a GPT on multiple choice over the right answers' tokens."""
    if not isinstance(model, Classifier):
        # without the mask: padding is on the right, where a causal model does not look
        idx, _, is_answer = collate([example.rows[example.label] for example in batch], pad, device)
        return -model.answer_logprobs(idx, is_answer).sum()
    labels = torch.tensor([example.label for example in batch], device=device)
    logits = model(*collate([row for example in batch for row in example.rows], pad, device)).float()
    if kind == "regression":
        return F.mse_loss(logits[:, 0], labels.float(), reduction="sum")
    if kind == "multiple_choice":
        logits = by_choice(logits[:, 0], batch)  # (examples, choices)
    return F.cross_entropy(logits, labels, reduction="sum")


@torch.no_grad()
def score(model, examples, pad, device):
    """A tensor for each example: the score of every class, of every choice, or the number itself."""
    rows = [row for example in examples for row in example.rows]
    scores = [None] * len(rows)
    for chosen in batches_by_length([len(row.ids) for row in rows]):
        idx, mask, in_second_part = collate([rows[i] for i in chosen], pad, device)
        if isinstance(model, Classifier):
            found = model(idx, mask, in_second_part).float().cpu()  # (rows, classes)
        else:  # the second part is the answer: the log-probability of all of it
            logprobs = model.answer_logprobs(idx, in_second_part).split(in_second_part.sum(1).tolist())
            found = torch.stack([part.sum() for part in logprobs])[:, None].cpu()  # (rows, 1)
        for i, of_row in zip(chosen, found):  # back in the order of the rows
            scores[i] = of_row
    scores = torch.stack(scores)  # (rows, classes), or (rows, 1)
    check_finite(scores)
    return [part.flatten() for part in scores.split([len(example.rows) for example in examples])]


def check_finite(outputs):
    if not outputs.isfinite().all():  # argmax would take NaN for the largest, and say nothing
        raise FloatingPointError("the model's output is NaN or infinite: its weights are broken, or it overflows")


@torch.no_grad()
def write_answers(model, examples, tokenizer, device, name):
    """What the model writes after each prompt, read as an answer of the task `name`; None where it holds none."""
    answers = [None] * len(examples)
    for chosen in batches_by_length([len(example.prompt) + NEW_TOKENS for example in examples]):
        idx, mask = collate_left([examples[i].prompt for i in chosen], tokenizer.pad, device)
        check_finite(model(idx[:1], mask=mask[:1])[0])  # of one prompt, since generate does not notice NaN
        for i, ids in zip(chosen, model.generate(idx, mask, NEW_TOKENS, tokenizer.eos).tolist()):
            ids = ids[:ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
            answers[i] = instruct.extract(examples[i].subset or name, tokenizer.decode(ids))
    return answers


def evaluate(model, task, examples, tokenizer, device):
    """{metric: value}. Inside `merged` dW is built once, and not for every batch and every written token."""
    model.eval()
    with merged(model) if adapted(model) else contextlib.nullcontext():
        if examples[0].prompt:
            answers = write_answers(model, examples, tokenizer, device, task.name)
            predictions = {"predicted": [int(answer == example.answer) for answer, example in zip(answers, examples)],
                           "failed": [int(answer is None) for answer in answers]}
        else:
            scores = score(model, examples, tokenizer.pad, device)
            predictions = {"predicted": [s.item() if task.kind == "regression" else s.argmax().item() for s in scores]}
            if not isinstance(model, Classifier):  # by bytes too: a long answer is improbable, however right
                per_byte = [s / torch.tensor(example.n_bytes) for s, example in zip(scores, examples)]
                predictions["per_byte"] = [s.argmax().item() for s in per_byte]
    model.train()
    return summarise(task, examples, predictions)


# ---- Training --------------------------------------------------------------------------------------------------------


def read_task(cfg):
    task = load_task(cfg.task, cfg.data_dir, cfg.metric, cfg.held_out)
    return dataclasses.replace(task, validation=first_of_each(task.validation, cfg.eval_examples))


def train(cfg):
    """One run. Returns its result, the last line of metrics.jsonl, a dict."""
    folder = Path(cfg.out_dir)
    with runs.open_folder(folder, cfg.resume, cfg.overwrite) as (checkpoint, result):
        earlier = checkpoint or result
        if earlier:
            cfg = dataclasses.replace(cfg, **runs.settings_to_keep(folder, earlier, cfg))
        task = read_task(cfg)
        data = runs.data_of(task)  # kind, classes, counts and a hash of them
        if earlier:
            runs.check_same(folder, earlier, data)
        if result:
            print(f"{folder} holds the finished run: {result['metric']} {result['value']:.4f}")
            return result
        print(f"{task.name}: {len(task.train):,} examples to train on, {len(task.validation):,} "
              f"{'held-out ones ' if cfg.held_out else ''}to validate. {task.note}\n{runs.describe(data)}", flush=True)

        cfg = pick_device(cfg)
        cfg.model = cfg.model or ("smollm2" if task.kind == "multiple_choice" else "minilm")
        n_batches = max(1, len(task.train) // cfg.batch_size)  # of an epoch
        if cfg.epochs is not None:
            cfg.max_steps = max(1, round(cfg.epochs * n_batches))
        tokenizer, base = load_base(cfg)
        weights = runs.weights_of(base)  # a hash of them
        if earlier:
            runs.check_same(folder, earlier, weights)
        cfg = with_defaults(cfg, GPTS if isinstance(base, GPT) else ENCODERS, base.max_length)
        model = add_trained(cfg, base, task.kind, task.n_outputs)
        examples, validation = (encode(cfg, base, tokenizer, part) for part in (task.train, task.validation))
        print_plan(cfg, model, examples + validation)

        base.gradient_checkpointing = cfg.gradient_checkpointing
        if cfg.compile:
            compile_training(model)
        device, autocast = torch.device(cfg.device), autocast_of(cfg)
        has_head, has_adapters = model is not base, bool(adapted(model))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=cfg.learning_rate, weight_decay=0.0, fused=True)
        step, history = 0, []  # history: the lines of metrics.jsonl
        loss_sum, n_summed = torch.zeros((), device=device), 0  # since the last progress line
        if checkpoint:
            step, history, n_summed = checkpoint["step"], checkpoint["history"], checkpoint["n_summed"]
            loss_sum += checkpoint["loss_sum"].to(device)
            model.load_state_dict(checkpoint["parameters"], strict=False)  # the frozen ones are not in it
            optimizer.load_state_dict(checkpoint["optimizer"])
            print(f"going on after step {step}", flush=True)

        batches, began, first = None, time.time(), step
        if has_adapters:  # the loop may have no step left; with max_steps=0 the factor is 0: the pre-trained model
            set_warmup(model, min(1.0, step / max(1, cfg.scale_warmup_steps)))
        # In bfloat16 a CPU's fused attention takes ten times as long as the plain one for its backward pass.
        attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
        with attention, runs.interrupts_held() as interrupted:
            while step < cfg.max_steps:
                # The factor on dW grows to 1, so that the first forward passes are near the pre-trained model's.
                if has_adapters:
                    set_warmup(model, min(1.0, (step + 1) / max(1, cfg.scale_warmup_steps)))

                # The learning rate rises in a straight line to its peak, then falls in one to 0.
                rise = cfg.learning_rate * (step + 1) / max(1, cfg.lr_warmup_steps)
                fall = cfg.learning_rate * (cfg.max_steps - step) / max(1, cfg.max_steps - cfg.lr_warmup_steps)
                optimizer.param_groups[0]["lr"] = min(rise, fall)
                if batches is None or step % n_batches == 0:
                    batches = epoch_batches(examples, cfg.batch_size, cfg.seed, step // n_batches)
                batch = [examples[i] for i in batches[step % n_batches]]
                n_targets = len(batch)
                if not has_head:  # tokens of the right answers
                    rows = [example.rows[example.label] for example in batch]
                    n_targets = sum(len(row.ids) - row.start for row in rows)

                torch.manual_seed(cfg.seed * SEED_STRIDE + step)  # dropout depends on seed and step, as the batch does
                size = cfg.micro_batch_size or len(batch)
                for start in range(0, len(batch), size):
                    with autocast:
                        loss = batch_loss(model, task.kind, batch[start:start + size], tokenizer.pad, device)
                    (loss / n_targets).backward()  # the mean over the whole batch, however many pieces it comes in
                    loss_sum += loss.detach()
                n_summed += n_targets
                if cfg.grad_clip:
                    torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
                step += 1

                last, stopping = step == cfg.max_steps, bool(interrupted)
                logging = last or step % cfg.log_interval == 0
                saving = last or stopping or step % cfg.checkpoint_interval == 0
                if (logging or saving) and not loss_sum.isfinite():  # not at every step: it waits for the GPU
                    raise FloatingPointError(f"the loss is NaN or infinite at step {step}: "
                                             f"try a lower --learning_rate")
                if logging:
                    runs.note(folder, history, {"step": step, "loss": loss_sum.item() / n_summed})
                    minutes = (time.time() - began) / (step - first) * (cfg.max_steps - step) / 60
                    print(f"step {step}/{cfg.max_steps} | loss {loss_sum / n_summed:.4f} | {minutes:.1f} min left",
                          flush=True)
                    n_summed, loss_sum = 0, torch.zeros_like(loss_sum)
                if cfg.eval_interval and step % cfg.eval_interval == 0 and not last:
                    with autocast:
                        values = evaluate(model, task, validation, tokenizer, device)
                    runs.note(folder, history, {"step": step, "validation": values})
                    print(f"step {step}: validation {task.metric} {values[task.metric]:.4f}", flush=True)
                if saving:
                    save_atomically({"settings": settings_of(cfg), **data, **weights, "step": step, "history": history,
                                     "n_summed": n_summed, "loss_sum": loss_sum.cpu(),
                                     "optimizer": optimizer.state_dict(),
                                     "parameters": {name: p.detach() for name, p in trained.items()}},
                                    folder / "checkpoint.pt")
                if stopping:
                    raise KeyboardInterrupt(f"interrupted, saved after step {step}: --resume=true goes on from there")

        with autocast:
            values = evaluate(model, task, validation, tokenizer, device)
        runs.note(folder, history, {"step": step, "validation": values})
        result = {"final": True, "task": task.name, "metric": task.metric, "value": values[task.metric],
                  "validation": values, **data, **weights, "settings": settings_of(cfg),
                  "trainable": sum(p.numel() for p in trained.values())}
        if has_adapters:
            save_adapter(model, folder / "adapter.pt")
        else:
            save_atomically({name: p.detach() for name, p in trained.items()}, folder / "adapter.pt")
        runs.note(folder, history, result)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    beside = "" if data["commonest"] is None else f", {data['commonest']:.4f} of them of the commonest class"
    print(f"to use it: python train.py --predict=texts.jsonl --out_dir={folder}\n{task.name}, {cfg.method}: "
          f"{task.metric} {values[task.metric]:.4f} at the last step, on {len(validation):,} examples{beside}")
    return result


def print_plan(cfg, model, examples):
    """What is trained and how."""
    n_all = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    new_head = " and a new head" if isinstance(model, Classifier) else ""
    options = (*METHODS[cfg.method][1], "learning_rate", "batch_size", "max_steps", "max_length", "seed")
    print(f"{FULL_NAMES.get(cfg.model, cfg.model)}{new_head} on {cfg.device} in {cfg.dtype}: {n_trained:,} of "
          f"{n_all:,} parameters are trained, {100 * n_trained / n_all:.2f} %\n"
          f"examples longer than {cfg.max_length} tokens, which were cut: {sum(e.cut for e in examples):,}\n"
          f"{cfg.method}: {', '.join(f'{name} {getattr(cfg, name):g}' for name in options)}", flush=True)
    unset = [name for name in options if name in ENCODERS and name not in cfg.given]
    if cfg.epochs is not None and "max_steps" in unset:
        unset.remove("max_steps")
    if unset:
        source = FULL_NAMES["smollm2" if isinstance(getattr(model, "backbone", model), GPT) else "minilm"]
        print(f"{', '.join(unset)}: not set, so as measured on {source}; another model may want others")
    if "init_std" in options:
        norms = [100 * (layer.adapter.delta_weight().norm() / layer.W0.norm()).item() for layer in adapted(model)]
        print(f"norm of dW at the start, with its full factor: {sum(norms) / len(norms):.1f} % of W0's, from "
              f"{min(norms):.1f} to {max(norms):.1f} % by layer")


# ---- Prediction ------------------------------------------------------------------------------------------------------


def load(folder, device="auto"):
    """The finished run in `folder`, as a function from a list of examples to a list of dicts.

        predict = train.load("out/sarcasm-dual_lora")
        predict(["area man wins"])          # [{"label": "sarcastic", "probability": 0.99}]

    An example is a text, a pair of texts, or a dict as in the training data; a label in it is not read. The label of
    multiple choice is the index of a choice. Regression and written answers have a label alone.
    """
    folder = Path(folder).expanduser()
    run = runs.finished_run(folder)
    kind, classes = run["kind"], run["classes"]
    cfg = pick_device(Config(**run["settings"] | {"device": device}))
    tokenizer, base = load_base(cfg)
    runs.check_same(folder, run, runs.weights_of(base))
    model = add_trained(cfg, base, kind, len(classes) or 1, folder / "adapter.pt")
    if adapted(model):
        merge_adapters(model)
    model.eval()
    device = torch.device(cfg.device)

    def predict(examples):
        if not isinstance(examples, (list, tuple)):
            raise ValueError(f"predict takes a list of examples, predict([...]), not a {type(examples).__name__}")
        examples = [runs.as_example(example, run, f"example {i}") for i, example in enumerate(examples)]
        if not examples:
            return []
        encoded = encode(cfg, base, tokenizer, examples)
        with autocast_of(cfg):
            if cfg.protocol == "instruct":
                return [{"label": answer} for answer in write_answers(model, encoded, tokenizer, device, run["task"])]
            scores = score(model, encoded, tokenizer.pad, device)
        if kind == "regression":
            return [{"label": s.item()} for s in scores]
        best = [(s.argmax().item(), s.softmax(0).max().item()) for s in scores]
        return [{"label": classes[i] if classes else i, "probability": share} for i, share in best]

    return predict


def predict_file(cfg):
    """Print a line of JSON for each line of the file, as they are made. All lines are checked before the first."""
    run = runs.finished_run(Path(cfg.out_dir))
    lines = read_jsonl(Path("/dev/stdin" if cfg.predict == "-" else cfg.predict), labelled=False)
    examples = [runs.as_example(example, run, where) for where, example in lines]
    with contextlib.redirect_stdout(sys.stderr):  # loading prints messages; standard output is for predictions only
        predict = load(cfg.out_dir, cfg.device)
    with contextlib.suppress(BrokenPipeError):  # whoever reads them, such as head, has enough
        for start in range(0, len(examples), 64):
            for prediction in predict(examples[start:start + 64]):
                print(json.dumps(prediction), flush=True)


# ---- The command line ------------------------------------------------------------------------------------------------


def parse(arguments):
    """Config from ["--name=value", ...]; ValueError for what is no option or no value of it. --help prints the list."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--name=value ...]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    for f in dataclasses.fields(Config):
        if f.metadata:
            kind = (typing.get_args(f.type) or (f.type,))[0]  # int, of int and of int | None
            convert = {bool: true_or_false, str: os.path.expanduser}.get(kind, kind)  # a shell leaves --name=~/x alone
            parser.add_argument(f"--{f.name}", type=convert, default=argparse.SUPPRESS, **f.metadata)
    given = vars(parser.parse_args(arguments))
    cfg = Config(**given, given=frozenset(given))
    check(cfg)
    return cfg


def refuse(message):
    raise ValueError(message)


def true_or_false(text):
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def check(cfg):
    """ValueError for a number out of range, and for options that do nothing or contradict each other."""
    may_be_0 = ("dropout", "scale_warmup_steps", "lr_warmup_steps", "max_steps", "grad_clip", "seed")
    for name, value in vars(cfg).items():
        if type(value) in (int, float) and not (0 < value < math.inf or (value == 0 and name in may_be_0)):
            raise ValueError(f"--{name}={value}: it should be {'at least' if name in may_be_0 else 'above'} 0")
    adapter, options = METHODS[cfg.method]
    unused = () if adapter else ("targets", "r", "alpha", "dropout")
    unused += () if "r1" in options else ("r1", "r2", "init_std", "scale_warmup_steps")
    for name in unused:
        if name in cfg.given:
            raise ValueError(f"--{name}={getattr(cfg, name)} does nothing with --method={cfg.method}")
    if "r1" in options and cfg.r % 2 and not (cfg.r1 and cfg.r2):
        raise ValueError(f"--r={cfg.r}: Dual LoRA halves it; give an even number, or r1 and r2")
    if cfg.max_steps is not None and cfg.epochs is not None:
        raise ValueError(f"--max_steps={cfg.max_steps} and --epochs={cfg.epochs}: give one of them")
    if cfg.train_on_prompt and cfg.protocol == "likelihood":
        raise ValueError("--train_on_prompt=true does nothing with --protocol=likelihood")
    if cfg.method == "full" and cfg.weights != "float32":
        raise ValueError(f"--weights={cfg.weights} with --method=full: weights that are trained stay in float32")
    beside = sorted(cfg.given - {"predict", "out_dir", "device"})
    if cfg.predict is not None and beside:
        raise ValueError(f"--{beside[0]} does nothing with --predict: the run in --out_dir has options of its own")


def main(arguments):
    cfg = None
    try:
        cfg = parse(arguments)
        if cfg.predict is not None:
            predict_file(cfg)
        else:
            train(cfg)
        return 0
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or "interrupted"
    except torch.OutOfMemoryError:
        message = "out of GPU memory: try a smaller --micro_batch_size, or --gradient_checkpointing=true"
    except (ValueError, OSError, FloatingPointError) as error:
        message = " ".join(str(error).split())
    print(f"train.py: {message}", file=sys.stderr)
    return 1 if cfg else 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a console that cannot print a folder's name shows escapes
    sys.exit(main(sys.argv[1:]))
