"""The method in plain PyTorch, written as literally as it can be: the referee of nano-param-decomp.ts.

Nothing here is clever. The delta component is formed, every gradient comes from autograd (the lower-
leaky sigmoid has its hand-made one), AdamW and clipping are PyTorch's own, and no loss, step or metric
draws a random number: they are given. It runs in the dtype of the target's weights; the fixtures are
computed in float64.

Shapes: B rows, S positions each, N = B*S positions, M decomposed modules sorted by path, C components
of one. Tensors over positions are flat. "Wide" tensors hold all modules side by side: CI, masks and
draws [N, sumC], delta masks and routes [N, M], adversarial sources [N, sumC + M] (the last M columns
are the delta sources). Parameters are one flat dict: `components.<path>.V` [d_in, C], `.U` [C, d_out],
and `ci_fn.*` laid out as nn.Linear's.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

RMS_EPS = 1.1920929e-7  # float32 machine epsilon, whatever the dtype used here
ALIVE_MEAN_CI = 1e-6  # below this mean CI over the evaluation batch a component counts as dead


@dataclass(frozen=True)
class Config:
    """The paper's values. Field names are config.json's, in snake case."""

    n_steps: int = 400_000
    main_lr: float = 5e-5
    main_lr_final_frac: float = 0.1
    faithfulness_warmup_steps: int = 400
    faithfulness_warmup_lr: float = 1e-3
    coeff_faith: float = 1e7
    coeff_imp: float = 2e-4
    coeff_stoch: float = 0.5
    coeff_ppgd: float = 0.5
    p_start: float = 2.0
    p_end: float = 0.4
    imp_eps: float = 1e-12
    imp_beta: float = 0.5
    leaky_alpha: float = 0.01
    ci_d_model: int = 2048
    ci_n_blocks: int = 8
    ci_n_heads: int = 16
    ci_mlp_hidden: int = 8192
    ci_rope_base: float = 10000.0
    ppgd_lr: float = 0.01
    ppgd_lr_final_frac: float = 1.0
    ppgd_warmup_pct: float = 0.025
    ppgd_beta1: float = 0.5
    ppgd_beta2: float = 0.99
    ppgd_eps: float = 1e-8
    ppgd_inner_steps: int = 2
    grad_clip_components: float = 0.01
    grad_clip_ci: float = 0.0  # 0 = off
    micro_batches: int = 1  # R of the importance loss
    ci_alive_threshold: float = 0.0
    rounding_threshold: float = 0.0
    pgd_eval_step_size: float = 0.1
    pgd_eval_n_steps: int = 20

    @staticmethod
    def from_json(record: dict) -> "Config":
        """From config.json's camelCase record; fields that the mathematics does not need are left out."""
        snake = {re.sub("([A-Z])", lambda c: "_" + c[1].lower(), key): value for key, value in record.items()}
        return Config(**{f.name: snake[f.name] for f in fields(Config) if f.name in snake})


@dataclass(frozen=True)
class Module:
    path: str
    d_in: int
    d_out: int
    C: int
    offset: int  # its first column in the wide tensors

    @property
    def columns(self) -> slice:
        return slice(self.offset, self.offset + self.C)


def make_modules(target: "Target", components: dict[str, int]) -> list[Module]:
    """The decomposed modules, sorted by path, from {path: C}."""
    modules, offset = [], 0
    for path in sorted(components):
        d_out, d_in = target.weights[path + ".weight"].shape
        modules.append(Module(path, d_in, d_out, components[path], offset))
        offset += components[path]
    return modules


Params = dict[str, Tensor]


# ---- Target model ----

Linear = Callable[[str, Tensor], Tensor]  # (module path, x [N, d_in]) -> y [N, d_out]


@dataclass(frozen=True)
class Names:
    embed: str
    block: str
    attn_norm: str
    attn: str
    mlp_norm: str
    norm: str


NAMES = {
    "llama": Names(
        "model.embed_tokens",
        "model.layers.{}",
        "input_layernorm",
        "self_attn",
        "post_attention_layernorm",
        "model.norm",
    ),
    "llama_simple_mlp": Names("wte", "h.{}", "rms_1", "attn", "rms_2", "ln_f"),
}


@dataclass(frozen=True)
class Target:
    type: str
    n_layers: int
    n_heads: int
    rms_eps: float
    rope_base: float
    weights: dict[str, Tensor]


def load_target(folder: str, dtype: torch.dtype = torch.float32) -> Target:
    """A Hugging Face folder (config.json, model.safetensors). Sizes are the weights' own shapes."""
    config = json.loads((Path(folder) / "config.json").read_text())
    type_ = config["model_type"]
    if type_ not in NAMES:
        raise ValueError(f"model_type {type_!r} is not one of {', '.join(NAMES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rotary embedding of type {rope} is not supported")

    def field(*names, default=None):
        return next((config[name] for name in names if config.get(name) is not None), default)

    weights = {name: w.to(dtype) for name, w in load_file(Path(folder) / "model.safetensors").items()}
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights[NAMES[type_].embed + ".weight"]
    return Target(
        type=type_,
        n_layers=field("num_hidden_layers", "n_layer"),
        n_heads=field("num_attention_heads", "n_head"),
        rms_eps=field("rms_norm_eps", default=1e-6),
        rope_base=field("rope_theta", "rotary_base", default=rope.get("rope_theta", 10000.0)),
        weights=weights,
    )


def target_linear(target: Target) -> Linear:
    """The target's own layer, y = x Wᵀ + b."""
    return lambda path, x: F.linear(x, target.weights[path + ".weight"], target.weights.get(path + ".bias"))


def rotate(x: Tensor, base: float) -> Tensor:
    """Half-split rotary embedding over the whole head. x [B, H, S, head_dim]."""
    S, half = x.shape[2], x.shape[3] // 2
    freq = base ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = torch.outer(torch.arange(S, dtype=x.dtype, device=x.device), freq)
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, B: int, n_heads: int, rope_base: float, causal: bool
) -> Tensor:
    """q [N, n_heads*head_dim]; k, v may have fewer heads, each serving consecutive query heads. -> as q."""
    head_dim = q.shape[1] // n_heads
    q, k, v = (t.view(B, -1, t.shape[1] // head_dim, head_dim).transpose(1, 2) for t in (q, k, v))
    q, k = rotate(q, rope_base), rotate(k, rope_base)
    k, v = (t.repeat_interleave(n_heads // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(head_dim)  # [B, H, S, S]
    if causal:
        future = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, n_heads * head_dim)


def target_forward(target: Target, tokens: Tensor, linear: Linear | None = None) -> Tensor:
    """tokens [B, S] -> logits [N, vocab]; every linear layer of the blocks goes through `linear`."""
    linear = linear or target_linear(target)
    w, names = target.weights, NAMES[target.type]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w[name + ".weight"], target.rms_eps)

    x = w[names.embed + ".weight"][tokens.flatten()]
    for layer in range(target.n_layers):
        block = names.block.format(layer)
        attn, mlp = f"{block}.{names.attn}", f"{block}.mlp"
        h = norm(f"{block}.{names.attn_norm}", x)
        q, k, v = (linear(f"{attn}.{name}_proj", h) for name in "qkv")
        h = attention(q, k, v, tokens.shape[0], target.n_heads, target.rope_base, causal=True)
        x = x + linear(f"{attn}.o_proj", h)
        h = norm(f"{block}.{names.mlp_norm}", x)
        if target.type == "llama":
            h = F.silu(linear(f"{mlp}.gate_proj", h)) * linear(f"{mlp}.up_proj", h)
        else:
            h = F.gelu(linear(f"{mlp}.c_fc", h), approximate="tanh")
        x = x + linear(f"{mlp}.down_proj", h)
    return norm(names.norm, x) @ w["lm_head.weight"].T


def recording(linear: Linear, inputs: dict | None = None, outputs: dict | None = None) -> Linear:
    """`linear`, noting every module's input and output."""

    def recorded(path: str, x: Tensor) -> Tensor:
        y = linear(path, x)
        if inputs is not None:
            inputs[path] = x
        if outputs is not None:
            outputs[path] = y
        return y

    return recorded


# ---- Components (method section 1) ----


@dataclass(frozen=True)
class Decomposition:
    """What stays fixed during a run."""

    target: Target
    modules: list[Module]
    cfg: Config


@dataclass(frozen=True)
class Masks:
    components: Tensor  # m [N, sumC]
    deltas: Tensor  # δ [N, M]
    routes: Tensor | None = None  # r [N, M] of bool; None = every module through its components


def weight_delta(d: Decomposition, params: Params, path: str) -> Tensor:
    """Δ = W − (V U)ᵀ [d_out, d_in]."""
    V, U = params[f"components.{path}.V"], params[f"components.{path}.U"]
    return d.target.weights[path + ".weight"] - (V @ U).T


def masked_linear(d: Decomposition, params: Params, masks: Masks) -> Linear:
    """y = ((x V) ⊙ m) U + δ ⊙ (x Δᵀ) + b where routed, the target's own x Wᵀ + b elsewhere."""
    own = target_linear(d.target)
    index = {module.path: j for j, module in enumerate(d.modules)}

    def linear(path: str, x: Tensor) -> Tensor:
        if path not in index:
            return own(path, x)
        j = index[path]
        V, U = params[f"components.{path}.V"], params[f"components.{path}.U"]
        m, delta = masks.components[:, d.modules[j].columns], masks.deltas[:, j : j + 1]
        y = ((x @ V) * m) @ U + delta * (x @ weight_delta(d, params, path).T)
        bias = d.target.weights.get(path + ".bias")
        if bias is not None:
            y = y + bias
        return y if masks.routes is None else torch.where(masks.routes[:, j : j + 1], y, own(path, x))

    return linear


def masked_forward(d: Decomposition, params: Params, tokens: Tensor, masks: Masks) -> Tensor:
    return target_forward(d.target, tokens, masked_linear(d, params, masks))


def init_params(d: Decomposition, generator: torch.Generator) -> Params:
    """V ~ N(0, 1/d_in), U ~ N(0, 1/C); the CI function as nn.Linear: uniform ±1/sqrt(fan_in), bias too."""
    params = {}
    for module in d.modules:
        V = torch.randn(module.d_in, module.C, generator=generator) / math.sqrt(module.d_in)
        U = torch.randn(module.C, module.d_out, generator=generator) / math.sqrt(module.C)
        params[f"components.{module.path}.V"], params[f"components.{module.path}.U"] = V, U

    def init_linear(name: str, d_out: int, d_in: int, bias: bool = True):
        bound = 1 / math.sqrt(d_in)
        params[f"ci_fn.{name}.weight"] = (torch.rand(d_out, d_in, generator=generator) * 2 - 1) * bound
        if bias:
            params[f"ci_fn.{name}.bias"] = (torch.rand(d_out, generator=generator) * 2 - 1) * bound

    width, hidden = d.cfg.ci_d_model, d.cfg.ci_mlp_hidden
    init_linear("proj_in", width, sum(module.d_in for module in d.modules))
    for i in range(d.cfg.ci_n_blocks):
        for name in "qkvo":
            init_linear(f"blocks.{i}.attn.{name}_proj", width, width, bias=False)
        init_linear(f"blocks.{i}.mlp.0", hidden, width)
        init_linear(f"blocks.{i}.mlp.2", width, hidden)
    init_linear("proj_out", sum(module.C for module in d.modules), width)
    return params


def component_names(params: Params) -> list[str]:
    return [name for name in params if name.startswith("components.")]


def ci_names(params: Params) -> list[str]:
    return [name for name in params if name.startswith("ci_fn.")]


# ---- Causal importance (method section 2) ----


class LowerLeaky(torch.autograd.Function):
    """clamp(z, 0, 1). Gradient: the upstream u where 0 < z <= 1, α·min(u, 0) where z <= 0, 0 where z > 1."""

    @staticmethod
    def forward(ctx, z: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.alpha = alpha
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (z,) = ctx.saved_tensors
        inside = torch.where(z <= 1, upstream, torch.zeros_like(upstream))
        return torch.where(z <= 0, ctx.alpha * upstream.clamp(max=0), inside), None


def lower_leaky(z: Tensor, alpha: float) -> Tensor:
    return LowerLeaky.apply(z, alpha)


def upper_leaky(z: Tensor, alpha: float) -> Tensor:
    # The slope of clamp at its bounds is 1, as it was in PyTorch until 2.15 made it 0.
    clamped = torch.where((z >= 0) & (z <= 1), z, z.detach().clamp(0, 1))
    return torch.where(z > 1, 1 + alpha * (z - 1), clamped)


def ci_logits(d: Decomposition, params: Params, inputs: dict[str, Tensor], B: int) -> Tensor:
    """z [N, sumC] from every module's pre-weight activation in the target forward, {path: [N, d_in]}."""
    cfg = d.cfg

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, params[f"ci_fn.{name}.weight"], params.get(f"ci_fn.{name}.bias"))

    def rms(x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=RMS_EPS)

    x = linear("proj_in", torch.cat([rms(inputs[module.path].detach()) for module in d.modules], dim=1))
    for i in range(cfg.ci_n_blocks):
        h = rms(x)
        q, k, v = (linear(f"blocks.{i}.attn.{name}_proj", h) for name in "qkv")
        h = attention(q, k, v, B, cfg.ci_n_heads, cfg.ci_rope_base, causal=False)
        x = x + linear(f"blocks.{i}.attn.o_proj", h)
        x = x + linear(f"blocks.{i}.mlp.2", F.gelu(linear(f"blocks.{i}.mlp.0", rms(x))))
    return linear("proj_out", x)


@dataclass(frozen=True)
class Context:
    """What the target and the CI function say about one batch."""

    tokens: Tensor  # [B, S]
    logits: Tensor  # the target's, [N, vocab]
    inputs: dict[str, Tensor]  # of every linear layer in the target forward, {path: [N, d_in]}
    outputs: dict[str, Tensor]
    z: Tensor  # [N, sumC]
    g: Tensor  # lower-leaky
    g_upper: Tensor


def make_context(d: Decomposition, params: Params, tokens: Tensor) -> Context:
    inputs, outputs = {}, {}
    with torch.no_grad():
        logits = target_forward(d.target, tokens, recording(target_linear(d.target), inputs, outputs))
    z = ci_logits(d, params, inputs, tokens.shape[0])
    g, g_upper = lower_leaky(z, d.cfg.leaky_alpha), upper_leaky(z, d.cfg.leaky_alpha)
    return Context(tokens, logits, inputs, outputs, z, g, g_upper)


# ---- Losses (method section 3) ----


def faithfulness_loss(d: Decomposition, params: Params) -> Tensor:
    """Σ ‖Δ‖² / Σ numel(Δ)."""
    deltas = [weight_delta(d, params, module.path) for module in d.modules]
    return sum(delta.square().sum() for delta in deltas) / sum(delta.numel() for delta in deltas)


def importance_minimality_loss(g_upper: Tensor, p: float, cfg: Config, R: int) -> Tensor:
    """Σ_c [ μ_c + β μ_c log2(1 + R σ_c) ] over the components of all modules; g_upper [N, sumC]."""
    sigma = (g_upper + cfg.imp_eps).pow(p).sum(0)
    mu = sigma / g_upper.shape[0]
    return (mu + cfg.imp_beta * mu * torch.log2(1 + R * sigma)).sum()


def kl_loss(target_logits: Tensor, pred_logits: Tensor) -> Tensor:
    """Mean over positions of KL(softmax(target) ‖ softmax(pred))."""
    log_target, log_pred = target_logits.log_softmax(-1), pred_logits.log_softmax(-1)
    return (log_target.exp() * (log_target - log_pred)).sum(-1).mean()


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of tokens[:, 1:] given what precedes them, over B(S−1) predictions."""
    predicting = logits.view(*tokens.shape, -1)[:, :-1]
    return F.cross_entropy(predicting.flatten(0, 1), tokens[:, 1:].flatten())


def masked_kl(d: Decomposition, params: Params, context: Context, masks: Masks) -> Tensor:
    return kl_loss(context.logits, masked_forward(d, params, context.tokens, masks))


@dataclass(frozen=True)
class Draws:
    """Uniform [0, 1) numbers of one stochastic masked forward."""

    u: Tensor  # [N, sumC]
    u_delta: Tensor  # [N, M]
    u_route: Tensor | None = None  # [N, M]
    u_k: Tensor | None = None  # [N, 1]

    def rows(self, rows: slice) -> "Draws":
        return Draws(*(None if t is None else t[rows] for t in vars(self).values()))


def stochastic_masks(g: Tensor, draws: Draws) -> Masks:
    """m = g + (1−g)u, δ = u_δ. With route draws: at each position k = 1 + floor(M u_k) modules are routed
    through their components, those with the k largest u_route."""
    routes = None
    if draws.u_route is not None:
        k = 1 + (len(draws.u_route[0]) * draws.u_k).floor()
        rank = draws.u_route.argsort(dim=1, descending=True).argsort(dim=1)  # 0 = largest
        routes = rank < k
    return Masks(g + (1 - g) * draws.u, draws.u_delta, routes)


# ---- Persistent PGD (method section 4) ----


def source_masks(g: Tensor, s: Tensor) -> Masks:
    """m = g + (1−g)s, δ = s_Δ. s is [N, sumC + M], or [1, sumC + M] when shared by all positions."""
    sumC = g.shape[1]
    return Masks(g + (1 - g) * s[:, :sumC], s[:, sumC:].expand(g.shape[0], -1))


@dataclass(frozen=True)
class Sources:
    s: Tensor  # [N, sumC + M] in [0, 1]
    m: Tensor  # Adam's moments
    v: Tensor
    t: int  # steps taken

    def rows(self, rows: slice) -> "Sources":
        return Sources(self.s[rows], self.m[rows], self.v[rows], self.t)


def ascend(sources: Sources, grad: Tensor, lr: float, cfg: Config) -> Sources:
    """One bias-corrected Adam step up the gradient, clamped to [0, 1]."""
    t = sources.t + 1
    m = cfg.ppgd_beta1 * sources.m + (1 - cfg.ppgd_beta1) * grad
    v = cfg.ppgd_beta2 * sources.v + (1 - cfg.ppgd_beta2) * grad.square()
    m_hat, v_hat = m / (1 - cfg.ppgd_beta1**t), v / (1 - cfg.ppgd_beta2**t)
    return Sources((sources.s + lr * m_hat / (v_hat.sqrt() + cfg.ppgd_eps)).clamp(0, 1), m, v, t)


# ---- Optimisation (method section 5) ----


def cosine_schedule(
    step: int, n_steps: int, start: float, final_frac: float, warmup_pct: float = 0.0
) -> float:
    """Linear from 0 over the first int(warmup_pct·n_steps) steps, then a half cosine to start·final_frac,
    which is reached at the last step."""
    warmup = int(warmup_pct * n_steps)
    if step < warmup:
        return start * step / warmup
    progress = (step - warmup) / max(n_steps - warmup - 1, 1)
    return start * (final_frac + (1 - final_frac) * 0.5 * (1 + math.cos(math.pi * progress)))


def main_lr(step: int, cfg: Config) -> float:
    return cosine_schedule(step, cfg.n_steps, cfg.main_lr, cfg.main_lr_final_frac)


def ppgd_lr(step: int, cfg: Config) -> float:
    return cosine_schedule(step, cfg.n_steps, cfg.ppgd_lr, cfg.ppgd_lr_final_frac, cfg.ppgd_warmup_pct)


def importance_p(step: int, cfg: Config) -> float:
    return cfg.p_start + (cfg.p_end - cfg.p_start) * step / max(cfg.n_steps - 1, 1)


def adamw(
    params: Params, grads: Params, m: Params, v: Params, t: int, lr: float
) -> tuple[Params, Params, Params]:
    """Step t + 1 of PyTorch's AdamW with weight decay 0, from given moments. -> new (params, m, v)."""
    new = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    optimiser = torch.optim.AdamW(new.values(), lr=lr, weight_decay=0.0)
    for name, p in new.items():
        p.grad = grads[name]
        moments = {"exp_avg": m[name].clone(), "exp_avg_sq": v[name].clone()}
        optimiser.state[p] = {"step": torch.tensor(float(t)), **moments}
    optimiser.step()
    m, v = ({name: optimiser.state[p][key] for name, p in new.items()} for key in ("exp_avg", "exp_avg_sq"))
    return {name: p.detach() for name, p in new.items()}, m, v


def faithfulness_warmup(d: Decomposition, params: Params) -> tuple[Params, list[float]]:
    """AdamW on V and U alone, its moments starting at zero. -> (all params, the loss before each step)."""
    learned = {name: params[name] for name in component_names(params)}
    m = v = {name: torch.zeros_like(p) for name, p in learned.items()}
    losses = []
    for t in range(d.cfg.faithfulness_warmup_steps):
        learned = {name: p.requires_grad_() for name, p in learned.items()}
        loss = faithfulness_loss(d, learned)
        grads = dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))
        learned, m, v = adamw(learned, grads, m, v, t, d.cfg.faithfulness_warmup_lr)
        losses.append(loss.item())
    return {**params, **learned}, losses


@dataclass(frozen=True)
class State:
    params: Params
    m: Params  # AdamW's moments
    v: Params
    t: int  # AdamW steps taken
    sources: Sources


@dataclass(frozen=True)
class StepResult:
    state: State
    losses: dict[str, float]  # faith, imp, stoch, ppgd, total
    grads: Params  # of the total, before clipping
    source_grad: Tensor  # of the adversarial loss, for the ascent after the main update
    clip_norm: float  # of the gradients of all V and U together, before clipping


def train_step(
    d: Decomposition, state: State, tokens: Tensor, draws: Draws, lr: float, lr_ppgd: float, p: float
) -> StepResult:
    """One whole step. With R = micro_batches the batch is cut into R equal runs of consecutive rows; each has
    its own losses, as on R separate machines, and losses and gradients are averaged. A source lives in one
    shard and ascends that shard's own loss, not its share of the average."""
    cfg, R, (B, S) = d.cfg, d.cfg.micro_batches, tokens.shape
    params = {name: q.detach().clone().requires_grad_() for name, q in state.params.items()}
    losses = {"faith": 0.0, "imp": 0.0, "stoch": 0.0, "ppgd": 0.0, "total": 0.0}
    shards, source_grads = [], []
    for first in range(0, B, B // R):
        rows = slice(first * S, (first + B // R) * S)
        context = make_context(d, params, tokens[first : first + B // R])

        sources = state.sources.rows(rows)
        for _ in range(cfg.ppgd_inner_steps):
            s = sources.s.detach().requires_grad_()
            loss = masked_kl(d, params, context, source_masks(context.g.detach(), s))
            sources = ascend(sources, torch.autograd.grad(loss, s)[0], lr_ppgd, cfg)
        shards.append(sources)

        s = sources.s.detach().requires_grad_()
        loss = {
            "faith": faithfulness_loss(d, params),
            "imp": importance_minimality_loss(context.g_upper, p, cfg, R),
            "stoch": masked_kl(d, params, context, stochastic_masks(context.g, draws.rows(rows))),
            "ppgd": masked_kl(d, params, context, source_masks(context.g, s)),
        }
        loss["total"] = sum(getattr(cfg, "coeff_" + name) * value for name, value in loss.items())
        # A backward of its own, for clarity: the total's source gradient / coeff_ppgd is the same.
        source_grads.append(torch.autograd.grad(loss["ppgd"], s, retain_graph=True)[0])
        (loss["total"] / R).backward()
        losses = {name: value + loss[name].item() / R for name, value in losses.items()}

    grads = {name: q.grad.clone() for name, q in params.items()}
    components = [params[name] for name in component_names(params)]
    clip_norm = torch.nn.utils.clip_grad_norm_(components, cfg.grad_clip_components).item()
    if cfg.grad_clip_ci > 0:
        torch.nn.utils.clip_grad_norm_([params[name] for name in ci_names(params)], cfg.grad_clip_ci)
    clipped = {name: q.grad for name, q in params.items()}
    new_params, m, v = adamw(params, clipped, state.m, state.v, state.t, lr)

    source_grad = torch.cat(source_grads)
    s, s_m, s_v = (torch.cat([getattr(shard, name) for shard in shards]) for name in ("s", "m", "v"))
    sources = ascend(Sources(s, s_m, s_v, shards[0].t), source_grad, lr_ppgd, cfg)
    return StepResult(State(new_params, m, v, state.t + 1, sources), losses, grads, source_grad, clip_norm)


# ---- Evaluation (method section 6) ----


@dataclass(frozen=True)
class EvalDraws:
    """The uniform draws of the random metrics."""

    stochastic: Draws  # of ce_kl/*_stoch_masked, no routes
    random: Tensor  # the masks of ce_kl/*_random_masked, [N, sumC]
    subset: Draws  # of StochasticReconSubsetLoss, with routes
    hidden: Draws  # of StochasticHiddenActsReconLoss, no routes
    pgd: Tensor  # [1, sumC + M], the fresh sources before their first step


def fresh_pgd(d: Decomposition, params: Params, context: Context, start: Tensor) -> tuple[Tensor, Tensor]:
    """Sign ascent of one source shared by all positions. -> (KL after the last step, sources)."""
    s, g = start, context.g.detach()
    for _ in range(d.cfg.pgd_eval_n_steps):
        s = s.detach().requires_grad_()
        (grad,) = torch.autograd.grad(masked_kl(d, params, context, source_masks(g, s)), s)
        s = (s + d.cfg.pgd_eval_step_size * grad.sign()).clamp(0, 1)
    return masked_kl(d, params, context, source_masks(g, s)), s.detach()


def hidden_acts_mse(
    d: Decomposition, params: Params, context: Context, masks: Masks, name: str
) -> dict[str, float]:
    """Per module, the mean square of (its output in the wholly masked forward − its output in the target
    forward), bias included: errors of earlier modules count in later ones. total: the mean over all outputs.
    """
    outputs = {}
    target_forward(d.target, context.tokens, recording(masked_linear(d, params, masks), outputs=outputs))
    square = {m.path: (outputs[m.path] - context.outputs[m.path]).square() for m in d.modules}
    metrics = {path: error.mean() for path, error in square.items()}
    metrics["total"] = torch.cat([error.flatten() for error in square.values()]).mean()
    return {f"eval/loss/{name}/{path}": value.item() for path, value in metrics.items()}


def evaluate(
    d: Decomposition, params: Params, tokens: Tensor, p: float, draws: EvalDraws | None = None
) -> dict[str, float]:
    """Every metric under its name on the original's dashboards; those with random numbers only if draws are
    given. The batch is not split: R = 1 in the importance loss."""
    cfg, metrics = d.cfg, {}
    params = {name: q.detach() for name, q in params.items()}
    context = make_context(d, params, tokens)
    g = context.g
    no_deltas = g.new_zeros(g.shape[0], len(d.modules))

    l0 = {
        m.path: (g[:, m.columns] > cfg.ci_alive_threshold).sum(1).to(g.dtype).mean().item() for m in d.modules
    }
    l0["total"] = sum(l0.values())
    metrics.update({f"eval/l0/{float(cfg.ci_alive_threshold)}_{name}": value for name, value in l0.items()})

    strategies = {
        "ci_masked": Masks(g, no_deltas),
        "unmasked": Masks(torch.ones_like(g), no_deltas),
        "rounded_masked": Masks((g > cfg.rounding_threshold).to(g.dtype), no_deltas),
        "zero_masked": Masks(torch.zeros_like(g), no_deltas),
    }
    if draws:
        strategies["stoch_masked"] = stochastic_masks(g, draws.stochastic)
        strategies["random_masked"] = Masks(draws.random, no_deltas)
    ce = {}
    for name, masks in strategies.items():
        pred = masked_forward(d, params, tokens, masks)
        metrics[f"eval/ce_kl/kl_{name}"] = kl_loss(context.logits, pred).item()
        ce[name] = next_token_loss(pred, tokens).item()
    ce_target = next_token_loss(context.logits, tokens).item()
    metrics["eval/ce_kl/ce_target"] = ce_target
    for name in strategies:
        difference = ce[name] - ce_target
        metrics[f"eval/ce_kl/ce_difference_{name}"] = difference
        metrics[f"eval/ce_kl/ce_unrecovered_{name}"] = difference / (ce["zero_masked"] - ce_target)
    alive = (g.mean(0) >= ALIVE_MEAN_CI).to(g.dtype).expand_as(g)
    metrics["eval/ce_kl/kl_alive"] = masked_kl(d, params, context, Masks(alive, no_deltas)).item()

    metrics["eval/loss/FaithfulnessLoss"] = faithfulness_loss(d, params).item()
    imp = importance_minimality_loss(context.g_upper, p, cfg, R=1)
    metrics["eval/loss/ImportanceMinimalityLoss"] = imp.item()
    metrics.update(hidden_acts_mse(d, params, context, strategies["ci_masked"], "CIHiddenActsReconLoss"))
    if draws:
        subset = stochastic_masks(g, draws.subset)
        metrics["eval/loss/StochasticReconSubsetLoss"] = masked_kl(d, params, context, subset).item()
        metrics["eval/loss/PGDReconLoss"] = fresh_pgd(d, params, context, draws.pgd)[0].item()
        hidden = stochastic_masks(g, draws.hidden)
        metrics.update(hidden_acts_mse(d, params, context, hidden, "StochasticHiddenActsReconLoss"))
    return metrics


L0_THRESHOLDS = {"0.0": 0.0, "0.01": 0.01, "0.1": 0.1}
BINS = {"0-0.01": (0.0, 0.01), "0.01-0.1": (0.01, 0.1), "0.1-0.5": (0.1, 0.5), "0.5-0.9": (0.5, 0.9)}


def measures(d: Decomposition, params: Params, tokens: Tensor, start: Tensor) -> dict[str, float]:
    """The measures of postprocess/measures.ts on one batch, which also decides who is alive. Every rung of
    the adversary's ladder starts anew."""
    params = {name: q.detach() for name, q in params.items()}
    context = make_context(d, params, tokens)
    g, z = context.g, context.z
    metrics = {}
    for factor in (0, 1, 2, 4):
        steps = factor * d.cfg.pgd_eval_n_steps
        longer = replace(d, cfg=replace(d.cfg, pgd_eval_n_steps=steps))
        metrics[f"eval/pgd/{steps}"] = fresh_pgd(longer, params, context, start)[0].item()
    for m in d.modules:
        ratio = weight_delta(d, params, m.path).square().sum() / d.target.weights[f"{m.path}.weight"].square().sum()
        metrics[f"eval/loss/RelativeFaithfulnessLoss/{m.path}"] = ratio.item()
    for name, columns in [(m.path, m.columns) for m in d.modules] + [("total", slice(None))]:
        own = g[:, columns]

        def count(which: Tensor) -> float:
            return which.sum(1).to(g.dtype).mean().item()

        for label, threshold in L0_THRESHOLDS.items():
            metrics[f"eval/l0/{label}_{name}"] = count(own > threshold)
        metrics[f"eval/g_bins/0_{name}"] = count(own == 0)
        for label, (low, high) in BINS.items():
            metrics[f"eval/g_bins/{label}_{name}"] = count((own > low) & (own <= high))
        metrics[f"eval/g_bins/0.9-1_{name}"] = count((own > 0.9) & (own < 1))
        metrics[f"eval/g_bins/1_{name}"] = count(own == 1)
        metrics[f"eval/z/min/{name}"] = z[:, columns].min().item()
        metrics[f"eval/z/max/{name}"] = z[:, columns].max().item()
    no_deltas = g.new_zeros(g.shape[0], len(d.modules))
    for name, alive in (("mean_ci", g.mean(0) >= ALIVE_MEAN_CI), ("ever", (g > 0).any(0))):
        masks = Masks(alive.to(g.dtype).expand_as(g), no_deltas)
        metrics[f"eval/alive/n_{name}"] = alive.sum().item()
        metrics[f"eval/ce_kl/kl_alive_{name}"] = masked_kl(d, params, context, masks).item()
    return metrics
