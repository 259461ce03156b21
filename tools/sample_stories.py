"""More text of a small Llama's own: documents sampled from it, one a line, as models/stories260K's corpus has them.

    python tools/sample_stories.py --model stories260K --documents 20480 --seed 7 --out more.txt

Draws from the target's own probabilities (temperature 1), 512 documents at a time, each until its end or 320 tokens.
Plain Llama alone (half-split rotary embedding, SiLU, tied or own unembedding); needs torch, safetensors and tokenizers.
"""

import argparse
import json
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

TOGETHER, LONGEST = 512, 320  # documents, tokens


class Llama:
    """One token of each document at a time, with the keys and values of those before it."""

    def __init__(self, folder: Path):
        self.config = json.loads((folder / "config.json").read_text())
        self.w = load_file(folder / "model.safetensors")
        self.heads, self.kv = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.hd = self.config["hidden_size"] // self.heads
        self.inverse = self.config["rope_theta"] ** (-torch.arange(0, self.hd, 2) / self.hd)
        self.unembed = self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"])

    def norm(self, x, name):
        return F.rms_norm(x, x.shape[-1:], self.w[name + ".weight"], self.config["rms_norm_eps"])

    def rotate(self, x, position):
        angle = position * torch.cat([self.inverse, self.inverse])
        a, b = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-b, a], -1) * angle.sin()

    def empty(self, n):
        shape = (n, self.kv, LONGEST, self.hd)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(self.config["num_hidden_layers"])]

    def step(self, token, position, cache):
        """Logits [n, vocab] after token [n]."""
        n = len(token)
        x = self.w["model.embed_tokens.weight"][token]
        for layer, (keys, values) in enumerate(cache):
            block = f"model.layers.{layer}."

            def linear(name, y, block=block):
                return F.linear(y, self.w[f"{block}{name}_proj.weight"])

            y = self.norm(x, block + "input_layernorm")
            q, k, v = (linear(f"self_attn.{name}", y).view(n, -1, self.hd) for name in "qkv")
            keys[:, :, position], values[:, :, position] = self.rotate(k, position), v
            q = self.rotate(q, position).view(n, self.kv, -1, self.hd)
            scores = q @ keys[:, :, : position + 1].transpose(2, 3) / self.hd**0.5
            x = x + linear("self_attn.o", (scores.softmax(-1) @ values[:, :, : position + 1]).reshape(n, -1))
            y = self.norm(x, block + "post_attention_layernorm")
            x = x + linear("mlp.down", F.silu(linear("mlp.gate", y)) * linear("mlp.up", y))
        return F.linear(self.norm(x, "model.norm"), self.unembed)


@torch.no_grad()
def sample(model: Llama) -> list[list[int]]:
    begin, end = model.config["bos_token_id"], model.config["eos_token_id"]
    token, done, drawn = torch.full((TOGETHER,), begin), torch.zeros(TOGETHER, dtype=torch.bool), []
    cache = model.empty(TOGETHER)
    for position in range(LONGEST):
        token = torch.multinomial(model.step(token, position, cache).softmax(-1), 1)[:, 0]
        done |= (token == begin) | (token == end)
        token = token.masked_fill(done, end)
        drawn.append(token)
        if done.all():
            break
    return [[t for t in row if t not in (begin, end)] for row in torch.stack(drawn, 1).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description="Samples documents from a small Llama")
    parser.add_argument("--model", type=Path, required=True, help="its Hugging Face folder")
    parser.add_argument("--documents", type=int, required=True, help=f"in whole batches of {TOGETHER}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="text file, a document a line")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = Llama(args.model), tokenizers.Tokenizer.from_file(str(args.model / "tokenizer.json"))
    with args.out.open("w") as out:
        for _ in range(-(-args.documents // TOGETHER)):
            for ids in sample(model):
                out.write(tokenizer.decode(ids).strip().replace("\n", " ") + "\n")


if __name__ == "__main__":
    main()
