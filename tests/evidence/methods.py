"""Methods to compare with, by their names in compare.py, and what is inside a dW.

    dora           DoRA
    no_relu        BA ⊙ Sign(DC)
    no_sign        ReLU(BA) ⊙ DC
    loha           BA ⊙ DC: neither of the two, LoHa (FedPara, arXiv 2108.06098)
                   These three start from one norm of dW, Dual LoRA's: DC is divided by its rms at the start, and where
                   the ReLU is left out, which takes half of BA's square away, dW is divided by sqrt(2).
    random_start   LoRA of rank r1 + r2 from Dual LoRA's start: B is random too, and the scale of dW is warmed up
    rounded        Dual LoRA in float32 but for W0 + dW, which is rounded to bfloat16, in training and evaluation
    rounded_all    the same with BA and DC formed from bfloat16 factors, and rounded too

Importing this file adds them to train.METHODS. All but DoRA are by plain autograd.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

import train
from dual_lora import DualLoRA, LoRA, adapted_layers, in_float32, refuse_narrow, sign_ste


class KnowsW0:
    """Of a method whose dW depends on W0."""

    def attach(self, linear):
        self.linear = (linear,)  # in a tuple, since it is no submodule

    def pretrained(self):
        return self.linear[0].out_in(self.linear[0].W0)


class DoRA(KnowsW0, LoRA):
    """DoRA (Liu et al., arXiv 2402.09353): W = m V / |V|, V = W0 + alpha / r * B A, |V| the norm of each row.

    lora_magnitude (out,) is m, |W0| at the start. |V| passes no gradient (the paper's section 4.3).
    """

    def attach(self, linear):
        super().attach(linear)
        self.lora_magnitude = nn.Parameter(self.pretrained().detach().float().norm(dim=1))

    def ratio(self, W0):
        """m / |V| (out,)."""
        V = W0 + super().delta_weight().detach()
        return self.lora_magnitude / V.norm(dim=1)

    def delta_weight(self):
        """dW (out, in) = m V / |V| - W0."""
        W0 = self.pretrained()
        return self.ratio(W0)[:, None] * (W0 + super().delta_weight()) - W0

    def forward(self, x, W0, bias=None):
        refuse_narrow(self.lora_A)
        y, ratio = F.linear(x, W0, bias), self.ratio(W0)
        dropped = F.dropout(x, self.dropout, self.training)
        if self.training and self.dropout > 0:
            plain = F.linear(dropped, W0)
        else:
            plain = y if bias is None else y - bias
        BAx = F.linear(F.linear(dropped.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return (y + (ratio - 1) * plain + ratio * self.scaling * BAx).to(y.dtype)


class Ablation(DualLoRA):
    """The subclass says what ReLU and Sign are replaced by."""

    def delta_weight(self):
        with in_float32(self.lora_A):
            W_m = self.magnitude(self.product(self.lora_B, self.lora_A))
            W_d = self.direction(self.product(self.lora_D, self.lora_C))
            return self.warmup * self.scaling * W_m * W_d

    def forward(self, x, W0, bias=None):
        return F.linear(x, (W0 + self.delta_weight()).to(W0.dtype), bias)

    def product(self, left, right):
        return left @ right

    def magnitude(self, BA):
        return BA.relu()

    def direction(self, DC):
        return sign_ste(DC)


class NoReLU(Ablation):
    def magnitude(self, BA):
        return BA / math.sqrt(2)


class NoSign(Ablation):
    def __init__(self, out_features, in_features, **settings):
        super().__init__(out_features, in_features, **settings)
        rms = (self.lora_D @ self.lora_C).detach().square().mean().sqrt()
        self.register_buffer("start_rms", rms)  # of DC, a constant from here on; it is saved with the adapter

    def direction(self, DC):
        return DC / self.start_rms


class LoHa(NoReLU, NoSign):
    pass


class RandomStart(Ablation):
    def delta_weight(self):
        r1, r2 = len(self.lora_A), len(self.lora_C)
        scale = self.warmup * self.scaling * math.sqrt(r1 * r2) / (r1 + r2)  # alpha / r
        with in_float32(self.lora_A):
            return scale * (self.lora_B @ self.lora_A + self.lora_D @ self.lora_C)


def rounded(t):
    """t as bfloat16 holds it, in t's dtype; the gradient passes through."""
    return t + (t.bfloat16().to(t.dtype) - t).detach()


class Rounded(KnowsW0, Ablation):
    def delta_weight(self):
        return rounded(self.pretrained() + super().delta_weight()) - self.pretrained()


class RoundedAll(Rounded):
    def product(self, left, right):
        return rounded(rounded(left) @ rounded(right))


OPTIONS = train.METHODS["dual_lora"][1]
ABLATIONS = {"no_relu": NoReLU, "no_sign": NoSign, "loha": LoHa, "random_start": RandomStart,
             "rounded": Rounded, "rounded_all": RoundedAll}
train.METHODS["dora"] = (DoRA, train.METHODS["lora"][1])
train.METHODS.update({name: (adapter, OPTIONS) for name, adapter in ABLATIONS.items()})


@torch.no_grad()
def adapter_report(model, since=None):
    """{layer's name: dict} on its dW; shares are from 0 to 1.

    inactive         Dual LoRA: entries that the ReLU holds at zero; half of them at the start, by symmetry
    flips            Dual LoRA, with `since`, an earlier adapter_state_dict (cloned): signs of DC that differ from it
    effective_rank   exp of the entropy of the squared singular values, as shares of their sum
    above_1_percent  singular values above 1 % of the largest
    relative_norm    Frobenius norm of dW over W0's
    lost             non-zero entries of dW that merging would lose in rounding
    """
    report = {}
    for name, layer in adapted_layers(model).items():
        adapter, W0 = layer.adapter, layer.out_in(layer.W0)
        dW, row = adapter.delta_weight(), {}
        if isinstance(adapter, DualLoRA):
            row["inactive"] = (adapter.lora_B @ adapter.lora_A <= 0).float().mean().item()
            if since is not None:
                before = since[f"{name}.adapter.lora_D"] @ since[f"{name}.adapter.lora_C"]
                row["flips"] = ((before > 0) != (adapter.lora_D @ adapter.lora_C > 0)).float().mean().item()
        sigma = torch.linalg.svdvals(dW)
        share = sigma.square() / sigma.square().sum().clamp(min=1e-30)
        row["effective_rank"] = torch.special.entr(share).sum().exp().item()
        row["above_1_percent"] = (sigma > 0.01 * sigma[0]).sum().item()
        row["relative_norm"] = (dW.norm() / W0.float().norm()).item()
        row["lost"] = ((W0 + dW).to(W0.dtype) == W0)[dW != 0].float().mean().nan_to_num(0).item()
        report[name] = row
    return report
