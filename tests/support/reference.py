"""One training step of arXiv:2406.06564, slow, and obviously right.

It is in float64 and in loops over slots. It reads plans and parameters as plain data and calls nothing of the library.
A step changes its state in place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Return Philox-4x32-10 of a counter and a key, on Python's integers."""
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        left, right = (second >> 32) ^ counter[1] ^ key[0], (first >> 32) ^ counter[3] ^ key[1]
        counter = [left, second & MASK, right, first & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


def uniform(seed: int, side: str, index: int, length: int) -> list[float]:
    """Return a vector of a basis, in [-1, 1).

    Each value of the counter gives four numbers.
    """
    numbers: list[float] = []
    for block in range(-(-length // 4)):
        counter = [block, index & MASK, index >> 32, "ba".index(side)]
        numbers += [(word >> 8) / 2**23 - 1 for word in philox(counter, [seed & MASK, seed >> 32])]
    return numbers[:length]


def next_seed(seed: int, rank: int) -> int:
    """Return the seed of the basis that follows `seed` at a rank, below 2**63."""
    high, low, *_ = philox([rank, 0, 0, 2], [seed & MASK, seed >> 32])
    return (high >> 1) << 32 | low


def bound(side: str, out_features: int, in_features: int, rank: int) -> float:
    """Return half the width of the uniform distribution.

    It is sqrt(3) deviations (eq. 3, gain = 1 / sqrt(3)).
    """
    std = {
        "b": (rank / (out_features * in_features) ** 0.5) ** 0.25,
        "a": (out_features**0.5 * rank / in_features**1.5) ** 0.25,
    }[side]
    return 3**0.5 * std * 3**-0.25


def weight(param: Any) -> Tensor:
    """Return base + b @ a / rank in float64, for any dtype of storage."""
    b, a = (factor.double() for factor in param.factors)
    return param.base.double() + torch.einsum("...or,...ri->...oi", b, a) / a.shape[-2]


def magnitude(param: Any) -> Tensor:
    """Return the same with all terms positive.

    Rounding errors are relative to this, since terms may cancel.
    """
    b, a = (factor.double().abs() for factor in param.factors)
    return param.base.double().abs() + torch.einsum("...or,...ri->...oi", b, a) / a.shape[-2]


def working_dtype(param: Any) -> torch.dtype:
    """Return the promised dtype of sums.

    It is the wider of base and factors, and at least float32.
    """
    return torch.promote_types(torch.promote_types(param.base.dtype, param.factors.b.dtype), torch.float32)


@dataclass
class Adam:
    """The state of AdamW for one vector or one tensor."""

    mu: Tensor
    nu: Tensor
    count: int = 0

    def update(self, param: Tensor, grad: Tensor, options: "Options") -> None:
        beta1, beta2 = options.betas
        self.count += 1
        self.mu.copy_(beta1 * self.mu + (1 - beta1) * grad)
        self.nu.copy_(beta2 * self.nu + (1 - beta2) * grad**2)
        mu_hat, nu_hat = self.mu / (1 - beta1**self.count), self.nu / (1 - beta2**self.count)
        param.copy_(
            param - options.lr * options.weight_decay * param - options.lr * mu_hat / (nu_hat**0.5 + options.eps)
        )


@dataclass
class Options:
    lr: float
    max_norm: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class Weight:
    """One low-rank weight.

    A vector is a view: `vectors("b")[k]` is column k of b, `vectors("a")[k]` row k of a.
    """

    base: Tensor
    b: Tensor
    a: Tensor
    seed: int
    adam: dict[str, list[Adam]] = field(init=False)
    frozen_for: dict[str, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.adam = {side: [fresh_adam(vector) for vector in self.vectors(side)] for side in "ba"}
        self.frozen_for = {side: [0] * len(self.a) for side in "ba"}

    def vectors(self, side: str) -> list[Tensor]:
        return list(self.b.T) if side == "b" else list(self.a)

    def incoming(self, side: str, index: int) -> Tensor:
        out_features, in_features = self.base.shape
        numbers = uniform(self.seed, side, index, len(self.vectors(side)[0]))
        return bound(side, out_features, in_features, len(self.a)) * torch.tensor(numbers, dtype=torch.float64)

    def switch(self, side: str, slot: int, index: int, frozen_for: int) -> None:
        """Replace a vector, keep the weight, reset and freeze the counterpart.

        These are steps 3 to 5.
        """
        vector, incoming = self.vectors(side)[slot], self.incoming(side, index)
        difference = vector - incoming
        left, right = (difference, self.a[slot]) if side == "b" else (self.b[:, slot], difference)
        self.base += torch.outer(left, right) / len(self.a)
        vector.copy_(incoming)
        counterpart = "a" if side == "b" else "b"
        self.adam[counterpart][slot] = fresh_adam(self.vectors(counterpart)[slot])
        self.frozen_for[counterpart][slot] = frozen_for


def fresh_adam(param: Tensor) -> Adam:
    return Adam(torch.zeros_like(param), torch.zeros_like(param))


@dataclass
class State:
    weights: dict[str, Weight]
    dense: dict[str, Tensor]
    adam: dict[str, Adam] = field(init=False)

    def __post_init__(self) -> None:
        self.adam = {name: fresh_adam(tensor) for name, tensor in self.dense.items()}


def flat(state: State) -> dict[str, Tensor]:
    """Return all tensors by name, vectors as rows.

    Names are "w.base", "w.b", "w.b.mu", ..., "bias", "bias.mu", ...
    """
    tensors = {}
    for name, weight in state.weights.items():
        tensors[f"{name}.base"] = weight.base
        for side in "ba":
            tensors[f"{name}.{side}"] = torch.stack(weight.vectors(side))
            tensors[f"{name}.{side}.mu"] = torch.stack([adam.mu for adam in weight.adam[side]])
            tensors[f"{name}.{side}.nu"] = torch.stack([adam.nu for adam in weight.adam[side]])
            tensors[f"{name}.{side}.count"] = torch.tensor([[adam.count] for adam in weight.adam[side]])
            tensors[f"{name}.{side}.frozen_for"] = torch.tensor([[left] for left in weight.frozen_for[side]])
    for name, tensor in state.dense.items():
        adam = state.adam[name]
        tensors |= {
            name: tensor,
            f"{name}.mu": adam.mu,
            f"{name}.nu": adam.nu,
            f"{name}.count": torch.tensor(adam.count),
        }
    return tensors


def gradients(state: State, loss_fn: Callable[[dict[str, Tensor]], Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Return gradients (step 1) from the dense weights.

    Keys are tensor names, with ".b" and ".a" for factors.
    """
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.dense.items()}
    tensors = dict(leaves)
    for name, weight in state.weights.items():
        b = leaves[f"{name}.b"] = weight.b.clone().requires_grad_()
        a = leaves[f"{name}.a"] = weight.a.clone().requires_grad_()
        tensors[name] = weight.base + sum(torch.outer(b[:, k], a[k]) for k in range(len(a))) / len(a)
    loss = loss_fn(tensors)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, grads, strict=True))


def train_step(
    state: State,
    loss_fn: Callable[[dict[str, Tensor]], Tensor],
    plans: Mapping[str, list[tuple[str, int, int, int]]],
    options: Options,
) -> float:
    """Run the complete step, and return the loss before it.

    Args:
        loss_fn: The loss as a function of the dense tensors by name.
        plans: The switches of each weight, in order: (side, slot, index of the vector, steps of the freeze).
    """
    loss, grads = gradients(state, loss_fn)
    norm = sum(float((grad**2).sum()) for grad in grads.values()) ** 0.5  # step 2
    grads = {name: grad * min(1.0, options.max_norm / (norm + 1e-6)) for name, grad in grads.items()}
    for name, switches in plans.items():
        for switched in switches:
            state.weights[name].switch(*switched)
    for name, weight in state.weights.items():
        for side in "ba":
            side_grads = grads[f"{name}.{side}"]
            for k, vector in enumerate(weight.vectors(side)):
                grad = side_grads[:, k] if side == "b" else side_grads[k]
                is_frozen = weight.frozen_for[side][k] > 0  # step 6
                weight.frozen_for[side][k] -= is_frozen
                weight.adam[side][k].update(vector, torch.zeros_like(grad) if is_frozen else grad, options)  # step 7
    for name, tensor in state.dense.items():
        state.adam[name].update(tensor, grads[name], options)
    return loss
