"""What a model may do with a weight, by name.

There are the shapes of the parameter and of the matrix, and the use.
"""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from tests.support.uses import x

IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])
MATRIX, STACK = (6, 4), (3, 6, 4)
LINEAR = nn.Linear(4, 6, bias=False)
lin = functional.linear


class STE(torch.autograd.Function):
    """A sign whose gradient is passed on.

    No differentiation of the forward pass gives it.
    """

    @staticmethod
    def forward(w):
        return w.sign()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


class Lin(torch.autograd.Function):
    """A product as a fused kernel has it."""

    @staticmethod
    def forward(inputs, w):
        return inputs @ w.t()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        inputs, w = ctx.saved_tensors
        return grad @ w, grad.t() @ inputs


def setitem(w):
    changed = w.clone()
    changed[0] = 0
    return changed


def without_grad(use):
    with torch.no_grad():
        return use()


# Uses that stay low-rank.
COVERED = {
    "cast and product": (MATRIX, MATRIX, lambda w: lin(x(5, 4).float(), w.to(torch.float32)).double()),
    "to keyword": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.to(dtype=torch.float64))),
    "to device": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.to("cpu"))),
    "to device, dtype": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.to(torch.device("cpu"), torch.float64, True))),
    "to other": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.to(x(1)))),
    "input to weight": (MATRIX, MATRIX, lambda w: lin(x(5, 4).float().to(w), w)),
    "input type_as weight": (MATRIX, MATRIX, lambda w: lin(x(5, 4).float().type_as(w), w)),
    "type_as": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.type_as(x(1)))),
    "type": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.type(torch.float64))),
    "double": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.double())),
    "cpu": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.cpu())),
    "contiguous": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.contiguous())),
    "T.contiguous": (MATRIX, MATRIX, lambda w: x(5, 4) @ w.T.contiguous()),
    "detached beside": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w) + lin(x(5, 4), w.detach())),
    "data beside": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w) * lin(x(5, 4), w.data)),
    "new axis": (MATRIX, MATRIX, lambda w: x(2, 5, 6) @ w[None]),
    "new axis, ellipsis": (MATRIX, MATRIX, lambda w: x(2, 5, 6) @ w[None, ..., :]),
    "ellipsis rows": (MATRIX, MATRIX, lambda w: lin(x(5, 2), w[..., 2:])),
    "unsqueeze": (MATRIX, MATRIX, lambda w: x(1, 5, 6) @ w.unsqueeze(0)),
    "squeeze": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.unsqueeze(0).squeeze(0))),
    "squeeze all": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w[None].squeeze())),
    "1x1 conv of linear": (MATRIX, MATRIX, lambda w: functional.conv2d(x(2, 4, 3, 3), w[:, :, None, None])),
    "1x1 conv by view": (MATRIX, MATRIX, lambda w: functional.conv1d(x(2, 4, 3), w.view(6, 4, 1))),
    "linear of 1x1 conv": ((6, 4, 1, 1), (6, 4), lambda w: lin(x(5, 4), w.squeeze(-1).squeeze(-1))),
    "linear of 1x1 conv, index": ((6, 4, 1), (6, 4), lambda w: lin(x(5, 4), w[:, :, 0])),
    "flattened conv": ((6, 2, 3), (6, 6), lambda w: lin(x(5, 6), w.flatten(1))),
    "viewed conv": ((6, 2, 3), (6, 6), lambda w: lin(x(5, 6), w.view(6, -1))),
    "rows of conv": ((6, 2, 3), (6, 6), lambda w: functional.conv1d(x(2, 2, 7), w[2:5])),
    "chunk of conv": ((6, 2, 3), (6, 6), lambda w: functional.conv1d(x(2, 2, 7), w.chunk(2)[1])),
    "expand": (MATRIX, MATRIX, lambda w: x(3, 5, 6) @ w.expand(3, -1, -1)),
    "expand_as": (MATRIX, MATRIX, lambda w: x(3, 5, 6) @ w.expand_as(x(3, 6, 4))),
    "broadcast_to": (MATRIX, MATRIX, lambda w: x(3, 5, 6) @ torch.broadcast_to(w, (3, 6, 4))),
    "flatten stack": (STACK, STACK, lambda w: lin(x(5, 4), w.flatten(0, 1))),
    "view stack": (STACK, STACK, lambda w: lin(x(5, 4), w.view(-1, 4))),
    "reshape stack": ((4, 6, 4), (4, 6, 4), lambda w: torch.einsum("bi,hgoi->bhgo", x(5, 4), w.reshape(2, 2, 6, 4))),
    "permute": (STACK, STACK, lambda w: torch.bmm(x(3, 5, 4), w.permute(0, 2, 1))),
    "permute matrix": (MATRIX, MATRIX, lambda w: x(5, 4) @ w.permute(1, 0)),
    "permute stack": ((2, 3, 6, 4), (2, 3, 6, 4), lambda w: x(3, 2, 5, 6) @ w.permute(1, 0, 2, 3)),
    "movedim": (STACK, STACK, lambda w: torch.bmm(x(3, 5, 4), w.movedim(1, 2))),
    "movedim stack": ((2, 3, 6, 4), (2, 3, 6, 4), lambda w: x(3, 2, 5, 6) @ torch.movedim(w, 0, 1)),
    "swapaxes keywords": (MATRIX, MATRIX, lambda w: x(5, 4) @ w.swapaxes(axis0=0, axis1=1)),
    "adjoint": (MATRIX, MATRIX, lambda w: x(5, 4) @ w.adjoint()),
    "H": (MATRIX, MATRIX, lambda w: x(5, 4) @ w.H),
    "w * 0.5": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w * 0.5, x(6))),
    "2 * w": (MATRIX, MATRIX, lambda w: lin(x(5, 4), 2 * w)),
    "w / 3": (MATRIX, MATRIX, lambda w: x(5, 6) @ (w / 3)),
    "mul tensor": (MATRIX, MATRIX, lambda w: lin(x(5, 4), torch.mul(w, x(1)[0]) * torch.tensor(3))),
    "div tensor": (MATRIX, MATRIX, lambda w: functional.embedding(IDS, w / x(1)[0])),
    "-w": (MATRIX, MATRIX, lambda w: lin(x(5, 4), -w)),
    "scaled T": (MATRIX, MATRIX, lambda w: x(5, 4) @ (w * 2).T),
    "scaled einsum": (MATRIX, MATRIX, lambda w: torch.einsum("bi,oi->bo", x(5, 4), w * 2)),
    "scaled row": (MATRIX, MATRIX, lambda w: (w * 2)[1]),
    "scaled conv": ((6, 2, 3), (6, 6), lambda w: functional.conv1d(x(2, 2, 7), w * 2, x(6))),
    "scaled stack": (STACK, STACK, lambda w: x(2, 1, 5, 6) @ (w / 2)),
    "inner": (MATRIX, MATRIX, lambda w: torch.inner(x(2, 5, 4), w)),
    "inner left": (MATRIX, MATRIX, lambda w: torch.inner(w, x(5, 4))),
    "inner left, batch": (MATRIX, MATRIX, lambda w: torch.inner(w, x(2, 5, 4))),
    "tensordot": (MATRIX, MATRIX, lambda w: torch.tensordot(x(5, 4), w, dims=([1], [1]))),
    "tensordot int": (MATRIX, MATRIX, lambda w: torch.tensordot(x(2, 5, 6), w, 1)),
    "multi_dot": (MATRIX, MATRIX, lambda w: torch.linalg.multi_dot([x(5, 6), w, x(4, 3)])),
    "column": (MATRIX, MATRIX, lambda w: w[:, 1]),
    "mask rows": (MATRIX, MATRIX, lambda w: w[torch.tensor([True, False] * 3)]),
    "index_select": (MATRIX, MATRIX, lambda w: w.index_select(0, torch.tensor([1, 3]))),
    "narrow": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.narrow(0, 1, 3))),
    "select": (MATRIX, MATRIX, lambda w: w.select(0, 2)),
    "cat rows": (MATRIX, MATRIX, lambda w: lin(x(5, 4), torch.cat([w, w]))),
    "cat columns": (MATRIX, MATRIX, lambda w: lin(x(5, 8), torch.cat([w, w], dim=1))),
    "bilinear": ((6, 4, 3), (6, 4, 3), lambda w: functional.bilinear(x(5, 4), x(5, 3), w, x(6))),
    "embedding_bag": (MATRIX, MATRIX, lambda w: functional.embedding_bag(IDS, w)),
    "embedding_bag sum": (
        MATRIX,
        MATRIX,
        lambda w: functional.embedding_bag(IDS, w, mode="sum", per_sample_weights=x(2, 3)),
    ),
    "embedding_bag offsets": (
        MATRIX,
        MATRIX,
        lambda w: functional.embedding_bag(IDS.flatten(), w, torch.tensor([0, 2]), padding_idx=3),
    ),
    "conv_transpose1d": (
        (2, 3, 4),
        (2, 12),
        lambda w: functional.conv_transpose1d(x(2, 2, 5), w, x(3), stride=2, padding=1, output_padding=1),
    ),
    "conv_transpose2d": ((2, 3, 2, 2), (2, 12), lambda w: functional.conv_transpose2d(x(1, 2, 4, 4), w, dilation=2)),
    "conv_transpose3d": ((2, 3, 1, 2, 2), (2, 12), lambda w: functional.conv_transpose3d(x(1, 2, 2, 3, 3), w)),
    "len": (
        MATRIX,
        MATRIX,
        lambda w: w[0] * len(w) + w.stride(0) + w.stride()[1] + w.element_size() + w.is_contiguous(),
    ),
    "iter": (STACK, STACK, lambda w: sum(lin(x(5, 4), m) for m in w)),
    "in place on the output": (MATRIX, MATRIX, lambda w: functional.relu(lin(x(2, 5, 4), w, x(6)), inplace=True)),
    "iadd on the output": (MATRIX, MATRIX, lambda w: lin(x(2, 5, 4), w).add_(x(6))),
    "chunk then cat": (MATRIX, MATRIX, lambda w: lin(x(5, 4), torch.cat(w.chunk(2)))),
    "split then sum": (MATRIX, MATRIX, lambda w: sum(lin(x(5, 4), p) for p in w.split(3))),
    "fused part of rows": ((6, 4), (3, 2, 4), lambda w: functional.linear(x(5, 4), w[2:])),
    "fused rows of a stack": ((3, 4, 5), (3, 2, 2, 5), lambda w: lin(x(5, 5), w[2])),
    "fused rows of a stack, cut": ((3, 4, 5), (3, 2, 2, 5), lambda w: w[1:, 2:] @ x(5)),
    "fused columns of a stack": ((3, 5, 4), (3, 2, 5, 2), lambda w: lin(x(5, 4), w[2])),
    "fused cast": ((6, 4), (3, 2, 4), lambda w: lin(x(5, 4), w.double() * 2, x(6))),
    "multi_dot two": (MATRIX, MATRIX, lambda w: torch.linalg.multi_dot([x(5, 6), w, w.T])),
    "outer": (MATRIX, MATRIX, lambda w: torch.outer(w[0], x(3))),
    "dot": (MATRIX, MATRIX, lambda w: torch.dot(w[1], x(4))),
    "unbind rows": (MATRIX, MATRIX, lambda w: torch.stack(w.unbind())),
    "prelu": ((1, 6), (1, 6), lambda w: functional.prelu(x(5, 6), w[0])),
    "multiple under no_grad": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w) + lin(x(5, 4), without_grad(lambda: w * 2))),
    "parts under no_grad": (
        MATRIX,
        MATRIX,
        lambda w: w[0].sum() * lin(x(5, 4), without_grad(lambda: torch.cat([w, w]))),
    ),
    "stack and vector": (STACK, STACK, lambda w: w @ x(4)),
    "vector and stack": (STACK, STACK, lambda w: x(6) @ w),
    "dict argument": (MATRIX, MATRIX, lambda w: functional_call(LINEAR, {"weight": w}, x(5, 4))),
}
# Uses that get the dense weight.
DENSE = {
    "type name": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.type("torch.DoubleTensor"))),
    "clone": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.clone())),
    "clone, setitem": (MATRIX, MATRIX, lambda w: lin(x(5, 4), setitem(w))),
    "depthwise squeeze": ((6, 1, 4), (6, 4), lambda w: (x(5, 6, 4) * w.squeeze(1)).sum(-1)),
    "repeat": (MATRIX, MATRIX, lambda w: x(3, 5, 6) @ w.repeat(3, 1, 1)),
    "flatten": (MATRIX, MATRIX, lambda w: w.flatten() * x(24)),
    "view(-1)": (MATRIX, MATRIX, lambda w: w.view(-1) * x(24)),
    "permute all": (STACK, STACK, lambda w: w.permute(2, 0, 1) * x(4, 3, 6)),
    "view and permute": (MATRIX, MATRIX, lambda w: torch.tensordot(x(5, 4), w.view(2, 3, 4).permute(2, 0, 1), dims=1)),
    "scaled, made dense": (MATRIX, MATRIX, lambda w: (w * 2).exp()),
    "1 / w": (MATRIX, MATRIX, lambda w: 1 / (w + 10)),
    "w + delta": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w + x(6, 4))),
    "delta - w": (MATRIX, MATRIX, lambda w: lin(x(5, 4), x(6, 4) - w)),
    "delta += w": (MATRIX, MATRIX, lambda w: lin(x(5, 4), x(6, 4).clone().add_(w))),
    "addmm of adapter": (MATRIX, MATRIX, lambda w: lin(x(5, 4), torch.addmm(w, x(6, 2), x(2, 4)))),
    "torch.add alpha": (MATRIX, MATRIX, lambda w: torch.add(x(6, 4), w, alpha=0.5)),
    "mask": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w * x(6, 4).triu())),
    "where": (MATRIX, MATRIX, lambda w: lin(x(5, 4), torch.where(x(6, 4) > 0, w, 0.0))),
    "masked_fill": (MATRIX, MATRIX, lambda w: w.masked_fill(x(6, 4) > 0, 0.0)),
    "weight norm": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w / w.norm(dim=1, keepdim=True))),
    "normalize": (MATRIX, MATRIX, lambda w: lin(x(5, 4), functional.normalize(w, dim=1))),
    "cosine": (MATRIX, MATRIX, lambda w: functional.cosine_similarity(x(6, 4), w, dim=-1)),
    "linalg.norm": (MATRIX, MATRIX, torch.linalg.norm),
    "vector_norm": (MATRIX, MATRIX, lambda w: torch.linalg.vector_norm(w, dim=1)),
    "sum": (MATRIX, MATRIX, lambda w: w.sum()),
    "square": (MATRIX, MATRIX, lambda w: w.square().mean()),
    "abs": (MATRIX, MATRIX, lambda w: w.abs().amax(1)),
    "standardized": (MATRIX, MATRIX, lambda w: lin(x(5, 4), (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True))),
    "softmax": (MATRIX, MATRIX, lambda w: lin(x(5, 4), torch.softmax(w, -1))),
    "F.softplus": (MATRIX, MATRIX, functional.softplus),
    "clamp": (MATRIX, MATRIX, lambda w: w.clamp(-0.5, 0.5)),
    "w ** 2": (MATRIX, MATRIX, lambda w: w**2),
    "tensordot, axes in a tensor": (
        MATRIX,
        MATRIX,
        lambda w: torch.tensordot(w, x(4, 5), dims=torch.tensor([[1], [0]])),
    ),
    "matrix power": (MATRIX, MATRIX, lambda w: w @ w.T),
    "cast and exponential": (MATRIX, MATRIX, lambda w: -torch.exp(w.float()).double()),
    "kron": (MATRIX, MATRIX, lambda w: torch.kron(w, x(2, 2))),
    "columns": (MATRIX, MATRIX, lambda w: w[:, [0, 2]]),
    "mask entries": (MATRIX, MATRIX, lambda w: w[x(6, 4) > 0]),
    "fancy": (MATRIX, MATRIX, lambda w: w[torch.tensor([0, 1]), torch.tensor([2, 3])]),
    "index_select cols": (MATRIX, MATRIX, lambda w: torch.index_select(w, 1, torch.tensor([1, 3]))),
    "gather": (MATRIX, MATRIX, lambda w: w.gather(1, torch.tensor([[0], [1]]))),
    "tril": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w.tril())),
    "flip": (MATRIX, MATRIX, lambda w: w.flip(0)),
    "roll": (MATRIX, MATRIX, lambda w: w.roll(1, 0)),
    "pad": (MATRIX, MATRIX, lambda w: functional.pad(w, (1, 1))),
    "diagonal": (MATRIX, MATRIX, lambda w: w.diagonal()),
    "trace": (MATRIX, MATRIX, torch.trace),
    "cat": (MATRIX, MATRIX, lambda w: lin(x(5, 4), torch.cat([w, x(2, 4)]))),
    "cat of weights": (MATRIX, MATRIX, lambda w: lin(x(5, 4), torch.cat([w, w * 1]), x(12))),
    "cat of the concat": (MATRIX, MATRIX, lambda w: torch.concat([w, x(6, 4), w], -1)),
    "stack": (MATRIX, MATRIX, lambda w: torch.stack([w, x(6, 4)])),
    "vstack": (MATRIX, MATRIX, lambda w: torch.vstack([w, x(2, 4)])),
    "hstack": (MATRIX, MATRIX, lambda w: torch.hstack((w, w))),
    "block_diag": (MATRIX, MATRIX, lambda w: torch.block_diag(w, w)),
    "map": (MATRIX, MATRIX, lambda w: sum(map(torch.exp, [w, w.T.T]))),
    "bilinear fused": ((6, 4, 3), (6, 12), lambda w: functional.bilinear(x(5, 4), x(5, 3), w)),
    "embedding_bag max": (MATRIX, MATRIX, lambda w: functional.embedding_bag(IDS, w, mode="max")),
    "conv_transpose groups": ((4, 3, 2), (4, 6), lambda w: functional.conv_transpose1d(x(1, 4, 5), w, groups=2)),
    "conv of a stack": ((6, 2, 3), (6, 2, 3), lambda w: functional.conv1d(x(2, 2, 7), w)),
    "linear as input": (MATRIX, MATRIX, lambda w: lin(w, x(5, 4))),
    "linear as bias": (MATRIX, MATRIX, lambda w: lin(x(6, 3), x(4, 3), w)),
    "rnn cell": (MATRIX, MATRIX, lambda w: torch.rnn_tanh_cell(x(5, 4), x(5, 6), w, x(6, 6))),
    "zeros_like": (MATRIX, MATRIX, lambda w: w.sum() * torch.ones_like(w) + torch.zeros_like(w, dtype=torch.float32)),
    "new": (MATRIX, MATRIX, lambda w: w.exp() + w.new_ones(6, 4) + w.new_full((1,), 2.0)),
    "einsum implicit": (MATRIX, MATRIX, lambda w: torch.einsum("i...,...j->ij", w.T, w)),
    "aten default": (MATRIX, MATRIX, lambda w: torch.ops.aten.mm.default(x(5, 6), w)),
    "custom function": (MATRIX, MATRIX, lambda w: Lin.apply(x(5, 4), w)),
    "straight through": (MATRIX, MATRIX, lambda w: lin(x(5, 4), STE.apply(w))),
    "ste detach": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w + (w.round() - w).detach())),
    "quantized fake": (MATRIX, MATRIX, lambda w: torch.fake_quantize_per_tensor_affine(w, 0.1, 0, -128, 127) + w),
    "view dtype beside": (MATRIX, MATRIX, lambda w: w + w.view(torch.int64) * 0),
    "bool": (MATRIX, MATRIX, lambda w: w * (w > 0)),
    "svd": (MATRIX, MATRIX, torch.linalg.svdvals),
    "pinv": (MATRIX, MATRIX, torch.linalg.pinv),
    "solve": (MATRIX, MATRIX, lambda w: torch.linalg.solve(w.T @ w, x(4, 2))),
    "cdist": (MATRIX, MATRIX, lambda w: torch.cdist(x(5, 4), w)),
    "fft": (MATRIX, MATRIX, lambda w: torch.fft.rfft(w).abs()),
    "complex": (MATRIX, MATRIX, lambda w: torch.view_as_real(torch.complex(w, w * 2))),
    "layer_norm weight": (MATRIX, MATRIX, lambda w: functional.layer_norm(x(5, 6, 4), (6, 4), w)),
    "sdpa": (STACK, STACK, lambda w: functional.scaled_dot_product_attention(x(3, 5, 4), w, w)),
    "getattr real": (MATRIX, MATRIX, lambda w: w.real * 1),
    "fill": (MATRIX, MATRIX, lambda w: w + torch.full_like(w, 2)),
    "fused dense": ((6, 4), (3, 2, 4), lambda w: w.exp()),
    "fused columns dense": ((2, 12), (3, 2, 4), lambda w: w.exp()),
    "fused index cut": ((6, 4), (3, 2, 4), lambda w: w[1:3].exp()),
    "stack dense": (STACK, STACK, lambda w: w.exp()),
    "conv dense": ((6, 2, 3), (6, 6), lambda w: functional.conv1d(x(2, 2, 7), w / w.norm())),
    "torch.func.vmap over rows": (STACK, STACK, lambda w: torch.vmap(lambda m: m.sum())(w.exp())),
    "entry": (MATRIX, MATRIX, lambda w: w[1, 2]),
    "no rows": (MATRIX, MATRIX, lambda w: lin(x(5, 4), w[:0]).sum() + w.exp()),
}


USES = COVERED | DENSE
