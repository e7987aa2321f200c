"""The forward pass of a Mixtral, layer by layer, with experts that may be replaced."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn.functional import embedding, scaled_dot_product_attention, silu
from transformers import AutoModelForCausalLM

PIECE_CHARACTERS = 50_000
"""Characters that are encoded together, as in `lowrank-text`."""


@dataclass
class Expert:
    """Dense matrices: w1 and w3 [k, H], w2 [H, k]."""

    w1: torch.Tensor
    w3: torch.Tensor
    w2: torch.Tensor

    def activations(self, x):
        return silu(x @ self.w1.T) * (x @ self.w3.T)

    def __call__(self, x):
        return self.activations(x) @ self.w2.T


class Mixtral:
    """Weights in f32. Hidden states are [windows, T, H], inputs of a MoE block [windows * T, H]."""

    def __init__(self, folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.config = c = model.config
        self.layers, self.norm, self.head = model.model.layers, model.model.norm, model.lm_head
        self.table = model.model.embed_tokens.weight
        self.head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.rotary = model.model.rotary_emb
        f = c.intermediate_size
        self.experts = [
            [
                Expert(e.gate_up_proj[i, :f], e.gate_up_proj[i, f:], e.down_proj[i])
                for i in range(c.num_local_experts)
            ]
            for e in (layer.mlp.experts for layer in self.layers)
        ]

    def embed(self, ids):
        return embedding(ids, self.table)

    def attention(self, layer, h):
        block = self.layers[layer]
        a, x = block.self_attn, block.input_layernorm(h)
        heads = lambda y: y.view(*y.shape[:2], -1, self.head_dim).transpose(1, 2)
        q, k, v = heads(a.q_proj(x)), heads(a.k_proj(x)), heads(a.v_proj(x))
        cos, sin = self.rotary(x, torch.arange(x.shape[1])[None])
        turn = lambda y: y * cos + torch.cat((-y[..., self.head_dim // 2 :], y[..., : self.head_dim // 2]), -1) * sin
        y = scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True, enable_gqa=True)
        return h + a.o_proj(y.transpose(1, 2).reshape(*x.shape[:2], -1))

    def moe_input(self, layer, h):
        return self.layers[layer].post_attention_layernorm(h).flatten(0, 1)

    def route(self, layer, x):
        """Per expert: the tokens that are routed to it, rising, and their router weights."""
        chances = torch.softmax(x @ self.layers[layer].mlp.gate.weight.T, -1)
        g, chosen = chances.topk(self.config.num_experts_per_tok, -1)
        g = g / g.sum(-1, keepdim=True)
        found = []
        for e in range(self.config.num_local_experts):
            tokens, place = torch.where(chosen == e)
            found.append((tokens, g[tokens, place]))
        return found

    def moe(self, x, routing, experts):
        y = torch.zeros_like(x)
        for expert, (tokens, g) in zip(experts, routing):
            y.index_add_(0, tokens, expert(x[tokens]) * g[:, None])
        return y

    def block(self, layer, h, experts):
        h = self.attention(layer, h)
        x = self.moe_input(layer, h)
        return h + self.moe(x, self.route(layer, x), experts).view_as(h)

    def run(self, h, experts, first=0):
        for layer in range(first, len(self.layers)):
            h = self.block(layer, h, experts[layer])
        return h

    def logits(self, h):
        return self.head(self.norm(h))


def windows(folder, path, tokens, window=256, bos=False, spread=False):
    """Token ids [windows, T], cut as `lowrank-text` cuts them."""
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    text = Path(path).read_text()
    pieces = [text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS)]
    ids = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False).ids]
    prefix = tokenizer.encode("").ids if bos else []
    room = window - len(prefix)
    cut = [prefix + ids[i : i + room] for i in range(0, len(ids) - room + 1, room)]
    wanted = tokens // window
    if spread and len(cut) > wanted:
        cut = [cut[i * len(cut) // wanted] for i in range(wanted)]
    return torch.tensor(cut[:wanted])
