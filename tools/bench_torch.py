"""Times one training step written as the PyTorch original writes it; tools/bench.ts runs it beside ours.

    python tools/bench_torch.py --preset toy --threads 2 --steps 20
    python tools/bench_torch.py --preset stories260K --sizes '{"ciDModel": 64}' --batch 16 --seq 32
    python tools/bench_torch.py --preset pile-4L-block --device cuda --autocast
    python tools/bench_torch.py --preset toy --compile

Our own code in that style: nn.Linear layers are replaced by modules that form the delta in every masked
forward; the sources have a backward for each inner step and one more beside the total's;
torch.optim.AdamW as it comes; fused attention. Weights and tokens are random, since the time of a step
does not depend on them. --compile: the target, with its masked layers, and the CI function through
torch.compile.

Prints one JSON line: torch, device, autocast, threads, sizes, msPerStep (the median), times (all, ms),
peakRssBytes (of the process), baseRssBytes (its peak before the model was made: Python and PyTorch
themselves) and on CUDA peakCudaBytes (of tensors) and usedCudaBytes (of the whole card, at the end).

--sizes takes a preset's fields, all of them or, beside --preset, some: layers, dModel, heads, kvHeads,
mlp, vocab, gated (SwiGLU as in llama, else GELU as in llama_simple_mlp), tied, components ({linear
layer: C}; layers that are not named stay whole), ciDModel, ciNBlocks, ciNHeads, ciMlpHidden, batch,
seq.
"""

import argparse
import json
import math
import resource
import shutil
import statistics
import sys
import time

import torch
import torch._functorch.config as functorch
import torch.nn.functional as F
from torch import Tensor, nn

# fmt: off
PRESETS = {
    "toy": dict(
        layers=1, dModel=48, heads=4, kvHeads=4, mlp=192, vocab=88, gated=False, tied=True,
        components=dict(q=48, k=48, v=48, o=48, c_fc=128, down=128),
        ciDModel=64, ciNBlocks=1, ciNHeads=4, ciMlpHidden=256, batch=16, seq=32,
    ),
    "stories260K": dict(
        layers=5, dModel=64, heads=8, kvHeads=4, mlp=172, vocab=512, gated=True, tied=True,
        components=dict(q=64, k=64, v=64, o=64, gate=64, up=64, down=64),
        ciDModel=128, ciNBlocks=2, ciNHeads=4, ciMlpHidden=512, batch=8, seq=64,
    ),
    "simplestories-2L": dict(
        layers=2, dModel=192, heads=6, kvHeads=3, mlp=768, vocab=4019, gated=False, tied=True,
        components=dict(q=288, k=288, v=384, o=480, c_fc=1152, down=960),
        ciDModel=512, ciNBlocks=4, ciNHeads=8, ciMlpHidden=2048, batch=4, seq=128,
    ),
    "pile-4L": dict(
        layers=4, dModel=768, heads=6, kvHeads=6, mlp=3072, vocab=50277, gated=False, tied=True,
        components=dict(q=512, k=512, v=1024, o=1024, c_fc=3072, down=3584),
        ciDModel=2048, ciNBlocks=8, ciNHeads=16, ciMlpHidden=8192, batch=4, seq=512,
    ),
    # One of the four blocks, with one of the eight CI blocks.
    "pile-4L-block": dict(
        layers=1, dModel=768, heads=6, kvHeads=6, mlp=3072, vocab=50277, gated=False, tied=True,
        components=dict(q=512, k=512, v=1024, o=1024, c_fc=3072, down=3584),
        ciDModel=2048, ciNBlocks=1, ciNHeads=16, ciMlpHidden=8192, batch=1, seq=128,
    ),
}
# fmt: on
COEFF = {"faith": 1e7, "imp": 2e-4, "stoch": 0.5, "ppgd": 0.5}
IMP_EPS, IMP_BETA, IMP_P, LEAKY_ALPHA, GRAD_CLIP = 1e-12, 0.5, 1.0, 0.01, 0.01
MAIN_LR, PPGD_LR, BETA1, BETA2, PPGD_EPS, INNER_STEPS = 5e-5, 0.01, 0.5, 0.99, 1e-8, 2


def rotary(seq: int, head_dim: int) -> tuple[Tensor, Tensor]:
    freq = 10000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    angle = torch.outer(torch.arange(seq).float(), freq)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, kv_heads: int, seq: int, causal: bool):
        super().__init__()
        self.heads, self.kv_heads, self.causal = heads, kv_heads, causal
        kv = d * kv_heads // heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, n, bias=False) for n in (d, kv, kv, d))
        cos, sin = rotary(seq, d // heads)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)

    def forward(self, x: Tensor) -> Tensor:
        B, S, d = x.shape
        q = self.q(x).view(B, S, self.heads, -1).transpose(1, 2)
        k = self.k(x).view(B, S, self.kv_heads, -1).transpose(1, 2)
        v = self.v(x).view(B, S, self.kv_heads, -1).transpose(1, 2)
        cos, sin = self.cos.to(q.dtype), self.sin.to(q.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.kv_heads < self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).reshape(B, S, d))


# ---- Target ----


class TargetBlock(nn.Module):
    def __init__(self, s: dict):
        super().__init__()
        d = s["dModel"]
        self.norm1, self.norm2 = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.attn = Attention(d, s["heads"], s["kvHeads"], s["seq"], causal=True)
        self.gated = s["gated"]
        if self.gated:
            self.gate, self.up = nn.Linear(d, s["mlp"], bias=False), nn.Linear(d, s["mlp"], bias=False)
        else:
            self.c_fc = nn.Linear(d, s["mlp"], bias=False)
        self.down = nn.Linear(s["mlp"], d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.gated else F.gelu(self.c_fc(h), approximate="tanh")
        return x + self.down(h)


class TargetModel(nn.Module):
    def __init__(self, s: dict):
        super().__init__()
        self.embed = nn.Embedding(s["vocab"], s["dModel"])
        self.blocks = nn.ModuleList([TargetBlock(s) for _ in range(s["layers"])])
        self.norm = nn.RMSNorm(s["dModel"], eps=1e-6)
        self.head = nn.Linear(s["dModel"], s["vocab"], bias=False)
        if s["tied"]:
            self.head.weight = self.embed.weight
        for weight in self.parameters():
            if weight.ndim == 2:  # so that logits and losses are of ordinary size
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ComponentLinear(nn.Module):
    """Stands in for one nn.Linear. Without a mask it is that layer, noting its input for the CI function."""

    def __init__(self, weight: Tensor, C: int):
        super().__init__()
        d_out, d_in = weight.shape
        self.register_buffer("weight", weight.detach().clone())
        self.V = nn.Parameter(torch.randn(d_in, C) / math.sqrt(d_in))
        self.U = nn.Parameter(torch.randn(C, d_out) / math.sqrt(C))
        self.mask = self.delta_mask = self.route = self.input = None

    def delta(self) -> Tensor:
        return self.weight - (self.V @ self.U).T

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.input = x.detach()
            return F.linear(x, self.weight)
        y = ((x @ self.V) * self.mask) @ self.U
        y = y + self.delta_mask.unsqueeze(-1) * F.linear(x, self.delta())
        if self.route is not None:
            y = torch.where(self.route.unsqueeze(-1), y, F.linear(x, self.weight))
        return y


def install(model: TargetModel, components: dict[str, int]) -> dict[str, ComponentLinear]:
    """Freezes the model, replaces its linear layers and returns the replacements sorted by path."""
    model.requires_grad_(False)
    layers = {}
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear) and name in components:
            layers[path] = ComponentLinear(module.weight, components[name])
            setattr(model.get_submodule(parent), name, layers[path])
    return dict(sorted(layers.items()))


# ---- Causal importance ----


class LowerLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.clamp(0, 1)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        revive = LEAKY_ALPHA * upstream.clamp(max=0)
        return torch.where(z <= 0, revive, torch.where(z <= 1, upstream, 0))


class CIBlock(nn.Module):
    def __init__(self, s: dict):
        super().__init__()
        d, hidden = s["ciDModel"], s["ciMlpHidden"]
        self.attn = Attention(d, s["ciNHeads"], s["ciNHeads"], s["seq"], causal=False)
        self.mlp = nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(F.rms_norm(x, x.shape[-1:]))
        return x + self.mlp(F.rms_norm(x, x.shape[-1:]))


class CIFunction(nn.Module):
    def __init__(self, s: dict, d_in: int, sizes: list[int]):
        super().__init__()
        self.sizes = sizes
        self.proj_in = nn.Linear(d_in, s["ciDModel"])
        self.blocks = nn.ModuleList([CIBlock(s) for _ in range(s["ciNBlocks"])])
        self.proj_out = nn.Linear(s["ciDModel"], sum(sizes))

    def forward(self, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        x = self.proj_in(torch.cat([F.rms_norm(x, x.shape[-1:]) for x in inputs], dim=-1))
        for block in self.blocks:
            x = block(x)
        z = self.proj_out(x).split(self.sizes, dim=-1)
        upper = [torch.where(t > 1, 1 + LEAKY_ALPHA * (t - 1), t.clamp(0, 1)) for t in z]
        return [LowerLeaky.apply(t) for t in z], upper


# ---- One training step ----


class Trainer:
    def __init__(self, s: dict, device: str, autocast: bool, compiled: bool = False):
        self.device, self.autocast = device, autocast
        self.model = TargetModel(s)
        self.layers = list(install(self.model, s["components"]).values())
        sizes = [layer.V.shape[1] for layer in self.layers]
        self.ci_fn = CIFunction(s, sum(layer.V.shape[0] for layer in self.layers), sizes).to(device)
        self.model.to(device)
        if compiled:
            functorch.donated_buffer = False  # since a graph is kept for the sources' gradient
            self.model, self.ci_fn = torch.compile(self.model), torch.compile(self.ci_fn)
        self.components = [p for layer in self.layers for p in (layer.V, layer.U)]
        self.optimiser = torch.optim.AdamW(
            [*self.components, *self.ci_fn.parameters()], lr=MAIN_LR, weight_decay=0.0
        )
        shapes = [(s["batch"], s["seq"], C + 1) for C in sizes]
        self.sources = [torch.rand(shape, device=device, requires_grad=True) for shape in shapes]
        self.m = [torch.zeros_like(source) for source in self.sources]
        self.v = [torch.zeros_like(source) for source in self.sources]
        self.t = 0

    def masked_kl(self, tokens: Tensor, target_logits: Tensor, masks, delta_masks, routes=None) -> Tensor:
        """KL to the target under the given masks, one per layer."""
        for i, layer in enumerate(self.layers):
            layer.mask, layer.delta_mask = masks[i], delta_masks[i]
            layer.route = None if routes is None else routes[i]
        log_pred = F.log_softmax(self.model(tokens), dim=-1)
        for layer in self.layers:
            layer.mask = layer.delta_mask = layer.route = None
        kl = F.kl_div(log_pred, F.log_softmax(target_logits, dim=-1), reduction="none", log_target=True)
        return kl.sum(-1).mean()

    def stochastic_loss(self, tokens: Tensor, target_logits: Tensor, ci: list[Tensor]) -> Tensor:
        masks = [g + (1 - g) * torch.rand_like(g) for g in ci]
        delta_masks = torch.rand(len(ci), *tokens.shape, device=tokens.device)
        k = torch.randint(1, len(ci) + 1, tokens.shape, device=tokens.device)
        rank = torch.rand(len(ci), *tokens.shape, device=tokens.device).argsort(0).argsort(0)
        return self.masked_kl(tokens, target_logits, masks, delta_masks, rank < k)

    def adversarial_loss(self, tokens: Tensor, target_logits: Tensor, ci: list[Tensor]) -> Tensor:
        masks = [g + (1 - g) * s[..., :-1] for g, s in zip(ci, self.sources, strict=True)]
        return self.masked_kl(tokens, target_logits, masks, [s[..., -1] for s in self.sources])

    @torch.no_grad()
    def ascend(self, grads: tuple[Tensor, ...]) -> None:
        self.t += 1
        rate, root = PPGD_LR / (1 - BETA1**self.t), math.sqrt(1 - BETA2**self.t)
        for s, m, v, g in zip(self.sources, self.m, self.v, grads, strict=True):
            m.lerp_(g, 1 - BETA1)
            v.mul_(BETA2).addcmul_(g, g, value=1 - BETA2)
            s.addcdiv_(m, (v.sqrt() / root).add_(PPGD_EPS), value=rate).clamp_(0, 1)

    def faithfulness_loss(self) -> Tensor:
        deltas = [layer.delta() for layer in self.layers]
        return sum(d.square().sum() for d in deltas) / sum(d.numel() for d in deltas)

    def importance_loss(self, ci_upper: list[Tensor]) -> Tensor:
        total = 0.0
        for g in ci_upper:
            sigma = (g + IMP_EPS).pow(IMP_P).sum((0, 1))
            mu = sigma / g[..., 0].numel()
            total = total + (mu + IMP_BETA * mu * torch.log2(1 + sigma)).sum()
        return total

    def step(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                target_logits = self.model(tokens)
            ci, ci_upper = self.ci_fn([layer.input for layer in self.layers])
            detached = [g.detach() for g in ci]
            for _ in range(INNER_STEPS):
                loss = self.adversarial_loss(tokens, target_logits, detached)
                self.ascend(torch.autograd.grad(loss, self.sources))
            losses = {
                "faith": self.faithfulness_loss(),
                "imp": self.importance_loss(ci_upper),
                "stoch": self.stochastic_loss(tokens, target_logits, ci),
                "ppgd": self.adversarial_loss(tokens, target_logits, ci),
            }
        total = sum(COEFF[name] * loss.float() for name, loss in losses.items())
        source_grads = torch.autograd.grad(losses["ppgd"], self.sources, retain_graph=True)
        self.optimiser.zero_grad()
        total.backward(inputs=[*self.components, *self.ci_fn.parameters()])
        torch.nn.utils.clip_grad_norm_(self.components, GRAD_CLIP)
        self.optimiser.step()
        self.ascend(source_grads)
        return total


def peak_rss() -> int:
    """Bytes; Linux counts in kilobytes, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Times PyTorch's training step")
    parser.add_argument("--preset", choices=list(PRESETS))
    parser.add_argument(
        "--sizes", default="{}", help="JSON over or instead of the preset; - reads standard input"
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA GPU")
    if args.compile and args.device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        parser.error("--compile: torch.compile takes a C++ compiler, and none is on PATH")
    given = json.loads(sys.stdin.read() if args.sizes == "-" else args.sizes)
    sizes = {**PRESETS.get(args.preset, {}), **given}
    sizes |= {name: value for name, value in (("batch", args.batch), ("seq", args.seq)) if value is not None}
    missing = [name for name in PRESETS["toy"] if name not in sizes]
    if missing:
        parser.error(f"sizes without {', '.join(missing)}: name a --preset or give them in --sizes")

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base = peak_rss()
    trainer = Trainer(sizes, args.device, args.autocast, args.compile)
    times = []
    for i in range(args.warmup + args.steps):
        tokens = torch.randint(sizes["vocab"], (sizes["batch"], sizes["seq"]), device=args.device)
        start = time.perf_counter()
        trainer.step(tokens).item()  # reading the loss waits for the device
        if args.device == "cuda":
            torch.cuda.synchronize()
        if i >= args.warmup:
            times.append((time.perf_counter() - start) * 1000)
    result = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "autocast": args.autocast,
        "compile": args.compile,
        "threads": args.threads,
        "sizes": sizes,
        "msPerStep": statistics.median(times),
        "times": [round(t, 3) for t in times],
        "baseRssBytes": base,
        "peakRssBytes": peak_rss(),
    }
    if args.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        result |= {"peakCudaBytes": torch.cuda.max_memory_allocated(), "usedCudaBytes": total - free}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
