"""The pictures' figures: curves over seeds, updates rebuilt from files, cosines and signs."""
import pytest
import torch

import train
from tests import draw
from tests.test_train import toys  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def compared(toys, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("compared")
    assert train.main([f"--model={toys / 'bert'}", f"--task={toys / 'classification'}", "--methods=lora,dual_lora,full", "--seeds=2", "--learning_rate=0.01",
                       "--max_steps=12", "--eval_interval=4", "--log_interval=2", "--batch_size=8", "--max_length=64", f"--out_dir={out}", "--device=cpu"]) == 0
    return out


def test_curves_have_every_seed_and_their_spread(compared):
    groups = draw.runs_of(compared)
    assert {arm: len(folders) for arm, folders in groups.items()} == {"classification-lora": 2, "classification-dual_lora": 2, "classification-full": 2}
    folders = next(iter(groups.values()))
    steps, mean, low, high = draw.curve(folders, lambda line: line.get("loss"))
    assert steps == [2, 4, 6, 8, 10, 12] and all(a <= m <= b for a, m, b in zip(low, mean, high)) and low != high
    assert draw.curve(folders, lambda line: line.get("validation", {}).get("accuracy"))[0] == [4, 8, 12]


def test_updates_are_what_training_did(compared):
    for arm, folders in draw.runs_of(compared).items():
        dW, model = draw.updates(folders[0])
        final = draw.read_lines(folders[0])[-1]
        for name, row in final["layers"].items():
            assert dW[draw.short(name)].norm() > 0
            weight = model.get_submodule(name).weight
            assert (dW[draw.short(name)].norm() / weight.norm()).item() == pytest.approx(row["relative_norm"], rel=1e-4)
        if arm.endswith("full"):
            assert "layers.1.mlp.down_proj" in dW and dW["layers.1.mlp.down_proj"].norm() > 0


def test_cosine_and_agreement_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [-2.0, 3.0]]), torch.tensor([[2.0, 5.0], [1.0, 0.5]])
    assert draw.cosine(a, a) == pytest.approx(1) and draw.cosine(a, -a) == pytest.approx(-1)
    assert draw.cosine(a, b) == pytest.approx((2 - 2 + 1.5) / (14 ** 0.5 * 30.25 ** 0.5))
    assert draw.sign_agreement(a, b) == pytest.approx(2 / 3)


def test_the_command_draws_all_and_prints_the_cosines(compared, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    draw.main([str(compared), f"--to={tmp_path}"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "signs.png", "spectrum.png"]
    assert all(p.stat().st_size > 2000 for p in tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert shown.count("q_proj") == 4 and shown.count("mean") == 2, "two adapted layers and two methods"
    with pytest.raises(SystemExit, match="choose from layers.0.attention.q_proj"):
        draw.main([str(compared), f"--to={tmp_path}", "--layer=layers.9.x"])
    with pytest.raises(SystemExit, match="holds no finished run"):
        draw.main([str(tmp_path)])
