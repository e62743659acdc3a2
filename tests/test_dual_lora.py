"""The properties of dual_lora.py: the formula, its gradients, what is kept in memory, precision, and every verb."""
import ast
import copy
import importlib.util
import os
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dual_lora
from dual_lora import (DoRALinear, DualLoRALinear, LoRALinear, SignSTE, adapter_report, adapter_state_dict, apply_adapters,
                       load_adapter, merge_adapters, save_adapter, set_warmup, sign_ste)

LAYERS = [DualLoRALinear, LoRALinear, DoRALinear]
ADAPTERS = ("lora_A", "lora_B", "lora_C", "lora_D")


def make(out=24, inn=32, bias=True, dtype=torch.float32, seed=0, cls=DualLoRALinear, std=0.3, **kwargs):
    """An adapted layer whose adapter tensors are all large enough to matter."""
    torch.manual_seed(seed)
    layer = cls(nn.Linear(inn, out, bias=bias, dtype=dtype), **kwargs)
    for _, p in layer.adapters():
        nn.init.normal_(p, std=std)
    return layer


class Net(nn.Module):
    def __init__(self, width=32, n_classes=3):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, n_classes)

    def forward(self, x):
        return self.head(x + self.down_proj(F.gelu(self.up_proj(x))))


def fingerprint(model):
    """Everything that an error must leave as it was."""
    return ([(n, type(m)) for n, m in model.named_modules()],
            [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()])


@contextmanager
def leaves_unchanged(model):
    before = fingerprint(model)
    yield
    assert fingerprint(model) == before


# The sign


def test_sign_has_two_values_and_zero_is_minus_one():
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0])
    assert sign_ste(x).tolist() == [-1, -1, -1, 1, 1]
    assert sign_ste(x.double()).dtype == torch.float64 and sign_ste(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("ste, expected", [("clip", [1.0, -1.0, 0.5, 1.0]), ("xnor", [4.0, 0.0, 0.5, 0.0]),
                                           ("identity", [4.0, -7.0, 0.5, 2.0])])
def test_each_estimator_passes_the_gradient_that_it_promises(ste, expected):
    x = torch.tensor([0.5, -3.0, 1.0, 1.1], requires_grad=True)
    sign_ste(x, ste).backward(torch.tensor([4.0, -7.0, 0.5, 2.0]))
    assert x.grad.tolist() == expected


def test_unknown_estimator_is_refused_by_name():
    with pytest.raises(ValueError, match="'dorefa'.*clip, xnor, identity"):
        sign_ste(torch.zeros(1), "dorefa")
    assert SignSTE.apply(torch.zeros(1), "clip").item() == -1


# The formula and its gradients


def test_delta_weight_is_the_formula_entry_by_entry():
    layer = make(5, 7, r1=2, r2=3, alpha=6.0)
    set_warmup(layer, 0.25)
    A, B, C, D = (getattr(layer, name).tolist() for name in ADAPTERS)
    for i in range(5):
        for j in range(7):
            magnitude = max(0.0, sum(B[i][k] * A[k][j] for k in range(2)))
            direction = 1 if sum(D[i][k] * C[k][j] for k in range(3)) > 0 else -1
            assert layer.delta_weight()[i, j].item() == pytest.approx(0.25 * 6.0 / 6**0.5 * magnitude * direction, abs=1e-6)


@pytest.mark.parametrize("ste", ["clip", "xnor", "identity"])
@pytest.mark.parametrize("magnitude", ["relu", "none"])
@pytest.mark.parametrize("direction", ["sign", "none"])
@pytest.mark.parametrize("block", [1, 1000])
def test_forward_and_gradients_equal_plain_autograd_on_the_formula(ste, magnitude, direction, block, monkeypatch):
    monkeypatch.setattr(dual_lora, "row_blocks", lambda B, A: [slice(s, s + block * 5) for s in range(0, len(B), block * 5)])
    layer = make(r1=3, r2=2, ste=ste, magnitude=magnitude, direction=direction, alpha=1.0, std=1.0).double()
    layer.bias.requires_grad_(True), layer.weight.requires_grad_(True)
    set_warmup(layer, 0.75)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    inputs = [x, layer.weight, layer.bias, *(p for _, p in layer.adapters())]
    gy = torch.randn(2, 5, 24, dtype=torch.float64)
    y, reference = layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias)
    torch.testing.assert_close(y, reference)
    ours, plain = torch.autograd.grad(y, inputs, gy), torch.autograd.grad(reference, inputs, gy)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)
    if (ste, direction) == ("clip", "sign"):
        assert layer.clip_count[0] > 0, "the clip must bite here, or the test says nothing about it"


def test_gradients_equal_a_straight_through_result_worked_out_by_hand():
    # One weight, one token: y = (w + s relu(b a) sign(d c)) x with s = alpha = 2, a = 0.5, b = 3, c = 0.2, d = -1, x = 4, dL/dy = 1.
    # G = 4; W_m = 1.5, W_d = -1; g_m = s G W_d = -8, so db = -8 a = -4, da = -8 b = -24;
    # g_d = clip(s G W_m = 12) = 1, so dd = c = 0.2, dc = d = -1.
    layer = make(1, 1, bias=False, r1=1, r2=1, alpha=2.0)
    with torch.no_grad():
        for name, value in zip(ADAPTERS, (0.5, 3.0, 0.2, -1.0)):
            getattr(layer, name).fill_(value)
        layer.weight.fill_(10.0)
    y = layer(torch.tensor([4.0]))
    assert y.item() == pytest.approx(4 * (10 - 2 * 1.5))
    y.backward()
    assert [getattr(layer, name).grad.item() for name in ADAPTERS] == pytest.approx([-24.0, -4.0, -1.0, 0.2])


def test_without_relu_and_sign_it_is_loha_and_its_gradient_is_the_true_one():
    layer = make(4, 3, r1=2, r2=2, magnitude="none", direction="none").double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    args = tuple(p for _, p in layer.adapters())

    def run(x, A, B, C, D):
        return dual_lora.DualLinear.apply(x, layer.weight, layer.bias, A, B, C, D, layer.scaling * layer.warmup, layer.clip_count,
                                          torch.float64, "none", "none", "clip", False)

    assert torch.autograd.gradcheck(run, (x, *args))


@pytest.mark.parametrize("shape", [(32,), (0, 32), (2, 3, 4, 32)])
def test_any_leading_shape_is_welcome(shape):
    layer = make()
    y = layer(torch.randn(shape))
    y.sum().backward()
    assert y.shape == (*shape[:-1], 24) and layer.lora_A.grad.shape == layer.lora_A.shape


def test_a_layer_called_twice_in_one_pass_adds_its_gradients():
    layer, x = make(32, 32), torch.randn(4, 32)
    layer(layer(x)).pow(2).sum().backward()
    ours = [p.grad.clone() for _, p in layer.adapters()]
    layer.zero_grad()
    W = layer.weight + layer.delta_weight()
    F.linear(F.linear(x, W, layer.bias), W, layer.bias).pow(2).sum().backward()
    for a, (_, p) in zip(ours, layer.adapters()):  # the clip acts on each call's gradient, so compare where it does not bite
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-4) if a is ours[0] or a is ours[1] else None


# Step 0


def test_at_factor_zero_the_model_is_the_base_to_the_bit_and_a_step_moves_nothing():
    base = Net()
    x = torch.randn(6, 32)
    expected = base(x)
    model = apply_adapters(copy.deepcopy(base), ["up_proj", "down_proj"])
    set_warmup(model, 0)
    y = model(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert all(p.grad is not None and not p.grad.any() for p in adapters)
    before = [p.clone() for p in adapters]
    torch.optim.AdamW(adapters, lr=0.1, weight_decay=0.0).step()
    assert all(torch.equal(a, b) for a, b in zip(before, adapters))


def test_at_factor_zero_nothing_is_built(monkeypatch):
    layer = make()
    set_warmup(layer, 0.0)
    monkeypatch.setattr(dual_lora, "parts", None)
    layer(torch.randn(3, 32)).sum().backward()
    set_warmup(layer, 0.5)
    with pytest.raises(TypeError):
        layer(torch.randn(3, 32))


def test_every_matrix_gets_a_gradient_at_the_start_but_none_could_leave_a_zero_start():
    torch.manual_seed(0)
    layer, x = DualLoRALinear(nn.Linear(32, 24)), torch.randn(8, 32)
    layer(x).pow(2).sum().backward()
    assert all(p.grad.any() for _, p in layer.adapters())
    with torch.no_grad():
        layer.lora_B.zero_()
    layer.zero_grad()
    layer(x).pow(2).sum().backward()
    assert not layer.lora_A.grad.any() and not layer.lora_B.grad.any(), "why B = 0 is not an option"


def test_the_warmup_factor_is_a_buffer_that_is_not_saved_and_scales_dw():
    layer = make()
    whole = layer.delta_weight()
    set_warmup(layer, 0.5)
    torch.testing.assert_close(layer.delta_weight(), whole / 2)
    assert "warmup" in dict(layer.named_buffers()) and "warmup" not in layer.state_dict()
    for bad in (-0.1, 1.1, float("nan"), "1", None, True):
        with pytest.raises(ValueError, match="warm-up factor"):
            set_warmup(layer, bad)
    with pytest.raises(ValueError, match="no Dual LoRA layer"):
        set_warmup(nn.Linear(2, 2), 1.0)


# Memory and arithmetic


def kept(layer, x):
    """Bytes of every distinct storage that one forward pass keeps for the backward pass, and the shapes kept."""
    storages, shapes = {}, []

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        shapes.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(storages.values()), shapes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_of_the_weights_shape_is_kept_but_the_weight(dropout):
    x = torch.randn(64, 300, requires_grad=True)
    torch.manual_seed(0)
    dual = DualLoRALinear(nn.Linear(300, 200), r1=4, r2=4, dropout=dropout)
    lora = LoRALinear(nn.Linear(300, 200), r=8, dropout=dropout)
    (ours, shapes), (theirs, _) = kept(dual, x), kept(lora, x)
    assert ours <= 1.05 * theirs, f"{ours} bytes kept, LoRA keeps {theirs}"
    large = [shape for shape in shapes if shape in ((200, 300), (300, 200))]
    assert len(large) == 1, "the frozen weight, once, and nothing else of its shape"


@pytest.mark.parametrize("dropout, products", [(0.0, 3), (0.1, 5)])
def test_a_step_takes_three_large_products_and_five_with_dropout(dropout, products):
    layer = DualLoRALinear(nn.Linear(64, 48), dropout=dropout)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(100, 64, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == products * 2 * 100 * 64 * 48


def test_with_dropout_the_mask_is_kept_at_a_byte_an_entry_and_no_second_input():
    plain, dropped = (kept(DualLoRALinear(nn.Linear(300, 200), dropout=p), torch.randn(64, 300, requires_grad=True))[0] for p in (0.0, 0.1))
    assert dropped - plain == 64 * 300


@pytest.mark.parametrize("dropout, products", [(0.0, 2), (0.1, 3)])
def test_a_first_layer_computes_no_gradient_for_its_input(dropout, products):
    layer = DualLoRALinear(nn.Linear(64, 48), dropout=dropout)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(100, 64)).sum().backward()
    assert counter.get_total_flops() == products * 2 * 100 * 64 * 48


def test_frozen_adapters_compute_no_gradient_of_the_weight():
    layer = DualLoRALinear(nn.Linear(64, 48)).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(100, 64, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 100 * 64 * 48


@pytest.mark.parametrize("needs_weight", [False, True])
def test_with_dropout_all_gradients_are_those_of_the_two_products(needs_weight):
    layer = make(dropout=0.4, std=0.5).double()
    layer.weight.requires_grad_(needs_weight), layer.bias.requires_grad_(True)
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    inputs = [t for t in (x, layer.weight, layer.bias, *(p for _, p in layer.adapters())) if t.requires_grad]
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    reference = F.linear(x, layer.weight, layer.bias) + F.linear(F.dropout(x, 0.4), layer.delta_weight())
    gy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, gy), torch.autograd.grad(reference, inputs, gy)):
        torch.testing.assert_close(ours, theirs)


def test_the_report_says_what_rounding_loses():
    torch.manual_seed(0)
    plain = nn.Linear(256, 256, bias=False)
    nn.init.normal_(plain.weight, std=0.02)
    narrow = DualLoRALinear(copy.deepcopy(plain).bfloat16(), alpha=0.7)  # dW of 1e-4
    assert 0.3 < adapter_report(narrow)[""]["lost"] < 0.4
    assert adapter_report(DualLoRALinear(plain, alpha=0.7))[""]["lost"] < 1e-3


def test_dropout_drops_the_adapters_input_only_and_only_in_training():
    layer = make(dropout=0.5)
    x = torch.randn(2000, 32)
    layer.eval()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta_weight(), layer.bias))
    layer.train()
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    reference = F.linear(x, layer.weight, layer.bias) + F.linear(F.dropout(x, 0.5), layer.delta_weight())
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)


# Precision


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_output_has_the_dtype_of_the_plain_layer_and_gradients_are_float32(cls, base, autocast, training):
    plain = nn.Linear(32, 24, dtype=base)
    layer = cls(copy.deepcopy(plain), dropout=0.1).train(training)
    x = torch.randn(5, 32, dtype=torch.float32 if autocast else base, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = layer(x), plain(x)
    assert y.dtype == expected.dtype
    y.float().sum().backward()
    assert x.grad.dtype == x.dtype
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for _, p in layer.adapters())


def test_mixed_dtypes_without_autocast_are_the_plain_layers_own_error():
    with pytest.raises(RuntimeError):
        DualLoRALinear(nn.Linear(8, 8, dtype=torch.bfloat16))(torch.randn(2, 8))


@contextmanager
def reduced_precision():
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def test_signs_are_those_of_float32_whatever_autocast_and_matmul_precision_say():
    torch.manual_seed(0)
    layer = DualLoRALinear(nn.Linear(256, 512, bias=False), r1=16, r2=16)
    with torch.no_grad():
        layer.weight.zero_()
    exact = layer.double().delta_weight().detach()
    layer.float()
    with reduced_precision():
        forward = layer(torch.eye(256)).t()  # x = I shows the weight that was used, rounded to bfloat16
        formula = layer.delta_weight()
        report = adapter_report(layer)[""]
    rounded_first = (layer.lora_D.bfloat16() @ layer.lora_C.bfloat16() > 0) != (layer.lora_D @ layer.lora_C > 0)
    assert rounded_first.float().mean() > 1e-4, "bfloat16 factors do flip signs here"
    assert ((formula > 0) == (exact > 0)).all() and ((forward > 0) == (exact > 0)).all()
    torch.testing.assert_close(formula, exact.float(), rtol=1e-5, atol=1e-8)
    assert report["frozen"] == pytest.approx((exact == 0).double().mean().item(), abs=1e-6)  # from a float32 mean


def test_every_low_rank_product_is_made_with_full_precision_switched_on(monkeypatch):
    # What the switch does can be seen on a GPU only (the test below); that it is on, everywhere.
    seen, parts, product = [], dual_lora.parts, torch.Tensor.__matmul__

    def spy(*args):
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        return parts(*args)

    layer = make()
    monkeypatch.setattr(dual_lora, "parts", spy)
    with reduced_precision():
        layer(torch.randn(3, 32)).float().sum().backward()
    assert seen == [("highest", False)] * 2, "forward and backward"
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"))) or product(a, b))
    seen.clear()
    with reduced_precision():
        layer.delta_weight(), adapter_report(layer), merge_adapters(layer)
    assert len(seen) >= 8 and set(seen) == {("highest", False)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: TF32 exists only there")
def test_on_cuda_tf32_and_bfloat16_flip_no_sign_and_the_cpu_merges_what_the_gpu_trained():
    torch.manual_seed(0)
    layer = DualLoRALinear(nn.Linear(1024, 1024, bias=False), r1=16, r2=16)
    with torch.no_grad():
        layer.weight.zero_()
    exact = copy.deepcopy(layer).double().delta_weight()
    on_gpu = copy.deepcopy(layer).cuda()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for enabled in (False, True):
            with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
                used = on_gpu(torch.eye(1024, device="cuda")).t().double().cpu()
            assert ((used > 0) != (exact > 0)).double().mean() < 1e-6
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    merged = merge_adapters(layer).weight
    torch.testing.assert_close(on_gpu.delta_weight().cpu(), merged, rtol=1e-5, atol=1e-7)


def test_gradients_under_autocast_are_near_the_exact_ones():
    layer, x = make(128, 96, r1=8, r2=8), torch.randn(64, 96)
    layer(x).square().mean().backward()
    exact = [p.grad.clone() for _, p in layer.adapters()]
    layer.zero_grad()
    with reduced_precision():
        layer(x).float().square().mean().backward()
    for g, (_, p) in zip(exact, layer.adapters()):
        assert (g - p.grad).norm() < 0.02 * g.norm()


def test_matmul_precision_is_left_as_it_was_found():
    layer = make()
    try:
        for precision in ("medium", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            layer(torch.randn(3, 32)).sum().backward()
            layer.delta_weight()
            assert torch.get_float32_matmul_precision() == precision
        torch.backends.cuda.matmul.allow_tf32 = True
        layer(torch.randn(3, 32))
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("cls", LAYERS)
def test_adapters_stay_float32_when_the_model_is_cast(cls):
    model = apply_adapters(Net(), ["up_proj"], layer=cls)
    model(torch.randn(2, 32)).sum().backward()
    values = adapter_state_dict(model)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)):
        cast(model)
        assert model.up_proj.weight.dtype != torch.float32
        for name, p in model.up_proj.adapters():
            assert p.dtype == torch.float32 and p.grad.dtype == torch.float32 and torch.equal(p, values[f"up_proj.{name}"])
    assert all(p.dtype == torch.float64 for p in model.double().parameters())


def test_the_clip_is_by_value_and_so_a_loss_scaler_changes_the_update():
    def gradients(scale):
        layer, x = make(r1=2, r2=2), torch.ones(4, 32)
        (layer(x).sum() * 1e-4 * scale).backward()
        return [p.grad / scale for _, p in layer.adapters()], adapter_report(layer)[""]["clipped"]

    (exact, none), (scaled, most) = gradients(1), gradients(2**16)
    assert none == 0 and most > 0.4  # of the entries, half have W_m = 0 and so no gradient to cut
    assert all(torch.equal(a, b) for a, b in zip(exact[:2], scaled[:2])), "A and B do not mind a power of two"
    assert all((a - b).norm() > 0.5 * a.norm() for a, b in zip(exact[2:], scaled[2:])), "C and D do"


# Inside other machinery


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients_to_the_bit(reentrant):
    model = apply_adapters(Net(), ["up_proj", "down_proj"])
    x = torch.randn(6, 32, requires_grad=True)
    model(x).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, (p for p in model.parameters() if p.requires_grad)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_goes_through_the_warmup_without_breaks_or_recompilation(backend):
    def train(model, run):
        params, losses = [p for p in model.parameters() if p.requires_grad], []
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        for step in range(20):
            set_warmup(model, min(1.0, step / 10))
            loss = run(x).square().mean()
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    eager = apply_adapters(Net(), ["up_proj", "down_proj"])
    x, compiled = torch.randn(8, 32), copy.deepcopy(eager)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    wrapped = torch.compile(compiled, backend=backend, fullgraph=True)
    assert train(compiled, wrapped) == pytest.approx(train(eager, eager), rel=1e-3)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert list(adapter_state_dict(wrapped)) == list(adapter_state_dict(eager))
    assert adapter_report(wrapped)["up_proj"]["unmoved"] == []


def test_a_compiled_models_adapter_file_fits_the_plain_model(tmp_path):
    model = apply_adapters(Net(), ["up_proj"])
    save_adapter(torch.compile(model), tmp_path / "a.pt")
    fresh = Net()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
    load_adapter(fresh, tmp_path / "a.pt")
    x = torch.randn(3, 32)
    assert torch.equal(fresh(x), model(x))


def test_a_deep_copy_is_independent_and_equal():
    model = apply_adapters(Net(), ["up_proj"])
    twin, x = copy.deepcopy(model), torch.randn(3, 32)
    assert torch.equal(model(x), twin(x))
    set_warmup(twin, 0.0)
    with torch.no_grad():
        twin.up_proj.lora_A.add_(1)
    assert not torch.equal(model(x), twin(x)) and model.up_proj.warmup == 1
    merge_adapters(twin)
    assert isinstance(model.up_proj, DualLoRALinear)


@pytest.mark.parametrize("cls", LAYERS)
def test_the_base_checkpoints_keys_and_parameters_do_not_change(cls):
    model = Net()
    before = dict(model.named_parameters())
    apply_adapters(model, ["up_proj"], layer=cls)
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all("lora_" in name for name in after.keys() - before.keys())
    assert model.load_state_dict({n: p.clone() for n, p in before.items()}, strict=False).unexpected_keys == []
    fresh = apply_adapters(Net(), ["up_proj"], layer=cls)
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values()))


def test_only_adapters_and_head_move_in_ten_steps():
    torch.manual_seed(0)
    model = apply_adapters(Net(), ["up_proj", "down_proj"])
    model.head.requires_grad_(True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(10):
        set_warmup(model, step / 10)
        F.cross_entropy(model(torch.randn(8, 32)), torch.randint(3, (8,))).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step(), optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n or "head" in n}


def gpt2(width=16):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=width, vocab_size=50, n_positions=32)
    return transformers, transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("target", ["c_attn", "attn.c_proj"])  # (16, 48), and square, where a wrong transpose would pass unseen
def test_conv1d_trains_and_merges_back_to_its_class_and_layout(cls, target, tmp_path):
    transformers, model = gpt2()
    ids = torch.randint(50, (2, 7))
    apply_adapters(model, [target], layer=cls)
    layer = model.transformer.h[0].attn.get_submodule(target.split(".")[-1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    x = torch.randn(4, 16)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight.t() + layer.delta_weight(), layer.bias), rtol=1e-4, atol=1e-5)
    expected = model(ids).logits
    merge_adapters(model)
    merged = model.transformer.h[0].attn.get_submodule(target.split(".")[-1])
    assert type(merged) is transformers.pytorch_utils.Conv1D and merged.weight.shape[0] == 16
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    reloaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


# apply_adapters


def test_targets_match_whole_name_components_and_each_is_checked():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "my_q_proj": nn.Linear(4, 4), "mlp": nn.ModuleDict({"up": nn.Linear(4, 4)}),
                           "up": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    for bad in (["q_proj", "typo"], ["proj"], ["norm"], ["mlp"], [], "typo", [""], ["q_proj", 3]):
        with leaves_unchanged(model), pytest.raises(ValueError, match="my_q_proj, q_proj, up"):
            apply_adapters(model, bad)
    assert apply_adapters(model, ["q_proj", "mlp.up"], r1=1, r2=1) is model
    assert [n for n, m in model.named_modules() if isinstance(m, DualLoRALinear)] == ["q_proj", "mlp.up"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{m}.{a}" for m in ("q_proj", "mlp.up") for a in ADAPTERS}


def test_adapting_twice_is_refused_but_other_layers_may_follow():
    model = apply_adapters(Net(), "up_proj")
    with leaves_unchanged(model), pytest.raises(ValueError, match="up_proj has an adapter already"):
        apply_adapters(model, ["down_proj", "up_proj"])
    apply_adapters(model, ["down_proj"], layer=LoRALinear)
    assert model.up_proj.lora_A.requires_grad and isinstance(model.down_proj, LoRALinear)


@pytest.mark.parametrize("kwargs, words", [({"r1": 0}, "r1 is 0"), ({"r2": 1.5}, "r2 is 1.5"), ({"r1": True}, "r1 is True"),
                                           ({"alpha": float("nan")}, "alpha is nan"), ({"alpha": 0}, "alpha is 0"), ({"alpha": float("inf")}, "inf"),
                                           ({"dropout": 1.0}, "dropout is 1.0"), ({"init_std": 0.0}, "init_std"), ({"init_std": -1}, "init_std"),
                                           ({"ste": "soft"}, "'soft'.*clip"), ({"magnitude": "abs"}, "relu, none"),
                                           ({"direction": "tanh"}, "sign, none")])
def test_settings_that_make_no_sense_are_refused_before_anything_changes(kwargs, words):
    model = Net()
    with leaves_unchanged(model), pytest.raises(ValueError, match=words):
        apply_adapters(model, ["up_proj"], **kwargs)
    with leaves_unchanged(model), pytest.raises(ValueError):
        apply_adapters(model, ["up_proj"], layer=LoRALinear, r=0)


def test_layers_whose_owner_reads_the_weight_itself_are_refused():
    model = nn.TransformerEncoderLayer(16, 2, 32)
    for target in ("out_proj", "linear1", "linear2"):
        with leaves_unchanged(model), pytest.raises(ValueError, match="reads this weight itself"):
            apply_adapters(model, [target])
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        apply_adapters(model, ["linear1"])
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_tied_shared_quantised_computed_and_special_weights_are_refused():
    tied = nn.ModuleDict({"embed": nn.Embedding(8, 4), "lm_head": nn.Linear(4, 8, bias=False)})
    tied["lm_head"].weight = tied["embed"].weight
    with leaves_unchanged(tied), pytest.raises(ValueError, match="embed.weight and lm_head.weight"):
        apply_adapters(tied, ["lm_head"])
    twice = nn.ModuleDict({"a": nn.Linear(4, 4)})
    twice["b"] = twice["a"]
    with leaves_unchanged(twice), pytest.raises(ValueError, match="a.weight and b.weight"):
        apply_adapters(twice, ["a"])
    packed = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    packed["q_proj"].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with leaves_unchanged(packed), pytest.raises(TypeError, match="weight is uint8: dequantise first"):
        apply_adapters(packed, ["q_proj"])
    computed = nn.ModuleDict({"q_proj": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    with leaves_unchanged(computed), pytest.raises(ValueError, match="computed"):
        apply_adapters(computed, ["q_proj"])

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    special = nn.ModuleDict({"q_proj": Scaled(4, 4)})
    with leaves_unchanged(special), pytest.raises(ValueError, match="Scaled"):
        apply_adapters(special, ["q_proj"])
    with pytest.raises(TypeError, match="Conv2d"):
        DualLoRALinear(nn.Conv2d(1, 1, 1))
    copied = nn.ModuleDict({"embed": nn.Embedding(8, 4), "lm_head": nn.Linear(4, 8, bias=False)})
    copied["lm_head"].weight = nn.Parameter(copied["embed"].weight.data)
    with leaves_unchanged(copied), pytest.raises(ValueError, match="embed.weight and lm_head.weight"):
        apply_adapters(copied, ["lm_head"])


@pytest.mark.parametrize("kind", ["own forward", "hook", "pre-hook"])
def test_a_layer_with_hooks_is_refused_since_it_would_lose_them(kind):
    """accelerate's device_map puts a forward of its own into the layer, bound to the layer: merged, it would run the old weight."""
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
    layer = model["q_proj"]
    if kind == "own forward":
        layer.forward = layer.forward
    else:
        (layer.register_forward_hook if kind == "hook" else layer.register_forward_pre_hook)(lambda *args: None)
    with leaves_unchanged(model), pytest.raises(ValueError, match="q_proj has hooks.*remove them first"):
        apply_adapters(model, ["q_proj"])


@pytest.mark.parametrize("cls", LAYERS)
def test_a_model_made_without_memory_is_whole_after_to_empty_and_its_state_dict(cls):
    model = apply_adapters(Net(), ["up_proj"], layer=cls)
    with torch.device("meta"):
        empty = apply_adapters(Net(), ["up_proj"], layer=cls)
    empty = empty.to_empty(device="cpu")
    for p in [*empty.parameters(), *empty.buffers()]:
        assert p.is_cpu
    empty.load_state_dict(model.state_dict())
    x = torch.randn(2, 32)
    assert torch.equal(empty(x), model(x)) and adapter_report(empty)["up_proj"]["relative_norm"] == adapter_report(model)["up_proj"]["relative_norm"]


def test_defaults_of_the_process_do_not_reach_the_adapters():
    expected = make(r1=3, r2=5, std=0.1).delta_weight()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = make(r1=3, r2=5, std=0.1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.warmup.dtype == torch.float32 and torch.equal(layer.delta_weight(), expected)
    torch.set_default_device("meta")
    try:
        layers = [cls(nn.Linear(4, 4, device="cpu")) for cls in LAYERS]
    finally:
        torch.set_default_device(None)
    assert all(p.is_cpu for layer in layers for p in layer.parameters())


def test_numpys_numbers_are_numbers_and_the_file_can_be_read(tmp_path):
    np = pytest.importorskip("numpy")
    model = apply_adapters(Net(), ["up_proj"], alpha=np.float64(8), init_std=np.float64(0.1), dropout=np.float32(0.25))
    set_warmup(model, np.float32(0.5))
    save_adapter(model, tmp_path / "a.pt")
    again = load_adapter(Net(), tmp_path / "a.pt").up_proj
    assert (again.config["alpha"], again.config["init_std"], again.config["dropout"], again.warmup.item()) == (8, 0.1, 0.25, 0.5)


def test_what_wraps_a_model_leaves_no_trace_in_its_file_and_what_could_not_be_read_back_is_not_written(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    model = nn.Sequential(apply_adapters(Net(), ["up_proj"]))
    for name, wrapped in (("parallel", nn.DataParallel(model)), ("checkpointed", nn.Sequential(checkpoint_wrapper(model[0])))):
        save_adapter(wrapped, tmp_path / name)
        assert torch.equal(load_adapter(nn.Sequential(Net()), tmp_path / name)[0].up_proj.lora_B, model[0].up_proj.lora_B)

    class Mine(DualLoRALinear):
        pass

    with pytest.raises(ValueError, match="up_proj is a Mine, which load_adapter does not know; it knows DualLoRALinear"):
        save_adapter(apply_adapters(Net(), ["up_proj"], layer=Mine), tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_the_draw_depends_on_the_seed_alone():
    def drawn(dtype):
        torch.manual_seed(3)
        return DualLoRALinear(nn.Linear(8, 4, dtype=dtype, device="meta").to_empty(device="cpu")).lora_D

    assert torch.equal(drawn(torch.float32), drawn(torch.bfloat16))


# merge


@pytest.mark.parametrize("cls", LAYERS)
def test_merging_in_float32_changes_no_output_and_leaves_plain_layers(cls, capsys):
    model = apply_adapters(Net().eval(), ["up_proj", "down_proj"], layer=cls)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.1)
    x = torch.randn(5, 32)
    expected = model(x)
    assert merge_adapters(model) is model
    assert type(model.up_proj) is nn.Linear and not model.up_proj.training and not [n for n in model.state_dict() if "lora_" in n]
    assert (model(x) - expected).abs().max() < 1e-5
    assert "merged 2 layers" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no adapter"):
        merge_adapters(model)


@pytest.mark.parametrize("cls", LAYERS)
def test_merging_into_bfloat16_rounds_the_float32_sum_once(cls):
    layer = make(dtype=torch.bfloat16, cls=cls, std=0.05)
    exact = layer.weight.float() + layer.delta_weight()
    merged = merge_adapters(layer)
    assert type(merged) is nn.Linear and torch.equal(merged.weight, exact.bfloat16())


def test_merge_tells_which_share_of_the_update_rounding_lost(capsys):
    layer = make(64, 64, dtype=torch.bfloat16, std=0.01)
    dW, before = layer.delta_weight().detach(), layer.weight.clone()
    merged = merge_adapters(layer).weight
    lost = ((merged == before) & (dW != 0)).sum().item() / (dW != 0).sum().item()
    assert 0.05 < lost < 1 and f"lost {100 * lost:.2f} %" in capsys.readouterr().out


def test_train_and_eval_change_no_weight():
    model = apply_adapters(Net(), ["up_proj"])
    before = copy.deepcopy(model.state_dict())
    model.eval(), model.train(), model.eval()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# save and load


def trained(cls=DualLoRALinear, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = apply_adapters(Net(), ["up_proj", "down_proj"], layer=cls, **kwargs)
    model.head.requires_grad_(True)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return model


def fresh_base(model, seed=9):
    """Another model with the same frozen weights and another head."""
    torch.manual_seed(seed)
    base = Net()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k and "head" not in k}, strict=False)
    return base


@pytest.mark.parametrize("cls, kwargs", [(DualLoRALinear, {"r1": 2, "r2": 3, "ste": "xnor", "dropout": 0.1}), (LoRALinear, {"r": 3}),
                                         (DoRALinear, {"r": 3})])
def test_a_file_restores_adapters_settings_and_head_to_the_bit(cls, kwargs, tmp_path):
    model, x = trained(cls, **kwargs).eval(), torch.randn(4, 32)
    path = tmp_path / "adapter.pt"
    save_adapter(model, path)
    assert os.path.getsize(path) > sum(p.nbytes for p in adapter_state_dict(model).values())
    for target in (fresh_base(model), apply_adapters(fresh_base(model), ["up_proj", "down_proj"], layer=cls, **kwargs)):
        if any("lora_" in n for n, _ in target.named_parameters()):
            target.head.requires_grad_(True)
        generator = torch.get_rng_state()
        assert load_adapter(target, path) is target
        assert torch.equal(generator, torch.get_rng_state())
        assert torch.equal(target.eval()(x), model(x)) and target.up_proj.config == model.up_proj.config
        assert {n for n, p in target.named_parameters() if p.requires_grad} == set(adapter_state_dict(model))
    assert [f.name for f in tmp_path.iterdir()] == ["adapter.pt"]


def test_the_warmup_factor_travels_with_the_file(tmp_path):
    model = trained()
    set_warmup(model, 0.25)
    save_adapter(model, tmp_path / "a.pt")
    loaded = load_adapter(fresh_base(model), tmp_path / "a.pt")
    assert loaded.up_proj.warmup == 0.25 and loaded.down_proj.warmup == 0.25
    assert torch.equal(loaded(torch.ones(1, 32)), model(torch.ones(1, 32)))


def edited(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)


def rename(content):
    content["state"]["up_proj.lora_Z"] = content["state"].pop("up_proj.lora_A")


@pytest.mark.parametrize("edit, words", [
    (rename, "lora_Z"),
    (lambda c: c["state"].pop("up_proj.lora_B"), "lacks 'up_proj.lora_B'"),
    (lambda c: c["state"].update({"up_proj.lora_A": torch.zeros(8, 31)}), r"\(8, 31\).*\(8, 32\)"),
    (lambda c: c["state"].update({"head.weight": torch.zeros(4, 32)}), r"head.weight.*\(4, 32\)"),
    (lambda c: c["state"].update({"other": torch.zeros(1)}), "'other'"),
    (lambda c: c["layers"]["up_proj"]["settings"].update(r1=0), "r1 is 0"),
    (lambda c: c["layers"]["up_proj"]["settings"].update(rank=3), "rank"),
    (lambda c: c["layers"].update(gate_proj=c["layers"].pop("up_proj")), "gate_proj.*down_proj, head, up_proj"),
    (lambda c: c["layers"]["up_proj"].update(layer="Other"), "Other"),
    (lambda c: c["layers"]["up_proj"].update(warmup=2.0), "warm-up"), (lambda c: c["layers"].update(up_proj=3), "no adapter file"),
    (lambda c: c["state"].update(head=3), "no adapter file"),
    (lambda c: c.update(format="x"), "no adapter file"), (lambda c: c.pop("layers"), "no adapter file")])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_file_that_does_not_fit_is_refused_and_the_model_is_left_alone(edit, words, adapted, tmp_path):
    model, path = trained(), tmp_path / "a.pt"
    save_adapter(model, path)
    edited(path, edit)
    target = trained(seed=5) if adapted else fresh_base(model)
    with leaves_unchanged(target), pytest.raises(ValueError, match=words) as info:
        load_adapter(target, path)
    assert str(path) in str(info.value) and "\n" not in str(info.value)


def test_an_adapter_of_other_settings_or_layers_is_refused(tmp_path):
    model, path = trained(), tmp_path / "a.pt"
    save_adapter(model, path)
    for other in (trained(r1=4), trained(LoRALinear), apply_adapters(Net(), ["up_proj", "down_proj", "head"]),
                  nn.ModuleDict({"up_proj": nn.Linear(3, 3), "down_proj": nn.Linear(3, 3)})):
        with leaves_unchanged(other), pytest.raises(ValueError):
            load_adapter(other, path)


def test_a_file_cut_short_anywhere_is_one_clear_error(tmp_path):
    model, path = trained(), tmp_path / "a.pt"
    save_adapter(model, path)
    whole = path.read_bytes()
    base = fresh_base(model)
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with leaves_unchanged(base), pytest.raises(ValueError, match="cut short"):
            load_adapter(base, path)
    with pytest.raises(FileNotFoundError):
        load_adapter(base, tmp_path / "none.pt")


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": dual_lora.FORMAT, "layers": {}, "state": Evil()}, tmp_path / "a.pt")
    with pytest.raises(ValueError):
        load_adapter(Net(), tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    model, path = trained(), tmp_path / "a.pt"
    save_adapter(model, path)
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        save_adapter(trained(seed=4), path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a.pt"]


# report


def test_report_at_the_start_is_what_the_arithmetic_predicts():
    torch.manual_seed(0)
    linear = nn.Linear(1024, 1024, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    layer = DualLoRALinear(linear, r1=16, r2=16)
    row = adapter_report(layer)[""]
    assert row["frozen"] == pytest.approx(0.5, abs=0.01) and row["dead_rows"] == row["dead_columns"] == 0
    assert row["effective_rank"] == pytest.approx(356, rel=0.03) and row["numerical_rank"] > 900
    assert row["relative_norm"] == pytest.approx(0.057, rel=0.05)
    assert row["unmoved"] == list(ADAPTERS) and row["flips_since_start"] == row["flips_since_last"] == row["clipped"] == 0
    DC = (layer.lora_D @ layer.lora_C).abs()
    assert (DC <= row["direction_margin"]).float().mean() == pytest.approx(0.1, abs=1e-3)


def test_report_counts_flips_since_the_last_call_and_since_the_start():
    layer = make(20, 30)
    layer.mark_start()
    with torch.no_grad():
        layer.lora_D[:5].neg_()  # a quarter of the rows turn
    first = adapter_report(layer)[""]
    second = adapter_report(layer)[""]
    assert first["flips_since_start"] == first["flips_since_last"] == pytest.approx(0.25)
    assert second["flips_since_start"] == pytest.approx(0.25) and second["flips_since_last"] == 0
    assert second["unmoved"] == ["lora_A", "lora_B", "lora_C"]


def test_report_finds_dead_rows_and_the_clipped_share_and_stays_finite_without_any_update():
    layer = make(20, 30, r1=1)
    with torch.no_grad():
        layer.lora_A.abs_()
        layer.lora_B.abs_()[3].neg_()
    (1e3 * layer(torch.ones(1, 30))).sum().backward()
    row = adapter_report(layer)[""]
    assert row["dead_rows"] == 1 and row["dead_columns"] == 0 and row["frozen"] == pytest.approx(0.05) and row["clipped"] > 0.5
    assert adapter_report(layer)[""]["clipped"] == 0
    with torch.no_grad():
        layer.lora_A.zero_(), layer.lora_C.zero_(), layer.weight.zero_()
    row = adapter_report(layer)[""]
    assert row["frozen"] == 1 and row["effective_rank"] == 0 and row["relative_norm"] == 0
    assert all(value == value for key, value in row.items() if key != "unmoved")


def test_report_of_the_baselines_holds_what_applies_to_them():
    model = trained(LoRALinear, r=3)
    row = adapter_report(model)["up_proj"]
    assert row["numerical_rank"] == 3 and row["effective_rank"] <= 3.001 and "frozen" not in row


# The baselines, and the file itself


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_baselines_equal_pefts_outputs_and_gradients(cls, bias, dropout):
    peft = pytest.importorskip("peft")
    base = nn.Sequential()
    base.add_module("q_proj", nn.Linear(32, 24, bias=bias))
    ours = apply_adapters(copy.deepcopy(base), ["q_proj"], layer=cls, r=4, alpha=8.0, dropout=dropout)
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj"], use_dora=cls is DoRALinear)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    layer = theirs.base_model.model.q_proj
    with torch.no_grad():
        for mine, other in ((ours.q_proj.lora_A, layer.lora_A["default"].weight), (ours.q_proj.lora_B, layer.lora_B["default"].weight)):
            mine.copy_(other.normal_(std=0.1))
        if cls is DoRALinear:
            torch.testing.assert_close(ours.q_proj.lora_magnitude, layer.lora_magnitude_vector["default"].weight)
            ours.q_proj.lora_magnitude.copy_(layer.lora_magnitude_vector["default"].weight.mul_(1.1))
    x = torch.randn(5, 32)
    ours.train(), theirs.train()
    torch.manual_seed(1)
    y = ours(x)
    torch.manual_seed(1)
    z = theirs(x)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-6)
    y.square().sum().backward(), z.square().sum().backward()
    pairs = {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
    if cls is DoRALinear:
        pairs["lora_magnitude"] = layer.lora_magnitude_vector["default"].weight
    for name, other in pairs.items():
        torch.testing.assert_close(getattr(ours.q_proj, name).grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge_adapters(ours.eval())(x), theirs.eval().merge_and_unload()(x), rtol=1e-4, atol=1e-5)


def test_trainable_counts_follow_the_closed_form():
    count = {cls: sum(p.numel() for _, p in cls(nn.Linear(32, 24), **kw).adapters())
             for cls, kw in ((DualLoRALinear, {"r1": 4, "r2": 4}), (LoRALinear, {"r": 8}), (DoRALinear, {"r": 8}))}
    assert count == {DualLoRALinear: 8 * 56, LoRALinear: 8 * 56, DoRALinear: 8 * 56 + 24}


def test_the_file_needs_torch_and_the_standard_library_only():
    tree = ast.parse(open(dual_lora.__file__, encoding="utf-8").read())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - {"torch"} <= sys.stdlib_module_names


def test_two_copies_of_the_file_live_side_by_side():
    spec = importlib.util.spec_from_file_location("vendored.dual_lora", dual_lora.__file__)
    for _ in range(2):  # the second time as a reload would
        other = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(other)
    torch.manual_seed(0)
    a, x = other.DualLoRALinear(nn.Linear(8, 8)), torch.randn(2, 8)
    a(x).sum().backward()
    b, y = make(8, 8), torch.randn(2, 8)
    b(y).sum().backward()
    assert a.lora_A.grad.any() and b.lora_A.grad.any()


def test_magnitudes_are_counted_by_decade_and_zeros_left_out():
    dW = torch.tensor([[0.0, 5e-8, -5e-6, 2e-5], [-0.5, 7.0, 3e-2, 4e-2]])
    assert dual_lora.decades(torch.tensor([[float("nan"), 1e-4]]))[2] == 1, "a NaN has no size"
    assert dual_lora.decades(dW) == pytest.approx([1 / 7, 1 / 7, 1 / 7, 0, 0, 2 / 7, 2 / 7])
    assert dual_lora.decades(torch.zeros(3, 3)) == [0] * 7


def test_a_report_without_the_spectrum_has_all_but_the_ranks():
    model = apply_adapters(nn.Sequential(nn.Linear(6, 5)), ["0"], r1=2, r2=2)
    whole, cheap = adapter_report(model)["0"], adapter_report(model, spectrum=False)["0"]
    assert set(whole) - set(cheap) == {"effective_rank", "numerical_rank"} and sum(whole["magnitudes"]) == pytest.approx(1)
