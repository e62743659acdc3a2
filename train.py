"""Fine-tune a published encoder or GPT on a task: with Dual LoRA, with LoRA, all its weights, or a head alone.

    python train.py                                              # all-MiniLM-L6-v2 on headlines, sarcastic or not
    python train.py --task=arc_easy                              # SmolLM2-135M-Instruct on questions with choices
    python train.py --task=path/to/folder --method=lora --r=16   # your own train.jsonl; data/jsonl.py has the format
    python train.py --predict=texts.jsonl --out_dir=out/sarcasm-dual_lora

Every option is a line of Config, --name=value sets it. An encoder gets a head on top, and so does a GPT on
classification. A GPT on multiple choice learns to continue the question with the right answer.
A run prints its progress and keeps checkpoint.pt in --out_dir, for --resume=true. When it is finished, the folder holds
adapter.pt (what was trained) and metrics.jsonl (the losses, then the result) instead. That is what --predict needs.
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from data import instruct
from data.batches import batches_by_length, by_choice, collate, collate_left, encode_examples, epoch_batches
from data.download import model_folder
from data.jsonl import read_jsonl, write_jsonl
from data.metrics import METRICS, summarise
from data.tasks import Task, first_of_each, load_task
from data.tokenizer import Tokenizer
from dual_lora import (DualLoRALinear, LoRALinear, apply_adapters, load_adapter, merge_adapters, merged, save_adapter,
                       save_atomically, set_warmup)
from model import GPT, Classifier, load_pretrained

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- Options ---------------------------------------------------------------------------------------------------------

# A method: the layer that apply_adapters puts in, and the options that go to it.
METHODS = {
    "dual_lora": (DualLoRALinear, ("r1", "r2", "alpha", "dropout", "init_std")),
    "lora": (LoRALinear, ("r", "alpha", "dropout")),
    "full": (None, ()),          # every weight
    "linear_probe": (None, ()),  # the head alone
}


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    task: str = option("sarcasm", "a task's name, or a folder with train.jsonl and perhaps validation.jsonl")
    data_dir: str | None = option(None, "folder with GLUE's files, or LLM-Adapters' clone, to read instead of fetching")
    model: str | None = option(None, "minilm, smollm2 (the default on multiple choice), a Hub name or a folder")
    method: str = option("dual_lora", "what is trained", METHODS)
    protocol: str = option("likelihood", "a GPT on multiple choice picks the likeliest answer, or writes one (instruct)",
                           ("likelihood", "instruct"))
    train_on_prompt: bool = option(False, "under instruct: learn the prompt too, as LLM-Adapters does")
    metric: str | None = option(None, "the main one; default the task's", METRICS)
    # adapters
    targets: str = option("q_proj,v_proj", "layers that get an adapter, by the last part of their names")
    r: int = option(8, "rank of LoRA; Dual LoRA takes r1 = r2 = r / 2, at equal parameters")
    r1: int | None = option(None, "rank of Dual LoRA's magnitude group, if not r / 2")
    r2: int | None = option(None, "rank of Dual LoRA's direction group, if not r / 2")
    alpha: float = option(16.0, "scale of dW")
    dropout: float = option(0.0, "on the adapters' input")
    init_std: float | None = option(None, "of Dual LoRA's A, B, C and D at the start; dual_lora.py says how to choose it")
    scale_warmup_steps: int | None = option(None, "steps in which the factor on Dual LoRA's dW grows from 0 to 1; "
                                                  "default 30, in short runs a third of the steps")
    # optimisation
    learning_rate: float | None = option(None, "AdamW's, at its peak")
    lr_warmup_steps: int | None = option(None, "steps in which it grows, by default 6 %%; then it falls to 0")
    batch_size: int = option(32, "examples a step")
    micro_batch_size: int | None = option(None, "examples at once, if not all; dW is built anew for each")
    max_steps: int | None = option(None, "steps; 0 evaluates the model as it is")
    epochs: float | None = option(None, "passes over the training data, instead of max_steps")
    weight_decay: float = option(0.0, "on the head's matrices, and with method full on all; never on adapters")
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
    dtype: str = option("auto", "of the products; auto: bfloat16 on a GPU that computes it",
                        ("auto", "float32", "bfloat16"))
    weights: str = option("float32", "of the frozen weights", ("float32", "bfloat16"))
    out_dir: str | None = option(None, "the run's folder; default out/TASK-METHOD")
    resume: bool = option(False, "go on from the folder's checkpoint, if it has one")
    overwrite: bool = option(False, "start anew in a folder that holds another run; its files stay until they are replaced")
    predict: str | None = option(None, "train nothing: print what out_dir's run says of each line of this JSONL file")

    def __post_init__(self):
        if self.out_dir is None:
            self.out_dir = f"out/{Path(self.task).resolve().name}-{self.method}"


def parse(arguments):
    """Config from ["--name=value", ...]; ValueError for what is no option or no value of it. --help prints the list."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--name=value ...]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    for f in dataclasses.fields(Config):
        kind = (typing.get_args(f.type) or (f.type,))[0]  # int, of int and of int | None
        convert = {bool: true_or_false, str: os.path.expanduser}.get(kind, kind)  # a shell leaves --out_dir=~/x as it is
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


MAY_BE_ZERO = ("dropout", "scale_warmup_steps", "lr_warmup_steps", "max_steps", "weight_decay", "grad_clip", "seed")


def check(cfg):
    """ValueError for a number out of range, and for options that do nothing or contradict each other."""
    layer = METHODS[cfg.method][0]
    is_dual = layer is not None and issubclass(layer, DualLoRALinear)
    idle = {}  # option: why it does nothing
    if not is_dual:
        idle |= dict.fromkeys(("r1", "r2", "init_std", "scale_warmup_steps"), f"--method={cfg.method}")
    if layer is None:
        idle |= dict.fromkeys(("targets", "r", "alpha", "dropout"), f"--method={cfg.method}")
    if cfg.protocol == "likelihood":
        idle["train_on_prompt"] = "--protocol=likelihood"
    if cfg.predict:
        idle |= dict.fromkeys(set(vars(cfg)) - {"predict", "out_dir", "device", "task", "method"}, "--predict")
    for name, value in vars(cfg).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not (0 < value < math.inf or (value == 0 and name in MAY_BE_ZERO)):
            raise ValueError(f"--{name}={value}: it should be {'at least' if name in MAY_BE_ZERO else 'above'} 0")
        if name in idle and value != getattr(Config, name):
            raise ValueError(f"--{name}={value} does nothing with {idle[name]}")
    if is_dual and cfg.r % 2:
        raise ValueError(f"--r={cfg.r}: Dual LoRA halves it; give an even number, or r1 and r2")
    if cfg.max_steps is not None and cfg.epochs is not None:
        raise ValueError(f"--max_steps={cfg.max_steps} and --epochs={cfg.epochs:g}: give one of them")
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume=true goes on with a run, --overwrite=true starts anew: give one of them")
    if cfg.method == "full" and cfg.weights != "float32":
        raise ValueError(f"--weights={cfg.weights} with --method=full: weights that are trained stay in float32")


# ---- Defaults: what is not set, by kind of model. Each row was measured with one small model. ------------------------

RIGHT_NAMES = {"minilm": "all-MiniLM-L6-v2", "smollm2": "SmolLM2-135M-Instruct"}
ENCODERS = dict(init_std=0.05, max_length=128, max_steps=560,
                learning_rate={"dual_lora": 2e-3, "lora": 1e-3, "full": 5e-5, "linear_probe": 2e-2})
GPTS = dict(init_std=0.02, max_length=256, max_steps=200,
            learning_rate={"dual_lora": 4e-3, "lora": 2e-3, "full": 2e-4, "linear_probe": 5e-3})
NEW_TOKENS = 32  # of a written answer; LLM-Adapters' number


def fill(cfg, is_gpt, longest, n_train):
    """cfg with every option set. longest: how many tokens the model takes."""
    source, row = ("SmolLM2-135M-Instruct", GPTS) if is_gpt else ("all-MiniLM-L6-v2", ENCODERS)
    rates = row["learning_rate"]
    row = row | {"learning_rate": rates.get(cfg.method, rates["lora"]), "max_length": min(row["max_length"], longest)}
    if cfg.epochs is not None:
        row["max_steps"] = max(1, round(cfg.epochs * max(1, n_train // cfg.batch_size)))
    unset = {name: value for name, value in row.items() if getattr(cfg, name) is None}
    if unset:
        print(f"defaults, measured on {source} (another model may want another learning rate): "
              + ", ".join(f"{name} {value:g}" for name, value in unset.items()))
    cfg = replace(cfg, **unset, epochs=None, r1=cfg.r1 or cfg.r // 2, r2=cfg.r2 or cfg.r // 2)
    if cfg.lr_warmup_steps is None:
        cfg.lr_warmup_steps = round(0.06 * cfg.max_steps)
    if cfg.scale_warmup_steps is None:  # a trial of 20 steps should see dW at its full size
        cfg.scale_warmup_steps = min(30, max(1, cfg.max_steps // 3))
    elif cfg.scale_warmup_steps > cfg.max_steps:
        raise ValueError(f"--scale_warmup_steps={cfg.scale_warmup_steps}: the run ends before, after {cfg.max_steps}")
    if cfg.max_length > longest:
        raise ValueError(f"--max_length={cfg.max_length}: this model takes at most {longest} tokens")
    return cfg


# ---- Model -----------------------------------------------------------------------------------------------------------


def build(cfg, task, adapter=None):
    """(cfg with every option set, tokenizer, model, encode): encode turns examples into rows of ids.

    The model has a head where the task needs one, and new adapters, or those of the file `adapter`. All else is frozen.
    """
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind in kinds if kinds[kind]]
    cfg = replace(cfg, device=there[0] if cfg.device == "auto" else cfg.device,
                  model=cfg.model or ("smollm2" if task.kind == "multiple_choice" else "minilm"))
    if cfg.device.partition(":")[0] not in there:
        raise ValueError(f"--device={cfg.device}: this machine has {', '.join(there)}")
    if cfg.dtype == "auto":  # from compute capability 8 on; older cards, a T4 too, only emulate bfloat16
        fast = cfg.device.startswith("cuda") and torch.cuda.get_device_capability(cfg.device)[0] >= 8
        cfg.dtype = "bfloat16" if fast else "float32"
    # In bfloat16 a CPU's fused attention takes ten times as long as the plain one for its backward pass.
    torch.backends.cuda.enable_flash_sdp(cfg.device != "cpu")  # despite its name it is the CPU's switch too

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
    if adapter is not None:
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
    return cfg, tokenizer, model.train(), encode


def compile_training(model):
    """torch.compile for each block, in training: all share one graph. Evaluation has other shapes, merged weights."""
    def choose(block, plain, compiled, *args, **kwargs):
        return (compiled if block.training else plain)(*args, **kwargs)

    for block in getattr(model, "backbone", model).layers:
        block.forward = partial(choose, block, block.forward, torch.compile(block.forward, dynamic=True))


# ---- Loss and evaluation. A batch is a list of examples. An example has one row of ids, or one for each choice. ------


def batch_loss(model, kind, batch, pad, device):
    """Two tensors: the summed loss of a batch, and how many of its targets were right.

    A target is an example, or for a GPT on multiple choice a token of the right answer.
    """
    if not isinstance(model, Classifier):
        idx, _, is_answer = collate([example.rows[example.label] for example in batch], pad, device)
        logprobs, likeliest = model.answer_logprobs(idx, is_answer)
        return -logprobs.sum(), likeliest.sum()
    labels = torch.tensor([example.label for example in batch], device=device)
    logits = model(*collate([row for example in batch for row in example.rows], pad, device)).float()
    if kind == "regression":
        return F.mse_loss(logits[:, 0], labels.float(), reduction="sum"), torch.zeros((), device=device)
    if kind == "multiple_choice":
        logits = by_choice(logits[:, 0], batch)  # (examples, choices)
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()


@torch.no_grad()
def score(model, examples, pad, device):
    """A tensor for each example: the score of every class, of every choice, or the number itself."""
    rows = [row for example in examples for row in example.rows]
    scores = [None] * len(rows)
    for chosen in batches_by_length([len(row.ids) for row in rows]):
        idx, mask, second = collate([rows[i] for i in chosen], pad, device)
        if isinstance(model, Classifier):
            found = model(idx, mask, second).float().cpu()  # (rows, classes)
        else:  # the log-probability of the whole answer
            parts = model.answer_logprobs(idx, second)[0].split(second.sum(1).tolist())
            found = torch.stack([part.sum() for part in parts])[:, None].cpu()  # (rows, 1)
        for i, row_scores in zip(chosen, found):
            scores[i] = row_scores
    of_row = iter(scores)
    return [torch.cat([next(of_row) for _ in example.rows]) for example in examples]


@torch.no_grad()
def write_answers(model, task, examples, tokenizer, device):
    """What the model writes after each prompt, read as one of the answers' names; None where there is none in it."""
    answers = [None] * len(examples)
    for chosen in batches_by_length([len(example.prompt) + NEW_TOKENS for example in examples]):
        idx, mask = collate_left([examples[i].prompt for i in chosen], tokenizer.pad, device)
        for i, ids in zip(chosen, model.generate(idx, mask, NEW_TOKENS, tokenizer.eos).tolist()):
            ids = ids[:ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
            answers[i] = instruct.extract(examples[i].set or task.name, tokenizer.decode(ids))
    return answers


def evaluate(model, task, examples, tokenizer, device):
    """{metric: value}. Inside `merged` the layers are plain: dW is built once, not for every batch and written token."""
    model.eval()
    with merged(model):
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


# ---- The run's folder: checkpoint.pt while a run is unfinished, metrics.jsonl and adapter.pt once it is finished -----


@contextlib.contextmanager
def claim(folder, settings, cfg):
    """Keep other runs out of `folder` while the block lasts, and yield what earlier_run finds there."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:  # the system lets go of the lock when the process ends, even by a kill
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{folder}: another run is at work there; give this one another --out_dir") from None
            except OSError:
                pass  # a file system without locks
        yield earlier_run(folder, settings, cfg)
    finally:
        if fcntl:
            os.close(handle)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty


def earlier_run(folder, settings, cfg):
    """With --resume the checkpoint to go on from, or the last line of a finished run; {} to start anew.

    ValueError where a new run would replace the files of an earlier one, and nobody asked for that.
    """
    path = folder / "checkpoint.pt"
    if cfg.overwrite or not (path.exists() or (folder / "metrics.jsonl").exists()):
        return {}
    if not path.exists():
        state = finished_run(folder)
    elif not cfg.resume:
        raise ValueError(f"{folder} holds an unfinished run: --resume=true goes on with it, --overwrite=true starts anew")
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises half a dozen kinds for a file cut short
            raise ValueError(f"{path} is cut short, or no checkpoint of train.py: {type(error).__name__}") from None
    other = [name for name, value in settings.items() if state["settings"].get(name) != value]
    if cfg.resume and "max_steps" in other:
        raise ValueError(f"{folder} holds a run of {state['settings']['max_steps']} steps, at whose end its learning "
                         f"rate is 0: it cannot be made longer; start anew, with --overwrite=true or another --out_dir")
    if other:
        raise ValueError(f"{folder} holds a run with another {', '.join(other)}: "
                         f"--overwrite=true replaces it, another --out_dir keeps it")
    return state if cfg.resume else {}  # the same run once more ends in the same files


def finished_run(folder):
    """The last line of the finished run in `folder`, as a dict."""
    try:
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        raise ValueError(f"{folder} holds no finished run (no metrics.jsonl that can be read)") from None


# ---- Training --------------------------------------------------------------------------------------------------------


def train(cfg):
    """One run. Returns the last line of metrics.jsonl as a dict."""
    task = load_task(cfg.task, cfg.data_dir, cfg.metric, cfg.held_out)
    task.validation = first_of_each(task.validation, cfg.eval_examples)
    print(f"{task.name}: {len(task.train):,} examples to train on, {len(task.validation):,} "
          f"{'held-out ones ' if cfg.held_out else ''}to validate. {task.note}", flush=True)
    cfg, tokenizer, model, encode = build(cfg, task)
    device, folder, has_head = torch.device(cfg.device), Path(cfg.out_dir), isinstance(model, Classifier)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if p.ndim > 1 and "lora_" not in name]
    others = [p for name, p in trained.items() if p.ndim <= 1 or "lora_" in name]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=cfg.learning_rate, fused=True)

    settings = {name: value for name, value in vars(cfg).items()
                if name not in ("out_dir", "resume", "overwrite", "predict")}
    with claim(folder, settings, cfg) as earlier:
        if "final" in earlier:
            print(f"{folder}: this run is finished, {earlier['metric']} {earlier['value']:.4f}")
            return earlier
        step, history, sums = 0, [], torch.zeros(3, device=device)  # summed loss, number right, number of targets
        if earlier:
            step, history, sums = earlier["step"], earlier["history"], earlier["sums"].to(device)
            model.load_state_dict(earlier["parameters"], strict=False)  # strict: the frozen ones are not there
            optimizer.load_state_dict(earlier["optimizer"])

        examples, validation = encode(task.train), encode(task.validation)
        n_cut = sum(example.cut for example in examples + validation)
        n_trained, n_all = sum(p.numel() for p in trained.values()), sum(p.numel() for p in model.parameters())
        options = ", ".join(f"{name} {getattr(cfg, name)}" for name in METHODS[cfg.method][1])
        print(f"{n_cut:,} of {len(examples + validation):,} examples are longer and were cut to {cfg.max_length} tokens\n"
              f"{RIGHT_NAMES.get(cfg.model, cfg.model)} on {device} in {cfg.dtype}; {cfg.method} {options}\n"
              f"{n_trained:,} of {n_all:,} parameters are trained, {100 * n_trained / n_all:.2f} %\n"
              f"{cfg.max_steps} steps of {cfg.batch_size} examples, learning rate {cfg.learning_rate:g}, seed {cfg.seed}"
              + (f"; going on at step {step}" if step else ""), flush=True)

        n_batches = max(1, len(examples) // cfg.batch_size)  # of an epoch
        batches, clock, clock_step = None, time.time(), step
        while True:
            # The factor on dW grows from 0 to 1, so that the first forward pass is the pre-trained model's.
            set_warmup(model, 1.0 if step >= cfg.scale_warmup_steps else step / cfg.scale_warmup_steps)
            if step == cfg.max_steps:
                break
            # The learning rate rises in a straight line to its peak, then falls in one to 0.
            rise, fall = max(1, cfg.lr_warmup_steps), max(1, cfg.max_steps - cfg.lr_warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = min(cfg.learning_rate * (step + 1) / rise,
                                  cfg.learning_rate * (cfg.max_steps - step) / fall)
            if batches is None or step % n_batches == 0:
                batches = epoch_batches(examples, cfg.batch_size, cfg.seed, step // n_batches)
            batch = [examples[i] for i in batches[step % n_batches]]

            torch.manual_seed(cfg.seed * 1_000_003 + step)  # dropout depends on seed and step alone, as the batch does
            right_rows = [] if has_head else [example.rows[example.label] for example in batch]
            n_targets = len(batch) if has_head else sum(len(row.ids) - row.start for row in right_rows)
            for start in range(0, len(batch), cfg.micro_batch_size or len(batch)):
                piece = batch[start:start + (cfg.micro_batch_size or len(batch))]
                with autocast:
                    loss, right = batch_loss(model, task.kind, piece, tokenizer.pad, device)
                (loss / n_targets).backward()  # the mean over the whole batch, however many pieces it comes in
                sums[0] += loss.detach()
                sums[1] += right
            sums[2] += n_targets
            if cfg.grad_clip:
                torch.nn.utils.clip_grad_norm_(trained.values(), cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1

            last = step == cfg.max_steps
            logging, saving = (last or step % interval == 0 for interval in (cfg.log_interval, cfg.checkpoint_interval))
            if (logging or saving) and not sums[0].isfinite():  # not at every step: a GPU would have to be waited for
                raise FloatingPointError(f"the loss is NaN or infinite at step {step}: try a lower --learning_rate")
            if logging:
                total, n_right, n = sums.tolist()
                sums.zero_()
                values = {"loss": total / n}
                if task.kind != "regression":
                    values["accuracy" if has_head else "token_accuracy"] = n_right / n
                history.append({"step": step, **values})
                pace = (time.time() - clock) / (step - clock_step)  # seconds a step
                left = round(pace * (cfg.max_steps - step))
                print(f"step {step}/{cfg.max_steps} | {show(values)} | {cfg.batch_size / pace:,.0f} examples/s | "
                      f"{left // 60}:{left % 60:02d} left", flush=True)
            if cfg.eval_interval and step % cfg.eval_interval == 0 and not last:
                with autocast:
                    values = evaluate(model, task, validation, tokenizer, device)
                history.append({"step": step, "validation": values})
                print(f"step {step}: validation {show(values)}", flush=True)
            if saving:
                save_atomically({"settings": settings, "step": step, "history": history, "sums": sums.cpu(),
                                 "parameters": {name: p.detach() for name, p in trained.items()},
                                 "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
            if logging:
                clock, clock_step = time.time(), step  # evaluations and checkpoints do not count

        with autocast:
            values = evaluate(model, task, validation, tokenizer, device)
        result = {"final": True, "metric": task.metric, "value": values[task.metric], "validation": values,
                  "examples": len(validation), "trainable": n_trained, "task": task.name, "kind": task.kind,
                  "classes": task.classes, "settings": settings}
        history += [{"step": step, "validation": values}, result]
        save_adapter(model, folder / "adapter.pt")
        temporary = folder / f"metrics.jsonl.{os.getpid()}"
        write_jsonl(temporary, history)
        temporary.replace(folder / "metrics.jsonl")
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    print(f"{folder} holds the result: python train.py --predict=texts.jsonl --out_dir={folder}\n"
          f"{task.name}, {cfg.method}: {task.metric} {values[task.metric]:.4f} at the last step, "
          f"on {len(validation):,} examples")
    return result


def show(values):
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())


# ---- Prediction ------------------------------------------------------------------------------------------------------


def load(folder, device="auto"):
    """The finished run in `folder`, as a function from a list of examples to a list of dicts.

        predict = train.load("out/sarcasm-dual_lora")
        predict(["Area man wins"])          # [{"label": "sarcastic", "probability": 0.97}]

    An example is a text, a pair of texts, or a dict as in the training data, with or without its label. The label of
    multiple choice is the index of the choice. Regression has a label alone, and so has what --protocol=instruct writes.
    """
    folder = Path(folder).expanduser()
    run = finished_run(folder)
    task = Task(run["task"], run["kind"], run["classes"], run["metric"], [], [])
    cfg = Config(**run["settings"] | {"device": device, "compile": False})
    cfg, tokenizer, model, encode = build(cfg, task, folder / "adapter.pt")
    model, device = merge_adapters(model).eval(), torch.device(cfg.device)
    needed = {"multiple_choice": "choices"}.get(task.kind, "text_a")
    needed = "instruction" if cfg.protocol == "instruct" else needed

    def predict(examples):
        dicts = [{"text_a": e} if isinstance(e, str) else e if isinstance(e, dict) else dict(zip(("text_a", "text_b"), e))
                 for e in examples]
        for example in dicts:
            if needed not in example:
                raise ValueError(f'{task.name} needs examples with "{needed}", and this is one: {json.dumps(example)[:80]}')
        encoded = encode(dicts)
        with torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            if cfg.protocol == "instruct":
                return [{"label": answer} for answer in write_answers(model, task, encoded, tokenizer, device)]
            scores = score(model, encoded, tokenizer.pad, device)
        if task.kind == "regression":
            return [{"label": s.item()} for s in scores]
        best = [s.argmax().item() for s in scores]
        return [{"label": task.classes[i] if task.classes else i, "probability": s.softmax(0)[i].item()}
                for i, s in zip(best, scores)]

    return predict


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
