"""Fine-tune a published encoder or GPT with Dual LoRA, on classification or on multiple choice.

    python train.py                                              # MiniLM on headlines, sarcastic or not
    python train.py --task=arc_easy                              # SmolLM2-135M on a commonsense set of the paper
    python train.py --task=path/to/folder --method=lora --r=16   # your own train.jsonl and validation.jsonl
    python train.py --task=stsb --model=microsoft/deberta-v3-base
    python train.py --task=commonsense_170k --model=meta-llama/Meta-Llama-3-8B --protocol=instruct --weights=bfloat16

Every option is a line of Config, --name=value sets it. What is not set comes from the row of PRESETS for the model and
the task. An encoder gets a head on top, as does a GPT on classification. A GPT on multiple choice learns to continue
the question with the right answer, and is scored by the likelihood that it gives to each choice, or under the instruct
protocols by what it writes. out_dir receives metrics.jsonl (the last line is the result), adapter.pt (for
dual_lora.load_adapter) and checkpoint.pt (for --resume=true).
"""
import argparse
import dataclasses
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from data import instruct
from data.batches import batches_by_length, by_choice, collate, collate_left, encode_examples, epoch_batches
from data.download import model_folder
from data.metrics import METRICS, summarise
from data.tasks import GLUE, MIX, first_of_each, load_task
from data.tokenizer import Tokenizer
from dual_lora import (DoRALinear, DualLoRALinear, LoRALinear, apply_adapters, merged, save_adapter, save_atomically,
                       set_warmup)
from model import GPT, Classifier, load_pretrained

# ---- Options ---------------------------------------------------------------------------------------------------------

# A method: the layer that apply_adapters puts in, and the options that it takes.
METHODS = {
    "dual_lora": (DualLoRALinear, ("r1", "r2", "alpha", "dropout", "ste", "init_std")),
    "lora": (LoRALinear, ("r", "alpha", "dropout")),
    "dora": (DoRALinear, ("r", "alpha", "dropout")),
    "full": (None, ()),          # every weight
    "linear_probe": (None, ()),  # the head alone
}


def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    task: str = option("sarcasm", "a task's name, or a folder with train.jsonl and validation.jsonl")
    data_dir: str | None = option(None, "folder with GLUE's files, or LLM-Adapters' clone, to read instead of fetching")
    model: str | None = option(None, "minilm, smollm2 (the default on multiple choice), a Hub name or a folder")
    method: str = option("dual_lora", "what is trained", METHODS)
    protocol: str = option("likelihood", "of a GPT on multiple choice", ("likelihood", "instruct"))
    train_on_prompt: bool = option(False, "under the instruct protocols: learn the prompt too, as LLM-Adapters does")
    metric: str | None = option(None, "the main one; default the task's", METRICS)
    # adapters
    targets: str | None = option(None, "layers that get an adapter, by the last part of their names")
    r: int | None = option(None, "rank of LoRA and DoRA; Dual LoRA takes r1 = r2 = r / 2, at equal parameters")
    r1: int | None = option(None, "rank of Dual LoRA's magnitude group, if not r / 2")
    r2: int | None = option(None, "rank of Dual LoRA's direction group, if not r / 2")
    alpha: float | None = option(None, "scale of dW")
    dropout: float | None = option(None, "on the adapters' input")
    ste: str = option("clip", "the sign's gradient", ("clip", "xnor", "identity"))
    init_std: float | None = option(None, "standard deviation of A, B, C and D at the start")
    scale_warmup_steps: int | None = option(None, "Dual LoRA: steps in which the factor on dW grows to 1")
    # optimisation
    learning_rate: float | None = option(None, "AdamW's, at its peak")
    lr_warmup_steps: int | None = option(None, "steps in which the learning rate grows; then it falls to 0")
    batch_size: int | None = option(None, "examples a step")
    micro_batch_size: int | None = option(None, "examples at once, if not all; dW is built anew for each")
    max_steps: int | None = option(None, "steps; 0 evaluates the model as it is")
    epochs: float | None = option(None, "passes over the training data, instead of max_steps")
    weight_decay: float = option(0.0, "on the head's matrices, and with method full on all; never on adapters")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")
    # data, evaluation, files
    max_length: int | None = option(None, "tokens; longer texts are cut")
    eval_interval: int | None = option(None, "steps between evaluations; the last step has one in any case")
    eval_examples: int | None = option(None, "evaluate on the first so many validation examples of each set")
    held_out: bool = option(False, "validate on held-out training data: tune with this")
    log_interval: int = option(10, "steps between progress lines")
    checkpoint_interval: int = option(50, "steps between checkpoints")
    compile: bool = option(False, "torch.compile the training step: half a minute or more at the start, then faster")
    checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    seed: int = option(0, "for the head, the adapters, the data order and dropout, each apart")
    device: str = option("auto", "auto takes cuda, else mps, else cpu")
    dtype: str = option("auto", "of the products; auto: bfloat16 on CUDA", ("auto", "float32", "bfloat16"))
    weights: str = option("float32", "of the frozen weights", ("float32", "bfloat16"))
    out_dir: str = option("out", "where metrics.jsonl, adapter.pt and checkpoint.pt go")
    resume: bool = option(False, "go on from out_dir/checkpoint.pt, if it is there")


def parse(arguments):
    """Config from ["--name=value", ...]; ValueError for what is no option or no value of it. --help prints the list."""
    parser = argparse.ArgumentParser(
        usage="python train.py [--name=value ...]", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    for f in dataclasses.fields(Config):
        kind = next(kind for kind in (bool, int, float, str) if f.type in (kind, kind | None))
        convert = true_or_false if kind is bool else kind
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


DUAL_ONLY = ("r1", "r2", "ste", "init_std", "scale_warmup_steps")
ADAPTERS_ONLY = ("targets", "r", "alpha", "dropout")
MAY_BE_ZERO = ("dropout", "scale_warmup_steps", "lr_warmup_steps", "max_steps", "weight_decay", "grad_clip", "seed")


def check(cfg):
    """ValueError for a number out of range, and for options that do nothing or contradict each other."""
    for name, value in vars(cfg).items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not (0 < value < math.inf or (value == 0 and name in MAY_BE_ZERO)):
            raise ValueError(f"--{name}={value}: it should be {'at least' if name in MAY_BE_ZERO else 'above'} 0")
    layer = METHODS[cfg.method][0]
    is_dual = layer is not None and issubclass(layer, DualLoRALinear)
    for name in (() if is_dual else DUAL_ONLY) + (ADAPTERS_ONLY if layer is None else ()):
        if getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"--{name}={getattr(cfg, name)} does nothing with --method={cfg.method}")
    if is_dual and (cfg.r or 0) % 2:
        raise ValueError(f"--r={cfg.r}: Dual LoRA halves it; give an even number, or r1 and r2")
    if cfg.max_steps is not None and cfg.epochs is not None:
        raise ValueError(f"--max_steps={cfg.max_steps} and --epochs={cfg.epochs:g}: give one of them")
    if cfg.method == "full" and cfg.weights != "float32":
        raise ValueError(f"--weights={cfg.weights} with --method=full: weights that are trained stay in float32")
    if cfg.train_on_prompt and cfg.protocol == "likelihood":
        raise ValueError("--train_on_prompt=true does nothing with --protocol=likelihood")


# ---- Presets: what is not set, by model family and kind of task. The first row that fits is taken. -------------------

COMMON = dict(tasks=None, targets="q_proj,v_proj", r=8, alpha=16.0, dropout=0.0, init_std=0.02, scale_warmup_steps=30,
              lr_warmup_share=0.06, batch_size=32, eval_interval=250)
PRESETS = [
    COMMON | dict(
        source="LoRA's for RoBERTa base (2106.09685, table 9), rounded; Dual LoRA at LoRA's learning rate, untuned",
        models=("roberta",), tasks=tuple(GLUE), alpha=8.0, batch_size=16, max_length=512, scale_warmup_steps=100,
        learning_rate=dict(dual_lora=5e-4, lora=5e-4, dora=5e-4, full=2e-5, linear_probe=5e-3),
        epochs={"mnli": 30, "sst2": 60, "mrpc": 30, "cola": 80, "qnli": 25, "qqp": 25, "rte": 80, "stsb": 40}),
    COMMON | dict(
        source="AdaLoRA's epochs and batch for DeBERTa-v3 base (2303.10512); one learning rate for all tasks, untuned",
        models=("deberta", "deberta-v2"), tasks=tuple(GLUE), max_length=256,
        lr_warmup_share=0.1, scale_warmup_steps=100,
        learning_rate=dict(dual_lora=5e-4, lora=5e-4, dora=5e-4, full=2e-5, linear_probe=5e-3),
        epochs={"mnli": 7, "sst2": 24, "mrpc": 30, "cola": 25, "qnli": 5, "qqp": 5, "rte": 50, "stsb": 25}),
    COMMON | dict(
        source="DoRA's for LLaMA-7B (2402.09353), which the paper takes over; Dual LoRA at DoRA's learning rate",
        models=("llama",), tasks=(MIX,),
        targets="q_proj,k_proj,v_proj,up_proj,down_proj", r=32, alpha=64.0, dropout=0.05, batch_size=16,
        max_length=256, epochs=3, lr_warmup_steps=100, scale_warmup_steps=100, eval_interval=100_000,
        learning_rate=dict(dual_lora=2e-4, lora=3e-4, dora=2e-4, full=2e-5, linear_probe=1e-3)),
    COMMON | dict(
        source="ours for MiniLM: rates by the table in tests/evidence/README.md (DoRA LoRA's, linear_probe's older)",
        models=("bert", "roberta", "deberta", "deberta-v2"), init_std=0.05,
        max_length=128, max_steps=560, eval_interval=560,
        learning_rate=dict(dual_lora=2e-3, lora=1e-3, dora=1e-3, full=5e-5, linear_probe=2e-2)),
    COMMON | dict(
        source="ours for SmolLM2: rates by the table in tests/evidence/README.md (DoRA LoRA's, the last two older)",
        models=("gpt2", "llama"), max_length=256, max_steps=200,
        learning_rate=dict(dual_lora=4e-3, lora=2e-3, dora=2e-3, full=2e-4, linear_probe=5e-3)),
]


def find_preset(model_type, task):
    for preset in PRESETS:
        if model_type in preset["models"] and (preset["tasks"] is None or task.name in preset["tasks"]):
            return preset


def complete(cfg, preset, task, positions):
    """cfg with every option set. `positions` is how many tokens the model can take."""
    values = {name: preset.get(name) for name in Config.__dataclass_fields__}
    values.update({name: value for name, value in dataclasses.asdict(cfg).items() if value is not None})
    epochs, values["epochs"] = values["epochs"], None  # they become max_steps
    epochs = epochs[task.name] if isinstance(epochs, dict) else epochs
    if epochs and cfg.max_steps is None:
        values["max_steps"] = max(1, round(epochs * max(1, len(task.train) // values["batch_size"])))
    steps = values["max_steps"]
    if cfg.learning_rate is None:
        values["learning_rate"] = preset["learning_rate"].get(cfg.method, preset["learning_rate"]["lora"])
    if cfg.lr_warmup_steps is None:  # a trial of 20 steps should see the full rate, and dW at its full size
        warmup = preset.get("lr_warmup_steps", round(preset["lr_warmup_share"] * steps))
        values["lr_warmup_steps"] = min(warmup, steps // 3)
    if cfg.scale_warmup_steps is None:
        values["scale_warmup_steps"] = min(preset["scale_warmup_steps"], max(1, steps // 3))
    elif cfg.scale_warmup_steps > steps:
        raise ValueError(f"--scale_warmup_steps={cfg.scale_warmup_steps}: the run ends before, after {steps} steps")
    if cfg.max_length is None:
        values["max_length"] = min(preset["max_length"], positions)
    elif cfg.max_length > positions:
        raise ValueError(f"--max_length={cfg.max_length}: this model takes at most {positions} tokens")
    values["r1"], values["r2"] = cfg.r1 or values["r"] // 2, cfg.r2 or values["r"] // 2
    return Config(**values)


# ---- Model -----------------------------------------------------------------------------------------------------------

NEW_TOKENS = 32  # of a written answer; LLM-Adapters' number


def pick_device(name):
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind in kinds if kinds[kind]]
    if name != "auto" and name.partition(":")[0] not in there:
        raise ValueError(f"--device={name}: this machine has {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def prepare(model, cfg, task, device):
    """The pre-trained model with the head and the adapters that task and method want, all else frozen."""
    if not (isinstance(model, GPT) and task.kind == "multiple_choice"):
        torch.manual_seed(cfg.seed)
        model = Classifier(model, task.n_outputs).to(device)
    elif cfg.method == "linear_probe":
        raise ValueError("--method=linear_probe trains a head, and a GPT on multiple choice has none")
    model.requires_grad_(cfg.method == "full")
    layer, names = METHODS[cfg.method]
    if layer is not None:
        torch.manual_seed(cfg.seed + 1)
        targets = [target.strip() for target in cfg.targets.split(",")]
        apply_adapters(model, targets, layer, **{name: getattr(cfg, name) for name in names})
    if isinstance(model, Classifier):
        model.head.requires_grad_(True)
    return model.train()


def compile_training(model):
    """torch.compile for each block, in training: all share one graph. Evaluation has other shapes and merged layers."""
    for block in getattr(model, "backbone", model).layers:
        block.forward = compiled_in_training(block)


def compiled_in_training(block):
    plain, compiled = block.forward, torch.compile(block.forward, dynamic=True)

    def forward(*args, **kwargs):
        return (compiled if block.training else plain)(*args, **kwargs)

    return forward


def make_optimizer(model, cfg):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and "lora_" not in name]
    others = [p for name, p in named if p.ndim <= 1 or "lora_" in name]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=cfg.learning_rate, fused=True)


# ---- Loss and evaluation. A batch is a list of examples, and an example has one row of ids, or one for each choice. --


def answer_logprobs(model, rows, pad, device):
    """Log-probability of every answer token, row after row, and whether it is the likeliest: two tensors (n,)."""
    idx, _, is_answer = collate(rows, pad, device)  # padded on the right, where a causal model does not look
    return model.answer_logprobs(idx, is_answer)


def training_rows(model, batch):
    """The rows that a batch is learnt from: a GPT on multiple choice sees the right answer, a head all choices."""
    if isinstance(model, Classifier):
        return [row for example in batch for row in example.rows]
    return [example.rows[example.label] for example in batch]


def count_targets(model, batch):
    """What the loss is the mean over: answer tokens for a GPT on multiple choice, else examples."""
    if isinstance(model, Classifier):
        return len(batch)
    return sum(len(ids) - start for ids, start in training_rows(model, batch))


def loss_and_right(model, task, batch, pad, device):
    """Summed loss of a batch and how many targets were right, two tensors."""
    rows = training_rows(model, batch)
    if not isinstance(model, Classifier):
        logprobs, right = answer_logprobs(model, rows, pad, device)
        return -logprobs.sum(), right.sum()
    logits = model(*collate(rows, pad, device)).float()  # (rows, classes)
    labels = torch.tensor([example.label for example in batch], device=device)
    if task.kind == "regression":
        return F.mse_loss(logits[:, 0], labels.float(), reduction="sum"), torch.zeros((), device=device)
    if task.kind == "multiple_choice":
        logits = by_choice(logits[:, 0], batch)  # (examples, choices)
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(1) == labels).sum()


def predict(model, task, examples, tokenizer, device):
    """{name: one prediction an example}: "main"; for a GPT on multiple choice "per_byte" too."""
    pad = tokenizer.pad
    rows = [row for example in examples for row in example.rows]
    columns = task.n_outputs
    scores = torch.empty(len(rows), columns)
    for chosen in batches_by_length([len(ids) for ids, _ in rows]):
        batch = [rows[i] for i in chosen]
        if isinstance(model, Classifier):
            scores[chosen] = model(*collate(batch, pad, device)).float().cpu()
        else:
            answers = answer_logprobs(model, batch, pad, device)[0].split([len(ids) - start for ids, start in batch])
            scores[chosen, 0] = torch.stack([answer.sum() for answer in answers]).cpu()
    if task.kind != "multiple_choice":
        return {"main": (scores[:, 0] if columns == 1 else scores.argmax(1)).tolist()}
    predictions = {"main": by_choice(scores[:, 0], examples).argmax(1).tolist()}
    if not isinstance(model, Classifier):  # by bytes too: a long answer is improbable, however right
        n_bytes = torch.tensor([n for example in examples for n in example.n_bytes])
        predictions["per_byte"] = by_choice(scores[:, 0] / n_bytes, examples).argmax(1).tolist()
    return predictions


def predict_written(model, task, examples, tokenizer, device):
    """The same by what the model writes. "main": 1 where it is right; "failed": 1 where the text holds no answer."""
    found = [None] * len(examples)
    for chosen in batches_by_length([len(example.prompt) + NEW_TOKENS for example in examples]):
        idx, mask = collate_left([examples[i].prompt for i in chosen], tokenizer.pad, device)
        for i, ids in zip(chosen, model.generate(idx, mask, NEW_TOKENS, tokenizer.eos).tolist()):
            ids = ids[:ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
            found[i] = instruct.extract(examples[i].set or task.name, tokenizer.decode(ids))
    return {"main": [int(answer == example.answer) for answer, example in zip(found, examples)],
            "failed": [int(answer is None) for answer in found]}


# ---- The run ---------------------------------------------------------------------------------------------------------


def learning_rate(cfg, step):
    """At `step` (from 0): linear up to the peak, then linear down to 0."""
    if step < cfg.lr_warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.lr_warmup_steps
    return cfg.learning_rate * (cfg.max_steps - step) / (cfg.max_steps - cfg.lr_warmup_steps)


def scale_factor(cfg, step):
    """The factor on dW at `step`: 0 in the very first forward pass, which is then the pre-trained model's."""
    return min(1.0, step / cfg.scale_warmup_steps) if cfg.scale_warmup_steps else 1.0


class Run:
    """The state of a run, which is what a checkpoint holds."""

    def __init__(self, cfg, model, optimizer, device):
        self.cfg, self.model, self.optimizer = cfg, model, optimizer
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.step, self.history = 0, []
        self.sums = torch.zeros(3, device=device)  # loss, number right, number of targets
        self.folder = Path(cfg.out_dir)
        self.settings = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ("out_dir", "resume")}

    def start(self):
        """An empty out_dir, or with --resume=true what its checkpoint holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.cfg.resume and (self.folder / "checkpoint.pt").exists():
            self.load(self.folder / "checkpoint.pt")
        else:
            for name in ("checkpoint.pt", "adapter.pt"):  # an earlier run's
                (self.folder / name).unlink(missing_ok=True)
        (self.folder / "metrics.jsonl").write_text("".join(self.history))
        self.tokens, self.clock, self.clock_step = 0, time.time(), self.step  # since the last progress line

    def record(self, **values):
        """Add a line to metrics.jsonl. There is no clock in it: the same run writes the same file."""
        self.history.append(json.dumps(values) + "\n")
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(self.history[-1])

    def save(self):
        state = {"settings": self.settings, "step": self.step, "history": self.history, "sums": self.sums.cpu(),
                 "parameters": {name: p.detach() for name, p in self.parameters.items()},
                 "optimizer": self.optimizer.state_dict()}
        save_atomically(state, self.folder / "checkpoint.pt")

    def load(self, path):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            other = [name for name, value in self.settings.items() if state["settings"][name] != value]
        except Exception as error:  # torch raises half a dozen kinds for a file cut short
            raise ValueError(f"{path} is cut short, or no checkpoint of train.py: {type(error).__name__}") from None
        if other:
            raise ValueError(f"{path} is of a run with another {', '.join(other)}: use its options, or do not resume")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.history, self.sums = state["step"], state["history"], state["sums"].to(self.sums.device)


def training_step(run, task, batch, pad, autocast):
    """One step of AdamW. The loss is the mean over the whole batch's targets, however many pieces it comes in."""
    cfg, device = run.cfg, run.sums.device
    torch.manual_seed(cfg.seed * 1_000_003 + run.step)  # dropout is of seed and step alone, as the batches are
    set_warmup(run.model, scale_factor(cfg, run.step))
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(cfg, run.step)
    n_targets, size = count_targets(run.model, batch), cfg.micro_batch_size or len(batch)
    for start in range(0, len(batch), size):
        with autocast:
            loss, right = loss_and_right(run.model, task, batch[start:start + size], pad, device)
        (loss / n_targets).backward()
        run.sums[0] += loss.detach()
        run.sums[1] += right
    run.sums[2] += n_targets
    run.tokens += sum(len(ids) for ids, _ in training_rows(run.model, batch))
    if cfg.grad_clip:
        torch.nn.utils.clip_grad_norm_(run.parameters.values(), cfg.grad_clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1


def train(cfg):
    """One run. Returns the last line of metrics.jsonl as a dict."""
    device = pick_device(cfg.device)
    bfloat16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)
    # In bfloat16 a CPU's fused attention takes ten times as long as the plain one for its backward pass. The switch is
    # the process's, and governs the CPU too.
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")

    task = load_task(cfg.task, cfg.data_dir, cfg.metric, cfg.held_out)
    task = dataclasses.replace(task, validation=first_of_each(task.validation, cfg.eval_examples))
    cfg = dataclasses.replace(cfg, model=cfg.model or ("smollm2" if task.kind == "multiple_choice" else "minilm"))
    folder = model_folder(cfg.model)
    tokenizer = Tokenizer(folder)
    model = load_pretrained(folder, getattr(torch, cfg.weights), device)
    tokenizer.check(model.embed.num_embeddings, not isinstance(model, GPT))
    is_gpt, generates = isinstance(model, GPT), cfg.protocol != "likelihood"
    if generates and not (is_gpt and task.kind == "multiple_choice"):
        raise ValueError(f"--protocol={cfg.protocol} is for a GPT on multiple choice, not {cfg.model} on {task.name}")
    preset = find_preset(model.family, task)
    cfg = complete(cfg, preset, task, model.max_length - NEW_TOKENS * generates)
    model.gradient_checkpointing = cfg.checkpointing
    model = prepare(model, cfg, task, device)
    if cfg.compile:
        compile_training(model)

    def encode(examples):
        return encode_examples(examples, tokenizer, is_gpt, cfg.max_length, cfg.protocol, cfg.train_on_prompt)

    examples, validation = encode(task.train), encode(task.validation)
    run = Run(cfg, model, make_optimizer(model, cfg), device)
    run.start()
    describe(run, task, bfloat16, preset)

    pad, n_batches = tokenizer.pad, max(1, len(examples) // cfg.batch_size)
    batches = None
    while run.step < cfg.max_steps:
        if batches is None or run.step % n_batches == 0:
            batches = epoch_batches(examples, cfg.batch_size, cfg.seed, run.step // n_batches)
        batch = [examples[i] for i in batches[run.step % n_batches]]
        training_step(run, task, batch, pad, autocast)

        last = run.step == cfg.max_steps
        logging = last or run.step % cfg.log_interval == 0
        evaluating = last or run.step % cfg.eval_interval == 0
        saving = last or run.step % cfg.checkpoint_interval == 0
        if (logging or evaluating or saving) and not run.sums[0].isfinite():  # reading it waits for the GPU
            raise FloatingPointError(f"the loss is NaN or infinite at step {run.step}: try a lower --learning_rate")
        if logging:
            report_progress(run, task)
        if evaluating:
            evaluate(run, task, validation, tokenizer, autocast)
        if saving:
            run.save()
    if cfg.max_steps == 0:
        evaluate(run, task, validation, tokenizer, autocast)
    return finish(run, task, validation)


def describe(run, task, bfloat16, preset):
    cfg, model = run.cfg, run.model
    trained, total = sum(p.numel() for p in run.parameters.values()), sum(p.numel() for p in model.parameters())
    options = ", ".join(f"{name} {getattr(cfg, name)}" for name in METHODS[cfg.method][1])
    print(f"{task.name}: {len(task.train):,} examples to train on, {len(task.validation):,} "
          f"{'held-out ones ' if cfg.held_out else ''}to validate. {task.note}")
    print(f"{cfg.model} on {run.sums.device} in {'bfloat16' if bfloat16 else 'float32'}; {cfg.method} {options}")
    print(f"{cfg.max_steps} steps of {cfg.batch_size}, learning rate {cfg.learning_rate:g}, seed {cfg.seed}; "
          f"what was not set: {preset['source']}")
    print(f"{trained:,} of {total:,} parameters are trained, {100 * trained / total:.2f} %"
          + (f"; going on at step {run.step}" if run.step else ""), flush=True)


def report_progress(run, task):
    loss, right, n = run.sums.tolist()
    run.sums.zero_()
    values = {"loss": loss / n}
    if task.kind != "regression":  # a GPT on multiple choice counts tokens of the answers
        values["accuracy" if isinstance(run.model, Classifier) else "token_accuracy"] = right / n
    run.record(step=run.step, **values)
    seconds, steps = max(time.time() - run.clock, 1e-9), run.step - run.clock_step
    left = round(seconds / steps * (run.cfg.max_steps - run.step))
    print(f"step {run.step}/{run.cfg.max_steps} | {show(values)} | {run.tokens / seconds:,.0f} tokens/s | "
          f"{left // 60}:{left % 60:02d} left", flush=True)
    run.tokens, run.clock, run.clock_step = 0, time.time(), run.step


@torch.no_grad()
def evaluate(run, task, examples, tokenizer, autocast):
    """By plain layers with W0 + dW: unmerged, dW would be built anew for every batch and every written token."""
    began = time.time()
    set_warmup(run.model, scale_factor(run.cfg, run.step))
    run.model.eval()
    prediction = predict if run.cfg.protocol == "likelihood" else predict_written
    with merged(run.model), autocast:
        values = summarise(task, examples, prediction(run.model, task, examples, tokenizer, run.sums.device))
    run.model.train()
    run.record(step=run.step, validation=values)
    print(f"step {run.step}: validation {show(values)}", flush=True)
    run.clock += time.time() - began


def show(values):
    return ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in values.items())


def finish(run, task, examples):
    """Save what was trained, write and print the last line, and return it as a dict."""
    metric, values = task.metric, json.loads(run.history[-1])["validation"]
    result = {"final": True, "metric": metric, "value": values[metric], "validation": values, "examples": len(examples),
              "trainable": sum(p.numel() for p in run.parameters.values()), "settings": run.settings}
    save_adapter(run.model, run.folder / "adapter.pt")
    run.record(**result)
    print(f"{run.folder / 'adapter.pt'} holds what was trained\n"
          f"{task.name}, {run.cfg.method}: {metric} {values[metric]:.4f} at the last step, "
          f"on {len(examples):,} examples")
    return result


def main(arguments):
    cfg = None
    try:
        cfg = parse(arguments)
        train(cfg)
        return 0
    except KeyboardInterrupt:
        message = f"interrupted; --resume=true goes on from the last checkpoint in {cfg.out_dir}"
    except torch.OutOfMemoryError:
        message = "out of GPU memory: try a smaller --micro_batch_size, or --checkpointing=true"
    except (ValueError, OSError, FloatingPointError) as error:
        message = " ".join(str(error).split())
    print(f"train.py: {message}", file=sys.stderr)
    return 1 if cfg else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
