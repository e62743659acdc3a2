"""Methods side by side: learning rates from one grid, the same seeds and batches for all, one table with its spread.

    python tests/evidence/compare.py --task=sst2,cola --methods=lora,dual_lora --seeds=2 [any option of train.py]

A task or a method may bring options: --task=sst2,cola:max_steps=1500 --methods=lora,lora:r=16,dual_lora,full.
Methods beside train.py's are in methods.py. With --grid=1e-3,2e-3 the rate is chosen for each task and method, by
--grid_seeds runs a rate on held-out training data with seeds that are not reported. Full fine-tuning has a grid of its
own, --full_grid. "dora@lora" takes the rate that was chosen for lora. With --seeds=0 the grid alone is run. --jobs=2
makes two runs at a time, with one thread each.

Finished runs are lines of out_dir/runs.jsonl and are not made again, if options and data are the same. A run that was
cut short goes on at its checkpoint. So the same command goes on where it was stopped. Its tables are printed, and saved
as out_dir/tables.md and tables.json.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import torch  # noqa: E402

import train  # noqa: E402
from data.instruct import COMMONSENSE  # noqa: E402
from data.metrics import score  # noqa: E402
from data.runs import data_of  # noqa: E402
from dual_lora import adapter_state_dict  # noqa: E402
from methods import adapter_report  # noqa: E402: methods.py also adds its methods to train.METHODS

GRID_SEED = 1000  # the first one
NO_MATTER = ("out_dir", "resume", "overwrite", "data_dir", "device", "eval_interval", "log_interval",
             "checkpoint_interval", "given")
PER_RUN = ("method", "seed", "held_out", "resume", "overwrite", "predict")  # of train.py, which are set here
# Student's t at 97.5 %, for 1 to 10 degrees of freedom; with more the last one is a little too wide.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def parse(arguments):
    parser = argparse.ArgumentParser(usage="compare.py [--name=value ...]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = train.refuse
    parser.add_argument("--task", default="sarcasm", help="names or folders, with commas between (default sarcasm)")
    parser.add_argument("--methods", default="lora,dual_lora", help="what is compared, differences being to the first "
                        "(default lora,dual_lora)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method on each task (default 5)")
    parser.add_argument("--grid", help="learning rates to choose from; without it train.py's default is taken")
    parser.add_argument("--full_grid", help="those of --methods=full, if others")
    parser.add_argument("--grid_seeds", type=int, default=1, help="runs of each rate of the grid (default 1)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--out_dir", type=Path, default=Path("out/compare"), help="(default out/compare)")
    args, options = parser.parse_known_args(arguments)
    for name in PER_RUN:
        if any(option.partition("=")[0] == f"--{name}" for option in options):
            raise ValueError(f"--{name} is set for each run: the options here are --methods, --seeds and --grid")
    if args.seeds < 0 or args.grid_seeds < 1 or args.jobs < 1:
        raise ValueError("--seeds is 0 or more, --grid_seeds and --jobs are 1 or more")
    if not args.grid and (args.full_grid or args.grid_seeds > 1):
        raise ValueError("--full_grid and --grid_seeds do nothing without --grid")
    for task in args.task.split(","):  # so that a wrong option is noticed before the first run
        for method in args.methods.split(","):
            cfg, source = config(task, method, options), method.partition("@")[2]
            if source and source not in args.methods.split(","):
                raise ValueError(f"--methods has {method!r}, and no {source!r} whose learning rate it could take")
            if args.grid and "learning_rate" in cfg.given:
                raise ValueError(f"{task}, {method}: --learning_rate is given, and --grid to choose it from")
    return args, options


# ---- Runs ------------------------------------------------------------------------------------------------------------


def split_spec(spec):
    """("cola", ["--max_steps=1500"]) from "cola:max_steps=1500"."""
    name, *options = spec.split(":")
    return name, [f"--{option}" for option in options]


def config(task, method, options, **values):
    """Config of one run: a task and a method with their own options, and the options of the command line."""
    (task, of_task), (method, of_method) = split_spec(task), split_spec(method.partition("@")[0])
    cfg = train.parse([*options, *of_task, *of_method, f"--task={task}", f"--method={method}"])
    return dataclasses.replace(cfg, **{name: value for name, value in values.items() if value is not None})


def identity(options):
    """{option: value} of all that is not at its default and can change a result. A folder is known by its name: the
    data in it are compared by themselves."""
    found = {name: value for name, value in sorted(options.items())
             if name not in NO_MATTER and value != getattr(train.Config, name, None)}
    return found | {"task": Path(found["task"]).name} if "task" in found else found


@functools.lru_cache
def data_hash(task, data_dir, held_out, eval_examples):
    return data_of(train.read_task(train.Config(task=task, data_dir=data_dir, held_out=held_out,
                                                eval_examples=eval_examples)))["data"]


def data_of_run(cfg):
    return data_hash(cfg.task, cfg.data_dir, cfg.held_out, cfg.eval_examples)


def read_runs(out_dir):
    path = out_dir / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find_run(runs, cfg):
    """The run with the options and the data of cfg, or None."""
    return next((run for run in runs
                 if identity(run["options"]) == identity(vars(cfg)) and run.get("data") == data_of_run(cfg)), None)


def run_all(configs, out_dir, jobs, purpose):
    """The runs of `configs`, in order; those that are not in runs.jsonl yet are made and added."""
    out_dir.mkdir(parents=True, exist_ok=True)
    known = read_runs(out_dir)
    todo = [cfg for cfg in configs if find_run(known, cfg) is None]
    stale = sum(any(identity(run["options"]) == identity(vars(cfg)) for run in known) for cfg in todo)
    print(f"{purpose}: {len(configs)} runs; {len(configs) - len(todo)} are in {out_dir / 'runs.jsonl'}, with the same "
          f"options and data{f'; {stale} are there with other data, and are made again' if stale else ''}", flush=True)
    began = time.time()
    for done, run in enumerate(make_runs(todo, out_dir, jobs), 1):
        with open(out_dir / "runs.jsonl", "a") as file:
            file.write(json.dumps(run) + "\n")
        left = (time.time() - began) / done * (len(todo) - done) / 60
        print(f"run {done}/{len(todo)}, {run['method']}, about {left:.0f} min left: "
              f"{', '.join(f'{name} {value}' for name, value in run['options'].items())} -> {run['value']}", flush=True)
    known = read_runs(out_dir)
    return [find_run(known, cfg) for cfg in configs]


def make_runs(configs, out_dir, jobs):
    """Yield the run of each of `configs`, as they end."""
    if jobs == 1:
        for cfg in configs:
            yield run_one(cfg, out_dir)
        return
    with concurrent.futures.ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = [pool.submit(run_in_worker, cfg, out_dir) for cfg in configs]
        for future in concurrent.futures.as_completed(pending):
            yield future.result()


def run_in_worker(cfg, out_dir):
    try:
        return run_one(cfg, out_dir)
    except KeyboardInterrupt:  # the run has saved its state; a worker that went on would begin another one
        os._exit(1)


def run_one(cfg, out_dir):
    """Train, look inside, and keep of it one dict."""
    options, data = identity(vars(cfg)), data_of_run(cfg)
    name = hashlib.sha256(json.dumps([options, data]).encode()).hexdigest()[:16]
    folder = out_dir / "running" / f"{cfg.method}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    run = {"options": options, "task": options.get("task", cfg.task), "method": cfg.method,
           "learning_rate": cfg.learning_rate, "seed": cfg.seed, "held_out": cfg.held_out, "data": data, "value": None,
           "commit": commit(), "date": time.strftime("%Y-%m-%d")}
    began = time.time()
    try:
        with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log):
            result = train.train(dataclasses.replace(cfg, out_dir=str(folder), resume=True))
            inside = look_inside(result, folder)
    except FloatingPointError as error:  # diverged, which is a result; the run counts as the worst
        return run | {"error": str(error)}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [[line["step"], line["validation"][result["metric"]]] for line in lines
             if "step" in line and "validation" in line]
    run |= {name: result[name] for name in ("metric", "value", "validation", "trainable", "classes", "settings")}
    run |= {"learning_rate": result["settings"]["learning_rate"], "seconds": round(time.time() - began),
            "curve": curve, "inside": inside}
    shutil.rmtree(folder)
    return run


@torch.no_grad()
def look_inside(result, folder):
    """adapter_report's numbers, means over the layers. The start, for the flips, is drawn again from the seed."""
    cfg = train.Config(**result["settings"])
    if train.METHODS[cfg.method][0] is None:
        return {}
    models = [train.add_trained(cfg, train.load_base(cfg)[1], result["kind"], len(result["classes"]) or 1, file)
              for file in (None, folder / "adapter.pt")]
    rows = list(adapter_report(models[1], since=adapter_state_dict(models[0])).values())
    return {key: statistics.mean(row[key] for row in rows) for key in rows[0]}


def commit():
    result = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return result.stdout.strip()


# ---- The comparison --------------------------------------------------------------------------------------------------


def choose_rates(tasks, methods, options, args):
    """{(task, method): learning rate}: of the grid's rates the one with the best value on held-out training data."""
    if not args.grid:
        return {}

    def grid(method):
        text = args.full_grid if split_spec(method)[0] == "full" and args.full_grid else args.grid
        return [float(rate) for rate in text.split(",")]

    tried = {(task, method, rate, seed): config(task, method, options, learning_rate=rate, seed=seed, held_out=True)
             for task in tasks for method in methods if "@" not in method for rate in grid(method)
             for seed in range(GRID_SEED, GRID_SEED + args.grid_seeds)}
    values = Counter()
    for (*key, _), run in zip(tried, run_all(list(tried.values()), args.out_dir, args.jobs, "grid")):
        values[tuple(key)] += value_or_worst(run["value"])
    rates = {}
    for task in tasks:
        for method in methods:
            source = method.partition("@")[2] or method
            rates[task, method] = max(grid(source), key=lambda rate: values[task, source, rate])
    return rates


def value_or_worst(value):
    return -math.inf if value is None or math.isnan(value) else value


def compare(args, options):
    """{"rows": one a method, "tasks", ...}: values by task and seed, and what the tables show. None without seeds."""
    tasks, methods = args.task.split(","), args.methods.split(",")
    rates = choose_rates(tasks, methods, options, args)
    if not args.seeds:
        return None
    configs = {(task, method, seed): config(task, method, options, learning_rate=rates.get((task, method)), seed=seed)
               for task in tasks for method in methods for seed in range(args.seeds)}
    runs = dict(zip(configs, run_all(list(configs.values()), args.out_dir, args.jobs, "seeds")))
    rows = []
    for method in methods:
        of_method = {task: [runs[task, method, seed] for seed in range(args.seeds)] for task in tasks}
        values = {task: [run["value"] or 0.0 for run in of_method[task]] for task in tasks}  # diverged: 0
        if len(tasks) > 1:
            values["mean"] = [statistics.mean(column) for column in zip(*values.values())]
        first = rows[0]["values"] if rows else values
        rows.append({
            "method": method, "values": values,
            "diverged": {task: sum(run["value"] is None for run in of_method[task]) for task in tasks},
            "rates": {task: of_method[task][0]["learning_rate"] for task in tasks},
            "parameters": max(run.get("trainable", 0) for run in of_method[tasks[0]]),
            "seconds": statistics.mean(run.get("seconds", 0) for run in sum(of_method.values(), [])),
            "difference": {name: paired(column, first[name]) for name, column in values.items()}})
    first_runs = [next((runs[key] for key in runs if key[0] == task and "curve" in runs[key]), {}) for task in tasks]
    return {"tasks": tasks, "columns": [column_name(*pair) for pair in zip(tasks, first_runs)], "seeds": args.seeds,
            "rows": rows, "majority": {task: majority(config(task, methods[0], options)) for task in tasks},
            "setting": setting([config(task, methods[0], options) for task in tasks], first_runs, args)}


def column_name(task, run):
    name = Path(split_spec(task)[0]).name
    return f"{name}, {run['curve'][-1][0]:,} steps, {run['metric']}" if run else name


def majority(cfg):
    """The metric of whoever always says the commonest class of the training data; None where there are no classes."""
    task = train.read_task(cfg)
    if task.kind != "classification":
        return None
    commonest = Counter(example["label"] for example in task.train).most_common(1)[0][0]
    labels = [example["label"] for example in task.validation]
    return score(task.metric, [commonest] * len(labels), labels)


def setting(configs, runs, args):
    """What a reader must know of the runs, in one sentence."""
    def each(values):
        return " and ".join(dict.fromkeys(str(value) for value in values))

    models = [run.get("settings", {}).get("model") or cfg.model or ("smollm2" if cfg.task in COMMONSENSE else "minilm")
              for cfg, run in zip(configs, runs)]  # a run of an earlier commit has no settings
    rates = (f"chosen from {args.grid} on held-out training data by {args.grid_seeds} seed(s)" if args.grid
             else "not searched")
    return (f"{each(train.FULL_NAMES.get(model, model) for model in models)}; adapters on "
            f"{each(cfg.targets for cfg in configs)}, r = {each(cfg.r for cfg in configs)}, Dual LoRA r1 = r2 = r / 2, "
            f"alpha {each(f'{cfg.alpha:g}' for cfg in configs)}, unless a method's name says otherwise; "
            f"{each(cfg.batch_size for cfg in configs)} examples a step; learning rates {rates}.")


def paired(ours, theirs):
    """(mean difference, half width of its 95 % interval by Student's t), paired by seed; None for one seed's width."""
    differences = [a - b for a, b in zip(ours, theirs)]
    n = len(differences)
    width = T_QUANTILES[min(n - 2, 9)] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    return statistics.mean(differences), width


# ---- The tables ------------------------------------------------------------------------------------------------------


def markdown(result):
    rows, names = result["rows"], list(result["rows"][0]["values"])
    columns = result["columns"] + ["mean"] * (len(names) - len(result["columns"]))
    several = result["seeds"] > 1
    of_seeds = f"Mean ± standard deviation over {result['seeds']} seeds" if several else "One seed"
    text = f"{result['setting']}\n\n{of_seeds}, in brackets the learning rate.\n\n"
    values = [[row["method"], f"{row['parameters']:,}", f"{row['seconds']:.0f}", *(spread(row, name) for name in names)]
              for row in rows]
    chance = [result["majority"].get(name) for name in names]
    if any(value is not None for value in chance):
        values.append(["commonest class", "", "", *("" if value is None else f"{value:.4f}" for value in chance)])
    text += table(["method", "parameters", "seconds", *columns], values)
    if rows[1:]:
        text += (f"\nDifference to {rows[0]['method']} in points (hundredths)"
                 f"{', paired by seed, ± half the 95 % interval' if several else ''}.\n\n")
        text += table(["method", *columns], [[row["method"], *(in_points(*row["difference"][name]) for name in names)]
                                             for row in rows[1:]])
    return text


def spread(row, name):
    values, rate = row["values"][name], row["rates"].get(name)
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    diverged = f", {row['diverged'][name]} diverged and count as 0" if row["diverged"].get(name) else ""
    return f"{statistics.mean(values):.4f}{deviation}" + (f" ({rate:g}{diverged})" if rate else "")


def in_points(difference, width):
    return f"{100 * difference:+.1f}" + ("" if width is None else f" ± {100 * width:.1f}")


def table(head, rows):
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, ["---"] * len(head), *rows))


def main(arguments):
    args = None
    try:
        args, options = parse(arguments)
        result = compare(args, options)
    except (ValueError, OSError) as error:
        print(f"compare.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if args else 2
    except KeyboardInterrupt:
        print("compare.py: interrupted; the same command goes on from here", file=sys.stderr)
        return 1
    if result:
        print(f"\n{markdown(result)}")
        (args.out_dir / "tables.md").write_text(markdown(result))
        (args.out_dir / "tables.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
