"""Prompt graphs by PyTorch: autograd on the literal formula, in float64. The referee of postprocess/graph.ts.

    python tools/graph_torch.py check --run DIR --graph graph.json [--strongest 100]
    python tools/graph_torch.py fixture              writes tools/fixtures/graphs/ from tools/fixtures/method/

Every decomposed layer is y = stop(a) U + x Δᵀ + b with a = x V. For a target (a component's a at a position, or a
logit minus the mean logit) the edge from a component is the gradient at its stopped a, times a; from an embedding the
gradient times the embedding, summed. `check` reads what `graph --json` printed, works out every edge between its
nodes, and prints as JSON how far the strongest ones differ, and how far central finite differences of the stopped
activations differ from them. Its exit code is 1 if one differs by more than 1e-3.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from eval_torch import model_folder
from reference import NAMES, Config, Decomposition, load_target, make_modules, target_forward
from safetensors.torch import load_file

Edge = tuple[int, int, float]


class Form:
    """The cut forward of one text; its leaves are the stopped activations [S, C] and the embeddings [S, d]."""

    def __init__(self, d: Decomposition, params: dict, tokens: list[int]):
        self.d, self.params = d, params
        self.delta = {
            m.path: d.target.weights[m.path + ".weight"].T
            - params[f"components.{m.path}.V"] @ params[f"components.{m.path}.U"]
            for m in d.modules
        }
        self.embed = NAMES[d.target.type].embed + ".weight"
        self.leaves = {"": d.target.weights[self.embed][torch.tensor(tokens)].clone()}
        self.S = len(tokens)
        self.forward(record=True)
        for leaf in self.leaves.values():
            leaf.requires_grad_(True)

    def forward(self, record: bool = False):
        """-> (a of every module before it is stopped, logits)"""
        acts = {}
        own = self.d.target.weights

        def linear(path, x):
            bias = own.get(path + ".bias")
            if path not in self.delta:
                y = x @ own[path + ".weight"].T
                return y if bias is None else y + bias
            acts[path] = x @ self.params[f"components.{path}.V"]
            if record:
                self.leaves[path] = acts[path].detach().clone()
            y = self.leaves[path] @ self.params[f"components.{path}.U"] + x @ self.delta[path]
            return y if bias is None else y + bias

        before = own[self.embed]
        own[self.embed] = self.leaves[""]  # a table with a row per position
        try:
            logits = target_forward(self.d.target, torch.arange(self.S)[None], linear)
        finally:
            own[self.embed] = before
        return acts, logits


def value_of(node: dict, acts: dict, logits: torch.Tensor) -> torch.Tensor:
    t = node["position"]
    return logits[t, node["output"]] - logits[t].mean() if "output" in node else acts[node["module"]][t, node["index"]]


def crosses(source: str, target: str) -> bool:
    """Keys and values of an attention reach its o from earlier positions."""
    attention, _, part = source.rpartition(".")
    return part in ("k_proj", "v_proj") and target == f"{attention}.o_proj"


def all_edges(form: Form, nodes: list[dict]) -> list[Edge]:
    acts, logits = form.forward()
    names = list(form.leaves)
    edges: list[Edge] = []
    sources = [n for n in nodes if "output" not in n]
    for node in nodes:
        if "embedding" in node:
            continue
        value = value_of(node, acts, logits)
        grads = torch.autograd.grad(value, list(form.leaves.values()), retain_graph=True, allow_unused=True)
        for source in sources:
            path = source.get("module", "")
            s, t = source["position"], node["position"]
            grad = grads[names.index(path)]
            if grad is None or not (s == t or (s < t and crosses(path, node.get("module", "")))):
                continue
            leaf = form.leaves[path].detach()
            weight = (grad[s] * leaf[s]).sum() if "embedding" in source else grad[s, source["index"]] * leaf[s, source["index"]]
            if weight != 0:
                edges.append((source["id"], node["id"], weight.item()))
    return edges


def finite_difference(form: Form, source: dict, node: dict) -> float:
    """Of the target along the source's activation (or embedding), by relative steps of 1e-4."""
    leaf = form.leaves[source.get("module", "")]
    at = (source["position"],) if "embedding" in source else (source["position"], source["index"])
    values = []
    with torch.no_grad():
        old = leaf[at].clone()
        for step in (1e-4, -1e-4):
            leaf[at] = old * (1 + step)
            values.append(value_of(node, *form.forward()).item())
        leaf[at] = old
    return (values[0] - values[1]) / 2e-4


def check(args) -> int:
    record = json.loads((args.run / "config.json").read_text())
    target = load_target(args.model or model_folder(args.run, record["model"]["path"]), torch.float64)
    modules = make_modules(target, {path: module["C"] for path, module in record["modules"].items()})
    params = {name: t.double() for name, t in load_file(args.run / "components.safetensors").items()}
    graph = json.loads(args.graph.read_text())
    if "graphs" in graph:
        graph = graph["graphs"][args.index]
    form = Form(Decomposition(target, modules, Config.from_json(record["config"])), params, graph["tokens"])
    nodes = graph["nodes"]
    reference = sorted(all_edges(form, nodes), key=lambda e: -abs(e[2]))
    ours = {(a, b): w for a, b, w in graph["edges"]}
    strongest = reference[: args.strongest]
    missing = [e for e in strongest if (e[0], e[1]) not in ours]
    errors = [abs(ours[a, b] - w) / abs(w) for a, b, w in strongest if (a, b) in ours]
    scale = abs(strongest[0][2])
    known = {(a, b): w for a, b, w in reference}
    unknown = [e for e, w in ours.items() if e not in known and abs(w) > 1e-6 * scale]
    rest = [abs(w - known[e]) / scale for e, w in ours.items() if e in known]
    differences = [
        abs(finite_difference(form, nodes[a], nodes[b]) - w) / abs(w) for a, b, w in strongest[: args.differences]
    ]
    result = {
        "nodes": len(nodes),
        "edges": len(ours),
        "edges of the reference": len(reference),
        f"strongest {len(strongest)}: largest relative error": max(errors),
        "of them missing": len(missing),
        "edges the reference lacks": len(unknown),
        "all edges: largest error / strongest edge": max(rest),
        "finite differences: largest relative error": max(differences, default=0.0),
    }
    print(json.dumps(result, indent=1))
    return int(bool(missing or unknown) or max(errors) > 1e-3 or max(differences, default=0) > 1e-3)


def fixture(_args) -> int:
    """All edges between all components, at every position, of the two tiny targets: Δ is large in both."""
    here = Path(__file__).parent / "fixtures"
    (here / "graphs").mkdir(exist_ok=True)
    for name in ("llama", "simple_mlp"):
        folder = here / "method" / name
        answers = json.loads((folder / "fixture.json").read_text())
        target = load_target(str(folder), torch.float64)
        modules = make_modules(target, {path: module["C"] for path, module in answers["modules"].items()})
        stored = load_file(folder / "fixture.safetensors")
        params = {key: t.double() for key, t in stored.items() if key.startswith(("components.", "ci_fn."))}
        tokens = answers["tokens"][0]
        g = stored["ci/g"][: len(tokens)].double()
        form = Form(Decomposition(target, modules, Config.from_json(answers["config"])), params, tokens)
        acts, logits = form.forward()
        nodes = [{"id": t, "position": t, "embedding": token} for t, token in enumerate(tokens)]
        place = {path.rsplit(".weight", 1)[0]: i for i, path in enumerate(network_order(target))}
        for t in range(len(tokens)):
            for m in sorted(modules, key=lambda m: place[m.path]):
                for c in range(m.C):
                    if g[t, m.offset + c] > 0:
                        nodes.append({"id": len(nodes), "position": t, "module": m.path, "index": c,
                                      "activation": acts[m.path][t, c].item()})
        for t in range(len(tokens)):
            probs = logits[t].softmax(-1)
            for token in probs.argsort(descending=True)[:15].tolist():
                if probs[token] > 0.01:
                    nodes.append({"id": len(nodes), "position": t, "output": token, "probability": probs[token].item()})
        edges = all_edges(form, nodes)
        content = {"tokens": tokens, "nodes": nodes, "edges": [[a, b, float(f"{w:.9g}")] for a, b, w in edges]}
        (here / "graphs" / f"{name}.json").write_text(json.dumps(content) + "\n")
    return 0


def network_order(target) -> list[str]:
    names = NAMES[target.type]
    order = []
    for i in range(target.n_layers):
        block = names.block.format(i)
        parts = [f"{names.attn}.{p}_proj" for p in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.c_fc", "mlp.down_proj"]
        order += [f"{block}.{part}.weight" for part in parts]
    return order


def main() -> None:
    parser = argparse.ArgumentParser(description="Checks prompt graphs with PyTorch")
    commands = parser.add_subparsers(required=True)
    checker = commands.add_parser("check")
    checker.add_argument("--run", type=Path, required=True, help="folder with config.json and components.safetensors")
    checker.add_argument("--graph", type=Path, required=True, help="what `graph --json` printed, or a graphs.json")
    checker.add_argument("--index", type=int, default=0, help="which graph of a graphs.json")
    checker.add_argument("--model", help="the target's folder, if it is not where config.json says")
    checker.add_argument("--strongest", type=int, default=100)
    checker.add_argument("--differences", type=int, default=40, help="how many of them by finite differences too")
    checker.set_defaults(job=check)
    commands.add_parser("fixture").set_defaults(job=fixture)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.exit(args.job(args))


if __name__ == "__main__":
    main()
