"""The pictures' figures: runs found and told apart, curves over seeds, updates rebuilt from files, the table, cosines and signs."""
import json
import shutil

import pytest
import torch

import train
from tests import draw
from tests.test_train import toys  # noqa: F401  (a fixture)

SETTINGS = ["--max_steps=12", "--eval_interval=4", "--log_interval=2", "--batch_size=8", "--max_length=64", "--learning_rate=0.01", "--device=cpu"]


@pytest.fixture(scope="module")
def compared(toys, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("compared")
    assert train.main([f"--model={toys / 'bert'}", f"--task={toys / 'classification'}", "--methods=lora,dual_lora,full", "--seeds=2",
                       f"--out_dir={out}", *SETTINGS]) == 0
    return out


def test_curves_have_every_seed_and_their_spread(compared):
    arms = draw.runs_of(compared)["classification"]
    assert {arm: len(folders) for arm, folders in arms.items()} == {"lora": 2, "dual_lora": 2, "full": 2}
    steps, mean, low, high = draw.curve(arms["lora"], lambda line: line.get("loss"))
    assert steps == [2, 4, 6, 8, 10, 12] and all(a <= m <= b for a, m, b in zip(low, mean, high)) and low != high
    assert draw.curve(arms["lora"], lambda line: line.get("validation", {}).get("accuracy"))[0] == [4, 8, 12]


def test_unfinished_runs_and_runs_of_the_grid_are_left_out_and_other_options_do_not_mix(compared, tmp_path):
    one = draw.runs_of(compared)["classification"]["lora"][0]
    for name in ("classification-lora-grid-00000000", "classification-lora-7-00000000", "classification-lora-8-00000000"):
        shutil.copytree(one, tmp_path / name)
    *lines, final = (one / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "classification-lora-7-00000000" / "metrics.jsonl").write_text("\n".join([*lines, final[:50]]))
    assert draw.runs_of(tmp_path) == {"classification": {"classification-lora-8-00000000": [tmp_path / "classification-lora-8-00000000"]}}
    for seed, steps in ((0, 5), (1, 9)):
        changed = json.loads(final)
        changed["settings"].update(seed=seed, max_steps=steps)
        folder = tmp_path / f"classification-lora-{seed}-1111111{seed}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps(changed))
    assert draw.runs_of(tmp_path)["classification"]["lora"] == [folder], "of other options the latest"


def test_methods_come_in_the_comparisons_order_whichever_ran_first(compared, tmp_path):
    shutil.copytree(compared, tmp_path / "out")
    tables = json.loads((compared / "compare.json").read_text())
    tables["classification"].reverse()
    (tmp_path / "out" / "compare.json").write_text(json.dumps(tables))
    assert list(draw.runs_of(compared)["classification"]) == ["lora", "dual_lora", "full"]
    assert list(draw.runs_of(tmp_path / "out")["classification"]) == ["full", "dual_lora", "lora"]


def test_a_comparison_on_held_out_data_is_drawn_too(toys, tmp_path, capsys):  # noqa: F811
    assert train.main([f"--model={toys / 'bert'}", f"--task={toys / 'classification'}", "--methods=lora,dual_lora:direction=none", "--seeds=2", "--held_out=true",
                       f"--out_dir={tmp_path}", "--grid=x1", *[option for option in SETTINGS if "learning_rate" not in option]]) == 0
    assert {arm: len(folders) for arm, folders in draw.runs_of(tmp_path)["classification"].items()} == {"lora": 2, "dual_lora-direction=none": 2}
    pytest.importorskip("matplotlib")
    draw.main([str(tmp_path)])
    assert (tmp_path / "inside.png").exists() and not (tmp_path / "signs.png").exists(), "where no Sign is part of dW, there is none to draw"


def test_the_inside_of_a_run_is_its_reports(compared):
    folder = draw.runs_of(compared)["classification"]["dual_lora"][0]
    lines = [line for line in draw.read_lines(folder) if "layers" in line]
    steps, quantities = draw.inside(folder)
    assert steps == [4, 8, 12] and set(quantities["share frozen"]) == {draw.short(name) for name in lines[0]["layers"]}
    rows = [line["layers"]["backbone.layers.1.attention.q_proj"] for line in lines]
    assert quantities["signs turned per step"]["layers.1.attention.q_proj"] == [row["flips_since_last"] / 4 for row in rows]
    assert quantities["signs turned since the start"]["layers.1.attention.q_proj"] == [row["flips_since_start"] for row in rows]


def test_updates_are_what_training_did(compared):
    for arm, folders in draw.runs_of(compared)["classification"].items():
        dW, layers = draw.updates(folders[0])
        final = draw.read_lines(folders[0])[-1]
        for name, row in final["layers"].items():
            weight = layers[draw.short(name)].weight
            assert (dW[draw.short(name)].norm() / weight.norm()).item() == pytest.approx(row["relative_norm"], rel=1e-4) and row["relative_norm"] > 0
            if arm == "dual_lora":  # `start` is where training began, drawn anew
                m = layers[draw.short(name)]
                turned = (m.lora_D @ m.lora_C > 0) != (m.start["lora_D"] @ m.start["lora_C"] > 0)
                assert turned.float().mean().item() == pytest.approx(row["flips_since_start"]) and turned.any()
        if arm == "full":
            assert dW["layers.1.mlp.down_proj"].norm() > 0
            row = draw.rows_of_full(dW, layers, ["layers.1.mlp.down_proj"])["layers.1.mlp.down_proj"]
            assert 1 < row["effective_rank"] <= row["numerical_rank"] <= 16 and 0 < row["relative_norm"] < 1


def test_differences_are_the_tables_in_points(compared, tmp_path):
    found, first = draw.differences(compared)
    lines = {line["method"]: line for line in json.loads((compared / "compare.json").read_text())["classification"]}
    assert first == "lora" and list(found) == ["dual_lora", "full"]
    for arm, tasks in found.items():
        assert tasks == {"classification": pytest.approx([100 * x for x in (lines[arm]["difference"], *lines[arm]["interval"])])}
    assert draw.differences(tmp_path) == ({}, None), "no comparison, no picture"


def test_cosine_and_agreement_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [-2.0, 3.0]]), torch.tensor([[2.0, 5.0], [1.0, 0.5]])
    assert draw.cosine(a, a) == pytest.approx(1) and draw.cosine(a, -a) == pytest.approx(-1)
    assert draw.cosine(a, b) == pytest.approx((2 - 2 + 1.5) / (14 ** 0.5 * 30.25 ** 0.5))
    assert draw.sign_agreement(a, b) == pytest.approx(2 / 3)


def test_the_table_has_a_row_a_layer_and_their_mean_last():
    lines = draw.table({"lora": {"a": {"relative_norm": 0.1}, "b": {"relative_norm": 0.3}}, "dual_lora": {"a": {"frozen": 0.5}}})
    assert [line.split() for line in lines[1:]] == [["lora", "a", "0.1000"], ["lora", "b", "0.3000"], ["lora", "mean", "0.2000"],
                                                    ["dual_lora", "a", "0.500"], ["dual_lora", "mean", "0.500"]]
    assert len({len(line) for line in lines}) == 1


def test_the_command_draws_all_and_prints_the_table(compared, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    draw.main([str(compared), f"--to={tmp_path}"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "differences.png", "inside.png", "signs.png", "spectrum.png"]
    assert all(2000 < p.stat().st_size < 120_000 for p in tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert shown.count("q_proj") == 6 and shown.count("mean") == 3, "two adapted layers and three methods"


def test_each_task_has_its_pictures(toys, tmp_path, capsys):  # noqa: F811
    pytest.importorskip("matplotlib")
    assert train.main([f"--model={toys / 'bert'}", f"--task={toys / 'pairs'},{toys / 'regression'}", "--methods=dual_lora:magnitude=none,head",
                       "--seeds=1", f"--out_dir={tmp_path}", *SETTINGS]) == 0
    draw.main([str(tmp_path)])
    names = {f"{kind}-{task}.png" for kind in ("curves", "inside", "signs", "spectrum") for task in ("pairs", "regression")}
    assert {p.name for p in tmp_path.glob("*.png")} == names
    assert capsys.readouterr().out.count("dual_lora-magnitude=none") == 2 * 5, "four layers and their mean, for each task"


@pytest.mark.parametrize("arguments, words", [(["--layer=layers.9.x"], "choose from layers.0.attention.q_proj"), (["--layer"], "'--layer' is no option"),
                                              (["--lyaer=x"], "'--lyaer=x' is no option"), (["more"], "give one out_dir")])
def test_what_is_wrong_is_one_line_and_nothing_is_drawn(arguments, words, compared, tmp_path):
    with pytest.raises(SystemExit) as stop:
        draw.main([str(compared), f"--to={tmp_path / 'pictures'}", *arguments])
    assert words in str(stop.value) and "\n" not in str(stop.value) and not (tmp_path / "pictures").exists()
    with pytest.raises(SystemExit, match="holds no finished run"):
        draw.main([str(tmp_path)])
