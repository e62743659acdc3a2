"""The pictures. Needs matplotlib.

    python tests/evidence/draw.py dW OUT.png RUN_DUAL RUN_LORA [LAYER]     # out_dirs of train.py; or a middle layer
    python tests/evidence/draw.py rates OUT.png RUNS.jsonl                 # held-out metric over learning rates
    python tests/evidence/draw.py steps OUT.png RUNS.jsonl                 # metric over steps
    python tests/evidence/draw.py represent OUT.png represent.json

RUNS.jsonl is what compare.py writes. A line is a run: task, method, learning_rate, seed, held_out, metric, value,
curve [[step, value], ...] and options. Held-out runs are the grid of learning rates, the others are the seeds.
"""
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dual_lora import DualLoRA, LoRA, read_adapter, sign_ste  # noqa: E402

CORNER = 48  # rows and columns that a heat map shows: more would be finer than a README can show
# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
NAMES = {"lora": "LoRA", "dual_lora": "Dual LoRA", "no_relu": "no ReLU", "no_sign": "no Sign", "loha": "LoHa: neither",
         "random_start": "LoRA, random start", "full": "full fine-tuning", "dora": "DoRA",
         "annealed sign": "Dual LoRA, annealed sign"}
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,up_proj,down_proj"
COLUMNS = ("task", "method", "learning_rate", "seed", "held_out")  # of a run, which its options repeat


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "legend.frameon": False, "savefig.dpi": 100,
                         "axes.spines.top": False, "axes.spines.right": False,
                         "axes.prop_cycle": plt.cycler(color=COLOURS)})
    return plt


# ---- How dW comes about ----------------------------------------------------------------------------------------------


def read_dW(run, cls, name=None):
    """(name, adapter) of one layer, from a run's adapter.pt. No name: the middle one."""
    path = Path(run) / "adapter.pt"
    adapters, state = read_adapter(path)
    names = [name for name, (kind, _) in adapters.items() if kind is cls]
    name = name or (names[len(names) // 2] if names else None)
    if name not in names:
        raise ValueError(f"{path} has no {cls.__name__} {name or ''}: choose from {', '.join(names) or 'nothing'}")
    own = {key.rpartition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.adapter.")}
    adapter = cls(len(own["lora_B"]), own["lora_A"].shape[1], **adapters[name][1])
    adapter.load_state_dict(own)
    return name, adapter


@torch.no_grad()
def draw_dW(plt, path, run_dual, run_lora, name=None):
    name, dual = read_dW(run_dual, DualLoRA, name)
    _, lora = read_dW(run_lora, LoRA, name)
    dW, BA = dual.delta_weight(), lora.delta_weight()
    W_m = dual.scaling * (dual.lora_B @ dual.lora_A).relu()
    W_d = sign_ste(dual.lora_D @ dual.lora_C)

    figure = plt.figure(figsize=(9, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 3)
    heat_map(figure.add_subplot(grid[0, 0]), W_m, "ReLU(BA): how far")
    heat_map(figure.add_subplot(grid[0, 1]), W_d, "⊙  Sign(DC): which way", limit=1)
    heat_map(figure.add_subplot(grid[0, 2]), dW, "=  Dual LoRA's dW")
    heat_map(figure.add_subplot(grid[1, 0]), BA, "LoRA's dW = BA")
    axis = figure.add_subplot(grid[1, 1:])
    for label, update in (("Dual LoRA", dW), ("LoRA", BA)):
        sigma = torch.linalg.svdvals(update)
        axis.semilogy(range(1, len(sigma) + 1), (sigma / sigma[0]).numpy(), label=label)
    axis.set(xlabel="singular value of dW, largest first", ylabel="share of the largest", ylim=(1e-4, 1.5),
             title=f"{name.removeprefix('backbone.')}, {dW.shape[0]} x {dW.shape[1]}")
    axis.legend()
    save(plt, figure, path)


def heat_map(axis, matrix, title, limit=None):
    """The corner of a matrix, red above 0 and blue below. Unless given, the limit is what 1 % of the entries exceed."""
    corner = matrix[:CORNER, :CORNER]
    limit = limit or corner.abs().flatten().quantile(0.99).item() or 1.0
    image = axis.imshow(corner.numpy(), cmap="RdBu_r", vmin=-1.2 * limit, vmax=1.2 * limit, interpolation="nearest")
    axis.set(title=title, xlabel="input", ylabel="output", xticks=[], yticks=[])
    bar = axis.figure.colorbar(image, ax=axis, fraction=0.046, ticks=[-limit, 0, limit], format="%.2g")
    bar.ax.set_ylim(-limit, limit)


# ---- Curves ----------------------------------------------------------------------------------------------------------


def read_runs(path, held_out):
    """{task and steps: {label: [runs]}}. The label is the method, and the options in which the panel's runs differ."""
    with open(path, encoding="utf-8") as file:
        runs = [run for run in map(json.loads, file) if run["held_out"] == held_out and run["value"] is not None]
    if not runs:
        raise ValueError(f"{path} holds no run with held_out {str(held_out).lower()}")
    tasks = {}
    for run in sorted(runs, key=lambda run: run["curve"][-1][0]):
        tasks.setdefault(f"{Path(run['task']).name}, {run['curve'][-1][0]:,} steps", []).append(run)
    return {task: by_label(of_task) for task, of_task in tasks.items()}


def by_label(runs):
    names = {name for run in runs for name in run["options"] if name not in COLUMNS}
    differing = [name for name in sorted(names) if len({json.dumps(run["options"].get(name)) for run in runs}) > 1]
    labels = {}
    for run in runs:
        values = {name: run["options"][name] for name in differing if name in run["options"]}
        options = ["all linear layers" if value == ALL_LINEAR else f"{name} {value}" for name, value in values.items()]
        labels.setdefault(", ".join([NAMES.get(run["method"], run["method"]), *options]), []).append(run)
    return labels


def grid_points(runs):
    """{learning rate: [values]}"""
    points = {}
    for run in runs:
        points.setdefault(run["learning_rate"], []).append(run["value"])
    return points


def curve_points(runs):
    """{step: [a value for each seed]}, the steps that all runs have."""
    curves = [dict(run["curve"]) for run in runs]
    return {step: [curve[step] for curve in curves] for step in curves[0] if all(step in curve for curve in curves)}


def draw_panels(plt, path, tasks, points_of, xlabel, logarithmic):
    """A panel a task, a line a method: the mean, and a band from the least to the greatest value."""
    labels = list(dict.fromkeys(label for task in tasks.values() for label in task))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * max(columns, 2), 0.5 + 2.4 * rows), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(tasks):]:
        axis.remove()
    for axis, (task, methods) in zip(axes.flat, tasks.items()):
        for label, runs in methods.items():
            x, values = zip(*sorted(points_of(runs).items()))
            i = labels.index(label)
            style = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=4, linewidth=1.2)
            axis.plot(x, [statistics.mean(v) for v in values], label=label, **style)
            axis.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=style["color"], alpha=0.15,
                              linewidth=0)
        axis.set(title=task, xlabel=xlabel, ylabel=runs[0]["metric"])
        if logarithmic:
            axis.set_xscale("log")
            rates = sorted({run["learning_rate"] for runs in methods.values() for run in runs})
            axis.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=7, rotation=30)
            axis.minorticks_off()
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend([handles[label] for label in labels], labels, loc="outside upper center", ncols=4)
    save(plt, figure, path)


def draw_represent(plt, path, source):
    """A panel a target, a line a method: the captured share over LoRA's rank at equal parameters."""
    rows = json.loads(Path(source).read_text())["shares"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    figure, axes = plt.subplots(1, len(targets), figsize=(2.7 * len(targets), 3), sharey=True, layout="constrained")
    for axis, target in zip(axes, targets):
        of_target = [row for row in rows if row["target"] == target]
        ranks = [row["r"] for row in of_target]
        for i, method in enumerate(name for name in of_target[0]["share"] if "fitted" not in name):
            style = {} if method in ("lora", "dual_lora") else {"linestyle": "--", "markerfacecolor": "none"}
            axis.plot(ranks, [row["share"][method] for row in of_target], marker=MARKERS[i], color=COLOURS[i],
                      label=NAMES[method], markersize=5 if not style else 8, linewidth=1.2, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, ranks)
        axis.set(title=f"full fine-tuning, {target}" if target != "Gaussian" else "a Gaussian matrix", ylim=(0, 1),
                 xlabel="r of LoRA, or equal parameters")
    axes[0].set_ylabel("captured share of the update")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    save(plt, figure, path)


def save(plt, figure, path):
    figure.savefig(path, pil_kwargs={"optimize": True})
    plt.close(figure)
    print(f"{path}, {Path(path).stat().st_size / 1000:.0f} kB")


def main(arguments):
    kind, *rest = arguments or [""]
    if len(rest) not in {"dW": (3, 4), "rates": (2,), "steps": (2,), "represent": (2,)}.get(kind, ()):
        sys.exit(__doc__.strip())
    try:
        plt = pyplot()
        if kind == "dW":
            draw_dW(plt, *rest)
        elif kind == "rates":
            draw_panels(plt, rest[0], read_runs(rest[1], True), grid_points, "learning rate", logarithmic=True)
        elif kind == "steps":
            draw_panels(plt, rest[0], read_runs(rest[1], False), curve_points, "step", logarithmic=False)
        else:
            draw_represent(plt, *rest)
    except (ValueError, OSError) as error:
        sys.exit(f"draw.py: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
