"""The Muon optimizer for convolutional networks, on top of AdamW."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Coefficients of each Newton-Schulz iteration
#: (https://leloykun.github.io/ponder/muon-opt-coeffs/).
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

#: Decay of the average of the gradients, as in the source of :class:`Muon`.
MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """AdamW that moves the weights of convolutions along their orthogonalized momentum.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) treats each weight as a
    matrix of output channels by all others. Its steps are scaled to the size of AdamW's (Liu et al.
    2025, arXiv:2502.16982), so that both take the same learning rate and weight decay.
    ``torch.optim.Muon`` takes matrices only, and computes in bfloat16, which is slow on many CPUs.

    Arguments are those of ``torch.optim.AdamW``; ``betas`` and ``eps`` are for the other weights.
    """

    def __init__(self, params: Any, **arguments: Any) -> None:
        super().__init__(params, **{"betas": (0.9, 0.95), **arguments})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; return what ``closure`` returns, if there is one."""
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim == 4 and weight.grad is not None:
                    self._move(weight, weight.grad, group["lr"], group["weight_decay"])
                    weight.grad = None  # AdamW skips weights without a gradient
        super().step()
        return loss

    @torch.no_grad()
    def _move(self, weight: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        state = self.state[weight]
        if not state:
            # AdamW expects a step when a state is loaded.
            state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(weight))
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonalize(state["momentum"].flatten(1))
        size = 0.2 * lr * max(update.shape) ** 0.5
        weight.mul_(1 - lr * decay).add_(update.view_as(weight), alpha=-size)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of a matrix near 1, by Newton-Schulz iterations.

    Args:
        matrix: Matrix ``(M, N)``, float32.

    Returns:
        Matrix ``(M, N)`` with singular values near 1, float32.
    """
    x: Tensor = matrix / matrix.norm().clamp(min=1e-7)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
