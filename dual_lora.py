"""Dual LoRA in one file: low-rank fine-tuning that learns separately how far each weight moves and which way.

    W = W0 + dW        dW = alpha / sqrt(r1 r2) * ReLU(B A) ⊙ Sign(D C)

    W0  (out, in)                 the pre-trained weight, frozen
    A   (r1, in)    B (out, r1)   magnitude: ReLU(BA) is how far each weight moves; where BA < 0 it stays
    C   (r2, in)    D (out, r2)   direction: Sign(DC) is +1 or -1, forward or backward

Xu, Li, Yin, Tiwari, Li, Sirasao, Barsoum: "Dual LoRA: Enhancing LoRA with Magnitude and Direction Updates",
arXiv 2512.03402. LoRA's update BA has rank r. Here BA and DC have low rank too, but ReLU and Sign act on every
entry, and the rank of their product is not bounded by r1 and r2. r1 = r2 = r / 2 has the parameters of LoRA of rank r.

Step 0. LoRA starts with B = 0, so that dW = 0. Here B = 0 would be the end: ReLU passes no gradient at 0, and neither
A nor B would ever move. So all four matrices start random. dW is then not zero, and a factor multiplies it that grows
from 0 to 1 over the first steps (set_warmup): at 0 the model is the pre-trained one. The paper saw training collapse
without it.

    from dual_lora import apply_adapters, merge_adapters, save_adapter, set_warmup

    apply_adapters(model, ["q_proj", "v_proj"], r1=4, r2=4)      # freezes all but the adapters
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=5e-4, weight_decay=0.0)    # search around LoRA's rate
    for step, batch in enumerate(batches):
        set_warmup(model, min(1.0, step / 100))
        loss = model(batch); loss.backward(); optimizer.step(); optimizer.zero_grad()
    save_adapter(model, "adapter.pt")                            # load_adapter(fresh_model, "adapter.pt")
    merge_adapters(model)                                        # plain layers again, with W0 + dW

Needs torch 2.4 or newer. Left out: convolutions, embeddings, quantised weights, several adapters on one layer.
"""
import contextlib
import copy
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- The sign and its gradient ---------------------------------------------------------------------------------------


def sign(x):
    """+1 where x > 0, else -1. torch.sign(0) is 0, which would switch the entry off."""
    return (x.sign() - 0.5).sign()  # torch.where(x > 0, 1.0, -1.0) takes a CPU ten times as long


def straight_through(grad, x, ste):
    """dL/dx from grad = dL/dSign(x). The sign's true derivative is zero, and nothing would learn.

    clip      the paper's: the gradient clipped to [-1, 1] by value, whatever x is
    xnor      XNOR-Net's (arXiv 1603.05279): only where abs(x) <= 1
    identity  the gradient as it is

    The clip makes the update depend on the scale of the loss. Average the loss, and train in float32 or bfloat16:
    a float16 loss scaler would push nearly every gradient into the clip.
    """
    if ste == "clip":
        return grad.clamp(-1, 1)
    if ste == "xnor":
        return grad * (x.abs() <= 1)
    return grad


class SignSTE(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, ste):
        ctx.save_for_backward(x)
        ctx.ste = ste
        return sign(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return straight_through(grad, x, ctx.ste), None


def sign_ste(x, ste="clip"):
    """Sign(x), any shape, with the gradient of straight_through. ValueError for an unknown estimator."""
    check_estimator(ste)
    return SignSTE.apply(x, ste)


def check_estimator(ste):
    if ste not in ("clip", "xnor", "identity"):
        raise ValueError(f"ste is {ste!r}: choose from clip, xnor, identity")


# ---- The layer -------------------------------------------------------------------------------------------------------


class AdaptedLinear(nn.Linear):
    """What all methods share: a linear layer's weight and bias, the same Parameter objects, taken over and frozen.

    A method adds its parameters, named lora_..., lora_A among them, and defines delta_weight and forward. `settings`
    rebuild the layer from its file. Hugging Face's Conv1D (GPT-2) keeps its layout, weight (in, out).
    """

    def __init__(self, linear, **settings):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a second weight
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.transposed = is_conv1d(linear)
        self.out_features, self.in_features = self.base_weight().shape
        # weights_only, with which files are read, refuses NumPy's numbers.
        self.settings = {name: value.item() if hasattr(value, "item") else value for name, value in settings.items()}
        self.original = (linear,)  # for plain_layer; in a tuple, since it is no submodule
        self.train(linear.training)

    def base_weight(self):
        """W0 (out, in), a view where the layer is a Conv1D."""
        return self.weight.t() if self.transposed else self.weight

    def new_parameter(self, init, *shape, **options):
        """A float32 Parameter, drawn on the CPU, so that a seed means the same on every device."""
        drawn = init(torch.empty(shape, dtype=torch.float32, device="cpu"), **options)
        return nn.Parameter(drawn.to(self.weight.device))

    def check_precision(self):
        if self.lora_A.dtype in (torch.bfloat16, torch.float16):
            raise TypeError(f"the adapters were cast to {self.lora_A.dtype}, too coarse to train: "
                            f"cast the model before apply_adapters, which then adds its parameters in float32")

    @torch.no_grad()
    def plain_layer(self):
        """The layer as it was, class and layout, but with W0 + dW, summed in float32 and rounded once."""
        W = (self.base_weight() + self.delta_weight()).to(self.weight.dtype)
        W = W.t().contiguous() if self.transposed else W
        linear = copy.copy(self.original[0])
        linear._parameters = {"weight": nn.Parameter(W, requires_grad=False), "bias": self.bias}
        return linear.train(self.training)


class DualLoRALinear(AdaptedLinear):
    """x (..., in) -> F.linear(x, W0 + dW, bias) (..., out), dW = warmup * alpha / sqrt(r1 r2) * ReLU(BA) ⊙ Sign(DC).

    dropout acts on x in the adapter's branch. W0 x and dW x are then two products, and a step takes five large
    products instead of three. The paper does not give init_std. ValueError for a rank below 1 and an unknown `ste`.
    """

    def __init__(self, linear, r1=8, r2=8, alpha=16.0, dropout=0.0, ste="clip", init_std=0.02):
        if min(r1, r2) < 1:
            raise ValueError(f"r1 is {r1} and r2 is {r2}: a rank is at least 1")
        check_estimator(ste)
        super().__init__(linear, r1=r1, r2=r2, alpha=alpha, dropout=dropout, ste=ste, init_std=init_std)
        self.scaling, self.dropout, self.ste = alpha / math.sqrt(r1 * r2), dropout, ste
        # No matrix starts at zero: see "Step 0" above.
        self.lora_A = self.new_parameter(nn.init.normal_, r1, self.in_features, std=init_std)
        self.lora_B = self.new_parameter(nn.init.normal_, self.out_features, r1, std=init_std)
        self.lora_C = self.new_parameter(nn.init.normal_, r2, self.in_features, std=init_std)
        self.lora_D = self.new_parameter(nn.init.normal_, self.out_features, r2, std=init_std)
        # A tensor, not a number: torch.compile would compile again whenever a number changes.
        self.register_buffer("warmup", torch.ones((), device=self.weight.device), persistent=False)

    def delta_weight(self):
        """dW (out, in). Plain autograd differentiates it, but keeps five matrices of this shape to do so."""
        with full_precision(self.weight):
            W_m = (self.lora_B @ self.lora_A).relu()
            W_d = sign_ste(self.lora_D @ self.lora_C, self.ste)
            return self.warmup * self.scaling * W_m * W_d

    def forward(self, x):
        """Equal to F.linear(x, W0 + delta_weight(), bias), gradients included, but keeps no such matrix."""
        self.check_precision()
        W0, adapter = self.base_weight(), (self.lora_A, self.lora_B, self.lora_C, self.lora_D)
        s = self.warmup * self.scaling
        if self.training and self.dropout > 0:
            zeros = W0.new_zeros(self.out_features, 1)  # broadcast in W0's place: the adapter's branch alone
            dropped = F.dropout(x, self.dropout)
            return F.linear(x, W0, self.bias) + DualLinear.apply(dropped, zeros, None, *adapter, s, self.ste)
        return DualLinear.apply(x, W0, self.bias, *adapter, s, self.ste)


def full_precision(tensor):
    """Autocast off, for BA and DC.

    subtle: the sign jumps. Where DC is near zero, a rounding error turns the sign, and dW's entry changes by twice its
    size. bfloat16 factors turn 0.05 to 0.07 % of the signs: dW is wrong by 4 to 5 %, where LoRA's would be by 0.2 %.
    Hence float32 adapters on any base. TF32 (torch.backends.cuda.matmul.allow_tf32, off by default) turns 0.008 %.
    """
    return torch.autocast(tensor.device.type, enabled=False)


# ---- The memory-saving backward pass. The hard thing in this file. ---------------------------------------------------
#
# Plain autograd would keep BA, DC, W_m = ReLU(BA), W_d = Sign(DC) and W for the backward pass, each as large as W0.
# None needs to be kept. BA and DC are formed again from the small matrices, which is cheap beside the three large
# products that full fine-tuning has as well: y = x W^T, dL/dx = dL/dy W and G = dL/dW = (dL/dy)^T x.
# With s = warmup * alpha / sqrt(r1 r2) and sW_m = s ReLU(BA) = ReLU((sB) A), since s is never negative:
#
#     g_m = G ⊙ W_d ⊙ [BA > 0]            dB = s g_m A^T     dA = (sB)^T g_m
#     g_d = Clip(G ⊙ sW_m, -1, 1)         dD = g_d C^T       dC = D^T g_d
#
# The scale only ever multiplies thin matrices, where it costs nothing.


def row_blocks(B, A):
    """Slices of BA's rows: on a CPU as many rows as fit its cache, on a GPU or compiled all at once."""
    if torch.compiler.is_compiling() or not B.is_cpu:
        return [slice(None)]
    step = max(1, 2**16 // A.shape[1])
    return [slice(start, start + step) for start in range(0, B.shape[0], step)]


class DualLinear(torch.autograd.Function):
    """y = x (W0 + dW)^T + bias."""

    @staticmethod
    def forward(ctx, x, W0, bias, A, B, C, D, s, ste):
        W = W0.new_empty(B.shape[0], A.shape[1])
        with full_precision(x):
            sB = s * B
            for rows in row_blocks(B, A):
                sW_m, DC = (sB[rows] @ A).relu_(), D[rows] @ C
                W[rows] = W0[rows] + sW_m * sign(DC)
        y = F.linear(x, W, bias)
        ctx.save_for_backward(x.to(y.dtype), W0, A, B, C, D, s)  # y has autocast's dtype, where that is on
        ctx.ste = ste
        return y

    @staticmethod
    def backward(ctx, gy):
        x, W0, A, B, C, D, s = ctx.saved_tensors
        gy_rows = gy.reshape(-1, gy.shape[-1])        # (N, out)
        G = gy_rows.t() @ x.reshape(-1, x.shape[-1])  # (out, in)
        W = torch.empty_like(G)
        dA, dB, dC, dD = torch.zeros_like(A), torch.empty_like(B), torch.zeros_like(C), torch.empty_like(D)
        compiling = torch.compiler.is_compiling()
        if compiling:  # makes A and C depend on gy, so that BA and DC are formed again here and not kept
            A, C = torch.where(gy_rows[0, 0] > 0, A, A), torch.where(gy_rows[0, 0] > 0, C, C)
        with full_precision(x):
            sB = s * B
            for rows in row_blocks(B, A):
                sW_m, DC = (sB[rows] @ A).relu_(), D[rows] @ C
                W_d = sign(DC)
                W[rows] = W0[rows] + sW_m * W_d
                G_rows = G[rows].to(A.dtype)
                g_m = (G_rows * W_d).mul_(sW_m.sign())  # sW_m >= 0, so its sign is [BA > 0]
                g_d = straight_through(G_rows * sW_m, DC, ctx.ste)
                dA += sB[rows].t() @ g_m
                dB[rows] = s * (g_m @ A.t())
                dC += D[rows].t() @ g_d
                dD[rows] = g_d @ C.t()
            gx = gy @ W if compiling or ctx.needs_input_grad[0] else None  # torch 2.4 compiles the question wrong
        gW0 = G if ctx.needs_input_grad[1] else None
        gbias = gy_rows.sum(0) if ctx.needs_input_grad[2] else None
        return gx, gW0, gbias, dA, dB, dC, dD, None, None


# ---- The baselines: what Dual LoRA is measured against ---------------------------------------------------------------


class LoRALinear(AdaptedLinear):
    """LoRA (Hu et al., arXiv 2106.09685): y = x W0^T + bias + alpha / r * B A x, A (r, in), B (out, r).

    B starts at 0. dW is never built: two thin products take its place. ValueError for a rank below 1.
    """

    def __init__(self, linear, r=16, alpha=16.0, dropout=0.0):
        if r < 1:
            raise ValueError(f"r is {r}: a rank is at least 1")
        super().__init__(linear, r=r, alpha=alpha, dropout=dropout)
        self.scaling, self.dropout = alpha / r, dropout
        self.lora_A = self.new_parameter(nn.init.kaiming_uniform_, r, self.in_features, a=math.sqrt(5))
        self.lora_B = self.new_parameter(nn.init.zeros_, self.out_features, r)

    def delta_weight(self):
        """dW (out, in)."""
        with full_precision(self.weight):
            return self.scaling * (self.lora_B @ self.lora_A)

    def branch(self, x):
        """alpha / r * B A x, (..., in) -> (..., out)."""
        return self.scaling * F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)

    def forward(self, x):
        self.check_precision()
        y = F.linear(x, self.base_weight(), self.bias)
        return (y + self.branch(F.dropout(x, self.dropout, self.training))).to(y.dtype)


class DoRALinear(LoRALinear):
    """DoRA (Liu et al., arXiv 2402.09353): W = m V / |V|, V = W0 + alpha / r * B A, |V| the norm of each row.

    lora_magnitude (out,) is m, |W0| at the start. |V| passes no gradient (the paper's section 4.3).
    """

    def __init__(self, linear, r=16, alpha=16.0, dropout=0.0):
        super().__init__(linear, r, alpha, dropout)
        self.lora_magnitude = nn.Parameter(self.base_weight().detach().float().norm(dim=1))

    def ratio(self):
        """m / |V| (out,)."""
        V = self.base_weight() + super().delta_weight().detach()
        return self.lora_magnitude / V.norm(dim=1)

    def delta_weight(self):
        """dW (out, in) = m V / |V| - W0."""
        W0 = self.base_weight()
        return self.ratio()[:, None] * (W0 + super().delta_weight()) - W0

    def forward(self, x):
        self.check_precision()
        W0, ratio = self.base_weight(), self.ratio()
        y = F.linear(x, W0, self.bias)
        dropped = F.dropout(x, self.dropout, self.training)
        if self.training and self.dropout > 0:
            plain = F.linear(dropped, W0)
        else:
            plain = y if self.bias is None else y - self.bias
        return (y + (ratio - 1) * plain + ratio * self.branch(dropped)).to(y.dtype)


# ---- The verbs -------------------------------------------------------------------------------------------------------


def apply_adapters(model, targets, layer=DualLoRALinear, **settings):
    """Freeze `model` and put layer(linear, **settings) in the place of every linear layer in `targets`; returns model.

    A target is the last component of a module's name, or a dotted end of it: "q_proj", "attn.c_attn". Earlier adapters
    stay trainable. ValueError or TypeError, before anything has changed, for a target that matches no linear layer and
    for a layer that cannot take an adapter (see check_layer).
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
    """Set the factor on dW, 0 to 1, of every Dual LoRA layer."""
    for layer in adapted_layers(model).values():
        if isinstance(layer, DualLoRALinear):
            layer.warmup.fill_(factor)


def adapter_state_dict(model):
    """{name: tensor} of the adapters and of whatever else is trainable, such as a head. Not copied."""
    named = unwrapped(model).named_parameters()
    return {name: p.detach() for name, p in named if p.requires_grad or "lora_" in name}


def save_adapter(model, path):
    """Write adapter_state_dict(model), and what rebuilds the adapters, to `path`, whole or not at all.

    The warm-up factor is not saved: a loaded adapter has factor 1. Inside `merged` a model has no adapters to save.
    """
    layers = {name: (type(layer).__name__, layer.settings) for name, layer in adapted_layers(model).items()}
    state = {name: p.cpu() for name, p in adapter_state_dict(model).items()}
    if not state:
        raise ValueError("nothing to save: no adapters (inside `merged` there are none) and no trainable parameter")
    save_atomically({"layers": layers, "state": state}, path)


def load_adapter(model, path):
    """Put the adapters of `path`, and what else it holds, such as a head, on a fresh base model; returns model.

    What the file holds becomes trainable, all else is frozen. ValueError, before anything has changed, where the file
    is damaged, or a name or shape in file and model differ.
    """
    inner = unwrapped(model)
    layers, state = read_adapter(path)
    linears = linear_layers(inner)
    shapes = {name: p.shape for name, p in inner.named_parameters() if name in state}
    for name, (cls, settings) in layers.items():
        if name not in linears:
            raise ValueError(f"{path} has an adapter for {name!r}, and this model has no such linear layer")
        weight = linears[name].weight
        in_out = weight.shape if is_conv1d(linears[name]) else weight.shape[::-1]
        expected = cls(nn.Linear(*in_out, bias=False, device="meta"), **settings)  # shapes, without memory
        shapes.update({f"{name}.{key}": p.shape for key, p in expected.named_parameters() if "lora_" in key})
    for name in {**state, **shapes}:
        if name not in state or name not in shapes:
            raise ValueError(f"{path} {'has' if name in state else 'lacks'} {name!r}, unlike this model")
        if state[name].shape != shapes[name]:
            raise ValueError(f"{path}: {name!r} is {[*state[name].shape]} there, and {[*shapes[name]]} in this model")

    insert(inner, layers)
    parameters = dict(inner.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].requires_grad_(True).copy_(value)
    return model


def merge_adapters(model):
    """Turn every adapted layer back into the plain one, with W0 + dW; returns model. There is no way back.

    A bfloat16 weight cannot take up what is below half a unit in its last place: see `lost` in adapter_report.
    """
    if isinstance(model, AdaptedLinear):
        return model.plain_layer()
    for name, layer in adapted_layers(model).items():
        replace(model, name, layer.plain_layer())
    return model


@contextlib.contextmanager
def merged(model):
    """Inside, every adapted layer is a plain one with W0 + dW: evaluation and generation at the base model's speed.

    Afterwards, an error included, the adapters are back and W0 is what it was: layers are swapped, nothing is
    subtracted. Needs memory for the adapted weights once more.
    """
    adapted = {name: layer for name, layer in adapted_layers(model).items() if layer is not model}
    try:
        for name, layer in adapted.items():
            replace(model, name, layer.plain_layer())
        yield model
    finally:
        for name, layer in adapted.items():
            plain = unwrapped(model).get_submodule(name)
            replace(model, name, layer.train(plain.training))  # model.eval() inside holds afterwards


@torch.no_grad()
def adapter_report(model, since=None):
    """{layer's name: dict} on its dW; shares are from 0 to 1.

    inactive         Dual LoRA: entries that the ReLU holds at zero; half of them at the start, by symmetry
    flips            Dual LoRA, with `since`, an earlier adapter_state_dict (cloned): signs of DC that differ from it
    effective_rank   exp of the entropy of the squared singular values, as shares of their sum
    numerical_rank   singular values above 1 % of the largest
    relative_norm    Frobenius norm of dW over W0's
    lost             non-zero entries of dW that merging would lose in rounding
    """
    report = {}
    for name, layer in adapted_layers(model).items():
        W0, dW, row = layer.base_weight(), layer.delta_weight(), {}
        if isinstance(layer, DualLoRALinear):
            row["inactive"] = (layer.lora_B @ layer.lora_A <= 0).float().mean().item()
            if since is not None:
                before = since[f"{name}.lora_D"] @ since[f"{name}.lora_C"]
                row["flips"] = ((before > 0) != (layer.lora_D @ layer.lora_C > 0)).float().mean().item()
        sigma = torch.linalg.svdvals(dW)
        share = sigma.square() / sigma.square().sum().clamp(min=1e-30)
        row["effective_rank"] = torch.special.entr(share).sum().exp().item()
        row["numerical_rank"] = (sigma > 0.01 * sigma[0]).sum().item()
        row["relative_norm"] = (dW.norm() / W0.float().norm()).item()
        row["lost"] = ((W0 + dW).to(W0.dtype) == W0)[dW != 0].float().mean().nan_to_num(0).item()
        report[name] = row
    return report


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


def unwrapped(model):
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def replace(model, name, layer):
    owner, _, child = name.rpartition(".")
    setattr(unwrapped(model).get_submodule(owner), child, layer)


def insert(model, plan):
    """Put adapted layers into the model, plan = {name: (class, settings)}. Checks all, builds all, then changes."""
    model = unwrapped(model)
    for name in plan:
        check_layer(model, name)
    layers = {name: cls(model.get_submodule(name), **settings) for name, (cls, settings) in plan.items()}
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name and p.requires_grad)
    for name, layer in layers.items():
        replace(model, name, layer)


def check_layer(model, name):
    """Refuse what would go wrong without a word."""
    linear = model.get_submodule(name)
    owners = [n for n, p in model.named_parameters(remove_duplicate=False) if p is linear.weight]
    if isinstance(linear, AdaptedLinear):
        raise ValueError(f"{name} has an adapter already: merge it, or start from a fresh model")
    if len(owners) > 1:
        raise ValueError(f"{name}: its weight is shared ({' and '.join(owners)}): an adapter would not reach both")
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        raise ValueError(f"{name}: nn.MultiheadAttention reads this weight itself and never calls the layer")
    if isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward:
        raise ValueError(f"{name}: {type(linear).__name__} has its own forward pass, which an adapter would replace")
    if not linear.weight.is_floating_point():
        raise TypeError(f"{name}: its weight is {linear.weight.dtype}: dequantise first")


def save_atomically(content, path):
    """torch.save under a temporary name, then rename: at no moment is there half a file under `path`."""
    temporary = f"{path}.tmp"
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
