# SPDX-License-Identifier: MIT OR Apache-2.0
"""Experts with low-rank matrices, W [out, in] ~= u [out, r] @ v [r, in] or the same by pivots, for every family of models.

Attention, norms, router, embedding and head are transformers' own: `factor_experts` replaces the experts inside each MoE
block, those matrices of a shared expert that have a rank, and nothing else. Modules have the names of the checkpoint, `....experts.E.PROJECTION.{u,v}.weight`
(`{basis,coefficients}.weight` and `order` if pivoted), so no conversion of weights takes place. Two generations of
transformers call the experts differently, and both are served:

    v4   the block's forward indexes `self.experts[e]` and calls one expert on its tokens
    v5   the block's forward calls `self.experts(hidden_states, top_k_index, top_k_weights)`

A compiled graph sees the experts of v5 as one operator, because how many tokens an expert gets depends on the data.

`config.lowrank_config` holds the format, its version, how factors are stored, and the rank of every factored matrix:

    {"format": "lowrank-compress", "format_version": 1, "storage": "uv",
     "ranks": {"model.layers.0.mlp.experts.0.gate_proj": 464, ...}}

In version 2 `widths` maps experts that keep some of their channels to how many: `{"model.layers.0.mlp.experts.0": 300}`.
In version 3 `shared_base_layers` lists layers whose experts share a base: `....experts.shared_base.PROJECTION.weight`,
a dense matrix B. There a matrix with a rank is B plus its factors, W ~= B + u @ v, and experts keep all channels.
In version 4 `compressed_shared_experts` is true: matrices of shared experts may have ranks, too, and never a base.

`storage` is "uv" (two factors u @ v) or "pivoted" (interpolative decomposition: some of the matrix's own columns or rows,
and coefficients that compute the others from them). A matrix without a rank is dense.
"""

import re
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from weakref import WeakValueDictionary

import torch
import transformers
from torch import library, nn
from transformers.activations import ACT2FN

FORMAT = "lowrank-compress"
FORMAT_VERSIONS = (1, 2, 3, 4)
STORAGES = ("uv", "pivoted")
# What families call the expert that every token takes, within a block.
SHARED_EXPERTS = ("shared_expert", "shared_experts")

# What `order` holds until it is loaded: out of range from both ends, so that no gather takes it for an index.
NOT_LOADED = 2**31 - 1


def checked_ranks(config):
    """The rank map, or a ValueError when this code does not know how the checkpoint is stored."""
    lowrank = getattr(config, "lowrank_config", None)
    if not lowrank or lowrank.get("format") != FORMAT:
        raise ValueError("config.json has no `lowrank_config` of lowrank-compress: these are not low-rank factors")
    version, storage = lowrank.get("format_version"), lowrank.get("storage", "uv")
    if version not in FORMAT_VERSIONS:
        raise ValueError(f"`lowrank_config.format_version` is {version!r}, this code knows {FORMAT_VERSIONS}")
    if storage not in STORAGES:
        raise ValueError(f"`lowrank_config.storage` is {storage!r}, this code knows {STORAGES}")
    return lowrank["ranks"]


def storage_of(config):
    """How factors are stored, of a config that `checked_ranks` accepts."""
    return config.lowrank_config.get("storage", "uv")


def without_experts(plan):
    """A sharding plan without the entries of the experts."""
    return {name: how for name, how in (plan or {}).items() if ".mlp." not in name}


class LowRankLinear(nn.Module):
    """x [.., in] -> u (v x) [.., out]."""

    def __init__(self, in_features, out_features, rank):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.v = nn.Linear(in_features, rank, bias=False)
        self.u = nn.Linear(rank, out_features, bias=False)

    def forward(self, x):
        return self.u(self.v(x))


class PivotedLinear(nn.Module):
    """A matrix of rank r as r of its own columns (rows) and the coefficients T that make the others of them.

    The pivots lie on the short side. `order` holds every index of that side once, pivots first:

        in <= out    x -> basis (x_pivots + T x_others)                     basis [out, r], T [r, in - r]
        in > out     y_pivots = basis x, y_others = T y_pivots              basis [r, in],  T [out - r, r]
    """

    def __init__(self, in_features, out_features, rank):
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.pivots_on_inputs = in_features <= out_features
        if self.pivots_on_inputs:
            self.coefficients = nn.Linear(in_features - rank, rank, bias=False)
            self.basis = nn.Linear(rank, out_features, bias=False)
        else:
            self.basis = nn.Linear(in_features, rank, bias=False)
            self.coefficients = nn.Linear(rank, out_features - rank, bias=False)
        # A buffer of integers: it is saved, moved and never rounded, and it is no parameter.
        self.register_buffer("order", torch.full((min(in_features, out_features),), NOT_LOADED))

    def forward(self, x):
        if self.pivots_on_inputs:
            x = x.index_select(-1, self.order)
            return self.basis(x[..., : self.rank] + self.coefficients(x[..., self.rank :]))
        at_pivots = self.basis(x)
        y = torch.cat((at_pivots, self.coefficients(at_pivots)), dim=-1)
        return torch.empty_like(y).index_copy(-1, self.order, y)


LINEARS = {"uv": LowRankLinear, "pivoted": PivotedLinear}


def make_linear(in_features, out_features, rank, storage):
    """Factors for a rank; without one the matrix is dense and its tensor has the base model's name."""
    if rank is None:
        return nn.Linear(in_features, out_features, bias=False)
    return LINEARS[storage](in_features, out_features, rank)


def inner_size(config, path, names):
    """The inner width of an expert: the model's, unless the checkpoint keeps fewer channels of it."""
    return config.lowrank_config.get("widths", {}).get(path, getattr(config, names["width"]))


def shapes(projections, hidden, inner):
    """Name, inputs and outputs of each matrix of an expert."""
    gate, down, up = projections
    return (gate, hidden, inner), (down, inner, hidden), (up, hidden, inner)


def has_base(config, path):
    """Whether the experts of the layer at `path` share a base."""
    layers = config.lowrank_config.get("shared_base_layers", ())
    return any(path.startswith(f"model.layers.{layer}.") for layer in layers)


class SharedBase(nn.Module):
    """What the experts of a layer have in common: each of their factored matrices is the base's plus its factors."""

    def __init__(self, config, names):
        super().__init__()
        self.names = names["projections"]
        for name, inputs, outputs in shapes(self.names, config.hidden_size, getattr(config, names["width"])):
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))

    def add_to(self, own, name, x):
        """W x of an expert's matrix W, given the product `own` with its factors."""
        return own + getattr(self, name)(x)


class BaseProducts:
    """A base's products with all tokens: one per token and projection, however many experts a token has.

    Those of gate and up are gathered for each expert. Down is linear, so its product is that of a token's activations,
    weighted and summed over its experts.
    """

    def __init__(self, base, hidden_states, weights):
        self.base, self.hidden_states = base, hidden_states
        self.dtype = torch.result_type(hidden_states, weights)
        self.products, self.activations = {}, None

    def of_expert(self, tokens, weights):
        """What an expert calls in place of `SharedBase.add_to`, given its tokens and their weights [tokens, 1]."""
        return partial(self.add_to, tokens, weights)

    def add_to(self, tokens, weights, own, name, x):
        if name == self.base.names[1]:
            if self.activations is None:
                self.activations = x.new_zeros(len(self.hidden_states), x.shape[-1], dtype=self.dtype)
            self.activations.index_add_(0, tokens, (x * weights).to(self.dtype))
            return own
        if name not in self.products:
            self.products[name] = getattr(self.base, name)(self.hidden_states)
        return own + self.products[name].index_select(0, tokens)

    def finish(self, output):
        """The layer's output, given the weighted sum of what the experts returned."""
        if self.activations is None:
            return output
        down = getattr(self.base, self.base.names[1])
        return output + down(self.activations.to(output.dtype)).to(output.dtype)


class LowRankExpert(nn.Module):
    """SwiGLU: down(act(gate x) * up x), each matrix factored or dense on its own."""

    def __init__(self, config, ranks, path, names, base=None):
        super().__init__()
        self.names = names["projections"]
        for name, inputs, outputs in shapes(self.names, config.hidden_size, inner_size(config, path, names)):
            setattr(self, name, make_linear(inputs, outputs, ranks.get(f"{path}.{name}"), storage_of(config)))
        self.act_fn = ACT2FN[config.hidden_act]
        # The base is the layer's child. Here it is a plain attribute, so that each of its tensors has one name.
        self.__dict__["base"] = base
        self.on_base = [name for name in self.names if base is not None and f"{path}.{name}" in ranks]

    def matrix(self, name, add_base):
        """A function x -> W x. `add_base` adds the base's product to that of the factors, if W is stored so."""
        own = getattr(self, name)
        if name not in self.on_base:
            return own
        add_base = self.base.add_to if add_base is None else add_base
        return lambda x: add_base(own(x), name, x)

    def forward(self, x, add_base=None):
        gate, down, up = (self.matrix(name, add_base) for name in self.names)
        # vLLM's Transformers backend traces one instance of a class, fuses sibling nn.Linear that share an argument,
        # or `act(gate(x)) * up(x)`, and applies that to all instances. Here some are factored and some dense:
        # `contiguous` (a no-op) and `torch.mul` keep the pattern from matching. A shared base has no forward to trace.
        x = x.contiguous()
        return down(torch.mul(self.act_fn(gate(x)), up(x)))


class LowRankExperts(nn.Module):
    """The experts of a layer as children named 0 .. E-1, and `shared_base` if they have one.

    Not an nn.ModuleList on purpose: vLLM and SGLang swap any ModuleList (or 3-D parameter) called `experts` for a fused
    kernel that knows no factors.
    """

    def __init__(self, config, ranks, path, names, num_experts):
        super().__init__()
        self.num_experts = num_experts
        self.shared_base = SharedBase(config, names) if has_base(config, path) else None
        for e in range(num_experts):
            self.add_module(str(e), LowRankExpert(config, ranks, f"{path}.{e}", names, self.shared_base))
        self.key = registered(self, path)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.key = registered(self, self.key)  # a copy is compiled as itself

    def __len__(self):
        return self.num_experts

    def __getitem__(self, e):
        return getattr(self, str(int(e)))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """hidden_states [tokens, hidden]; index and weights [tokens, k] -> [tokens, hidden]."""
        if torch.compiler.is_compiling() and EXPERTS_OPERATOR is not None:
            parameters = list(self.parameters()) if torch.is_grad_enabled() else []
            return EXPERTS_OPERATOR(hidden_states, top_k_index, top_k_weights, parameters, self.key)
        if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
            return self.run_all(hidden_states, top_k_index, top_k_weights)
        return self.run_chosen(hidden_states, top_k_index, top_k_weights)

    def run_chosen(self, hidden_states, top_k_index, top_k_weights):
        """Every expert once, on its tokens. A token's experts add up in rising order."""
        if len(hidden_states) == 1 and self.shared_base is None:
            return self.run_token(hidden_states, top_k_index, top_k_weights)
        slots = top_k_index.shape[-1]
        index, by_expert = top_k_index.sort(dim=-1)
        index, weights = index.flatten(), top_k_weights.gather(-1, by_expert).flatten()
        order = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=self.num_experts).tolist()
        tokens, weights = order // slots, weights[order, None]
        rows = hidden_states[tokens].split(counts)
        base, parts = BaseProducts(self.shared_base, hidden_states, weights), repeat(None)
        if self.shared_base is not None:
            parts = map(base.of_expert, tokens.split(counts), weights.split(counts))
        outputs = [self[e](its_rows, part) for e, (its_rows, part) in enumerate(zip(rows, parts)) if len(its_rows)]
        if not outputs:
            return torch.zeros_like(hidden_states)
        weighted = (torch.cat(outputs) * weights).to(hidden_states.dtype)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        first, *others = weighted[back].view(-1, slots, weighted.shape[-1]).unbind(1)
        return base.finish(sum(others, start=first))

    def run_token(self, hidden_states, top_k_index, top_k_weights):
        """The same numbers for a single token, which needs no sorting: that is most of what decoding costs beside products."""
        chosen = sorted(zip(top_k_index[0].tolist(), top_k_weights[0].unbind()), key=lambda pair: pair[0])
        first, *others = ((self[e](hidden_states) * weight).to(hidden_states.dtype) for e, weight in chosen)
        return sum(others, start=first)

    def run_all(self, hidden_states, top_k_index, top_k_weights):
        """Every expert on all tokens, most with weight 0: a CUDA graph cannot ask how many tokens an expert gets."""
        weights = top_k_weights.new_zeros(len(hidden_states), self.num_experts).scatter(1, top_k_index, top_k_weights)
        base = BaseProducts(self.shared_base, hidden_states, weights)
        tokens = torch.arange(len(hidden_states), device=hidden_states.device)
        parts = ((self[e], weights[:, e, None]) for e in range(self.num_experts))
        weighted = (expert(hidden_states, base.of_expert(tokens, its)) * its for expert, its in parts)
        return base.finish(sum(output.to(hidden_states.dtype) for output in weighted))


# The experts of every layer, for the operator below: a graph holds strings and tensors, not modules.
REGISTERED = WeakValueDictionary()


def registered(experts, path):
    """A name for the experts of a layer. A second model in this process gets another."""
    base, number = path.partition("#")[0], 0
    while (key := f"{base}#{number}") in REGISTERED:
        number += 1
    REGISTERED[key] = experts
    return key


def autograd_inside_operator():
    """An operator's implementation runs below autograd. This puts autograd back, for gradients by recomputation."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for kind in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, kind))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


def experts_operator():
    """`LowRankExperts.run_chosen` as one operator, with gradients; None before torch 2.4. It takes the parameters only so that
    gradients reach them."""
    if not hasattr(library, "custom_op"):
        return None
    # Two versions of this file in one process (remote code and a package) have an operator each.
    name = f"lowrank_compress::{re.sub('[^0-9a-zA-Z]', '_', __name__)}"
    arguments = "Tensor hidden, Tensor index, Tensor weights, Tensor[] parameters, str key"

    def forward(hidden, index, weights, parameters, key):
        return REGISTERED[key].run_chosen(hidden, index, weights)

    def backward(grad, hidden, index, weights, parameters, key):
        experts = REGISTERED[key]
        hidden, weights = (tensor.detach().requires_grad_() for tensor in (hidden, weights))
        inputs = [hidden, weights, *experts.parameters()]
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        with autograd_inside_operator(), torch.enable_grad():
            grads = torch.autograd.grad(experts.run_chosen(hidden, index, weights), wanted, grad, allow_unused=True)
        grads = dict(zip(map(id, wanted), grads))
        return [torch.zeros_like(t) if grads.get(id(t)) is None else grads[id(t)].contiguous() for t in inputs]

    def keep(ctx, inputs, output):
        hidden, index, weights, parameters, ctx.key = inputs
        ctx.save_for_backward(hidden, index, weights, *parameters)

    def differentiate(ctx, grad):
        hidden, index, weights, *parameters = ctx.saved_tensors
        grads = gradient(grad, hidden, index, weights, parameters, ctx.key)
        return grads[0], None, grads[1], grads[2:], None

    operator = library.custom_op(name, forward, mutates_args=(), schema=f"({arguments}) -> Tensor")
    operator.register_fake(lambda hidden, index, weights, parameters, key: torch.empty_like(hidden))
    gradient = library.custom_op(
        f"{name}_backward", backward, mutates_args=(), schema=f"(Tensor grad, {arguments}) -> Tensor[]"
    )
    gradient.register_fake(
        lambda grad, hidden, index, weights, parameters, key: [
            torch.empty_like(tensor) for tensor in (hidden, weights, *parameters)
        ]
    )
    operator.register_autograd(differentiate, setup_context=keep)
    return operator


EXPERTS_OPERATOR = experts_operator()


@contextmanager
def narrow_experts(config, names):
    """While the native class builds itself, its dense experts are one row wide: they are replaced right after, and at
    full width would need the memory that factoring saves."""
    width, shared = getattr(config, names["width"]), getattr(config, "n_shared_experts", None)
    setattr(config, names["width"], 1)
    if shared:  # experts that are kept, each as wide as a routed one
        config.n_shared_experts = shared * width
    try:
        yield
    finally:
        setattr(config, names["width"], width)
        if shared:
            config.n_shared_experts = shared


def rename_child(module, name, new):
    """Gives a child another name in the module tree. As a plain attribute it keeps the old one, which its parent's forward uses:
    so each tensor has one name, the checkpoint's."""
    child = getattr(module, name)
    delattr(module, name)
    module.__dict__[name] = child
    setattr(module, new, child)


def factor_shared_expert(block, path, ranks, storage):
    """Replaces the matrices of the block's shared expert that have a rank, if it has one."""
    for child in SHARED_EXPERTS:
        expert = getattr(block, child, None)
        for name, linear in list(expert.named_children()) if isinstance(expert, nn.Module) else ():
            rank = ranks.get(f"{path}.{child}.{name}")
            if rank is not None:
                setattr(expert, name, make_linear(linear.in_features, linear.out_features, rank, storage))


def factor_experts(layers, config, names):
    """Replaces the experts of every layer that has some, and what has a rank of its shared expert; keeps the router."""
    ranks, moe = checked_ranks(config), names["moe"]
    for index, layer in enumerate(layers):
        block = getattr(layer, moe, None)
        if block is None:
            block = layer.mlp
            if hasattr(block, "experts"):
                rename_child(layer, "mlp", moe)  # v5 calls every block so
        if hasattr(block, "experts"):
            if isinstance(getattr(block, "router", None), nn.Module):
                rename_child(block, "router", "gate")  # v5 calls Phi-MoE's so
            factor_shared_expert(block, f"model.layers.{index}.{moe}", ranks, storage_of(config))
            path = f"model.layers.{index}.{moe}.experts"
            counts = ("num_local_experts", "num_experts", "n_routed_experts")
            num_experts = next(getattr(config, count) for count in counts if hasattr(config, count))
            block.experts = LowRankExperts(config, ranks, path, names, num_experts)


def require_score_scale(layers, config):
    """A ValueError if transformers leaves out what `mscale_all_dim` multiplies attention scores with: 4.57's DeepSeek-V2 does."""
    rotation = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not rotation.get("mscale_all_dim") or rotation.get("factor", 1.0) <= 1.0:
        return
    attention = layers[0].self_attn
    if attention.scaling == attention.qk_head_dim**-0.5:
        raise ValueError(
            f"transformers {transformers.__version__} leaves out `mscale_all_dim` of config.json, with which attention scores "
            "are multiplied, and would give other logits: install a newer one (5.23 has it)"
        )


def require_whole_blocks(decoder, config):
    """A ValueError if transformers would widen fp8 weights wrongly: where no device computes in fp8, 5.23 divides a matrix evenly among
    its scales, whatever the size of their blocks."""
    stated = getattr(config, "quantization_config", None)
    if not getattr(stated, "dequantize", False):
        return
    kept = tuple(name.removeprefix("model.") for name in stated.modules_to_not_convert or ())
    for name, module in decoder.named_modules():
        if type(module) is nn.Linear and not f"{name}.".startswith(tuple(f"{module}." for module in kept)):
            sides = tuple(module.weight.shape)
            if any(side > block and side % block for side, block in zip(sides, stated.weight_block_size)):
                raise ValueError(
                    f"transformers {transformers.__version__} would widen the fp8 weights of {name} wrongly: {sides} is not a whole "
                    f"number of blocks of {tuple(stated.weight_block_size)}. Load it on a GPU that computes in fp8, or compress the "
                    "original with `--fp8 widen`"
                )


def require_long_factors(rotary, config):
    """Makes the rotation of a long text raise a ValueError if transformers takes the factors of short ones: 5.23's Phi-MoE does."""
    rotation = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rotation.get("rope_type", rotation.get("type")) == "longrope":
        theta = rotation.get("rope_theta") or config.rope_theta
        rotary.register_forward_hook(partial(check_long_factors, rotation, theta), with_kwargs=True)


def check_long_factors(rotation, theta, rotary, args, kwargs, output):
    """A ValueError if the cos of the positions of a long text is not that of `long_factor`."""
    trained, factors = rotation["original_max_position_embeddings"], rotation["long_factor"]
    # transformers itself asks the host for the largest position, to choose between two amplitudes. 4.57, which has the right
    # factors, is given the length in place of positions.
    positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
    if factors == rotation["short_factor"] or positions is None or positions.max() < trained:
        return
    numbers = partial(torch.as_tensor, dtype=torch.float32, device=positions.device)
    pairs = numbers(range(len(factors)))
    angles = positions[..., None].float() / (numbers(factors) * theta ** (pairs / len(factors)))
    difference = output[0][..., : len(factors)].float() - rotation["long_mscale"] * angles.cos()
    if difference.abs().max() > 0.05 * rotation["long_mscale"]:
        raise ValueError(
            f"transformers {transformers.__version__} turns a text of more than {trained} tokens by `short_factor` of config.json in "
            "place of `long_factor`, and would give other logits: give it a shorter text, or install 4.57, which has it right"
        )


class LowRankModel:
    """What a factored model adds to the native class, which stands behind it in the list of bases.

    A subclass has `NAMES`: what transformers and the checkpoint call the parts of a layer.
    """

    def __init__(self, config):
        checked_ranks(config)
        with narrow_experts(config, self.NAMES):
            super().__init__(config)
        decoder = getattr(self, "model", self)
        layers = decoder.layers
        require_score_scale(layers, config)
        require_long_factors(decoder.rotary_emb, config)
        factor_experts(layers, config, self.NAMES)
        require_whole_blocks(decoder, config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        # By default accelerate leaves the buffers of a module that it offloads as they were before loading.
        kwargs.setdefault("offload_buffers", True)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        require_orders(model, info["missing_keys"])
        return (model, info) if output_loading_info else model


def require_orders(model, missing):
    """A ValueError if an index was not loaded; transformers only warns of `missing` tensors, and leaves them uninitialized.
    One that is offloaded (on meta) is read when its module runs."""
    lost = {name for name in missing if name.endswith(".order")}
    for name, module in model.named_modules():
        if isinstance(module, PivotedLinear) and not module.order.is_meta and (module.order == NOT_LOADED).any():
            lost.add(f"{name}.order")
    if lost:
        raise ValueError(f"{min(lost)} was not loaded: it is missing from the checkpoint, or the loader skipped it")
