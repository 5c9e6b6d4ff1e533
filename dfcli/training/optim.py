"""The optimisers: AdamW, SGD, and Muon for matrices beside AdamW for the rest, behind one small class.

Muon (Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon) gives each matrix its Nesterov momentum with all
singular values set to about 1, by five Newton-Schulz steps. Embeddings, the output layer, norms and biases are not its
business: they stay with AdamW. Here the steps run in float32 on a CPU (most have no bfloat16 units, and emulation
costs hundreds of times more) and in bfloat16 on a GPU, and matrices of one shape run as one batched product.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from dfcli.errors import CorruptError
from dfcli.training.settings import Recipe

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan's post: steep at 0, and it need not converge to 1


@torch.no_grad()
def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """U V^T of each U S V^T, about: singular values come out between 0.7 and 1.2. matrices [N, m, n], m <= n, any
    float dtype, in which it computes -> [N, m, n]"""
    a, b, c = NEWTON_SCHULZ
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    if x.dtype != torch.float32 or x.shape[-1] < 2 * x.shape[-2]:
        for step in range(steps):
            gram = x @ x.mT if step else gram
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x
    # A step multiplies x by p = a + b gram + c gram^2, and gram by p^2. So the steps can all be taken on m x m
    # matrices, 40 % fewer FLOPs for n = 4 m, and x is multiplied once at the end; float32 is precise enough for it.
    product = torch.eye(x.shape[-2], device=x.device).expand(len(x), -1, -1)
    for step in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm(product, p, product, beta=a) if step else p + a * product
        if step + 1 < steps:
            half = torch.baddbmm(gram, p, gram, beta=a)
            gram = torch.baddbmm(half, half, p, beta=a)
    return product @ x


class Muon:
    """Muon over `parameters`, each of 2 or more dimensions; the first is the output, the others together the input."""

    def __init__(self, parameters: dict[str, nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        self.parameters, self.lr, self.momentum, self.weight_decay = parameters, lr, momentum, weight_decay
        self.buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, lr_factor: float) -> None:
        groups: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor, bool]]] = defaultdict(list)
        for name, p in self.parameters.items():
            if p.grad is None:  # nothing of the loss depends on it
                continue
            buffer = self.buffers.setdefault(name, torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - self.momentum)
            update = p.grad.lerp(buffer, self.momentum).flatten(1)
            tall = update.shape[0] > update.shape[1]
            update = update.T if tall else update
            groups[(update.shape[0], update.shape[1])].append((p, update, tall))
        for (m, n), group in groups.items():
            stack = torch.stack([update for _, update, _ in group])
            stack = orthogonalise(stack.bfloat16() if stack.is_cuda else stack)
            for (p, _, tall), update in zip(group, stack, strict=True):
                # A step of one size in every output whatever the shape (Jordan's scale for tall matrices).
                lr = self.lr * lr_factor
                p.mul_(1 - lr * self.weight_decay)
                p.add_((update.T if tall else update).reshape(p.shape), alpha=-lr * ((n / m) ** 0.5 if tall else 1.0))


class Optimizer:
    """The optimiser that a recipe asks for, over a core's parameters. `step` expects their gradients."""

    def __init__(self, core: nn.Module, recipe: Recipe) -> None:
        self.named = dict(core.named_parameters())
        hidden = matrices(core) if recipe.optimizer == "muon" else {}
        rest = {name: p for name, p in self.named.items() if name not in hidden}
        self.muon = Muon(hidden, recipe.lr, recipe.momentum, recipe.weight_decay) if hidden else None
        decays = {name for name, p in rest.items() if recipe.decay == "all" or p.ndim >= 2}
        if recipe.optimizer == "muon":
            decays = set()  # the scale of embeddings and of the output layer is theirs to choose
        groups = [
            {"params": [p for name, p in rest.items() if name in decays], "weight_decay": recipe.weight_decay},
            {"params": [p for name, p in rest.items() if name not in decays], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.names = {id(p): name for name, p in rest.items()}
        self.lr = recipe.adam_lr if recipe.optimizer == "muon" else recipe.lr
        if recipe.optimizer == "sgd":
            self.base: torch.optim.Optimizer = torch.optim.SGD(groups, self.lr, recipe.momentum, fused=True)
        else:
            self.base = torch.optim.AdamW(groups, self.lr, recipe.betas, recipe.eps, fused=True)

    def step(self, lr_factor: float) -> None:
        """Update the parameters at `lr_factor` times the recipe's rates, and drop their gradients."""
        for group in self.base.param_groups:
            group["lr"] = self.lr * lr_factor
        self.base.step()
        if self.muon:
            self.muon.step(lr_factor)
        self.drop_gradients()

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients together, a scalar on the core's device."""
        grads = [p.grad for p in self.named.values() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads, foreach=True)

    def clip_gradients(self, norm: float, most: float) -> None:
        """Scale the gradients, which have `norm` together, down to the norm `most` if they exceed it."""
        if norm > most:
            torch.nn.utils.clip_grads_with_norm_(self.named.values(), most, torch.tensor(norm), foreach=True)

    def drop_gradients(self) -> None:
        """Forget the gradients without an update."""
        for p in self.named.values():
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a later `load_state_tensors` needs to go on bit for bit, as "<what>/<parameter>": tensor."""
        tensors = {f"muon/{name}": buffer for name, buffer in (self.muon.buffers if self.muon else {}).items()}
        for p, state in self.base.state.items():
            for what, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{what}/{self.names[id(p)]}"] = value
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. Raises CorruptError where it does not belong to these parameters."""
        names = [self.names[id(p)] for group in self.base.param_groups for p in group["params"]]
        number = {name: i for i, name in enumerate(names)}
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            what, _, name = key.partition("/")
            if name not in self.named or (what != "step" and tensor.shape != self.named[name].shape):
                raise CorruptError(f"the optimizer's state has a `{key}` that the model has no place for")
            if what == "muon" and self.muon:
                self.muon.buffers[name] = tensor.to(self.named[name].device, copy=True)
            elif name in number:
                state[number[name]][what] = tensor
        self.base.load_state_dict({"state": dict(state), "param_groups": self.base.state_dict()["param_groups"]})


def matrices(core: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that Muon is for: weights of 2 and more dimensions, but embeddings and the output layer, which is
    the core's last linear layer."""
    linears = [module for module in core.modules() if isinstance(module, nn.Linear)]
    others = [module for module in core.modules() if isinstance(module, nn.Embedding)] + linears[-1:]
    taken = {id(module.weight) for module in others}
    return {name: p for name, p in core.named_parameters() if p.ndim >= 2 and id(p) not in taken}
