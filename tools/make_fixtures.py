"""Writes tools/fixtures/method/: what PyTorch (tools/reference.py, in float64) says about two tiny targets.

    python tools/make_fixtures.py           check, then write the files
    python tools/make_fixtures.py --check   check only

The checks: the reference against finite differences, against the delta-free form of the masked forward
and against PyTorch's Adam; no CI logit near a kink; and, printed, how far the same computation in
float32 is off.

simple_mlp/ (`llama_simple_mlp`: 2 layers, tied, every linear layer decomposed) and llama/ (`llama`: 2
layers, untied, 4 heads on 2 key-value heads, biases everywhere, half of the linear layers decomposed)
are Hugging Face folders (config.json, model.safetensors) with two files more. Neighbouring modules
differ in C. B = 3, S = 7, N = 21 positions, row-major (position n is row n // S, place n % S). Wide
tensors hold the modules side by side, sorted by path: masks, CI and draws [N, sumC]; delta masks and
routes [N, M]; sources [N, sumC + M], the last M columns for the deltas. To keep the files small, what
is marked * is in simple_mlp/ only.

fixture.json
  config              camelCase; everything below was computed with it, except where said
  modules             {path: {dIn, dOut, C}} in order
  tokens, tokens2     [3][7]; tokens2 is for step2, tokens for everything else
  p, lr, lrPpgd       importance exponent and the two learning rates of the steps
  t, sourcesT         AdamW steps and source steps taken before step1
  losses              at the stored state, without coefficients: faith, imp (R = 1), imp3 (R = 3, the
                      whole batch), stoch, ppgd
  step1, step2*, accum*  {faith, imp, stoch, ppgd, total, clipNorm}, coeffImp 0: the losses inside that step (ppgd
                        after its inner source steps), and the norm of the gradients of all V and U
                        together before clipping
  warmup              the faithfulness before each of 3 warm-up steps (AdamW on V, U from zero moments,
                      lr faithfulnessWarmupLr)
  schedules           [{nSteps, step, mainLr, ppgdLr, p}] under the paper's defaults
  eval                {metric name: value} on `tokens` at the stored parameters, with p, R = 1
  measures            the same of the measures of postprocess/measures.ts; the adversary starts at eval/pgd_start

fixture.safetensors, all float32
  components.<path>.V, .U, ci_fn.*  [dIn, C], [C, dOut]: the parameters, named as in
                                    components.safetensors
  target/logits       [N, vocab] of the target's own forward; target/input/<path> [N, dIn], the input of
                      each module
  masked/             m, delta, route: given masks (route is 0 or 1); logits, logits_unrouted [N,
                      vocab]: under them, with and without the routes
  ci/                 z, g, g_upper [N, sumC]
  sigmoid/            z, upstream [K]: hand-picked points, each with an upstream gradient; lower,
                      lower_grad, upper, upper_grad: value and gradient of both sigmoids there
  draws/              u [N, sumC], u_delta [N, M], u_route [N, M], u_k [N, 1]: the uniform numbers of
                      the stochastic loss and of step1. m = g + (1-g)u, delta = u_delta, k = 1 + floor(M
                      u_k), routed are the k largest u_route of a row. route [N, M]: the routes that
                      follow, 0 or 1
  draws2/             the same of step2
  sources/            s, m, v [N, sumC + M]: sources (some exactly 0 or 1) and their moments before
                      step1
  moments/            m/<parameter>; v/<parameter> [1]: AdamW's before step1; v is the same for all
                      elements
  grad/<loss>/        <parameter>: gradient of that loss alone, coefficient 1, at the stored parameters,
                      draws and sources (no inner steps). faith has V and U; imp ci_fn; stoch and ppgd
                      all, and ppgd sources [N, sumC + M]. They do not add up to the total's ci_fn
                      gradient, because the lower-leaky sigmoid's depends on the sign of the summed
                      upstream gradient
  step1/              grad/<parameter>: of the total, before clipping. source_grad: of ppgd, after the
                      inner steps. After the whole step (2 inner ascents of the sources, the update, the
                      third ascent): params/<parameter>, m/<parameter>*, v/<parameter>*, sources/s,
                      sources/m, sources/v
  step2/*             params/<parameter>, sources/s: after one more step with tokens2, draws2, the same
                      p and rates
  accum/*             step1 once more, with microBatches = 3 (a row each): grad/<parameter>, averaged,
                      before clipping; sources/s after the step
  warmup/             components.<path>.V, .U after the 3 warm-up steps
  eval/               pgd_start, pgd_end [1, sumC + M]: PGDReconLoss's shared source before and after
                      its steps

The other random metrics take their draws from above: *_stoch_masked from draws/u and u_delta,
*_random_masked its masks from masked/m, StochasticHiddenActsReconLoss draws2/u and u_delta,
StochasticReconSubsetLoss draws2 with its routes.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import reference as ref
import safetensors.torch
import torch
from reference import Config, Decomposition, Draws, EvalDraws, Masks, Params, Sources, State
from torch import Tensor

FOLDER = Path(__file__).parent / "fixtures" / "method"
VOCAB, WIDTH, B, S = 23, 16, 3, 7
N = B * S

# Every loss counts in the total, thresholds differ, and a step moves the parameters visibly.
CONFIG = Config(
    n_steps=100,
    faithfulness_warmup_steps=3,
    faithfulness_warmup_lr=0.01,
    coeff_faith=0.3,
    coeff_imp=0.02,
    coeff_stoch=0.5,
    coeff_ppgd=0.7,
    imp_beta=0.6,
    leaky_alpha=0.02,
    ci_d_model=8,
    ci_n_blocks=2,
    ci_n_heads=2,
    ci_mlp_hidden=12,
    rounding_threshold=0.3,
)
P, LR, LR_PPGD, T, SOURCES_T = 0.9, 0.02, 0.05, 11, 7


class Random:
    """Seeded float32 numbers: what the files hold is exactly what the computation in float64 starts from."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)

    def tokens(self) -> Tensor:
        return torch.randint(VOCAB, (B, S), generator=self.generator)

    def draws(self, sumC: int, M: int, routes: bool) -> Draws:
        given = (self.uniform(N, M), self.uniform(N, 1)) if routes else (None, None)
        return Draws(self.uniform(N, sumC), self.uniform(N, M), *given)


# ---- The targets ----


def simple_mlp_target(random: Random) -> tuple[dict, Params]:
    weights = {"wte.weight": 0.5 * random.normal(VOCAB, WIDTH)}
    for i in range(2):
        sizes = {f"attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
        sizes |= {"mlp.c_fc": (32, WIDTH), "mlp.down_proj": (WIDTH, 32)}
        for name, (d_out, d_in) in sizes.items():
            weights[f"h.{i}.{name}.weight"] = random.normal(d_out, d_in) * d_in**-0.5
        for name in ("rms_1", "rms_2"):
            weights[f"h.{i}.{name}.weight"] = 1 + 0.3 * random.normal(WIDTH)
    weights["ln_f.weight"] = 1 + 0.3 * random.normal(WIDTH)
    config = {
        "model_type": "llama_simple_mlp",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    return config, weights


def llama_target(random: Random) -> tuple[dict, Params]:
    weights = {"model.embed_tokens.weight": random.normal(VOCAB, WIDTH)}
    for i in range(2):
        sizes = {"q": (WIDTH, WIDTH), "k": (8, WIDTH), "v": (8, WIDTH), "o": (WIDTH, WIDTH)}
        sizes = {f"self_attn.{name}_proj": size for name, size in sizes.items()}
        sizes |= {"mlp.gate_proj": (24, WIDTH), "mlp.up_proj": (24, WIDTH), "mlp.down_proj": (WIDTH, 24)}
        for name, (d_out, d_in) in sizes.items():
            weights[f"model.layers.{i}.{name}.weight"] = random.normal(d_out, d_in) * d_in**-0.5
            weights[f"model.layers.{i}.{name}.bias"] = 0.3 * random.normal(d_out)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{name}.weight"] = 1 + 0.3 * random.normal(WIDTH)
    weights["model.norm.weight"] = 1 + 0.3 * random.normal(WIDTH)
    weights["lm_head.weight"] = 0.5 * random.normal(VOCAB, WIDTH)
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000.0,
        "hidden_act": "silu",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }
    return config, weights


LLAMA_MODULES = "0.self_attn.q 0.self_attn.v 0.mlp.gate 0.mlp.down 1.self_attn.k 1.self_attn.o 1.mlp.up"
SIMPLE_MLP_ONLY = ("step1/m", "step1/v", "step2", "accum")
TARGETS = {
    "simple_mlp": (simple_mlp_target, 1, CONFIG),
    "llama": (llama_target, 1, dataclasses.replace(CONFIG, ci_alive_threshold=0.1)),
}


def choose_modules(target: ref.Target) -> list[ref.Module]:
    if target.type == "llama":
        paths = [f"model.layers.{name}_proj" for name in LLAMA_MODULES.split()]
    else:
        names = [name for name in target.weights if ".attn." in name or ".mlp." in name]
        paths = [name.removesuffix(".weight") for name in names]
    return ref.make_modules(target, {path: 2 + (2 * j) % 3 for j, path in enumerate(sorted(paths))})


# ---- The inputs ----


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that is given, in float32."""

    params: Params
    masks: Masks
    tokens: Tensor
    tokens2: Tensor
    draws: Draws
    draws2: Draws
    sources: Sources
    m: Params
    v: Params
    eval_draws: EvalDraws


def to_dtype(x, dtype: torch.dtype):
    """A record or dict of tensors with its floating tensors in dtype."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, dict):
        return {key: to_dtype(value, dtype) for key, value in x.items()}
    if dataclasses.is_dataclass(x):
        return type(x)(**{f.name: to_dtype(getattr(x, f.name), dtype) for f in dataclasses.fields(x)})
    return x


def make_inputs(d: Decomposition, random: Random) -> Inputs:
    sumC, M = sum(module.C for module in d.modules), len(d.modules)
    params = ref.init_params(d, random.generator)
    # A fresh CI function answers about 0 everywhere. This one's answers spread over [0, 1] and beyond; every
    # fifth component is dead and every seventh always on.
    params["ci_fn.proj_out.weight"] *= 2
    params["ci_fn.proj_out.bias"] += 0.4
    params["ci_fn.proj_out.bias"][::5] -= 8
    params["ci_fn.proj_out.bias"][3::7] += 8
    masks = Masks(random.uniform(N, sumC), random.uniform(N, M), random.uniform(N, M) < 0.6)
    tokens, tokens2 = random.tokens(), random.tokens()
    draws, draws2 = random.draws(sumC, M, routes=True), random.draws(sumC, M, routes=True)
    s = (random.uniform(N, sumC + M) * 1.4 - 0.2).clamp(0, 1)
    stochastic, hidden = Draws(draws.u, draws.u_delta), Draws(draws2.u, draws2.u_delta)
    eval_draws = EvalDraws(stochastic, masks.components, draws2, hidden, random.uniform(1, sumC + M))

    # Moments as they would be in the middle of a run: of the size of each tensor's own gradient.
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    sources = Sources(s, torch.zeros_like(s), torch.zeros_like(s), 0)
    step = ref.train_step(d, State(params, zeros, zeros, 0, sources), tokens, draws, LR, LR_PPGD, P)

    def rms(x: Tensor) -> float:
        return float(f"{x.square().mean().sqrt():.1g}")

    m, v = {}, {}
    for name, grad in step.grads.items():
        clip = d.cfg.grad_clip_components / step.clip_norm if name.startswith("components.") else 1
        m[name] = rms(clip * grad) * random.normal(*grad.shape)
        v[name] = torch.full_like(grad, rms(clip * grad) ** 2)
    size = rms(step.source_grad)
    sources = Sources(
        s, size * random.normal(*s.shape), size**2 * (0.5 + random.uniform(*s.shape)), SOURCES_T
    )
    return Inputs(params, masks, tokens, tokens2, draws, draws2, sources, m, v, eval_draws)


# ---- The answers ----


def sigmoid_points(alpha: float, dtype: torch.dtype) -> Params:
    z = torch.tensor([-2, -0.5, -1e-3, 0, 1e-3, 0.25, 0.999, 1, 1.001, 1.5, 3], dtype=dtype)
    z, upstream = torch.cat([z, z]), torch.tensor([-1.5] * len(z) + [0.75] * len(z), dtype=dtype)
    points = {"sigmoid/z": z, "sigmoid/upstream": upstream}
    for name, sigmoid in (("lower", ref.lower_leaky), ("upper", ref.upper_leaky)):
        leaf = z.clone().requires_grad_()
        y = sigmoid(leaf, alpha)
        points[f"sigmoid/{name}"] = y.detach()
        (points[f"sigmoid/{name}_grad"],) = torch.autograd.grad(y, leaf, upstream)
    return points


def schedule_points() -> list[dict]:
    points = []
    for n_steps in (400_000, 2000, 100, 1):
        cfg = Config(n_steps=n_steps)
        for step in sorted({0, 1, 2, n_steps // 50, n_steps // 40, n_steps // 3, n_steps - 2, n_steps - 1}):
            if 0 <= step < n_steps:
                rates = {"mainLr": ref.main_lr(step, cfg), "ppgdLr": ref.ppgd_lr(step, cfg)}
                points.append({"nSteps": n_steps, "step": step, **rates, "p": ref.importance_p(step, cfg)})
    return points


def answers(d: Decomposition, given: Inputs) -> tuple[dict[str, Tensor], dict]:
    """(fixture.safetensors' answers, fixture.json's answers), in the dtype of d and given."""
    tensors, numbers = {}, {}
    params = {name: p.clone().requires_grad_() for name, p in given.params.items()}
    context = ref.make_context(d, params, given.tokens)

    tensors["target/logits"] = context.logits
    tensors |= {f"target/input/{module.path}": context.inputs[module.path] for module in d.modules}
    unrouted = dataclasses.replace(given.masks, routes=None)
    tensors["masked/logits"] = ref.masked_forward(d, params, given.tokens, given.masks)
    tensors["masked/logits_unrouted"] = ref.masked_forward(d, params, given.tokens, unrouted)
    tensors |= {"ci/z": context.z, "ci/g": context.g, "ci/g_upper": context.g_upper}
    tensors |= sigmoid_points(d.cfg.leaky_alpha, context.z.dtype)
    for name, draws in (("draws", given.draws), ("draws2", given.draws2)):
        tensors[f"{name}/route"] = ref.stochastic_masks(context.g, draws).routes

    s = given.sources.s.clone().requires_grad_()
    losses = {
        "faith": ref.faithfulness_loss(d, params),
        "imp": ref.importance_minimality_loss(context.g_upper, P, d.cfg, R=1),
        "stoch": ref.masked_kl(d, params, context, ref.stochastic_masks(context.g, given.draws)),
        "ppgd": ref.masked_kl(d, params, context, ref.source_masks(context.g, s)),
    }
    for loss_name, loss in losses.items():
        leaves = {**params, "sources": s}
        grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True, allow_unused=True)
        named = {
            f"grad/{loss_name}/{name}": g for name, g in zip(leaves, grads, strict=True) if g is not None
        }
        tensors |= named
    imp3 = ref.importance_minimality_loss(context.g_upper, P, d.cfg, R=3)
    numbers["losses"] = {name: loss.item() for name, loss in {**losses, "imp3": imp3}.items()}

    def step_numbers(step: ref.StepResult) -> dict:
        return {**step.losses, "clipNorm": step.clip_norm}

    state = State(given.params, given.m, given.v, T, given.sources)
    whole = ref.train_step(d, state, given.tokens, given.draws, LR, LR_PPGD, P)
    ci_norm = math.sqrt(sum(g.double().square().sum().item() for n, g in whole.grads.items() if n.startswith("ci_fn")))
    # without the importance loss, so that a fork which changes it keeps the tests of a step
    others = dataclasses.replace(d, cfg=dataclasses.replace(d.cfg, coeff_imp=0.0))
    step1 = ref.train_step(others, state, given.tokens, given.draws, LR, LR_PPGD, P)
    step2 = ref.train_step(others, step1.state, given.tokens2, given.draws2, LR, LR_PPGD, P)
    split = dataclasses.replace(others, cfg=dataclasses.replace(others.cfg, micro_batches=3))
    accum = ref.train_step(split, state, given.tokens, given.draws, LR, LR_PPGD, P)
    for name in given.params:
        tensors[f"step1/grad/{name}"] = step1.grads[name]
        tensors[f"step1/params/{name}"] = step1.state.params[name]
        tensors[f"step1/m/{name}"] = step1.state.m[name]
        tensors[f"step1/v/{name}"] = step1.state.v[name]
        tensors[f"step2/params/{name}"] = step2.state.params[name]
        tensors[f"accum/grad/{name}"] = accum.grads[name]
    tensors["step1/source_grad"] = step1.source_grad
    tensors |= {f"step1/sources/{name}": getattr(step1.state.sources, name) for name in ("s", "m", "v")}
    tensors["step2/sources/s"] = step2.state.sources.s
    tensors["accum/sources/s"] = accum.state.sources.s
    numbers["whole"] = {**whole.losses, "ciNorm": ci_norm}
    numbers |= {"step1": step_numbers(step1), "step2": step_numbers(step2), "accum": step_numbers(accum)}

    warm, numbers["warmup"] = ref.faithfulness_warmup(d, given.params)
    tensors |= {f"warmup/{name}": warm[name] for name in ref.component_names(warm)}

    numbers["eval"] = ref.evaluate(d, given.params, given.tokens, P, given.eval_draws)
    numbers["measures"] = ref.measures(d, given.params, given.tokens, given.eval_draws.pgd)
    tensors["eval/pgd_end"] = ref.fresh_pgd(d, params, context, given.eval_draws.pgd)[1]
    return {name: t.detach() for name, t in tensors.items()}, numbers


def given_tensors(given: Inputs) -> dict[str, Tensor]:
    """fixture.safetensors' inputs."""
    tensors = dict(given.params)
    tensors |= {"masked/m": given.masks.components, "masked/delta": given.masks.deltas}
    tensors["masked/route"] = given.masks.routes
    for name, record in (("draws", given.draws), ("draws2", given.draws2)):
        tensors |= {f"{name}/{key}": t for key, t in vars(record).items()}
    tensors["eval/pgd_start"] = given.eval_draws.pgd
    tensors |= {f"sources/{name}": getattr(given.sources, name) for name in ("s", "m", "v")}
    tensors |= {f"moments/m/{name}": t for name, t in given.m.items()}
    return tensors | {f"moments/v/{name}": t.flatten()[:1] for name, t in given.v.items()}


# ---- Checks ----


def check(d: Decomposition, given: Inputs) -> None:
    """The reference against what does not share its code, in float64."""
    params, tokens, context = given.params, given.tokens, ref.make_context(d, given.params, given.tokens)

    # y = ((x V) ⊙ a) U + s ⊙ (x Wᵀ) + b with a = r(m − δ) and s = 1 − r(1 − δ), never forming Δ.
    index = {module.path: j for j, module in enumerate(d.modules)}

    def delta_free(path: str, x: Tensor) -> Tensor:
        if path not in index:
            return ref.target_linear(d.target)(path, x)
        j, weights = index[path], d.target.weights
        V, U = params[f"components.{path}.V"], params[f"components.{path}.U"]
        delta, r = given.masks.deltas[:, [j]], given.masks.routes[:, [j]].to(x.dtype)
        a, s = r * (given.masks.components[:, d.modules[j].columns] - delta), 1 - r * (1 - delta)
        y = ((x @ V) * a) @ U + s * (x @ weights[path + ".weight"].T)
        return y + weights[path + ".bias"] if path + ".bias" in weights else y

    literal = ref.masked_forward(d, params, tokens, given.masks)
    torch.testing.assert_close(
        ref.target_forward(d.target, tokens, delta_free), literal, rtol=1e-9, atol=1e-9
    )

    # Nothing sits on a kink, where float32 could fall on the other side.
    kinks = (0, 1, d.cfg.ci_alive_threshold, d.cfg.rounding_threshold)
    distance = min((context.z - kink).abs().min().item() for kink in kinks)
    assert distance > 1e-4, f"a CI logit is within {distance} of a kink: choose another seed"

    # Autograd of the adversarial loss against central differences, along a random direction of each V, of
    # each U and of the sources.
    leaves = {name: params[name].clone() for name in ref.component_names(params)}
    leaves["sources"] = given.sources.s.clone()
    for t in leaves.values():
        t.requires_grad_()

    def loss(values: Params) -> Tensor:
        masks = ref.source_masks(context.g, values["sources"])
        return ref.masked_kl(d, {**params, **values}, context, masks)

    grads = torch.autograd.grad(loss(leaves), list(leaves.values()))
    random = torch.Generator().manual_seed(0)
    for (name, t), grad in zip(leaves.items(), grads, strict=True):
        direction = torch.randn(t.shape, generator=random, dtype=t.dtype)
        h = 1e-6
        ends = [loss({**leaves, name: t.detach() + sign * h * direction}).item() for sign in (1, -1)]
        expected = torch.tensor((ends[0] - ends[1]) / (2 * h), dtype=t.dtype)
        torch.testing.assert_close((grad * direction).sum(), expected, rtol=1e-5, atol=1e-7)

    # The sigmoids' gradients against central differences, where the lower one's is the true derivative.
    z = torch.tensor([-0.7, 0.2, 0.8, 1.4], dtype=torch.float64, requires_grad=True)
    for sigmoid, true in ((ref.lower_leaky, slice(1, 4)), (ref.upper_leaky, slice(0, 4))):
        (grad,) = torch.autograd.grad(sigmoid(z, 0.01).sum(), z)
        difference = (sigmoid(z + 1e-6, 0.01) - sigmoid(z - 1e-6, 0.01)) / 2e-6
        torch.testing.assert_close(grad[true], difference[true].detach(), rtol=1e-6, atol=1e-8)

    # The sources' ascent is PyTorch's Adam with maximize, and clamping.
    s = torch.full((5,), 0.5, dtype=torch.float64, requires_grad=True)
    cfg, sources = d.cfg, Sources(s.detach(), torch.zeros_like(s), torch.zeros_like(s), 0)
    adam = torch.optim.Adam(
        [s], lr=0.03, betas=(cfg.ppgd_beta1, cfg.ppgd_beta2), eps=cfg.ppgd_eps, maximize=True
    )
    for _ in range(4):
        s.grad = torch.randn(5, generator=random, dtype=torch.float64)
        sources = ref.ascend(sources, s.grad, 0.03, cfg)
        adam.step()
        torch.testing.assert_close(sources.s, s.detach().clamp(0, 1), rtol=1e-12, atol=0)

    # The source gradient read off the total's.
    state = State(params, given.m, given.v, T, given.sources)
    no_inner = dataclasses.replace(d, cfg=dataclasses.replace(d.cfg, ppgd_inner_steps=0))
    step = ref.train_step(no_inner, state, tokens, given.draws, LR, LR_PPGD, P)
    torch.testing.assert_close(step.source_grad, grads[-1], rtol=1e-9, atol=1e-12)


def float32_error(d: Decomposition, given: Inputs, tensors: dict, numbers: dict) -> dict[str, float]:
    """Per group of answers the worst relative error of float32; of a tensor, max |error| / max |value|."""
    weights32 = to_dtype(d.target.weights, torch.float32)
    d32 = dataclasses.replace(d, target=dataclasses.replace(d.target, weights=weights32))
    tensors32, numbers32 = answers(d32, to_dtype(given, torch.float32))
    worst = {}

    def note(group: str, error: float, scale: float) -> None:
        worst[group] = max(worst.get(group, 0.0), abs(error) / (abs(scale) or 1.0))

    for name, true in tensors.items():
        first, second, *_ = name.split("/")
        group = f"{first}/{second}" if first in ("grad", "step1", "step2", "accum") else first
        error = (tensors32[name].double() - true.double()).abs().max()
        note(group, error.item(), true.double().abs().max().item())
    for group in ("losses", "whole", "step1", "step2", "accum", "eval", "measures"):
        for name, true in numbers[group].items():
            note(f"numbers/{group}", numbers32[group][name] - true, true)
    return worst


# ---- Files ----


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def make(name: str, only_check: bool) -> None:
    make_target, seed, cfg = TARGETS[name]
    folder, random = FOLDER / name, Random(seed)
    config, weights = make_target(random)
    if not only_check:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights))
    target = ref.load_target(folder)
    d = Decomposition(target, choose_modules(target), cfg)
    given = make_inputs(d, random)
    stored = given_tensors(given)
    d = dataclasses.replace(d, target=ref.load_target(folder, torch.float64))
    given = to_dtype(given, torch.float64)

    check(d, given)
    tensors, numbers = answers(d, given)
    print(f"{name}: checked; worst errors of float32:")
    for group, error in float32_error(d, given, tensors, numbers).items():
        print(f"  {group:<20}{error:.1e}")
    if only_check:
        return

    stored |= tensors
    if name != "simple_mlp":
        stored = {key: t for key, t in stored.items() if not key.startswith(SIMPLE_MLP_ONLY)}
        numbers = {key: value for key, value in numbers.items() if key not in SIMPLE_MLP_ONLY}
    stored = {key: t.to(torch.float32).contiguous() for key, t in stored.items()}
    (folder / "fixture.safetensors").write_bytes(safetensors.torch.save(stored))
    record = {
        "config": {camel(key): value for key, value in vars(cfg).items()},
        "modules": {m.path: {"dIn": m.d_in, "dOut": m.d_out, "C": m.C} for m in d.modules},
        "tokens": given.tokens.tolist(),
        "tokens2": given.tokens2.tolist(),
        **{"p": P, "lr": LR, "lrPpgd": LR_PPGD, "t": T, "sourcesT": SOURCES_T},
        **numbers,
        "schedules": schedule_points(),
    }
    (folder / "fixture.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes tools/fixtures/method from tools/reference.py")
    parser.add_argument("--check", action="store_true", help="only check; write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in TARGETS:
        make(name, args.check)


if __name__ == "__main__":
    main()
