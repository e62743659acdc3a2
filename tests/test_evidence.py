"""tests/evidence on tiny sizes: the benchmark's rows and counts, the pictures, the comparison's choices and table."""
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent / "evidence"))

import benchmark  # noqa: E402
import compare  # noqa: E402
import draw  # noqa: E402
import train  # noqa: E402
from dual_lora import DualLoRALinear, LoRALinear, apply_adapters, save_adapter  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Importing peft and compiling take longer than all else here."""
    monkeypatch.setattr(benchmark, "HAS_PEFT", False)
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)


def rows_of(text):
    """{first cell: other cells} of a Markdown table."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {name: cells for name, *cells in lines[1:]}


def test_a_layers_table_has_a_row_a_method_and_the_ratio_to_full_training(capsys):
    benchmark.main(["--shapes=24x16", "--tokens=8", "--rank=2", "--rounds=2", "--device=cpu"])
    shown = capsys.readouterr().out
    rows = rows_of(shown)
    assert torch.__version__ in shown.splitlines()[0] and "--shapes=24x16" in shown.splitlines()[0]
    names = ["full", "dual_lora", "dual_lora, compiled", "plain autograd", "plain autograd, compiled", "lora", "dora"]
    assert list(rows)[:7] == names
    assert rows["full"][3] == "1.00 (1.00 to 1.00)"
    assert all(float(cells[2]) > 0 for cells in rows.values())


def test_dual_lora_keeps_its_input_and_plain_autograd_five_matrices():
    layers, x = benchmark.build_layers((40, 24), 2, torch.float32, CPU), torch.randn(5, 24, requires_grad=True)
    kept = {name: benchmark.kept_bytes(lambda: layers[name](x), layers[name].parameters())
            for name in ("full", "dual_lora", "plain autograd", "lora")}
    matrix = 4 * 40 * 24
    assert kept["full"] == 4 * 5 * 24
    assert kept["dual_lora"] <= kept["lora"] < matrix
    assert kept["plain autograd"] >= 3 * matrix


def test_a_models_table_has_a_row_a_method_on_one_copy_of_the_weights(monkeypatch):
    tiny = benchmark.LLAMA(50, n_layer=1, n_head=2, n_embd=16, n_inner=24, n_kv_head=1)
    monkeypatch.setitem(benchmark.MODELS, "tiny", (tiny, benchmark.LLAMA_TARGETS))
    tables = benchmark.model_tables("tiny", [(2, 4), (1, 6)], 2, False, 2, CPU, None)
    assert list(tables) == [(2, 4), (1, 6)]
    rows = rows_of(tables[2, 4])
    assert {"lora", "lora, compiled", "dora", "dual_lora", "dual_lora, compiled", "full"} <= set(rows)
    assert rows["dual_lora"][4] == rows["lora"][4] != rows["full"][4]  # trainable parameters
    base = benchmark.base_model(tiny, CPU)
    model = benchmark.build_model("dual_lora", base, ["q_proj"], 2)
    adapted, plain = model.layers[0].attention.q_proj, base.layers[0].attention.q_proj
    assert isinstance(adapted, DualLoRALinear) and type(plain) is nn.Linear and adapted.weight is plain.weight


def test_the_prediction_is_larger_as_it_is_than_compiled():
    speeds = {"bytes": 3e12, "float32": 50e12, "bfloat16": 600e12}
    fused, plain = (benchmark.seconds_for_dW(4096**2, 32, 2, compiled, speeds) for compiled in (True, False))
    assert 0.3e-3 < fused < plain < 2e-3


def test_the_picture_of_dW_is_drawn_from_two_adapter_files(tmp_path):
    pytest.importorskip("matplotlib")
    for name, layer in (("dual", DualLoRALinear), ("lora", LoRALinear)):
        (tmp_path / name).mkdir()
        model = apply_adapters(nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 30)), ["0", "1"], layer)
        nn.init.normal_(model[1].lora_B)
        save_adapter(model, tmp_path / name / "adapter.pt")
    draw.main(["dW", str(tmp_path / "dW.png"), str(tmp_path / "dual"), str(tmp_path / "lora")])
    assert 1_000 < (tmp_path / "dW.png").stat().st_size < 150_000
    with pytest.raises(SystemExit, match="has no DualLoRALinear 7: choose from 0, 1"):
        draw.main(["dW", str(tmp_path / "x.png"), str(tmp_path / "dual"), str(tmp_path / "lora"), "7"])


@pytest.mark.parametrize("kind", ["rates", "steps"])
def test_curves_are_drawn_from_runs(tmp_path, kind):
    pytest.importorskip("matplotlib")
    runs = [{"task": task, "method": method, "learning_rate": rate, "seed": seed, "held_out": kind == "rates",
             "metric": "accuracy", "value": 0.5 + rate, "curve": [[1, 0.5], [2, 0.6 + rate]], "options": {"seed": seed}}
            for task in ("cola", "stsb") for method in ("lora", "dual_lora") for rate in (1e-3, 2e-3)
            for seed in (0, 1)]
    diverged = {**runs[0], "value": None}
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in [*runs, diverged]))
    draw.main([kind, str(tmp_path / "out.png"), str(tmp_path / "runs.jsonl")])
    assert 1_000 < (tmp_path / "out.png").stat().st_size < 150_000


def test_runs_with_other_options_are_another_line():
    run = {"method": "lora", "options": {"seed": 0, "max_steps": 9}}
    assert list(draw.by_label([run, {**run, "options": {"seed": 1, "max_steps": 9}}])) == ["lora"]
    assert list(draw.by_label([run, {**run, "options": {"seed": 0, "max_steps": 9, "r": 16}}])) == ["lora", "lora r 16"]


# compare.py. Training is replaced by a table of results; the runs themselves are train.py's, tested there.


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """compare(*options) -> (its result, the runs that it made)."""
    made = []

    def run_one(cfg, out_dir):
        made.append(cfg)
        best = {"lora": 1e-3, "dual_lora": 4e-3, "full": 2e-5, "dora": 4e-3}[cfg.method]
        value = 0.5 - abs(cfg.learning_rate - best) * 10 + 0.01 * cfg.seed ** 2 * (cfg.method == "dual_lora")
        return {"options": compare.identity(cfg), "value": value, "metric": "accuracy", "trainable": 10, "seconds": 1}

    monkeypatch.setattr(compare, "run_one", run_one)

    def run(*options):
        made.clear()
        assert compare.main([f"--out_dir={tmp_path}", "--max_steps=5", *options]) == 0
        return json.loads((tmp_path / "tables.json").read_text()), list(made)
    return run


def test_each_method_takes_the_best_rate_of_the_grid_on_held_out_data(compared):
    result, made = compared("--methods=lora,dora@lora,dual_lora,full", "--seeds=2", "--grid=1e-3,4e-3",
                            "--full_grid=2e-5,1e-4")
    rates = {row["method"]: row["rates"]["sarcasm"] for row in result["rows"]}
    assert rates == {"lora": 1e-3, "dora@lora": 1e-3, "dual_lora": 4e-3, "full": 2e-5}
    grid = [cfg for cfg in made if cfg.held_out]
    assert len(grid) == 6 and {cfg.seed for cfg in grid} == {compare.GRID_SEED}
    assert {(cfg.seed, cfg.held_out) for cfg in made if cfg not in grid} == {(0, False), (1, False)}


def test_finished_runs_are_not_made_again(compared):
    _, first = compared("--methods=lora,dual_lora", "--seeds=2", "--learning_rate=1e-3")
    _, second = compared("--methods=lora,dual_lora", "--seeds=3", "--learning_rate=1e-3")
    assert (len(first), len(second)) == (4, 2)


def test_a_task_and_a_method_may_bring_options(compared):
    _, made = compared("--task=sarcasm,quartz:max_steps=7", "--methods=lora:r=16", "--seeds=1", "--learning_rate=1e-3",
                       "--max_steps=3")
    assert [(cfg.task, cfg.max_steps, cfg.r) for cfg in made] == [("sarcasm", 3, 16), ("quartz", 7, 16)]


def test_differences_are_paired_by_seed_with_students_interval(compared):
    result, _ = compared("--methods=lora,dual_lora", "--seeds=4", "--learning_rate=4e-3")
    lora, dual = (row["values"]["sarcasm"] for row in result["rows"])
    difference, width = result["rows"][1]["difference"]["sarcasm"]
    scipy_stats = pytest.importorskip("scipy.stats")
    interval = scipy_stats.ttest_rel(dual, lora).confidence_interval(0.95)
    assert difference == pytest.approx(sum(dual) / 4 - sum(lora) / 4)
    assert (difference - width, difference + width) == pytest.approx((interval.low, interval.high), abs=1e-4)


@pytest.mark.parametrize("method", ["no_relu", "no_sign", "loha"])
def test_an_ablation_leaves_out_what_its_name_says(method):
    layer = train.METHODS[method][0](nn.Linear(6, 5), r1=2, r2=2, init_std=1.0)
    BA, DC = layer.lora_B @ layer.lora_A, layer.lora_D @ layer.lora_C
    magnitude = BA if method in ("no_relu", "loha") else BA.relu()
    direction = DC if method in ("no_sign", "loha") else torch.where(DC > 0, 1.0, -1.0)
    x = torch.randn(3, 6)
    W = layer.weight + layer.scaling * magnitude * direction
    torch.testing.assert_close(layer(x), F.linear(x, W, layer.bias))
