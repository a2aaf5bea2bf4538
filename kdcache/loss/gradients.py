"""What a backward does whose gradient was made in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from kdcache.errors import LossError


def refuse_second_derivative(advice: str) -> None:
    """To be called in a backward whose gradient was computed in forward, and is a constant to autograd.

    torch's once_differentiable is not enough: it looks at the upstream gradient, which needs none, and a gradient penalty
    would silently lose its derivative.

    Raises:
        LossError: this backward is run with create_graph=True.
    """
    if torch.is_grad_enabled():
        raise LossError(f"this gradient was computed in the forward pass and has no derivative (create_graph=True); {advice}")


def may_overwrite(upstream: Tensor) -> bool:
    """Within a backward: whether it is the last one through this graph, so that saved tensors may be written over.

    torch has no public way to ask (its own compiled backwards ask this one); where it is gone, nothing is overwritten.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # pyright: ignore[reportAttributeAccessIssue]
    if ask is None or torch.compiler.is_compiling() or type(upstream) is not Tensor:
        return False
    return not ask() and not is_batchedtensor(upstream)


def scale_gradient(gradient: Tensor, upstream: Tensor, *, overwrite: bool = False) -> Tensor:
    """gradient * upstream, a scalar or one number per position; the same tensor where `overwrite`, or upstream is 1 on a CPU.

    `overwrite` only where `may_overwrite`: the saved gradient is needed again when backward runs twice. For a scalar alone.
    """
    if upstream.ndim == 0:
        # Asking costs nothing on a CPU; elsewhere it would wait for the device, and while tracing there is no answer.
        if upstream.device.type == "cpu" and type(upstream) is Tensor and upstream.item() == 1.0:
            return gradient
        upstream = upstream.to(gradient.dtype)
        return gradient.mul_(upstream) if overwrite else gradient * upstream
    return (gradient * upstream[:, None]).to(gradient.dtype)
