"""Random labels on a real model: how fast is what has no rule learnt by heart?

    python tests/evidence/labels.py --out_dir=out/labels

all-MiniLM-L6-v2, adapters on q and v; 512 headlines, each with one of 8 labels at random. Prints the training loss
over the steps, and the share of the headlines whose label is recalled in the end. Each method's rate is the best of
RATES by the last losses of a seed that is not shown. Every run is a line of --out_dir/runs.jsonl, not made again.
"""
import argparse
import contextlib
import json
import random
import shutil
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import train  # noqa: E402
from compare import commit, table  # noqa: E402
from data.tasks import load_task  # noqa: E402

METHODS = {
    "LoRA, r = 4": ["--method=lora", "--r=4"],
    "Dual LoRA, 2 + 2": ["--method=dual_lora", "--r=4"],
    "LoRA, r = 2": ["--method=lora", "--r=2"],
}
RATES, GRID_SEED, SEEDS = (2e-3, 4e-3), 1000, (0, 1, 2)
N, STEPS, INTERVAL = 512, 300, 30


def task_folder(out_dir, seed):
    """A task whose validation set is its training set."""
    folder, rng = out_dir / f"task-{seed}", random.Random(seed)
    if not folder.exists():
        headlines = [example["text_a"] for example in load_task("sarcasm").train]
        text = "".join(json.dumps({"text_a": headline, "label": rng.choice("abcdefgh")}) + "\n"
                       for headline in rng.sample(headlines, N))
        folder.mkdir(parents=True)
        for name in ("train", "validation"):
            (folder / f"{name}.jsonl").write_text(text)
    return folder


def learn(method, rate, seed, out_dir):
    """The run as a dict: of runs.jsonl, or made and added to it."""
    path, run = out_dir / "runs.jsonl", {"method": method, "rate": rate, "seed": seed}
    for line in path.read_text().splitlines() if path.exists() else []:
        if run.items() <= json.loads(line).items():
            return json.loads(line)
    folder = out_dir / "running"
    shutil.rmtree(folder, ignore_errors=True)
    with open(out_dir / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        result = train.train(train.parse([
            *METHODS[method], f"--task={task_folder(out_dir, seed)}", f"--out_dir={folder}", f"--learning_rate={rate}",
            f"--seed={seed}", f"--max_steps={STEPS}", f"--log_interval={INTERVAL}", "--max_length=16",
            "--dtype=float32"]))
    losses = [line["loss"] for line in map(json.loads, open(folder / "metrics.jsonl")) if "loss" in line]
    run |= {"losses": losses, "recalled": result["value"], "commit": commit()}
    with open(path, "a") as file:
        file.write(json.dumps(run) + "\n")
    return run


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, default=Path("out/labels"))
    args = parser.parse_args(arguments)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    rates = {}
    for method in METHODS:
        tried = {rate: learn(method, rate, GRID_SEED, args.out_dir)["losses"][-1] for rate in RATES}
        rates[method] = min(tried, key=tried.get)
        print(f"{method}: last loss", ", ".join(f"{loss:.3f} at {rate:g}" for rate, loss in tried.items()), flush=True)
    runs = {method: [] for method in METHODS}
    for seed in SEEDS:
        for method, rate in rates.items():
            runs[method].append(learn(method, rate, seed, args.out_dir))
    shown = range(1, STEPS // INTERVAL, 2)
    rows = [[f"{method}, {rates[method]:g}",
             *(f"{statistics.mean(run['losses'][i] for run in of_method):.2f}" for i in shown),
             ", ".join(f"{run['recalled']:.2f}" for run in of_method)] for method, of_method in runs.items()]
    print("\n" + table(["method and rate, loss at step", *(str((i + 1) * INTERVAL) for i in shown), "recalled"], rows))


if __name__ == "__main__":
    main(sys.argv[1:])
