"""What rounding W0 + dW to bfloat16 costs: share of dW lost over training, and the metric with the sum in one product and in two.

    python tests/rounding.py [--seeds=3] [any option of train.py]

float32        weights and products
one product    weights and products in bfloat16, x (W0 + dW)^T: the sum is rounded to bfloat16, and what is too small is lost in it
two products   the same, x W0^T + x dW^T: dW is rounded by itself and loses nothing, for two more large products a step
"lost" is the share of dW's entries, mean over layers, that W0 + dW in bfloat16 does not show; with two products it is not lost to the
model. Differences are to one product, paired by seed.
"""
import contextlib
import dataclasses
import functools
import io
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from data.metrics import paired_t  # noqa: E402
from dual_lora import DualLoRALinear  # noqa: E402


class TwoProducts(DualLoRALinear):
    """With a dropout of next to nothing W0 x and dW x are formed apart, here in evaluation too."""

    def __init__(self, linear, **settings):
        super().__init__(linear, **{**settings, "dropout": 1e-12})

    def forward(self, x):
        was, self.training = self.training, True
        try:
            return super().forward(x)
        finally:
            self.training = was


WAYS = {"float32": ("float32", DualLoRALinear), "one product": ("bfloat16", DualLoRALinear), "two products": ("bfloat16", TwoProducts)}


def run(cfg, dtype, layer, out_dir):
    """(final value, {step: share lost}) of a run."""
    apply = train.apply_adapters
    train.apply_adapters = functools.partial(apply, layer=layer)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = train.train(dataclasses.replace(cfg, dtype=dtype, weights=dtype, out_dir=out_dir))
    finally:
        train.apply_adapters = apply
    reports = {}
    for line in map(json.loads, (Path(out_dir) / "metrics.jsonl").read_text().splitlines()):
        if line.get("layers"):
            step = line["settings"]["max_steps"] if line.get("final") else line["step"]
            reports[step] = statistics.mean(row["lost"] for row in line["layers"].values())
    return result["value"], reports


def main(arguments):
    seeds = next((int(a.removeprefix("--seeds=")) for a in arguments if a.startswith("--seeds=")), 3)
    cfg = train.parse([a for a in arguments if not a.startswith("--seeds=")])
    values, lost = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for way, (dtype, layer) in WAYS.items():
            runs = [run(dataclasses.replace(cfg, seed=cfg.seed + i), dtype, layer, folder) for i in range(seeds)]
            values[way] = [value for value, _ in runs]
            lost[way] = {step: statistics.mean(reports[step] for _, reports in runs) for step in runs[0][1]}
            print(f"{cfg.task}, {way}: {', '.join(f'{value:.4f}' for value in values[way])}", flush=True)
    print("\n| | mean ± sd | difference | 95 % over seeds | lost, % (step) |\n|---|---|---|---|---|")
    for way in WAYS:
        spread = f" ± {statistics.stdev(values[way]):.4f}" if seeds > 1 else ""
        mean, low, high, _ = paired_t([a - b for a, b in zip(values[way], values["one product"])])
        interval = "" if low is None or way == "one product" else f"{low:+.4f} to {high:+.4f}"
        shares = ", ".join(f"{100 * share:.2g} ({step})" for step, share in lost[way].items())
        print(f"| {way} | {statistics.mean(values[way]):.4f}{spread} | {mean:+.4f} | {interval} | {shares} |")
    print(f"\n{torch.__version__}, {torch.get_num_threads()} threads, {cfg.max_steps} steps")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"rounding.py: {error}")
