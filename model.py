"""Two small transformers that load published weights: GPT (GPT-2, LLaMA) and Encoder (BERT, RoBERTa, DeBERTa v1 to v3).

    model = load_pretrained("path/to/folder")           # or GPT.from_pretrained, Encoder.from_pretrained
    logits, loss = gpt(idx, targets)                    # idx (B, T) token ids, logits (B, T, vocab)
    hidden = encoder(idx, mask)                         # (B, T, n_embd)
    scores = Classifier(encoder, n_classes)(idx, mask)  # (B, n_classes)
    more = gpt.generate(idx, mask, max_new_tokens=32)   # greedy, with a key-value cache; padding on the left

A family is a row of data: what differs between GPT-2 and LLaMA, or BERT and DeBERTa, is a field of the config, decided once when the
model is built. Layers have the same names in both classes, q_proj k_proj v_proj o_proj up_proj down_proj (gate_proj), all plain
nn.Linear; fused projections (GPT-2, DeBERTa v1) are split on load. Outputs equal those of Hugging Face's transformers to rounding.
Left out on purpose: dropout (fine-tuning is short), sampling, quantised weights.
"""
import json
import math
import os
import re
import struct
from dataclasses import dataclass, field
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {"gelu": {}, "gelu_new": {"approximate": "tanh"}, "gelu_pytorch_tanh": {"approximate": "tanh"}, "silu": None, "relu": None,
               "tanh": None}


def activate(name, x):
    return F.gelu(x, **ACTIVATIONS[name]) if name.startswith("gelu") else getattr(F, name)(x)


class Attention(nn.Module):
    """Softmax attention with n_head query heads and n_kv_head key and value heads, which groups of queries share."""

    def __init__(self, n_embd, n_head, n_kv_head, head_dim, bias, out_bias, k_bias=None):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = n_head, n_kv_head, head_dim
        self.q_proj = nn.Linear(n_embd, n_head * head_dim, bias=bias)
        self.k_proj = nn.Linear(n_embd, n_kv_head * head_dim, bias=bias if k_bias is None else k_bias)
        self.v_proj = nn.Linear(n_embd, n_kv_head * head_dim, bias=bias)
        self.o_proj = nn.Linear(n_head * head_dim, n_embd, bias=out_bias)

    def heads(self, x, n_head):
        return x.view(*x.shape[:-1], n_head, self.head_dim).transpose(-2, -3)  # (..., nh, T, hs)

    def forward(self, x, allowed, causal, rope=None, cache=None):
        """x (B, T, n_embd); allowed: bool, broadcastable to (B, nh, T, S), True where a query may look, or None for anywhere.

        cache: a list, empty at first, that holds the keys and values of earlier calls; S counts those positions too.
        """
        q = self.heads(self.q_proj(x), self.n_head)     # (B, nh, T, hs)
        k = self.heads(self.k_proj(x), self.n_kv_head)  # (B, nkv, S, hs)
        v = self.heads(self.v_proj(x), self.n_kv_head)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(cache, (k, v))) if cache else (k, v)
            cache[:] = k, v
        if self.n_kv_head != self.n_head:
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=causal and allowed is None)  # (B, nh, T, hs)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class DisentangledAttention(Attention):
    """DeBERTa's (He et al., arXiv 2006.03654): beside content to content, the query's content meets the key's distance (c2p) and
    the key's content the query's (p2c). Distances are rows of one table, with projections of their own or (v3) the content's."""

    def __init__(self, cfg):
        width = cfg.head_dim * cfg.n_head
        super().__init__(cfg.n_embd, cfg.n_head, cfg.n_head, cfg.head_dim, True, True, cfg.k_bias)
        self.c2p, self.p2c = "c2p" in cfg.relative, "p2c" in cfg.relative
        own = not cfg.relative_shared
        self.pos_k_proj = nn.Linear(cfg.n_embd, width, bias=cfg.k_bias) if own and self.c2p else None
        self.pos_q_proj = nn.Linear(cfg.n_embd, width) if own and self.p2c else None

    def forward(self, x, allowed, causal, relative):
        """As Attention; relative: (rows of the table (R, n_embd), which of them belongs to each query and key (T, T))."""
        q, k, v = (self.heads(proj(x), self.n_head) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, nh, T, hs)
        table, index = relative
        scale = 1 / math.sqrt(self.head_dim * (1 + self.c2p + self.p2c))
        q, index = q * scale, index.expand(*q.shape[:2], -1, -1)  # scaled before the products: half precision overflows after
        bias = q.new_zeros(())
        if self.c2p:
            pos_k = self.heads((self.pos_k_proj or self.k_proj)(table), self.n_head)  # (nh, R, hs)
            bias = bias + (q @ pos_k.mT).gather(-1, index)                            # (B, nh, T, T): query, key
        if self.p2c:
            pos_q = self.heads((self.pos_q_proj or self.q_proj)(table), self.n_head)
            bias = bias + (k @ (pos_q * scale).mT).gather(-1, index.mT).mT
        if allowed is not None:
            bias = bias.masked_fill(~allowed, torch.finfo(bias.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)  # (B, nh, T, hs)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, n_embd, n_inner, activation, gated, bias):
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(n_embd, n_inner, bias=bias) if gated else None
        self.up_proj = nn.Linear(n_embd, n_inner, bias=bias)
        self.down_proj = nn.Linear(n_inner, n_embd, bias=bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(activate(self.activation, self.up_proj(x)))
        return self.down_proj(activate(self.activation, self.gate_proj(x)) * self.up_proj(x))


def run_layers(model, x, *args, cache=None):
    """Through model.layers; where model.checkpoint asks for it, keeping only what enters each layer for the backward pass."""
    for i, layer in enumerate(model.layers):
        if cache is not None:
            x = layer(x, *args, cache[i])
        elif model.checkpoint and model.training:
            x = checkpoint(layer, x, *args, use_reentrant=False)
        else:
            x = layer(x, *args)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# RoPE: position as a rotation of each pair (i, i + hs / 2) of a head's values


def rope_frequencies(cfg, length):
    """Rotation per position, (hs / 2,) float32, and the factor on cos and sin, under cfg.rope (its "type" says which scaling).

    Sources: linear, Chen et al. 2306.15595; dynamic NTK, by Reddit users bloc97 and emozilla; yarn, Peng et al. 2309.00071;
    llama3, Meta's Llama 3.1; longrope, Ding et al. 2402.13753. `length`: tokens in the longest sequence, which dynamic and longrope ask.
    """
    rope, d, base, amplitude = cfg.rope, cfg.head_dim, cfg.rope_theta, 1.0
    kind, factor = rope.get("type", "default"), rope.get("factor")
    original = rope.get("original_max_position_embeddings") or cfg.n_positions
    if kind == "dynamic":
        base *= (factor * max(length, cfg.n_positions) / cfg.n_positions - (factor - 1)) ** (d / (d - 2))
    steps = torch.arange(0, d, 2, dtype=torch.float32) / d
    frequencies = 1.0 / base**steps
    if kind == "linear":
        frequencies = frequencies / factor
    elif kind == "llama3":
        # slow rotations, which never came round in pre-training, are slowed by the factor; fast ones stay; between, a blend
        turns = original * frequencies / (2 * math.pi)
        blend = ((turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])).clamp(0, 1)
        frequencies = blend * frequencies + (1 - blend) * frequencies / factor
    elif kind == "yarn":
        factor = factor or cfg.n_positions / original

        def dimension(rotations):
            return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d - 1)
        ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
        frequencies = ramp * frequencies / factor + (1 - ramp) * frequencies
        up, down = rope.get("mscale"), rope.get("mscale_all_dim")
        amplitude = yarn_amplitude(factor, up) / yarn_amplitude(factor, down) if up and down else yarn_amplitude(factor, 1.0)
    elif kind == "longrope":
        factor = factor or cfg.n_positions / original
        frequencies = frequencies / torch.tensor(rope["long_factor" if length > original else "short_factor"])
        amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequencies, rope.get("attention_factor") or amplitude


def yarn_amplitude(factor, scale):
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_table(cfg, positions, length, dtype):
    """cos and sin for positions (T,) or (B, T) of a text of `length` tokens: each (..., 1, T, hs), to broadcast over heads."""
    frequencies, amplitude = rope_frequencies(cfg, length)
    angles = positions.float()[..., None, :, None] * frequencies.to(positions.device)  # (..., 1, T, hs / 2), float32: bf16 would blur them
    angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)


def rotate(x, rope):
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# GPT: causal, norm before each part


@dataclass
class GPTConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int                    # width of the MLP
    n_positions: int                # longest text: a table's length (GPT-2), or what pre-training saw (LLaMA)
    n_kv_head: int = 0              # 0: as many as n_head; fewer: grouped-query attention
    head_dim: int = 0               # 0: n_embd / n_head
    learned_positions: bool = True  # GPT-2; else RoPE
    rope_theta: float = 10000.0
    rope: dict = field(default_factory=dict)  # the scaling, as config.json has it, under "type"
    rms_norm: bool = False          # LLaMA; else LayerNorm
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    gated: bool = False             # SwiGLU: gate_proj beside up_proj
    attention_bias: bool = True
    mlp_bias: bool = True
    tied: bool = True               # lm_head shares the embedding's weight

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head


class RMSNorm(nn.Module):
    def __init__(self, n_embd, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n_embd)), eps

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GPTBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        norm = RMSNorm if cfg.rms_norm else nn.LayerNorm
        self.norm1 = norm(cfg.n_embd, eps=cfg.norm_eps)
        self.attention = Attention(cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim, cfg.attention_bias, cfg.attention_bias)
        self.norm2 = norm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg.n_embd, cfg.n_inner, cfg.activation, cfg.gated, cfg.mlp_bias)

    def forward(self, x, allowed, rope, cache=None):
        x = x + self.attention(self.norm1(x), allowed, True, rope, cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2 or LLaMA. checkpoint=True recomputes activations in the backward pass."""

    def __init__(self, config, checkpoint=False):
        super().__init__()
        self.config, self.checkpoint = config, checkpoint
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.positions = nn.Embedding(config.n_positions, config.n_embd) if config.learned_positions else None
        self.layers = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.norm = (RMSNorm if config.rms_norm else nn.LayerNorm)(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        if self.config.tied:
            self.lm_head.weight = self.embed.weight

    @property
    def max_length(self):
        """Longest sequence, in tokens: a hard limit with learned positions, what pre-training saw with RoPE."""
        return self.config.n_positions

    @property
    def n_embd(self):
        return self.config.n_embd

    def hidden(self, idx, mask=None, cache=None):
        """Last hidden states (B, T, n_embd), after the final norm. idx (B, T) token ids; mask (B, S), True for real tokens.

        The mask is needed for padding on the left only: positions then count real tokens. Padding on the right lies in every
        real token's future. cache: a list per layer, empty at first, that takes up keys and values, so that the next call
        gives the new tokens alone; with it the mask spans all S positions so far. ValueError where S exceeds the table of
        learned positions.
        """
        T = idx.shape[1]
        S = T + (cache[0][0].shape[2] if cache and cache[0] else 0)
        if self.positions is not None and S > self.max_length:
            raise ValueError(f"a sequence of {S} tokens: this model has {self.max_length} positions")
        positions, allowed = torch.arange(S, device=idx.device), None
        if mask is not None or S > T:
            same = positions[-T:, None] == positions  # (T, S): query, key
            causal = positions[-T:, None] >= positions
            mask = torch.ones_like(idx[:, :1], dtype=torch.bool).expand(-1, S) if mask is None else mask.bool()
            # a query sees itself, so that one that is padding has something to look at and does not become NaN
            allowed = (mask[:, None, None, :] & causal) | same  # (B, 1, T, S)
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, S)
        x = self.embed(idx)
        if self.positions is not None:
            x, rope = x + self.positions(positions[..., -T:]), None
        else:
            rope = rope_table(self.config, positions[..., -T:], S, x.dtype)
        return self.norm(run_layers(self, x, allowed, rope, cache=cache))

    def forward(self, idx, targets=None, mask=None):
        """(logits (B, T, vocab), loss). targets[:, t] is what should follow idx[:, t], -100 where a position does not count; the
        loss is their mean cross-entropy, None without targets. For a few positions only: lm_head(hidden(idx)[chosen])."""
        logits = self.lm_head(self.hidden(idx, mask))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def generate(self, idx, mask=None, max_new_tokens=32, stop=None):
        """Greedy continuation of idx (B, T), padded on the left where mask (B, T) is False: new ids (B, at most max_new_tokens).

        It ends when every row has given `stop`, a token id, and after it a row holds nothing but that. Where dynamic or longrope
        scaling sets in on the way, earlier keys keep their rotation. ValueError for padding on the right.
        """
        mask = torch.ones_like(idx, dtype=torch.bool) if mask is None else mask.bool()
        if not mask[:, -1].all():
            raise ValueError("a row ends in padding, from which nothing can be continued: pad on the left")
        cache, new, ended = [[] for _ in self.layers], [], torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            token = self.lm_head(self.hidden(idx, mask, cache)[:, -1]).argmax(-1)  # (B,)
            token = token if stop is None else torch.where(ended, stop, token)
            new.append(token)
            ended = ended | (token == stop) if stop is not None else ended
            if ended.all():
                break
            idx, mask = token[:, None], F.pad(mask, (0, 1), value=True)
        return torch.stack(new, dim=1) if new else idx[:, :0]

    @classmethod
    def from_pretrained(cls, name_or_folder, dtype=torch.float32, device="cpu"):
        """The model in a folder of the Hub's layout (or a name that data.download knows); ValueError saying which file is wrong."""
        return load_pretrained(name_or_folder, dtype, device, cls)


# ---------------------------------------------------------------------------------------------------------------------
# Encoder: looks both ways, norm after each part


@dataclass
class EncoderConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    n_positions: int          # longest text; for BERT and RoBERTa the rows of the position table
    n_types: int = 2          # token types: first and second text; 0: none
    position_offset: int = 0  # RoBERTa: padding_idx + 1, so that of 514 rows 512 are left
    norm_eps: float = 1e-12
    activation: str = "gelu"
    # DeBERTa
    learned_positions: bool = True  # added to the input; DeBERTa leaves them out
    relative: tuple = ()            # terms of disentangled attention, of "c2p" and "p2c"; (): plain attention
    relative_span: int = 0          # the table of distances has 2 * relative_span rows
    relative_buckets: int = 0       # v2, v3: far distances share rows, by their logarithm; 0: a row each
    relative_furthest: int = 0      # v2, v3: the distance that the last bucket stands for
    relative_shared: bool = False   # v3: distances go through k_proj and q_proj
    relative_norm: bool = False     # v2, v3: LayerNorm on the table
    k_bias: bool = True             # v1 has none
    head_dim: int = 0               # 0: n_embd / n_head
    embed_dim: int = 0              # 0: n_embd; else a projection leads from it to n_embd
    conv_kernel: int = 0            # v2: width of a convolution beside the first layer; 0: none
    conv_groups: int = 1
    conv_activation: str = "tanh"

    def __post_init__(self):
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.embed_dim = self.embed_dim or self.n_embd


class EncoderBlock(nn.Module):
    def __init__(self, cfg, conv=False):
        super().__init__()
        plain = cfg.n_embd, cfg.n_head, cfg.n_head, cfg.head_dim, True, True
        self.attention = DisentangledAttention(cfg) if cfg.relative else Attention(*plain)
        self.norm1 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg.n_embd, cfg.n_inner, cfg.activation, False, True)
        self.norm2 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.conv = None
        if conv:
            self.conv_activation = cfg.conv_activation
            self.conv = nn.Conv1d(cfg.n_embd, cfg.n_embd, cfg.conv_kernel, padding=(cfg.conv_kernel - 1) // 2, groups=cfg.conv_groups)
            self.conv_norm = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)

    def forward(self, x, allowed, relative=None, real=None):
        y = self.norm1(x + self.attention(x, allowed, False, relative))
        y = self.norm2(y + self.mlp(y))
        if self.conv is None:
            return y
        # real (B, T, 1) is 0 at padding, which the convolution would otherwise carry into its neighbours
        beside = self.conv((x * real).mT).mT * real  # (B, T, n_embd)
        return self.conv_norm(y + activate(self.conv_activation, beside)) * real


def distance_rows(cfg, T, device="cpu"):
    """The table's row for each distance from -(T - 1) to T - 1 between query and key (2 T - 1,)."""
    distance, mid = torch.arange(1 - T, T, device=device), cfg.relative_buckets // 2
    if cfg.relative_buckets:  # exact up to mid, then by the logarithm
        far = distance.abs().clamp(min=mid)
        steps = torch.log(far / mid) / torch.log(torch.tensor((cfg.relative_furthest - 1) / mid)) * (mid - 1)
        distance = torch.where(far <= mid, distance, distance.sign() * (steps.ceil().long() + mid))
    return (distance + cfg.relative_span).clamp(0, 2 * cfg.relative_span - 1)


class Encoder(nn.Module):
    """BERT, RoBERTa or DeBERTa, without pooler. checkpoint=True recomputes activations in the backward pass."""

    def __init__(self, config, checkpoint=False):
        super().__init__()
        self.config, self.checkpoint = config, checkpoint
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.positions = nn.Embedding(config.n_positions, config.embed_dim) if config.learned_positions else None
        self.types = nn.Embedding(config.n_types, config.embed_dim) if config.n_types else None
        self.embed_proj = nn.Linear(config.embed_dim, config.n_embd, bias=False) if config.embed_dim != config.n_embd else None
        self.embed_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps)
        self.distances = nn.Embedding(2 * config.relative_span, config.n_embd) if config.relative else None
        self.distances_norm = nn.LayerNorm(config.n_embd, eps=config.norm_eps) if config.relative_norm else None
        self.layers = nn.ModuleList(EncoderBlock(config, conv=config.conv_kernel > 0 and i == 0) for i in range(config.n_layer))

    def tie(self):
        """Nothing is shared here."""

    @property
    def max_length(self):
        """Longest sequence, in tokens."""
        return self.config.n_positions - self.config.position_offset

    @property
    def n_embd(self):
        return self.config.n_embd

    def forward(self, idx, mask=None, token_type=None):
        """Last hidden states (B, T, n_embd). idx, mask, token_type (B, T); mask True for real tokens, None if all are.

        ValueError where T exceeds max_length.
        """
        T = idx.shape[1]
        if T > self.max_length:
            raise ValueError(f"a sequence of {T} tokens: this model has {self.max_length} positions")
        positions, allowed = torch.arange(T, device=idx.device), None
        if mask is not None:
            mask = mask.bool()
            allowed = (mask | ~mask.any(1, keepdim=True))[:, None, None, :]  # (B, 1, 1, T); a row without tokens must not become NaN
            if self.config.position_offset:
                positions = (mask.cumsum(1) - 1).clamp(min=0)
        positions = positions + self.config.position_offset  # RoBERTa's first token is at padding_idx + 1, wherever padding lies
        x = self.embed(idx)
        if self.positions is not None:
            x = x + self.positions(positions)
        if self.types is not None:  # RoBERTa has one type: pairs are told apart by their separators
            x = x + self.types(torch.zeros_like(idx) if token_type is None or self.config.n_types == 1 else token_type)
        x = self.embed_norm(x if self.embed_proj is None else self.embed_proj(x))
        if self.distances is None:
            return run_layers(self, x, allowed)
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        return run_layers(self, x, allowed, self.relative(T), real)

    def relative(self, T):
        """The rows of the table that a text of T tokens needs (R, n_embd), and which of them is each query's and key's (T, T)."""
        span, device = self.config.relative_span, self.distances.weight.device
        first, last = max(0, span - T + 1), min(2 * span, span + T)  # in buckets a distance's row is no further from the middle
        table = self.distances.weight[first:last]
        table = table if self.distances_norm is None else self.distances_norm(table)
        rows, position = distance_rows(self.config, T, device) - first, torch.arange(T, device=device)
        return table, rows[position[:, None] - position + T - 1]

    @classmethod
    def from_pretrained(cls, name_or_folder, dtype=torch.float32, device="cpu"):
        """The model in a folder of the Hub's layout (or a name that data.download knows); ValueError saying which file is wrong."""
        return load_pretrained(name_or_folder, dtype, device, cls)


class Classifier(nn.Module):
    """A head on an Encoder, over the mean of the real tokens, or on a GPT, over the last real one. n_classes = 1: regression,
    or the score of a choice. The head's weight is drawn from N(0, 0.02^2) with torch's own generator."""

    def __init__(self, backbone, n_classes):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.n_embd, n_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, idx, mask=None, token_type=None):
        """(B, n_classes) from idx, mask, token_type (B, T); a GPT has no token types."""
        real = torch.ones_like(idx, dtype=torch.bool) if mask is None else mask.bool()
        if isinstance(self.backbone, GPT):
            x = self.backbone.hidden(idx, mask)
            last = idx.shape[1] - 1 - real.flip(1).int().argmax(1)  # (B,)
            pooled = x[torch.arange(len(x), device=x.device), last]
        else:
            x = self.backbone(idx, mask, token_type) * real[..., None]
            pooled = x.sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        return self.head(pooled.to(self.head.weight.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Published weights: their names to ours. {i} is the layer; a name stands for its weight and its bias.

GPT2_NAMES = {
    "wte":              "embed",
    "wpe":              "positions",
    "h.{i}.ln_1":        "layers.{i}.norm1",
    "h.{i}.attn.c_attn": "layers.{i}.attention.q_proj layers.{i}.attention.k_proj layers.{i}.attention.v_proj",
    "h.{i}.attn.c_proj": "layers.{i}.attention.o_proj",
    "h.{i}.ln_2":        "layers.{i}.norm2",
    "h.{i}.mlp.c_fc":    "layers.{i}.mlp.up_proj",
    "h.{i}.mlp.c_proj":  "layers.{i}.mlp.down_proj",
    "ln_f":             "norm",
    "lm_head":          "lm_head",
}
LLAMA_NAMES = {
    "embed_tokens":                        "embed",
    "layers.{i}.input_layernorm":          "layers.{i}.norm1",
    "layers.{i}.self_attn.q_proj":         "layers.{i}.attention.q_proj",
    "layers.{i}.self_attn.k_proj":         "layers.{i}.attention.k_proj",
    "layers.{i}.self_attn.v_proj":         "layers.{i}.attention.v_proj",
    "layers.{i}.self_attn.o_proj":         "layers.{i}.attention.o_proj",
    "layers.{i}.post_attention_layernorm": "layers.{i}.norm2",
    "layers.{i}.mlp.gate_proj":            "layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up_proj":              "layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down_proj":            "layers.{i}.mlp.down_proj",
    "norm":                                "norm",
    "lm_head":                             "lm_head",
}
BERT_NAMES = {
    "embeddings.word_embeddings":                    "embed",
    "embeddings.position_embeddings":                "positions",
    "embeddings.token_type_embeddings":              "types",
    "embeddings.LayerNorm":                          "embed_norm",
    "encoder.layer.{i}.attention.self.query":         "layers.{i}.attention.q_proj",
    "encoder.layer.{i}.attention.self.key":           "layers.{i}.attention.k_proj",
    "encoder.layer.{i}.attention.self.value":         "layers.{i}.attention.v_proj",
    "encoder.layer.{i}.attention.output.dense":       "layers.{i}.attention.o_proj",
    "encoder.layer.{i}.attention.output.LayerNorm":   "layers.{i}.norm1",
    "encoder.layer.{i}.intermediate.dense":           "layers.{i}.mlp.up_proj",
    "encoder.layer.{i}.output.dense":                 "layers.{i}.mlp.down_proj",
    "encoder.layer.{i}.output.LayerNorm":             "layers.{i}.norm2",
}


DEBERTA_NAMES = {
    **{theirs: ours for theirs, ours in BERT_NAMES.items() if ".self." not in theirs},
    "embeddings.embed_proj":                             "embed_proj",
    "encoder.rel_embeddings":                            "distances",
    "encoder.LayerNorm":                                 "distances_norm",
    "encoder.conv.conv":                                 "layers.0.conv",
    "encoder.conv.LayerNorm":                            "layers.0.conv_norm",
    # v1
    "encoder.layer.{i}.attention.self.in_proj":          "layers.{i}.attention.q_proj layers.{i}.attention.k_proj layers.{i}.attention.v_proj",
    "encoder.layer.{i}.attention.self.q_bias":           "layers.{i}.attention.q_proj.bias",
    "encoder.layer.{i}.attention.self.v_bias":           "layers.{i}.attention.v_proj.bias",
    "encoder.layer.{i}.attention.self.pos_proj":         "layers.{i}.attention.pos_k_proj",
    "encoder.layer.{i}.attention.self.pos_q_proj":       "layers.{i}.attention.pos_q_proj",
    # v2, v3
    "encoder.layer.{i}.attention.self.query_proj":       "layers.{i}.attention.q_proj",
    "encoder.layer.{i}.attention.self.key_proj":         "layers.{i}.attention.k_proj",
    "encoder.layer.{i}.attention.self.value_proj":       "layers.{i}.attention.v_proj",
    "encoder.layer.{i}.attention.self.pos_key_proj":     "layers.{i}.attention.pos_k_proj",
    "encoder.layer.{i}.attention.self.pos_query_proj":   "layers.{i}.attention.pos_q_proj",
}


def gpt2_config(c):
    unsupported(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False)
    return GPTConfig(c["vocab_size"], c["n_layer"], c["n_head"], c["n_embd"], c.get("n_inner") or 4 * c["n_embd"], c["n_positions"],
                     norm_eps=c.get("layer_norm_epsilon", 1e-5), activation=activation(c.get("activation_function", "gelu_new")),
                     tied=c.get("tie_word_embeddings", True))


def llama_config(c):
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    rope["type"] = rope.get("rope_type") or rope.get("type") or "default"
    needs = {"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": (), "longrope": ("long_factor", "short_factor"),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    if rope["type"] not in needs:
        raise ValueError(f"RoPE scaling {rope['type']!r} is not known; known are {', '.join(needs)}")
    for name in needs[rope["type"]]:
        rope[name]  # a KeyError here, not in the middle of a run
    unsupported(c, pretraining_tp=1)
    theta = rope.get("rope_theta") or c.get("rope_theta") or 10000.0
    rope.setdefault("original_max_position_embeddings", c.get("original_max_position_embeddings"))
    return GPTConfig(c["vocab_size"], c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"], c["intermediate_size"],
                     c["max_position_embeddings"], n_kv_head=c.get("num_key_value_heads") or 0, head_dim=c.get("head_dim") or 0,
                     learned_positions=False, rope_theta=theta, rope=rope, rms_norm=True, norm_eps=c.get("rms_norm_eps", 1e-6),
                     activation=activation(c.get("hidden_act", "silu")), gated=True, attention_bias=c.get("attention_bias", False),
                     mlp_bias=c.get("mlp_bias", False), tied=c.get("tie_word_embeddings", False))


def bert_config(c, offset=0):
    unsupported(c, position_embedding_type="absolute", is_decoder=False)
    return EncoderConfig(c["vocab_size"], c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"], c["intermediate_size"],
                         c["max_position_embeddings"], c.get("type_vocab_size", 2), offset, c.get("layer_norm_eps", 1e-12),
                         activation(c.get("hidden_act", "gelu")))


def roberta_config(c):
    return bert_config(c, offset=c.get("pad_token_id", 1) + 1)


def deberta_config(c, version=1):
    unsupported(c, relative_attention=True, talking_head=False)
    terms = c.get("pos_att_type") or ()
    terms = tuple(term.strip() for term in (terms.split("|") if isinstance(terms, str) else terms))
    if not terms or set(terms) - {"c2p", "p2c"}:
        raise ValueError(f"pos_att_type is {c.get('pos_att_type')!r}; c2p and p2c are supported")
    furthest = c.get("max_relative_positions", -1)
    furthest = furthest if furthest > 0 else c["max_position_embeddings"]
    buckets = max(0, c.get("position_buckets", -1)) if version == 2 else 0
    cfg = EncoderConfig(c["vocab_size"], c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"], c["intermediate_size"],
                        c["max_position_embeddings"], c.get("type_vocab_size", 0), 0, c.get("layer_norm_eps", 1e-7),
                        activation(c.get("hidden_act", "gelu")), learned_positions=c.get("position_biased_input", True),
                        relative=terms, relative_span=buckets or furthest, relative_buckets=buckets, relative_furthest=furthest,
                        k_bias=version == 2, embed_dim=c.get("embedding_size") or 0)
    if version == 2:
        norms = [part.strip() for part in (c.get("norm_rel_ebd") or "none").lower().split("|")]
        cfg.relative_norm, cfg.relative_shared = "layer_norm" in norms, c.get("share_att_key", False)
        cfg.head_dim = c.get("attention_head_size") or cfg.head_dim
        cfg.conv_kernel, cfg.conv_groups = c.get("conv_kernel_size") or 0, c.get("conv_groups", 1)
        cfg.conv_activation = activation(c.get("conv_act", "tanh"))
    return cfg


def deberta2_config(c):
    return deberta_config(c, version=2)


def turn_conv1d(name, tensor, cfg):
    """GPT-2 stores these weights as (in, out)."""
    return tensor.t() if re.fullmatch(r"h\..*\.(c_attn|c_proj|c_fc)\.weight", name) else tensor


def ungroup_heads(name, tensor, cfg):
    """DeBERTa v1 stores a head's query, key and value rows together: to all queries, all keys, all values."""
    if not name.endswith("self.in_proj.weight"):
        return tensor
    return tensor.reshape(cfg.n_head, 3, cfg.head_dim, -1).transpose(0, 1).reshape(tensor.shape)


# Tensors that published files hold and these models do not use: heads of other tasks, and buffers.
ENCODER_EXTRAS = r"(pooler|cls|classifier|lm_head|qa_outputs|score)\b.*|.*position_ids"
DEBERTA_EXTRAS = ENCODER_EXTRAS + r"|(lm|mask)_predictions\b.*|embeddings\.position_embeddings\.weight"
# model_type: class, config, names, the prefix that some files put before them, what may be left over, how a tensor is turned
FAMILIES = {
    "gpt2":       (GPT, gpt2_config, GPT2_NAMES, "transformer.", r"h\.\d+\.attn\.(bias|masked_bias)|score\..*", turn_conv1d),
    "llama":      (GPT, llama_config, LLAMA_NAMES, "model.", r".*rotary_emb\.inv_freq|score\..*", None),
    "bert":       (Encoder, bert_config, BERT_NAMES, "bert.", ENCODER_EXTRAS, None),
    "roberta":    (Encoder, roberta_config, BERT_NAMES, "roberta.", ENCODER_EXTRAS, None),
    "deberta":    (Encoder, deberta_config, DEBERTA_NAMES, "deberta.", DEBERTA_EXTRAS, ungroup_heads),
    "deberta-v2": (Encoder, deberta2_config, DEBERTA_NAMES, "deberta.", DEBERTA_EXTRAS, None),
}


def unsupported(c, **expected):
    for name, value in expected.items():
        if c.get(name, value) != value:
            raise ValueError(f"{name} is {c[name]!r}; only {value!r} is supported")


def activation(name):
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is not known; known are {', '.join(ACTIVATIONS)}")
    return name


def load_pretrained(name_or_folder, dtype=torch.float32, device="cpu", cls=None):
    """GPT or Encoder, as config.json's model_type says, with the folder's weights in `dtype` on `device`, in evaluation mode.

    Completely or not at all: ValueError names the file, and the first tensors, that are missing, unexpected or misshapen.
    """
    folder = str(name_or_folder)
    if not os.path.isdir(folder):
        from data.download import model_folder
        folder = model_folder(folder)
    family, config, _ = read_config(os.path.join(folder, "config.json"))
    found = family[0]
    if cls is not None and cls is not found:
        raise ValueError(f"{folder} holds a model for {found.__name__}.from_pretrained, not {cls.__name__}.from_pretrained")
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be read
        model = found(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie()
    fill(model, family, read_weights(folder))
    return model.eval()


def read_config(path):
    """(row of FAMILIES, config, model_type) from config.json."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there: a model's folder holds config.json, its weights and its vocabulary") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not known; known are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind], FAMILIES[kind][1](content), kind
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


@torch.no_grad()
def fill(model, family, tensors):
    """Copy every (name, tensor, file) into its parameter; ValueError where one stays empty, or two tensors for it differ."""
    _, _, names, prefix, extras, turn = family
    theirs = {}
    for i in range(len(model.layers)):
        theirs.update({their.format(i=i): ours.format(i=i).split() for their, ours in names.items()})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled, files = set(), []
    for name, tensor, path in tensors:
        files.append(path)
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name.removeprefix(prefix)))
        module, _, kind = name.rpartition(".")
        ours = theirs.get(name) or [f"{target}.{kind}" for target in theirs.get(module, [])]
        if not ours or any(target not in parameters for target in ours):
            if re.fullmatch(extras, name):
                continue
            raise ValueError(f"{path} holds tensor {name!r}, for which this model has no place")
        turned = turn(name, tensor, model.config) if turn else tensor
        pieces = turned.chunk(len(ours)) if len(ours) > 1 else [turned]
        for target, piece in zip(ours, pieces):
            if piece.shape != parameters[target].shape:
                raise ValueError(f"{path}: tensor {name!r} has shape {tuple(tensor.shape)}, which does not fit "
                                 f"{target} {tuple(parameters[target].shape)}")
            if id(parameters[target]) in filled and not torch.equal(parameters[target], piece.to(parameters[target])):
                raise ValueError(f"{path}: tensor {name!r} is the second one for {target}, and another")
            parameters[target].copy_(piece)
            filled.add(id(parameters[target]))  # a tied one has two names, and either will do
    missing = [name for name, p in model.named_parameters() if id(p) not in filled]
    if missing:
        raise ValueError(f"{', '.join(sorted(set(files)))}: no tensor for {', '.join(missing[:3])}"
                         + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""))


def read_weights(folder):
    """Yield (name, tensor, file) of model.safetensors or pytorch_model.bin, in one piece or in shards, a tensor at a time."""
    for single, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        path, index = os.path.join(folder, single), os.path.join(folder, single + ".index.json")
        if os.path.exists(path):
            files = [path]
        elif os.path.exists(index):
            try:
                with open(index, encoding="utf-8") as file:
                    files = [os.path.join(folder, os.path.basename(name)) for name in sorted(set(json.load(file)["weight_map"].values()))]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index} is no index of weights: it should hold \"weight_map\"") from None
        else:
            continue
        for path in files:
            if not os.path.exists(path):
                raise ValueError(f"{path} is not there, and {index} says that it holds weights")
            for name, tensor in read(path):
                yield name, tensor, path
        return
    raise ValueError(f"{folder} holds no weights: model.safetensors or pytorch_model.bin, or their shards with an index")


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BUFFERS = ("I64", "I32", "U8", "BOOL")  # position_ids and causal masks, which no parameter needs


def read_safetensors(path):
    """Yield (name, tensor). The file: 8 bytes with the header's length, the header in JSON, the tensors' bytes."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            rows = [(name, row["dtype"], row["shape"], *row["data_offsets"]) for name, row in header.items()]
            if not rows:
                raise ValueError("it holds no tensor")
            end = max(row[4] for row in rows)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is cut short, or no safetensors file ({error})") from None
        if 8 + length + end != size:
            raise ValueError(f"{path} is cut short or damaged: its header promises {8 + length + end} bytes, there are {size}")
        for name, kind, shape, first, last in rows:
            if kind in BUFFERS:
                continue
            if kind not in SAFETENSORS:
                raise ValueError(f"{path}: tensor {name!r} is {kind}; known are {', '.join(SAFETENSORS)}")
            dtype = SAFETENSORS[kind]
            if last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{path}: tensor {name!r} of shape {tuple(shape)} has {last - first} bytes")
            file.seek(8 + length + first)
            raw = bytearray(last - first)
            file.readinto(raw)
            yield name, torch.frombuffer(raw, dtype=dtype).reshape(shape) if raw else torch.empty(shape, dtype=dtype)


def read_pickle(path):
    """Yield (name, tensor) of a file that torch.save wrote, without running anything in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        rows = [(name, tensor) for name, tensor in state.items() if isinstance(tensor, torch.Tensor)]
    except Exception as error:
        raise ValueError(f"{path} is cut short, or no file of weights ({type(error).__name__})") from None
    if not rows:
        raise ValueError(f"{path} holds no tensor" + (f", but {', '.join(map(str, list(state)[:3]))}: save what its model is in alone" if state else ""))
    yield from rows
