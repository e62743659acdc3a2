"""Dual LoRA with parts left out, by plain autograd: what the ReLU and the Sign are each worth. Named like methods."""
import math

import torch.nn.functional as F

import train
from dual_lora import DualLoRALinear, full_precision, sign_ste


class Ablation(DualLoRALinear):
    """The subclass says what ReLU and Sign are replaced by."""

    def delta_weight(self):
        with full_precision(self.weight):
            W_m = self.magnitude(self.lora_B @ self.lora_A)
            W_d = self.direction(self.lora_D @ self.lora_C)
            return self.warmup * self.scaling * W_m * W_d

    def forward(self, x):
        return F.linear(x, self.base_weight() + self.delta_weight(), self.bias)

    def magnitude(self, BA):
        return BA.relu()

    def direction(self, DC):
        return sign_ste(DC, self.ste)


class NoReLU(Ablation):
    def magnitude(self, BA):
        return BA


class NoSign(Ablation):
    def direction(self, DC):
        return DC


class LoHa(NoReLU, NoSign):
    """Neither: the product of two low-rank matrices, LoHa (FedPara, arXiv 2108.06098)."""


class RandomStart(Ablation):
    """LoRA of rank r1 + r2 from Dual LoRA's start: B is random too, and the scale of dW is warmed up."""

    def delta_weight(self):
        r1, r2 = len(self.lora_A), len(self.lora_C)
        scaling = self.scaling * math.sqrt(r1 * r2) / (r1 + r2)  # alpha / r
        with full_precision(self.weight):
            return self.warmup * scaling * (self.lora_B @ self.lora_A + self.lora_D @ self.lora_C)


OPTIONS = train.METHODS["dual_lora"][1]
train.METHODS.update(no_relu=(NoReLU, OPTIONS), no_sign=(NoSign, OPTIONS), loha=(LoHa, OPTIONS),
                     random_start=(RandomStart, OPTIONS))
