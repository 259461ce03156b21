"""Writes llama2.c files (.pt, .bin in the legacy format and in version 1, tokenizer .bin and .model) from scratch.

  python3 tools/make_llama2c_fixtures.py                        fixtures/llama2c/: two small random models
  python3 tools/make_llama2c_fixtures.py --folder HF --out DIR   of a Hugging Face folder: the way back of llama2c.ts
  python3 tools/make_llama2c_fixtures.py --compare A B           two folders: tensors, token ids, transformers' logits

(needs torch, safetensors and tokenizers; --compare also transformers)

The expected logits come from llama2.c's own rotation (neighbours of a head, as complex numbers), the expected token
ids from merging the best-scored pair of neighbours again and again, as its C program does: neither knows of the
permutation or of the list of merges that tools/llama2c.ts makes. --compare's last line is the control: with the rows
of q and k left in llama2.c's order, the logits must differ.
"""

import argparse
import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

OUT = Path(__file__).parent / "fixtures" / "llama2c"
MATRICES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def pairs_from_halves(w, heads):
    """Rows of each head: halves (0, h/2), (1, h/2 + 1) … become neighbours."""
    return w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


def frequencies(args):
    half = args["dim"] // args["n_heads"] // 2
    inverse = 1.0 / 10000.0 ** (torch.arange(half).float() / half)
    return torch.outer(torch.arange(args["max_seq_len"]).float(), inverse)


def logits(model, args, tokens):
    """The forward of llama2.c on tokens [B, S]."""
    n_heads, n_kv, hd = args["n_heads"], args["n_kv_heads"], args["dim"] // args["n_heads"]
    batch, length = tokens.shape
    turn = torch.polar(torch.ones(()), frequencies(args)[:length])[None, :, None]

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + args["norm_eps"]) * model[name]

    def rotated(x):
        pairs = torch.view_as_complex(x.reshape(batch, length, -1, hd // 2, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(3)

    x = model["tok_embeddings.weight"][tokens]
    for i in range(args["n_layers"]):
        w = {n: model[f"layers.{i}.{n}.weight"] for n in MATRICES}
        h = norm(x, f"layers.{i}.attention_norm.weight")
        q, k = rotated(h @ w["attention.wq"].T), rotated(h @ w["attention.wk"].T)
        v = (h @ w["attention.wv"].T).view(batch, length, -1, hd)
        k, v = (t.repeat_interleave(n_heads // n_kv, 2).transpose(1, 2) for t in (k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        x = x + mixed.transpose(1, 2).flatten(2) @ w["attention.wo"].T
        h = norm(x, f"layers.{i}.ffn_norm.weight")
        up = torch.nn.functional.silu(h @ w["feed_forward.w1"].T) * (h @ w["feed_forward.w3"].T)
        x = x + up @ w["feed_forward.w2"].T
    return norm(x, "norm.weight") @ model.get("output.weight", model["tok_embeddings.weight"]).T


def write_pt(path, model, args):
    """As train.py saves it, an optimiser and the prefix of torch.compile included."""
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in model.items()}
    if "output.weight" not in model:
        compiled["_orig_mod.output.weight"] = model["tok_embeddings.weight"]
    kept = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    model_args = {**{key: args[key] for key in kept}, "multiple_of": 4, "dropout": 0.0}
    moments = {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}
    groups = [{"lr": 5e-4, "betas": (0.9, 0.95), "params": [0]}]
    saved = {
        "model": compiled,
        "optimizer": {"state": moments, "param_groups": groups},
        "model_args": model_args,
        "iter_num": 2**40,
        "best_val_loss": torch.tensor(1.25),
        "config": {"compile": True, "always": None, "lr": -1e-3},
    }
    torch.save(saved, path)


def write_bin(path, model, args, version):
    layers = range(args["n_layers"])
    ints = [args[k] for k in ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")]
    tied = "output.weight" not in model

    def of(name):
        return [model[f"layers.{i}.{name}.weight"] for i in layers]

    attention = [w for n in ("wq", "wk", "wv", "wo") for w in of(f"attention.{n}")]
    mlp = [w for n in ("w1", "w2", "w3") for w in of(f"feed_forward.{n}")]
    head = [] if tied else [model["output.weight"]]
    if version == 0:
        ints[5] = ints[5] if tied else -ints[5]
        start = struct.pack("<7i", *ints)
        angles = frequencies(args)
        rotary = [angles.cos(), angles.sin()]
        order = [model["tok_embeddings.weight"], *of("attention_norm"), *attention, *of("ffn_norm"), *mlp]
        order += [model["norm.weight"], *rotary, *head]
    else:
        start = struct.pack("<Ii7iB", 0x616B3432, 1, *ints, tied).ljust(256, b"\0")
        order = [*of("attention_norm"), *of("ffn_norm"), model["norm.weight"], model["tok_embeddings.weight"]]
        order += [*attention, *mlp, *head]
    path.write_bytes(start + b"".join(w.float().contiguous().numpy().tobytes() for w in order))


def write_tokenizer_bin(path, pieces):
    """pieces: (text with ▁, score), the first three <unk>, <s>, </s>, then the bytes."""
    texts = []
    for i, (piece, _) in enumerate(pieces):
        if i in (1, 2):
            piece = f"\n{piece}\n"
        elif 3 <= i < 259:
            piece = chr(i - 3)
        texts.append(piece.replace("▁", " ").encode())
    out = struct.pack("<I", max(map(len, texts)))
    for text, (_, score) in zip(texts, pieces):
        out += struct.pack("<fI", score, len(text)) + text
    path.write_bytes(out)


def write_sentencepiece(path, pieces, model_type=2):
    """The few fields of the protobuf that matter: pieces (text, score, kind) and the trainer's model type."""

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def field(number, payload):
        return varint(8 * number + 2) + varint(len(payload)) + payload

    out = b""
    for i, (piece, score) in enumerate(pieces):
        kind = 2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1
        message = field(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
        out += field(1, message + (b"" if kind == 1 else b"\x18" + varint(kind)))
    out += field(2, field(1, b"stories.txt") + b"\x18" + varint(model_type) + b"\x20" + varint(len(pieces)))
    out += field(3, field(1, b"identity") + b"\x18\x01")
    path.write_bytes(out)


def encode(pieces, text):
    """llama2.c's own way: bytes where a character is no token, then the best-scored pair again and again."""
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    tokens = []
    for c in "▁" + text.replace(" ", "▁"):
        tokens += [ids[c]] if c in ids else [3 + b for b in c.encode()]
    while True:
        best = None
        for at in range(len(tokens) - 1):
            merged = ids.get(pieces[tokens[at]][0] + pieces[tokens[at + 1]][0])
            if merged is not None and (best is None or pieces[merged][1] > pieces[best[1]][1]):
                best = (at, merged)
        if best is None:
            return [1, *tokens]
        tokens[best[0] : best[0] + 2] = [best[1]]


BYTE_PIECES = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((f"<0x{b:02X}>", 0.0) for b in range(256))]


def fixture_pieces():
    merged = "▁t he ▁a nd ▁the ▁s ▁w ed ing ▁and ▁th in ▁wa ▁was er ▁there".split()
    letters = list("▁etaonhisdrlumwgcyfp.b,kT")
    return BYTE_PIECES + [(piece, -float(i)) for i, piece in enumerate(merged + letters)]


TEXTS = [
    "the cat was there and the end",
    "  Two spaces,  a tab\tand a line\nbreak",
    "The tea éà 漢字 🦊 wedding",
    "there thethe inging T",
    "",
]


def make(name, seed, n_kv_heads, tied):
    torch.manual_seed(seed)
    pieces = fixture_pieces()
    args = {
        **{"dim": 16, "hidden_dim": 20, "n_layers": 2, "n_heads": 2, "n_kv_heads": n_kv_heads},
        **{"vocab_size": len(pieces), "max_seq_len": 24, "norm_eps": 1e-5},
    }
    kv = 8 * n_kv_heads
    sizes = {"attention.wq": (16, 16), "attention.wk": (kv, 16), "attention.wv": (kv, 16), "attention.wo": (16, 16)}
    sizes |= {"feed_forward.w1": (20, 16), "feed_forward.w2": (16, 20), "feed_forward.w3": (20, 16)}
    model = {"tok_embeddings.weight": torch.randn(len(pieces), 16) * 0.7}
    for i in range(2):
        for n in MATRICES:
            w = torch.randn(sizes[n]) * 0.5 if n in sizes else 1 + 0.3 * torch.randn(16)
            model[f"layers.{i}.{n}.weight"] = w
    model["norm.weight"] = 1 + 0.3 * torch.randn(16)
    if not tied:
        model["output.weight"] = torch.randn(len(pieces), 16) * 0.5
    out = OUT / name
    write_all(out, model, args, pieces)
    tokens = torch.randint(0, len(pieces), (2, 24))
    save_file({"tokens": tokens.int(), "logits": logits(model, args, tokens).float()}, out / "logits.safetensors")
    ids = [{"text": text, "ids": encode(pieces, text)} for text in TEXTS if text]
    (out / "encodings.json").write_text(json.dumps(ids))


def write_all(out, model, args, pieces):
    out.mkdir(parents=True, exist_ok=True)
    write_pt(out / "model.pt", model, args)
    write_bin(out / "legacy.bin", model, args, 0)
    write_bin(out / "version1.bin", model, args, 1)
    write_tokenizer_bin(out / "tokenizer.bin", pieces)
    write_sentencepiece(out / "tokenizer.model", pieces)


def from_folder(folder):
    """A Hugging Face folder of this kind in llama2.c's terms. Scores: tokens were numbered in the order of merging."""
    config = json.loads((folder / "config.json").read_text())
    args = {
        **{"dim": config["hidden_size"], "hidden_dim": config["intermediate_size"]},
        **{"n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"]},
        **{"n_kv_heads": config["num_key_value_heads"], "vocab_size": config["vocab_size"]},
        **{"max_seq_len": config["max_position_embeddings"], "norm_eps": config["rms_norm_eps"]},
    }
    stored = load_file(folder / "model.safetensors")
    model = {"tok_embeddings.weight": stored["model.embed_tokens.weight"], "norm.weight": stored["model.norm.weight"]}
    for i in range(args["n_layers"]):
        for own, hub in MATRICES.items():
            w = stored[f"model.layers.{i}.{hub}.weight"]
            heads = {"attention.wq": args["n_heads"], "attention.wk": args["n_kv_heads"]}.get(own)
            model[f"layers.{i}.{own}.weight"] = pairs_from_halves(w, heads) if heads else w
    if "lm_head.weight" in stored:
        model["output.weight"] = stored["lm_head.weight"]
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = [(piece, -float(max(0, i - 259))) for piece, i in sorted(vocab.items(), key=lambda item: item[1])]
    return model, args, pieces


def compare(a, b):
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    (x, y) = (load_file(folder / "model.safetensors") for folder in (a, b))
    same = x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)
    print(f"tensors: {len(x)} and {len(y)}, {'equal bit by bit' if same else 'DIFFERENT'}")
    corpus = a / "corpus.txt"
    lines = corpus.read_text().splitlines() if corpus.exists() else TEXTS
    lines += [*TEXTS, *(c for c in map(chr, range(32, 0x250)))]
    (s, t) = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (a, b))
    different = sum(s.encode(line).ids != t.encode(line).ids for line in lines)
    print(f"token ids: {different} of {len(lines)} texts differ")
    model, args, _ = from_folder(b)
    tokens = torch.tensor([s.encode(line).ids[:64] for line in lines if len(s.encode(line).ids) >= 64][:8])
    if not len(tokens):
        tokens = torch.randint(0, args["vocab_size"], (8, 24))
    expected = logits(model, args, tokens)
    with torch.no_grad():
        hub = LlamaForCausalLM.from_pretrained(b, dtype=torch.float32)
        found = hub(tokens).logits
        for layer, i in zip(hub.model.layers, range(99)):
            layer.self_attn.q_proj.weight.copy_(model[f"layers.{i}.attention.wq.weight"])
            layer.self_attn.k_proj.weight.copy_(model[f"layers.{i}.attention.wk.weight"])
        unpermuted = hub(tokens).logits
    print(f"logits of transformers and of llama2.c's rotation: largest difference {(found - expected).abs().max():.2g}")
    print(f"the same without the permutation: {(unpermuted - expected).abs().max():.2g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path, nargs=2)
    options = parser.parse_args()
    if options.compare:
        compare(*options.compare)
    elif options.folder:
        write_all(options.out, *from_folder(options.folder))
    else:
        make("tied", 0, n_kv_heads=1, tied=True)
        make("untied", 1, n_kv_heads=2, tied=False)
