"""Writes fixtures/models/: small random checkpoints, and the logits the `transformers` library computes from them.

  python3 tools/make_model_fixtures.py      (needs torch, transformers 5 and safetensors)

The configs are written by hand in the forms checkpoints on the Hub have: Llama 1 with next to nothing, the
`rope_theta` and `rope_scaling` of transformers 4, the `rope_parameters` of transformers 5, buffers of old
versions among the weights, GPT-2 with and without the prefix, sharded files, all float types. Every logits
file comes from loading the written folder back in float32, so the folder alone is the test. Norms have an eps
of 0.01 and weights are large, so that a wrong eps, activation or rotation shows in the logits.
"""

import json
import re
import shutil
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

OUT = Path(__file__).parent / "fixtures" / "models"
VOCAB = 61  # a prime: no dimension is mistaken for another
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.01,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_ctx": 32,
    "n_embd": 24,
    "n_head": 3,
    "n_layer": 2,
    "n_positions": 32,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 0.01,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 0.01,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}

# name: (config.json, float type of the file)
MODELS = {
    # Llama 1 on the Hub: no rope_theta, no key-value heads, no head_dim; old files carry rotary_emb.inv_freq
    "llama": ({**LLAMA, "tie_word_embeddings": False, "torch_dtype": "float16"}, "float16"),
    "llama-linear": (
        {
            **LLAMA,
            "num_key_value_heads": 3,
            "attention_bias": True,
            "mlp_bias": True,
            "pretraining_tp": 1,
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
        },
        "float32",
    ),
    "llama3": (
        {
            **LLAMA,
            "hidden_size": 32,
            "max_position_embeddings": 512,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": 10000.0,
            "rope_scaling": {**LLAMA3_ROPE, "rope_type": "llama3"},
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        "bfloat16",
    ),
    "llama3-tf5": (
        {
            **LLAMA,
            "hidden_size": 32,
            "max_position_embeddings": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 20000.0, "rope_type": "llama3"},
            "tie_word_embeddings": True,
            "dtype": "float32",
        },
        "float32",
    ),
    "mistral": (
        {
            **LLAMA,
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        "bfloat16",
    ),
    "qwen2": (
        {
            **LLAMA,
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_window_layers": 2,
            "rope_theta": 1000000.0,
            "sliding_window": 32,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        "bfloat16",
    ),
    "qwen3": (
        {
            **LLAMA,
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 10,
            "attention_bias": False,
            "layer_types": ["full_attention", "full_attention"],
            "max_window_layers": 2,
            "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "dtype": "float32",
        },
        "float32",
    ),
    "smollm": (
        {
            **LLAMA,
            "num_key_value_heads": 1,
            "attention_bias": False,
            "is_llama_config": True,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        "bfloat16",
    ),
    # as openai-community/gpt2: bare names, the causal mask as a buffer, nothing said about tying
    "gpt2": ({**GPT2, "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}, "float32"),
    "gpt2-prefixed": (
        {
            **GPT2,
            "n_inner": 40,
            "activation_function": "gelu_pytorch_tanh",
            "tie_word_embeddings": False,
            "dtype": "float64",
        },
        "float64",
    ),
    # as EleutherAI/pythia-*: embed_out, boolean masks and inv_freq buffers among the weights
    "pythia": (
        {
            **NEOX,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_parallel_residual": True,
        },
        "float16",
    ),
    "gpt-neox-sequential": (
        {
            **NEOX,
            "hidden_act": "gelu_fast",
            "attention_bias": True,
            "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5000, "rope_type": "default"},
            "tie_word_embeddings": False,
            "dtype": "float32",
            "use_parallel_residual": False,
        },
        "float32",
    ),
}

ORIGINAL_YAML = {
    "attn_bias": "false",
    "block_size": 64,
    "flash_attention": "true",
    "mlp_bias": "false",
    "model_type": "LlamaSimpleMLP",
    "n_ctx": 64,
    "n_embd": LLAMA["hidden_size"],
    "n_head": LLAMA["num_attention_heads"],
    "n_intermediate": LLAMA["intermediate_size"],
    "n_key_value_heads": 1,
    "n_layer": LLAMA["num_hidden_layers"],
    "rms_norm_eps": LLAMA["rms_norm_eps"],
    "rotary_adjacent_pairs": "false",
    "rotary_base": 10000,
    "rotary_dim": LLAMA["hidden_size"] // LLAMA["num_attention_heads"],
    "use_grouped_query_attention": "true",
    "vocab_size": VOCAB,
}


def randomise(model: nn.Module) -> None:
    """Weights at which every part of the model matters: spread attention, norms far from 1, biases far from 0."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            embedding = re.search(r"embed|wte|wpe", name) is not None
            nn.init.normal_(p, std=1.0 if embedding else 1.5 / p.shape[-1] ** 0.5)
        elif name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
        else:
            nn.init.uniform_(p, 0.5, 1.5)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(1.5 / head.std() / head.shape[1] ** 0.5)  # logits of a few units, tied or not


def old_buffers(name: str) -> dict[str, torch.Tensor]:
    """What older versions of the library saved beside the parameters; a loader must pass over it."""
    mask = torch.ones(1, 1, 16, 16).tril()
    if name == "llama":
        return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
    if name == "gpt2":
        return {f"h.{i}.attn.bias": mask.clone() for i in range(2)}
    if name == "pythia":
        layer = {"bias": mask.bool(), "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.rand(2)}
        return {f"gpt_neox.layers.{i}.attention.{k}": v.clone() for i in range(2) for k, v in layer.items()}
    return {}


def hub_name(model: str, name: str) -> str:
    """The name a parameter has in the files on the Hub."""
    if model == "gpt2":
        return name.removeprefix("transformer.")
    return "embed_out.weight" if model == "pythia" and name == "lm_head.weight" else name


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor], shards: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {
        n: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for i, n in enumerate(names)
    }
    for file in set(weight_map.values()):
        part = {n: t for n, t in tensors.items() if weight_map[n] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_logits(folder: Path, model: nn.Module) -> None:
    tokens = torch.randint(0, VOCAB, (2, 24), dtype=torch.int32)
    with torch.no_grad():
        logits = model.eval()(tokens.long()).logits.float()
    print(
        f"{folder.name:22} logits std {logits.std():.2f}  {sum(f.stat().st_size for f in folder.iterdir()):7} bytes"
    )
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "logits.safetensors")


def seed(name: str) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))


def parameters(model: nn.Module, dtype: torch.dtype, rename) -> dict[str, torch.Tensor]:
    """The parameters as the file has them; named_parameters lists a tied head once, as the embedding."""
    return {rename(n): p.detach().to(dtype).contiguous() for n, p in model.named_parameters()}


def transformers_fixture(name: str, config: dict, dtype: str) -> None:
    seed(name)
    folder, file_dtype = OUT / name, getattr(torch, dtype)
    settings = AutoConfig.for_model(**json.loads(json.dumps(config)))
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float64)
    randomise(model)
    tensors = parameters(model, file_dtype, lambda n: hub_name(name, n))
    for n, t in old_buffers(name).items():
        tensors[n] = t if t.dtype == torch.bool else t.to(file_dtype)
    write(folder, config, tensors, shards=3 if name == "mistral" else 1)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"], info
    write_logits(folder, loaded)


class SimpleMLP(nn.Module):
    def __init__(self, d: int, hidden: int):
        super().__init__()
        self.c_fc = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))


def llama_simple_mlp_fixture() -> None:
    """The paper's architecture is Llama with an ungated MLP and names of its own (wte, h, ln_f)."""
    name = "llama_simple_mlp"
    seed(name)
    llama = {**LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**llama), attn_implementation="eager")
    for layer in model.model.layers:
        layer.mlp = SimpleMLP(llama["hidden_size"], llama["intermediate_size"])
    randomise(model)
    names = {
        "model.embed_tokens": "wte",
        "model.norm": "ln_f",
        "model.layers": "h",
        "self_attn": "attn",
        "input_layernorm": "rms_1",
        "post_attention_layernorm": "rms_2",
    }

    def rename(n: str) -> str:
        for old, new in names.items():
            n = n.replace(old, new)
        return n

    tensors = parameters(model, torch.float32, rename)
    tensors["lm_head.weight"] = tensors[
        "wte.weight"
    ].clone()  # the original's files name the tied tensor twice
    write(
        OUT / name,
        {**llama, "architectures": ["LlamaSimpleMLP"], "model_type": name, "hidden_act": "gelu_pytorch_tanh"},
        tensors,
        1,
    )
    write_logits(OUT / name, model)
    original = OUT / f"{name}-original"  # the same model as the original's trainer leaves it
    write(original, {}, tensors, 1)
    (original / "model.safetensors").rename(original / "model_step_7.safetensors")
    (original / "config.json").unlink()
    (original / "model_config.yaml").write_text("".join(f"{k}: {v}\n" for k, v in ORIGINAL_YAML.items()))
    shutil.copy(OUT / name / "logits.safetensors", original)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for fixture, (settings, file_type) in MODELS.items():
        transformers_fixture(fixture, settings, file_type)
    llama_simple_mlp_fixture()
