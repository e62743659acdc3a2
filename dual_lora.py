"""Dual LoRA in one file: fine-tuning that learns separately how far each weight moves and which way.

    W = W0 + dW        dW = s * ReLU(B A) ⊙ Sign(D C)        s = alpha / sqrt(r1 r2)

    W0  (out, in)                 the pre-trained weight, frozen
    A   (r1, in)    B (out, r1)   magnitude: ReLU(BA) is how far each weight moves; where BA <= 0 it stays
    C   (r2, in)    D (out, r2)   direction: Sign(DC) is +1 or -1

Xu, Li, Yin, Tiwari, Li, Sirasao, Barsoum: "Dual LoRA: Enhancing LoRA with Magnitude and Direction Updates",
arXiv 2512.03402. With r1 = r2 = r / 2 it has as many parameters as LoRA of rank r, whose dW is alpha / r * B A. ReLU
and Sign act on every entry, so dW is not of low rank. It still has no more free numbers than LoRA's.

An example: r1 = r2 = s = 1, and the gradient G = dL/dW is 0.5 everywhere: each weight should fall, if it can.

    B = [ 1]  A = [2 -1]      BA = [ 2 -1]     ReLU(BA) = [2 0]
        [-1]                       [-2  1]                [0 1]
    D = [ 1]  C = [0.1 1]     DC = [ 0.1  1]   Sign(DC) = [+ +]     so   dW = [2  0]
        [-1]                       [-0.1 -1]              [- -]               [0 -1]

Backward, the ReLU passes the gradient where BA > 0, and the sign passes it as if it were the identity.

    g_m = G ⊙ Sign(DC) where BA > 0 = [0.5  0  ]     dL/dB = g_m A^T = [1  ]     dL/dA = B^T g_m = [0.5 0.5]
                                      [0   -0.5]                       [0.5]
    g_d = G ⊙ ReLU(BA)              = [1  0  ]       dL/dD = g_d C^T = [0.1]     dL/dC = D^T g_d = [1  -0.5]
                                      [0  0.5]                         [0.5]

One step of SGD at a rate of 0.2, and LoRA's, of rank 1, from the same B and A (`python dual_lora.py` computes both):

    BA = [ 1.52 -0.88]     DC = [-0.098  1.078]     dW = [-1.52  0   ]     LoRA's dW = [ 2 -1], then [ 1.8 -0.9]
         [-2.09  1.21]          [ 0.11  -1.21 ]          [ 0    -1.21]                 [-2  1]       [-2.2  1.1]

LoRA's first column falls and its second rises: its rows are multiples of A, and they pull A in opposite ways, so A
stays. In Dual LoRA's dW, -1 became -1.21: the direction was right, and the size grew. 2 became -1.52: DC was near zero
there, and the sign turned, a jump by about twice the size. The zeros stay, since the ReLU passes them no gradient. They
come alive when other entries' gradients have moved their row of B or column of A far enough: 27 % of the zeros in
train.py's default run.

Step 0. LoRA starts with B = 0, so that dW = 0. Here that would be the end: the ReLU passes no gradient at 0, and none
of the four would ever move. So A and B start random. With D = 0 it would learn, but all signs would start as -1. So C
and D start random too. dW is then not zero: half of its entries are active. A warm-up factor on it grows from 0 to 1
over the first steps (set_warmup; without a call it is 1).

How to set it. An entry of BA has variance r1 init_std^4, and the ReLU keeps half of its square. So the entries of dW
start with root mean square alpha init_std^2 / sqrt(2 r2): r1 cancels, and a larger r2 starts smaller. Choose init_std
for 1 to 20 % of W0's root mean square (README). The learning rate needs its own search. How r is divided hardly
mattered: 2 + 6 and 6 + 2 trained as well as the paper's even 4 + 4. Use a mean loss and no float16 loss scaler, since
the sign's gradient is clipped by value.

How many steps turn a sign. An entry of DC has standard deviation sqrt(r2) init_std^2. A step of Adam moves each entry
of C and D by about the rate lr, and so DC by about lr init_std sqrt(2 r2). That makes about init_std / lr steps: after
that many, under a steady gradient, about a third of the signs had turned (26 to 40 %), for all settings tried.

                     the paper                                           this file
    formula          dW, Sign(0) = -1, the clip, r1 = r2 = r / 2         the same
    start            normal, its deviation not given                     N(0, init_std^2) for all four matrices
    warm-up of dW    over the first few steps, formula not given         a straight line, as in the loop below
    rate, alpha      the rate tuned and not given; alpha 64 for LLaMA    rates by search, alpha 16
    the rest         not in it                                           float32 factors, memory-saving backward, files

    import torch
    from dual_lora import apply_adapters, merge_adapters, save_adapter, set_warmup

    apply_adapters(model, ["q_proj", "v_proj"], r1=4, r2=4)           # freezes all but the adapters
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=0.0)
    for step, batch in enumerate(batches):
        set_warmup(model, min(1.0, (step + 1) / 30))
        loss = model(batch); loss.backward(); optimizer.step(); optimizer.zero_grad()
    save_adapter(model, "adapter.pt")                                 # load_adapter(fresh_model, "adapter.pt")
    merge_adapters(model)                                             # plain layers again, with W0 + dW

What was measured against LoRA is in the README. Needs torch 2.6 or newer.
"""
import contextlib
import math
import numbers
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# ---- The method ------------------------------------------------------------------------------------------------------


def sign_(x):
    """x in place: +1 where it is > 0, else -1. torch.sign(0) is 0, which would switch the entry off."""
    # 1, 0, -1 become 0.5, -0.5, -1.5, and these 1, -1, -1; torch.where(x > 0, 1.0, -1.0) takes a CPU ten times as long
    return x.sign_().sub_(0.5).sign_()


class SignSTE(torch.autograd.Function):
    """Sign(x), any shape. Its true derivative is zero, and nothing would learn. So the gradient goes straight through,
    clipped to [-1, 1] by value as in the paper. A summed loss or a float16 loss scaler makes the clip act."""

    @staticmethod
    def forward(ctx, x):
        return sign_(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


sign_ste = SignSTE.apply


class DualLoRA(nn.Module):
    """dW of one weight, and the layer's output with it."""

    def __init__(self, out_features, in_features, r1=8, r2=8, alpha=16.0, dropout=0.0, init_std=0.02):
        super().__init__()
        self.settings = plain_settings(r1=r1, r2=r2, alpha=alpha, dropout=dropout, init_std=init_std)
        self.scaling, self.dropout = alpha / math.sqrt(r1 * r2), dropout
        # All four start random: see "Step 0" above.
        self.lora_A = nn.Parameter(cpu_zeros(r1, in_features).normal_(std=init_std))
        self.lora_B = nn.Parameter(cpu_zeros(out_features, r1).normal_(std=init_std))
        self.lora_C = nn.Parameter(cpu_zeros(r2, in_features).normal_(std=init_std))
        self.lora_D = nn.Parameter(cpu_zeros(out_features, r2).normal_(std=init_std))
        # The factor on dW, from 0 to 1. A tensor, since torch.compile would compile again whenever a number changes.
        self.register_buffer("warmup", torch.ones((), dtype=torch.float32, device="cpu"))

    def delta_weight(self):
        """dW (out, in), differentiable by plain autograd. W_m is the magnitude, W_d the direction."""
        with in_float32(*self.parameters()):
            W_m = (self.lora_B @ self.lora_A).relu()
            W_d = sign_ste(self.lora_D @ self.lora_C)
            return self.warmup.to(W_m.dtype) * self.scaling * (W_m * W_d)

    def forward(self, x, W0, bias=None):
        """x (..., in), W0 (out, in) -> F.linear(x, W0 + dW, bias) (..., out), gradients included. It keeps no dW.

        Dropout acts on x in front of dW alone. W0 and dW then need products of their own, five instead of three.
        """
        s = self.warmup.to(self.lora_A.dtype) * self.scaling
        factors = self.lora_A, self.lora_B, self.lora_C, self.lora_D, s
        if self.training and self.dropout > 0:  # without W0 and bias DualLinear is x dW^T
            return F.linear(x, W0, bias) + DualLinear.apply(F.dropout(x, self.dropout), None, None, *factors)
        return DualLinear.apply(x, W0, bias, *factors)


# ---- The layer that an adapter sits in -------------------------------------------------------------------------------


class AdaptedLinear(nn.Linear):
    """The model's own nn.Linear or Conv1D, whose __class__ adapt() has set to this one, so that no module is replaced:
    x (..., in) -> adapter(x, W0, bias) (..., out).

    W0 is the pre-trained weight, the same Parameter. `weight` is no parameter: it reads W0 + dW, for a module that
    takes the weight of its child and never calls it, such as nn.MultiheadAttention. What is written into it is lost,
    for example when peft merges an adapter on top.
    """

    merged_weight = None  # W0 + dW inside `merged`

    def forward(self, x):
        if self.merged_weight is not None:
            return F.linear(x, self.out_in(self.merged_weight), self.bias)
        return self.adapter(x, self.out_in(self.W0), self.bias)

    @property
    def weight(self):
        """W0 + dW, summed in float32 and rounded once, in W0's layout and dtype; a new tensor, differentiable."""
        if self.merged_weight is not None:
            return self.merged_weight
        try:
            W = self.out_in(self.W0) + self.adapter.delta_weight()
        except AttributeError as error:  # out of a property it would read as "no attribute 'weight'"
            raise RuntimeError(f"delta_weight of {type(self.adapter).__name__}: {error}") from error
        return self.out_in(W).to(self.W0.dtype)

    def out_in(self, weight):
        """A weight of this layer's layout as (out, in), and back: Hugging Face's Conv1D has (in, out)."""
        return weight if issubclass(self.plain_class, nn.Linear) else weight.t()

    def __getstate__(self):
        """A copy or pickle that is made inside `merged` is of the layer as it is outside."""
        state = self.__dict__.copy()
        if state.pop("merged_weight", None) is not None:
            W0 = nn.Parameter(self.W0.to(self.merged_weight.device), self.W0.requires_grad)
            state["_parameters"] = self._parameters | {"W0": W0}
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """The state of the plain model fits too, with strict=False for what it lacks: its "weight" is W0."""
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}W0"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args)


def adapt(linear, adapter):
    """Put `adapter` into `linear`, and return linear: the same object, with its hooks and flags. It freezes nothing.

    An adapter of your own is an nn.Module made by YourClass(out_features, in_features, **settings), with
    delta_weight(), forward(x, W0, bias), and for save_adapter a dict `settings` of plain numbers.
    """
    if isinstance(linear, AdaptedLinear):
        raise ValueError("the layer has an adapter already")
    adapter.train(linear.training).to(linear.weight.device)
    plain_class, linear.__class__ = type(linear), AdaptedLinear
    linear.plain_class, linear.adapter = plain_class, adapter
    linear._parameters = {"W0" if name == "weight" else name: p for name, p in linear._parameters.items()}
    linear.out_features, linear.in_features = linear.out_in(linear.W0).shape  # a Conv1D has no such numbers
    if hasattr(adapter, "attach"):
        adapter.attach(linear)  # for a method whose dW depends on W0, such as DoRA
    return linear


def restore(linear):
    """The opposite of adapt: the plain layer with W0; returns linear."""
    if linear.merged_weight is not None:
        raise ValueError("the layer is inside `merged`: leave that first")
    linear.__class__ = linear.plain_class
    linear._parameters = {"weight" if name == "W0" else name: p for name, p in linear._parameters.items()}
    if not isinstance(linear, nn.Linear):
        del linear.out_features, linear.in_features
    del linear.plain_class, linear.adapter
    return linear


# ---- The memory-saving backward pass: the same numbers with less memory. The hardest part of this file. --------------
#
# Plain autograd keeps W_m = ReLU(BA), W_d = Sign(DC) and W for the backward pass, each as large as W0. None needs to be
# kept: BA and DC are formed again from the small matrices, which is cheap beside the three large products that full
# fine-tuning has as well: y = x W^T, dL/dx = dL/dy W and G = dL/dW = (dL/dy)^T x. Below s holds the warm-up's factor
# too, and sW_m = s ReLU(BA) = ReLU((sB) A), since s is never negative:
#
#     g_m = G ⊙ W_d ⊙ [BA > 0]            dB = s g_m A^T     dA = (sB)^T g_m
#     g_d = Clip(G ⊙ sW_m, -1, 1)         dD = g_d C^T       dC = D^T g_d
#
# dB stands for dL/dB. The scale only ever multiplies thin matrices, where it costs nothing.


class DualLinear(torch.autograd.Function):
    """y = x (W0 + dW)^T + bias. Without W0 (None) y = x dW^T."""

    @staticmethod
    def forward(ctx, x, W0, bias, A, B, C, D, s):
        W = (x if W0 is None else W0).new_empty(B.shape[0], A.shape[1])
        with in_float32(A, B, C, D):
            sB = s * B
            for rows in row_blocks(B, A):
                dW = (sB[rows] @ A).relu_().mul_(sign_(D[rows] @ C))
                W[rows] = dW if W0 is None else W0[rows] + dW
        y = F.linear(x, W, bias)
        ctx.save_for_backward(x.to(y.dtype), W0, A, B, C, D, s)  # y has autocast's dtype, where that is on
        return y

    @staticmethod
    def backward(ctx, gy):
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError("DualLinear has no second derivative: use F.linear(x, W0 + delta_weight(), bias)")
        x, W0, A, B, C, D, s = ctx.saved_tensors
        gy_rows = gy.reshape(-1, gy.shape[-1])        # (N, out)
        G = gy_rows.t() @ x.reshape(-1, x.shape[-1])  # (out, in)
        gW0 = G.clone() if ctx.needs_input_grad[1] else None  # a copy, since W will overwrite G
        dA, dB, dC, dD = torch.zeros_like(A), torch.empty_like(B), torch.zeros_like(C), torch.empty_like(D)
        if torch.compiler.is_compiling():
            # subtle: the compiler sees both passes at once, finds BA and DC in both, and would keep the first ones.
            # where(..., A, A) is A. The compiler cannot know, so BA and DC are other matrices to it.
            any_number = gy_rows.sum()
            A, C = torch.where(any_number > 0, A, A), torch.where(any_number > 0, C, C)
        with in_float32(A, B, C, D):
            sB = s * B
            for rows in row_blocks(B, A):
                sW_m, W_d = (sB[rows] @ A).relu_(), sign_(D[rows] @ C)
                g = G[rows].to(A.dtype)
                g_m = sW_m.sign().mul_(g).mul_(W_d)  # the sign is [BA > 0], or 0 if s is 0
                g_d = (sW_m * g).clamp_(-1, 1)
                dA.addmm_(sB[rows].t(), g_m)
                dB[rows] = s * (g_m @ A.t())
                dC.addmm_(D[rows].t(), g_d)
                dD[rows] = g_d @ C.t()
                dW = sW_m.mul_(W_d)
                G[rows] = dW if W0 is None else W0[rows] + dW  # these rows of G are used up: W takes their place
        W = G
        gx = gy @ W if ctx.needs_input_grad[0] else None
        gbias = gy_rows.sum(0) if ctx.needs_input_grad[2] else None
        return gx, gW0, gbias, dA, dB, dC, dD, None  # autograd casts each to its input's dtype


def row_blocks(B, A):
    """Slices of BA's rows: as many as fit a CPU's cache, or 64 MB of float32 on a GPU. Compiled, all at once."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    step = max(1, (2**17 if B.is_cpu else 2**24) // A.shape[1])
    return [slice(start, start + step) for start in range(0, B.shape[0], step)]


def in_float32(*factors):
    """The context in which BA and DC are formed: autocast off. TypeError for factors that were cast to a narrow type.

    subtle: the sign jumps. Where DC is near zero, a rounding error turns the sign, and dW's entry changes by twice its
    size. bfloat16 factors turn 0.04 to 0.07 % of the signs: dW is wrong by 4 to 5 %, where LoRA's would be by 0.2 %.
    It cost no accuracy in short runs.
    W0 + dW is rounded besides, where W0 or autocast is bfloat16: by 2 to 3 % of dW if dW is 5 % of W0. The model that
    trains and the merged model round alike (without dropout). TF32 (off by default in torch) is left as it is.
    """
    refuse_narrow(*factors)
    kind = factors[0].device.type
    return torch.autocast("cpu" if kind == "meta" else kind, enabled=False)  # meta knows no autocast


def refuse_narrow(*factors):
    narrow = [factor.dtype for factor in factors if factor.dtype in (torch.bfloat16, torch.float16)]
    if narrow:
        raise TypeError(f"the adapters were cast to {narrow[0]}, too coarse to train: cast the model before "
                        f"apply_adapters, which then adds its parameters in float32")


# ---- LoRA, to compare with -------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """LoRA (Hu et al., arXiv 2106.09685): dW = alpha / r * B A, A (r, in), B (out, r). B starts at 0, so dW does."""

    def __init__(self, out_features, in_features, r=16, alpha=16.0, dropout=0.0):
        super().__init__()
        self.settings = plain_settings(r=r, alpha=alpha, dropout=dropout)
        self.scaling, self.dropout = alpha / r, dropout
        bound = 1 / math.sqrt(in_features)  # Kaiming's, as in peft
        self.lora_A = nn.Parameter(cpu_zeros(r, in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(cpu_zeros(out_features, r))

    def delta_weight(self):
        """dW (out, in)."""
        with in_float32(self.lora_A, self.lora_B):
            return self.scaling * (self.lora_B @ self.lora_A)

    def forward(self, x, W0, bias=None):
        """See DualLoRA. It never builds dW: two thin products take its place."""
        refuse_narrow(self.lora_A, self.lora_B)
        y = F.linear(x, W0, bias)
        Ax = F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A)
        return (y + self.scaling * F.linear(Ax, self.lora_B)).to(y.dtype)


# ---- The verbs -------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # as elsewhere below: what is made in inference mode could not be trained later
def apply_adapters(model, targets, adapter=DualLoRA, **settings):
    """Freeze `model` and put adapter(out_features, in_features, **settings) into each linear layer in `targets`.

    A target is the last component of a module's name, or a dotted end of it: "q_proj", "attn.c_attn". Earlier adapters
    stay trainable; all else is frozen, a head too, so thaw that afterwards. Returns model. ValueError, with the model
    as it was, for a target that matches no linear layer and a layer that takes no adapter (check_layer).
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    names = [*linear_layers(model)]
    unmatched = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if unmatched or not targets:
        wrong = f"target {unmatched[0]!r} matches no linear layer" if targets else "targets is empty"
        raise ValueError(f"{wrong}: choose from {', '.join(sorted({name.rpartition('.')[2] for name in names}))}")
    ends = tuple(f".{target}" for target in targets)
    with all_or_none(model):
        insert(model, {name: (adapter, settings) for name in names if f".{name}".endswith(ends)})
    return model


def set_warmup(model, factor):
    """Set the warm-up factor of every Dual LoRA adapter; it is saved with them. ValueError if it is not in 0 to 1."""
    if not 0 <= factor <= 1:
        raise ValueError(f"factor is {factor}: it should be from 0 to 1")
    for layer in adapted_layers(model).values():
        if hasattr(layer.adapter, "warmup"):
            layer.adapter.warmup.fill_(factor)


def adapter_state_dict(model):
    """{name: tensor}, not copied: the adapters, whatever else is trainable, such as a head, and persistent buffers."""
    ours = {f"{name}.adapter.{key}".lstrip(".") for name, layer in adapted_layers(model).items()
            for key in layer.adapter.state_dict()}  # frozen ones too
    return {name: t.detach() for name, t in named_tensors(model).items()
            if t.requires_grad or name in ours or not isinstance(t, nn.Parameter)}


def save_adapter(model, path):
    """Write adapter_state_dict(model), and what rebuilds the adapters, to `path`, whole or not at all.

    A model that is sharded by torch's fully_shard is gathered: every process calls this, and every one writes.
    """
    adapters, state = {}, adapter_state_dict(model)
    for name, layer in adapted_layers(model).items():
        refuse_narrow(*layer.adapter.parameters())
        adapters[name] = type(layer.adapter).__name__, layer.adapter.settings
    refuse_absent(model, state)
    for name, t in state.items():  # cloned, since torch.save writes a view's whole storage
        state[name] = (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().clone()
    save_atomically({"adapters": adapters, "state": state}, path)


@torch.inference_mode(False)
def load_adapter(model, path):
    """Put the adapters of `path`, and what else it holds, such as a head, on a fresh base model; returns model.

    What the file holds becomes trainable, all else is frozen. ValueError, with the model as it was, where the file is
    damaged, or a name or shape in file and model differ.
    """
    adapters, state = read_adapter(path)
    with all_or_none(model), torch.random.fork_rng(devices=[]):  # the caller's generator stays as it is
        insert(model, adapters)
        tensors = named_tensors(model)
        for name in sorted(state.keys() | adapter_state_dict(model).keys()):
            if name not in state or name not in tensors:
                raise ValueError(f"{path} {'has' if name in state else 'lacks'} {name!r}, unlike this model")
            if state[name].shape != tensors[name].shape:
                raise ValueError(f"{path}: {name!r} is {[*state[name].shape]} there, "
                                 f"and {[*tensors[name].shape]} in this model")
        refuse_absent(model, state)
        with torch.no_grad():
            for name, value in state.items():
                tensors[name].copy_(value)
                if isinstance(tensors[name], nn.Parameter):
                    tensors[name].requires_grad_(True)
    return model


@torch.inference_mode(False)
@torch.no_grad()
def merge_adapters(model):
    """Turn every adapted layer back into the plain one, with W0 + dW; returns model. There is no way back.

    A bfloat16 weight loses changes smaller than its rounding step.
    """
    layers = mergeable_layers(model)
    for name, layer in layers.items():
        refuse_narrow(*layer.adapter.parameters())
        if layer.merged_weight is not None or "forward" in vars(layer):
            raise ValueError(f"{name} is inside `merged`, or has another forward, as by accelerate's hooks: end that "
                             f"first")
    for layer in layers.values():
        W = layer.weight.contiguous()
        restore(layer).weight = nn.Parameter(W, requires_grad=False)
    return model


@contextlib.contextmanager
def merged(model):
    """Inside, every adapted layer is one plain product with W0 + dW: evaluation and generation at the base's speed.

    Afterwards, an error included, W0 is what it was, to the bit: no module is swapped and nothing is subtracted. On a
    GPU W0 waits in the CPU's memory meanwhile, so that the weights are there once. Inside, adapters do not train, and
    set_warmup and load_state_dict do not change what the model computes. It is not for two threads on one model.
    """
    layers = [layer for layer in mergeable_layers(model).values() if layer.merged_weight is None]
    try:
        with torch.inference_mode(False), torch.no_grad():  # a caller's inference mode would taint W0
            for layer in layers:
                layer.merged_weight = layer.weight
                if not layer.W0.is_cpu:
                    layer.W0.data = layer.W0.data.cpu()
        yield model
    finally:
        with torch.inference_mode(False):
            for layer in layers:
                if layer.merged_weight is not None:
                    device = layer.merged_weight.device
                    del layer.merged_weight  # first, to make room
                    layer.W0.data = layer.W0.data.to(device)


# ---- What they are made of -------------------------------------------------------------------------------------------


def plain_settings(**settings):
    """The settings as plain numbers, which a file can hold. ValueError for one out of its range."""
    for name, value in settings.items():
        if name in ("r", "r1", "r2"):
            fits, expected = isinstance(value, numbers.Integral) and value >= 1, "a whole number from 1 on"
        elif name == "dropout":
            fits, expected = 0 <= value < 1, "from 0 to below 1"
        else:
            fits, expected = 0 < value < math.inf, "above 0"
        if not fits:
            raise ValueError(f"{name} is {value!r}: it should be {expected}")
    return {name: (int if isinstance(value, numbers.Integral) else float)(value) for name, value in settings.items()}


def cpu_zeros(*shape):
    """Float32, whatever the default is. Adapters are drawn on the CPU, so that a seed means the same on every device,
    and not by nn.init, which some loaders switch off."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


@contextlib.contextmanager
def all_or_none(model):
    """An error inside leaves no new adapter behind, and every requires_grad as it was."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    earlier = {m for m in model.modules() if isinstance(m, AdaptedLinear)}
    try:
        yield
    except BaseException:
        for m in list(model.modules()):
            if isinstance(m, AdaptedLinear) and m not in earlier:
                restore(m)
        for p, flag in flags:
            p.requires_grad_(flag)
        raise


def insert(model, plan):
    """Put adapters into the model, plan = {name: (class, settings)}, and freeze all but them and earlier ones."""
    linears, adapters, owners = linear_layers(model), {}, {}  # owners: {id of a parameter: its names}
    for module_name, module in model.named_modules():
        for name, p in module._parameters.items():
            owners.setdefault(id(p), []).append(f"{module_name}.{name}")
    earlier = {p for m in model.modules() if isinstance(m, AdaptedLinear) for p in m.adapter.parameters()}
    for name, (cls, settings) in plan.items():
        if name not in linears:
            raise ValueError(f"{name} is no linear layer of this model")
        check_layer(linears[name], name, owners)
        shape = linears[name].weight.shape
        try:
            adapters[name] = cls(*(shape if isinstance(linears[name], nn.Linear) else reversed(shape)), **settings)
        except TypeError as error:  # a setting that the class does not know
            raise ValueError(f"{name}: {error}") from None
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and p in earlier)
    for name, adapter in adapters.items():
        adapt(linears[name], adapter)


def check_layer(linear, name, owners):
    """Refuse layers that would silently give wrong results: ValueError."""
    weight, kind = linear._parameters.get("weight"), type(linear).__name__
    own_forward = "forward" in vars(linear) or (
        isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward)
    taken = [own for own in ("W0", "adapter", "plain_class", "__slots__") if hasattr(linear, own)]
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize >= 2
    shared = owners[id(weight)] if weight is not None else []
    for refused, why in (
            (isinstance(linear, AdaptedLinear), "has an adapter already: merge it, or start from a fresh model"),
            (name.endswith(".base_layer"), "is inside a layer of peft: merge peft's adapter first"),
            (own_forward, f"is a {kind} with its own forward pass, which would be lost"),
            (taken, f"is a {kind} with its own {', '.join(taken)}, which an adapted layer has no place for"),
            (weight is None, "has a computed weight, as by weight_norm or pruning: remove that first"),
            (not plain, f"has a {type(weight).__name__} as its weight, of {getattr(weight, 'dtype', None)}: "
                        f"dequantise first, and shard a model afterwards"),
            (plain and not weight.numel(), "has a weight without elements here, as under DeepSpeed's ZeRO-3"),
            (len(shared) > 1, f"shares its weight ({' and '.join(shared)}): an adapter would not reach both")):
        if refused:
            raise ValueError(f"{name} {why}")


def mergeable_layers(model):
    """adapted_layers(model). ValueError where W0 or dW is not whole in this process, with the way out."""
    layers = adapted_layers(model)
    if any(hasattr(m, "reshard") for m in unwrapped(model).modules()):  # what fully_shard adds
        raise ValueError("the model is sharded by fully_shard: evaluate without `merged`. To merge, save_adapter, and "
                         "load_adapter on a model that is not sharded")
    names = [f"{name}.{key}" for name, layer in layers.items() for key, _ in layer.named_parameters()]
    refuse_absent(model, [name.lstrip(".") for name in names])  # the model may be a layer itself
    return layers


def refuse_absent(model, names):
    """ValueError for a tensor of these names whose values are not in this process, with the way out."""
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in unwrapped(model).modules()):
        raise ValueError("FullyShardedDataParallel renames the parameters: use torch's fully_shard")
    tensors = named_tensors(model)
    for name in names:
        if tensors[name].is_meta:
            raise ValueError(f"{name} is on the meta device, without values: bring the model to one device first")
        if isinstance(tensors[name], nn.Parameter) and not tensors[name].numel():
            raise ValueError(f"{name} has no elements here, as under DeepSpeed's ZeRO-3: call this inside "
                             f"deepspeed.zero.GatheredParameters")


def linear_layers(model):
    """{name: module} of all linear layers, adapted ones and Hugging Face's Conv1D too."""
    return {plain_name(name): m for name, m in unwrapped(model).named_modules()
            if name and (isinstance(m, nn.Linear) or (type(m).__name__ == "Conv1D" and hasattr(m, "nf")))}


def adapted_layers(model):
    """{name: AdaptedLinear}. ValueError if there is none: the caller expects some."""
    layers = {plain_name(name): m for name, m in unwrapped(model).named_modules() if isinstance(m, AdaptedLinear)}
    if not layers:
        raise ValueError("the model has no adapters of this dual_lora.py (a reloaded or second copy has its own)")
    return layers


def named_tensors(model):
    """{name: tensor} of all parameters and persistent buffers."""
    tensors = unwrapped(model).state_dict(keep_vars=True)
    return {plain_name(name): t for name, t in tensors.items() if isinstance(t, torch.Tensor)}


def unwrapped(model):
    """The model inside wrappers that put something before every name, such as torch.compile's."""
    while hasattr(model, "_orig_mod") or isinstance(model, (DistributedDataParallel, nn.DataParallel, AveragedModel)):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def plain_name(name):
    """The name that a layer, or a tensor, has where no layer is compiled by itself."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def save_atomically(content, path):
    """torch.save under a temporary name, then rename: at no moment is there half a file under `path`."""
    path = os.path.realpath(path)  # a link stays, and the file that it names is replaced
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
    open(path, "rb").close()  # a missing file raises its own error here
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        classes = adapter_classes(nn.Module) | {"DualLoRA": DualLoRA, "LoRA": LoRA}
        adapters = {name: (classes[cls], {**settings}) for name, (cls, settings) in content["adapters"].items()}
        return adapters, {name: t.cpu() for name, t in content["state"].items()}
    except Exception as error:  # torch raises half a dozen kinds for a file cut short
        raise ValueError(f"{path} is cut short, of an earlier dual_lora.py, or not by save_adapter "
                         f"({' '.join(f'{type(error).__name__}: {error}'.split())[:60]})") from None


def adapter_classes(base):
    """{name: class} of all that derive from `base` and have a delta_weight: a method of your own too."""
    classes = {}
    for cls in base.__subclasses__():  # of two with one name, as in a notebook, the last one counts
        classes |= ({cls.__name__: cls} if hasattr(cls, "delta_weight") else {}) | adapter_classes(cls)
    return classes


if __name__ == "__main__":  # the example of the first page: change a number, and look
    start = {"lora_A": [[2., -1.]], "lora_B": [[1.], [-1.]], "lora_C": [[0.1, 1.]], "lora_D": [[1.], [-1.]]}
    for adapter in (DualLoRA(2, 2, r1=1, r2=1, alpha=1.0), LoRA(2, 2, r=1, alpha=1.0)):
        for name, p in adapter.named_parameters():
            p.data.copy_(torch.tensor(start[name]))
        before, optimizer = adapter.delta_weight(), torch.optim.SGD(adapter.parameters(), lr=0.2)
        (0.5 * before).sum().backward()  # so that dL/dW is 0.5 everywhere
        optimizer.step()
        print(f"{type(adapter).__name__}: dW was\n{before.detach()}\nand is\n{adapter.delta_weight().detach()}\n")
