"""What an update can represent, and what in a trained update is signal.

    python tests/evidence/represent.py --out_dir=out/represent [any option of train.py but --model]

1. How much of full fine-tuning's own update does each method hold, at equal parameters? Trains every weight of
all-MiniLM-L6-v2 on each of --tasks, takes W after minus W before of the q and v projections in three layers, and
approximates it by LoRA's BA, by Dual LoRA's ReLU(BA) ⊙ Sign(DC), and by that without its parts. A share is
1 - |T - dW|^2 / |T|^2, the mean over the six matrices. T of independent Gaussian entries stands
beside it. LoRA's best is known exactly: the largest singular values. The others are fitted by Adam on the squared
error, and the better of two fits is shown, so their shares are lower bounds. How far such a fit gets is seen on LoRA
("lora, fitted").

2. Trains LoRA and Dual LoRA, and evaluates them with every dW replaced by its best approximation of low rank.

Trained models are kept in --out_dir and not trained again. Writes represent.json there, which draw.py draws.
"""
import argparse
import concurrent.futures
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

import train  # noqa: E402
from compare import config, split_spec, table  # noqa: E402
from data.download import model_folder  # noqa: E402
from data.runs import finished_run  # noqa: E402
from data.tasks import load_task  # noqa: E402
from dual_lora import adapted_layers, merge_adapters, sign_ste  # noqa: E402
from model import load_pretrained  # noqa: E402

RANKS = (2, 4, 8, 16, 32, 64)  # of LoRA; a method of two groups has half of it in each
LAYERS = ("0", "2", "5")
RATES = {"sarcasm": 2e-4, "stsb": 2e-4, "sst2": 1e-4, "cola": 5e-5, "mrpc": 5e-5}  # full fine-tuning's, from its grid

METHODS = {  # the two products of a method -> its dW
    "lora, fitted": lambda BA, DC: BA + DC,
    "dual_lora": lambda BA, DC: BA.relu() * sign_ste(DC),
    "annealed sign": lambda BA, DC: BA.relu() * sign_ste(DC),  # see fit
    "no_relu": lambda BA, DC: BA * sign_ste(DC),
    "no_sign": lambda BA, DC: BA.relu() * DC,
    "loha": lambda BA, DC: BA * DC,
}
# (start, Adam's rate). A random start alone would do the sign an injustice: too few of them turn in so few steps.
FITS = [("spectral", 0.03), ("random", 0.1)]
LORA_FITS = [("random", 0.03), ("random", 0.1)]


def trained(task, method, rate, args, options):
    """The folder of a finished run; the run is made if it is not there yet."""
    folder = args.out_dir / f"{split_spec(task)[0]}-{method}-{args.steps}"
    train.train(config(task, method, options, learning_rate=rate, max_steps=args.steps, out_dir=str(folder),
                       resume=True))
    return folder


# ---- 1. Full fine-tuning's update ------------------------------------------------------------------------------------


def full_update(folder):
    """(6, out, in): W after minus W before."""
    after = torch.load(folder / "adapter.pt", weights_only=True)
    before = load_pretrained(model_folder("minilm")).state_dict()
    names = [f"layers.{i}.attention.{name}.weight" for i in LAYERS for name in ("q_proj", "v_proj")]
    return torch.stack([after[f"backbone.{name}"] - before[name] for name in names])


def best_low_rank(T, r):
    """The best approximation of rank r of T (..., out, in), as its factors (..., out, r) and (..., r, in)."""
    U, sigma, V = torch.linalg.svd(T, full_matrices=False)
    root = sigma[..., :r].sqrt()
    return U[..., :r] * root[..., None, :], root[..., None] * V[..., :r, :]


def start_of_fit(T, method, r, start):
    """B, A, D, C. Spectral: DC has the signs of T as well as it can, and BA is fitted to what is then left to do."""
    n, n_out, n_in = T.shape
    if start == "random":
        generator = torch.Generator().manual_seed(0)
        return [0.3 * torch.randn(n, *shape, generator=generator) for shape in ((n_out, r), (r, n_in)) * 2]
    D, C = best_low_rank(T.sign() * T.abs().sqrt(), r)
    signed = method in ("dual_lora", "annealed sign", "no_relu")
    return [*best_low_rank(T * (D @ C).sign() if signed else T.abs().sqrt(), r), D, C]


def fit(T, method, r, start, rate, steps):
    """The share of each matrix of T (n, out, in) that is captured, the best value on the way; r in each group.

    "annealed sign" has tanh(beta DC / std(DC)) in the sign's place while it learns, beta rising from 1 to 1,000 as in
    memorise.py; the shares are those of the true sign.
    """
    T = T / T.square().mean((1, 2), keepdim=True).sqrt()
    factors = [p.contiguous().requires_grad_() for p in start_of_fit(T, method, r, start)]
    optimizer = torch.optim.Adam(factors, lr=rate, betas=(0.9, 0.99))
    best = torch.zeros(len(T))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        B, A, D, C = factors
        BA, DC = torch.bmm(B, A), torch.bmm(D, C)
        dW = METHODS[method](BA, DC)
        best = torch.maximum(best, 1 - (dW - T).detach().square().mean((1, 2)))
        if method == "annealed sign":
            dW = BA.relu() * torch.tanh(1000 ** min(1, step / (0.7 * steps)) * DC / DC.std())
        optimizer.zero_grad()
        (dW - T).square().mean((1, 2)).sum().backward()
        optimizer.step()
    return best


def shares(T, r, steps=150):
    """{method: share} of T at the parameters of LoRA of rank r."""
    torch.set_num_threads(1)
    energy = torch.linalg.svdvals(T).square()
    found = {"lora": (energy[:, :r].sum(1) / energy.sum(1)).mean().item()}
    for method in METHODS:
        fits = LORA_FITS if method == "lora, fitted" else FITS
        values = [fit(T, method, r // 2, start, rate, steps) for start, rate in fits]
        found[method] = torch.stack(values).amax(0).mean().item()
    return found


# ---- 2. What is signal -----------------------------------------------------------------------------------------------


@torch.no_grad()
def signal(folder, cut):
    """{what dW is replaced by: [share of dW's squared norm, the metric then]}, for the run in `folder`."""
    run = finished_run(folder)
    cfg = train.Config(**run["settings"])
    task = load_task(cfg.task, cfg.data_dir, cfg.metric)
    task.validation = task.validation[:cut]
    models = []
    for file in (None, folder / "adapter.pt"):  # as drawn, and as trained
        tokenizer, base = train.load_base(cfg)
        models.append(train.add_trained(cfg, base, task.kind, task.n_outputs, file))
    start = {name: layer.adapter.delta_weight() for name, layer in adapted_layers(models[0]).items()}
    model = models[1]
    before = {name: layer.out_in(layer.W0).clone() for name, layer in adapted_layers(model).items()}
    whole = {name: layer.adapter.delta_weight() for name, layer in adapted_layers(model).items()}
    if cfg.method == "lora":  # its B starts at 0
        start = {name: torch.zeros_like(dW) for name, dW in whole.items()}
    validation, model = train.encode(cfg, base, tokenizer, task.validation), merge_adapters(model)

    def low_rank(matrix, r):
        B, A = best_low_rank(matrix, r)
        return B @ A

    def measure(replace):
        shares = []
        for name, dW in whole.items():
            other = replace(name, dW)
            shares.append((1 - (dW - other).square().sum() / dW.square().sum()).item())
            model.get_submodule(name).weight.copy_(before[name] + other)
        values = train.evaluate(model, task, validation, tokenizer, torch.device(cfg.device))
        return [statistics.mean(shares), values[task.metric]]

    found = {"dW": measure(lambda name, dW: dW)}
    for r in (2, 8, 32):
        found[f"rank {r}"] = measure(lambda name, dW: low_rank(dW, r))
    found["all but rank 8"] = measure(lambda name, dW: dW - low_rank(dW, 8))
    found["start + rank 8 of the change"] = measure(lambda name, dW: start[name] + low_rank(dW - start[name], 8))
    found["start"] = measure(lambda name, dW: start[name])
    return found


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="sarcasm,stsb,sst2")
    parser.add_argument("--signal_tasks", default="sarcasm,stsb")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--eval_examples", type=int, default=1000)
    parser.add_argument("--out_dir", type=Path, default=Path("out/represent"))
    args, options = parser.parse_known_args(arguments)
    names = {task: split_spec(task)[0] for task in args.tasks.split(",")}  # a task may bring options, as in compare.py
    targets = {name: full_update(trained(task, "full", RATES[name], args, options)) for task, name in names.items()}
    targets["Gaussian"] = torch.randn(6, 384, 384, generator=torch.Generator().manual_seed(0))
    keys = [(name, r) for name in targets for r in RANKS]
    with concurrent.futures.ProcessPoolExecutor(args.jobs) as pool:
        found = list(pool.map(shares, [targets[name] for name, _ in keys], [r for _, r in keys]))
    rows = [{"target": name, "r": r, "share": share} for (name, r), share in zip(keys, found)]
    print(table(["full fine-tuning's update on", "r", *found[0]],
                [[row["target"], str(row["r"]), *(f"{share:.3f}" for share in row["share"].values())] for row in rows]),
          flush=True)

    parts = {f"{split_spec(task)[0]}, {method}": signal(trained(task, method, 2e-3, args, options), args.eval_examples)
             for task in args.signal_tasks.split(",") for method in ("lora", "dual_lora")}
    (args.out_dir / "represent.json").write_text(json.dumps({"shares": rows, "signal": parts}, indent=1))
    kinds = list(next(iter(parts.values())))
    print(table(["share of dW's squared norm, metric", *kinds],
                [[run, *(f"{part[kind][0]:.2f}, {part[kind][1]:.4f}" for kind in kinds)]
                 for run, part in parts.items()]))


if __name__ == "__main__":
    main(sys.argv[1:])
