"""Dual LoRA in one file: low-rank fine-tuning that says separately how far each weight moves and which way.

    W = W0 + dW,        dW = alpha / sqrt(r1 r2) * ReLU(B A) ⊙ Sign(D C)

    W0 (out, in)    frozen, pre-trained
    magnitude group A (r1, in), B (out, r1)    ReLU(BA): whether, and how far, each weight moves
    direction group C (r2, in), D (out, r2)    Sign(DC): forward (+1) or back (-1)

Xu, Li, Yin, Tiwari, Li, Sirasao, Barsoum: "Dual LoRA: Enhancing LoRA with Magnitude and Direction Updates", arXiv 2512.03402.
LoRA's update BA has rank r. Here BA and DC have low rank too, but ReLU and Sign act on each entry, and their product has not,
at LoRA's number of parameters (r1 = r2 = r / 2). Without ReLU and without Sign it is LoHa (FedPara).

Step 0. LoRA starts at dW = 0 by B = 0. Here that would be the end: ReLU'(0) = 0, so with B = 0 (or A = 0) no gradient would
ever reach A or B. All four matrices are drawn from N(0, init_std^2), dW is not zero, and a factor that grows from 0 to 1 over
the first steps multiplies it (`set_warmup`): the first forward pass is the pre-trained model's, to the bit. The paper saw training collapse
without. It is not a learning-rate warm-up: that would leave the random dW standing at full size while nothing learns.

What merging leaves. `merge_adapters` puts W0 + dW into the plain layer that was there before: no cost at inference, no way back.
The sum is rounded once to the layer's dtype: a bfloat16 weight cannot hold what is below half a unit in its last place, and `merge_adapters` says how much that was.

    model = apply_adapters(model, targets=["q_proj", "v_proj"], r1=4, r2=4)        # freezes all but the adapters
    for param in model.head.parameters(): param.requires_grad = True               # whatever else is to be trained
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    for step, batch in enumerate(batches):
        set_warmup(model, min(1.0, step / 30)); loss = model(batch); loss.backward(); optimizer.step(); optimizer.zero_grad()
    save_adapter(model, "adapter.pt"); merge_adapters(model)                       # or load_adapter(fresh_model, "adapter.pt")

Needs torch 2.4 or newer and nothing else. Left out on purpose: convolutions and embeddings, quantised weights, several adapters
on one layer, switching a merged layer back. float16 loss scaling does not suit the method (see SignSTE); bfloat16 does.
"""
import contextlib
import copy
import importlib
import io
import math
import numbers
import os
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

try:
    triton, tl = (importlib.import_module(name) for name in ("triton", "triton.language"))
except ImportError:  # torch's builds for CUDA bring it, and only the last part of this file has a use for it
    triton = None

ESTIMATORS = ("clip", "xnor", "identity")


# ---------------------------------------------------------------------------------------------------------------------
# The sign and its gradient


def sign(x):
    """+1 where x > 0, else -1. torch.sign alone gives 0 at 0: a third value, and a weight that no magnitude could move."""
    return x.sign().sub_(0.5).sign_()  # a where() on a comparison says the same ten times slower on a CPU


def estimate(grad, x, ste):
    """The straight-through gradient: dL/dx from grad = dL/dSign(x), all of one shape."""
    if ste == "clip":  # the paper's: the gradient itself is clipped, by value, wherever x is
        return grad.clamp(-1, 1)
    if ste == "xnor":  # XNOR-Net's: only where x is near enough to zero that the sign could still turn
        return grad * (x.abs() <= 1)
    return grad


class SignSTE(torch.autograd.Function):
    """Sign with a straight-through gradient: its true derivative is zero everywhere, so nothing would ever learn.

    The paper's estimator clips by value and therefore knows the scale of the loss: a float16 loss scaler (x 65536) would push
    every gradient into the clip. Average the loss, do not sum it, and use bfloat16 or float32.
    """

    @staticmethod
    def forward(ctx, x, ste):
        ctx.ste = ste
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx, grad):
        return estimate(grad, ctx.saved_tensors[0], ctx.ste), None


def sign_ste(x, ste="clip"):
    """Sign(x), any shape, with the gradient estimator `ste`: clip (the paper's), xnor or identity; else ValueError."""
    one_of("ste", ste, ESTIMATORS)
    return SignSTE.apply(x, ste)


# ---------------------------------------------------------------------------------------------------------------------
# The layer


class AdaptedLinear(nn.Linear):
    """What every method here shares: a linear layer taken over, its weight and bias the same Parameter objects, frozen.

    A Hugging Face `Conv1D` keeps its layout, weight (in, out). Adapter parameters are float32 whatever the base's dtype, and
    stay so through `model.to(torch.bfloat16)`: a sign taken from rounded factors is another sign.
    """

    def __init__(self, linear, dropout, **config):
        check_base("the layer", linear)
        between("dropout", dropout, 0, 1, "0 <= dropout < 1", top=False)
        nn.Module.__init__(self)  # nn.Linear's would allocate a second weight
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.in_features, self.out_features = in_and_out(linear)
        self.dropout = float(dropout)
        # What rebuilds this adapter from its file, in plain numbers: NumPy's are nothing that torch.load would take.
        self.config = {name: float(value) if isinstance(value, numbers.Real) and not isinstance(value, int) else value
                       for name, value in dict(config, dropout=dropout).items()}
        # The layer as it was, without its tensors, for merge_adapters to put back; in a tuple, since it is no submodule.
        shell = copy.copy(linear)
        shell._parameters = {}
        self.plain = (shell,)
        self.train(linear.training)

    def base_weight(self):
        """The frozen weight as (out, in), a view where the layer is a Conv1D."""
        return self.weight.t() if is_conv1d(self.plain[0]) else self.weight

    def add_adapters(self, **values):
        """Adapter parameters `lora_NAME` from tensors drawn on the CPU, so that a seed means the same on every device."""
        for name, value in values.items():
            setattr(self, f"lora_{name}", nn.Parameter(value.to(self.weight.device)))
        self.mark_start()

    def mark_start(self):
        """From here adapter_report counts: what moved, which signs changed. Kept on the CPU, which has room for it."""
        self.start = {name: p.detach().to("meta" if p.is_meta else "cpu", copy=True) for name, p in self.adapters()}
        self.last = self.start

    def adapters(self):
        """(name, parameter) of every adapter parameter."""
        return [(name, p) for name, p in self.named_parameters(recurse=False) if name.startswith("lora_")]

    def _apply(self, fn, recurse=True):
        # Module.to, .cuda, .bfloat16 … all pass through here, tensor by tensor.
        kept = [t for _, p in self.adapters() for t in (p, p.grad) if t is not None] + list(self.buffers(recurse=False))

        def keep_float32(t):
            out = fn(t)
            narrowed = out.is_floating_point() and out.dtype.itemsize < 4
            return t.to(out.device) if narrowed and any(t is k for k in kept) else out

        was_meta = self.weight.is_meta
        super()._apply(keep_float32, recurse)
        if was_meta and not self.weight.is_meta:
            self.reset()  # after to_empty, what no state dict holds would be whatever lay in memory
        return self

    def reset(self):
        """Counters as after construction."""
        self.mark_start()

    def plain_layer(self, weight):
        """The layer that was taken over, class and layout, with `weight` (out, in) in its place; frozen as it is here."""
        shell = copy.copy(self.plain[0])
        weight = weight.t().contiguous() if is_conv1d(shell) else weight
        shell._parameters = {"weight": nn.Parameter(weight, requires_grad=self.weight.requires_grad), "bias": self.bias}
        return shell.train(self.training)

    def extra_repr(self):
        settings = ", ".join(f"{name}={value}" for name, value in self.config.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {settings}"


class DualLoRALinear(AdaptedLinear):
    """F.linear(x, W0 + dW, bias) with dW = alpha / sqrt(r1 r2) * ReLU(B A) ⊙ Sign(D C), times the warm-up factor.

    lora_A (r1, in), lora_B (out, r1), lora_C (r2, in), lora_D (out, r2). `warmup` is a scalar buffer, 1 unless set_warmup says
    otherwise, not saved. dropout > 0 drops x in the adapter's branch only; W0 x and dW x are then two products, so a step takes
    five large products instead of three. magnitude="none" leaves out the ReLU, direction="none" the Sign; both: LoHa.
    ValueError for a rank below 1, alpha or init_std that is not positive, dropout outside [0, 1), an unknown name.

    Why these defaults; "held out" is training data kept out of training, the runs are in the README:
    r1 = r2         the paper's split; together LoRA's rank of 16 here
    alpha 16        the paper states 64 at r = 32 for LLaMA alone; held out, 16 was better than 64 at init_std 0.05, and than 4
    dropout 0       the paper's 0.05 for LLaMA costs five large products a step instead of three
    ste "clip"      the paper's
    init_std 0.02   the paper gives none; BERT's and GPT-2's own weights start from it. Held out, 0.05 was as good or better for a small
                    encoder (train.py takes it there), 0.1 worse
    """

    def __init__(self, linear, r1=8, r2=8, alpha=16.0, dropout=0.0, ste="clip", init_std=0.02, magnitude="relu", direction="sign"):
        rank("r1", r1), rank("r2", r2), positive("alpha", alpha), positive("init_std", init_std)
        one_of("ste", ste, ESTIMATORS), one_of("magnitude", magnitude, ("relu", "none"))
        one_of("direction", direction, ("sign", "none"))
        super().__init__(linear, dropout, r1=r1, r2=r2, alpha=alpha, ste=ste, init_std=init_std, magnitude=magnitude,
                         direction=direction)
        self.scaling = alpha / math.sqrt(r1 * r2)
        self.ste, self.magnitude, self.direction = ste, magnitude, direction
        device, o, i = self.weight.device, self.out_features, self.in_features
        self.register_buffer("warmup", torch.ones((), dtype=torch.float32, device=device), persistent=False)
        self.off = False  # warmup == 0, noted where asking the tensor would make a GPU wait
        self.register_buffer("clip_count", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)  # cut, seen
        # A and B must not start at zero; see "Step 0" at the top.
        self.add_adapters(A=draw(init_std, r1, i), B=draw(init_std, o, r1), C=draw(init_std, r2, i), D=draw(init_std, o, r2))

    def reset(self):
        self.warmup.fill_(1)
        self.clip_count.zero_()
        self.off = False
        super().reset()

    def delta_weight(self):
        """dW (out, in) in the adapters' dtype, warm-up included, differentiable: the formula as the paper prints it."""
        BA, DC = exact_product(self.lora_B, self.lora_A), exact_product(self.lora_D, self.lora_C)
        W_m = BA.relu() if self.magnitude == "relu" else BA
        W_d = sign_ste(DC, self.ste) if self.direction == "sign" else DC
        return self.scaling * self.warmup * W_m * W_d

    def forward(self, x):
        """x (..., in) -> (..., out): F.linear(x, W0 + dW, bias), with what DualLinear below saves in memory."""
        weight, off = self.base_weight(), self.is_off()
        autocast = x.dtype != torch.float64 and autocast_on(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else weight.dtype
        x = x.to(dtype) if autocast else x
        keep = None  # where dropout keeps x; as F.dropout draws it
        if self.dropout and self.training and not off:
            keep = F.dropout(torch.ones_like(x), self.dropout).bool()
        return DualLinear.apply(x, weight, self.bias, self.lora_A, self.lora_B, self.lora_C, self.lora_D, self.scaling * self.warmup,
                                self.clip_count, dtype, self.magnitude, self.direction, self.ste, off, keep, self.dropout)

    def is_off(self):
        """Whether nothing needs building because the factor is 0. W0 + 0 dW is the same to the bit, only dearer, which is why
        code that is being compiled or traced need not ask: a question about a tensor's value would split its graph."""
        if torch.compiler.is_compiling() or detect_fake_mode() is not None:
            return False
        return self.warmup.item() == 0 if self.warmup.is_cpu else self.off


# ---------------------------------------------------------------------------------------------------------------------
# The memory-saving backward. The hard thing in this file.
#
# Left alone, autograd would keep BA, DC, ReLU(BA), Sign(DC) and W for the backward pass, each as large as W0: five more
# models. Nothing of that shape needs keeping. BA and DC are formed again when they are needed, which costs 2 out in (r1 + r2)
# operations against the 2 out in N of each of the three large products for N tokens: y = x W^T, dL/dx = dL/dy W and
# G = dL/dW = (dL/dy)^T x. Dual LoRA has full fine-tuning's arithmetic and LoRA's memory. With s = warmup * alpha / sqrt(r1 r2):
#
#     g_m = s G ⊙ W_d ⊙ [BA > 0]        dB = g_m A^T     dA = B^T g_m
#     g_d = Clip(s G ⊙ W_m, -1, 1)      dD = g_d C^T     dC = D^T g_d
#
# ReLU, Sign and the products around them are passes over (out, in), bound by bandwidth. They are made on blocks of rows that
# stay in the CPU's cache; on a GPU the block only bounds the transient memory.
#
# subtle: the sign jumps. BA and DC are formed in float32 proper (no autocast, no TF32), in the same way in forward, backward,
# merge and report; a rounding that costs LoRA one unit in the last place here turns an entry around, twice its size.


def autocast_on(kind):
    """Whether autocast is on for device type `kind`; torch 2.4 cannot compile the question whether there is such a thing."""
    return (torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


@contextlib.contextmanager
def exact_float32(kind):
    """Inside, products of float32 matrices on device type `kind` are float32 products, whatever autocast and TF32 say.

    torch has these switches for the process, not for a call; they are put back at once, as they were found.
    """
    backends = [b.matmul for b in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(b, "matmul")]
    finer = [(b, b.fp32_precision) for b in backends if hasattr(b, "fp32_precision")]  # torch 2.9 and newer
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the finer switches alone, which have no overall name
        overall = None
    autocast_off = contextlib.nullcontext()
    if torch.amp.is_autocast_available(kind):
        autocast_off = torch.autocast(kind, enabled=False)
    torch.set_float32_matmul_precision("highest")
    try:
        with autocast_off:
            yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for backend, precision in finer:
            backend.fp32_precision = precision


def exact_product(left, right):
    """left (out, r) @ right (r, in) in float32 proper, as everywhere else. (Only DoRA's norm is ever compiled, and can do with TF32.)"""
    kind = left.device.type
    with torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else exact_float32(kind):
        return left @ right


def row_blocks(B, A):
    """Slices of the rows of BA, each small enough for the cache, or on a GPU for 64 MB of float32."""
    rows = max(1, (2**17 if B.device.type == "cpu" else 2**24) // A.shape[1])
    return [slice(start, start + rows) for start in range(0, B.shape[0], rows)]


def parts(A, B, C, D, scale, magnitude, direction):
    """DC, s W_m and W_d of some rows: A (r1, in), B (rows, r1), C (r2, in), D (rows, r2); the scale s >= 0 passes through the ReLU."""
    sBA, DC = (scale * B) @ A, D @ C  # (rows, in)
    return DC, sBA.relu_() if magnitude == "relu" else sBA, sign(DC) if direction == "sign" else DC


def put_weight(W, weight, A, B, C, D, scale, magnitude, direction):
    """Some rows of W0 + s W_m ⊙ W_d into W (rows, in), or s W_m ⊙ W_d if weight is None; returns DC, s W_m and W_d."""
    DC, sW_m, W_d = parts(A, B, C, D, scale, magnitude, direction)
    if weight is None:
        torch.mul(sW_m, W_d, out=W) if W.dtype == sW_m.dtype else W.copy_(sW_m * W_d)
    else:
        torch.add(weight, sW_m * W_d, out=W)
    return DC, sW_m, W_d


def put_weight_and_gradients(W, G, weight, A, B, C, D, scale, clip_count, magnitude, direction, ste):
    """The same, and what these rows give to dA / s, dB / s, dC and dD from their G (rows, in): the four gradients."""
    DC, sW_m, W_d = put_weight(W, weight, A, B, C, D, scale, magnitude, direction)
    G = G.to(A.dtype)
    g_m = G * W_d  # g_m = s G ⊙ W_d ⊙ [BA > 0], the scale s at the end
    g_d = G * sW_m  # g_d = Clip(s G ⊙ W_m, -1, 1)
    if magnitude == "relu":
        g_m *= sW_m.sign()
    if direction == "sign":
        g_d = clip_and_count(g_d, DC, ste, clip_count)
    return B.t() @ g_m, g_m @ A.t(), D.t() @ g_d, g_d @ C.t()


# Two operators rather than two functions: torch.compile takes them as they are instead of tracing into the switches above.
OPERATORS = __name__.replace(".", "_")


@torch.library.custom_op(f"{OPERATORS}::effective_weight", mutates_args=())
def effective_weight(weight: Optional[Tensor], A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor, magnitude: str,
                     direction: str, dtype: torch.dtype) -> Tensor:
    """W0 + s W_m ⊙ W_d (out, in), summed in the adapters' dtype and rounded once to `dtype`; dW alone if weight is None."""
    W = B.new_empty(B.shape[0], A.shape[1], dtype=dtype)
    put = fused_weight if can_fuse(weight, A, B, C, D, dtype) else put_weight
    with exact_float32(B.device.type):
        for rows in row_blocks(B, A):
            put(W[rows], None if weight is None else weight[rows], A, B[rows], C, D[rows], scale, magnitude, direction)
    return W


@torch.library.custom_op(f"{OPERATORS}::backward", mutates_args=("clip_count",))
def weight_and_gradients(G: Tensor, weight: Optional[Tensor], A: Tensor, B: Tensor, C: Tensor, D: Tensor, scale: Tensor,
                         clip_count: Tensor, magnitude: str, direction: str, ste: str, dtype: torch.dtype,
                         ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """W (out, in) again, and dA, dB, dC, dD from G = dL/dW (out, in), a block of rows at a time."""
    W = B.new_empty(B.shape[0], A.shape[1], dtype=dtype)
    dA, dB, dC, dD = (torch.zeros_like(M, memory_format=torch.contiguous_format) for M in (A, B, C, D))
    put = fused_weight_and_gradients if can_fuse(weight, A, B, C, D, dtype) else put_weight_and_gradients
    with exact_float32(B.device.type):
        for rows in row_blocks(B, A):
            a, dB[rows], c, dD[rows] = put(W[rows], G[rows], None if weight is None else weight[rows], A, B[rows], C, D[rows],
                                           scale, clip_count, magnitude, direction, ste)
            dA += a
            dC += c
    return W, dA * scale, dB * scale, dC, dD


def clip_and_count(g_d, DC, ste, clip_count):
    """The straight-through gradient of g_d, counting what it changed. A CPU may look first whether there is anything to clip."""
    clip_count[1] += g_d.numel()
    if ste == "identity" or (ste == "clip" and g_d.is_cpu and max(map(abs, torch.stack(g_d.aminmax()).tolist())) <= 1):
        return g_d
    passed = estimate(g_d, DC, ste)
    clip_count[0] += (passed - g_d).sign_().abs_().sum().long()
    return passed


@effective_weight.register_fake
def _(weight, A, B, C, D, scale, magnitude, direction, dtype):
    return B.new_empty(B.shape[0], A.shape[1], dtype=dtype)


@weight_and_gradients.register_fake
def _(G, weight, A, B, C, D, scale, clip_count, magnitude, direction, ste, dtype):
    return (B.new_empty(B.shape[0], A.shape[1], dtype=dtype), *(torch.empty_like(M) for M in (A, B, C, D)))


class DualLinear(torch.autograd.Function):
    """y = x (W0 + dW)^T + bias, keeping x, W0 and the four small matrices for the backward pass and nothing else.

    One product, although a bfloat16 sum loses what lies below half a unit in W0's last place: that was 0.5 % of dW's entries and no
    loss that three seeds could show (tests/rounding.py, README), and x W0^T + x dW^T would be five large products instead of three.
    With `keep`, dropout's mask, it is x W0^T + dropped(x) dW^T + bias, and the mask is kept too, a byte an entry.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, C, D, scale, clip_count, dtype, magnitude, direction, ste, off, keep=None, dropout=0.0):
        ctx.settings, ctx.dtype, ctx.off, ctx.dropout, ctx.clip_count = (magnitude, direction, ste), dtype, off, dropout, clip_count
        ctx.save_for_backward(x, weight, A, B, C, D, scale, keep)
        if off:
            return F.linear(x, weight, bias)
        W = effective_weight(weight if keep is None else None, A, B, C, D, scale, magnitude, direction, dtype)
        if keep is None:
            return F.linear(x, W, bias)
        return F.linear(x, weight, bias) + F.linear(drop(x, keep, dropout), W)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, weight, A, B, C, D, scale, keep = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *needs_adapters = ctx.needs_input_grad[:7]
        needs_dW = any(needs_adapters) and not ctx.off
        rows, columns = gy.reshape(-1, gy.shape[-1]), x.reshape(-1, x.shape[-1])  # (N, out), (N, in)
        G = rows.t() @ columns if needs_weight or (needs_dW and keep is None) else None  # (out, in)
        base = weight if keep is None else None
        W, adapters = weight, [torch.zeros_like(M) for M in (A, B, C, D)]  # a factor of 0 gives gradients of 0, not None
        if needs_dW:
            of_dW = G if keep is None else rows.t() @ drop(x, keep, ctx.dropout).reshape(columns.shape)
            W, *adapters = weight_and_gradients(of_dW, base, A, B, C, D, scale, ctx.clip_count, *ctx.settings, ctx.dtype)
        elif needs_x and not ctx.off:
            W = effective_weight(base, A, B, C, D, scale, *ctx.settings[:2], ctx.dtype)
        gx = gy @ W.to(gy.dtype) if needs_x else None
        if needs_x and keep is not None:
            gx = torch.addmm(drop(gx, keep, ctx.dropout).reshape(columns.shape), rows, weight.to(gy.dtype)).reshape(x.shape)
        return (gx, G if needs_weight else None, rows.sum(0) if needs_bias else None,
                *(grad if needed else None for grad, needed in zip(adapters, needs_adapters)), *[None] * 9)


def drop(x, keep, p):
    """Dropout with a mask that is there already."""
    return (x * keep).mul_(1 / (1 - p))


# ---------------------------------------------------------------------------------------------------------------------
# The verbs


def apply_adapters(model, targets, layer=DualLoRALinear, **kwargs):
    """Freeze `model` and put a `layer` with settings `kwargs` in the place of every linear layer named in `targets`; returns model.

    targets: a name or several; each matches modules whose name's last component, or dotted suffix, is exactly that ("q_proj",
    "attn.c_attn"). Adapters from an earlier call stay trainable. ValueError (TypeError for a quantised weight), before anything
    in the model has changed, for a target that matches no linear layer, a layer that has an adapter or hooks already, whose weight
    is shared, or whose owner is of torch's two that read `.weight` themselves (another such owner shows as `unmoved` in
    adapter_report), and for settings that `layer` refuses.
    """
    targets = [targets] if isinstance(targets, str) else list(targets)
    linears = {name: m for name, m in model.named_modules(remove_duplicate=False) if name and is_linear(m)}
    if not targets or not all(isinstance(target, str) and target for target in targets):
        raise ValueError(f"targets is {targets}: give at least one name, of {candidates(linears)}")
    for target in targets:
        if not any(matches(name, target) for name in linears):
            raise ValueError(f"target {target!r} matches no linear layer of this model: choose from {candidates(linears)}")
    names = [name for name in linears if any(matches(name, target) for target in targets)]
    install(model, {name: (layer, kwargs) for name in names})
    return model


def set_warmup(model, factor):
    """Set the factor on dW, 0 to 1, of every Dual LoRA layer in `model`; ValueError outside, or where there is no such layer."""
    between("the warm-up factor", factor, 0, 1, "from 0 to 1")
    layers = [m for m in model.modules() if isinstance(m, DualLoRALinear)]
    if not layers:
        raise ValueError("set_warmup found no Dual LoRA layer: call apply_adapters first")
    for layer in layers:
        layer.warmup.fill_(float(factor))
        layer.off = bool(factor == 0)


def adapter_state_dict(model):
    """{name: tensor} of the adapters and of whatever else is trainable (a head), on the model's device, not copied."""
    named = {plain_name(name): p for name, p in model.named_parameters()}
    return {name: p.detach() for name, p in named.items() if p.requires_grad or is_adapter(name)}


def save_adapter(model, path):
    """Write adapter_state_dict(model) and what rebuilds the adapters (targets, settings, warm-up factor) to `path`.

    Whole or not at all: an OSError leaves no file, or the old one. ValueError when there is nothing to save, or where a layer is of
    a class that load_adapter would not know.
    """
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    adapted = adapted_layers(model, or_none=True)
    for name, layer in adapted.items():
        if layer_classes().get(type(layer).__name__) is not type(layer):
            raise ValueError(f"{name} is a {type(layer).__name__}, which load_adapter does not know; it knows {', '.join(layer_classes())}")
    layers = {name: {"layer": type(m).__name__, "settings": m.config, "warmup": float(getattr(m, "warmup", 1.0))}
              for name, m in adapted.items()}
    state = {name: value.cpu() for name, value in adapter_state_dict(model).items()}
    if not state:
        raise ValueError("the model holds no adapter and nothing trainable: there is nothing to save")
    save_atomically({"format": FORMAT, "layers": layers, "state": state}, path)


@torch.random.fork_rng(devices=[])  # layers are built here only to be overwritten: the caller's random numbers stay as they were
def load_adapter(model, path):
    """Put the adapters of `path` on a fresh base model, or their values into a model that has them already; returns model.

    Strict both ways: names, shapes, kind and settings must agree, else ValueError before anything in the model has changed.
    Everything in the file becomes trainable, all else of a fresh model is frozen.
    """
    layers, state = read_adapter(path)
    linears = {plain_name(name): (name, m) for name, m in model.named_modules() if is_linear(m)}
    expected, fresh = {}, {}
    for name, (cls, settings, _) in layers.items():
        if name not in linears:
            raise ValueError(f"{path} holds an adapter for {name!r}, and this model has no such linear layer: it has {candidates(linears)}")
        actual, old = linears[name]
        if not isinstance(old, AdaptedLinear):
            fresh[actual] = cls, settings
            skeleton = cls(nn.Linear(*in_and_out(old), bias=False, device="meta"), **settings)
            expected.update({f"{name}.{key}": p.shape for key, p in skeleton.adapters()})
        elif (type(old), old.config) != (cls, settings):
            raise ValueError(f"{path}: {name!r} is a {cls.__name__} with {settings}; in this model it is a {type(old).__name__} with {old.config}")
    adapted = any(isinstance(m, AdaptedLinear) for _, m in linears.values())
    for name, p in model.named_parameters():
        if plain_name(name) in state or is_adapter(name) or (adapted and p.requires_grad):
            expected[plain_name(name)] = p.shape
    for name in [*state, *expected]:
        if name not in expected or name not in state:
            raise ValueError(f"{path} {'has' if name in state else 'lacks'} {name!r}, which this model {'lacks' if name in state else 'trains'}")
        if state[name].shape != expected[name]:
            raise ValueError(f"{path}: {name!r} has shape {tuple(state[name].shape)}, this model wants {tuple(expected[name])}")

    install(model, fresh)
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].requires_grad_(True).copy_(value)
    for name, layer in adapted_layers(model, or_none=True).items():
        layer.mark_start()
        if isinstance(layer, DualLoRALinear):
            set_warmup(layer, layers[name][2])
    return model


@torch.no_grad()
def merge_adapters(model):
    """Every adapted layer becomes the plain layer it was, with W0 + dW; returns model (the plain layer, if model is a layer).

    Summed in float32 and rounded once to the layer's dtype. A bfloat16 weight cannot take up an update below half a unit in its
    last place: the share of dW's entries that vanished so is printed. Weights stay frozen. There is no way back.
    """
    moved = lost = 0
    layers = adapted_layers(model)
    for name, layer in layers.items():
        base, dW = layer.base_weight(), layer.delta_weight()
        merged, n_lost, n_moved = rounded_sum(base, dW)
        lost, moved = lost + n_lost, moved + n_moved
        if layer is model:
            model = layer.plain_layer(merged)
        else:
            replace(model, name, layer.plain_layer(merged))
    print(f"merged {len(layers)} layers; rounding lost {100 * lost / max(1, moved):.2f} % of the entries that dW moves")
    return model


@torch.no_grad()
def adapter_report(model, spectrum=True):
    """A dict per adapted layer, by name, of what its dW (out, in) is like. Shares lie in 0 to 1. Without spectrum, no ranks.

    frozen             entries that the ReLU holds at zero: half of them at the start, by symmetry
    dead_rows, dead_columns   how many rows and columns of dW have no live entry at all
    flips_since_last, flips_since_start   signs of DC that changed since the last report and since the start (or the load)
    clipped            sign gradients that the estimator cut since the last report
    direction_margin   smallest decile of abs(DC): how near the nearest signs are to turning
    effective_rank     exp of the entropy of the shares that the singular values' squares have in their sum
    numerical_rank     singular values above 1 % of the largest
    relative_norm      Frobenius norm of dW over that of W0
    lost               share of dW's non-zero entries that W0 + dW, rounded to W0's dtype, does not show
    magnitudes         shares of dW's non-zero entries that lie under 1e-6, in each decade from there to 1e-1, and above
    unmoved            adapter tensors that are still what they were at the start
    The first five lines are Dual LoRA's alone. Singular values take seconds a layer at 4096 x 4096.
    """
    report = {}
    for name, layer in adapted_layers(model).items():
        dW, row = layer.delta_weight(), {}
        if isinstance(layer, DualLoRALinear):
            row.update(dual_report(layer))
        if spectrum:
            row["effective_rank"], row["numerical_rank"] = ranks(dW)
        row["magnitudes"] = decades(dW)
        row["relative_norm"] = (dW.norm() / layer.base_weight().to(dW.dtype).norm().clamp(min=1e-30)).item()
        _, lost, moved = rounded_sum(layer.base_weight(), dW)
        row["lost"] = lost / max(1, moved)
        row["unmoved"] = [key for key, value in layer.adapters() if torch.equal(value.cpu(), layer.start[key])]
        report[name] = row
    return report


def dual_report(layer):
    """adapter_report's entries that only Dual LoRA has; what it remembers as `last` moves on."""
    BA, DC = exact_product(layer.lora_B, layer.lora_A), exact_product(layer.lora_D, layer.lora_C)
    live = BA > 0 if layer.magnitude == "relu" else torch.ones_like(BA, dtype=torch.bool)

    def flips(then):
        earlier = exact_product(then["lora_D"].to(DC), then["lora_C"].to(DC))
        return ((earlier > 0) != (DC > 0)).float().mean().item()

    cut, seen = layer.clip_count.tolist()
    row = {"frozen": 1 - live.float().mean().item(),
           "dead_rows": (~live.any(1)).sum().item(), "dead_columns": (~live.any(0)).sum().item(),
           "flips_since_last": flips(layer.last), "flips_since_start": flips(layer.start), "clipped": cut / max(1, seen),
           "direction_margin": DC.abs().flatten().cpu().kthvalue(math.ceil(DC.numel() / 10)).values.item()}
    layer.last = {key: p.detach().to("cpu", copy=True) for key, p in layer.adapters()}
    layer.clip_count.zero_()
    return row


def rounded_sum(base, dW):
    """base + dW (out, in) rounded to base's dtype, how many of dW's non-zero entries it does not show, and how many there are."""
    merged = (base.to(dW.dtype) + dW).to(base.dtype)
    return merged, ((dW != 0) & (merged == base)).sum().item(), (dW != 0).sum().item()


def decades(dW):
    """Shares of the finite non-zero entries of dW whose size is below 1e-6, from 1e-6 to 1e-5, ..., above 1e-1: 7 numbers."""
    sizes = dW[(dW != 0) & dW.isfinite()].abs().log10().add(6).ceil().clamp(0, 6).long()
    return (torch.bincount(sizes, minlength=7) / max(1, sizes.numel())).tolist()


def ranks(dW):
    """(effective rank, numerical rank at 1 %) of dW (out, in); 0 and 0 where dW is zero or not finite."""
    if not dW.isfinite().all() or not dW.any():
        return 0.0, 0
    sigma = torch.linalg.svdvals(dW.float() if dW.is_cuda else dW.float().cpu())  # Apple's GPUs have no SVD
    share = sigma.square() / sigma.square().sum()
    return torch.special.entr(share).sum().exp().item(), (sigma > 0.01 * sigma[0]).sum().item()


# ---------------------------------------------------------------------------------------------------------------------
# What a step costs


def training_cost(model, step):
    """What a training step of `model` costs, counted exactly and without computing it; step() returns the loss, a scalar.

    forward_flops, backward_flops    operations of all matrix products, a multiplication and an addition being two
    kept_bytes       what the forward pass keeps for the backward pass, parameters and buffers left out
    passes, pass_bytes    reads and writes, outside of these products, of matrices that have the shape of an adapted layer's weight
    weight_bytes, training_bytes    of parameters and buffers; of the trainable ones' gradients and AdamW's two moments
    The step is traced on tensors without memory (torch's FakeTensorMode), so that a model need not fit, nor anything change. It may
    ask for no tensor's value, and checkpointing must be the kind with use_reentrant=False: the other one hides its backward pass. For
    an operator here that works through a block of rows at a time, what enters and leaves it counts.
    """
    tensors = [*model.parameters(), *model.buffers()]
    trainable = [p for p in model.parameters() if p.requires_grad]
    shapes = {shape for layer in adapted_layers(model, or_none=True).values() for shape in (layer.weight.shape, layer.weight.shape[::-1])}
    mode, kept = FakeTensorMode(allow_non_fake_inputs=True), {}
    twins = [mode.from_tensor(t) for t in tensors]  # what the trace sees in their place
    own = {t.untyped_storage()._cdata for t in tensors + twins}

    def keep(t):
        storage = t.untyped_storage()
        kept[storage._cdata] = 0 if storage._cdata in own else storage.nbytes()
        return t

    with mode, Passes(shapes) as over, torch.random.fork_rng(devices=[]), \
            FlopCounterMode(display=False, custom_mapping=LOW_RANK_FLOPS) as products, saved_tensors_hooks(keep, lambda t: t):
        loss = step()
        forward = products.get_total_flops()
        torch.autograd.grad(loss, trainable, allow_unused=True)
    return {"forward_flops": forward, "backward_flops": products.get_total_flops() - forward, "kept_bytes": sum(kept.values()),
            "passes": over.passes, "pass_bytes": over.bytes, "weight_bytes": sum(t.nbytes for t in tensors),
            "training_bytes": sum(3 * p.nbytes for p in trainable)}


class Passes(TorchDispatchMode):
    """Counts operands and results of the given shapes, of everything but products and views."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.passes, self.bytes = shapes, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and func.namespace != "prim" and func._overloadpacket not in flop_registry:
            for t in tree_leaves((args, kwargs, result)):
                if isinstance(t, Tensor) and t.shape in self.shapes:
                    self.passes, self.bytes = self.passes + 1, self.bytes + t.nbytes
        return result


# BA and DC forward; again, and dA, dB, dC, dD, backward: (out, r) by (r, in) each, or as dear.
LOW_RANK_FLOPS = {getattr(torch.ops, OPERATORS).effective_weight: lambda weight, A, B, C, *_, **__: 2 * B[0] * A[1] * (A[0] + C[0]),
                  getattr(torch.ops, OPERATORS).backward: lambda G, weight, A, B, C, *_, **__: 6 * B[0] * A[1] * (A[0] + C[0])}


# ---------------------------------------------------------------------------------------------------------------------
# Finding, checking and replacing layers


FORMAT = "dual_lora adapter 1"


def is_conv1d(module):
    """Hugging Face's Conv1D (GPT-2), a linear layer with weight (in, out); known by its shape, since it is not ours to import."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_linear(module):
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_adapter(name):
    return name.rpartition(".")[2].startswith("lora_")


def plain_name(name):
    """A parameter's or module's name without what torch.compile and torch's checkpoint_wrapper put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def in_and_out(linear):
    """(in, out) of a linear layer or Conv1D."""
    return tuple(linear.weight.shape) if is_conv1d(linear) else tuple(linear.weight.shape)[::-1]


def matches(name, target):
    return name == target or name.endswith("." + target)


def candidates(linears):
    """The last components of the names of `linears`, sorted, for an error message."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in linears})) or "nothing: the model has no linear layer"


def adapted_layers(model, or_none=False):
    """{name: layer} of every adapted layer; ValueError when there is none, unless that is fine."""
    layers = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    if not layers and not or_none:
        raise ValueError("the model holds no adapter: call apply_adapters or load_adapter first")
    return layers


def replace(model, name, layer):
    owner, _, child = name.rpartition(".")
    setattr(model.get_submodule(owner), child, layer)


def install(model, chosen):
    """Put cls(linear, **settings) in place of each named layer of `chosen` {name: (cls, settings)}; checks all, then builds
    all, then changes the model: freezes what is no adapter, and swaps."""
    modules = dict(model.named_modules(remove_duplicate=False))
    owners = {}

    def identity(p):  # two Parameters may share their memory
        return id(p) if p.is_meta or not p.numel() else (p.data_ptr(), p.shape)

    for name, module in modules.items():
        for key, p in module.named_parameters(recurse=False):
            owners.setdefault(identity(p), []).append(f"{name}.{key}")
    for name in chosen:
        check_base(name, modules[name])
        check_owner(name, modules[name.rpartition(".")[0]])
        shared = owners[identity(modules[name].weight)]
        if len(shared) > 1:
            raise ValueError(f"{name}: its weight is shared ({' and '.join(shared)}), and an adapter on one would not reach the other")
    layers = {name: cls(modules[name], **settings) for name, (cls, settings) in chosen.items()}
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name) and p.requires_grad)
    for name, layer in layers.items():
        replace(model, name, layer)


def check_base(name, module):
    """Raise unless `module` is a plain linear layer whose forward is x W^T + bias with a floating-point weight of its own."""
    if isinstance(module, AdaptedLinear):
        raise ValueError(f"{name} has an adapter already ({type(module).__name__}): merge it, or start from a fresh model")
    if not is_linear(module):
        raise TypeError(f"{name} is a {type(module).__name__}: adapters go on nn.Linear, or on Hugging Face's Conv1D")
    if "weight" not in module._parameters:
        raise ValueError(f"{name}: its weight is computed (a parametrization, or weight norm): remove that first")
    if not module.weight.is_floating_point():
        raise TypeError(f"{name}: weight is {str(module.weight.dtype).removeprefix('torch.')}: dequantise first")
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        raise ValueError(f"{name}: {type(module).__name__} computes its forward pass in its own way, which an adapter would replace")
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        raise ValueError(f"{name} has hooks, such as a device_map over several devices attaches, and an adapter would lose them: remove them first")


def check_owner(name, owner):
    """Raise where the owner reads the layer's weight and never calls the layer: the adapter would train nothing."""
    child = name.rpartition(".")[2]
    if isinstance(owner, nn.MultiheadAttention):
        raise ValueError(f"{name}: nn.MultiheadAttention reads this weight itself and never calls the layer")
    if isinstance(owner, nn.TransformerEncoderLayer) and child in ("linear1", "linear2") and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(f"{name}: in evaluation nn.TransformerEncoderLayer reads this weight itself (its fast path); "
                         f"call torch.backends.mha.set_fastpath_enabled(False) first")


def save_atomically(content, path):
    """torch.save under a temporary name, then rename: at no moment is there half a file under `path`."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def layer_classes():
    return {cls.__name__: cls for cls in (DualLoRALinear, LoRALinear, DoRALinear)}


def read_adapter(path):
    """({layer's name: (class, settings, warm-up factor)}, {name: tensor}) of an adapter file; ValueError if it is not a whole one."""
    with open(path, "rb") as file:
        whole = io.BytesIO(file.read())
    try:
        content = torch.load(whole, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for a file cut short
        raise ValueError(f"{path} is cut short, or no adapter file ({type(error).__name__})") from None
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        layers = {name: (layer_classes()[row["layer"]], row["settings"], row["warmup"]) for name, row in content["layers"].items()}
        for cls, settings, factor in layers.values():
            between("the warm-up factor", factor, 0, 1, "from 0 to 1")
            cls(nn.Linear(1, 1, device="meta"), **settings)  # settings that make no sense are refused here
        return layers, {name: value.detach() for name, value in content["state"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no adapter file that save_adapter wrote as {FORMAT!r}: {error}") from None


def draw(std, *shape):
    return std * torch.randn(*shape, dtype=torch.float32, device="cpu")


def rank(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: a rank is a whole number of at least 1")


def positive(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}: it should be a number above 0")


def between(name, value, low, high, meaning, top=True):
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not (low <= value < high or (top and value == high)):
        raise ValueError(f"{name} is {value!r}: it should be {meaning}")


def one_of(name, value, known):
    if value not in known:
        raise ValueError(f"{name} is {value!r}: choose from {', '.join(known)}")


# ---------------------------------------------------------------------------------------------------------------------
# The baselines: what Dual LoRA is measured against


class LoRALinear(AdaptedLinear):
    """LoRA (Hu et al., arXiv 2106.09685): y = x W0^T + bias + alpha / r * B A x, lora_A (r, in), lora_B (out, r) = 0 at the start.

    dropout drops x in the adapter's branch. dW is never built: two thin products take its place.
    """

    def __init__(self, linear, r=16, alpha=16.0, dropout=0.0):
        rank("r", r), positive("alpha", alpha)
        super().__init__(linear, dropout, r=r, alpha=alpha)
        self.scaling = alpha / r
        A = nn.init.kaiming_uniform_(torch.empty(r, self.in_features, dtype=torch.float32, device="cpu"), a=math.sqrt(5))
        self.add_adapters(A=A, B=torch.zeros(self.out_features, r, dtype=torch.float32, device="cpu"))

    def delta_weight(self):
        """dW (out, in) in the adapters' dtype, differentiable."""
        return self.scaling * exact_product(self.lora_B, self.lora_A)

    def branch(self, x):
        """alpha / r * B A x for x (..., in): (..., out), in the adapters' dtype (autocast's under autocast)."""
        return self.scaling * F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        base = F.linear(x, self.base_weight(), self.bias)
        return (base + self.branch(F.dropout(x, self.dropout, self.training))).to(base.dtype)


class DoRALinear(LoRALinear):
    """DoRA (Liu et al., arXiv 2402.09353): W = m V / |V| with V = W0 + alpha / r * B A, the norm of each row taken as a constant.

    lora_magnitude (out,) starts at the norms of W0's rows. As in the field's reference, dropout acts on x wherever V is used, and
    the row norms pass no gradient (the paper's section 4.3).
    """

    def __init__(self, linear, r=16, alpha=16.0, dropout=0.0):
        super().__init__(linear, r, alpha, dropout)
        norms = torch.linalg.norm(self.base_weight().float(), dim=1)  # (out,)
        self.lora_magnitude = nn.Parameter(norms.detach().clone())
        self.mark_start()

    def ratio(self):
        """m / |V| (out,), |V| detached."""
        V = self.base_weight().to(self.lora_A.dtype) + LoRALinear.delta_weight(self).detach()
        return self.lora_magnitude / torch.linalg.norm(V, dim=1)

    def delta_weight(self):
        """dW (out, in) = m V / |V| - W0."""
        weight = self.base_weight().to(self.lora_A.dtype)
        return self.ratio()[:, None] * (weight + LoRALinear.delta_weight(self)) - weight

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        weight, ratio = self.base_weight(), self.ratio()
        base = F.linear(x, weight, self.bias)
        dropped = F.dropout(x, self.dropout, self.training)
        if self.training and self.dropout > 0:
            plain = F.linear(dropped, weight)
        else:
            plain = base if self.bias is None else base - self.bias
        return (base + (ratio - 1) * plain + ratio * self.branch(dropped)).to(base.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# On CUDA: put_weight and put_weight_and_gradients, each as one kernel. Nothing here that was not said above.
#
# A GPU's cache is no help to the block-by-block loop above: each of its elementwise lines reads and writes all of (out, in), some
# 16 passes in float32 forward and 51 backward. These kernels build a tile of BA and DC in registers, from the few numbers of A, B, C
# and D that it needs, so that what passes through memory is W0 in and W out, and in the backward pass G in as well: five passes in the
# weight's own dtype. BA and DC are float32 products ("ieee") here too. The four small gradients sum over tiles; each program adds up
# its own and torch adds the programs', in one order, so that a run repeats to the bit.

FUSED_RANK = 64  # above, a tile of the factors no longer fits the registers


def can_fuse(weight, A, B, C, D, dtype):
    """Whether the kernels below can take these tensors. `dual_lora.triton = None` does without them."""
    return (triton is not None and B.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(B.device) >= (8, 0)
            and max(A.shape[0], C.shape[0]) <= FUSED_RANK
            and all(M.dtype == torch.float32 and M.is_contiguous() for M in (A, B, C, D))
            and all(t in (torch.float32, torch.bfloat16, torch.float16) for t in (dtype, dtype if weight is None else weight.dtype)))


if triton is not None:

    @triton.jit
    def load_factor(M, rows, n_rows, row_stride, columns, n_columns):
        """M[rows, columns] as float32, zero outside of (n_rows, n_columns)."""
        inside = (rows[:, None] < n_rows) & (columns[None, :] < n_columns)
        return tl.load(M + rows[:, None] * row_stride + columns[None, :], mask=inside, other=0.0)

    @triton.jit
    def product(M, rows, n_rows, row_stride, N, columns, n_columns, rank, R: tl.constexpr):
        """(M N)[rows, columns] in float32 proper, 16 of the rank at a time: all at once would not fit the registers."""
        total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
        for first in range(0, R, 16):
            k = first + tl.arange(0, 16)
            m = load_factor(M, rows, n_rows, row_stride, k, rank)
            n = load_factor(N, k, rank, n_columns, columns, n_columns)
            total = tl.dot(m, n, total, input_precision="ieee")
        return total

    @triton.jit
    def rectify(sBA, DC, RELU: tl.constexpr, SIGN: tl.constexpr):
        """s W_m and W_d of a tile; a NaN stays one."""
        if RELU:
            sBA = tl.maximum(sBA, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if SIGN:
            DC = tl.where(DC > 0, 1.0, tl.where(DC <= 0, -1.0, DC))
        return sBA, DC

    @triton.jit
    def weight_kernel(W, weight, A, B, C, D, scale, n_out, n_in, r1, r2, weight_row, weight_column, B_row, D_row, HAS_WEIGHT: tl.constexpr,
                      RELU: tl.constexpr, SIGN: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """A tile of W a program."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sBA = tl.load(scale) * product(B, rows, n_out, B_row, A, columns, n_in, r1, R1)
        sW_m, W_d = rectify(sBA, product(D, rows, n_out, D_row, C, columns, n_in, r2, R2), RELU, SIGN)
        dW = sW_m * W_d
        inside = (rows[:, None] < n_out) & (columns[None, :] < n_in)
        if HAS_WEIGHT:
            place = rows[:, None] * weight_row + columns[None, :] * weight_column
            dW += tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(W + rows[:, None] * n_in + columns[None, :], dW.to(W.dtype.element_ty), mask=inside)

    @triton.jit
    def gradients_kernel(W, G, weight, A, B, C, D, scale, cut, dA, dB, dC, dD, n_out, n_in, r1, r2, weight_row, weight_column, B_row, D_row,
                         HAS_WEIGHT: tl.constexpr, RELU: tl.constexpr, SIGN: tl.constexpr, STE: tl.constexpr, PRECISION: tl.constexpr,
                         R1: tl.constexpr, R2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):
        """TILES tiles side by side a program: their W, their share of dB and dD for these rows, and of dA and dC for these columns.

        dA (row blocks, r1, n_in), dC (row blocks, r2, n_in), dB (column spans, n_out, r1), dD (column spans, n_out, r2).
        """
        block, span = tl.program_id(0), tl.program_id(1)
        rows = block * ROWS + tl.arange(0, ROWS)
        k1, k2 = tl.arange(0, R1), tl.arange(0, R2)
        b = load_factor(B, rows, n_out, B_row, k1, r1)
        d = load_factor(D, rows, n_out, D_row, k2, r2)
        s = tl.load(scale)
        db = tl.zeros((ROWS, R1), tl.float32)
        dd = tl.zeros((ROWS, R2), tl.float32)
        n_cut = 0
        for tile in range(TILES):
            columns = (span * TILES + tile) * COLUMNS + tl.arange(0, COLUMNS)
            inside = (rows[:, None] < n_out) & (columns[None, :] < n_in)
            DC = product(D, rows, n_out, D_row, C, columns, n_in, r2, R2)
            sW_m, W_d = rectify(s * product(B, rows, n_out, B_row, A, columns, n_in, r1, R1), DC, RELU, SIGN)
            dW = sW_m * W_d
            if HAS_WEIGHT:
                place = rows[:, None] * weight_row + columns[None, :] * weight_column
                dW += tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
            place = rows[:, None] * n_in + columns[None, :]
            tl.store(W + place, dW.to(W.dtype.element_ty), mask=inside)
            g = tl.load(G + place, mask=inside, other=0.0).to(tl.float32)
            g_m = g * W_d
            g_d = g * sW_m
            if RELU:
                g_m = tl.where(sW_m > 0, g_m, tl.where(sW_m <= 0, 0.0, sW_m))
            if SIGN:
                if STE == "clip":
                    n_cut += tl.sum(((g_d > 1) | (g_d < -1)).to(tl.int32))
                    g_d = tl.clamp(g_d, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
                if STE == "xnor":
                    n_cut += tl.sum(((tl.abs(DC) > 1) & (g_d != 0)).to(tl.int32))
                    g_d = tl.where(tl.abs(DC) <= 1, g_d, 0.0)
            a = load_factor(A, k1, r1, n_in, columns, n_in)
            db += tl.dot(g_m, tl.trans(a), input_precision=PRECISION)
            c = load_factor(C, k2, r2, n_in, columns, n_in)
            dd += tl.dot(g_d, tl.trans(c), input_precision=PRECISION)
            da = tl.dot(tl.trans(b), g_m, input_precision=PRECISION)
            dc = tl.dot(tl.trans(d), g_d, input_precision=PRECISION)
            tl.store(dA + (block * r1 + k1[:, None]) * n_in + columns[None, :], da, mask=(k1[:, None] < r1) & (columns[None, :] < n_in))
            tl.store(dC + (block * r2 + k2[:, None]) * n_in + columns[None, :], dc, mask=(k2[:, None] < r2) & (columns[None, :] < n_in))
        tl.store(dB + (span * n_out + rows[:, None]) * r1 + k1[None, :], db, mask=(rows[:, None] < n_out) & (k1[None, :] < r1))
        tl.store(dD + (span * n_out + rows[:, None]) * r2 + k2[None, :], dd, mask=(rows[:, None] < n_out) & (k2[None, :] < r2))
        if SIGN and STE != "identity":
            tl.atomic_add(cut, n_cut)  # whole numbers: their order does not matter


TILE = 64  # rows and columns of a tile
TILES = 8  # tiles a program of the backward pass takes, side by side


def common(weight, A, B, C, D, magnitude, direction):
    """What both kernels want to know: sizes, strides, which parts there are, and ranks padded to what a tile's product takes."""
    strides = (0, 0) if weight is None else weight.stride()
    sizes = (B.shape[0], A.shape[1], A.shape[0], C.shape[0], *strides, B.stride(0), D.stride(0))
    padded = [max(16, triton.next_power_of_2(M.shape[0])) for M in (A, C)]
    return sizes, dict(HAS_WEIGHT=weight is not None, RELU=magnitude == "relu", SIGN=direction == "sign", R1=padded[0], R2=padded[1],
                       ROWS=TILE, COLUMNS=TILE)


def fused_weight(W, weight, A, B, C, D, scale, magnitude, direction):
    """put_weight in one kernel."""
    sizes, what = common(weight, A, B, C, D, magnitude, direction)
    grid = triton.cdiv(W.shape[0], TILE), triton.cdiv(W.shape[1], TILE)
    with torch.cuda.device_of(W):  # Triton launches on the current device, whichever its arguments are on
        weight_kernel[grid](W, weight, A, B, C, D, scale, *sizes, **what, num_warps=8)


def fused_weight_and_gradients(W, G, weight, A, B, C, D, scale, clip_count, magnitude, direction, ste):
    """put_weight_and_gradients in one kernel and four sums."""
    sizes, what = common(weight, A, B, C, D, magnitude, direction)
    n_out, n_in, r1, r2 = sizes[:4]
    blocks, spans = triton.cdiv(n_out, TILE), triton.cdiv(n_in, TILE * TILES)
    dA, dC = B.new_empty(blocks, r1, n_in), B.new_empty(blocks, r2, n_in)
    dB, dD = B.new_empty(spans, n_out, r1), B.new_empty(spans, n_out, r2)
    # G in bfloat16 has 8 bits, TF32 takes 11: only sums of float32 gradients need more. (BA and DC are "ieee" in any case.)
    precision = "ieee" if G.dtype == torch.float32 else "tf32"
    if direction == "sign":
        clip_count[1] += G.numel()
    with torch.cuda.device_of(W):
        gradients_kernel[blocks, spans](W, G, weight, A, B, C, D, scale, clip_count, dA, dB, dC, dD, *sizes, **what, STE=ste,
                                        PRECISION=precision, TILES=TILES, num_warps=8, num_stages=1)  # with more in flight its registers spill
    return dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0)
