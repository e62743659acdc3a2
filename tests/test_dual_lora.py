"""The properties of dual_lora.py: the formula and its gradients, memory, precision, and every verb."""
import ast
import copy
import importlib.util
import math
import os
import pickle
import re
import runpy
import shutil
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

import dual_lora
from dual_lora import (AdaptedLinear, DualLoRA, LoRA, adapt, adapter_state_dict, apply_adapters, load_adapter,
                       merge_adapters, merged, restore, save_adapter, set_warmup, sign_ste)

ADAPTERS = [DualLoRA, LoRA]


def randomise(module, std=0.3, seed=0):
    """Make every adapter large enough to matter."""
    torch.manual_seed(seed)
    for name, p in module.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=std)
    return module


class Net(nn.Module):
    """Any two of them have the same weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up_proj = nn.Linear(32, 64)
        self.down_proj = nn.Linear(64, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        return self.head(x + self.down_proj(F.gelu(self.up_proj(x))))


def adapted(linear, cls=DualLoRA, **settings):
    """`linear`, frozen, with an adapter in it."""
    shape = linear.weight.shape if isinstance(linear, nn.Linear) else reversed(linear.weight.shape)
    return adapt(linear.requires_grad_(False), cls(*shape, **settings))


def adapted_net(adapter=DualLoRA, seed=0, **settings):
    """A Net whose adapters are random, and whose head is too and trained."""
    model = apply_adapters(Net(), ["up_proj", "down_proj"], adapter, **settings)
    nn.init.normal_(model.head.requires_grad_(True).weight)
    return randomise(model, std=0.1, seed=seed)


@contextmanager
def leaves_unchanged(model):
    """No module replaced, no parameter written to, none frozen or thawed."""
    def state():
        return ([(name, id(m)) for name, m in model.named_modules()],
                [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()])

    before = state()
    yield
    assert state() == before


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


# ---- The formula, its gradients, and step 0 --------------------------------------------------------------------------


def test_sign_has_two_values_and_zero_is_minus_one():
    assert sign_ste(torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0])).tolist() == [-1, -1, -1, 1, 1]


def test_the_example_in_the_docstring_is_what_the_layer_computes():
    layer = adapted(nn.Linear(2, 2, bias=False), r1=1, r2=1, alpha=1.0)
    nn.init.zeros_(layer.W0)
    start = {"A": [[2, -1]], "B": [[1], [-1]], "C": [[0.1, 1]], "D": [[1], [-1]]}
    for name, value in start.items():
        getattr(layer.adapter, f"lora_{name}").data.copy_(torch.tensor(value))
    assert layer.weight.tolist() == [[2, 0], [0, -1]]
    (0.5 * layer(torch.eye(2))).sum().backward()  # so that dL/dW is 0.5 everywhere
    expected = {"A": [[0.5, 0.5]], "B": [[1], [0.5]], "C": [[1, -0.5]], "D": [[0.1], [0.5]]}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(layer.adapter, f"lora_{name}").grad, torch.tensor(value))
    torch.optim.SGD(layer.adapter.parameters(), lr=0.2).step()
    A, B, C, D = layer.adapter.parameters()
    torch.testing.assert_close(B @ A, torch.tensor([[1.52, -0.88], [-2.09, 1.21]]))
    torch.testing.assert_close(D @ C, torch.tensor([[-0.098, 1.078], [0.11, -1.21]]))
    torch.testing.assert_close(layer.weight, torch.tensor([[-1.52, 0], [0, -1.21]]))


def test_run_as_a_program_the_file_prints_the_docstrings_example(capsys):
    runpy.run_path(dual_lora.__file__, run_name="__main__")
    printed = [float(number) for number in re.findall(r"-?\d+\.\d*", capsys.readouterr().out)]
    assert printed == pytest.approx([2, 0, 0, -1, -1.52, 0, 0, -1.21, 2, -1, -2, 1, 1.8, -0.9, -2.2, 1.1])


def naive_delta_weight(A, B, C, D, scale):
    """The paper's formula. A hook on the sign's gradient is the estimator."""
    DC = D @ C
    hard = torch.where(DC > 0, 1.0, -1.0).to(DC.dtype)
    W_d = DC + (hard - DC).detach()
    W_d.register_hook(lambda g: g.clamp(-1, 1))
    return scale * torch.relu(B @ A) * W_d


@pytest.mark.parametrize("kind, shape, dropout", [
    ("bias", (2, 5, 300), 0.0), ("bias", (2, 5, 300), 0.4), ("no bias", (300,), 0.0), ("Conv1D", (2, 1, 3, 300), 0.0)])
def test_outputs_and_all_gradients_are_the_formulas(kind, shape, dropout):
    """Against the formula written out above, and against the layer's own delta_weight by plain autograd."""
    torch.manual_seed(0)
    if kind == "Conv1D":  # Hugging Face's, with the weight (in, out)
        linear = pytest.importorskip("transformers").pytorch_utils.Conv1D(1000, 300)
    else:
        linear = nn.Linear(300, 1000, bias=kind == "bias")  # three blocks of rows
    layer = randomise(adapted(linear, r1=3, r2=2, alpha=6.0, dropout=dropout).double(), std=1.0)
    set_warmup(layer, 0.25)
    weight = layer.W0.requires_grad_(True)
    adapters = [*layer.adapter.parameters()]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gy = 0.1 * torch.randn(*shape[:-1], 1000, dtype=torch.float64)
    inputs = [x, weight, *adapters]
    if layer.bias is not None:
        inputs.append(layer.bias.requires_grad_(True))
    W0 = weight.t() if kind == "Conv1D" else weight
    naive = naive_delta_weight(*adapters, 0.25 * 6.0 / math.sqrt(6))
    torch.manual_seed(1)
    y = layer(x)
    ours = torch.autograd.grad(y, inputs, gy)
    for dW in (naive, layer.adapter.delta_weight()):
        torch.manual_seed(1)
        reference = F.linear(x, W0, layer.bias) + F.linear(F.dropout(x, dropout), dW)
        torch.testing.assert_close(y, reference)
        for mine, theirs in zip(ours, torch.autograd.grad(reference, inputs, gy)):
            torch.testing.assert_close(mine, theirs)
    expected = F.linear(x, W0 + naive, layer.bias)
    torch.testing.assert_close(layer.eval()(x), expected)
    with merged(layer):
        torch.testing.assert_close(layer(x), expected)


def test_a_second_derivative_is_an_error():
    layer, x = adapted(nn.Linear(12, 8)), torch.randn(5, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_at_factor_zero_the_model_is_the_base_to_the_bit_with_gradients_of_zero_and_at_one_none_is_zero():
    base, x = Net(), torch.randn(6, 32)
    model = apply_adapters(copy.deepcopy(base), ["up_proj", "down_proj"])
    assert model.up_proj.adapter.warmup == 1
    for factor in (0, 1):
        set_warmup(model, factor)
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        assert torch.equal(y, base(x)) == (factor == 0)
        assert [bool(g.any()) for g in gradients(model)] == [factor == 1] * 8


@pytest.mark.parametrize("r1, r2, init_std, rate", [(4, 4, 0.02, 1e-3), (2, 16, 0.05, 2e-3)])
def test_the_docstrings_size_of_dW_and_number_of_steps_that_turn_a_sign(r1, r2, init_std, rate):
    torch.manual_seed(0)
    adapter, G = DualLoRA(256, 256, r1, r2, init_std=init_std), torch.randn(256, 256)
    dW = adapter.delta_weight().detach()
    assert dW.square().mean().sqrt() == pytest.approx(16 * init_std**2 / math.sqrt(2 * r2), rel=0.1)
    assert (dW == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=rate)
    before = adapter.lora_D @ adapter.lora_C > 0
    for _ in range(round(init_std / rate)):
        optimizer.zero_grad()
        (G * adapter.delta_weight()).sum().backward()
        optimizer.step()
    assert ((adapter.lora_D @ adapter.lora_C > 0) != before).float().mean() == pytest.approx(0.33, abs=0.07)


# ---- Memory and precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_of_the_weights_size_is_kept_for_backward_but_the_weight(dropout):
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    layer = adapted(nn.Linear(300, 200), r1=4, r2=4, dropout=dropout)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(torch.randn(16, 300, requires_grad=True))
    large = [pointer for pointer, size in kept.items() if size >= 200 * 300]  # even at a byte an entry
    assert large == [layer.W0.data_ptr()]


@pytest.mark.parametrize("cls", ADAPTERS)
@pytest.mark.parametrize("base, autocast, dropout", [
    (torch.float32, True, 0.0), (torch.bfloat16, False, 0.0), (torch.bfloat16, True, 0.1)])
def test_output_has_the_base_layers_dtype_and_gradients_are_float32_and_right(cls, base, autocast, dropout):
    layer = randomise(adapted(nn.Linear(96, 128, dtype=base), cls, dropout=dropout))
    x, found = torch.randn(64, 96, dtype=torch.float32 if autocast else base, requires_grad=True), []
    for model, inputs, narrow in ((copy.deepcopy(layer).float(), x.float(), False), (layer, x, autocast)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            y = model(inputs)
            y.float().square().mean().backward()
        found.append(gradients(model))
    assert y.dtype == (torch.bfloat16 if autocast else base) and x.grad.dtype == x.dtype
    assert all(g.dtype == torch.float32 for g in found[1])
    assert all((a - b).norm() < 0.02 * a.norm() for a, b in zip(*found))


def test_under_autocast_the_signs_are_those_of_float32_products():
    torch.manual_seed(0)
    layer = adapted(nn.Linear(256, 512, bias=False), r1=16, r2=16)
    nn.init.zeros_(layer.W0)
    exact = copy.deepcopy(layer).double().adapter.delta_weight()
    rough = layer.adapter.lora_D.bfloat16() @ layer.adapter.lora_C.bfloat16() > 0
    signs = layer.adapter.lora_D @ layer.adapter.lora_C > 0
    assert (rough != signs).float().mean() > 1e-4  # so there is something to get wrong
    with torch.autocast("cpu", torch.bfloat16):
        used = layer(torch.eye(256)).t()  # x = I shows the W that was used, rounded to bfloat16
        dW = layer.adapter.delta_weight()
    assert torch.equal(used.sign().double(), exact.sign())
    torch.testing.assert_close(dW, exact.float())


@pytest.mark.parametrize("cls", ADAPTERS)
def test_adapters_cast_to_a_narrow_type_are_refused_by_whoever_needs_dW(cls, tmp_path):
    model = apply_adapters(Net(), ["up_proj"], cls).half()
    for use in (lambda: model(torch.randn(2, 32, dtype=torch.float16)), lambda: model.up_proj.weight,
                lambda: merge_adapters(model), lambda: merged(model).__enter__(),
                lambda: save_adapter(model, tmp_path / "a.pt")):
        with pytest.raises(TypeError, match="cast the model before apply_adapters"):
            use()


def test_dW_is_the_formulas_where_the_warmups_factor_was_cast_and_where_W0_is_in_float64():
    layer = randomise(adapted(nn.Linear(32, 32, bias=False), r1=3, r2=5).double(), std=0.5)
    layer.adapter.float().warmup = torch.ones((), dtype=torch.bfloat16)  # layer.adapter alone is in float32
    exact = naive_delta_weight(*(p.double() for p in layer.adapter.parameters()), 16 / math.sqrt(15))
    torch.testing.assert_close(layer.adapter.delta_weight().double(), exact, rtol=1e-5, atol=1e-5)
    used = layer(torch.eye(32, dtype=torch.float64)).t()
    assert ((used - layer.W0 - exact).abs() < 1e-5).all()
    used.square().sum().backward()
    assert all(g.any() for g in gradients(layer))
    layer.W0.data.add_(1e-12)  # which float32 would lose
    silent = randomise(layer, std=1e-12)  # dW is about 1e-23: nothing is left but W0
    assert torch.equal(silent(torch.eye(32, dtype=torch.float64)).t(), layer.W0)


def test_a_large_dW_is_formed_in_blocks_of_rows_larger_ones_on_a_gpu():
    """By fake tensors, which have a device and no memory."""
    with torch._subclasses.fake_tensor.FakeTensorMode():
        for n_rows, width, device, starts in ((1000, 300, "cpu", [0, 436, 872]), (2, 2**20, "cpu", [0, 1]),
                                              (14336, 4096, "cuda", [0, 4096, 8192, 12288])):
            blocks = dual_lora.row_blocks(torch.empty(n_rows, 8, device=device), torch.empty(8, width, device=device))
            assert [rows.start for rows in blocks] == starts


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph_while_factor_and_length_change_and_gradients_are_equal(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = adapted_net()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for length, factor in ((5, 0.0), (6, 0.1), (11, 0.5), (8, 1.0)):
        set_warmup(model, factor)
        x, found = torch.randn(3, length, 32), []
        for run in (model, compiled):
            model.zero_grad()
            run(x).square().sum().backward()
            found.append(gradients(model))
        for eager, ours in zip(*found):
            torch.testing.assert_close(eager, ours, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    model.zero_grad()
    compiled(torch.empty(3, 0, 32)).sum().backward()
    assert not any(g.any() for g in gradients(model))


def test_compiled_it_keeps_nothing_of_the_weights_size_but_the_weight():
    """The compiler would merge the backward pass's BA, DC and W with the forward pass's, and keep them."""
    torch._dynamo.reset()
    layer = adapted(nn.Linear(48, 40, bias=False), r1=2, r2=3)
    compiled = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)  # partitioned as by inductor
    y = compiled(torch.randn(5, 48, requires_grad=True))
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and sorted(t.shape) == [40, 48]]
    assert [t.data_ptr() for t in kept] in ([], [layer.W0.data_ptr()])


def wrapped_in(kind, model):
    if kind == "compiled and averaged":
        return torch.optim.swa_utils.AveragedModel(torch.compile(model, backend="eager"))
    if kind == "data parallel, compiled":
        return torch.compile(nn.DataParallel(model), backend="eager")
    for name in ("up_proj", "head"):  # one by one
        setattr(model, name, torch.compile(getattr(model, name), backend="eager"))
    return model


@pytest.mark.parametrize("kind", ["compiled and averaged", "data parallel, compiled", "layers compiled"])
def test_the_verbs_see_through_wrappers_and_the_file_has_plain_names(kind, tmp_path):
    model, x = adapted_net(), torch.randn(4, 32)
    expected, names = model(x), set(adapter_state_dict(model))
    wrapped = wrapped_in(kind, model)
    assert set(adapter_state_dict(wrapped)) == names
    save_adapter(wrapped, tmp_path / "a.pt")
    assert torch.equal(load_adapter(Net(), tmp_path / "a.pt")(x), expected)
    with merged(wrapped):
        torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge_adapters(wrapped)(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, AdaptedLinear) for m in wrapped.modules())


# ---- LoRA ------------------------------------------------------------------------------------------------------------


def test_lora_equals_pefts_outputs_gradients_and_merge():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(32, 24))
    ours = apply_adapters(copy.deepcopy(base), ["0"], LoRA, r=4, alpha=8.0, dropout=0.3)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.3, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    pairs = [(ours[0].adapter.lora_A, layer.lora_A["default"].weight),
             (ours[0].adapter.lora_B, layer.lora_B["default"].weight)]
    for mine, other in pairs:
        assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.1), "they start alike"
        mine.data.copy_(other.data.mul_(1.1).add_(0.05 * torch.randn_like(other)))
    x, outputs = torch.randn(5, 32), []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        outputs.append(model(x))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs)
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)
    plain = merge_adapters(ours.eval())(x), theirs.eval().merge_and_unload()(x)
    torch.testing.assert_close(*plain, rtol=1e-4, atol=1e-5)


# ---- apply_adapters --------------------------------------------------------------------------------------------------


def test_targets_are_whole_name_ends_and_everything_else_is_frozen():
    model = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "my_q_proj": nn.Linear(4, 4), "up": nn.Linear(4, 4),
                           "mlp": nn.ModuleDict({"up": nn.Linear(4, 4)}), "norm": nn.LayerNorm(4)})
    before = dict(model.named_parameters())
    assert apply_adapters(model, ["q_proj", "mlp.up"], r1=1, r2=1) is model
    assert [name for name, m in model.named_modules() if isinstance(m, AdaptedLinear)] == ["q_proj", "mlp.up"]
    assert trainable(model) == {f"{layer}.adapter.lora_{letter}" for layer in ("q_proj", "mlp.up") for letter in "ABCD"}
    after = dict(model.named_parameters())
    renamed = {"q_proj.weight": "q_proj.W0", "mlp.up.weight": "mlp.up.W0"}
    assert all(after[renamed.get(name, name)] is p for name, p in before.items()), "the base model's own parameters"


def test_every_parameters_name_reads_that_parameter_and_weight_is_none():
    model = adapted_net()
    for name, p in model.named_parameters():
        assert model.get_parameter(name) is p
    assert "up_proj.W0" in dict(model.named_parameters()) and "weight" not in model.up_proj._parameters
    for value in (torch.zeros(64, 32), nn.Parameter(torch.zeros(64, 32))):
        with pytest.raises((AttributeError, KeyError)):
            model.up_proj.weight = value


def test_a_layer_that_its_owner_also_keeps_elsewhere_is_adapted_there_too(tmp_path):
    def net():
        model = Net()
        model.alias, model.kept = model.up_proj, [model.up_proj]  # a second name, and a list
        return model

    model, x = randomise(apply_adapters(net(), ["up_proj"])), torch.randn(2, 32)
    y = model.kept[0](x)
    assert torch.equal(y, model.up_proj(x)) and torch.equal(y, model.alias(x)) and not torch.equal(y, Net().up_proj(x))
    save_adapter(model, tmp_path / "a.pt")
    assert torch.equal(load_adapter(net(), tmp_path / "a.pt").kept[0](x), y)
    torch.testing.assert_close(merge_adapters(model).kept[0](x), y)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Slotted(nn.Linear):
    __slots__ = ("more",)


class Named(nn.Linear):
    W0 = adapter = plain_class = None


def unfit(kind):
    """A model whose last layer, q_proj, cannot take an adapter."""
    layer = {"own forward": Scaled, "slots": Slotted, "own names": Named}.get(kind, nn.Linear)(4, 4)
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "down_proj": nn.Linear(4, 4), "q_proj": layer})
    if kind == "tied":
        model["embed"].weight = layer.weight
    elif kind == "own forward, on the instance":  # as accelerate's hooks set it
        layer.forward = layer.forward
    elif kind == "computed":
        nn.utils.parametrizations.weight_norm(layer)
    elif kind == "a Parameter's subclass":  # as of quantised weights
        layer.weight = type("Int4", (nn.Parameter,), {})(torch.zeros(4, 4))
    elif kind == "8 bits":
        layer.weight = nn.Parameter(torch.zeros(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    return model


@pytest.mark.parametrize("model, targets, settings, words", [
    (Net(), ["down_proj", "typo"], {}, "'typo' matches no linear layer: choose from down_proj, head, up_proj"),
    (Net(), [], {}, "targets is empty: choose from down_proj"),
    (apply_adapters(Net(), ["up_proj"]), ["down_proj", "up_proj"], {}, "up_proj has an adapter already"),
    *((unfit(kind), ["down_proj", "q_proj"], {}, words) for kind, words in {
        "tied": "shares its weight .embed.weight and q_proj.weight", "own forward": "Scaled with its own forward",
        "own forward, on the instance": "Linear with its own forward", "computed": "has a computed weight",
        "slots": "its own __slots__", "own names": "its own W0, adapter, plain_class",
        "a Parameter's subclass": "has a Int4 as its weight, of torch.float32: dequantise first",
        "8 bits": "torch.float8_e4m3fn: dequantise first"}.items()),
    (Net(), ["up_proj"], {"r3": 1}, "unexpected keyword"),
    *((Net(), ["up_proj"], settings, f"{next(iter(settings))} is .*: it should be") for settings in (
        {"r1": 0}, {"r2": 2.0}, {"alpha": -16.0}, {"alpha": math.inf}, {"dropout": 1.0}, {"init_std": 0}))])
def test_what_would_fail_silently_is_refused_before_anything_changes(model, targets, settings, words):
    with leaves_unchanged(model), pytest.raises(ValueError, match=words) as error:
        apply_adapters(model, targets, **settings)
    assert "\n" not in str(error.value)


def test_other_layers_may_follow_and_earlier_adapters_stay_trainable():
    model = apply_adapters(Net(), "up_proj")
    apply_adapters(model, ["down_proj"], LoRA)
    assert {name.partition(".")[0] for name in trainable(model)} == {"up_proj", "down_proj"}
    set_warmup(model, 0.5)  # which LoRA does not have
    assert model.up_proj.adapter.warmup == 0.5


def test_a_factor_outside_0_to_1_is_refused():
    model = adapted_net()
    for factor in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            set_warmup(model, factor)
    assert model.up_proj.adapter.warmup == 1


def test_the_start_is_float32_from_the_cpus_generator_whatever_loaders_and_defaults_do(monkeypatch):
    def drawn():
        torch.manual_seed(0)
        return [[*cls(64, 64).parameters(), *cls(64, 64).buffers()] for cls in ADAPTERS]

    expected = drawn()
    for name in ("normal_", "uniform_", "kaiming_uniform_", "zeros_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor.data.fill_(7.0))
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = drawn()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and b.dtype == torch.float32
               for before, after in zip(expected, found) for a, b in zip(before, after))


def test_a_failure_midway_leaves_no_layer_adapted_and_none_merged(monkeypatch):
    model, real = Net(), dual_lora.adapt
    with monkeypatch.context() as patch:
        patch.setattr(dual_lora, "adapt", lambda linear, adapter: 1 / 0 if linear is model.down_proj
                      else real(linear, adapter))
        with leaves_unchanged(model), pytest.raises(ZeroDivisionError):
            apply_adapters(model, ["up_proj", "down_proj"])
    for spoil, words in ((lambda layer: layer.adapter.bfloat16(), "cast the model before"),
                         (lambda layer: setattr(layer, "forward", layer.forward), "has another forward")):
        model = adapted_net()
        spoil(model.down_proj)
        with leaves_unchanged(model), pytest.raises((TypeError, ValueError), match=words):
            merge_adapters(model)


def test_restore_is_the_opposite_of_adapt_and_a_second_adapter_is_refused():
    Conv1D = pytest.importorskip("transformers").pytorch_utils.Conv1D
    for linear in (nn.Linear(4, 6), Conv1D(6, 4)):
        kind, state, weight = type(linear.eval()), {**vars(linear)}, linear.weight
        layer = adapted(linear)
        assert type(layer) is AdaptedLinear and layer is linear and layer.in_features == 4 and repr(layer)
        assert not layer.adapter.training, "as the layer"
        with pytest.raises(ValueError, match="has an adapter already"):
            adapt(layer, DualLoRA(6, 4))
        with merged(layer), pytest.raises(ValueError, match="inside `merged`"):
            restore(layer)
        assert type(restore(layer)) is kind and layer.weight is weight and vars(layer).keys() == state.keys()
        assert list(layer.state_dict()) == ["weight", "bias"]


def test_fifteen_hundred_layers_take_seconds():
    model, began = nn.ModuleList(nn.Linear(4, 4) for _ in range(1500)), time.time()
    apply_adapters(model, [str(i) for i in range(1500)], r1=1, r2=1)
    assert time.time() - began < 5


@pytest.mark.parametrize("verb", [lambda model, path: set_warmup(model, 1.0), lambda model, path: merge_adapters(model),
                                  lambda model, path: merged(model).__enter__(), save_adapter,
                                  lambda model, path: adapter_state_dict(model)])
def test_a_verb_on_a_model_without_adapters_is_an_error(verb, tmp_path):
    """So it is after the file was reloaded, or imported under a second name."""
    spec = importlib.util.spec_from_file_location("second_copy", dual_lora.__file__)
    second = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    for model in (Net(), second.apply_adapters(Net(), "up_proj")):
        with pytest.raises(ValueError, match="has no adapters"):
            verb(model, tmp_path / "a.pt")
    assert not any(tmp_path.iterdir())


# ---- A layer that others look into -----------------------------------------------------------------------------------


def encoder_layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("cls", ADAPTERS)
def test_an_owner_that_reads_the_weight_trains_and_evaluates_with_dW(cls):
    """nn.TransformerEncoderLayer calls linear1 and linear2 while training, and reads them in evaluation. Its attention
    reads out_proj always."""
    targets, x = ["linear1", "linear2", "out_proj"], torch.randn(2, 5, 32)
    model = randomise(apply_adapters(encoder_layer(), targets, cls), std=0.1)
    y = model.train()(x)
    y.square().mean().backward()
    assert len(gradients(model)) == (12 if cls is DualLoRA else 6) and all(g.any() for g in gradients(model))
    with torch.no_grad():
        fast, slow = model.eval()(x), model.train()(x)
        with merged(model):
            inside = model.eval()(x), model.train()(x)
        plain = merge_adapters(copy.deepcopy(model)).eval()(x)
    assert not torch.allclose(y, encoder_layer()(x), atol=1e-2)
    for other in (fast, slow, *inside, plain):
        torch.testing.assert_close(other, y.detach(), rtol=1e-4, atol=1e-5)


def test_weight_reads_the_sum_in_the_bases_dtype_and_layout_with_its_gradient_and_w0_keeps_its_name():
    Conv1D = pytest.importorskip("transformers").pytorch_utils.Conv1D
    layer = randomise(adapted(Conv1D(24, 32).bfloat16()))  # weight (32, 24)
    W0 = layer.W0
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, (W0 + layer.adapter.delta_weight().t()).bfloat16())
    layer.weight.float().square().sum().backward()
    assert all(g.any() for g in gradients(layer)) and torch.equal(layer.state_dict()["W0"], W0)


class RowAdapter(nn.Module):
    """An adapter of one's own: a number for each row."""

    def __init__(self, out_features, in_features, size=1.0):
        super().__init__()
        self.settings = {"size": size}
        self.width, self.rows = in_features, nn.Parameter(size * torch.ones(out_features, 1))

    def delta_weight(self):
        return self.rows.expand(-1, self.width)

    def forward(self, x, W0, bias=None):
        return F.linear(x, W0 + self.delta_weight(), bias)


class Rows(RowAdapter):
    pass


class Broken(RowAdapter):
    def delta_weight(self):
        return self.no_such_name


def test_an_adapter_of_ones_own_needs_delta_weight_forward_and_settings(tmp_path):
    class Rows(RowAdapter):  # defined again, as in a notebook: the last one counts
        pass

    def net():
        torch.manual_seed(0)
        return nn.ModuleDict({"adapter": nn.Linear(4, 4), "q": nn.Linear(4, 4)})  # a name like ours

    model = apply_adapters(net(), ["q"], Rows, size=0.5)
    adapt(model["adapter"], Rows(4, 4, size=2.0))
    save_adapter(model, tmp_path / "a.pt")
    again, x = load_adapter(net(), tmp_path / "a.pt"), torch.randn(3, 4)
    assert type(again["q"].adapter) is Rows and again["q"].adapter.settings == {"size": 0.5}
    for name in ("adapter", "q"):
        assert torch.equal(again[name](x), model[name](x)) and not torch.equal(model[name](x), net()[name](x))
    with pytest.raises(RuntimeError, match="Broken.*no_such_name"):  # and not: "no attribute 'weight'"
        adapted(nn.Linear(4, 4), Broken).weight


def test_the_plain_models_state_reaches_w0():
    base, model = Net().state_dict(), adapted_net()
    for value in base.values():
        value.add_(1)
    missing, unexpected = model.load_state_dict(base, strict=False)
    assert torch.equal(model.up_proj.W0, base["up_proj.weight"]) and torch.equal(model.head.bias, base["head.bias"])
    assert not unexpected and all(".adapter." in name for name in missing)


def test_hooks_and_flags_set_before_and_after_hold_inside_merged_and_on_the_merged_layer_too():
    model, x, calls = Net(), torch.randn(2, 32), []
    model.up_proj.my_flag = "kept"
    model.up_proj.register_forward_hook(lambda *_: calls.append("before"))
    apply_adapters(model, ["up_proj"])
    model.up_proj.register_forward_pre_hook(lambda *_: calls.append("after"))
    assert model.up_proj.my_flag == "kept"
    model(x)
    with merged(model):
        model(x)
    assert merge_adapters(model).up_proj.my_flag == "kept"
    model(x)
    assert calls == ["after", "before"] * 3


def test_pefts_parameters_are_not_taken_for_ours_and_a_layer_inside_pefts_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with leaves_unchanged(model), pytest.raises(ValueError, match="merge peft's adapter first"):
        apply_adapters(model, ["base_layer"])
    apply_adapters(model, ["down_proj"])
    assert {name.rpartition(".lora_")[0] for name in trainable(model)} == {"base_model.model.down_proj.adapter"}
    assert {name.rpartition(".lora_")[0] for name in adapter_state_dict(model) if "lora_" in name} == {
        "base_model.model.down_proj.adapter"}
    x = torch.randn(3, 32)
    expected = randomise(model)(x)
    torch.testing.assert_close(merge_adapters(model).merge_and_unload()(x), expected, rtol=1e-3, atol=1e-4)


# ---- In Hugging Face's models ----------------------------------------------------------------------------------------


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=32, resid_pdrop=0,
                                     embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def test_gpt2_trains_under_either_checkpointing_merges_and_is_saved_whole(tmp_path):
    model = tiny_gpt2()
    plain, ids, found = copy.deepcopy(model), torch.randint(2, 50, (2, 7)), []
    apply_adapters(model, ["c_attn", "mlp.c_proj"], init_std=0.1)
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(gradients(model))
    assert all(g.any() for g in found[0])
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)

    model.gradient_checkpointing_disable()
    adapted = model.eval()(input_ids=ids).logits
    merge_adapters(model)
    kinds = [{name: type(m) for name, m in each.named_modules()} for each in (model, plain)]
    assert kinds[0] == kinds[1] and not torch.allclose(adapted, plain.eval()(input_ids=ids).logits, atol=1e-4)
    torch.testing.assert_close(model(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.slow
def test_hugging_faces_trainer_trains_saves_resumes_and_keeps_the_best(tmp_path):
    """With the README's callback."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    names = {"set_warmup": set_warmup}
    exec(readme("class ScaleWarmup"), names)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(50, (16, 7))]

    def trainer():
        model = tiny_gpt2()
        torch.manual_seed(1)
        apply_adapters(model, ["c_attn", "mlp.c_proj"], init_std=0.1)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=8, per_device_train_batch_size=4, learning_rate=0.02, report_to=[], use_cpu=True,
            gradient_checkpointing=True, save_steps=4, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True)
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows,
                                    callbacks=[names["ScaleWarmup"]()])

    first = trainer()
    before = {name: p.clone() for name, p in first.model.named_parameters()}
    first.train()
    losses = [line["eval_loss"] for line in first.state.log_history if "eval_loss" in line]
    moved = {name for name, p in first.model.named_parameters() if not torch.equal(p, before[name])}
    assert losses[1] < losses[0] and moved == {name for name in before if "lora_" in name}
    assert first.model.transformer.h[0].attn.c_attn.adapter.warmup == torch.tensor(8 / 30)

    shutil.rmtree(tmp_path / "checkpoint-8")
    second = trainer()
    second.train(resume_from_checkpoint=True)
    for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values()):
        assert torch.equal(a, b)


# ---- Saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls, settings", [(DualLoRA, {"r1": 2, "r2": 3, "dropout": 0.1}),
                                           (LoRA, {"r": 3, "dropout": 0.1}), (Rows, {"size": 0.3})])
def test_a_file_gives_the_same_logits_to_the_bit_on_a_fresh_model_and_only_there(cls, settings, tmp_path):
    model, x, path = adapted_net(cls, **settings).eval(), torch.randn(4, 32), tmp_path / "adapter.pt"
    save_adapter(model, path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.pt"]
    base, state = Net(), torch.random.get_rng_state()
    assert load_adapter(base, path) is base and torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(base.eval()(x), model(x)) and trainable(base) == trainable(model)
    assert base.up_proj.adapter.settings == model.up_proj.adapter.settings
    with leaves_unchanged(base), pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(base, path)


def test_the_warmups_factor_and_running_statistics_are_in_the_file(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))

    model, x = randomise(apply_adapters(net(), ["0"])), torch.randn(32, 8) + 3
    set_warmup(model, 0.25)
    model.train()(x)
    save_adapter(model.requires_grad_(False), tmp_path / "a.pt")  # frozen adapters are in it too
    again = load_adapter(net(), tmp_path / "a.pt")
    assert again[0].adapter.warmup == 0.25 and torch.equal(again.eval()(x), model.eval()(x))


def test_state_dict_alone_restores_a_layer_that_was_made_on_the_meta_device():
    model, x = adapted_net(), torch.randn(4, 32)
    set_warmup(model, 0.5)
    with torch.device("meta"):
        fresh = Net()
    apply_adapters(fresh, ["up_proj", "down_proj"])
    assert fresh.up_proj.weight.shape == (64, 32)  # a device without autocast
    fresh.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("change, words", [
    (lambda layers, state: state.pop("down_proj.adapter.lora_B"), "lacks 'down_proj.adapter.lora_B'"),
    (lambda layers, state: state.update({"other": torch.zeros(1)}), "has 'other'"),
    (lambda layers, state: layers["up_proj"][1].update(r3=1), "r3"),
    (lambda layers, state: state.update({"head.weight": torch.zeros(4, 32)}), r"\[4, 32\].*\[3, 32\]"),
    (lambda layers, state: layers.update(gate_proj=layers.pop("up_proj")), "gate_proj is no linear layer"),
    (lambda layers, state: layers.update(up_proj=("Other", {})), "KeyError: 'Other'"),
    (lambda layers, state: layers.update(up_proj=os.getcwd), "UnpicklingError")])  # code in a file is not run
def test_a_file_that_does_not_fit_is_refused_in_one_line_and_the_model_left_alone(change, words, tmp_path):
    model, path = adapted_net(), tmp_path / "adapter.pt"
    save_adapter(model, path)
    content, base = torch.load(path, weights_only=True), Net()
    change(content["adapters"], content["state"])
    torch.save(content, path)
    with leaves_unchanged(base), pytest.raises(ValueError, match=words) as error:
        load_adapter(base, path)
    assert "\n" not in str(error.value)


def test_a_file_cut_short_is_refused_and_a_missing_one_is_said_to_be_missing(tmp_path):
    base, path = Net(), tmp_path / "adapter.pt"
    with pytest.raises(FileNotFoundError):
        load_adapter(base, path)
    save_adapter(adapted_net(), path)
    whole = path.read_bytes()
    for length in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with leaves_unchanged(base), pytest.raises(ValueError, match="cut short"):
            load_adapter(base, path)


def test_a_file_holds_plain_numbers_and_no_more_than_its_tensors_and_is_written_through_a_link(tmp_path):
    numpy = pytest.importorskip("numpy")
    model = apply_adapters(Net(), "up_proj", r1=numpy.int64(2), alpha=numpy.float64(8), init_std=numpy.float32(0.3))
    model.up_proj.adapter.lora_B.data = torch.zeros(640, 320)[:64, :2]  # a view of something large
    (tmp_path / "link.pt").symlink_to(tmp_path / "a.pt")
    save_adapter(model, tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink() and (tmp_path / "a.pt").stat().st_size < 20_000
    again = load_adapter(Net(), tmp_path / "a.pt").up_proj.adapter
    assert again.settings == model.up_proj.adapter.settings and type(again.settings["alpha"]) is float


def test_what_is_made_in_inference_mode_trains_later(tmp_path):
    save_adapter(adapted_net(), tmp_path / "a.pt")
    models = Net(), Net(), adapted_net()
    with torch.inference_mode():
        apply_adapters(models[0], "up_proj")
        load_adapter(models[1], tmp_path / "a.pt")
        apply_adapters(merge_adapters(models[2]), "up_proj")
    for model in models:
        set_warmup(model, 0.5)
        model(torch.randn(2, 32)).sum().backward()
        assert all(g is not None for g in gradients(model))


def partition(model):
    for p in model.parameters():
        p.data = torch.empty(0)


@pytest.mark.parametrize("change, words", [(lambda model: model.to("meta"), "is on the meta device"),
                                           (partition, "has no elements here.*GatheredParameters")])
def test_tensors_that_are_not_there_are_refused_with_the_way_out(change, words, tmp_path):
    """As accelerate's offloading and DeepSpeed's ZeRO-3 leave them."""
    model = adapted_net()
    change(model)
    save_adapter(adapted_net(), tmp_path / "whole.pt")
    fresh = Net()
    change(fresh)
    with pytest.raises(ValueError, match="meta|elements"):
        load_adapter(fresh, tmp_path / "whole.pt")
    (tmp_path / "whole.pt").unlink()
    for verb in (merge_adapters, lambda model: merged(model).__enter__(),
                 lambda model: save_adapter(model, tmp_path / "a.pt")):
        with pytest.raises(ValueError, match=words):
            verb(model)
    assert not any(tmp_path.iterdir())


def test_a_model_sharded_by_the_older_class_is_refused_with_the_way_out(tmp_path):
    model = type("FullyShardedDataParallel", (nn.Sequential,), {})(adapted_net())
    with pytest.raises(ValueError, match="use torch's fully_shard"):
        save_adapter(model, tmp_path / "a.pt")


def test_a_write_error_leaves_the_old_file_and_another_processes_half_one(tmp_path, monkeypatch, full_disk):
    path = tmp_path / "adapter.pt"
    monkeypatch.setattr(os, "getpid", lambda: 1)
    (tmp_path / "adapter.pt.2.tmp").write_bytes(b"half")  # of process 2, which saves to the same path
    save_adapter(adapted_net(), path)
    before = path.read_bytes()
    full_disk()
    with pytest.raises(OSError):
        save_adapter(adapted_net(seed=4), path)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.pt", "adapter.pt.2.tmp"]


# ---- Merging, and the file itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ADAPTERS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_merging_leaves_plain_frozen_layers_and_the_sum_rounded_once(cls, base):
    model = randomise(apply_adapters(Net().to(base), ["up_proj"], cls), std=0.02).eval()
    W0, dW = model.up_proj.W0, model.up_proj.adapter.delta_weight()
    assert merge_adapters(model) is model and list(model.state_dict()) == list(Net().state_dict())
    plain = model.up_proj
    assert type(plain) is nn.Linear and not plain.training and not plain.weight.requires_grad
    assert torch.equal(plain.weight, (W0.float() + dW).to(base))


@pytest.mark.parametrize("cls", ADAPTERS)
def test_inside_merged_it_is_a_plain_product_the_file_has_the_adapters_and_afterwards_all_is_as_it_was(cls, tmp_path):
    model, x = adapted_net(cls), torch.randn(5, 32)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    with leaves_unchanged(model):
        with torch.inference_mode(), merged(model) as inside:
            with merged(model):
                pass  # it stays merged
            assert inside is model and model.up_proj.weight is model.up_proj.weight
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            save_adapter(model, tmp_path / "a.pt")
        with pytest.raises(KeyError), merged(model):
            raise KeyError
    assert torch.equal(model(x), expected) and torch.equal(load_adapter(Net(), tmp_path / "a.pt")(x), expected)
    model(x).sum().backward()
    assert all(g is not None for g in gradients(model))
    layer = model.up_proj
    with merged(layer):
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_copy_made_inside_merged_is_not_merged_and_merging_there_is_refused():
    model, other, x = adapted_net(), adapted_net(seed=4), torch.randn(4, 32)
    with merged(model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                  torch.optim.swa_utils.AveragedModel(model).module]
        with leaves_unchanged(model), pytest.raises(ValueError, match="inside `merged`"):
            merge_adapters(model)
    for each in copies:
        each.load_state_dict(other.state_dict())
        assert torch.equal(each(x), other(x)) and each(x).requires_grad


def test_on_a_gpu_w0_waits_in_the_cpus_memory_inside_merged(monkeypatch):
    """By fake tensors, which have a device and no memory."""
    for name in ("uniform_", "kaiming_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    monkeypatch.setattr(dual_lora, "cpu_zeros", lambda *shape: torch.zeros(shape, device="cuda"))
    monkeypatch.setattr(DualLoRA, "to", lambda self, device: self)  # which fake tensors refuse
    with torch._subclasses.fake_tensor.FakeTensorMode():
        layer = adapted(nn.Linear(8, 8, device="cuda"))
        W0 = layer.W0
        memory = StorageWeakRef(W0.untyped_storage())
        with merged(layer):
            assert memory.expired() and layer.weight.device.type == "cuda"
            layer(torch.empty(2, 8, device="cuda"))
        assert layer.W0 is W0


def readme(words):
    """The README's piece of Python with these words in it."""
    path = os.path.join(os.path.dirname(dual_lora.__file__), "README.md")
    with open(path, encoding="utf-8") as file:
        blocks = [block.partition("```")[0] for block in file.read().split("```python\n")[1:]]
    return next(block for block in blocks if words in block)


def test_the_readmes_method_is_the_files():
    names = {}
    exec(readme("class DualLoRA"), names)
    ours, theirs = (cls(64, 32, r1=3, r2=2, alpha=4.0, init_std=0.5) for cls in (DualLoRA, names["DualLoRA"]))
    for p, other in zip(ours.parameters(), theirs.parameters()):
        other.data.copy_(p.data)
    ours.warmup.fill_(0.5)
    theirs.warmup = 0.5
    x, W0, bias, found = torch.randn(5, 32), torch.randn(64, 32), torch.randn(64), []
    for adapter in (ours, theirs):
        y = adapter(x, W0, bias)
        y.square().mean().backward()
        found.append([y, adapter.delta_weight(), *gradients(adapter)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_the_readmes_example_runs_as_it_stands(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.RobertaConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=50,
        max_position_embeddings=40, pad_token_id=1, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = transformers.RobertaForSequenceClassification(config)
    fresh = copy.deepcopy(model)
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", lambda name: model)
    batches = [{"input_ids": torch.randint(2, 50, (4, 7)), "labels": torch.tensor([0, 1, 0, 1])} for _ in range(40)]
    names = {"batches": batches, "validation": batches[:1]}
    exec(readme("apply_adapters(model"), names)
    again = type(model).from_pretrained("out").eval()
    assert torch.equal(again(**batches[0]).logits.argmax(-1), names["predictions"][0])
    fresh = load_adapter(fresh, "adapter.pt").eval()
    torch.testing.assert_close(fresh(**batches[0]).logits, again(**batches[0]).logits, rtol=1e-4, atol=1e-5)


def test_the_file_needs_torch_and_the_standard_library_alone():
    with open(dual_lora.__file__, encoding="utf-8") as file:
        nodes = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {(getattr(node, "module", None) or node.names[0].name).partition(".")[0] for node in nodes}
    assert names - {"torch"} <= sys.stdlib_module_names
