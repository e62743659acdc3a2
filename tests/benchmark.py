"""Time and memory of forward plus backward for one layer: Dual LoRA beside full training, LoRA, DoRA and plain autograd.

    python tests/benchmark.py [--size=2048] [--tokens=2048] [--rank=8] [--rounds=15] [--device=cpu] [--dtype=float32]

All layers run in one process, in turn, round after round, so that a busy moment of the machine hits each of them; the table gives
medians and the 10th to 90th percentile. `rank` is r1 = r2; LoRA and DoRA get twice that, the same number of parameters. "kept" is what one
forward pass keeps for the backward pass beyond the input and the parameters, "peak" (CUDA) what the round allocates at most.
"""
import os
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from dual_lora import DoRALinear, DualLoRALinear, LoRALinear  # noqa: E402


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


def layers(size, rank, device, dtype):
    def linear():
        torch.manual_seed(0)
        return nn.Linear(size, size, bias=False, device=device, dtype=dtype)

    chosen = {"full training": linear(), "Dual LoRA": DualLoRALinear(linear(), r1=rank, r2=rank),
              "Dual LoRA, plain autograd": PlainAutograd(linear(), r1=rank, r2=rank),
              "Dual LoRA, first draft": FirstDraft(linear(), r1=rank, r2=rank),
              "Dual LoRA, dropout 0.05": DualLoRALinear(linear(), r1=rank, r2=rank, dropout=0.05),
              "LoRA": LoRALinear(linear(), r=2 * rank), "DoRA": DoRALinear(linear(), r=2 * rank)}
    try:
        import peft
    except ImportError:
        return chosen
    for name, dora in (("LoRA, peft", False), ("DoRA, peft", True)):
        config = peft.LoraConfig(r=2 * rank, lora_alpha=16, target_modules=["0"], use_dora=dora)
        chosen[name] = peft.get_peft_model(nn.Sequential(linear()), config).base_model.model[0]
    return chosen


def kept_bytes(layer, x):
    """Bytes of the distinct storages kept for the backward pass, the input's and the parameters' own left out."""
    known = {t.untyped_storage().data_ptr() for t in [x, *layer.parameters()]}
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(size for pointer, size in storages.items() if pointer not in known)


def once(layer, x, gradient):
    """Seconds of one forward and backward pass."""
    cuda = x.device.type == "cuda"
    layer.zero_grad(set_to_none=True)
    x.grad = None
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    layer(x).backward(gradient)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main(arguments):
    options = {"size": "2048", "tokens": "2048", "rank": "8", "rounds": "15", "device": "cpu", "dtype": "float32"}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not equals or name not in options:
            sys.exit(f"{argument!r} is no option: {', '.join(options)}")
        options[name] = value
    size, tokens, rank, rounds = (int(options[name]) for name in ("size", "tokens", "rank", "rounds"))
    device, dtype = torch.device(options["device"]), getattr(torch, options["dtype"])
    torch.manual_seed(0)
    x = torch.randn(tokens, size, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, size, device=device, dtype=dtype) / tokens
    chosen, times = layers(size, rank, device, dtype), {}
    for _ in range(2):
        for layer in chosen.values():
            once(layer, x, gradient)
    for _ in range(rounds):
        for name, layer in chosen.items():
            times.setdefault(name, []).append(1e3 * once(layer, x, gradient))

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    print(f"{size} x {size}, {tokens} tokens, {options['dtype']}, {where}, torch {torch.__version__}, median of {rounds} rounds")
    print(f"{'':28}{'ms':>9}{'10 to 90 %':>18}{'to full':>9}{'kept MB':>9}" + (f"{'peak MB':>9}" if device.type == "cuda" else ""))
    full = statistics.median(times["full training"])
    for name, layer in chosen.items():
        ordered = sorted(times[name])
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        median = statistics.median(ordered)
        line = f"{name:28}{median:9.1f}{f'{low:.1f} to {high:.1f}':>18}{median / full:9.2f}{kept_bytes(layer, x) / 1e6:9.2f}"
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            base = torch.cuda.memory_allocated(device)
            once(layer, x, gradient)
            line += f"{(torch.cuda.max_memory_allocated(device) - base) / 1e6:9.1f}"
        print(line)
    ours = statistics.median(times["Dual LoRA"])
    for other in ("plain autograd", "first draft"):
        print(f"Dual LoRA to {other}: {ours / statistics.median(times[f'Dual LoRA, {other}']):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
