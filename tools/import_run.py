"""
Reads a PyTorch checkpoint of the original (model_<n>.pth of its full code: components and the shared CI transformer) into
a run folder that eval, harvest and postprocess take; and writes a run of ours as such a checkpoint.

  python tools/import_run.py model_400000.pth --config final_config.yaml --target-config DIR --data D --out RUN
  python tools/import_run.py --export RUN --out model_0.pth

--target-config: a folder with the target's config.json (or the original's model_config.yaml) and its tokenizer.json; the
weights come from the checkpoint itself and are written to RUN/target. Needs torch, and Node for the last line (the
target's hash). Memory: tensor by tensor; the checkpoint is mapped, not read.

Names in the original's state dict, and ours:
  _components.<module path, - for .>.V [dIn, C], .U [C, dOut]       components.<module path>.V, .U
  ci_fn._global_ci_fn._input_projector.W [sum dIn, d], .b           ci_fn.proj_in.weight (transposed), .bias
  ci_fn._global_ci_fn._blocks.<i>.attn.{q,k,v,out}_proj.weight      ci_fn.blocks.<i>.attn.{q,k,v,o}_proj.weight
  ci_fn._global_ci_fn._blocks.<i>.mlp.{0,2}.W, .b                   ci_fn.blocks.<i>.mlp.{0,2}.weight (transposed), .bias
  ci_fn._global_ci_fn._output_head.W [d, sum C], .b                 ci_fn.proj_out.weight (transposed), .bias
  target_model.<name>                                               <name>, in the target's model.safetensors
Both sort modules by path, so that wide tensors have the same order.
"""

import argparse
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
CI = "ci_fn._global_ci_fn."
# what no forward needs: tables that can be made anew
BUFFERS = re.compile(r"(rotary_(sin|cos|emb\.inv_freq)|\.inv_freq|attn\.(bias|masked_bias))$")


class BadInput(Exception):
    pass


def our_name(name: str) -> tuple[str, bool] | None:
    """Our name of a tensor of the original, and whether it is stored transposed. None: not needed. Raises BadInput."""
    if m := re.fullmatch(r"_components\.([\w-]+)\.([VU])", name):
        return f"components.{m[1].replace('-', '.')}.{m[2]}", False
    if not name.startswith(CI) or BUFFERS.search(name):
        return None if not name.startswith("ci_fn.") or BUFFERS.search(name) else fail_layerwise(name)
    rest = name.removeprefix(CI)
    for theirs, ours in (("_input_projector", "proj_in"), ("_output_head", "proj_out")):
        if rest in (f"{theirs}.W", f"{theirs}.b"):
            return f"ci_fn.{ours}.{'weight' if rest.endswith('W') else 'bias'}", rest.endswith("W")
    if m := re.fullmatch(r"_blocks\.(\d+)\.attn\.(q|k|v|out)_proj\.weight", rest):
        return f"ci_fn.blocks.{m[1]}.attn.{m[2][0]}_proj.weight", False
    if m := re.fullmatch(r"_blocks\.(\d+)\.mlp\.([02])\.(W|b)", rest):
        return f"ci_fn.blocks.{m[1]}.mlp.{m[2]}.{'weight' if m[3] == 'W' else 'bias'}", m[3] == "W"
    raise BadInput(f"{name}: a CI function of another kind; takes the shared transformer with one hidden layer a block")


def fail_layerwise(name: str):
    raise BadInput(f"{name}: a CI function for each layer; takes the shared transformer (global_shared_transformer)")


def their_name(name: str) -> tuple[str, bool]:
    """The original's name of a tensor of ours, and whether it is stored transposed."""
    if m := re.fullmatch(r"components\.(.+)\.([VU])", name):
        return f"_components.{m[1].replace('.', '-')}.{m[2]}", False
    rest = name.removeprefix("ci_fn.")
    kind = "W" if rest.endswith("weight") else "b"
    if m := re.fullmatch(r"proj_(in|out)\.\w+", rest):
        return f"{CI}{'_input_projector' if m[1] == 'in' else '_output_head'}.{kind}", kind == "W"
    if m := re.fullmatch(r"blocks\.(\d+)\.attn\.([qkvo])_proj\.weight", rest):
        return f"{CI}_blocks.{m[1]}.attn.{'out' if m[2] == 'o' else m[2]}_proj.weight", False
    m = re.fullmatch(r"blocks\.(\d+)\.mlp\.([02])\.\w+", rest)
    if m is None:
        raise BadInput(f"{name}: no tensor of a run")
    return f"{CI}_blocks.{m[1]}.mlp.{m[2]}.{kind}", kind == "W"


def write_safetensors(file: Path, tensors: list[tuple[str, torch.Tensor, bool]]) -> None:
    """Float32, one tensor in memory at a time; written beside and renamed."""
    header, offset = {}, 0
    for name, tensor, transposed in tensors:
        shape = list(tensor.shape)[:: -1 if transposed else 1]
        size = 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    beside = file.with_suffix(".tmp")
    with beside.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _, tensor, transposed in tensors:
            stored = tensor.T if transposed else tensor
            out.write(stored.to(torch.float32).contiguous().numpy().tobytes())
    beside.rename(file)


def mapped_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """Its tensors, mapped: read from the disk where they are used."""
    with file.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    types = {"F32": (np.float32, torch.float32), "F16": (np.float16, torch.float16), "BF16": (np.int16, torch.bfloat16)}
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in types:
            raise BadInput(f"{file}: {name} is {entry['dtype']}; takes {', '.join(types)}")
        kind, dtype = types[entry["dtype"]]
        begin = 8 + length + entry["data_offsets"][0]
        data = np.memmap(file, kind, "c", offset=begin, shape=tuple(entry["shape"]))  # "c": never written back
        tensors[name] = torch.from_numpy(data).view(dtype) if kind is np.int16 else torch.from_numpy(data)
    return tensors


def find_key(value, key: str):
    """The first value of a key anywhere in nested dictionaries and lists."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    if isinstance(value, dict) and value.get(key) is not None:
        return value[key]
    return next((found for v in inside if (found := find_key(v, key)) is not None), None)


def read_yaml(file: str | None) -> dict:
    if file is None:
        return {}
    import yaml

    return yaml.safe_load(Path(file).read_text()) or {}


def import_run(args: argparse.Namespace) -> None:
    if not (args.checkpoint and args.target_config and args.data):
        raise BadInput("takes a checkpoint, --target-config, --data and --out (or --export RUN and --out)")
    out = Path(args.out)
    if (out / "config.json").exists():
        raise BadInput(f"{out}: holds a run; take another --out")
    state = torch.load(args.checkpoint, map_location="cpu", mmap=True, weights_only=True)
    original = read_yaml(args.config)
    attention = find_key(original, "attn_config") or {}
    heads = args.ci_heads or attention.get("n_heads")
    if heads is None:
        raise BadInput("the CI transformer's heads can't be read off its weights: takes --config, or --ci-heads")

    tensors = {}
    for name, tensor in state.items():
        if not name.startswith("target_model.") and (named := our_name(name)):
            tensors[named[0]] = (tensor, named[1])
    paths = sorted({m[1] for name in tensors if (m := re.fullmatch(r"components\.(.+)\.[VU]", name))})
    blocks = 1 + max((int(m[1]) for name in tensors if (m := re.match(r"ci_fn\.blocks\.(\d+)\.", name))), default=-1)
    ci_order = ["proj_in.weight", "proj_in.bias"]
    for i in range(blocks):
        ci_order += [f"blocks.{i}.attn.{p}_proj.weight" for p in "qkvo"]
        ci_order += [f"blocks.{i}.mlp.{j}.{kind}" for j in (0, 2) for kind in ("weight", "bias")]
    ci_order += ["proj_out.weight", "proj_out.bias"]
    order = [f"components.{path}.{m}" for path in paths for m in "VU"] + [f"ci_fn.{name}" for name in ci_order]
    if set(order) != set(tensors):
        missing, odd = sorted(set(order) - set(tensors)), sorted(set(tensors) - set(order))
        raise BadInput(f"{args.checkpoint}: lacks {missing[:3]}, has {odd[:3]} beside")
    shape = {name: list(t.shape)[:: -1 if transposed else 1] for name, (t, transposed) in tensors.items()}
    modules = {
        path: {
            "dIn": shape[f"components.{path}.V"][0],
            "dOut": shape[f"components.{path}.U"][1],
            "C": shape[f"components.{path}.V"][1],
        }
        for path in paths
    }
    width = shape["ci_fn.proj_in.weight"][0]
    for name, wanted in (
        ("ci_fn.proj_in.weight", [width, sum(m["dIn"] for m in modules.values())]),
        ("ci_fn.proj_out.weight", [sum(m["C"] for m in modules.values()), width]),
    ):
        if shape[name] != wanted:
            raise BadInput(f"{args.checkpoint}: {name} is {shape[name]}, the components imply {wanted}")

    target = {n.removeprefix("target_model."): t for n, t in state.items() if n.startswith("target_model.")}
    target = {n: t for n, t in target.items() if not BUFFERS.search(n)}
    if not target:
        raise BadInput(f"{args.checkpoint}: has no target_model tensors")
    (out / "target").mkdir(parents=True, exist_ok=True)
    copied = [f for f in Path(args.target_config).iterdir() if f.suffix in (".json", ".yaml", ".model")]
    for file in copied:
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / "target" / file.name)
    write_safetensors(out / "target" / "model.safetensors", [(n, t, False) for n, t in target.items()])
    write_safetensors(out / "components.safetensors", [(name, *tensors[name]) for name in order])

    node = ["npx", "tsx", "tools/target-sha.ts", str((out / "target").resolve())]
    hashed = subprocess.run(node, cwd=REPOSITORY, capture_output=True, text=True)
    if hashed.returncode != 0:
        raise BadInput(f"the target in {out / 'target'}: {hashed.stderr.strip().splitlines()[-1]}")
    known = json.loads(hashed.stdout)
    data = Path(args.data).read_bytes()
    config = {
        "model": str(out / "target"),
        "data": args.data,
        **({"evalData": args.eval_data} if args.eval_data else {}),
        "components": ",".join(f"{path}={m['C']}" for path, m in modules.items()),
        "seqLen": args.seq_len or known["context"],
        "batchSize": 2,
        "evalBatchSize": 2,
        "ciDModel": width,
        "ciNBlocks": blocks,
        "ciNHeads": heads,
        "ciMlpHidden": shape["ci_fn.blocks.0.mlp.0.weight"][0],
        "ciRopeBase": attention.get("rope_base", 10000),
    }
    record = {
        "formatVersion": 1,
        "config": config,
        "model": {"path": config["model"], "type": known["type"], "sha256": known["sha256"]},
        "data": {"path": args.data, "sha256": hashlib.sha256(data).hexdigest()},
        "modules": modules,
        "engine": {"name": "pytorch", "description": "imported from the original's checkpoint"},
        "versions": {"torch": torch.__version__},
        "command": ["import_run.py", Path(args.checkpoint).name],
    }
    (out / "config.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(modules)} modules, {sum(m['C'] for m in modules.values())} components: {out}")


def export_run(args: argparse.Namespace) -> None:
    run = Path(args.export)
    config = json.loads((run / "config.json").read_text())
    model = Path(args.model or config["config"]["model"])
    state = {}
    for name, tensor in mapped_safetensors(run / "components.safetensors").items():
        theirs, transposed = their_name(name)
        state[theirs] = tensor.T if transposed else tensor
    files = sorted(model.glob("model*.safetensors"))
    if not files:
        raise BadInput(f"{model}: no safetensors files of the target; takes --model DIR")
    for file in files:
        for name, tensor in mapped_safetensors(file).items():
            state[f"target_model.{name}"] = tensor
    torch.save(state, args.out)
    c = config["config"]
    original = {
        "ci_config": {
            "mode": "global",
            "fn_type": "global_shared_transformer",
            "simple_transformer_ci_cfg": {
                "d_model": c["ciDModel"],
                "n_blocks": c["ciNBlocks"],
                "mlp_hidden_dim": [c["ciMlpHidden"]],
                "attn_config": {"n_heads": c["ciNHeads"], "max_len": 2048, "rope_base": float(c["ciRopeBase"])},
            },
        },
        "sigmoid_type": "leaky_hard",
        "module_info": [{"module_pattern": path, "C": m["C"]} for path, m in config["modules"].items()],
    }
    beside = Path(args.out).with_name("final_config.yaml")
    beside.write_text(json.dumps(original, indent=1) + "\n")  # JSON is YAML
    print(f"{len(state)} tensors: {args.out}, and {beside}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="model_<n>.pth")
    parser.add_argument("--config", help="the original's final_config.yaml")
    parser.add_argument("--ci-heads", type=int, help="heads of the CI transformer, without --config")
    parser.add_argument("--target-config", help="folder with the target's config and tokenizer")
    parser.add_argument("--data", help="what the run's --data shall be: .txt, .jsonl, .json rows")
    parser.add_argument("--eval-data", help="and its --eval-data")
    parser.add_argument("--seq-len", type=int, help="tokens in a row; default: the target's longest")
    parser.add_argument("--export", help="a run folder of ours, to be written as a checkpoint")
    parser.add_argument("--model", help="with --export: where the target is, if it has moved")
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv)
    try:
        export_run(args) if args.export else import_run(args)
    except (BadInput, OSError) as error:
        print(f"import_run: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
