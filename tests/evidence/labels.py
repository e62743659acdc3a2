"""Random labels on a real model: how fast is what has no rule learnt by heart?

    python tests/evidence/labels.py

all-MiniLM-L6-v2, adapters on q and v; --n headlines, each with one of 8 labels at random. Prints the training loss over
the steps at all RATES with seed 1000; then, at the rate whose last loss was lowest, means over --seeds other seeds.
Every run is a line of --out_dir/runs.jsonl, and is not made again.
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
RATES, GRID_SEED = (1e-3, 2e-3, 4e-3), 1000
LINES = 10  # of the training loss, in a run


def task_folder(args, seed):
    """A task whose validation set is its training set."""
    folder, rng = args.out_dir / f"task-{args.n}-{seed}", random.Random(seed)
    if not folder.exists():
        headlines = [example["text_a"] for example in load_task("sarcasm").train]
        text = "".join(json.dumps({"text_a": headline, "label": rng.choice("abcdefgh")}) + "\n"
                       for headline in rng.sample(headlines, args.n))
        folder.mkdir(parents=True)
        for name in ("train", "validation"):
            (folder / f"{name}.jsonl").write_text(text)
    return folder


def learn(method, rate, seed, args):
    """The run as a dict: of runs.jsonl, or made and added to it."""
    path = args.out_dir / "runs.jsonl"
    run = {"method": method, "rate": rate, "seed": seed, "n": args.n, "steps": args.steps}
    for line in path.read_text().splitlines() if path.exists() else []:
        if run.items() <= json.loads(line).items():
            return json.loads(line)
    folder = args.out_dir / "running"
    shutil.rmtree(folder, ignore_errors=True)
    with open(args.out_dir / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        result = train.train(train.parse([
            *METHODS[method], f"--task={task_folder(args, seed)}", f"--out_dir={folder}", f"--learning_rate={rate}",
            f"--seed={seed}", f"--max_steps={args.steps}", f"--log_interval={args.steps // LINES}", "--max_length=16",
            "--dtype=float32"]))
    losses = [line["loss"] for line in map(json.loads, open(folder / "metrics.jsonl")) if "loss" in line]
    run |= {"losses": losses, "recalled": result["value"], "commit": commit()}
    with open(path, "a") as file:
        file.write(json.dumps(run) + "\n")
    return run


def row(name, runs):
    """Means of the losses, and the shares recalled."""
    losses = [f"{statistics.mean(column):.2f}" for column in zip(*(run["losses"] for run in runs))]
    return [name, *losses, ", ".join(f"{run['recalled']:.2f}" for run in runs)]


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=1000, help=f"a multiple of {LINES}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out_dir", type=Path, default=Path("out/labels"))
    args = parser.parse_args(arguments)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    header = ["loss at step", *(str(args.steps * i // LINES) for i in range(1, LINES + 1)), "recalled"]
    grid = {method: [learn(method, rate, GRID_SEED, args) for rate in RATES] for method in METHODS}
    print(table(header, [row(f"{run['method']} at {run['rate']:g}", [run]) for runs in grid.values() for run in runs]))
    if args.seeds:
        rows = []
        for method, tried in grid.items():
            rate = min(tried, key=lambda run: run["losses"][-1])["rate"]
            runs = [learn(method, rate, seed, args) for seed in range(args.seeds)]
            rows.append(row(f"{method} at {rate:g}", runs))
        print(table(header, rows))


if __name__ == "__main__":
    main(sys.argv[1:])
