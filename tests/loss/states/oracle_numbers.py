"""Numbers that the tests compare with, made once by the code of others: TextBrewer, RepDistiller, ModelOpt.

`python tests/loss/states/oracle_numbers.py FOLDER` writes `oracle_numbers.json` again; FOLDER has clones of
airaria/TextBrewer 2c105fa, HobbitLong/RepDistiller b84f547 and NVIDIA/Model-Optimizer a2fbac7. Their code is not kept here.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

PATH = Path(__file__).with_suffix(".json")
CLONES = {
    "textbrewer": ("TextBrewer", "2c105fa"),
    "repdistiller": ("RepDistiller", "b84f547"),
    "modelopt": ("Model-Optimizer", "a2fbac7"),
}


def values(purpose: int, *shape: int) -> Tensor:
    """The same float64 numbers on every machine, about normal."""
    rng = np.random.default_rng(purpose)
    return torch.from_numpy(rng.standard_normal(shape).round(6))


def source_of(clone: Path, commit: str, path: str) -> str:
    command = ["git", "-C", str(clone), "show", f"{commit}:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def defined_in(source: str, names: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """The named functions and classes of a source file, run with `given` for what it imports."""
    tree = ast.parse(source)
    kinds = ast.FunctionDef, ast.ClassDef
    tree.body = [node for node in tree.body if isinstance(node, kinds) and (not names or node.name in names)]
    found: dict[str, Any] = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional, "Tensor": Tensor, **given}
    exec(compile(ast.parse("from __future__ import annotations\n" + ast.unparse(tree)), "oracle", "exec"), found)
    return found


def textbrewer(clone: Path) -> dict[str, Any]:
    source = source_of(clone, CLONES["textbrewer"][1], "src/textbrewer/losses.py")
    code = defined_in(source, (), {"mask_dtype": torch.bool})
    student, teacher = values(1, 2, 5, 7), values(2, 2, 5, 7)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    # Scores well above -1e-3, below which it takes them for masked.
    scores = values(3, 2, 3, 6, 6).abs(), values(4, 2, 3, 6, 6).abs()
    return {
        "hid_mse_loss": float(code["hid_mse_loss"](student, teacher, mask)),
        "cos_loss": float(code["cos_loss"](student, teacher, mask)),
        "pkd_loss": float(code["pkd_loss"](student, teacher)),
        "att_ce_loss": float(code["att_ce_loss"](*scores)),
    }


def repdistiller(clone: Path) -> dict[str, Any]:
    commit = CLONES["repdistiller"][1]
    rkd = defined_in(source_of(clone, commit, "distiller_zoo/RKD.py"), (), {})["RKDLoss"]
    at = defined_in(source_of(clone, commit, "distiller_zoo/AT.py"), (), {})["Attention"]
    found: dict[str, Any] = {}
    for name, weights in {"distance": (1, 0), "angle": (0, 1), "weighted": (25, 50)}.items():
        found[f"rkd_{name}"] = float(rkd(*weights)(values(5, 9, 6), values(6, 9, 8)))
    maps = [values(seed, 2, 1, 4, 4).softmax(dim=-1) for seed in (7, 8)]
    # Each query's attention as a map of its own.
    found["attention"] = float(at(p=1).at_loss(*(whole.reshape(8, 1, 1, 4) for whole in maps)))
    return found | _contrast(clone, commit)


def _contrast(clone: Path, commit: str) -> dict[str, Any]:
    """Two steps of its memory: the second has other constants than the first would set, and moved banks."""
    criterion = defined_in(source_of(clone, commit, "crd/criterion.py"), ("ContrastLoss", "Normalize"), {"eps": 1e-7})
    torch.Tensor.cuda, before = lambda self, *args: self, torch.Tensor.cuda
    try:
        code = defined_in(source_of(clone, commit, "crd/memory.py"), (), {"math": __import__("math")})
        memory = code["ContrastMemory"](*crd_inputs()["sizes"]).double()
    finally:
        torch.Tensor.cuda = before
    inputs, unit, losses = crd_inputs(), criterion["Normalize"](2), []
    memory.memory_v1.copy_(unit(inputs["student_bank"]))
    memory.memory_v2.copy_(unit(inputs["teacher_bank"]))
    loss = criterion["ContrastLoss"](inputs["sizes"][1])
    for step in range(2):
        student, teacher = (unit(inputs[name][step]) for name in ("students", "teachers"))
        sequences, indices = inputs["sequences"][step], inputs["indices"][step]
        found = memory(student, teacher, sequences, torch.cat([sequences[:, None], indices.expand(3, -1)], dim=1))
        losses.append([float(loss(scores)) for scores in found])
    return {
        "crd_losses": losses,
        "crd_normalizers": [float(value) for value in memory.params[2:4]],
        "crd_student_bank": memory.memory_v1.tolist(),
        "crd_teacher_bank": memory.memory_v2.tolist(),
    }


def crd_inputs() -> dict[str, Any]:
    """Two steps of three sequences of eleven, five negatives; vectors of size 4, still to be brought to length 1."""
    return {
        "sizes": (4, 11, 5),
        "student_bank": values(10, 11, 4),
        "teacher_bank": values(11, 11, 4),
        "students": values(12, 2, 3, 4),
        "teachers": values(13, 2, 3, 4),
        "sequences": torch.tensor([[0, 7, 3], [4, 3, 10]]),
        "indices": torch.tensor([[1, 2, 10, 5, 7], [0, 9, 8, 2, 2]]),
    }


def modelopt(clone: Path) -> dict[str, Any]:
    source = source_of(clone, CLONES["modelopt"][1], "modelopt/torch/distill/plugins/megatron.py")
    balancers = SimpleNamespace(
        DistillationLossBalancer=torch.nn.Module, loss_balancers=SimpleNamespace(STUDENT_LOSS_KEY="student_loss")
    )
    given = {"mtd": balancers, "_Loss": torch.nn.Module, "ABCMeta": type, "parallel_state": None}
    names = "BaseLoss", "MSELoss", "HiddenStateCosineLoss", "LogitsAndIntermediatesLossBalancer"
    code = defined_in(source, names, given)
    config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
    student, teacher = values(14, 5, 2, 7), values(15, 5, 2, 7)
    found = {name: code[name](config)(student, teacher)[0].tolist() for name in ("MSELoss", "HiddenStateCosineLoss")}
    losses = {
        "student_loss": torch.tensor(2.5),
        "Logits_0": torch.tensor(0.8),
        "A_1": torch.tensor(0.3),
        "B_2": torch.tensor(0.1),
    }
    balancer = code["LogitsAndIntermediatesLossBalancer"](skip_original_loss=True)
    found["balanced"] = float(balancer(losses)["kd_loss"])
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    made = {name: globals()[name](folder / clone) for name, (clone, _) in CLONES.items()}
    PATH.write_text(json.dumps(made, indent=1) + "\n")
