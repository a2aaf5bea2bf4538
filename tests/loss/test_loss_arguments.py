"""What the losses refuse, in one sentence each."""

from __future__ import annotations

import pytest
import torch
from loose_calls import fused_sparse_kd_loss, sparse_kd_loss

from kdcache.errors import LossError


def good() -> dict:
    return {
        "token_ids_PK": torch.tensor([[1, 2], [0, -1]]),
        "logprobs_PK": torch.tensor([[-1.0, -2.0], [-1.0, -torch.inf]]),
        "tail_mass_P": torch.tensor([0.5, 0.6]),
        "target_ids_P": torch.tensor([4, -100]),
    }


REFUSED = [
    ({"temperature": 2.0}, "temperature is 2.0, but the teacher's normalisers are known for 1.0: they cannot be recovered"),
    ({"temperature": 0.0}, "temperature is 0.0, but must be finite and above 0"),
    ({"temperature": 2.0, "log_z_P": torch.zeros(3)}, r"log_z_PL has the shape \(3, 1\), but must have \(2, 1\)"),
    (
        {"temperature": 2.0, "log_z_P": torch.full((2,), -9.0)},
        "position 0 has the mass .* in its entries at temperature 2.0; log_z",
    ),
    ({"tail": "ghost"}, "tail is 'ghost', but must be one of 'drop', 'renormalize', 'bucket', 'uniform'"),
    ({"divergence": "kl"}, "divergence is 'kl', but must be one of 'forward_kl', 'reverse_kl'"),
    ({"divergence": "reverse_kl", "tail": "drop"}, "reverse_kl with tail 'drop' would be wrong: it is not linear"),
    (
        {"divergence": "reverse_kl", "entries": "unbiased"},
        "reverse_kl cannot be computed from unbiased entries: it is not linear",
    ),
    (
        {"divergence": "tail_aware_kl"},
        "tail_aware_kl cannot be computed from 'exact' entries, which has no sample of the tail",
    ),
    (
        {"divergence": "tail_aware_kl", "num_exact_P": torch.tensor([1, 1])},
        "entries is 'exact', but tail_aware_kl reads the estimates too; use 'unbiased'",
    ),
    (
        {"divergence": "reverse_kl", "entries": "unbiased", "num_exact_P": torch.tensor([1, 1])},
        "use entries 'exact', which leaves the estimates out, or divergence 'forward_kl'",
    ),
    ({"num_exact_P": torch.tensor([1])}, r"num_exact_P has the shape \(1,\)"),
    ({"num_exact_P": torch.tensor([1.0, 2.0])}, "num_exact_P has the dtype torch.float32"),
    (
        {"divergence": "tail_aware_kl", "entries": "unbiased", "num_exact_P": torch.tensor([1, 3])},
        "position 1 has the number of exact entries 3, but there are 2 columns",
    ),
    (
        {"divergence": "tail_aware_kl", "entries": "unbiased", "num_exact_P": torch.tensor([1, 1]), "temperature": 2.0},
        "tail_aware_kl at temperature 2.0 has no meaning",
    ),
    ({"divergence": "centered_mse", "temperature": 2.0}, "centered_mse at temperature 2.0 has no meaning"),
    ({"divergence": "soft_spearman", "tail": "renormalize"}, "soft_spearman with tail 'renormalize' would be wrong"),
    ({"entries": "unbiased"}, "tail is 'bucket', but unbiased entries stand for the tail too"),
    (
        {"entries": "unbiased", "tail": "drop", "temperature": 2.0, "log_z_P": torch.zeros(2)},
        "alone; use temperature 1.0",
    ),
    ({"entries": "sampled"}, "entries is 'sampled'"),
    ({"alpha": 1.5}, "alpha is 1.5"),
    ({"alpha": 0.5, "target_ids_P": None}, "target_ids is missing; pass target_ids=batch.target_ids_P, or alpha=1.0"),
    ({"reduction": "max"}, "reduction is 'max'"),
    ({"backend": "cuda"}, "backend is 'cuda'"),
    ({"backend": "triton"}, "the triton backend takes float32, bfloat16 or float16 on a GPU, not torch.float.. on cpu"),
    (
        {"token_ids_PK": torch.tensor([[1, 5], [0, -1]])},
        "position 0 has the token id 5, which is outside the student's vocabulary of 5",
    ),
    ({"token_ids_PK": torch.tensor([[1, 1], [0, -1]])}, "position 0 has the token id 1, twice"),
    ({"token_ids_PK": torch.tensor([[1, 2]])}, r"token_ids_PK has the shape \(1, 2\), but 2 positions of the student"),
    ({"token_ids_PK": torch.ones(2, 2)}, "token_ids_PK has the dtype torch.float32"),
    ({"logprobs_PK": torch.zeros(2, 3)}, r"logprobs_PK has the shape \(2, 3\), but must have \(2, 2\)"),
    ({"logprobs_PK": torch.full((2, 2), 0.5)}, "position 0 has the logprob 0.5, above 0"),
    ({"tail_mass_P": torch.tensor([0.5])}, "tail_mass_P has the shape"),
    ({"tail_mass_P": torch.tensor([0.5, 2.0])}, "position 1 has the tail mass 2.0"),
    ({"target_ids_P": torch.tensor([5, 0])}, "position 0 has the target id 5"),
    ({"target_ids_P": torch.tensor([[5, 0]])}, "target_ids has the shape"),
    ({"weights_P": torch.tensor([1.0, -1.0])}, "position 1 has the weight -1.0"),
    ({"weights_P": torch.tensor([1.0])}, "weights has the shape"),
    ({"tail_mass_P": torch.tensor([0.5, 0.6], device="meta")}, "tail_mass_P is on meta, but the student is on cpu"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["numba", "torch"])
@pytest.mark.parametrize(("change", "sentence"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_impossible_arguments_are_refused_by_both_losses(change, sentence, dtype):
    with pytest.raises(LossError, match=sentence):
        sparse_kd_loss(torch.zeros(2, 5, dtype=dtype), **{**good(), **change})
    with pytest.raises(LossError, match=sentence):
        fused_sparse_kd_loss(torch.zeros(2, 3, dtype=dtype), torch.zeros(5, 3, dtype=dtype), **{**good(), **change})


@pytest.mark.parametrize("logits", [torch.zeros(1, 2, 5), torch.zeros(2, 5, dtype=torch.int64)], ids=["3d", "integers"])
def test_logits_of_another_shape_or_kind_are_refused(logits):
    with pytest.raises(LossError, match="student_logits_PV must be floating point"):
        sparse_kd_loss(logits, **good())


def test_numba_by_name_is_refused_where_it_cannot_work():
    with pytest.raises(LossError, match="numba backend takes float32 or bfloat16 on a CPU, not torch"):
        sparse_kd_loss(torch.zeros(2, 5, dtype=torch.float64), **good(), backend="numba")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_PH": torch.zeros(2, 4)}, r"hidden_PH \(2, 4\) and weight_VH \(5, 3\)"),
        ({"hidden_PH": torch.zeros(2, 3, dtype=torch.int64)}, "must be floating point"),
        (
            {"weight_VH": torch.zeros(5, 3, dtype=torch.bfloat16)},
            "weight_VH is torch.bfloat16 on cpu, but hidden_PH is torch.float32",
        ),
        ({"bias": torch.zeros(4)}, r"bias has the shape \(4,\)"),
        ({"reduction": "none"}, "use weights"),
        ({"chunk_positions": 0}, "chunk_positions is 0"),
    ],
)
def test_impossible_arguments_of_the_fused_loss_are_refused(change, sentence):
    arguments = {"hidden_PH": torch.zeros(2, 3), "weight_VH": torch.zeros(5, 3), **good(), **change}
    with pytest.raises(LossError, match=sentence):
        fused_sparse_kd_loss(**arguments)
