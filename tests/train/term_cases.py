"""A term with a projector, for tests: a layer's states are to say, through it, which id comes after the next one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdcache import extensions
from kdcache.loader.torch_batches import TorchBatch
from kdcache.train.terms import Needs, Setting, StudentStates, Term

SIZE = 8


class Codes(Term):
    """Mean square distance of projected states to a fixed code of each position's own id; `count` is sequences if asked."""

    per_position = ("stretch",)

    def __init__(self, *, layer: int = 1, stretch: float = 1.0, per_sequence: bool = False) -> None:
        super().__init__()
        self.layer, self.stretch, self.per_sequence = layer, stretch, per_sequence

    def needs(self) -> Needs:
        return Needs(layers=(self.layer,))

    def set_up(self, setting: Setting) -> None:
        random = torch.Generator().manual_seed(setting.seed)
        codes_VF = torch.randn(setting.vocab_size, SIZE, generator=random)
        weight = torch.randn(SIZE, setting.hidden_size, generator=random) / setting.hidden_size**0.5
        self.codes_VF = codes_VF.to(setting.device)
        self.projector = nn.Parameter(weight.to(setting.device))

    def forward(self, student: StudentStates, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        states_PH = student.layer_BTH(self.layer).flatten(0, 1)[batch.flat_positions_P].float()
        wanted_PF = self.codes_VF[batch.input_ids_BT.flatten()[batch.flat_positions_P].long()]
        off_P = (states_PH @ self.projector.T * self._stretch() - wanted_PF).square().mean(dim=1)
        self.largest = float(off_P.detach().max()) if len(off_P) else 0.0
        return (weights_P * off_P).sum()

    def count(self, batch: TorchBatch, weights_P: Tensor) -> Tensor:
        return torch.tensor(float(batch.num_sequences)) if self.per_sequence else weights_P.sum()

    def measures(self) -> dict[str, float]:
        return {"largest": self.largest}

    def _stretch(self) -> float | Tensor:
        stretch = self.option("stretch")
        return stretch[:, None] if isinstance(stretch, Tensor) else stretch


def register() -> None:
    """Make the term known as `codes` in this process."""
    extensions.OWN["losses"]["codes"] = "term_cases:Codes"
