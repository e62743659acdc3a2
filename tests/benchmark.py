"""Time and memory of Dual LoRA beside full training, LoRA, DoRA and plain autograd: one layer, or whole models.

    python tests/benchmark.py                             # one layer; on a GPU many shapes, token counts and both dtypes
    python tests/benchmark.py --shapes=4096x4096,14336x4096 --tokens=512,2048 --dtype=float32,bfloat16   # shapes: out x in
    python tests/benchmark.py --models=minilm,smollm2     # also roberta-base, gpt2; on a GPU llama3-8b
    python tests/benchmark.py --models=llama3-8b --device=meta     # without a GPU, or memory: nothing runs, dual_lora.training_cost counts

Everything runs in one process, in turn, round after round, so that a busy moment of the machine hits every row; times are medians.

One layer: --rank is r1 = r2; LoRA and DoRA get twice that, the same number of parameters. The limit is the same layer trained in
full: three large products, y, dL/dx and dL/dW, as "three products" takes bare. "peak" is what a round holds at most beyond the
parameters, the input and the gradient of the output; "kept" is what the forward pass keeps for the backward pass beyond them. "on
paper" is what must move over memory of the weight's shape beside the products' own operands: forward reads W0 and writes W,
backward reads G and W0 and writes W. "counted" is what does: the large tensors that each operation reads or writes. On a CPU
blocks that stay in its cache do not count; on a GPU our operators run kernels that cannot be looked into, and it stays blank.

Whole models: tokens per second of forward, backward and AdamW's step; "peak" is parameters, optimizer and what a step holds on
top. All with LoRA's r = 8 (llama3-8b: 32) and r1 = r2 = r / 2, on the same batches without padding and without dropout.
"""
import contextlib
import functools
import gc
import importlib.util
import itertools
import os
import platform
import statistics
import sys
import time
import warnings
from typing import NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch's profiler writes to stderr each time it starts; read once, with torch

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import dual_lora  # noqa: E402
from data.download import model_folder  # noqa: E402
from dual_lora import DoRALinear, DualLoRALinear, LoRALinear, apply_adapters  # noqa: E402
from model import FAMILIES, GPT, Classifier, Encoder, load_pretrained, read_config  # noqa: E402

WARM = 2             # rounds that do not count
CACHE = 2**22        # bytes: what is larger does not stay in a CPU's cache
FEW = 37             # tokens while traffic is counted: a number that no other dimension has, so that its tensors are known by it
TOO_LARGE = "does not fit in memory"


# ---------------------------------------------------------------------------------------------------------------------
# What both parts measure with


def in_turn(steps, rounds):
    """{name: [step(), ...]}, each name once a round; a step that runs out of memory leaves `steps` and has None."""
    results = {name: [] for name in steps}
    for turn in range(WARM + rounds):
        for name in list(steps):
            try:
                result = steps[name]()
            except torch.OutOfMemoryError:
                results[name] = None
                del steps[name]
            else:
                results[name] += [result] if turn >= WARM else []
    return results


def clock(device):
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_extra(step, device):
    """The most bytes that torch's allocator has handed out during step(), beyond those at its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def storage_bytes(tensors):
    """Bytes of the distinct storages under `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def spread(values):
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]


def table(header, rows):
    """Markdown whose columns stand under each other: text to the left, numbers to the right. Rows are (name, cells), or (name, None)
    for what does not fit."""
    lines = [header] + [[name, *(cells or [TOO_LARGE])] for name, cells in rows]
    lines = [line + [""] * (len(header) - len(line)) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines = ["| " + " | ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]) + " |" for line in lines]
    lines.insert(1, "|" + "-" * (widths[0] + 2) + "".join("|" + "-" * (width + 1) + ":" for width in widths[1:]) + "|")
    return "\n".join(lines)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# ---------------------------------------------------------------------------------------------------------------------
# One layer


class PlainAutograd(DualLoRALinear):
    """The formula as the paper prints it, left to autograd."""

    def forward(self, x):
        return F.linear(x, self.weight + self.delta_weight().to(self.weight.dtype), self.bias)


class FirstDraft(DualLoRALinear):
    """The formula as one first types it: the sign by torch.where, its gradient passed through by a detached difference."""

    def forward(self, x):
        DC = self.lora_D @ self.lora_C
        W_d = DC + (torch.where(DC > 0, 1.0, -1.0) - DC).detach()
        dW = self.scaling * F.relu(self.lora_B @ self.lora_A) * W_d
        return F.linear(x, self.weight + dW.to(self.weight.dtype), self.bias)


# Passes over (out, in) beside the products' operands, at the least. With dropout dW stands alone: it is written, G read, dW written.
# DoRA's row norms read W0 once.
PASSES = {"full training": 0, "Dual LoRA": 5, "Dual LoRA, dropout 0.05": 3, "Dual LoRA, plain autograd": 5, "Dual LoRA, first draft": 5,
          "LoRA": 0, "DoRA": 1, "LoRA, peft": 0, "DoRA, peft": 1}


def layers(shape, rank, dtype, device):
    """{row's name: layer of shape (out, in)}, all around the same weight."""
    def linear():
        torch.manual_seed(0)
        return nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype)

    r = dict(r1=rank, r2=rank)
    chosen = {"full training": linear(), "Dual LoRA": DualLoRALinear(linear(), **r),
              "Dual LoRA, dropout 0.05": DualLoRALinear(linear(), dropout=0.05, **r),
              "Dual LoRA, plain autograd": PlainAutograd(linear(), **r), "Dual LoRA, first draft": FirstDraft(linear(), **r),
              "LoRA": LoRALinear(linear(), r=2 * rank), "DoRA": DoRALinear(linear(), r=2 * rank)}
    if importlib.util.find_spec("peft"):
        chosen["LoRA, peft"] = with_peft(nn.Sequential(linear()), ["0"], 2 * rank, dora=False)[0]
        chosen["DoRA, peft"] = with_peft(nn.Sequential(linear()), ["0"], 2 * rank, dora=True)[0]
    return chosen


def with_peft(model, targets, r, dora):
    """The same model, peft's adapters in it, everything else frozen."""
    import peft
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it sets by itself what it warns of, and calls deprecated parts of transformers
        peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=16, target_modules=targets, use_dora=dora))
    return model


def once(layer, x, gradient):
    """Seconds of one forward and of one backward pass."""
    try:
        began = clock(x.device)
        y = layer(x)
        between = clock(x.device)
        y.backward(gradient)
        return between - began, clock(x.device) - between
    finally:
        layer.zero_grad(set_to_none=True)
        x.grad = None


@torch.no_grad()
def three_products(weight, x, gradient):
    """Seconds of y, and of dL/dx and dL/dW, without anything around them."""
    began = clock(x.device)
    y = torch.mm(x, weight.t())
    between = clock(x.device)
    grads = torch.mm(gradient, weight), torch.mm(gradient.t(), x)
    ended = clock(x.device)
    del y, grads  # only now: an autograd layer's are alive for as long
    return between - began, ended - between


def kept(layer, x):
    """The tensors that a forward pass keeps for the backward pass, those of the input and of the parameters left out."""
    tensors = []

    def pack(t):
        tensors.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    known = {t.untyped_storage().data_ptr() for t in [x, *layer.parameters()]}
    return [t for t in tensors if t.untyped_storage().data_ptr() not in known]


# The plain functions behind our operators, which a dispatch mode would take for one operation each.
PLAIN = {op._opoverload: op._init_fn for op in vars(dual_lora).values() if isinstance(op, torch.library.CustomOpDef)}


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write in tensors whose storage is larger than `floor`; operations on tokens, the
    products, are left out. `blind`: something ran on a GPU that cannot be looked into."""

    def __init__(self, floor):
        super().__init__()
        self.floor, self.bytes, self.last, self.blind = floor, 0, None, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in PLAIN and not any(t.is_cuda for t in tensors_in(args)):
            with self:
                return PLAIN[func](*args, **kwargs)
        self.blind = self.blind or func in PLAIN
        result = func(*args, **kwargs)
        read, written = reads_and_writes(func, args, kwargs, result)
        if not any(FEW in t.shape for t in read + written):
            for t in filter(self.large, read):
                rows = t.data_ptr(), size_of(t)
                self.bytes += 0 if rows == self.last and rows[1] <= CACHE else rows[1]  # read twice running: the second time from the cache
                self.last = rows
            self.bytes += sum(map(size_of, filter(self.large, written)))
        return result

    def large(self, t):
        return t.untyped_storage().nbytes() > self.floor


def reads_and_writes(func, args, kwargs, result):
    """The tensors that an operation reads, and those that it writes; in-place operations do both with one, views and empty neither."""
    given, taken = dict(zip((a.name for a in func._schema.arguments), args), **kwargs), tensors_in((args, kwargs))
    changed = [given[a.name] for a in func._schema.arguments if a.alias_info and a.alias_info.is_write and a.name in given]
    # by the memory, since the schema calls `to` a view, which it is where there is nothing to convert
    new = [t for t in tensors_in(result) if not any(t.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in taken)]
    if not (changed or new) or "empty" in func._schema.name:
        return [], []
    overwrites = "out" in given or func._schema.name in ("aten::copy_", "aten::fill_", "aten::zero_")
    return [t for t in taken if not (overwrites and any(t is c for c in changed))], changed + new


def size_of(t):
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())  # an expanded tensor has more numbers than memory


def tensors_in(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def traffic(layer, shape, dtype, device):
    """Bytes over memory of the weight's shape in one forward and backward pass, or None where that cannot be seen."""
    x = torch.randn(FEW, shape[1], device=device, dtype=dtype, requires_grad=True)
    # on a GPU what is large is a part of the weight's shape that no adapter's matrix reaches at the usual ranks: a bit per entry
    counter = Traffic(CACHE if device.type == "cpu" else shape[0] * shape[1] // 8)
    with counter:
        once(layer, x, torch.full((FEW, shape[0]), 1e-3, device=device, dtype=dtype))
    return None if counter.blind else counter.bytes


def measure_layer(shape, tokens, dtype, rank, rounds, device):
    """{row's name: dict of seconds and bytes, or None for what does not fit in memory}."""
    torch.manual_seed(0)
    x = torch.randn(tokens, shape[1], device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, shape[0], device=device, dtype=dtype) / tokens
    chosen = layers(shape, rank, dtype, device)
    steps = {"three products": functools.partial(three_products, chosen["full training"].weight, x, gradient),
             **{name: functools.partial(once, layer, x, gradient) for name, layer in chosen.items()}}
    rows = in_turn(steps, rounds)
    for name, seconds in rows.items():
        if seconds is not None:
            forward, backward = (statistics.median(column) for column in zip(*seconds))
            rows[name] = {"forward": forward, "backward": backward, "total": spread(map(sum, seconds)), "peak": peak_extra(steps[name], device)}
        if seconds is not None and name in chosen:
            rows[name].update(kept=storage_bytes(kept(chosen[name], x)), paper=PASSES[name] * shape[0] * shape[1] * dtype.itemsize,
                              counted=traffic(chosen[name], shape, dtype, device))
    return rows


def layer_table(rows):
    def cells(row):
        median, low, high = (1e3 * seconds for seconds in row["total"])
        ratio = f"{row['total'][0] / full['total'][0]:.2f}" if full else ""
        return [f"{1e3 * row['forward']:.2f}", f"{1e3 * row['backward']:.2f}", f"{median:.2f}", f"{low:.2f} to {high:.2f}", ratio,
                *(f"{row[name] / 1e6:.1f}" if row.get(name) is not None else "" for name in ("peak", "kept", "paper", "counted"))]

    full = rows["full training"]
    return table(["", "ms forward", "backward", "total", "10 to 90 %", "to full", "peak MB", "kept MB", "MB on paper", "counted"],
                 [(name, row and cells(row)) for name, row in rows.items()])


def scaling_table(results):
    """Time per token and per weight: the last column stays the same where time grows with both in proportion."""
    lines = []
    for name, (shape, tokens, dtype) in itertools.product(("full training", "Dual LoRA"), results):
        row, weights = results[shape, tokens, dtype][name], shape[0] * shape[1]
        seconds = row and row["total"][0]
        lines.append((f"{name}, {shape[0]} x {shape[1]}, {tokens} tokens, {short(dtype)}", row and [
            f"{1e6 * seconds / tokens:.2f}", f"{1e9 * seconds / weights:.2f}", f"{1e12 * seconds / tokens / weights:.2f}"]))
    return table(["", "us per token", "ns per weight", "ps per token and weight"], lines)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


class Job(NamedTuple):
    source: object          # a name for data.download, or a config.json for weights drawn at random
    targets: tuple = ("q_proj", "v_proj")
    their_targets: tuple = ("q_proj", "v_proj")  # the same layers by transformers' names
    r: int = 8
    huge: bool = False      # only on a GPU, bfloat16, one method at a time, activations recomputed


LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
JOBS = {
    "minilm": Job("minilm", their_targets=("query", "value")),
    "smollm2": Job("smollm2"),
    "roberta-base": Job({"model_type": "roberta", "vocab_size": 50265, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768,
                         "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1,
                         "layer_norm_eps": 1e-5}, their_targets=("query", "value")),
    # their q, k and v are one layer, so peft's adapter is on all three: the same number of parameters as ours on q and v
    "gpt2": Job({"model_type": "gpt2", "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024},
                their_targets=("c_attn",)),
    "llama3-8b": Job({"model_type": "llama", "vocab_size": 128256, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096,
                      "intermediate_size": 14336, "max_position_embeddings": 8192, "num_key_value_heads": 8, "rope_theta": 500000.0,
                      "tie_word_embeddings": False}, LLAMA_TARGETS, LLAMA_TARGETS, r=32, huge=True),
}
METHODS = {"full training": None, "Dual LoRA": DualLoRALinear, "Dual LoRA, plain autograd": PlainAutograd, "LoRA": LoRALinear, "DoRA": DoRALinear}
THEIRS = {"transformers + peft lora": False, "transformers + peft dora": True}


class Hidden(nn.Module):
    """A transformers encoder as model.Classifier calls one."""

    def __init__(self, theirs):
        super().__init__()
        self.theirs, self.n_embd = theirs, theirs.config.hidden_size

    def forward(self, idx, mask, token_type):
        return self.theirs(idx).last_hidden_state


def family_and_config(job):
    """GPT or Encoder, and its config."""
    if isinstance(job.source, str):
        family, config, _ = read_config(os.path.join(model_folder(job.source), "config.json"))
        return family[0], config
    family = FAMILIES[job.source["model_type"]]
    return family[0], family[1](job.source)


def our_model(job, dtype, device):
    if isinstance(job.source, str):
        return load_pretrained(model_folder(job.source), dtype, device)
    cls, config = family_and_config(job)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # drawn in its dtype: eight billion float32 weights on the way would be too many
    try:
        with torch.device(device):
            return cls(config)
    finally:
        torch.set_default_dtype(before)


def their_model(job, dtype, device):
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # names that older versions need
    auto = transformers.AutoModelForCausalLM if family_and_config(job)[0] is GPT else transformers.AutoModel
    if isinstance(job.source, str):
        model = auto.from_pretrained(model_folder(job.source), dtype=dtype).to(device)
    else:
        with torch.device(device):
            model = auto.from_config(transformers.AutoConfig.for_model(**job.source), dtype=dtype)
    model.config.use_cache = False  # keys and values are not asked for again
    return model if auto is transformers.AutoModelForCausalLM else Hidden(model)


def build(job, method, dtype, device, checkpointing):
    """The model with the method's adapters in it, everything else but a head frozen."""
    torch.manual_seed(0)
    model = their_model(job, dtype, device) if method in THEIRS else our_model(job, dtype, device)
    if checkpointing and method in THEIRS:
        getattr(model, "theirs", model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif checkpointing:
        model.checkpoint = True
    if isinstance(model, (Encoder, Hidden)):
        model = Classifier(model, 2).to(device)
    if method in THEIRS:
        with_peft(model, list(job.their_targets), job.r, THEIRS[method])
    elif METHODS[method]:
        layer = METHODS[method]
        ranks = dict(r1=job.r // 2, r2=job.r // 2) if issubclass(layer, DualLoRALinear) else dict(r=job.r)
        apply_adapters(model, job.targets, layer, **ranks)
    if isinstance(model, Classifier):
        model.head.requires_grad_(True)
    # transformers drops out in training mode, which ours never does; both recompute activations in that mode only
    return model.train(checkpointing)


def loss_of(model, idx, labels):
    """Cross-entropy of the head's two classes, or a GPT's mean loss of the next token."""
    if isinstance(model, Classifier):
        return F.cross_entropy(model(idx).float(), labels)
    if isinstance(model, GPT):
        return model(idx, F.pad(idx[:, 1:], (0, 1), value=-100))[1]
    return model(input_ids=idx, labels=idx).loss


class Training:
    """One method's model, optimizer and batch; called, it takes a step and returns the seconds."""

    def __init__(self, job, method, dtype, device, batch, checkpointing):
        self.model, self.batch, self.device = build(job, method, dtype, device, checkpointing), batch, device
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        # fused: otherwise the step on a GPU holds further tensors of all the parameters' size, and full training is first to go
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, fused=device.type == "cuda")

    def __call__(self):
        try:
            began = clock(self.device)
            loss_of(self.model, *self.batch).backward()
            self.optimizer.step()
            return clock(self.device) - began
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def standing(self):
        """Bytes of the parameters, the buffers and the optimizer's state."""
        state = [t for values in self.optimizer.state.values() for t in values.values()]
        return storage_bytes([*self.model.parameters(), *self.model.buffers(), *state])


def measure_group(job, methods, dtype, rounds, device, size, checkpointing):
    """{method: dict of seconds, bytes and parameters, or None for what does not fit in memory}, the methods in turn."""
    vocabulary = family_and_config(job)[1].vocab_size
    torch.manual_seed(0)
    # ids from 5: RoBERTa takes 1 for padding and counts positions without it
    batch = torch.randint(5, vocabulary, size).to(device), torch.randint(2, size[:1]).to(device)
    steps = {}
    for method in methods:
        with contextlib.suppress(torch.OutOfMemoryError):
            steps[method] = Training(job, method, dtype, device, batch, checkpointing)
    seconds = in_turn(steps, rounds)
    return {method: {"seconds": spread(seconds[method]), "parameters": sum(p.numel() for p in steps[method].trainable),
                     "peak": peak_extra(steps[method], device) + steps[method].standing()} if method in steps else None for method in methods}


def measure_model(job, dtype, rounds, device, size, checkpointing):
    methods = list(METHODS) + (list(THEIRS) if all(map(importlib.util.find_spec, ("peft", "transformers"))) else [])
    rows = {}
    for group in [[method] for method in methods] if job.huge else [methods]:
        rows.update(measure_group(job, group, dtype, rounds, device, size, checkpointing))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def model_table(rows, tokens):
    def cells(row):
        median, low, high = row["seconds"]
        return [f"{tokens / median:,.0f}", f"{tokens / high:,.0f} to {tokens / low:,.0f}", f"{1e3 * median:.1f}",
                f"{median / full['seconds'][0]:.2f}" if full else "", f"{row['peak'] / 1e6:,.0f}", f"{row['parameters']:,}"]

    full = rows["full training"]
    return table(["", "tokens/s", "10 to 90 %", "ms a step", "to full", "peak MB", "trainable"], [(name, row and cells(row)) for name, row in rows.items()])


def count_model(job, dtype, size, checkpointing):
    """Markdown of what training_cost counts for each method, on tensors without memory."""
    lines, device = [], torch.device("meta")
    idx, labels = torch.zeros(size, dtype=torch.long, device=device), torch.zeros(size[0], dtype=torch.long, device=device)
    for method in METHODS:
        model = build(job, method, dtype, device, checkpointing).train()
        cost = dual_lora.training_cost(model, lambda: loss_of(model, idx, labels))
        memory = [cost[name] / 1e9 for name in ("weight_bytes", "training_bytes", "kept_bytes")]
        lines.append((method, [f"{cost['forward_flops'] / 1e12:.3g}", f"{cost['backward_flops'] / 1e12:.3g}", *(f"{part:.3g}" for part in [*memory, sum(memory)]),
                               f"{cost['passes']:,}", f"{cost['pass_bytes'] / 1e9:.3g}"]))
    return table(["", "TFLOP forward", "backward", "GB of weights", "gradients, AdamW", "kept", "sum", "passes over weights", "GB passed"], lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the default on a CPU, some three minutes on two cores, and on a GPU
LAYER_OPTIONS = {"shapes": ("2048x2048", "768x768,4096x4096,14336x4096"), "tokens": ("2048", "512,2048,8192,16384"),
                 "dtype": ("float32", "float32,bfloat16"), "rank": ("8", "8"), "rounds": ("15", "30"), "device": (DEVICE, DEVICE)}
MODEL_OPTIONS = {"models": ("", ""), "batch": ("8x64", "32x128"), "dtype": ("float32", "float32"), "checkpointing": ("false", "false"),
                 "rounds": ("5", "20"), "device": (DEVICE, DEVICE)}
HUGE_OPTIONS = {"batch": "4x512", "dtype": "bfloat16", "checkpointing": "true", "rounds": "5"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parse(arguments):
    """(what was given, the defaults), both {option: text}; one line and the end for what is no option."""
    given = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if "=" in argument)
    known = MODEL_OPTIONS if "models" in given else LAYER_OPTIONS
    for argument in arguments:
        if "=" not in argument or argument.removeprefix("--").split("=")[0] not in known:
            sys.exit(f"{argument!r} is no option here: --name=value with {', '.join(known)}")
    return given, {name: values[given.get("device", DEVICE).startswith("cuda")] for name, values in known.items()}


def numbers(text, separator="x", n=None):
    """The n (or any number of) whole numbers above 0 in `text`."""
    parts = text.split(separator)
    if not all(part.isdecimal() and int(part) for part in parts) or n not in (None, len(parts)):
        sys.exit(f"{text!r}: {n or 'some'} whole numbers with {separator!r} between them were expected")
    return tuple(map(int, parts))


def dtypes(text):
    for name in text.split(","):
        if name not in DTYPES:
            sys.exit(f"--dtype={text}: choose from {', '.join(DTYPES)}")
    return [DTYPES[name] for name in text.split(",")]


def short(dtype):
    return str(dtype).removeprefix("torch.")


def run_layers(own, device):
    results, (rounds,), (rank,) = {}, numbers(own["rounds"], n=1), numbers(own["rank"], n=1)
    shapes = [numbers(shape, n=2) for shape in own["shapes"].split(",")]
    for dtype, shape, tokens in itertools.product(dtypes(own["dtype"]), shapes, numbers(own["tokens"], ",")):
        rows = results[shape, tokens, dtype] = measure_layer(shape, tokens, dtype, rank, rounds, device)
        print(f"\n{shape[0]} x {shape[1]}, {tokens} tokens, {short(dtype)}, r1 = r2 = {rank}, medians over {rounds} rounds\n\n"
              f"{layer_table(rows)}", flush=True)
    if len(results) > 1:
        print(f"\nTime per token and per weight\n\n{scaling_table(results)}")


def run_model(name, own, device):
    job, size, (rounds,), checkpointing = JOBS[name], numbers(own["batch"], n=2), numbers(own["rounds"], n=1), own["checkpointing"] == "true"
    for dtype in dtypes(own["dtype"]):
        counted = device.type == "meta"
        text = count_model(job, dtype, size, checkpointing) if counted else \
            model_table(measure_model(job, dtype, rounds, device, size, checkpointing), size[0] * size[1])
        print(f"\n{name}, batches of {size[0]} x {size[1]} tokens, {short(dtype)}{', checkpointing' if checkpointing else ''}, r = {job.r} on "
              f"{', '.join(job.targets)}, {'counted, not run' if counted else f'medians over {rounds} rounds'}\n\n{text}", flush=True)


def main(arguments):
    given, defaults = parse(arguments)
    device = torch.device(given.get("device", DEVICE))
    names = given["models"].split(",") if "models" in given else []
    for name in names:
        if name not in JOBS:
            sys.exit(f"--models={name}: choose from {', '.join(JOBS)}")
        if JOBS[name].huge and device.type == "cpu":
            sys.exit(f"--models={name}: eight billion weights want a GPU, or --device=meta")
    if device.type == "meta" and not names:
        sys.exit("--device=meta counts whole models: give --models=")
    runs = {name: {**defaults, **(HUGE_OPTIONS if JOBS[name].huge else {}), **given} for name in names}
    kinds = dict.fromkeys(own["dtype"] for own in runs.values() or [{**defaults, **given}])
    print(f"{device_name(device)} ({device.type}), {torch.get_num_threads()} threads, torch {torch.__version__}, {', '.join(kinds)}")
    for name, own in runs.items():
        run_model(name, own, device)
    if not names:
        run_layers({**defaults, **given}, device)


if __name__ == "__main__":
    main(sys.argv[1:])
