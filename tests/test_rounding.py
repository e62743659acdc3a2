"""tests/rounding.py: each way trains with its own layer, and the two differ by what rounding loses."""
import copy
import json
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn

import rounding
import train
from dual_lora import DualLoRALinear


def small():
    torch.manual_seed(0)
    return nn.Linear(64, 48, dtype=torch.bfloat16)


def test_two_products_keep_what_one_product_rounds_away():
    one, two = DualLoRALinear(small(), alpha=1e-3), rounding.TwoProducts(small(), alpha=1e-3)
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        one.weight.fill_(1.0), two.weight.fill_(1.0)  # half a unit in the last place of 1 is 0.002; dW is below 1e-5
        x = torch.zeros(1, 64, dtype=torch.bfloat16)
        assert torch.equal(one(x + 1), one.plain_layer(one.weight)(x + 1)), "lost"
    assert two.train(False)(x).shape == (1, 48) and not two.training
    for layer in (one, two):
        assert torch.autograd.grad(layer(torch.randn(5, 64, dtype=torch.bfloat16)).float().sum(), layer.lora_B)[0].any()
    exact = torch.nn.functional.linear(torch.eye(64), two.delta_weight()).detach()  # (in, out)
    two.bias = None
    with torch.no_grad():
        two.weight.zero_()
        torch.testing.assert_close(two(torch.eye(64, dtype=torch.bfloat16)).float(), exact, rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("way", rounding.WAYS)
def test_each_way_trains_with_its_own_layer_and_dtype(way, tmp_path, monkeypatch):
    seen, dtype, layer = [], *rounding.WAYS[way]

    def stand_in(cfg):
        model = train.apply_adapters(nn.Sequential(OrderedDict(q_proj=copy.deepcopy(small()))), ["q_proj"], r1=2, r2=2, dropout=0.0)
        seen.append((type(model.q_proj), cfg.dtype, cfg.weights))
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "layers": {"a": {"lost": 0.25}, "b": {"lost": 0.75}}}))
        return {"value": 0.5}

    monkeypatch.setattr(train, "train", stand_in)
    before = train.apply_adapters
    assert rounding.run(train.Config(), dtype, layer, str(tmp_path)) == (0.5, {3: 0.5})
    assert seen == [(layer, dtype, dtype)] and train.apply_adapters is before
