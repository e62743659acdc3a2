"""A gallery of failures: the known ways to get Dual LoRA wrong, what each shows in the log, and what is right.

Each test builds the mistake in a few lines, asserts its symptom, and asserts that the real code does not have it. "The log" is what train.py
writes: the loss, and adapter_report by layer. Where a test of test_dual_lora.py pins the right behaviour down already, the docstring names it.
"""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from dual_lora import (DualLoRALinear, LoRALinear, adapter_report, apply_adapters, load_adapter, merge_adapters, save_adapter, set_warmup,
                       sign_ste)

ALL = ["lora_A", "lora_B", "lora_C", "lora_D"]


class Naive(DualLoRALinear):
    """The formula as one first types it, left to autograd; what is wrong with it is in the subclasses."""
    turn = staticmethod(sign_ste)

    def delta_weight(self):
        return self.scaling * self.warmup * F.relu(self.lora_B @ self.lora_A) * self.turn(self.lora_D @ self.lora_C)

    def forward(self, x):
        return F.linear(x, self.weight + self.delta_weight(), self.bias)


def toy(cls=DualLoRALinear, width=16, **settings):
    """(a layer, inputs x, outputs y of a layer whose weight is a little different)."""
    torch.manual_seed(0)
    base, x = nn.Linear(width, width), torch.randn(256, width)
    y = F.linear(x, base.weight.detach() + 0.3 * torch.randn(width, width) / width**0.5, base.bias.detach())
    return cls(base, r1=4, r2=4, **settings), x, y


def base_loss(layer, x, y):
    return F.mse_loss(F.linear(x, layer.weight, layer.bias), y).item()


def adam(layer, lr):
    return torch.optim.AdamW([p for _, p in layer.adapters()], lr=lr, weight_decay=0.0)


def fit(layer, x, y, warmup=10, lr_warmup=0, lr=0.01):
    """The losses of 40 steps; with warmup=0 dW has its full size from the start."""
    optimizer, losses = adam(layer, lr), []
    for step in range(40):
        set_warmup(layer, min(1.0, step / warmup) if warmup else 1.0)
        optimizer.param_groups[0]["lr"] = lr * (min(1.0, step / lr_warmup) if lr_warmup else 1.0)
        loss = F.mse_loss(layer(x), y)
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def report(layer):
    return adapter_report(layer)[""]


# The start


def test_B_starts_at_zero_as_in_lora():
    """B = 0 is taken over from LoRA, so that dW starts at zero. ReLU'(0) = 0: no gradient reaches any of the four, ever.
    The log: relative_norm 0, frozen 1, all four tensors under `unmoved`, the same loss in every step.
    Right: all four are drawn at random and a factor on dW is warmed up."""
    layer, x, y = toy()
    nn.init.zeros_(layer.lora_B)
    layer.mark_start()
    losses, row = fit(layer, x, y), report(layer)
    assert set(losses) == {base_loss(layer, x, y)}
    assert row["unmoved"] == ALL and row["relative_norm"] == 0 and row["frozen"] == 1
    layer, x, y = toy()
    assert fit(layer, x, y)[-1] < 0.6 * base_loss(layer, x, y) and report(layer)["unmoved"] == []


def test_no_warmup_of_dW():
    """Training starts with the random dW at full size, so not from the pre-trained model.
    The log: the first loss jumps, with init_std 0.3 to more than 20 times the base model's, with 1.0 to more than 1,000 times.
    Right: the factor is 0 in the first step, whose loss is the base model's to the bit."""
    for std, times in ((0.3, 20), (1.0, 1000)):
        layer, x, y = toy(init_std=std)
        assert fit(layer, x, y, warmup=0)[0] > times * base_loss(layer, x, y)
        layer, x, y = toy(init_std=std)
        assert fit(layer, x, y)[0] == base_loss(layer, x, y)


def test_learning_rate_warmup_in_its_place():
    """The learning rate is warmed up and dW is not: the random dW stands at full size while nothing may move it yet.
    The log (init_std 0.3): the first ten losses are on average over 25 times the base model's, worse than with no warm-up at all.
    Right: the factor acts on dW; the first ten are on average below 8 times."""
    (layer, x, y), means = toy(init_std=0.3), {}
    for name, how in {"none": {"warmup": 0}, "rate": {"warmup": 0, "lr_warmup": 10}, "dW": {}}.items():
        losses = fit(copy.deepcopy(layer), x, y, **how)
        means[name] = sum(losses[:10]) / 10 / base_loss(layer, x, y)
    assert means["dW"] < 8 < means["none"] < means["rate"] and means["rate"] > 25


def test_the_warmup_starts_a_little_above_zero():
    """The factor starts at a thousandth, "since a gradient of zero teaches nothing". Adam divides the factor out of the gradients.
    The log: nothing in the loss, but after one step A to D have moved as far as they would have at factor 1, within 5 %.
    Right: at 0 the gradient is exactly 0, and the step moves nothing (test_at_factor_zero_the_model_is_the_base_to_the_bit_*)."""
    def moved(factor):
        layer, x, y = toy(init_std=0.3)
        set_warmup(layer, factor)
        F.mse_loss(layer(x), y).backward()
        adam(layer, 0.01).step()
        return [(p.detach() - layer.start[name]).norm().item() for name, p in layer.adapters()]

    assert moved(1e-3) == pytest.approx(moved(1.0), rel=0.05) and min(moved(1.0)) > 0.05
    assert moved(0.0) == [0.0] * 4


# The sign


def test_torch_sign_instead_of_two_values():
    """torch.sign(0) is 0, a third value: with D = 0, which looks like LoRA's quiet start, no magnitude counts or gets a gradient.
    The log: relative_norm 0, though half of the entries are not frozen. A single row of D at zero is out in the same way.
    Right: zero gives -1, every live entry counts (test_sign_has_two_values_and_zero_is_minus_one)."""
    class Ternary(Naive):
        def turn(self, DC):
            return DC + (torch.sign(DC) - DC).detach()

    for cls, dead in ((Ternary, True), (DualLoRALinear, False)):
        layer, x, y = toy(cls)
        nn.init.zeros_(layer.lora_D)
        F.mse_loss(layer(x), y).backward()
        row = report(layer)
        assert (row["relative_norm"] == 0) == dead and row["frozen"] == pytest.approx(0.5, abs=0.1)
        assert [bool(p.grad.any()) for p in (layer.lora_A, layer.lora_B)] == [not dead] * 2


def test_sign_without_a_straight_through_gradient():
    """torch.sign is left to autograd, whose derivative of it is zero everywhere. The loss falls all the same: A and B learn.
    The log: `unmoved` names C and D, flips_since_start stays 0.
    Right: with the straight-through gradient all four move; after 40 steps more than a tenth of the signs have turned."""
    class NoEstimator(Naive):
        turn = staticmethod(torch.sign)

    for cls, dead in ((NoEstimator, True), (DualLoRALinear, False)):
        layer, x, y = toy(cls)
        assert fit(layer, x, y)[-1] < 0.6 * base_loss(layer, x, y)
        row = report(layer)
        assert row["unmoved"] == (["lora_C", "lora_D"] if dead else [])
        assert row["flips_since_start"] == 0 if dead else row["flips_since_start"] > 0.1


@pytest.mark.parametrize("times, clipped", [(65536, 0.4), (4096, 0.2)], ids=["scaler", "sum"])
def test_the_loss_is_scaled_or_summed(times, clipped):
    """A float16 loss scaler multiplies the loss by 65,536, a sum by the number of targets (here 4,096). The clip is by value.
    The log: clipped above 0.4 and 0.2 instead of 0. Divided by the factor again, the gradient of A and B is what it should be, that of C
    and D below a quarter of it. Right: a mean, and bfloat16 or float32 (test_the_clip_is_by_value_*); train.py refuses float16."""
    def gradients(times):
        layer, x, y = toy(init_std=0.1)
        (times * F.mse_loss(layer(x), y)).backward()
        return [p.grad.norm().item() / times for _, p in layer.adapters()], report(layer)["clipped"]

    (right, none), (wrong, share) = gradients(1), gradients(times)
    assert none == 0 and share > clipped
    assert wrong[:2] == pytest.approx(right[:2], rel=1e-4) and all(w < r / 4 for w, r in zip(wrong[2:], right[2:]))
    with pytest.raises(ValueError, match="loss scaler"):
        train.parse(["--dtype=float16"])


def test_weight_decay_on_C_and_D():
    """AdamW's default decays whatever it is given. The sign is blind to the scale of C and D: decay turns nothing, but the margin shrinks.
    The log (200 steps of lr 0.01, decay 0.5, no gradient at all): flips_since_start 0, direction_margin down to 0.135 of what it was; one
    and the same step on D then turns more than twice as many signs. Right: no decay on adapters, which is train.py's default."""
    def after(decay):
        layer, _, _ = toy(width=64)
        optimizer, before = torch.optim.AdamW([layer.lora_C, layer.lora_D], lr=0.01, weight_decay=decay), report(layer)
        for p in (layer.lora_C, layer.lora_D):
            p.grad = torch.zeros_like(p)
        for _ in range(200):
            optimizer.step()
        decayed = report(layer)
        with torch.no_grad():
            layer.lora_D += 0.002 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).sign()
        assert decayed["flips_since_start"] == 0
        return decayed["direction_margin"] / before["direction_margin"], report(layer)["flips_since_last"]

    (shrunk, many), (whole, few) = after(0.5), after(train.Config.adapter_weight_decay)
    assert shrunk == pytest.approx(0.995**400, rel=0.01) and whole == 1
    assert many > 2 * few > 0.02


# Precision


@pytest.mark.parametrize("r", [4, 32])
def test_BA_and_DC_formed_in_bfloat16(r):
    """By autocast, or with factors kept in bfloat16. LoRA loses a last place by it; here a sign that flips is wrong by twice its entry.
    No log shows it: 0.03 to 0.1 % of the signs, and 3.5 to 7 % of dW, about 2 sqrt(flipped share), against LoRA's 0.2 to 0.4 %.
    Right: BA and DC in float32 under autocast too; no sign flips, and W is off by its own rounding alone (test_signs_are_those_of_float32_*)."""
    torch.manual_seed(0)
    layer, lora = DualLoRALinear(nn.Linear(1024, 1024, bias=False), r1=r, r2=r), LoRALinear(nn.Linear(1024, 1024), r=2 * r)
    nn.init.zeros_(layer.weight), nn.init.normal_(lora.lora_B, std=0.02)

    def error(a, b):
        return ((a.float() - b).norm() / b.norm()).item()

    with torch.no_grad():
        right, (A, B, C, D) = layer.delta_weight(), (p.bfloat16() for _, p in layer.adapters())
        wrong = error(layer.scaling * F.relu(B @ A) * sign_ste(D @ C), right)
        flipped = ((D @ C > 0) != (layer.lora_D @ layer.lora_C > 0)).float().mean().item()
        with torch.autocast("cpu", torch.bfloat16):
            used = layer(torch.eye(1024)).t()  # x = I shows the weight that was used
        assert 0.002 < error(lora.scaling * (lora.lora_B.bfloat16() @ lora.lora_A.bfloat16()), lora.delta_weight()) < 0.004
    assert 3e-4 < flipped < 1e-3 and 0.035 < wrong < 0.07 and wrong == pytest.approx(2 * flipped**0.5, rel=0.3)
    assert (used.sign() == right.sign()).all() and error(used, right) < 0.004


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_adapters_cast_along_with_the_model(cast):
    """model.half() or .bfloat16() narrows every parameter, a naive layer's adapters too; the rounding alone turns some signs.
    The log: in half the loss is NaN after Adam's first step (its 1e-8 is 0 there); in bfloat16 a step of 1e-5 leaves more than half of
    each tensor's entries where they were. Right: adapters stay float32 (test_adapters_stay_float32_when_the_model_is_cast)."""
    class Narrowed(Naive):
        _apply = nn.Module._apply

    for cls, wrong in ((Narrowed, True), (DualLoRALinear, False)):
        torch.manual_seed(0)
        layer = getattr(cls(nn.Linear(256, 256)), cast)()
        then, before = layer.start, [p.detach().clone() for _, p in layer.adapters()]
        assert ((layer.lora_D.float() @ layer.lora_C.float() > 0) != (then["lora_D"] @ then["lora_C"] > 0)).any() == wrong
        x = torch.randn(64, 256, dtype=layer.weight.dtype)
        layer(x).float().square().mean().backward()
        adam(layer, 1e-5).step()
        assert layer(x).isnan().any() == (wrong and cast == "half")
        stuck = [(p == old).float().mean() for old, (_, p) in zip(before, layer.adapters())]
        assert min(stuck) > 0.5 if wrong and cast == "bfloat16" else max(stuck) < 0.01


# Around the layer


def test_merged_in_place_and_subtracted_again(capsys):
    """The update is added to the bfloat16 weight and later subtracted, as loralib does in eval() and train().
    No log shows it: for W0 of 0.02 and dW of 1e-4, a third of dW's entries vanish in the sum, and over 1 % of W0's come back wrong.
    Right: merge_adapters rounds once (test_merging_into_bfloat16_*), prints the share lost, and has no way back; float32 loses below 0.1 %."""
    torch.manual_seed(0)
    linear = nn.Linear(1024, 1024, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    layer = DualLoRALinear(copy.deepcopy(linear).bfloat16(), alpha=0.7)
    W0, dW = layer.weight.detach(), layer.delta_weight().detach()
    moves, merged = dW != 0, W0 + dW.bfloat16()
    lost = (merged == W0)[moves].float().mean().item()
    worn = (merged - dW.bfloat16() != W0)[moves].float().mean().item()
    assert dW[moves].square().mean().sqrt() == pytest.approx(1e-4, rel=0.1) and 0.3 < lost < 0.4 and 0.01 < worn < 0.02
    merge_adapters(layer), merge_adapters(DualLoRALinear(linear, alpha=0.7))
    printed = [float(line.split("lost ")[1].split(" %")[0]) for line in capsys.readouterr().out.splitlines()]
    assert printed[0] == pytest.approx(100 * lost, abs=0.5) and printed[1] < 0.1


def test_an_adapter_where_the_parent_reads_the_weight():
    """nn.MultiheadAttention reads out_proj.weight and never calls the layer; nn.TransformerEncoderLayer does so in evaluation (fast path).
    The log: `unmoved` names all four; on the fast path training sees the adapter and the validation metric stays the base model's.
    Right: apply_adapters refuses (test_layers_whose_owner_reads_the_weight_itself_are_refused)."""
    attention, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(3, 5, 16)
    before = attention(x, x, x)[0]
    attention.out_proj = DualLoRALinear(attention.out_proj, init_std=1.0)
    attention(x, x, x)[0].sum().backward()
    adam(attention.out_proj, 0.01).step()
    assert torch.equal(before, attention(x, x, x)[0]) and adapter_report(attention)["out_proj"]["unmoved"] == ALL

    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    plain = copy.deepcopy(block)
    block.linear1 = DualLoRALinear(block.linear1, init_std=1.0)
    with torch.no_grad():
        assert not torch.allclose(block(x), plain(x), atol=0.1)
        assert torch.equal(block.eval()(x), plain.eval()(x))
    for target in ("out_proj", "linear1"):
        with pytest.raises(ValueError, match="reads this weight itself"):
            apply_adapters(nn.TransformerEncoderLayer(16, 2, 32), [target])


def test_saved_in_the_middle_of_the_warmup_and_loaded_at_factor_one(tmp_path):
    """A state_dict holds A to D and not the factor: what is loaded from one has dW at full size, which is another model, and no error.
    The log: relative_norm is 4 times that of the run, if the factor stood at 0.25.
    Right: save_adapter keeps the factor and load_adapter sets it (test_the_warmup_factor_travels_with_the_file)."""
    (layer, x, _), (other, _, _) = toy(init_std=0.3), toy(init_std=0.3)
    model = nn.Sequential(layer)
    set_warmup(model, 0.25)
    other.load_state_dict(layer.state_dict())
    assert report(other)["relative_norm"] == pytest.approx(4 * report(layer)["relative_norm"])
    assert not torch.allclose(other(x), layer(x), atol=0.1)
    save_adapter(model, tmp_path / "adapter.pt")
    loaded = load_adapter(nn.Sequential(layer.plain_layer(layer.weight.detach())), tmp_path / "adapter.pt")
    assert torch.equal(loaded(x), model(x))
