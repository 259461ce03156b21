"""
Makes tools/fixtures/original: a small decomposition in PyTorch with the original's names and shapes, saved as its
trainer saves it, read by import_run.py, with the importances and masked logits that PyTorch computes.

  python tools/make_original_fixture.py

Checks on the way that exporting the imported run gives the same checkpoint back, tensor by tensor.
"""

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import import_run  # noqa: E402

VOCAB, D, HEADS, MLP, LAYERS, CONTEXT = 40, 16, 2, 24, 11, 12  # 11 layers: h.10 stands before h.2 in path order
CI_D, CI_BLOCKS, CI_HEADS, CI_MLP, CI_BASE = 16, 2, 2, 24, 500.0
SIZES = {"h.0.attn.q_proj": 5, "h.2.attn.v_proj": 4, "h.2.mlp.c_fc": 7, "h.10.attn.o_proj": 6, "h.10.mlp.down_proj": 9}
FIXTURE = Path(__file__).parent / "fixtures" / "original"


def rope(x: Tensor, base: float) -> Tensor:
    """Half-split rotary embedding. x [..., S, hd]"""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, base: float, causal: bool) -> Tensor:
    B, S, d = q.shape
    split = lambda x: x.view(B, S, heads, d // heads).transpose(1, 2)  # noqa: E731
    q, k, v = rope(split(q), base), rope(split(k), base), split(v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(d // heads)
    if causal:
        scores = scores.masked_fill(torch.ones(S, S).triu(1).bool(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, d)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, x):
        return F.rms_norm(x, (D,), self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for p in "qkvo":
            setattr(self, f"{p}_proj", nn.Linear(D, D, bias=False))
        self.register_buffer("rotary_cos", torch.zeros(CONTEXT, 4))  # which an importer must pass over

    def forward(self, x):
        return self.o_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), HEADS, 10000.0, True))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_fc = nn.Linear(D, MLP, bias=False)
        self.down_proj = nn.Linear(MLP, D, bias=False)

    def forward(self, x):
        return self.down_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.rms_1, self.attn, self.rms_2, self.mlp = Norm(), Attention(), Norm(), Mlp()

    def forward(self, x):
        x = x + self.attn(self.rms_1(x))
        return x + self.mlp(self.rms_2(x))


class SmallTarget(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, D)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = Norm()
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Affine(nn.Module):
    """x W + b, with W [in, out] as the original's own linear layers have it."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.W = nn.Parameter(torch.randn(d_in, d_out) / math.sqrt(d_in))
        self.b = nn.Parameter(0.3 * torch.randn(d_out))

    def forward(self, x):
        return x @ self.W + self.b


class CiAttention(nn.Module):
    def __init__(self):
        super().__init__()
        for p in ("q", "k", "v", "out"):
            setattr(self, f"{p}_proj", nn.Linear(CI_D, CI_D, bias=False))
        self.rope = nn.Module()
        self.rope.register_buffer("inv_freq", torch.zeros(CI_D // CI_HEADS // 2))

    def forward(self, x):
        return self.out_proj(attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), CI_HEADS, CI_BASE, False))


class CiBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = CiAttention()
        self.mlp = nn.Sequential(Affine(CI_D, CI_MLP), nn.GELU(), Affine(CI_MLP, CI_D))

    def forward(self, x):
        x = x + self.attn(F.rms_norm(x, (CI_D,)))
        return x + self.mlp(F.rms_norm(x, (CI_D,)))


class SharedCi(nn.Module):
    def __init__(self, d_in: int, sum_c: int):
        super().__init__()
        self._input_projector = Affine(d_in, CI_D)
        self._blocks = nn.ModuleList(CiBlock() for _ in range(CI_BLOCKS))
        self._output_head = Affine(CI_D, sum_c)

    def forward(self, inputs: list[Tensor]):
        x = self._input_projector(torch.cat([F.rms_norm(x, (x.shape[-1],)) for x in inputs], -1))
        for block in self._blocks:
            x = block(x)
        return self._output_head(x)


class Decomposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.target_model = SmallTarget()
        self._components = nn.ModuleDict()
        for path in sorted(SIZES):
            layer = self.target_model.get_submodule(path)
            pair = nn.Module()
            pair.V = nn.Parameter(torch.randn(layer.in_features, SIZES[path]) / 3)
            pair.U = nn.Parameter(torch.randn(SIZES[path], layer.out_features) / 3)
            self._components[path.replace(".", "-")] = pair
        d_in = sum(self.target_model.get_submodule(path).in_features for path in SIZES)
        self.ci_fn = nn.Module()
        self.ci_fn._global_ci_fn = SharedCi(d_in, sum(SIZES.values()))

    def forward(self, tokens: Tensor, change) -> Tensor:
        """The target's logits; change(path, x, y) is what a decomposed layer gives instead of y."""
        hooks = [
            self.target_model.get_submodule(path).register_forward_hook(lambda _, x, y, path=path: change(path, x[0], y))
            for path in SIZES
        ]
        logits = self.target_model(tokens)
        for hook in hooks:
            hook.remove()
        return logits


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = Decomposed()
    for block in model.target_model.h:
        for p in block.parameters():
            if p.ndim == 2:
                p.mul_(2)
    tokens = torch.randint(VOCAB, (2, CONTEXT))
    inputs = {}

    def keep(path, x, y):
        inputs[path] = x
        return y

    logits = model(tokens, keep)
    order = sorted(SIZES)
    z = model.ci_fn._global_ci_fn([inputs[path] for path in order])
    g = z.clamp(0, 1)
    parts = dict(zip(order, g.split([SIZES[path] for path in order], -1), strict=True))

    def masked(path, x, y):
        pair = model._components[path.replace(".", "-")]
        return ((x @ pair.V) * parts[path]) @ pair.U

    masked_logits = model(tokens, masked)

    shutil.rmtree(FIXTURE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        torch.save(model.state_dict(), folder / "model_10.pth")
        attn = {"n_heads": CI_HEADS, "max_len": 64, "rope_base": CI_BASE}
        ci = {"fn_type": "global_shared_transformer", "simple_transformer_ci_cfg": {"d_model": CI_D, "attn_config": attn}}
        (folder / "final_config.yaml").write_text(json.dumps({"pd": {"ci_config": ci}}))
        (folder / "target").mkdir()
        target = {
            **{"model_type": "llama_simple_mlp", "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": MLP},
            **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS},
            **{"max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "rope_theta": 10000},
            **{"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
        }
        (folder / "target" / "config.json").write_text(json.dumps(target))
        vocabulary = {f"w{i}": i for i in range(VOCAB)}
        words = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
        tokenizer = {
            **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None},
            **{"pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None, "model": words},
        }
        (folder / "target" / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "rows.json").write_text(json.dumps(tokens.tolist()))
        run = folder / "run"
        flags = ["--config", "final_config.yaml", "--target-config", "target", "--data", "rows.json", "--eval-data", "rows.json"]
        flags = [str(folder / f) if not f.startswith("--") else f for f in flags]
        assert import_run.main([str(folder / "model_10.pth"), *flags, "--out", str(run)]) == 0

        assert import_run.main(["--export", str(run), "--out", str(folder / "again.pth")]) == 0
        again = torch.load(folder / "again.pth", weights_only=True)
        own = {n: t for n, t in model.state_dict().items() if not import_run.BUFFERS.search(n)}
        assert set(again) == set(own), set(again) ^ set(own)
        assert all(torch.equal(again[n], own[n]) for n in own)
        model.load_state_dict({**model.state_dict(), **again})

        record = json.loads((run / "config.json").read_text())
        record["config"] |= {"model": "target", "data": "rows.json", "evalData": "rows.json"}  # the test says where
        record["model"]["path"] = "target"
        record["data"]["path"] = "rows.json"
        (run / "config.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.copytree(run, FIXTURE)
        shutil.copy(folder / "rows.json", FIXTURE)
    flat = lambda t: [float(f"{x:.9g}") for x in t.flatten().tolist()]  # noqa: E731
    expected = {"g": flat(g), "logits": flat(logits), "maskedLogits": flat(masked_logits)}
    (FIXTURE / "expected.json").write_text(json.dumps(expected) + "\n")
    inside = ((z > 0) & (z < 1)).float().mean().item()
    print(f"{inside:.2f} of the importances are between 0 and 1")


if __name__ == "__main__":
    main()
