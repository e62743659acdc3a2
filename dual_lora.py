"""Dual LoRA in one file: fine-tuning that learns separately how far each weight moves and which way.

    W = W0 + dW        dW = s * ReLU(B A) ⊙ Sign(D C)        s = alpha / sqrt(r1 r2)

    W0  (out, in)                 the pre-trained weight, frozen
    A   (r1, in)    B (out, r1)   magnitude: ReLU(BA) is how far each weight moves; where BA < 0 it stays
    C   (r2, in)    D (out, r2)   direction: Sign(DC) is +1 or -1

Xu, Li, Yin, Tiwari, Li, Sirasao, Barsoum: "Dual LoRA: Enhancing LoRA with Magnitude and Direction Updates",
arXiv 2512.03402. With r1 = r2 = r / 2 it has as many parameters as LoRA of rank r.

Why apart. A step of full fine-tuning moves every weight in some direction by some size. LoRA learns both as one number,
an entry of the low-rank BA. Dual LoRA gives each a low-rank product of its own. ReLU and Sign act on every entry, so dW
is not of low rank. That alone is no gain: LoRA with as many parameters comes closer to full fine-tuning's own update
(README). A possible gain: "leave this weight alone" is a region, BA < 0, not a coincidence of terms that cancel.

An example: r1 = r2 = s = 1, and the gradient G = dL/dW is 0.5 everywhere, so every weight should fall.

    B = [ 1]  A = [2 -1]      BA = [ 2 -1]     ReLU(BA) = [2 0]
        [-1]                       [-2  1]                [0 1]
    D = [ 1]  C = [0.1 1]     DC = [ 0.1  1]   Sign(DC) = [+ +]     so   dW = [2  0]
        [-1]                       [-0.1 -1]              [- -]               [0 -1]

Backward, the ReLU passes the gradient where BA > 0, and the sign passes it as if it were the identity. (dA to dD are
gradients, dL/dA to dL/dD. dW alone is a change.)

    g_m = G ⊙ Sign(DC) where BA > 0 = [0.5  0  ]     dB = g_m A^T = [1  ]     dA = B^T g_m = [0.5 0.5]
                                      [0   -0.5]                    [0.5]
    g_d = G ⊙ ReLU(BA)              = [1  0  ]       dD = g_d C^T = [0.1]     dC = D^T g_d = [1  -0.5]
                                      [0  0.5]                      [0.5]

One step of SGD at a rate of 0.2:

    BA = [ 1.52 -0.88]     DC = [-0.098  1.078]     dW = [-1.52  0   ]
         [-2.09  1.21]          [ 0.11  -1.21 ]          [ 0    -1.21]

The entry -1 became -1.21: its direction was right, and its size grew. The entry 2 became -1.52: DC was near zero there,
and the sign turned, a jump by twice the size. The zeros, half of all entries at the start, stay: the ReLU passes them
no gradient, and only other entries' gradients can move A and B so that they come alive. The size of DC is invisible in
dW. It only says how hard a sign is to turn: init_std against the learning rate decides how freely signs turn.

Step 0. LoRA starts with B = 0, so that dW = 0. Here B = 0 would be the end: the ReLU passes no gradient at 0, and none
of the four would ever move. So all start random. dW is then not zero, and a factor on it grows from 0 to 1 over the
first steps (set_warmup; without a call it is 1). At 0, for one step, the model is the pre-trained one.

How to set it. After the warm-up dW has about alpha init_std^2 / (sqrt(2 r2) rms(W0)) of W0's norm. Choose init_std for
1 to 20 %: within that it hardly mattered, and at 80 % one task of two failed (one model). alpha also scales each step
of dW. Leave it at 16: four times as much did worse, at lower rates too. Start from twice the rate that suits LoRA.

    from dual_lora import apply_adapters, merge_adapters, save_adapter, set_warmup

    apply_adapters(model, ["q_proj", "v_proj"], r1=4, r2=4)      # freezes all but the adapters
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.0)    # search around twice LoRA's rate
    for step, batch in enumerate(batches):
        set_warmup(model, min(1.0, step / 30))
        loss = model(batch); loss.backward(); optimizer.step(); optimizer.zero_grad()
    save_adapter(model, "adapter.pt")                            # load_adapter(fresh_model, "adapter.pt")
    merge_adapters(model)                                        # plain layers again, with W0 + dW

Needs torch 2.4 or newer.
"""
import contextlib
import copy
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# ---- The method ------------------------------------------------------------------------------------------------------


def sign_(x):
    """x in place: +1 where it is > 0, else -1. torch.sign(0) is 0, which would switch the entry off."""
    return x.sign_().sub_(0.5).sign_()  # torch.where(x > 0, 1.0, -1.0) takes a CPU ten times as long


class SignSTE(torch.autograd.Function):
    """Sign(x), any shape. Its true derivative is zero, and nothing would learn. So the gradient goes straight through,
    clipped to [-1, 1] by value as in the paper. In float32 and bfloat16 the clip never acted in any run we made, and
    other estimators gave the same weights to the bit. A float16 loss scaler would make it act: do not use one."""

    @staticmethod
    def forward(ctx, x):
        return sign_(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


sign_ste = SignSTE.apply


class AdaptedLinear(nn.Linear):
    """Base class of the adapted layers: `weight` reads W0 + dW (effective_weight). A subclass adds delta_weight."""

    merged_weight = None  # W0 + dW inside `merged`

    @property
    def weight(self):
        return effective_weight(self)

    def forward(self, x):
        return F.linear(x, out_in(self, self.weight), self.bias)


class DualLoRALinear(AdaptedLinear):
    """x (..., in) -> F.linear(x, W0 + dW, bias) (..., out), in the place of `linear`.

    linear: an nn.Linear, or Hugging Face's Conv1D. Its weight and bias, the same Parameters, are taken over and frozen.
    dropout acts on x in the adapter's branch; a step then takes five large products instead of three.
    """

    def __init__(self, linear, r1=8, r2=8, alpha=16.0, dropout=0.0, init_std=0.02):
        # In place of super().__init__(), which would allocate a second weight.
        take_over(self, linear, r1=r1, r2=r2, alpha=alpha, dropout=dropout, init_std=init_std)
        self.scaling, self.dropout = alpha / math.sqrt(r1 * r2), dropout
        # No matrix starts at zero: see "Step 0" above.
        self.lora_A = new_parameter(self, r1, self.in_features, std=init_std)
        self.lora_B = new_parameter(self, self.out_features, r1, std=init_std)
        self.lora_C = new_parameter(self, r2, self.in_features, std=init_std)
        self.lora_D = new_parameter(self, self.out_features, r2, std=init_std)
        # A tensor, not a number: torch.compile would compile again whenever a number changes.
        self.register_buffer("warmup", torch.ones((), device=self.lora_A.device))

    def delta_weight(self):
        """dW (out, in), differentiable by plain autograd. W_m is the magnitude, W_d the direction."""
        with autocast_off(self.lora_A):
            W_m = (self.lora_B @ self.lora_A).relu()
            W_d = sign_ste(self.lora_D @ self.lora_C)
            return self.warmup * self.scaling * (W_m * W_d)

    def forward(self, x):
        """Without dropout F.linear(x, W0 + delta_weight(), bias), gradients included, but keeps no such matrix."""
        if self.merged_weight is not None:
            return super().forward(x)
        check_precision(self)
        W0, adapter = base_weight(self), (self.lora_A, self.lora_B, self.lora_C, self.lora_D)
        s = self.warmup * self.scaling
        if self.training and self.dropout > 0:
            zeros = W0.new_zeros(self.out_features, 1)  # in W0's place, for the adapter's branch alone
            branch = DualLinear.apply(F.dropout(x, self.dropout), zeros, None, *adapter, s)
            return F.linear(x, W0, self.bias) + branch
        return DualLinear.apply(x, W0, self.bias, *adapter, s)


# ---- The memory-saving backward pass: the same numbers with less memory. The hard thing in this file. ----------------
#
# Plain autograd keeps W_m = ReLU(BA), W_d = Sign(DC) and W for the backward pass, each as large as W0. None needs to be
# kept: BA and DC are formed again from the small matrices, which is cheap beside the three large products that full
# fine-tuning has as well: y = x W^T, dL/dx = dL/dy W and G = dL/dW = (dL/dy)^T x. Below s holds the warm-up's factor
# too, and sW_m = s ReLU(BA) = ReLU((sB) A), since s is never negative:
#
#     g_m = G ⊙ W_d ⊙ [BA > 0]            dB = s g_m A^T     dA = (sB)^T g_m
#     g_d = Clip(G ⊙ sW_m, -1, 1)         dD = g_d C^T       dC = D^T g_d
#
# The scale only ever multiplies thin matrices, where it costs nothing.


class DualLinear(torch.autograd.Function):
    """y = x (W0 + dW)^T + bias."""

    @staticmethod
    def forward(ctx, x, W0, bias, A, B, C, D, s):
        W = W0.new_empty(B.shape[0], A.shape[1])
        with autocast_off(A):
            sB = s * B
            for rows in row_blocks(B, A):
                sW_m, W_d = (sB[rows] @ A).relu_(), sign_(D[rows] @ C)
                W[rows] = sW_m.mul_(W_d).add_(W0[rows])
        y = F.linear(x, W, bias)
        ctx.save_for_backward(x.to(y.dtype), W0, A, B, C, D, s)  # y has autocast's dtype, where that is on
        return y

    @staticmethod
    @once_differentiable  # a second derivative raises an error: this function would get it wrong
    def backward(ctx, gy):
        x, W0, A, B, C, D, s = ctx.saved_tensors
        gy_rows = gy.reshape(-1, gy.shape[-1])        # (N, out)
        G = gy_rows.t() @ x.reshape(-1, x.shape[-1])  # (out, in)
        gW0 = G.clone() if ctx.needs_input_grad[1] else None
        dA, dB, dC, dD = torch.zeros_like(A), torch.empty_like(B), torch.zeros_like(C), torch.empty_like(D)
        compiling = torch.compiler.is_compiling()
        if compiling:
            # subtle: the compiler sees both passes at once, finds BA and DC in both, and would keep the first ones.
            # Here A and C seem to depend on gy, so BA and DC are other matrices to it, and are formed again.
            A, C = torch.where(gy_rows[0, 0] > 0, A, A), torch.where(gy_rows[0, 0] > 0, C, C)
        with autocast_off(A):
            sB = s * B
            for rows in row_blocks(B, A):
                sW_m, W_d = (sB[rows] @ A).relu_(), sign_(D[rows] @ C)
                g = G[rows].to(A.dtype)
                g_m = sW_m.sign().mul_(g).mul_(W_d)  # sW_m >= 0: its sign is [BA > 0]; at s = 0 it is 0
                g_d = (sW_m * g).clamp_(-1, 1)
                dA.addmm_(sB[rows].t(), g_m)
                dB[rows] = s * (g_m @ A.t())
                dC.addmm_(D[rows].t(), g_d)
                dD[rows] = g_d @ C.t()
                G[rows] = sW_m.mul_(W_d).add_(W0[rows])  # G is read: W takes its place
        gx = gy @ G if compiling or ctx.needs_input_grad[0] else None  # which is wrong where torch 2.4 compiles
        gbias = gy_rows.sum(0) if ctx.needs_input_grad[2] else None
        return gx, gW0, gbias, dA, dB, dC, dD, None


def row_blocks(B, A):
    """Slices of BA's rows: on a CPU as many rows as fit its cache, on a GPU or compiled all at once."""
    if torch.compiler.is_compiling() or not B.is_cpu:
        return [slice(None)]
    step = max(1, 2**17 // A.shape[1])  # half a megabyte of float32
    return [slice(start, start + step) for start in range(0, B.shape[0], step)]


NO_AUTOCAST = [kind for kind in ("meta", "mps") if not torch.amp.is_autocast_available(kind)]  # mps: torch 2.4


def autocast_off(tensor):
    """For BA and DC, which are formed in float32.

    subtle: the sign jumps. Where DC is near zero, a rounding error turns the sign, and dW's entry changes by twice its
    size. bfloat16 factors turn 0.05 to 0.07 % of the signs: dW is wrong by 4 to 5 %, where LoRA's would be by 0.2 %.
    Hence float32 adapters on any base. TF32 (torch.backends.cuda.matmul.allow_tf32, off by default) is left as it is.
    """
    kind = tensor.device.type
    return torch.autocast("cpu" if kind in NO_AUTOCAST else kind, enabled=False)


# ---- LoRA, to compare with -------------------------------------------------------------------------------------------


class LoRALinear(AdaptedLinear):
    """LoRA (Hu et al., arXiv 2106.09685): y = x W0^T + bias + alpha / r * B A x, A (r, in), B (out, r).

    B starts at 0, so dW does. forward never builds dW: two thin products take its place. See DualLoRALinear for more.
    """

    def __init__(self, linear, r=16, alpha=16.0, dropout=0.0):
        take_over(self, linear, r=r, alpha=alpha, dropout=dropout)
        self.scaling, self.dropout = alpha / r, dropout
        std = 1 / math.sqrt(3 * self.in_features)  # Kaiming's uniform, as in peft
        self.lora_A = new_parameter(self, r, self.in_features, std=std, uniform=True)
        self.lora_B = new_parameter(self, self.out_features, r, std=0.0)

    def delta_weight(self):
        """dW (out, in)."""
        with autocast_off(self.lora_A):
            return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x):
        if self.merged_weight is not None:
            return super().forward(x)
        check_precision(self)
        y = F.linear(x, base_weight(self), self.bias)
        Ax = F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)
        return (y + self.scaling * F.linear(Ax, self.lora_B)).to(y.dtype)


# ---- The verbs -------------------------------------------------------------------------------------------------------


def apply_adapters(model, targets, layer=DualLoRALinear, **settings):
    """Freeze `model` and put layer(linear, **settings) in the place of every linear layer in `targets`; returns model.

    A target is the last component of a module's name, or a dotted end of it: "q_proj", "attn.c_attn". Earlier adapters
    stay trainable; all else is frozen, a head too, so thaw that afterwards. ValueError or TypeError, before anything
    has changed, for a target that matches no linear layer and for a layer that cannot take an adapter (check_layer).
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    names = list(linear_layers(model))
    known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(f"target {target!r} matches no linear layer: choose from {known}")
    if not targets:
        raise ValueError(f"targets is empty: choose from {known}")
    ends = tuple(f".{target}" for target in targets)
    insert(model, {name: (layer, settings) for name in names if f".{name}".endswith(ends)})
    return model


def set_warmup(model, factor):
    """Set the factor on dW of every Dual LoRA layer. It is part of the state, and is saved. ValueError: not 0 to 1."""
    if not 0 <= factor <= 1:
        raise ValueError(f"factor is {factor}: it should be from 0 to 1")
    for layer in adapted_layers(model).values():
        if isinstance(layer, DualLoRALinear):
            layer.warmup.fill_(factor)


def adapter_state_dict(model):
    """{name: tensor}, not copied: the adapters, whatever else is trainable, such as a head, and persistent buffers."""
    ours = adapter_names(model)
    return {plain_name(name): t.detach() for name, t in named_tensors(model).items()
            if t.requires_grad or name in ours or not isinstance(t, nn.Parameter)}


def save_adapter(model, path):
    """Write adapter_state_dict(model), and what rebuilds the adapters, to `path`, whole or not at all."""
    layers = {plain_name(name): (type(m).__name__, m.settings) for name, m in adapted_layers(model).items()}
    state = {name: tensor.cpu() for name, tensor in adapter_state_dict(model).items()}
    if not state:
        raise ValueError("nothing to save: the model has no adapters and no trainable parameter")
    save_atomically({"layers": layers, "state": state}, path)


def load_adapter(model, path):
    """Put the adapters of `path`, and what else it holds, such as a head, on a fresh base model; returns model.

    What the file holds becomes trainable, all else is frozen. ValueError, before anything has changed, where the file
    is damaged, or a name or shape in file and model differ.
    """
    inner = unwrapped(model)
    layers, state = read_adapter(path)
    linears = linear_layers(inner)
    # What the file must hold: the model's buffers, what the file itself names, and below each adapter's tensors.
    shapes = {name: t.shape for name, t in named_tensors(inner).items()
              if name in state or not isinstance(t, nn.Parameter)}
    with torch.random.fork_rng(devices=[]):  # the layers' random start is overwritten: the caller's generator stays
        for name, (cls, settings) in layers.items():
            if name not in linears:
                raise ValueError(f"{path} has an adapter for {name!r}, and this model has no such linear layer")
            check_layer(inner, name)
            shape = linears[name].weight.shape
            in_out = shape if is_conv1d(linears[name]) else shape[::-1]
            expected = cls(nn.Linear(*in_out, bias=False, device="meta"), **settings)
            shapes.update({f"{name}.{key}": t.shape for key, t in named_tensors(expected).items() if key != "weight"})
        for name in {**state, **shapes}:
            if name not in state or name not in shapes:
                raise ValueError(f"{path} {'has' if name in state else 'lacks'} {name!r}, unlike this model")
            if state[name].shape != shapes[name]:
                raise ValueError(f"{path}: {name!r} is {[*state[name].shape]} there, "
                                 f"and {[*shapes[name]]} in this model")
        insert(inner, layers)
    tensors = named_tensors(inner)
    with torch.no_grad():
        for name, value in state.items():
            tensors[name].copy_(value)
            if isinstance(tensors[name], nn.Parameter):
                tensors[name].requires_grad_(True)
    return model


def merge_adapters(model):
    """Turn every adapted layer back into the plain one, with W0 + dW; returns model. There is no way back.

    A bfloat16 weight cannot take up what is below half a unit in its last place.
    """
    if isinstance(model, AdaptedLinear):
        return plain_layer(model)
    for name, layer in adapted_layers(model).items():
        replace(model, name, plain_layer(layer))
    return model


@contextlib.contextmanager
def merged(model):
    """Inside, every adapted layer is one plain product with W0 + dW: evaluation and generation at the base's speed.

    Afterwards, an error included, W0 is what it was, to the bit: no module is swapped and nothing is subtracted. On a
    GPU W0 waits in the CPU's memory meanwhile, so that the weights are there once. The adapters do not train inside.
    """
    layers = [layer for layer in adapted_layers(model).values() if layer.merged_weight is None]
    try:
        with torch.inference_mode(False), torch.no_grad():  # a caller's inference mode would taint W0
            for layer in layers:
                W0, layer.merged_weight = layer._parameters["weight"], effective_weight(layer)
                if not W0.is_cpu:
                    W0.data = W0.data.cpu()
        yield model
    finally:
        with torch.inference_mode(False):
            for layer in layers:
                if layer.merged_weight is not None:
                    W0 = layer._parameters["weight"]
                    W0.data = W0.data.to(layer.merged_weight.device)
                    del layer.merged_weight


# ---- What the layers are made of -------------------------------------------------------------------------------------


def take_over(layer, linear, **settings):
    """Give `layer` the parameters of `linear`, frozen, and all else that hangs on it, such as hooks and flags.

    `settings` rebuild the layer from its file. ValueError for one out of its range.
    """
    for name, value in settings.items():
        if name in ("r", "r1", "r2"):
            fits, expected = isinstance(value, int) and value >= 1, "a whole number, 1 or more"
        elif name == "dropout":
            fits, expected = 0 <= value < 1, "at least 0 and below 1"
        else:
            fits, expected = 0 < value < math.inf, "a number above 0"
        if not fits:
            raise ValueError(f"{name} is {value!r}: it should be {expected}")
    layer.__dict__.update(linear.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):  # dicts of its own; those of hooks are shared
        layer.__dict__[kind] = linear.__dict__[kind].copy()
    for p in layer._parameters.values():
        if p is not None:
            p.requires_grad_(False)
    layer.original = (linear,)  # for plain_layer; in a tuple, since it is no submodule
    layer.transposed = is_conv1d(linear)
    layer.out_features, layer.in_features = base_weight(layer).shape
    layer.settings = settings


def new_parameter(layer, *shape, std, uniform=False):
    """A float32 Parameter, drawn on the CPU, so that a seed means the same on every device, and without nn.init, which
    some loaders switch off."""
    drawn, bound = torch.zeros(shape, dtype=torch.float32, device="cpu"), math.sqrt(3) * std
    if std > 0:
        drawn = drawn.uniform_(-bound, bound) if uniform else drawn.normal_(std=std)
    return nn.Parameter(drawn.to(layer._parameters["weight"].device))


def out_in(layer, weight):
    """A weight as (out, in), a view where the layer is a Conv1D, which has it as (in, out); and back."""
    return weight.t() if layer.transposed else weight


def base_weight(layer):
    """W0 (out, in). It stays the Parameter "weight" of the layer: only reading the attribute gives W0 + dW."""
    return out_in(layer, layer._parameters["weight"])


def effective_weight(layer):
    """W0 + dW, summed in float32 and rounded once, in W0's layout and dtype; differentiable.

    This is what `layer.weight` reads, so a module that takes its child's weight and never calls it trains rightly
    (nn.MultiheadAttention, nn.TransformerEncoderLayer in evaluation). It is a new tensor each time: what is written
    into it is lost. W0 is layer._parameters["weight"].
    """
    if layer.merged_weight is not None:
        return layer.merged_weight
    try:
        W = base_weight(layer) + layer.delta_weight()
    except AttributeError as error:  # out of a property it would make nn.Module hand out W0 instead
        raise RuntimeError(f"delta_weight of {type(layer).__name__}: {error}") from error
    return out_in(layer, W).to(layer._parameters["weight"].dtype)


def check_precision(layer):
    if layer.lora_A.dtype in (torch.bfloat16, torch.float16):
        raise TypeError(f"the adapters were cast to {layer.lora_A.dtype}, too coarse to train: "
                        f"cast the model before apply_adapters, which then adds its parameters in float32")


@torch.no_grad()
def plain_layer(layer):
    """The layer as it was, class, layout, hooks and flags, but with W0 + dW."""
    plain = copy.copy(layer.original[0])
    plain.__dict__ = {key: layer.__dict__[key] for key in plain.__dict__}  # as they are now
    for kind in ("_parameters", "_buffers", "_modules"):
        plain.__dict__[kind] = {name: layer.__dict__[kind][name] for name in layer.original[0].__dict__[kind]}
    plain._parameters["weight"] = nn.Parameter(layer.weight.contiguous(), requires_grad=False)
    return plain


# ---- What the verbs are made of --------------------------------------------------------------------------------------


def is_conv1d(module):
    """Whether this is Hugging Face's Conv1D, a linear layer with weight (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_layers(model):
    """{name: module} of all linear layers, adapted ones too; a module with two names is there twice."""
    modules = unwrapped(model).named_modules(remove_duplicate=False)
    return {name: m for name, m in modules if name and (isinstance(m, nn.Linear) or is_conv1d(m))}


def adapted_layers(model):
    return {name: m for name, m in unwrapped(model).named_modules() if isinstance(m, AdaptedLinear)}


def adapter_names(model):
    """Names of the parameters that adapted layers have and plain ones do not. A name alone would not tell: peft has
    parameters called lora_A too."""
    return {f"{name}.{key}" for name, layer in adapted_layers(model).items()
            for key in layer._parameters if key not in layer.original[0]._parameters}


def named_tensors(model):
    """{name: tensor} of all parameters and persistent buffers. W0 is there under its own name, "weight"."""
    return {name: t for name, t in unwrapped(model).state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}


def unwrapped(model):
    """The model inside wrappers that put something before every name, such as torch.compile's."""
    while hasattr(model, "_orig_mod") or isinstance(model, (DistributedDataParallel, nn.DataParallel, AveragedModel)):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def plain_name(name):
    """The name that a layer, or a tensor, has where no layer is compiled by itself."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def replace(model, name, layer):
    owner, _, child = name.rpartition(".")
    setattr(unwrapped(model).get_submodule(owner), child, layer)


def insert(model, plan):
    """Put adapted layers into the model, plan = {name: (class, settings)}. Checks all, builds all, then changes."""
    model = unwrapped(model)
    for name in plan:
        check_layer(model, name)
    layers = {name: cls(model.get_submodule(name), **settings) for name, (cls, settings) in plan.items()}
    earlier = adapter_names(model)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name in earlier)
    for name, layer in layers.items():
        replace(model, name, layer)


def check_layer(model, name):
    """Refuse what would go wrong without a word."""
    linear, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    weight = linear._parameters.get("weight")
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    if isinstance(linear, AdaptedLinear):
        raise ValueError(f"{name} has an adapter already: merge it, or start from a fresh model")
    if getattr(owner, "base_layer", None) is linear:
        raise ValueError(f"{name} is inside a layer of peft, whose merging writes into its weight: "
                         f"merge peft's adapter first")
    if "forward" in linear.__dict__ or not (is_conv1d(linear) or type(linear).forward is nn.Linear.forward):
        raise ValueError(f"{name}: this {type(linear).__name__} has its own forward pass, which would be lost")
    if weight is None:
        raise TypeError(f"{name}: its weight is computed, as by weight_norm or pruning: remove that first")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:
        raise TypeError(f"{name}: its weight is a {type(weight).__name__} of {weight.dtype}: dequantise first")
    if len(names) > 1:
        raise ValueError(f"{name}: its weight is shared ({' and '.join(names)}): an adapter would not reach both")


def save_atomically(content, path):
    """torch.save under a temporary name, then rename: at no moment is there half a file under `path`."""
    temporary = f"{path}.{os.getpid()}.tmp"  # another process may save to the same path
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def read_adapter(path):
    """({layer's name: (class, settings)}, {name: tensor}) of a file by save_adapter; ValueError for any other."""
    classes = layer_classes(AdaptedLinear)
    open(path, "rb").close()  # a missing file raises its own error here
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        layers = {name: (classes[cls], settings) for name, (cls, settings) in content["layers"].items()}
        return layers, content["state"]
    except Exception as error:  # torch raises half a dozen kinds for a file cut short
        raise ValueError(f"{path} is cut short, or was not written by save_adapter ({type(error).__name__})") from None


def layer_classes(base):
    """{name: class} of all that derive from `base`, a user's own method too."""
    classes = {}
    for cls in base.__subclasses__():
        classes |= {cls.__name__: cls} | layer_classes(cls)
    return classes
