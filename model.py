"""GPT (GPT-2, LLaMA) and Encoder (BERT, RoBERTa, DeBERTa v1 to v3), and loading their published weights.

    model = load_pretrained("path/to/folder")           # a GPT or an Encoder, as its config.json says
    logits, loss = gpt(idx, targets)                    # idx (B, T) token ids, logits (B, T, vocab_size)
    logprobs = gpt.answer_logprobs(idx, is_answer)      # of the tokens that is_answer (B, T) marks
    new = gpt.generate(idx, mask, max_new_tokens=32)    # greedy, with a key-value cache; padding on the left
    hidden = encoder(idx, mask)                         # (B, T, n_embd)
    scores = Classifier(encoder, n_classes)(idx, mask)  # (B, n_classes)

A family is a row of data: what differs between GPT-2 and LLaMA, or BERT and DeBERTa, is a field of the config.
Layers have the same names everywhere: q_proj k_proj v_proj o_proj up_proj down_proj (gate_proj), all plain nn.Linear.
Fused projections (GPT-2, DeBERTa v1) are split on load. Outputs equal those of transformers to rounding.
Left out on purpose: dropout, sampling, quantised weights, RoPE scalings other than linear and llama3.

In the shapes B is the batch, T the tokens passed in, S all tokens so far, nh the number of heads, hs a head's size.
"""
import json
import math
import struct
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ---- RoPE and blocks -------------------------------------------------------------------------------------------------


def rope_table(cfg, positions):
    """cos and sin of every pair's rotation at positions (T,) or (B, T): each (..., 1, T, hs), float32."""
    frequencies = 1.0 / cfg.rope_theta ** (torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim)
    kind, factor = cfg.rope.get("type", "default"), cfg.rope.get("factor")
    if kind == "linear":  # Chen et al., arXiv 2306.15595
        frequencies = frequencies / factor
    elif kind == "llama3":  # Llama 3.1: slow rotations, which never came round in pre-training, are slowed further
        low, high = cfg.rope["low_freq_factor"], cfg.rope["high_freq_factor"]
        turns = cfg.rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        blend = ((turns - low) / (high - low)).clamp(0, 1)  # 1: a fast rotation, which stays
        frequencies = blend * frequencies + (1 - blend) * frequencies / factor
    angles = positions.float()[..., None, :, None] * frequencies.to(positions.device)  # (..., 1, T, hs / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)  # pair i is the values i and i + hs / 2
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Softmax attention. n_kv_head may be less than n_head: then groups of query heads share a key and value head."""

    def __init__(self, cfg, n_kv_head, bias, k_bias, causal):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.causal = cfg.n_head, n_kv_head, cfg.head_dim, causal
        self.q_proj = nn.Linear(cfg.n_embd, cfg.n_head * cfg.head_dim, bias=bias)
        self.k_proj = nn.Linear(cfg.n_embd, n_kv_head * cfg.head_dim, bias=k_bias)
        self.v_proj = nn.Linear(cfg.n_embd, n_kv_head * cfg.head_dim, bias=bias)
        self.o_proj = nn.Linear(cfg.n_head * cfg.head_dim, cfg.n_embd, bias=bias)

    def heads(self, x, n_head):
        return x.view(*x.shape[:-1], n_head, self.head_dim).transpose(-2, -3)  # (..., nh, T, hs)

    def forward(self, x, allowed, rope=None, cache=None):
        """x (B, T, n_embd). allowed (B, 1, 1 or T, S): True where a query may look; None hides only a causal model's
        future. cache: a list, empty at first, that keeps the keys and values of earlier calls."""
        q = self.heads(self.q_proj(x), self.n_head)     # (B, nh, T, hs)
        k = self.heads(self.k_proj(x), self.n_kv_head)  # (B, nkv, T, hs)
        v = self.heads(self.v_proj(x), self.n_kv_head)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)  # (B, nkv, S, hs)
        if cache is not None:
            cache[:] = k, v
        if self.n_kv_head != self.n_head:
            group = self.n_head // self.n_kv_head
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, nh, S, hs)
        is_causal = self.causal and allowed is None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=is_causal)  # (B, nh, T, hs)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class DisentangledAttention(Attention):
    """DeBERTa's (He et al., arXiv 2006.03654). Scores are content to content, plus two terms that see the distance:
    query's content to key's distance (c2p) and key's content to query's (p2c). Distances are rows of one table."""

    def __init__(self, cfg):
        super().__init__(cfg, cfg.n_head, bias=True, k_bias=cfg.k_bias, causal=False)
        width, own = cfg.n_head * cfg.head_dim, not cfg.relative_shared
        self.pos_k_proj = nn.Linear(cfg.n_embd, width, bias=cfg.k_bias) if own else None
        self.pos_q_proj = nn.Linear(cfg.n_embd, width) if own else None

    def forward(self, x, allowed, relative):
        """relative: the table's rows (R, n_embd), and which of them belongs to each query and key (T, T)."""
        table, rows = relative
        q = self.heads(self.q_proj(x), self.n_head)  # (B, nh, T, hs)
        k = self.heads(self.k_proj(x), self.n_head)
        v = self.heads(self.v_proj(x), self.n_head)
        pos_k = self.heads((self.pos_k_proj or self.k_proj)(table), self.n_head)  # (nh, R, hs)
        pos_q = self.heads((self.pos_q_proj or self.q_proj)(table), self.n_head)
        scale = 1 / math.sqrt(3 * self.head_dim)     # of three terms
        q, pos_q = q * scale, pos_q * scale          # before the products: half precision overflows after
        rows = rows.expand(*q.shape[:2], -1, -1)     # (B, nh, T, T)
        # a query's scores with all R distances (B, nh, T, R); gather takes, for each key, that of its distance
        c2p = (q @ pos_k.mT).gather(-1, rows)        # (B, nh, T, T): query, key
        p2c = (k @ pos_q.mT).gather(-1, rows.mT).mT  # the same from key to query, and turned
        bias = c2p + p2c
        if allowed is not None:
            bias = bias.masked_fill(~allowed, torch.finfo(bias.dtype).min)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)  # (B, nh, T, hs)
        return self.o_proj(y.transpose(1, 2).flatten(2))


gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh,
               "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class MLP(nn.Module):
    def __init__(self, cfg, gated, bias):
        super().__init__()
        self.activate = ACTIVATIONS[cfg.activation]
        self.gate_proj = nn.Linear(cfg.n_embd, cfg.n_inner, bias=bias) if gated else None
        self.up_proj = nn.Linear(cfg.n_embd, cfg.n_inner, bias=bias)
        self.down_proj = nn.Linear(cfg.n_inner, cfg.n_embd, bias=bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.activate(self.up_proj(x)))
        return self.down_proj(self.activate(self.gate_proj(x)) * self.up_proj(x))


def run_layers(model, x, *args):
    """x through model.layers. Gradient checkpointing keeps only each layer's input; the backward pass runs it again."""
    for layer in model.layers:
        if model.gradient_checkpointing and model.training:
            x = checkpoint(layer, x, *args, use_reentrant=False)
        else:
            x = layer(x, *args)
    return x


# ---- GPT: causal, norm before each part ------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int                    # width of the MLP
    n_positions: int                # rows of the position table (GPT-2), or the longest text of pre-training (LLaMA)
    n_kv_head: int = 0              # 0: as many as n_head; fewer: grouped-query attention
    head_dim: int = 0               # 0: n_embd / n_head
    learned_positions: bool = True  # GPT-2; else RoPE
    rope_theta: float = 10000.0
    rope: dict = field(default_factory=dict)  # scaling as in config.json: its "type" and what that needs
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


class GPTBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        norm = nn.RMSNorm if cfg.rms_norm else nn.LayerNorm
        self.norm1 = norm(cfg.n_embd, eps=cfg.norm_eps)
        self.attention = Attention(cfg, cfg.n_kv_head, cfg.attention_bias, k_bias=cfg.attention_bias, causal=True)
        self.norm2 = norm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg, cfg.gated, cfg.mlp_bias)

    def forward(self, x, allowed, rope, cache=None):
        x = x + self.attention(self.norm1(x), allowed, rope, cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """GPT-2 or LLaMA."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.max_length = config.n_positions  # a hard limit with learned positions; with RoPE what pre-training saw
        self.gradient_checkpointing = False   # True: recompute activations in the backward pass
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embed = nn.Embedding(config.n_positions, config.n_embd) if config.learned_positions else None
        self.layers = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.norm = (nn.RMSNorm if config.rms_norm else nn.LayerNorm)(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed.weight

    def hidden(self, idx, mask=None, cache=None):
        """Last hidden states (B, T, n_embd), after the final norm. idx (B, T); mask (B, S), True for real tokens.

        Padding on the right needs no mask: no real token looks there. On the left it does; positions then count real
        tokens. cache: a list for each layer, empty at first. With it, idx holds the new tokens alone.
        """
        T = S = idx.shape[1]
        if cache and cache[0]:
            S += cache[0][0].shape[2]  # the first layer's keys of earlier calls
        if self.position_embed is not None and S > self.max_length:
            raise ValueError(f"a sequence of {S} tokens: this model has {self.max_length} positions")
        positions, allowed = torch.arange(S, device=idx.device), None
        if mask is not None or S > T:
            #   keys:     pad pad The cat
            #   query pad  x   .   .   .    A query sees the real tokens up to itself, and itself,
            #         pad  .   x   .   .    since a softmax over nothing is NaN.
            #         The  .   .   x   .    Their positions are 0 0 0 1.
            #         cat  .   .   x   x    With a cache only the last T lines are made.
            query, key = positions[-T:, None], positions
            mask = idx.new_ones(len(idx), S).bool() if mask is None else mask.bool()
            allowed = (mask[:, None, None, :] & (query >= key)) | (query == key)  # (B, 1, T, S)
            positions = (mask.cumsum(1) - 1).clamp(min=0)                         # (B, S)
        x, rope = self.embed(idx), None
        if self.position_embed is not None:
            x = x + self.position_embed(positions[..., -T:])
        else:
            rope = rope_table(self.config, positions[..., -T:])
        if cache is None:
            return self.norm(run_layers(self, x, allowed, rope))
        for layer, layer_cache in zip(self.layers, cache):
            x = layer(x, allowed, rope, layer_cache)
        return self.norm(x)

    def forward(self, idx, targets=None, mask=None):
        """(logits (B, T, vocab_size), loss). targets[:, t] should follow idx[:, t]; -100 does not count."""
        logits = self.lm_head(self.hidden(idx, mask))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def answer_logprobs(self, idx, is_answer):
        """Log-probability of each token that is_answer marks (n,), row after row.

        idx, is_answer (B, T), padded on the right. A row's first token is never an answer: nothing predicts it.
        """
        row, t = is_answer[:, 1:].nonzero(as_tuple=True)  # the GPU is waited for here, before it has much to do
        answers = idx[row, t + 1]
        x = self.hidden(idx[:, :-1])[row, t]  # (n, n_embd): the token before each answer token predicts it
        logits = self.lm_head(x).float()      # (n, vocab_size): the vocabulary is wide, so for answers alone
        return -F.cross_entropy(logits, answers, reduction="none")

    @torch.no_grad()
    def generate(self, idx, mask=None, max_new_tokens=32, eos=None):
        """Greedy continuation of idx (B, T), padded on the left where mask is False: the new ids (B, max_new_tokens).

        After its first `eos` a row holds nothing else. Generation ends early when every row has one.
        """
        mask = torch.ones_like(idx, dtype=torch.bool) if mask is None else mask.bool()
        if not mask[:, -1].all():
            raise ValueError("a row ends in padding: for generation, pad on the left")
        cache = [[] for _ in self.layers]
        ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        new = idx[:, :0]
        while new.shape[1] < max_new_tokens and not ended.all():
            idx = self.lm_head(self.hidden(idx, mask, cache)[:, -1:]).argmax(-1)  # (B, 1)
            if eos is not None:
                idx = idx.masked_fill(ended, eos)
                ended = ended | (idx == eos)
            new = torch.cat([new, idx], dim=1)
            mask = F.pad(mask, (0, 1), value=True)
        return new


# ---- Encoder: looks both ways, norm after each part ------------------------------------------------------------------


@dataclass
class EncoderConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_inner: int
    n_positions: int          # rows of the position table; without one (DeBERTa), the longest text
    n_types: int = 2          # token types: first and second text; 0: none
    position_offset: int = 0  # RoBERTa: padding_idx + 1, so that of 514 rows 512 are left
    norm_eps: float = 1e-12
    activation: str = "gelu"
    # DeBERTa
    learned_positions: bool = True  # added to the input; DeBERTa leaves them out
    relative: bool = False          # disentangled attention
    relative_span: int = 0          # the table of distances has 2 * relative_span rows
    relative_buckets: int = 0       # v2, v3: far distances share rows, by their logarithm; 0: a row each
    relative_furthest: int = 0      # v2, v3: the distance that the last bucket stands for
    relative_shared: bool = False   # v3: distances go through k_proj and q_proj
    relative_norm: bool = False     # v2, v3: LayerNorm on the table
    k_bias: bool = True             # v1 has none
    conv_kernel: int = 0            # v2: width of a convolution beside the first layer; 0: none
    conv_activation: str = "tanh"

    def __post_init__(self):
        self.head_dim = self.n_embd // self.n_head


class EncoderBlock(nn.Module):
    def __init__(self, cfg, conv=False):
        super().__init__()
        if cfg.relative:
            self.attention = DisentangledAttention(cfg)
        else:
            self.attention = Attention(cfg, cfg.n_head, bias=True, k_bias=True, causal=False)
        self.norm1 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.mlp = MLP(cfg, gated=False, bias=True)
        self.norm2 = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
        self.conv = None
        if conv:
            self.conv = nn.Conv1d(cfg.n_embd, cfg.n_embd, cfg.conv_kernel, padding=(cfg.conv_kernel - 1) // 2)
            self.conv_norm = nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps)
            self.conv_activate = ACTIVATIONS[cfg.conv_activation]

    def forward(self, x, allowed, relative=None, real=None):
        y = self.norm1(x + self.attention(x, allowed, relative))
        y = self.norm2(y + self.mlp(y))
        if self.conv is None:
            return y
        # real (B, T, 1) is 0 at padding, which the convolution would otherwise carry into its neighbours
        beside = self.conv((x * real).mT).mT * real  # (B, T, n_embd)
        return self.conv_norm(y + self.conv_activate(beside)) * real


class Encoder(nn.Module):
    """BERT, RoBERTa or DeBERTa, without pooler."""

    def __init__(self, config):
        super().__init__()
        n_embd, eps = config.n_embd, config.norm_eps
        self.config = config
        self.max_length = config.n_positions - config.position_offset
        self.gradient_checkpointing = False  # True: recompute activations in the backward pass
        self.embed = nn.Embedding(config.vocab_size, n_embd)
        self.position_embed = nn.Embedding(config.n_positions, n_embd) if config.learned_positions else None
        self.type_embed = nn.Embedding(config.n_types, n_embd) if config.n_types else None
        self.embed_norm = nn.LayerNorm(n_embd, eps=eps)
        self.distance_embed = nn.Embedding(2 * config.relative_span, n_embd) if config.relative else None
        self.distance_norm = nn.LayerNorm(n_embd, eps=eps) if config.relative_norm else None
        self.layers = nn.ModuleList(EncoderBlock(config, conv=bool(config.conv_kernel) and i == 0)
                                    for i in range(config.n_layer))

    def forward(self, idx, mask=None, token_type=None):
        """Last hidden states (B, T, n_embd). idx, mask and token_type are (B, T); mask is True for real tokens."""
        T = idx.shape[1]
        if T > self.max_length:
            raise ValueError(f"a sequence of {T} tokens: this model has {self.max_length} positions")
        positions, allowed = torch.arange(T, device=idx.device), None
        if mask is not None:
            mask = mask.bool()
            allowed = mask[:, None, None, :]  # (B, 1, 1, T)
            if self.config.position_offset:
                positions = (mask.cumsum(1) - 1).clamp(min=0)  # RoBERTa counts real tokens, wherever the padding is
        x = self.embed(idx)
        if self.position_embed is not None:
            x = x + self.position_embed(positions + self.config.position_offset)
        if self.type_embed is not None:
            if token_type is None or self.config.n_types == 1:  # RoBERTa has one type; separators tell a pair apart
                token_type = torch.zeros_like(idx)
            x = x + self.type_embed(token_type)
        x = self.embed_norm(x)
        if self.distance_embed is None:
            return run_layers(self, x, allowed)
        real = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)  # (B, T, 1)
        return run_layers(self, x, allowed, self.relative(T), real)

    def relative(self, T):
        """The table's rows that T tokens need (R, n_embd), and which of them belongs to each query and key (T, T)."""
        cfg, span = self.config, self.config.relative_span
        position = torch.arange(T, device=self.distance_embed.weight.device)
        distance = position[:, None] - position  # (T, T)
        if cfg.relative_buckets:
            # Near distances have a row each, far ones share rows that grow wider. 8 buckets, furthest 32, so mid is 4:
            #   distance  0  1  2  3  4  5-7  8-15  16-31   (negative ones likewise, with a minus)
            #   bucket    0  1  2  3  4   5    6      7
            mid = cfg.relative_buckets // 2
            far = distance.abs().clamp(min=mid)
            # 0 at the distance mid, 1 at the furthest; logarithms in float32, as in the original, since ceil follows
            share = torch.log(far / mid) / torch.log(torch.tensor((cfg.relative_furthest - 1) / mid))
            bucket = mid + (share * (mid - 1)).ceil().long()
            distance = torch.where(far <= mid, distance, distance.sign() * bucket)
        # distance 0 is row `span`; T tokens reach at most T - 1 rows from it, so the rest need no norm and no product
        first, last = max(0, span - T + 1), min(2 * span, span + T)
        table = self.distance_embed.weight[first:last]
        table = table if self.distance_norm is None else self.distance_norm(table)
        return table, (distance + span).clamp(0, 2 * span - 1) - first


class Classifier(nn.Module):
    """A head over the mean of an Encoder's real tokens, or over a GPT's last one. n_classes = 1 is regression.

    The mean, and not the first token: all-MiniLM was trained with it, and the published RoBERTa and DeBERTa hold no
    trained weights for reading the first token.
    """

    def __init__(self, backbone, n_classes):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.config.n_embd, n_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, idx, mask=None, token_type=None):
        """(B, n_classes) from idx, mask, token_type (B, T); a GPT has no token types."""
        real = torch.ones_like(idx, dtype=torch.bool) if mask is None else mask.bool()
        if isinstance(self.backbone, GPT):
            x = self.backbone.hidden(idx, mask)                     # (B, T, n_embd)
            last = idx.shape[1] - 1 - real.flip(1).int().argmax(1)  # (B,)
            pooled = x[torch.arange(len(x), device=x.device), last]
        else:
            x = self.backbone(idx, mask, token_type) * real[..., None]  # (B, T, n_embd)
            pooled = x.sum(1) / real.sum(1, keepdim=True).clamp(min=1)  # a row of padding alone gives 0, not NaN
        return self.head(pooled.to(self.head.weight.dtype))


# ---- Published weights: their names to ours. {i} is the layer. A name stands for its weight and its bias. ------------

QKV = "layers.{i}.attention.q_proj layers.{i}.attention.k_proj layers.{i}.attention.v_proj"  # one tensor of theirs
GPT2_NAMES = {
    "wte":               "embed",
    "wpe":               "position_embed",
    "h.{i}.ln_1":        "layers.{i}.norm1",
    "h.{i}.attn.c_attn": QKV,
    "h.{i}.attn.c_proj": "layers.{i}.attention.o_proj",
    "h.{i}.ln_2":        "layers.{i}.norm2",
    "h.{i}.mlp.c_fc":    "layers.{i}.mlp.up_proj",
    "h.{i}.mlp.c_proj":  "layers.{i}.mlp.down_proj",
    "ln_f":              "norm",
    "lm_head":           "lm_head",
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
    "embeddings.word_embeddings":                   "embed",
    "embeddings.position_embeddings":               "position_embed",
    "embeddings.token_type_embeddings":             "type_embed",
    "embeddings.LayerNorm":                         "embed_norm",
    "encoder.layer.{i}.attention.self.query":       "layers.{i}.attention.q_proj",
    "encoder.layer.{i}.attention.self.key":         "layers.{i}.attention.k_proj",
    "encoder.layer.{i}.attention.self.value":       "layers.{i}.attention.v_proj",
    "encoder.layer.{i}.attention.output.dense":     "layers.{i}.attention.o_proj",
    "encoder.layer.{i}.attention.output.LayerNorm": "layers.{i}.norm1",
    "encoder.layer.{i}.intermediate.dense":         "layers.{i}.mlp.up_proj",
    "encoder.layer.{i}.output.dense":               "layers.{i}.mlp.down_proj",
    "encoder.layer.{i}.output.LayerNorm":           "layers.{i}.norm2",
}
DEBERTA_NAMES = {
    **{theirs: ours for theirs, ours in BERT_NAMES.items() if ".self." not in theirs},
    "encoder.rel_embeddings":                          "distance_embed",
    "encoder.LayerNorm":                               "distance_norm",
    "encoder.conv.conv":                               "layers.0.conv",
    "encoder.conv.LayerNorm":                          "layers.0.conv_norm",
    # v1
    "encoder.layer.{i}.attention.self.in_proj":        QKV,
    "encoder.layer.{i}.attention.self.q_bias":         "layers.{i}.attention.q_proj.bias",
    "encoder.layer.{i}.attention.self.v_bias":         "layers.{i}.attention.v_proj.bias",
    "encoder.layer.{i}.attention.self.pos_proj":       "layers.{i}.attention.pos_k_proj",
    "encoder.layer.{i}.attention.self.pos_q_proj":     "layers.{i}.attention.pos_q_proj",
    # v2, v3
    "encoder.layer.{i}.attention.self.query_proj":     "layers.{i}.attention.q_proj",
    "encoder.layer.{i}.attention.self.key_proj":       "layers.{i}.attention.k_proj",
    "encoder.layer.{i}.attention.self.value_proj":     "layers.{i}.attention.v_proj",
    "encoder.layer.{i}.attention.self.pos_key_proj":   "layers.{i}.attention.pos_k_proj",
    "encoder.layer.{i}.attention.self.pos_query_proj": "layers.{i}.attention.pos_q_proj",
}


def refuse_others(c, **supported):
    """ValueError where config.json asks for what is not written here: other outputs from the same tensors."""
    for key, value in supported.items():
        if c.get(key, value) != value:
            raise ValueError(f"{key} is {c[key]!r}; only {value!r} is supported")


def gpt2_config(c):
    refuse_others(c, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    return GPTConfig(
        c["vocab_size"], c["n_layer"], c["n_head"], c["n_embd"], c.get("n_inner") or 4 * c["n_embd"], c["n_positions"],
        norm_eps=c.get("layer_norm_epsilon", 1e-5), activation=c.get("activation_function", "gelu_new"),
        tied=c.get("tie_word_embeddings", True))


def sizes(c):
    """What LLaMA and the encoders call by the same names."""
    return dict(vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_head=c["num_attention_heads"],
                n_embd=c["hidden_size"], n_inner=c["intermediate_size"], n_positions=c["max_position_embeddings"])


ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def llama_config(c):
    given = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}  # before transformers 5, and since
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_KEYS:
        raise ValueError(f"RoPE scaling {kind!r} is not supported; supported are {', '.join(ROPE_KEYS)}")
    refuse_others({**given, **c}, partial_rotary_factor=1)
    rope = {"type": kind, **{key: given[key] for key in ROPE_KEYS[kind]}}
    return GPTConfig(
        **sizes(c), n_kv_head=c.get("num_key_value_heads") or 0, head_dim=c.get("head_dim") or 0,
        learned_positions=False, rope_theta=given.get("rope_theta") or c.get("rope_theta") or 10000.0, rope=rope,
        rms_norm=True, norm_eps=c.get("rms_norm_eps", 1e-6), activation=c.get("hidden_act", "silu"), gated=True,
        attention_bias=c.get("attention_bias", False), mlp_bias=c.get("mlp_bias", False),
        tied=c.get("tie_word_embeddings", False))


def bert_config(c):
    refuse_others(c, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    return EncoderConfig(
        **sizes(c), n_types=c.get("type_vocab_size", 2), norm_eps=c.get("layer_norm_eps", 1e-12),
        position_offset=c.get("pad_token_id", 1) + 1 if c["model_type"] == "roberta" else 0,
        activation=c.get("hidden_act", "gelu"))


def deberta_config(c):
    refuse_others(c, relative_attention=True)
    terms = c.get("pos_att_type") or []
    terms = [term.strip() for term in terms.lower().split("|")] if isinstance(terms, str) else terms
    if sorted(terms) != ["c2p", "p2c"]:
        raise ValueError(f"pos_att_type is {terms}; only c2p and p2c together are supported")
    v1, furthest = c["model_type"] == "deberta", c.get("max_relative_positions", -1)
    furthest = furthest if furthest > 0 else c["max_position_embeddings"]
    buckets = 0 if v1 else max(0, c.get("position_buckets", -1))
    return EncoderConfig(
        **sizes(c), n_types=c.get("type_vocab_size", 0), norm_eps=c.get("layer_norm_eps", 1e-7),
        activation=c.get("hidden_act", "gelu"), learned_positions=c.get("position_biased_input", True),
        relative=True, relative_span=buckets or furthest, relative_buckets=buckets, relative_furthest=furthest,
        relative_shared=not v1 and c.get("share_att_key", False),
        relative_norm=not v1 and "layer_norm" in c.get("norm_rel_ebd", "none"),
        k_bias=not v1, conv_kernel=c.get("conv_kernel_size") or 0, conv_activation=c.get("conv_act", "tanh"))


# model_type: class, config, names
FAMILIES = {
    "gpt2":       (GPT, gpt2_config, GPT2_NAMES),
    "llama":      (GPT, llama_config, LLAMA_NAMES),
    "bert":       (Encoder, bert_config, BERT_NAMES),
    "roberta":    (Encoder, bert_config, BERT_NAMES),
    "deberta":    (Encoder, deberta_config, DEBERTA_NAMES),
    "deberta-v2": (Encoder, deberta_config, DEBERTA_NAMES),
}
PREFIXES = ("transformer.", "model.", "bert.", "roberta.", "deberta.")  # some files put one before every name
HEADS = ("pooler.", "cls.", "classifier.", "qa_outputs.", "score.", "lm_head.", "lm_predictions.", "mask_predictions.")
FINE_TUNED = {"classifier", "qa_outputs", "score"}  # of them
UNREAD = ("embeddings.position_embeddings.weight",  # DeBERTa-v3's
          "position_ids", "rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers of older files


def load_pretrained(folder, dtype=torch.float32, device="cpu"):
    """The GPT or Encoder of a folder in the layout of the Hub, in evaluation mode. Completely or not at all: ValueError
    names what is missing, unexpected or misshapen, and the file. A fine-tuned head there is not read, and one line on
    stderr says so."""
    folder = Path(folder)
    (model_class, _, names), config, _ = read_config(folder / "config.json")
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be read
        model = model_class(config).to(dtype)
    model.to_empty(device=device)
    if isinstance(model, GPT) and config.tied:
        model.lm_head.weight = model.embed.weight  # shared once more: to_empty gave each layer memory of its own
    copy_weights(model, names, folder)
    return model.eval()


def read_config(path):
    """(row of FAMILIES, GPTConfig or EncoderConfig, model_type) from config.json."""
    content = read_json(path)
    kind = content.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not known; known are {', '.join(FAMILIES)}")
    try:
        config = FAMILIES[kind][1](content)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    for activation in (config.activation, getattr(config, "conv_activation", "tanh")):
        if activation not in ACTIVATIONS:
            raise ValueError(f"{path}: activation {activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
    return FAMILIES[kind], config, kind


def read_json(path):
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not there, or is not JSON ({error})") from None


def unfused(name, tensor, n_head):
    """The tensor as (out, in); in a fused one all queries come before all keys, and these before all values."""
    if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):  # GPT-2 stores (in, out)
        return tensor.t()
    if name.endswith("self.in_proj.weight"):  # DeBERTa v1: q, k, v of head 0, then of head 1, ...
        rows = tensor.chunk(3 * n_head)
        return torch.cat(rows[0::3] + rows[1::3] + rows[2::3])
    return tensor


@torch.no_grad()
def copy_weights(model, names, folder):
    """Copy the folder's tensors to the parameters. Each tensor must have a place, and each parameter get a tensor."""
    # {name of their tensor: names of our parameters}: "h.0.ln_1.bias" goes to ["layers.0.norm1.bias"]
    places = {}
    for theirs, ours in names.items():
        for kind in (".weight", ".bias", ""):  # "": DeBERTa v1's q_bias and v_bias are tensors by themselves
            for i in range(len(model.layers)):
                places[(theirs + kind).format(i=i)] = [(name + kind).format(i=i) for name in ours.split()]
    # A tied weight is one parameter with two names, and may come under either, or under both. So a parameter is found
    # by each of its names, and what is missing is kept by identity.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = {id(p): name for name, p in model.named_parameters()}
    files, heads = set(), set()
    for name, tensor, path in read_weights(folder):
        files.add(path.name)
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")  # oldest
        targets = places.get(name, [])
        if not targets or any(target not in parameters for target in targets):
            if name.startswith(HEADS) or name.endswith(UNREAD):
                heads.add(name.partition(".")[0])
                continue
            raise ValueError(f"{path} holds tensor {name!r}, for which this model has no place")
        pieces = unfused(name, tensor, model.config.n_head).tensor_split(len(targets))
        for target, piece in zip(targets, pieces):
            p = parameters[target]
            if piece.shape != p.shape:
                raise ValueError(f"{path}: tensor {name!r} of shape {tuple(tensor.shape)} does not fit "
                                 f"{target} {tuple(p.shape)}")
            if id(p) not in missing and not torch.equal(p, piece.to(p)):
                raise ValueError(f"{path}: tensor {name!r} is the second one for {target}, and differs from the first")
            p.copy_(piece)
            missing.pop(id(p), None)
    if missing:
        first = ", ".join(list(missing.values())[:3])
        raise ValueError(f"{folder}: no tensor for {first} in {', '.join(sorted(files))} ({len(missing)} missing)")
    for head in heads & FINE_TUNED:
        print(f"{folder}: the fine-tuned head there ({head}) is not used, only the layers below it", file=sys.stderr)


def read_weights(folder):
    """Yield (name, tensor, file) of model.safetensors or pytorch_model.bin, whole or in shards."""
    for whole, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        index = folder / f"{whole}.index.json"
        if (folder / whole).exists():
            files = [whole]
        elif index.exists():
            files = sorted(set(read_json(index)["weight_map"].values()))
        else:
            continue
        for path in (folder / file for file in files):
            if not path.exists():
                raise ValueError(f"{path} is not there, but {index.name} lists it")
            for name, tensor in read(path):
                yield name, tensor, path
        return
    raise ValueError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor their shards")


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
               "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """Yield (name, tensor). The file: 8 bytes with the header's length, the header in JSON, the tensors' bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
            rows = [(name, row["dtype"], row["shape"], *row["data_offsets"])
                    for name, row in header.items() if name != "__metadata__"]
            end = 8 + length + max(last for *_, last in rows)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is cut short, or no safetensors file ({error})") from None
        if end != size:
            raise ValueError(f"{path} is cut short or damaged: its header promises {end} bytes, there are {size}")
        for name, kind, shape, first, last in rows:
            if kind not in SAFETENSORS:
                raise ValueError(f"{path}: tensor {name!r} is {kind}; known are {', '.join(SAFETENSORS)}")
            file.seek(8 + length + first)
            raw = bytearray(last - first)
            file.readinto(raw)
            yield name, torch.frombuffer(raw, dtype=SAFETENSORS[kind]).reshape(shape)


def read_bin(path):
    """(name, tensor) pairs of a file that torch.save wrote, without running code from it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True).items()
    except Exception as error:  # for a damaged file torch has many
        raise ValueError(f"{path} is cut short, or no file of weights ({type(error).__name__})") from None
