"""Fine-tune a published encoder or GPT on a task: with Dual LoRA, with LoRA, all its weights, or a head alone.

    python train.py                                              # all-MiniLM-L6-v2 on headlines, sarcastic or not
    python train.py --task=arc_easy                              # SmolLM2-135M-Instruct on questions with choices
    python train.py --task=path/to/folder --method=lora --r=16   # your own train.jsonl; data/jsonl.py has the format
    python train.py --predict=texts.jsonl --out_dir=out/sarcasm-dual_lora

Every option is a line of Config, --name=value sets it. An encoder gets a head on top, and so does a GPT on
classification. A GPT on multiple choice learns to continue the question with the right answer.
A run keeps checkpoint.pt in --out_dir, for --resume=true. In the end it leaves adapter.pt, what was trained, and
metrics.jsonl, the losses and the result, for --predict.
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

from data import instruct
from data.batches import (SEED_STRIDE, batches_by_length, by_choice, collate, collate_left, encode_examples,
                          epoch_batches)
from data.download import model_folder
from data.jsonl import read_jsonl
from data.metrics import METRICS, summarise
from data.tasks import Task, first_of_each, load_task
from data.tokenizer import Tokenizer
from dual_lora import (AdaptedLinear, DualLoRA, LoRA, apply_adapters, load_adapter, merge_adapters, merged, save_adapter,
                       save_atomically, set_warmup)
from model import GPT, Classifier, load_pretrained

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- Options ---------------------------------------------------------------------------------------------------------

# A method: the adapter that apply_adapters puts in, and the options that go to it. tests/evidence/methods.py adds more.
METHODS = {
    "dual_lora": (DualLoRA, ("r1", "r2", "alpha", "dropout", "init_std")),
    "lora": (LoRA, ("r", "alpha", "dropout")),
    "full": (None, ()),          # every weight
    "linear_probe": (None, ()),  # the head alone
}
PROTOCOLS, DTYPES = ("likelihood", "instruct"), ("float32", "bfloat16")


def option(default, help, choices=None):
    shown = "" if default in (None, False) else f" (default {default})"
    return field(default=default, metadata={"help": help + shown, "choices": choices})


@dataclass
class Config:
    task: str = option("sarcasm", "a task's name, or a folder with train.jsonl and perhaps validation.jsonl")
    data_dir: str | None = option(None, "folder with GLUE's files, or LLM-Adapters' clone, to read instead of fetching")
    model: str | None = option(None, "minilm, smollm2 (the default on multiple choice), a Hub name or a folder")
    method: str = option("dual_lora", "what is trained", METHODS)
    protocol: str = option("likelihood", "a GPT's on multiple choice: compare answers, or write", PROTOCOLS)
    train_on_prompt: bool = option(False, "under instruct: learn the prompt too, as LLM-Adapters does")
    metric: str | None = option(None, "the main one; default the task's", METRICS)
    # adapters
    targets: str = option("q_proj,v_proj", "layers that get an adapter, by the last part of their names")
    r: int = option(8, "rank of LoRA; Dual LoRA takes r1 = r2 = r / 2, at equal parameters")
    r1: int | None = option(None, "rank of Dual LoRA's magnitude group, if not r / 2")
    r2: int | None = option(None, "rank of Dual LoRA's direction group, if not r / 2")
    alpha: float = option(16.0, "scale of dW")
    dropout: float = option(0.0, "on the adapters' input")
    init_std: float | None = option(None, "of Dual LoRA's four matrices; dual_lora.py, \"How to set it\"")
    scale_warmup_steps: int | None = option(None, "in which Dual LoRA's dW grows; default 30, at most a third")
    # optimisation
    learning_rate: float | None = option(None, "AdamW's, at its peak")
    lr_warmup_steps: int | None = option(None, "steps in which it grows, by default 6 %% of all; then it falls to 0")
    batch_size: int = option(32, "examples a step")
    micro_batch_size: int | None = option(None, "examples at once, if not all; dW is built anew for each")
    max_steps: int | None = option(None, "steps; 0 evaluates the model as it is")
    epochs: float | None = option(None, "passes over the training data, instead of max_steps")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")
    # data, evaluation, files
    max_length: int | None = option(None, "tokens; longer texts are cut")
    eval_interval: int | None = option(None, "steps between evaluations, besides the one at the end")
    eval_examples: int | None = option(None, "evaluate on the first so many validation examples of each set")
    held_out: bool = option(False, "validate on held-out training data: tune with this")
    log_interval: int = option(10, "steps between progress lines")
    checkpoint_interval: int = option(50, "steps between checkpoints")
    compile: bool = option(False, "torch.compile the training step: half a minute or more at the start, then faster")
    gradient_checkpointing: bool = option(False, "form activations again in the backward pass: less memory, more time")
    seed: int = option(0, "for the head, the adapters, the data order and dropout, each with a generator of its own")
    device: str = option("auto", "auto takes cuda, else mps, else cpu")
    dtype: str = option("auto", "of the products; auto: bfloat16 on a GPU that computes it", ("auto", *DTYPES))
    weights: str = option("float32", "of the frozen weights", DTYPES)
    out_dir: str | None = option(None, "the run's folder; default out/TASK-METHOD")
    resume: bool = option(False, "go on from the folder's checkpoint, if it has one")
    overwrite: bool = option(False, "start anew where another run is; its files stay until there are new ones")
    predict: str | None = option(None, "a JSONL file: no training, print what the run in out_dir says of each line")

    def __post_init__(self):
        if self.out_dir is None:
            self.out_dir = f"out/{Path(self.task).resolve().name}-{self.method}"


# ---- Defaults: what is not set, by kind of model. Each row was measured with one small model. ------------------------

RIGHT_NAMES = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
ENCODERS = dict(init_std=0.05, max_length=128, max_steps=560,
                rates={"dual_lora": 2e-3, "lora": 1e-3, "full": 5e-5, "linear_probe": 2e-2})
GPTS = dict(init_std=0.02, max_length=256, max_steps=200,
            rates={"dual_lora": 4e-3, "lora": 2e-3, "full": 2e-4, "linear_probe": 5e-3})
NEW_TOKENS = 32  # of a written answer; LLM-Adapters' number


def fill(cfg, is_gpt, longest, n_train):
    """cfg with every option set that does something. longest: how many tokens the model takes."""
    source, row = ("SmolLM2-135M-Instruct", GPTS) if is_gpt else ("all-MiniLM-L6-v2", ENCODERS)
    steps = row["max_steps"]
    if cfg.epochs is not None:
        steps = max(1, round(cfg.epochs * max(1, n_train // cfg.batch_size)))
    values = {"learning_rate": row["rates"].get(cfg.method, row["rates"]["lora"]), "max_steps": steps,
              "max_length": min(row["max_length"], longest)}
    if "init_std" in METHODS[cfg.method][1]:
        values["init_std"] = row["init_std"]
    unset = {name: value for name, value in values.items() if getattr(cfg, name) is None}
    if unset:
        print(f"not set, so as measured on {source} (another model may want another learning rate): "
              + ", ".join(f"{name} {value:g}" for name, value in unset.items()))
    cfg = dataclasses.replace(cfg, **unset, r1=cfg.r1 or cfg.r // 2, r2=cfg.r2 or cfg.r // 2)
    if cfg.lr_warmup_steps is None:
        cfg.lr_warmup_steps = round(0.06 * cfg.max_steps)
    if cfg.scale_warmup_steps is None:  # a trial of 20 steps should see dW at its full size
        cfg.scale_warmup_steps = min(30, max(1, cfg.max_steps // 3))
    if cfg.max_length > longest:
        raise ValueError(f"--max_length={cfg.max_length}: this model takes at most {longest} tokens")
    return cfg


# ---- Model -----------------------------------------------------------------------------------------------------------


def build(cfg, task=None, adapter=None):
    """(cfg with every option set, task, tokenizer, model, encode), where encode turns examples into rows of ids.

    The model has a head where the task needs one, and new adapters, or those of the file `adapter`. All else is frozen.
    """
    cfg = pick_device(cfg)
    if task is None:
        task = load_task(cfg.task, cfg.data_dir, cfg.metric, cfg.held_out)
        task.validation = first_of_each(task.validation, cfg.eval_examples)
        print(f"{task.name}: {len(task.train):,} examples to train on, {len(task.validation):,} "
              f"{'held-out ones ' if cfg.held_out else ''}to validate. {task.note}", flush=True)
    cfg.model = cfg.model or ("smollm2" if task.kind == "multiple_choice" else "minilm")
    folder = model_folder(cfg.model)
    tokenizer = Tokenizer(folder)
    model = load_pretrained(folder, getattr(torch, cfg.weights), cfg.device)
    is_gpt, writes = isinstance(model, GPT), cfg.protocol == "instruct"
    tokenizer.check(model.embed.num_embeddings, not is_gpt)
    has_head = not (is_gpt and task.kind == "multiple_choice")
    if has_head and writes:
        raise ValueError(f"--protocol=instruct is for a GPT on multiple choice, not {cfg.model} on {task.name}")
    if cfg.method == "linear_probe" and not has_head:
        raise ValueError("--method=linear_probe trains a head, and a GPT on multiple choice has none")
    cfg = fill(cfg, is_gpt, model.max_length - NEW_TOKENS * writes, len(task.train))

    model.gradient_checkpointing = cfg.gradient_checkpointing
    if has_head:
        torch.manual_seed(cfg.seed)
        model = Classifier(model, task.n_outputs).to(cfg.device)
    model.requires_grad_(cfg.method == "full")
    layer, options = METHODS[cfg.method]
    if adapter is not None and layer is None:
        model.load_state_dict(torch.load(adapter, map_location=cfg.device, weights_only=True), strict=False)
    elif adapter is not None:
        load_adapter(model, adapter)
    elif layer is not None:
        torch.manual_seed(cfg.seed + 1)
        targets = [target.strip() for target in cfg.targets.split(",")]
        apply_adapters(model, targets, layer, **{name: getattr(cfg, name) for name in options})
    if has_head:
        model.head.requires_grad_(True)
    if cfg.compile:
        compile_training(model)
    encode = partial(encode_examples, tokenizer=tokenizer, is_gpt=is_gpt, max_length=cfg.max_length,
                     protocol=cfg.protocol, train_on_prompt=cfg.train_on_prompt)
    return cfg, task, tokenizer, model.train(), encode


def pick_device(cfg):
    """cfg without "auto"; ValueError for a device that this machine lacks."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there, dtype = [kind for kind in kinds if kinds[kind]], cfg.dtype
    device = there[0] if cfg.device == "auto" else cfg.device
    if device.partition(":")[0] not in there:
        raise ValueError(f"--device={device}: this machine has {', '.join(there)}")
    if dtype == "auto":  # cards before compute capability 8, such as a T4, only emulate bfloat16
        fast = device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] >= 8
        dtype = "bfloat16" if fast else "float32"
    # In bfloat16 a CPU's fused attention takes ten times as long as the plain one for its backward pass. This switch is
    # the CPU's too, and all the process's.
    torch.backends.cuda.enable_flash_sdp(device != "cpu")
    return dataclasses.replace(cfg, device=device, dtype=dtype)


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
        idx, _, is_answer = collate([example.rows[example.label] for example in batch], pad, device)
        return -model.answer_logprobs(idx, is_answer)[0].sum()
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
        idx, mask, second = collate([rows[i] for i in chosen], pad, device)  # second: a pair's, or a GPT's answer
        if isinstance(model, Classifier):
            found = model(idx, mask, second).float().cpu()  # (rows, classes)
        else:  # the log-probability of the whole answer
            parts = model.answer_logprobs(idx, second)[0].split(second.sum(1).tolist())
            found = torch.stack([part.sum() for part in parts])[:, None].cpu()  # (rows, 1)
        for i, of_row in zip(chosen, found):
            scores[i] = of_row
    in_order = iter(scores)
    return [torch.cat([next(in_order) for _ in example.rows]) for example in examples]


@torch.no_grad()
def write_answers(model, task, examples, tokenizer, device):
    """What the model writes after each prompt, read as the name of an answer; None where it holds none."""
    answers = [None] * len(examples)
    for chosen in batches_by_length([len(example.prompt) + NEW_TOKENS for example in examples]):
        idx, mask = collate_left([examples[i].prompt for i in chosen], tokenizer.pad, device)
        for i, ids in zip(chosen, model.generate(idx, mask, NEW_TOKENS, tokenizer.eos).tolist()):
            ids = ids[:ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
            answers[i] = instruct.extract(examples[i].set or task.name, tokenizer.decode(ids))
    return answers


def evaluate(model, task, examples, tokenizer, device):
    """{metric: value}. Inside `merged` dW is built once, and not for every batch and every written token."""
    model.eval()
    has_adapters = any(isinstance(m, AdaptedLinear) for m in model.modules())
    with merged(model) if has_adapters else contextlib.nullcontext():
        if examples[0].prompt:
            answers = write_answers(model, task, examples, tokenizer, device)
            predictions = {"main": [int(answer == example.answer) for answer, example in zip(answers, examples)],
                           "failed": [int(answer is None) for answer in answers]}
        else:
            scores = score(model, examples, tokenizer.pad, device)
            predictions = {"main": [s.item() if task.kind == "regression" else s.argmax().item() for s in scores]}
            if not isinstance(model, Classifier):  # by bytes too: a long answer is improbable, however right
                per_byte = [s / torch.tensor(example.n_bytes) for s, example in zip(scores, examples)]
                predictions["per_byte"] = [s.argmax().item() for s in per_byte]
    model.train()
    return summarise(task, examples, predictions)


# ---- Training --------------------------------------------------------------------------------------------------------


def train(cfg):
    """One run. Returns the last line of metrics.jsonl, a dict."""
    folder = Path(cfg.out_dir)
    with claim(cfg) as earlier:
        if "final" in earlier:
            print(f"{folder} holds the finished run: {earlier['metric']} {earlier['value']:.4f}")
            return earlier
        cfg = dataclasses.replace(cfg, **earlier.get("settings", {}))
        cfg, task, tokenizer, model, encode = build(cfg)
        examples, validation = encode(task.train), encode(task.validation)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=cfg.learning_rate, weight_decay=0.0, fused=True)
        settings = {name: value for name, value in vars(cfg).items()
                    if name not in ("out_dir", "resume", "overwrite", "predict")}
        device, has_head = torch.device(cfg.device), isinstance(model, Classifier)
        autocast = autocast_of(cfg)
        step, history = 0, []
        loss_sum, n_summed = torch.zeros((), device=device), 0  # since the last progress line
        if earlier:
            step, history, n_summed = earlier["step"], earlier["history"], earlier["n_summed"]
            loss_sum += earlier["loss_sum"].to(device)
            model.load_state_dict(earlier["parameters"], strict=False)  # the frozen ones are not in it
            optimizer.load_state_dict(earlier["optimizer"])

        n_trained, n_all = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
        n_cut = sum(example.cut for example in examples + validation)
        options = (*METHODS[cfg.method][1], "learning_rate", "batch_size", "max_steps", "seed")
        print(f"{n_cut:,} examples are longer than {cfg.max_length} tokens and were cut\n"
              f"{RIGHT_NAMES.get(cfg.model, cfg.model)} on {device} in {cfg.dtype}: {n_trained:,} of {n_all:,} "
              f"parameters are trained, {100 * n_trained / n_all:.2f} %\n"
              f"{cfg.method}: {', '.join(f'{name} {settings[name]}' for name in options)}"
              f"{f'; going on at step {step}' if step else ''}", flush=True)

        n_batches = max(1, len(examples) // cfg.batch_size)  # of an epoch
        batches, began, first = None, time.time(), step
        while True:
            # The factor on dW grows to 1 over the first steps. At 0 no gradient would pass: it is left to a run of none.
            if METHODS[cfg.method][0]:
                set_warmup(model, min(1.0, (step + 1) / max(1, cfg.scale_warmup_steps)) if cfg.max_steps else 0.0)
            if step == cfg.max_steps:
                break

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

            torch.manual_seed(cfg.seed * SEED_STRIDE + step)  # dropout is a function of seed and step, as the batch is
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

            last = step == cfg.max_steps
            logging, saving = (last or step % interval == 0 for interval in (cfg.log_interval, cfg.checkpoint_interval))
            if (logging or saving) and not loss_sum.isfinite():  # not at every step: it waits for the GPU
                raise FloatingPointError(f"the loss is NaN or infinite at step {step}: try a lower --learning_rate")
            if logging:
                history.append({"step": step, "loss": loss_sum.item() / n_summed})
                minutes = (time.time() - began) / (step - first) * (cfg.max_steps - step) / 60
                print(f"step {step}/{cfg.max_steps} | loss {loss_sum / n_summed:.4f} | {minutes:.1f} min left",
                      flush=True)
                n_summed, loss_sum = 0, torch.zeros_like(loss_sum)
            if cfg.eval_interval and step % cfg.eval_interval == 0 and not last:
                with autocast:
                    values = evaluate(model, task, validation, tokenizer, device)
                history.append({"step": step, "validation": values})
                print(f"step {step}: validation {task.metric} {values[task.metric]:.4f}", flush=True)
            if saving:
                save_atomically({"settings": settings, "step": step, "history": history, "n_summed": n_summed,
                                 "loss_sum": loss_sum.cpu(), "optimizer": optimizer.state_dict(),
                                 "parameters": {name: p.detach() for name, p in trained.items()}},
                                folder / "checkpoint.pt")

        with autocast:
            values = evaluate(model, task, validation, tokenizer, device)
        result = {"final": True, "metric": task.metric, "value": values[task.metric], "validation": values,
                  "examples": len(validation), "trainable": n_trained, "task": task.name, "kind": task.kind,
                  "classes": task.classes, "settings": settings}
        history += [{"step": step, "validation": values}, result]
        if METHODS[cfg.method][0]:
            save_adapter(model, folder / "adapter.pt")
        else:
            save_atomically({name: p.detach() for name, p in trained.items()}, folder / "adapter.pt")
        temporary = folder / f"metrics.jsonl.{os.getpid()}.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in history), encoding="utf-8")
        temporary.replace(folder / "metrics.jsonl")
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    print(f"to use it: python train.py --predict=texts.jsonl --out_dir={folder}\n{task.name}, {cfg.method}: "
          f"{task.metric} {values[task.metric]:.4f} at the last step, on {len(validation):,} examples")
    return result


# ---- Prediction ------------------------------------------------------------------------------------------------------


def load(folder, device="auto"):
    """The finished run in `folder`, as a function from a list of examples to a list of dicts.

        predict = train.load("out/sarcasm-dual_lora")
        predict(["area man wins"])          # [{"label": "sarcastic", "probability": 0.99}]

    An example is a text, a pair of texts, or a dict as in the training data; a label in it is not read. The label of
    multiple choice is the index of a choice. Regression and written answers have a label alone.
    """
    folder = Path(folder).expanduser()
    run = finished_run(folder)
    task = Task(run["task"], run["kind"], run["classes"], run["metric"], [], [])
    cfg = Config(**run["settings"] | {"device": device, "compile": False})
    cfg, _, tokenizer, model, encode = build(cfg, task, folder / "adapter.pt")
    if METHODS[cfg.method][0]:
        merge_adapters(model)
    model.eval()
    writes, device = cfg.protocol == "instruct", torch.device(cfg.device)
    needed = "instruction" if writes else "choices" if task.kind == "multiple_choice" else "text_a"

    def predict(examples):
        dicts = [example if isinstance(example, dict) else
                 dict(zip(("text_a", "text_b"), [example] if isinstance(example, str) else example))
                 for example in examples]
        if not all(needed in example for example in dicts):
            raise ValueError(f'{task.name} takes examples with "{needed}", and one has none')
        encoded = encode(dicts)
        with autocast_of(cfg):
            if writes:
                return [{"label": answer} for answer in write_answers(model, task, encoded, tokenizer, device)]
            scores = score(model, encoded, tokenizer.pad, device)
        if task.kind == "regression":
            return [{"label": s.item()} for s in scores]
        best = [(s.argmax().item(), s.softmax(0).max().item()) for s in scores]
        return [{"label": task.classes[i] if task.classes else i, "probability": share} for i, share in best]

    return predict


# ---- The run's folder: checkpoint.pt while a run is unfinished, then adapter.pt and metrics.jsonl --------------------


@contextlib.contextmanager
def claim(cfg):
    """Keep other runs out of cfg.out_dir, and yield what is there to go on from: see earlier_run."""
    folder = Path(cfg.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        try:
            if fcntl:  # the system lets go of the lock when the process ends, by a kill too
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is at work there; give this one another --out_dir") from None
        except OSError:
            pass  # a file system without locks
        for half in (*folder.glob("*.pt.*.tmp"), *folder.glob("metrics.jsonl.*.tmp")):  # of a run killed as it saved
            half.unlink()
        yield earlier_run(folder, cfg)
    finally:
        if fcntl:
            os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty


def earlier_run(folder, cfg):
    """With --resume=true the checkpoint of the run in `folder`, or its last line if it is finished; else {}.

    ValueError where a new run would replace an earlier one and nobody asked for that, or cfg has other options than it.
    """
    path = folder / "checkpoint.pt"
    unfinished, finished = path.exists(), (folder / "metrics.jsonl").exists()
    if not (unfinished or finished) or (cfg.overwrite and not cfg.resume):
        return {}
    if not cfg.resume:
        kind, way_out = ("an unfinished", "--resume=true") if unfinished else ("a finished", "another --out_dir")
        raise ValueError(f"{folder} holds {kind} run: give {way_out}, or --overwrite=true to start anew")
    try:
        run = torch.load(path, map_location="cpu", weights_only=True) if unfinished else finished_run(folder)
        settings = run["settings"]
    except Exception as error:  # torch raises half a dozen kinds for a file cut short
        raise ValueError(f"{folder} holds no run that can be read: {type(error).__name__}") from None
    other = [name for name in settings if getattr(cfg, name) not in (settings[name], getattr(Config, name))]
    if "max_steps" in other or "epochs" in other:
        raise ValueError(f"{folder} holds a run of {settings['max_steps']} steps, whose learning rate falls to 0 by "
                         f"then: it cannot be made longer or shorter")
    if other:
        raise ValueError(f"{folder} holds a run with another {', '.join(other)}, and --resume=true keeps its options")
    return run


def finished_run(folder):
    """The last line of the finished run in `folder`, a dict."""
    try:
        return json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        raise ValueError(f"{folder} holds no finished run: no metrics.jsonl that can be read") from None


# ---- The command line ------------------------------------------------------------------------------------------------


def parse(arguments):
    """Config from ["--name=value", ...]; ValueError for what is no option or no value of it. --help prints the list."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--name=value ...]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    for f in dataclasses.fields(Config):
        kind = (typing.get_args(f.type) or (f.type,))[0]  # int, of int and of int | None
        convert = {bool: true_or_false, str: os.path.expanduser}.get(kind, kind)  # a shell leaves --out_dir=~/x alone
        parser.add_argument(f"--{f.name}", type=convert, default=f.default, **f.metadata)
    cfg = Config(**vars(parser.parse_args(arguments)))
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
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not (0 < value < math.inf or (value == 0 and name in may_be_0)):
            raise ValueError(f"--{name}={value}: it should be {'at least' if name in may_be_0 else 'above'} 0")
    layer = METHODS[cfg.method][0]
    is_dual = layer is not None and issubclass(layer, DualLoRA)
    idle = () if is_dual else ("r1", "r2", "init_std", "scale_warmup_steps")
    for name in idle if layer else ("targets", "r", "alpha", "dropout", *idle):
        if getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"--{name}={getattr(cfg, name)} does nothing with --method={cfg.method}")
    if is_dual and cfg.r % 2 and not (cfg.r1 and cfg.r2):
        raise ValueError(f"--r={cfg.r}: Dual LoRA halves it; give an even number, or r1 and r2")
    if cfg.max_steps is not None and cfg.epochs is not None:
        raise ValueError(f"--max_steps={cfg.max_steps} and --epochs={cfg.epochs}: give one of them")
    if cfg.train_on_prompt and cfg.protocol == "likelihood":
        raise ValueError("--train_on_prompt=true does nothing with --protocol=likelihood")
    if cfg.method == "full" and cfg.weights != "float32":
        raise ValueError(f"--weights={cfg.weights} with --method=full: weights that are trained stay in float32")


def main(arguments):
    cfg = None
    try:
        cfg = parse(arguments)
        if cfg.predict:
            examples = [example for _, example in read_jsonl(Path(cfg.predict), labelled=False)]
            for prediction in load(cfg.out_dir, cfg.device)(examples):
                print(json.dumps(prediction))
        else:
            train(cfg)
        return 0
    except KeyboardInterrupt:
        message = f"interrupted; --resume=true goes on from the last checkpoint in {cfg.out_dir}"
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
