"""How much can an update hold? Random associations in one layer, learnt by heart.

    python tests/evidence/memorise.py                        # the figure
    python tests/evidence/memorise.py --width=256 --lines="LoRA, r = 4;Dual LoRA, 4 + 4" --counts=3,4

W0 is a random square matrix of --width. Each of N random keys gets one of `width` classes at random; the logits of a
key x are (W0 + dW) x. Adam fits dW to all keys at once. There is nothing to generalise: the share of the keys whose
class is recalled in the end says how much dW holds, or at least how much training gets into it.

For each line the learning rate and init_std (for LoRA the rate and alpha) are the best of a grid, by a seed that is
not shown. Every run is a line of --out_dir/runs.jsonl and is not made again.
"""
import argparse
import concurrent.futures
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from compare import commit, table  # noqa: E402
from draw import COLOURS, MARKERS, pyplot, save  # noqa: E402
from dual_lora import DualLoRA, LoRA  # noqa: E402
from methods import LoHa, NoReLU, NoSign  # noqa: E402


class Annealed(DualLoRA):
    """Dual LoRA trained with tanh(beta DC / std(DC)) in the sign's place; asked with the true sign, beta None. It tells
    what dW cannot hold from what the straight-through gradient does not find."""

    beta = None

    def delta_weight(self):
        if self.beta is None:
            return super().delta_weight()
        DC = self.lora_D @ self.lora_C
        return self.scaling * (self.lora_B @ self.lora_A).relu() * torch.tanh(self.beta * DC / DC.std())


ADAPTERS = {"lora": LoRA, "dual_lora": DualLoRA, "annealed": Annealed, "no_sign": NoSign, "no_relu": NoReLU,
            "loha": LoHa}  # no Sign, no ReLU and LoHa start with a dW of Dual LoRA's norm
# label: method, r1 and r2 (LoRA has one rank, their sum), and N, in widths, by which the settings are chosen
LINES = {
    "LoRA, r = 8": ("lora", 4, 4, 6),
    "LoRA, r = 4": ("lora", 2, 2, 3.5),
    "Dual LoRA, 4 + 4": ("dual_lora", 4, 4, 3),
    "Dual LoRA, 8 + 8": ("dual_lora", 8, 8, 5),
    "Dual LoRA, 7 + 1": ("dual_lora", 7, 1, 4),
    "no Sign, 4 + 4": ("no_sign", 4, 4, 5),
    "LoHa, 4 + 4": ("loha", 4, 4, 6),
    "no ReLU, 4 + 4": ("no_relu", 4, 4, 3),
    "Dual LoRA, 4 + 4, annealed sign": ("annealed", 4, 4, 3.5),
}
RATES, STARTS, ALPHAS = (0.016, 0.064, 0.256), (0.03, 0.1, 0.3, 1.0), (4, 16, 64, 256)
GRID_SEED, SEEDS = 1000, (0, 1, 2)


def recall(run):
    """The share of the keys whose class is recalled after training."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # what is learnt has tiny gradients, and denormal numbers are slow
    torch.manual_seed(run["seed"])
    n, width, steps, r1, r2 = (run[name] for name in ("n", "width", "steps", "r1", "r2"))
    W0 = torch.randn(width, width) / math.sqrt(width)
    keys, classes = torch.randn(n, width), torch.randint(width, (n,))
    settings = {"r": r1 + r2} if run["method"] == "lora" else {"r1": r1, "r2": r2, "init_std": run["init_std"]}
    adapter = ADAPTERS[run["method"]](width, width, alpha=run["alpha"], **settings)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=run["rate"], fused=True)
    rise = steps // 20
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = run["rate"] * min((step + 1) / rise, (steps - step) / (steps - rise))
        adapter.beta = 1000 ** min(1, step / (0.7 * steps))  # of the annealed sign: from 1 to 1,000
        loss = F.cross_entropy(keys @ (W0 + adapter.delta_weight()).t(), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapter.beta = None
    with torch.no_grad():
        return ((keys @ (W0 + adapter.delta_weight()).t()).argmax(1) == classes).float().mean().item()


def all_recalled(runs, args):
    """The shares of `runs`, in order. Those that are not in runs.jsonl are made and added."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {key(line): line["recalled"] for line in done}
    todo = [run for run in runs if key(run) not in known]
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool, open(path, "a") as file:
        for run, share in zip(todo, pool.map(recall, todo)):
            known[key(run)] = share
            print(json.dumps({**run, "recalled": share, "commit": commit()}), file=file, flush=True)
    return [known[key(run)] for run in runs]


def key(run):
    return tuple(sorted((name, value) for name, value in run.items() if name not in ("recalled", "commit")))


def best_settings(lines, args):
    """{label: the best run of the grid}"""
    best = {}
    for label, (method, r1, r2, count) in lines.items():
        of_line = dict(method=method, r1=r1, r2=r2, width=args.width, steps=1500, n=round(count * args.width),
                       seed=GRID_SEED)
        choices = [(alpha, None) for alpha in ALPHAS] if method == "lora" else [(args.alpha, std) for std in STARTS]
        runs = [dict(of_line, alpha=alpha, init_std=std, rate=rate) for alpha, std in choices for rate in RATES]
        shares = all_recalled(runs, args)
        best[label] = run = runs[shares.index(max(shares))]
        print(f"{label}: alpha {run['alpha']:g}, init_std {run['init_std']}, rate {run['rate']}: "
              f"{max(shares):.2f} of {run['n']}", flush=True)
    return best


def measure(settings, counts, args):
    """{label: {N: [the share recalled, for each seed]}}, printed as a table too."""
    points = {label: {} for label in settings}
    for label, best in settings.items():
        for n in (round(count * args.width) for count in counts):
            points[label][n] = all_recalled([dict(best, n=n, seed=seed, steps=args.steps) for seed in SEEDS], args)
    rows = [[label, *(f"{statistics.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in of_line.values())]
            for label, of_line in points.items()]
    print(table(["recalled of", *map(str, points[label])], rows), flush=True)
    return points


def draw(points, divided, path):
    """Left the share recalled over N, with the range of the seeds; right over r1, at one N."""
    plt, ((n, _),) = pyplot(), divided["1"].items()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=(2, 1), sharey=True, layout="constrained")
    for i, (label, of_line) in enumerate(points.items()):
        colour, means = [*COLOURS, "#888888", "#8C6D31"][i], [statistics.mean(v) for v in of_line.values()]
        left.plot(list(of_line), means, color=colour, linestyle="-" if i < 5 else "--", marker=f"{MARKERS}*p"[i],
                  markersize=4, linewidth=1.3, label=label)
        left.fill_between(list(of_line), *zip(*((min(v), max(v)) for v in of_line.values())), alpha=0.15, color=colour,
                          linewidth=0)
        if i < 2:
            right.axhline(statistics.mean(of_line[n]), color=colour, linestyle=":", label=label)
    right.plot(list(map(int, divided)), [statistics.mean(of_r1[n]) for of_r1 in divided.values()], marker=MARKERS[2],
               color=COLOURS[2])
    left.set(xlabel="associations to learn", ylabel="share recalled", ylim=(0, 1.03))
    left.legend(fontsize=7, loc="lower left")
    right.set(title=f"Dual LoRA, {n} associations", xlabel="r1, with r1 + r2 = 8; dotted: LoRA, r = 8, 4")
    save(plt, figure, path)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--alpha", type=float, default=16.0, help="of all but LoRA")
    parser.add_argument("--steps", type=int, default=1500, help="of what is shown; settings are chosen at 1,500")
    parser.add_argument("--lines", help="labels of LINES, with ; between them: a table alone")
    parser.add_argument("--counts", default="2.5,3,3.5,4,5,6", help="numbers of associations, in widths")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out_dir", type=Path, default=Path("out/memorise"))
    args = parser.parse_args(arguments)
    labels = args.lines.split(";") if args.lines else LINES
    settings = best_settings({label: LINES[label] for label in labels}, args)
    points = measure(settings, [float(count) for count in args.counts.split(",")], args)
    if not args.lines:  # how the parameters are divided
        divided = best_settings({str(r1): ("dual_lora", r1, 8 - r1, 3) for r1 in range(1, 8)}, args)
        draw(points, measure(divided, [4], args), args.out_dir / "memorise.png")


if __name__ == "__main__":
    main(sys.argv[1:])
