"""Pictures and figures of what training did, from a comparison's out_dir (train.py --methods=...) or a single run's.

    python tests/draw.py OUT_DIR [--to=FOLDER] [--layer=layers.3.attention.q_proj]

differences.png of a comparison: each method's difference to the first on each task, and on their mean, with its interval over seeds
curves.png      training loss and validation metric over the steps, a band from the lowest to the highest seed
inside.png      Dual LoRA over the steps: shares frozen and turned since the start, signs turned per step, a thin line a layer and their
                mean; and how large dW's entries are at the end
spectrum.png    singular values of dW in one layer, for each method that changes it
signs.png       Sign(DC) of that layer in a Dual LoRA run, at the start and at the end
and on the terminal, by method and layer: the share frozen, the share of signs turned, dW's ranks and size, and where there is a run with
--method=full, how far dW points where full fine-tuning's does (cosine) and how often both agree on the sign of an entry that both move.
What is by layer is the first seed's. Several tasks have a set of pictures each, curves-TASK.png and so on. Needs matplotlib.
"""
import io
import json
import os
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from data.download import model_folder  # noqa: E402
from dual_lora import AdaptedLinear, exact_product, load_adapter, ranks, sign  # noqa: E402

GREY = "#808080"  # legible on white and on black


# ---------------------------------------------------------------------------------------------------------------------
# What the runs left behind


def read_lines(folder):
    """metrics.jsonl; [] where there is none, or one that is being written."""
    path = folder / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    except ValueError:
        return []


def runs_of(out_dir):
    """{task: {method: [folders of finished runs, by seed]}}; where a method was run again with other options, the latest such runs."""
    found = {}
    folders = [folder for folder in [out_dir, *out_dir.iterdir()] if (folder / "metrics.jsonl").is_file()]
    for folder in sorted(folders, key=lambda folder: ((folder / "metrics.jsonl").stat().st_mtime, folder.name)):
        lines = read_lines(folder)
        if lines and lines[-1].get("final") and folder.name.split("-")[-2:-1] != ["grid"]:
            settings = dict(lines[-1]["settings"])
            seed, task = settings.pop("seed"), Path(settings["task"]).resolve().name
            name = folder.name.removeprefix(f"{task}-").rpartition(f"-{seed}-")[0] or folder.name
            versions = found.setdefault(task, {}).setdefault(settings["method"] if folder == out_dir else name, {})
            key = json.dumps(settings, sort_keys=True)
            versions[key] = {**versions.pop(key, {}), seed: folder}  # put last
    order = {train.in_file_names(line["method"]): i for lines in tables_of(out_dir).values() for i, line in enumerate(lines)}
    return {task: {arm: [folder for _, folder in sorted(list(arms[arm].values())[-1].items())] for arm in sorted(arms, key=lambda arm: order.get(arm, len(order)))}
            for task, arms in found.items()}


def tables_of(out_dir):
    """compare.json, {} where there is none."""
    path = out_dir / "compare.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def curve(folders, value_of):
    """(steps, means, lowest, highest) over seeds of value_of(line), where it is not None."""
    at = {}
    for folder in folders:
        for line in read_lines(folder):
            value = None if line.get("final") else value_of(line)
            if value is not None:
                at.setdefault(line["step"], []).append(value)
    steps = sorted(at)
    return steps, [statistics.mean(at[s]) for s in steps], [min(at[s]) for s in steps], [max(at[s]) for s in steps]


def reports(folder):
    """{step: {layer: its row of adapter_report}}, the last from the final line."""
    return {line["settings"]["max_steps"] if line.get("final") else line["step"]: {short(name): row for name, row in line["layers"].items()}
            for line in read_lines(folder) if line.get("layers")}


def last_report(folder):
    return list(reports(folder).values() or [{}])[-1]


def is_dual(report):
    return any("frozen" in row for row in report.values())


def inside(folder):
    """(steps, {quantity: {layer: values at these steps}}) of a Dual LoRA run."""
    rows = reports(folder)
    steps, layers = list(rows), list(next(iter(rows.values()), {}))
    gaps = [step - before for before, step in zip([0, *steps], steps)]

    def over(key):
        return {layer: [rows[step][layer][key] for step in steps] for layer in layers}

    per_step = {layer: [flips / gap for flips, gap in zip(values, gaps)] for layer, values in over("flips_since_last").items()}
    return steps, {"share frozen": over("frozen"), "signs turned since the start": over("flips_since_start"), "signs turned per step": per_step}


def updates(folder):
    """{layer: dW (out, in)} of a finished run, and {layer: module}; for full fine-tuning what the linear layers moved by."""
    settings = read_lines(folder)[-1]["settings"]
    cfg = train.Config(**{**settings, "device": "cpu"})
    model, _ = train.build(cfg, model_folder(cfg.model), train.named_task(cfg), torch.device("cpu"))
    layers = {short(name): m for name, m in model.named_modules() if isinstance(m, AdaptedLinear if cfg.method != "full" else torch.nn.Linear)}
    before = {name: m.start if isinstance(m, AdaptedLinear) else m.weight.detach().clone() for name, m in layers.items()}
    load_adapter(model, folder / "adapter.pt")
    dW = {}
    for name, m in layers.items():
        if isinstance(m, AdaptedLinear):
            dW[name], m.start = m.delta_weight().detach(), before[name]  # where training began, not where the file was loaded
        else:
            dW[name] = m.weight.detach() - before[name]
    return dW, layers


def short(name):
    return name.removeprefix("backbone.")


def differences(out_dir):
    """({method: {task: (difference, low, high) in points}}, name of the method that they differ from) of the last comparison."""
    tables, found = tables_of(out_dir), {}
    for task, lines in tables.items():
        for line in lines:
            if None not in line.get("interval", [None]):
                found.setdefault(line["method"], {})[task] = tuple(100 * value for value in (line["difference"], *line["interval"]))
    return found, next((lines[0]["method"] for lines in tables.values()), None)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def cosine(a, b):
    return (a.flatten() @ b.flatten() / (a.norm() * b.norm()).clamp(min=1e-30)).item()


def sign_agreement(a, b):
    """Share of entries of one sign among those that both move."""
    both = (a != 0) & (b != 0)
    return (a[both].sign() == b[both].sign()).float().mean().item() if both.any() else float("nan")


COLUMNS = {"frozen": ("frozen", ".3f"), "flips_since_start": ("turned", ".3f"), "effective_rank": ("eff. rank", ".1f"),
           "numerical_rank": ("rank, 1 %", ".0f"), "relative_norm": ("|dW|/|W0|", ".4f"), "cosine": ("cosine", ".3f"), "signs": ("signs", ".3f")}


def rows_of(last, dW, full):
    """{layer: {column: value}} of a run with adapters: its last report `last`, beside full fine-tuning's dW if that is not None."""
    rows = {name: dict(row) for name, row in last.items()}
    for name in rows if full else ():
        rows[name].update(cosine=cosine(dW[name], full[name]), signs=sign_agreement(dW[name], full[name]))
    return rows


def rows_of_full(dW, layers, names):
    """The same of full fine-tuning, for the layers that others adapt."""
    rows = {}
    for name in names:
        effective, numerical = ranks(dW[name])
        norm = (dW[name].norm() / (layers[name].weight.detach() - dW[name]).norm()).item()
        rows[name] = {"effective_rank": effective, "numerical_rank": numerical, "relative_norm": norm}
    return rows


def table(figures):
    """Lines from {method: {layer: {column: value}}}, the mean over layers last in each method."""
    names = [name for rows in figures.values() for name in rows]
    wide, long = (max(map(len, column)) + 2 for column in (["method", *figures], ["layer", *names]))
    lines = [f"{'method':{wide}}{'layer':{long}}" + "".join(f"{title:>11}" for title, _ in COLUMNS.values())]
    for arm, rows in figures.items():
        mean = {key: statistics.mean(row[key] for row in rows.values()) for key in COLUMNS if all(key in row for row in rows.values())}
        for name, row in {**rows, "mean": mean}.items():
            cells = (format(row[key], form) if key in row else "" for key, (_, form) in COLUMNS.items())
            lines.append(f"{arm:{wide}}{name:{long}}" + "".join(f"{cell:>11}" for cell in cells))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def style(plt):
    plt.rcParams.update({"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
                         "axes.facecolor": "none", "savefig.transparent": True, "legend.frameon": False, "legend.fontsize": 7, "savefig.dpi": 130,
                         "font.size": 9, "axes.titlesize": 9, "figure.constrained_layout.use": True})


def save(plt, figure, path):
    """As a PNG of 64 colours, a third of the size."""
    from PIL import Image  # it comes with matplotlib
    whole = io.BytesIO()
    figure.savefig(whole)
    plt.close(figure)
    Image.open(whole).quantize(64).save(path, optimize=True)


def steps_below(axis):
    axis.set(xlabel="step", xlim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)


def name_methods(figure, axis):
    """A legend above the axes: inside it would cover lines."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)


def draw_differences(plt, found, first, path):
    tasks = list(dict.fromkeys(task for of_task in found.values() for task in of_task))
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.14 * (len(found) + 1) * len(tasks)))
    axis.axvline(0, color=GREY, linewidth=0.8)
    for i, (arm, of_task) in enumerate(found.items()):
        at = [tasks.index(task) + (i + 1) / (len(found) + 1) - 0.5 for task in of_task]
        middle, low, high = zip(*of_task.values())
        axis.errorbar(middle, at, xerr=[[m - l for m, l in zip(middle, low)], [h - m for m, h in zip(middle, high)]], fmt="o", markersize=4,
                      linewidth=1.2, capsize=2, label=arm, color=f"C{i + 1}")  # C0 is the first method's, as in the other pictures
    axis.set(xlabel=f"difference to {first} in points (0.01 of the metric), 95 % interval over seeds", yticks=range(len(tasks)))
    axis.set_yticklabels([f"mean of {len(tasks) - 1}" if task == "mean" else task for task in tasks])
    axis.invert_yaxis()
    name_methods(figure, axis)
    save(plt, figure, path)


def draw_curves(plt, arms, colours, path):
    metric = read_lines(next(iter(arms.values()))[0])[-1]["metric"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for arm, folders in arms.items():
        for axis, value_of in zip(axes, (lambda line: line.get("loss"), lambda line: line.get("validation", {}).get(metric))):
            steps, mean, low, high = curve(folders, value_of)
            axis.plot(steps, mean, label=arm + (f" ({len(folders)} seeds)" if len(folders) > 1 else ""), linewidth=1.2, marker=".",
                      markersize=3, color=colours[arm])
            axis.fill_between(steps, low, high, alpha=0.15, color=colours[arm], linewidth=0)
    for axis in axes:
        steps_below(axis)
    axes[0].set_ylabel("training loss")
    axes[1].set_ylabel(f"validation {metric}")
    name_methods(figure, axes[0])
    save(plt, figure, path)


def draw_inside(plt, arms, colours, path):
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.6))
    last = {arm: last_report(folders[0]) for arm, folders in arms.items() if last_report(folders[0])}
    for arm, report in last.items():
        if is_dual(report):
            draw_quantities(axes.flat, *inside(arms[arm][0]), colours[arm])
    draw_magnitudes(axes[1, 1], last, colours)
    for axis in axes.flat[:3]:
        steps_below(axis)
    for axis in axes.flat[1:3]:
        axis.set_ylim(bottom=0)
    name_methods(figure, axes[1, 1])
    save(plt, figure, path)


def draw_quantities(axes, steps, quantities, colour):
    for axis, (name, layers) in zip(axes, quantities.items()):
        axis.set_ylabel(name)
        if any(map(any, layers.values())):  # without the ReLU nothing is frozen, and a line at 0 would press the others together
            for values in layers.values():
                axis.plot(steps, values, color=colour, linewidth=0.5, alpha=0.6)
            axis.plot(steps, [statistics.mean(at) for at in zip(*layers.values())], color=colour, linewidth=2, marker=".")


def draw_magnitudes(axis, last, colours):
    width = 0.8 / len(last)
    for i, (arm, report) in enumerate(last.items()):
        shares = [statistics.mean(decade) for decade in zip(*(row["magnitudes"] for row in report.values()))]
        axis.bar([j + (i + 0.5) * width - 0.4 for j in range(7)], shares, width, color=colours[arm], label=arm)
    axis.set(xlabel="size of dW's non-zero entries", ylabel="share of them, mean over layers", xticks=[j + 0.5 for j in range(6)])
    axis.set_xticklabels([f"$10^{{{power}}}$" for power in range(-6, 0)])


def draw_spectrum(plt, dW, layer, colours, path):
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for arm, layers in dW.items():
        if layer in layers and layers[layer].any():
            sigma = torch.linalg.svdvals(layers[layer].float())
            axis.semilogy(range(1, len(sigma) + 1), (sigma / sigma[0]).clamp(min=1e-8).numpy(), label=arm, linewidth=1.2, color=colours[arm])
    axis.set(xlabel=f"singular value of dW, {layer}", ylabel="share of the largest", ylim=(1e-5, 1.5))
    name_methods(figure, axis)
    save(plt, figure, path)


def draw_signs(plt, arm, layer, name, path, size=96):
    now = sign(exact_product(layer.lora_D, layer.lora_C).detach())
    then = sign(exact_product(layer.start["lora_D"], layer.start["lora_C"]))
    titles = "start: red +1, blue -1", "end", f"red: turned, {100 * (now != then).float().mean():.1f} % of the layer"
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
    for axis, values, title in zip(axes, (then, now, -now * then), titles):
        axis.imshow(values[:size, :size].numpy(), cmap="coolwarm", vmin=-1.4, vmax=1.4, interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
    axes[0].set_ylabel(f"Sign(DC), {arm}, {name}", fontsize=7)
    save(plt, figure, path)


def draw_task(plt, arms, to, suffix, layer):
    """All pictures of one task, and the table."""
    colours = {arm: f"C{i}" for i, arm in enumerate(arms)}
    last = {arm: last_report(folders[0]) for arm, folders in arms.items()}
    draw_curves(plt, arms, colours, to / f"curves{suffix}.png")
    if any(is_dual(report) for report in last.values()):
        draw_inside(plt, arms, colours, to / f"inside{suffix}.png")
    if not layer:
        print("no run here has adapters: curves alone were drawn")
        return
    found = {arm: updates(folders[0]) for arm, folders in arms.items()}
    dW = {arm: layers for arm, (layers, _) in found.items() if layers}
    draw_spectrum(plt, dW, layer, colours, to / f"spectrum{suffix}.png")
    signed = [(arm, layers[layer]) for arm, (_, layers) in found.items() if getattr(layers.get(layer), "direction", None) == "sign"]
    if signed:
        draw_signs(plt, *signed[0], layer, to / f"signs{suffix}.png")
    full = next((dW[arm] for arm in dW if not last[arm]), None)
    figures = {arm: rows_of(last[arm], dW[arm], full) if last[arm] else rows_of_full(*found[arm], adapted(arms)) for arm in dW}
    print("\n".join(table(figures)))


def adapted(arms):
    """Names of the layers that any run adapts."""
    return list(dict.fromkeys(name for folders in arms.values() for name in last_report(folders[0])))


def choose_layer(arms, wanted):
    """The layer that spectrum.png and signs.png show: `wanted`, or one in the middle; None if nothing is adapted."""
    names = adapted(arms)
    if wanted and wanted not in names:
        raise ValueError(f"no run adapts {wanted}" + (f": choose from {', '.join(names)}" if names else ", or anything else"))
    return wanted or (names[len(names) // 2] if names else None)


def parse(arguments):
    """(out_dir, options); ValueError in one line for what is neither."""
    options, places = {}, []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            places.append(argument)
        elif name in ("to", "layer") and value:
            options[name] = value
        else:
            raise ValueError(f"{argument!r} is no option: write --to=FOLDER or --layer=NAME; --help explains them")
    if len(places) != 1:
        raise ValueError(f"give one out_dir of train.py, not {len(places)}; --help explains more")
    return Path(places[0]), options


def main(arguments):
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return
    try:
        out_dir, options = parse(arguments)
        tasks = runs_of(out_dir) if out_dir.is_dir() else {}
        if not tasks:
            raise ValueError(f"{out_dir} holds no finished run of train.py")
        layers = {task: choose_layer(arms, options.get("layer")) for task, arms in tasks.items()}
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        style(plt)
        to = Path(options.get("to", out_dir))
        to.mkdir(parents=True, exist_ok=True)
        found, first = differences(out_dir)
        if found:
            draw_differences(plt, found, first, to / "differences.png")
        for task, arms in tasks.items():
            print(task)
            draw_task(plt, arms, to, f"-{task}" if len(tasks) > 1 else "", layers[task])
    except ImportError as error:
        sys.exit(f"draw.py: {error}; try pip install matplotlib")
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"draw.py: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(sys.argv[1:])
