"""Prints what DSKDv2's own criterion gives on a toy: the numbers of `test_dual_space.py`.

    python tests/loss/oracles/dskdv2.py REPOSITORY

REPOSITORY is a clone of songmzhang/DSKDv2 (numbers made at 5025279). Run in float64: the criterion casts its softmax to
float32, so the numbers are float32's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch

FILES = ("cross_entropy_loss.py", "various_divergence.py", "dual_space_kd_v2.py")


def toy() -> dict[str, torch.Tensor]:
    """Numbers that anybody can make again: sines of squares."""

    def sines(*shape: int, step: float) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return 1.5 * torch.sin(step * torch.arange(1, count + 1, dtype=torch.float64) ** 2).reshape(shape)

    head = sines(11, 3, step=2.1)
    return {
        "hidden": sines(5, 3, step=0.7),
        "teacher_hidden": sines(5, 4, step=1.3),
        "head": head,
        "teacher_head": head @ sines(3, 4, step=1.9) + 0.5 * sines(11, 4, step=0.9),
    }


def criterion(repository: Path, arguments: types.SimpleNamespace):
    """Their class, from the files of the clone."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "criterions"
        package.mkdir()
        (package / "__init__.py").touch()
        for name in FILES:
            path = f"code/criterions/{name}"
            text = subprocess.run(["git", "-C", repository, "show", f"HEAD:{path}"], capture_output=True, check=True).stdout
            (package / name).write_bytes(text)
        sys.modules["utils"] = types.SimpleNamespace(print_rank=print)
        sys.path.insert(0, folder)
        from criterions.dual_space_kd_v2 import DualSpaceKDV2

        return DualSpaceKDV2(arguments)


def run(repository: Path, objective: str) -> dict[str, float]:
    numbers = toy()
    arguments = types.SimpleNamespace(
        label_smoothing=0.0, kd_rate=0.5, kd_temperature=2.0, teacher_temperature=1.0, kd_objective=objective,
        t2s_agreement=1.0, init_s2t_projector=True, topk_vocab=-1, only_stu_kd=False, only_tea_kd=False, skew_lambda=0.1,
    )  # fmt: skip

    def linear(weight: torch.Tensor) -> torch.nn.Linear:
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        module.weight.data.copy_(weight)
        return module

    head, teacher_head = linear(numbers["head"]), linear(numbers["teacher_head"])
    projector = torch.linalg.pinv(numbers["head"]) @ numbers["teacher_head"]
    distiller = types.SimpleNamespace(
        t2s_projector=linear(projector),
        student_model=types.SimpleNamespace(lm_head=head),
        teacher_model=types.SimpleNamespace(lm_head=teacher_head),
        part_teacher_head_pinv=torch.linalg.pinv(numbers["teacher_head"].T),
        args=arguments,
    )
    hidden = numbers["hidden"].clone().requires_grad_()

    def outputs(states: torch.Tensor, module: torch.nn.Linear) -> types.SimpleNamespace:
        return types.SimpleNamespace(hidden_states=[states[None]], logits=module(states[None]))

    target = torch.tensor([[1, 2, 3, 4, -100]])
    batch = {"label_batch": {"label": target, "loss_denom": 4}, "teacher_label_batch": {"label": target}}
    teacher = outputs(numbers["teacher_hidden"], teacher_head)
    loss, log = criterion(repository, arguments).compute_dual_space_kd_loss(
        outputs(hidden, head), teacher, batch, distiller, {}
    )
    loss.backward()
    found = {name: value.item() for name, value in log.items()}
    found["hidden_gradient"] = hidden.grad.norm().item()
    found["head_gradient"] = head.weight.grad.norm().item()
    found["projector_gradient"] = distiller.t2s_projector.weight.grad.norm().item()
    return found


if __name__ == "__main__":
    print(json.dumps({name: run(Path(sys.argv[1]), name) for name in ("forward_kl", "reverse_kl")}, indent=1))
