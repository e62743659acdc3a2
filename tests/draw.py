"""Pictures and figures of what training did, from a comparison's out_dir (train.py --methods=...) or a single run's.

    python tests/draw.py OUT_DIR [--to=FOLDER] [--layer=layers.3.attention.q_proj]

curves.png      training loss and validation metric over the steps, a band from the lowest to the highest seed
spectrum.png    singular values of dW in one layer, for each method that changes it
signs.png       Sign(DC) of that layer in a Dual LoRA run, at the start and at the end
and on the terminal, where there is a run with --method=full: by layer, how far each method's dW points where full fine-tuning's
does (cosine), and how often they agree on the sign of an entry that both move. Needs matplotlib.
"""
import json
import os
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import train  # noqa: E402
from data.download import model_folder  # noqa: E402
from dual_lora import AdaptedLinear, DualLoRALinear, exact_product, load_adapter, sign  # noqa: E402

GREY = "#808080"  # legible on white and on black


def runs_of(out_dir):
    """{task and method: [folders of finished runs, by seed]}."""
    groups = {}
    for folder in [out_dir, *sorted(path for path in out_dir.iterdir() if path.is_dir())]:
        lines = read_lines(folder)
        if lines and lines[-1].get("final") and "-grid-" not in folder.name:
            settings = lines[-1]["settings"]
            arm = folder.name.rpartition(f"-{settings['seed']}-")[0] if folder != out_dir else settings["method"]
            groups.setdefault(arm or folder.name, []).append(folder)
    return {arm: sorted(folders, key=lambda folder: read_lines(folder)[-1]["settings"]["seed"]) for arm, folders in groups.items()}


def read_lines(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


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


def updates(folder):
    """{layer's name: dW (out, in)} of a finished run, and its model; for full fine-tuning what the linear layers moved by."""
    settings = read_lines(folder)[-1]["settings"]
    cfg = train.Config(**{**settings, "device": "cpu"})
    task = train.named_task(cfg)
    model, _ = train.build(cfg, model_folder(cfg.model), task, torch.device("cpu"))
    before = {name: m.weight.detach().clone() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    load_start = {name: m.start for name, m in model.named_modules() if isinstance(m, DualLoRALinear)}
    load_adapter(model, folder / "adapter.pt")
    dW = {}
    for name, m in model.named_modules():
        if isinstance(m, AdaptedLinear):
            dW[short(name)] = m.delta_weight().detach()
            if name in load_start:
                m.start = load_start[name]  # where training began, not where the file was loaded
        elif name in before and cfg.method == "full":
            dW[short(name)] = m.weight.detach() - before[name]
    return dW, model


def short(name):
    return name.removeprefix("backbone.")


def cosine(a, b):
    return (a.flatten() @ b.flatten() / (a.norm() * b.norm()).clamp(min=1e-30)).item()


def sign_agreement(a, b):
    """Share of entries of one sign among those that both move."""
    both = (a != 0) & (b != 0)
    return (a[both].sign() == b[both].sign()).float().mean().item() if both.any() else float("nan")


def style(plt):
    plt.rcParams.update({"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
                         "savefig.transparent": True, "legend.frameon": False, "savefig.dpi": 130, "figure.constrained_layout.use": True})


def draw_curves(plt, groups, path):
    metric = read_lines(next(iter(groups.values()))[0])[-1]["metric"]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for arm, folders in groups.items():
        for axis, value_of in zip(axes, (lambda line: line.get("loss"), lambda line: line.get("validation", {}).get(metric))):
            steps, mean, low, high = curve(folders, value_of)
            drawn, = axis.plot(steps, mean, label=f"{arm} ({len(folders)} seeds)", linewidth=1.2)
            axis.fill_between(steps, low, high, alpha=0.25, color=drawn.get_color(), linewidth=0)
    axes[0].set(xlabel="step", ylabel="training loss")
    axes[1].set(xlabel="step", ylabel=f"validation {metric}")
    axes[0].legend(fontsize=7)
    figure.savefig(path)


def draw_spectrum(plt, dW, layer, path):
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for arm, layers in dW.items():
        if layer in layers:
            sigma = torch.linalg.svdvals(layers[layer].float())
            axis.semilogy(range(1, len(sigma) + 1), (sigma / sigma[0]).clamp(min=1e-8).numpy(), label=arm, linewidth=1.2)
    axis.set(xlabel=f"singular value of dW, {layer}", ylabel="share of the largest", ylim=(1e-5, 1.5))
    axis.legend(fontsize=7)
    figure.savefig(path)


def draw_signs(plt, layer, name, path, size=96):
    now = sign(exact_product(layer.lora_D, layer.lora_C))
    then = sign(exact_product(layer.start["lora_D"], layer.start["lora_C"]))
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2))
    for axis, values, title in zip(axes, (then, now, -now * then), ("start", "end", f"turned: {100 * (now != then).float().mean():.0f} %")):
        axis.imshow(values[:size, :size].detach().numpy(), cmap="coolwarm", vmin=-1.4, vmax=1.4, interpolation="nearest")
        axis.set(title=title, xticks=[], yticks=[])
    axes[0].set_ylabel(f"Sign(DC), {name}", fontsize=7)
    figure.savefig(path)


def compare_with_full(dW):
    """Lines of a table: cosine and agreement of signs of each method's dW with full fine-tuning's, by layer and on average."""
    full = next((arm for arm in dW if arm.endswith("full")), None)
    rows = []
    for arm, layers in dW.items():
        if full is None or arm == full:
            continue
        figures = {name: (cosine(layers[name], dW[full][name]), sign_agreement(layers[name], dW[full][name])) for name in layers if name in dW[full]}
        rows += [f"{arm:24}{name:36}{c:8.3f}{s:8.3f}" for name, (c, s) in figures.items()]
        rows.append(f"{arm:24}{'mean':36}{statistics.mean(c for c, _ in figures.values()):8.3f}{statistics.mean(s for _, s in figures.values()):8.3f}")
    return [f"{'to full fine-tuning':24}{'layer':36}{'cosine':>8}{'signs':>8}", *rows] if rows else []


def main(arguments):
    options = dict(argument.removeprefix("--").split("=", 1) for argument in arguments if argument.startswith("--") and "=" in argument)
    places = [argument for argument in arguments if not argument.startswith("--")]
    if len(places) != 1 or set(options) - {"to", "layer"} or len(options) + 1 != len(arguments):
        sys.exit(__doc__)
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        sys.exit("draw.py needs matplotlib: pip install matplotlib")
    out_dir, groups = Path(places[0]), runs_of(Path(places[0])) if Path(places[0]).is_dir() else {}
    if not groups:
        sys.exit(f"{out_dir} holds no finished run of train.py")
    to = Path(options.get("to", out_dir))
    to.mkdir(parents=True, exist_ok=True)
    style(plt)
    draw_curves(plt, groups, to / "curves.png")
    found = {arm: updates(folders[0]) for arm, folders in groups.items()}
    dW = {arm: layers for arm, (layers, _) in found.items() if layers}
    adapted = next((layers for arm, (layers, model) in found.items() if any(isinstance(m, AdaptedLinear) for m in model.modules())), {})
    layer = options.get("layer") or (list(adapted)[len(adapted) // 2] if adapted else None)
    if layer is None or not any(layer in layers for layers in dW.values()):
        sys.exit(f"no run adapts {layer}: choose from {', '.join(adapted)}" if adapted else "no run here has adapters: curves alone were drawn")
    draw_spectrum(plt, dW, layer, to / "spectrum.png")
    for _, model in found.values():
        duals = {short(name): m for name, m in model.named_modules() if isinstance(m, DualLoRALinear)}
        if layer in duals:
            draw_signs(plt, duals[layer], layer, to / "signs.png")
            break
    print("\n".join(compare_with_full(dW)))


if __name__ == "__main__":
    main(sys.argv[1:])
