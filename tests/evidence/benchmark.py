"""What Dual LoRA costs beside full training, LoRA and DoRA: one layer, or whole models.

    python tests/evidence/benchmark.py                            # a layer of 2048 x 2048 (out x in), 2,048 tokens
    python tests/evidence/benchmark.py --shapes=4096x4096,14336x4096 --tokens=512,8192 --dtype=bfloat16,float32
    python tests/evidence/benchmark.py --models=minilm,smollm2 --batch=16x64 --rank=8
    python tests/evidence/benchmark.py --models=llama3-8b --batch=4x512,16x256 --rank=32 --checkpointing=true

--rank is LoRA's r. Dual LoRA has r1 = r2 = r / 2, the same number of parameters. Methods take turns, round by round, so
that a busy moment of the machine hits them all. Times are medians; a ratio is the median of the ratios of each round,
with its quartiles. A layer's time is forward and backward; a model's is AdamW's step too.

kept       what the forward pass keeps for the backward pass, the input included, weights and adapters left out
peak       on a GPU: the most memory that a step takes; a model's own weights and AdamW's state are in it

Models are trained as train.py trains them: bfloat16 autocast on a GPU, LLaMA's random weights in bfloat16. All adapters
stand on one copy of the frozen weights. `full` comes last, alone, and trains that copy.
"""
import argparse
import copy
import datetime
import importlib.util
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from data.download import model_folder  # noqa: E402
from dual_lora import DualLoRA, LoRA, apply_adapters, in_float32, merged, sign_ste  # noqa: E402
from methods import DoRA  # noqa: E402
from model import GPT, Classifier, GPTConfig, load_pretrained  # noqa: E402
from train import compile_training  # noqa: E402

WARM = 2  # rounds that do not count: compilation, and the allocator's first requests
COMPILED = ", compiled"
HAS_PEFT = importlib.util.find_spec("peft") is not None

# ---- Time and memory -------------------------------------------------------------------------------------------------


def in_turn(steps, rounds):
    """{name: [what step() returned in each round]}; a step that runs out of memory leaves `steps` and has None."""
    results = {name: [] for name in steps}
    for turn in range(WARM + rounds):
        for name in list(steps):
            try:
                value = steps[name]()
            except torch.OutOfMemoryError:
                results[name] = None
                del steps[name]
                continue
            if turn >= WARM:
                results[name].append(value)
    return results


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(step, device):
    """The most that step() holds beyond what was there before it; None on a CPU, whose allocator keeps no count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def storage_bytes(tensors):
    """Bytes of the distinct storages under `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def kept_bytes(forward, parameters):
    """What forward() keeps for the backward pass beside the parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in parameters}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        forward()
    return storage_bytes(t for t in kept if t.untyped_storage().data_ptr() not in own)


def ratio(seconds, reference):
    """Median and quartiles of the ratios of each round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, reference)] * 2, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


# ---- One layer -------------------------------------------------------------------------------------------------------


class PlainAutograd(DualLoRA):
    """The formula left to autograd, as well as it can be written: three matrices of the weight's shape are kept."""

    def forward(self, x, W0, bias=None):
        with in_float32(self.lora_A):
            sW_m = (self.warmup * self.scaling * self.lora_B @ self.lora_A).relu()
            W = (W0 + sW_m * sign_ste(self.lora_D @ self.lora_C)).to(W0.dtype)
        return F.linear(x, W, bias)


def with_peft(model, targets, rank, dora=False):
    """The same model with peft's adapters in float32 and everything else frozen."""
    import peft
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=targets, use_dora=dora), model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        p.data = p.data.float() if "lora_" in name else p.data
    return model


def build_layers(shape, rank, dtype, device):
    """{row: layer of shape (out, in)}"""
    def linear():
        return nn.Linear(shape[1], shape[0], bias=False, device=device, dtype=dtype)

    def adapted(adapter, **settings):
        return apply_adapters(nn.Sequential(linear()), ["0"], adapter, **settings)[0]

    halves, torch_compile = dict(r1=rank // 2, r2=rank // 2), partial(torch.compile, dynamic=True)
    layers = {
        "full": linear(),
        "dual_lora": adapted(DualLoRA, **halves),
        "dual_lora" + COMPILED: torch_compile(adapted(DualLoRA, **halves)),
        "plain autograd": adapted(PlainAutograd, **halves),
        "plain autograd" + COMPILED: torch_compile(adapted(PlainAutograd, **halves)),
        "lora": adapted(LoRA, r=rank),
        "dora": adapted(DoRA, r=rank),
    }
    if HAS_PEFT:
        layers["peft lora"] = with_peft(nn.Sequential(linear()), ["0"], rank)
        layers["peft dora"] = with_peft(nn.Sequential(linear()), ["0"], rank, dora=True)
    return layers


def layer_step(layer, x, gradient):
    """Seconds of one forward and of one backward pass."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    began = clock(x.device)
    y = layer(x)
    between = clock(x.device)
    y.backward(gradient)
    return between - began, clock(x.device) - between


def layer_table(layers, shape, tokens, dtype, rounds, device):
    x = torch.randn(tokens, shape[1], device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, shape[0], device=device, dtype=dtype) / tokens
    steps = {name: partial(layer_step, layer, x, gradient) for name, layer in layers.items()}
    results, rows = in_turn(steps, rounds), []
    full = [sum(pair) for pair in results["full"] or []]
    for name, pairs in results.items():
        if not pairs:
            rows.append([name, "out of memory"])
            continue
        forward, backward, both = *zip(*pairs), [sum(pair) for pair in pairs]
        rows.append([name, *(f"{1e3 * statistics.median(s):.2f}" for s in (forward, backward, both)),
                     ratio(both, full) if full else "",
                     megabytes(kept_bytes(partial(layers[name], x), layers[name].parameters())),
                     megabytes(peak_bytes(steps[name], device))])
    return table(["", "ms forward", "ms backward", "ms", "to full", "kept MB", "peak MB"], rows)


# ---- Whole models ----------------------------------------------------------------------------------------------------

LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]  # the paper's
LLAMA = partial(GPTConfig, learned_positions=False, rms_norm=True, activation="silu", gated=True, attention_bias=False,
                mlp_bias=False, tied=False, n_positions=8192, rope_theta=500000.0)
MODELS = {  # a name that model_folder knows, or a configuration for random weights; targets
    "minilm": ("minilm", ["q_proj", "v_proj"]),
    "smollm2": ("smollm2", LLAMA_TARGETS),
    "llama3-8b": (LLAMA(128256, n_layer=32, n_head=32, n_embd=4096, n_inner=14336, n_kv_head=8), LLAMA_TARGETS),
    "llama-tiny": (LLAMA(2000, n_layer=2, n_head=4, n_embd=256, n_inner=896, n_kv_head=2), LLAMA_TARGETS),
}


def base_model(source, device):
    """The frozen model: published weights in float32, random ones in bfloat16, drawn on the device."""
    if isinstance(source, str):
        model = load_pretrained(model_folder(source), device=device)
        return model if isinstance(model, GPT) else Classifier(model, 2).to(device)
    with torch.device("meta"):
        model = GPT(source).bfloat16()
    model.to_empty(device=device)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else nn.init.ones_(p)
    return model


def build_model(method, base, targets, rank):
    """The method's model: modules of its own around base's weights, with adapters."""
    model = base if method == "full" else copy.deepcopy(base, {id(p): p for p in base.parameters()})
    name = method.removesuffix(COMPILED)
    if name == "full":
        return model.requires_grad_(True).train()
    if name == "dual_lora":
        apply_adapters(model, targets, r1=rank // 2, r2=rank // 2)
    elif name == "peft lora":
        with_peft(model, targets, rank)
    else:
        apply_adapters(model, targets, {"lora": LoRA, "dora": DoRA}[name], r=rank)
    if isinstance(model, Classifier):
        model.head.requires_grad_(True)
    if COMPILED in method:
        compile_training(model)
    return model.train()


def evaluation(training, idx):
    """[seconds to enter `merged`, of a forward pass inside, to leave it, peak of all]: an evaluation's columns."""
    model, times = training.model.eval(), []

    def evaluate():
        began = clock(idx.device)
        with merged(model), torch.no_grad():
            times.append(clock(idx.device) - began)
            training.loss(idx)
            times.append(clock(idx.device) - began)
        times.append(clock(idx.device) - began)

    peak = peak_bytes(evaluate, idx.device)
    evaluate()  # again: a CPU's first time is another
    model.train()
    entered, inside, left = times[-3:]
    return [f"{entered:.2f}", f"{inside - entered:.2f}", f"{left - inside:.2f}",
            megabytes(peak and peak + training.standing_bytes())]


class Training:
    """A model and its optimizer; called with token ids, it takes a step and returns its seconds."""

    def __init__(self, model, causal, checkpointing):
        self.model, self.causal = model, causal
        getattr(model, "backbone", model).gradient_checkpointing = checkpointing
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, fused=True)

    def loss(self, idx):
        with torch.autocast(idx.device.type, torch.bfloat16, enabled=idx.is_cuda):
            if not self.causal:
                return F.cross_entropy(self.model(idx).float(), idx[:, 0] % 2)
            return self.model(idx, idx.roll(-1, dims=1))[1]

    def __call__(self, idx):
        self.optimizer.zero_grad(set_to_none=True)
        began = clock(idx.device)
        self.loss(idx).backward()
        self.optimizer.step()
        return clock(idx.device) - began

    def standing_bytes(self):
        state = [t for values in self.optimizer.state.values() for t in values.values()]
        return storage_bytes([*self.model.parameters(), *state])


def model_tables(name, sizes, rank, checkpointing, rounds, device):
    """{size: table}. One model a method for all sizes, so that what is compiled is compiled once."""
    torch._dynamo.reset()
    source, targets = MODELS[name]
    base = base_model(source, device)
    vocab_size = getattr(base, "backbone", base).config.vocab_size
    methods = ["lora", "lora" + COMPILED, "dora", "dual_lora", "dual_lora" + COMPILED] + ["peft lora"] * HAS_PEFT
    rows, lora = {size: [] for size in sizes}, {}
    for group in (methods, ["full"]):
        models = {method: build_model(method, base, targets, rank) for method in group}
        trainings = {method: Training(model, isinstance(base, GPT), checkpointing) for method, model in models.items()}
        for size in sizes:
            idx, tokens = torch.randint(vocab_size, size, device=device), size[0] * size[1]
            steps = {method: partial(training, idx) for method, training in trainings.items()}
            for method, seconds in in_turn(dict(steps), rounds).items():
                if not seconds:
                    rows[size].append([method, "out of memory"])
                    continue
                training, median = trainings[method], statistics.median(seconds)
                lora.setdefault(size, seconds)
                peak, kept = peak_bytes(steps[method], device), None
                if not checkpointing:
                    kept = kept_bytes(partial(training.loss, idx), training.model.parameters())
                rows[size].append([
                    method, f"{median:.3f}", f"{tokens / median:,.0f}", ratio(seconds, lora[size]),
                    f"{sum(p.numel() for p in training.trainable):,}", megabytes(kept),
                    megabytes(peak and peak + training.standing_bytes()),
                    *(evaluation(training, idx) if method in ("lora", "dual_lora") else [])])
        del models, trainings, steps
    header = ["", "s a step", "tokens/s", "to lora", "trainable", "kept MB", "peak MB", "s into merged", "s inside",
              "s out", "peak MB of it"]
    return {size: table(header, rows[size]) for size in sizes}


# ---- The command -----------------------------------------------------------------------------------------------------


def megabytes(n):
    return "" if n is None else f"{n / 1e6:,.1f}"


def table(header, rows):
    """Markdown, text to the left and numbers to the right."""
    lines = ["| " + " | ".join(row + [""] * (len(header) - len(row))) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]])


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def sizes(text):
    return [tuple(map(int, part.split("x"))) for part in text.split(",")]  # argparse reports a ValueError in one line


def names(text):
    unknown = [name for name in text.split(",") if name not in MODELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(MODELS)}")
    return text.split(",")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=sizes, default="2048x2048")
    parser.add_argument("--tokens", type=sizes, default="2048")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--models", type=names, help=f"instead of a layer: {', '.join(MODELS)}")
    parser.add_argument("--batch", type=sizes, default="16x256", help="of models: sequences x tokens")
    parser.add_argument("--checkpointing", choices=("true", "false"), default="false")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)

    command = " ".join(["python", "tests/evidence/benchmark.py", *arguments])
    print(f"{device_name(device)}; torch {torch.__version__}; {datetime.date.today()}; `{command}`")
    if not HAS_PEFT:
        print("peft is not installed: its rows are left out")
    for name in args.models or []:
        tables = model_tables(name, args.batch, args.rank, args.checkpointing == "true", args.rounds, device)
        for size, text in tables.items():
            print(f"\n{name}, {size[0]} x {size[1]} tokens, r = {args.rank} on {', '.join(MODELS[name][1])}, "
                  f"checkpointing {args.checkpointing}, {args.rounds} rounds\n\n{text}", flush=True)
    for dtype in args.dtype.split(",") if not args.models else []:
        for shape in args.shapes:
            torch._dynamo.reset()
            layers = build_layers(shape, args.rank, getattr(torch, dtype), device)
            for tokens, in args.tokens:
                print(f"\n{shape[0]} x {shape[1]}, {tokens} tokens, {dtype}, r = {args.rank}, {args.rounds} rounds\n",
                      flush=True)
                print(layer_table(layers, shape, tokens, getattr(torch, dtype), args.rounds, device))


if __name__ == "__main__":
    main(sys.argv[1:])
