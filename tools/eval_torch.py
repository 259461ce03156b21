"""The deterministic evaluation of a run by tools/reference.py: what `eval --run DIR` must agree with.

    python tools/eval_torch.py --run DIR --eval-data rows.json

Reads DIR/config.json and DIR/components.safetensors, the model they name, and rows of equal length
([[ids], ...]), which are evaluated as one batch. Prints one JSON object under the original's metric
names: L0, KL and CE under the ci, unmasked, rounded and zero masks, ce_target, the hidden
activations under the CI masks, FaithfulnessLoss, and ImportanceMinimalityLoss (p at its end value
unless --p says otherwise, R = 1). kl_alive is its own: these rows decide who is dead, training rows do in `eval`.
"""

import argparse
import json
from pathlib import Path

import torch
from reference import Config, Decomposition, evaluate, load_target, make_modules
from safetensors.torch import load_file


def model_folder(run: Path, path: str) -> Path:
    """The model's folder as config.json has it: absolute, or relative to here or to the run folder."""
    folders = [Path(path), run / path]
    for folder in folders:
        if (folder / "config.json").exists():
            return folder
    raise SystemExit(f"no model in {' or '.join(map(str, folders))}; name its folder with --model")


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluates a run folder with PyTorch")
    parser.add_argument(
        "--run", type=Path, required=True, help="folder with config.json and components.safetensors"
    )
    parser.add_argument("--eval-data", type=Path, required=True, help="JSON rows of token ids, equally long")
    parser.add_argument("--model", help="the target's folder, if it is not where config.json says")
    parser.add_argument("--rows", type=int, help="only the first so many rows")
    parser.add_argument(
        "--p", type=float, help="exponent of ImportanceMinimalityLoss (default: the run's pEnd)"
    )
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float64")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)

    record = json.loads((args.run / "config.json").read_text())
    cfg = Config.from_json(record["config"])
    target = load_target(args.model or model_folder(args.run, record["model"]["path"]), dtype)
    modules = make_modules(target, {path: module["C"] for path, module in record["modules"].items()})
    params = {name: t.to(dtype) for name, t in load_file(args.run / "components.safetensors").items()}
    tokens = torch.tensor(json.loads(args.eval_data.read_text()))[: args.rows]

    with torch.no_grad():
        p = cfg.p_end if args.p is None else args.p
        metrics = evaluate(Decomposition(target, modules, cfg), params, tokens, p)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
