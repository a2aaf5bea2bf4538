"""Makes soft_ranks.json with torchsort 0.1.10: `python make_soft_ranks.py > soft_ranks.json`, after `pip install torchsort`."""

import json

import torch
import torchsort

CASES = {
    "golden student": [2.9, 0.1, 1.2, 1.0, -3.0],
    "golden teacher": [1.0, 0.5, 2.0, 0.4, 0.0],
    "ties": [0.3, 0.3, -1.0, 0.3, 2.0, 2.0],
    "far apart": [10.0, -20.0, 30.0, 0.0],
    "close": [0.01, 0.02, 0.03, 0.0, -0.01, 0.015],
    "one": [0.7],
}


def main():
    made, generator = [], torch.Generator().manual_seed(0)
    cases = CASES | {f"random {n}": torch.randn(n, generator=generator).mul(2).tolist() for n in (3, 10, 30)}
    for name, values in cases.items():
        for strength in (0.1, 1.0, 10.0):
            z = torch.tensor([values], dtype=torch.float64, requires_grad=True)
            ranks = torchsort.soft_rank(z, regularization="l2", regularization_strength=strength)
            upstream = torch.linspace(-1, 2, len(values), dtype=torch.float64)[None]
            (slope,) = torch.autograd.grad((ranks * upstream).sum(), z)
            case = {"name": f"{name}, {strength:g}", "strength": strength, "values": values, "upstream": upstream[0].tolist()}
            made.append(case | {"ranks": ranks[0].tolist(), "slope": slope[0].tolist()})
    print("[\n" + ",\n".join(map(json.dumps, made)) + "\n]")


if __name__ == "__main__":
    main()
