"""Writes tools/fixtures/muon.json: four steps of torch.optim.Muon (PyTorch 2.9 or later), and of Adam for a bias.

    python tools/make_muon_fixture.py

Momentum 0.9, not Nesterov's, no weight decay, steps that match AdamW's mean square. PyTorch orthogonalizes in bfloat16;
here that cast is left out, so that the answers are float32's.
"""

import json
from pathlib import Path

import torch

LR = 0.03
# wide, tall (its first gradient of rank one: all but one singular value are 0), square, a row, and a bias
SHAPES = {
    "components.a.V": [5, 9],
    "components.a.U": [9, 4],
    "ci_fn.proj_in.weight": [6, 6],
    "ci_fn.proj_out.weight": [1, 7],
    "ci_fn.proj_out.bias": [7],
}

torch.manual_seed(0)
params = {name: torch.randn(shape).requires_grad_() for name, shape in SHAPES.items()}
grads = [{name: torch.randn(shape) for name, shape in SHAPES.items()} for _ in range(4)]
grads[0]["components.a.U"] = torch.outer(torch.randn(9), torch.randn(4))
start = {name: p.detach().clone() for name, p in params.items()}

torch.bfloat16 = torch.float32  # see above
matrices = [p for p in params.values() if p.ndim == 2]
muon = torch.optim.Muon(
    matrices, lr=LR, weight_decay=0, momentum=0.9, nesterov=False, adjust_lr_fn="match_rms_adamw"
)
adam = torch.optim.Adam([p for p in params.values() if p.ndim == 1], lr=LR)
after = []
for step in grads:
    for name, p in params.items():
        p.grad = step[name].clone()
    muon.step()
    adam.step()
    after.append({name: p.detach().clone() for name, p in params.items()})


def plain(tensors):
    return {name: [round(x, 7) for x in t.flatten().tolist()] for name, t in tensors.items()}


content = {
    "torch": torch.__version__.split("+")[0],
    "lr": LR,
    "shapes": SHAPES,
    "start": plain(start),
    "gradients": [plain(g) for g in grads],
    "after": [plain(a) for a in after],
}
(Path(__file__).parent / "fixtures" / "muon.json").write_text(json.dumps(content) + "\n")
