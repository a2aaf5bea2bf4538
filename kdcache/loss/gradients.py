"""What a backward does whose gradient was made in the forward pass."""

from __future__ import annotations

from torch import Tensor, is_grad_enabled

from kdcache.errors import LossError


def refuse_second_derivative(advice: str) -> None:
    """To be called in a backward whose gradient was computed in forward, and is a constant to autograd.

    torch's once_differentiable is not enough: it looks at the upstream gradient, which needs none, and a gradient penalty
    would silently lose its derivative.

    Raises:
        LossError: this backward is run with create_graph=True.
    """
    if is_grad_enabled():
        raise LossError(f"this gradient was computed in the forward pass and has no derivative (create_graph=True); {advice}")


def scale_gradient(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient * upstream, a scalar or one number per row; a new tensor, or the same one where upstream is 1 on a CPU.

    Not in place: the saved gradient is needed again when backward runs twice.
    """
    if upstream.ndim == 0:
        # Asking costs nothing on a CPU; elsewhere it would wait for the device, and while tracing there is no answer.
        if upstream.device.type == "cpu" and type(upstream) is Tensor and upstream.item() == 1.0:
            return gradient
        return gradient * upstream.to(gradient.dtype)
    return (gradient * upstream[:, None]).to(gradient.dtype)
