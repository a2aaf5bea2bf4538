"""The definition that real teachers are compared with: one whole float64 forward per sequence, no batch, no chunks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdcache.format.record import TokenSequence


@cache
def dense_forward(folder: Path) -> Callable[[TokenSequence], NDArray[np.float64]]:
    """sequence -> (N, V) float64 logprobs of the model in the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").double().eval()

    def logprobs(sequence: TokenSequence) -> NDArray[np.float64]:
        with torch.inference_mode():
            logits_1NV = model(torch.from_numpy(sequence.input_ids_N.astype(np.int64))[None], use_cache=False).logits
            return logits_1NV[0].double().log_softmax(dim=-1).numpy()

    return logprobs
