"""What an update can represent: how much of full fine-tuning's own update does each method hold, at equal parameters?

    python tests/evidence/represent.py --out_dir=tests/evidence/results/represent [--steps=200] [any option of train.py]

Trains every weight of the model on each of --tasks, takes W after minus W before of the q and v projections in three
layers, and approximates it by LoRA's BA, by Dual LoRA's ReLU(BA) ⊙ Sign(DC), and by that without its parts. A share
is 1 - |T - dW|^2 / |T|^2, the mean over the six matrices. T of independent Gaussian entries stands beside it.

LoRA's best is known exactly: the largest singular values. The others are fitted by Adam on the squared error, and the
best of three fits is shown, so their shares are lower bounds. How far such a fit gets is seen on LoRA ("fitted").
Writes shares.json, which draw.py draws. Takes about six minutes on two cores.
"""
import argparse
import concurrent.futures
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

import train  # noqa: E402
from data.download import model_folder  # noqa: E402
from dual_lora import read_adapter, sign_ste  # noqa: E402
from model import load_pretrained  # noqa: E402

RANKS = (2, 4, 8, 16, 32, 64)  # of LoRA; a method of two groups has half of it in each
LAYERS = ("0", "2", "5")
RATES = {"sarcasm": "2e-4", "stsb": "2e-4", "sst2": "1e-4", "cola": "5e-5"}  # full fine-tuning's best on held-out data

METHODS = {  # the two products of a method -> its dW
    "lora, fitted": lambda BA, DC: BA + DC,
    "dual_lora": lambda BA, DC: BA.relu() * sign_ste(DC),
    "no_relu": lambda BA, DC: BA * sign_ste(DC),
    "no_sign": lambda BA, DC: BA.relu() * DC,
    "loha": lambda BA, DC: BA * DC,
}
# (start, Adam's rate). Random alone would do the sign an injustice: it turns too few of them in 200 steps.
FITS = [("spectral", 0.003), ("spectral", 0.03), ("random", 0.1)]
LORA_FITS = [("random", 0.01), ("random", 0.03), ("random", 0.1)]


def full_update(task, steps, options, out_dir):
    """(6, out, in): W after minus W before of full fine-tuning. The run is kept in out_dir and not made again."""
    folder = out_dir / f"full-{task}-{steps}"
    if not (folder / "adapter.pt").exists():
        train.train(train.parse([f"--task={task}", "--method=full", f"--learning_rate={RATES[task]}",
                                 f"--max_steps={steps}", f"--out_dir={folder}", "--resume=true", *options]))
    after = read_adapter(folder / "adapter.pt")[1]
    before = load_pretrained(model_folder("minilm")).state_dict()
    names = [f"layers.{i}.attention.{name}.weight" for i in LAYERS for name in ("q_proj", "v_proj")]
    return torch.stack([after[f"backbone.{name}"] - before[name] for name in names])


def best_low_rank(T, r):
    """The best approximation of rank r, as its factors (n, out, r) and (n, r, in)."""
    U, sigma, V = torch.linalg.svd(T)
    root = sigma[:, :r].sqrt()
    return U[:, :, :r] * root[:, None], root[:, :, None] * V[:, :r]


def start_of_fit(T, method, r, start):
    """B, A, D, C. Spectral: DC has the signs of T as well as it can, and BA is fitted to what is then left to do."""
    n, n_out, n_in = T.shape
    if start == "random":
        generator = torch.Generator().manual_seed(0)
        return [0.3 * torch.randn(n, *shape, generator=generator) for shape in ((n_out, r), (r, n_in)) * 2]
    D, C = best_low_rank(T.sign() * T.abs().sqrt(), r)
    signed = method in ("dual_lora", "no_relu")
    return [*best_low_rank(T * (D @ C).sign() if signed else T.abs().sqrt(), r), D, C]


def fit(T, method, r, start, rate, steps):
    """The share of each matrix of T (n, out, in) that is captured, the best value on the way; r in each group."""
    T = T / T.square().mean((1, 2), keepdim=True).sqrt()
    factors = [p.contiguous().requires_grad_() for p in start_of_fit(T, method, r, start)]
    optimizer = torch.optim.Adam(factors, lr=rate, betas=(0.9, 0.99))
    best = torch.zeros(len(T))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        B, A, D, C = factors
        error = (METHODS[method](torch.bmm(B, A), torch.bmm(D, C)) - T).square().mean((1, 2))
        best = torch.maximum(best, 1 - error.detach())
        optimizer.zero_grad()
        error.sum().backward()
        optimizer.step()
    return best


def shares(T, r, steps=200):
    """{method: share} of T at the parameters of LoRA of rank r."""
    torch.set_num_threads(1)
    energy = torch.linalg.svdvals(T).square()
    found = {"lora": (energy[:, :r].sum(1) / energy.sum(1)).mean().item()}
    for method in METHODS:
        fits = LORA_FITS if method == "lora, fitted" else FITS
        values = [fit(T, method, r // 2, start, rate, steps) for start, rate in fits]
        found[method] = torch.stack(values).amax(0).mean().item()
    return found


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="sarcasm,stsb,sst2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out_dir", type=Path, default=Path("out/represent"))
    args, options = parser.parse_known_args(arguments)
    targets = {task: full_update(task, args.steps, options, args.out_dir) for task in args.tasks.split(",")}
    targets["Gaussian"] = torch.randn(6, 384, 384, generator=torch.Generator().manual_seed(0))

    keys = [(name, r) for name in targets for r in RANKS]
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        found = list(pool.map(shares, [targets[name] for name, _ in keys], [r for _, r in keys]))
    rows = [{"target": name, "r": r, "share": share} for (name, r), share in zip(keys, found)]
    (args.out_dir / "shares.json").write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=1))

    methods = list(found[0])
    print("| full fine-tuning's update on | r | " + " | ".join(methods) + " |\n|---" * 1 + "|---|" + "---|" * len(methods))
    for row in rows:
        cells = [f"{row['share'][method]:.3f}" for method in methods]
        print(f"| {row['target']} | {row['r']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
