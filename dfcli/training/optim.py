"""The optimisers: AdamW, SGD, and Muon for matrices beside AdamW for the rest, behind one small class. Where Muon is
asked for, n-gram tables, of which a step reads few rows, are updated row by row.

Muon (Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon) gives each matrix its Nesterov momentum with all
singular values set to about 1, by five Newton-Schulz steps. Embeddings, the output layer, norms and biases are not its
business: they stay with AdamW. Here the steps run in float32 on a CPU (most have no bfloat16 units, and emulation
costs hundreds of times more) and in bfloat16 on a GPU, and matrices of one shape run as one batched product.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from dfcli.cores.protocols import Backend
from dfcli.cores.wavenet import WaveNet
from dfcli.errors import CorruptError
from dfcli.system.processes import whole
from dfcli.training import sharding
from dfcli.training.settings import Recipe

_torch: Any = torch  # its operations on lists of tensors have no types
SLOW = 0.3  # of the rate, for the projections of labels
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


def orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalise` of each matrix [m, n], whichever is larger; those of one shape in one batch."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    wide = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    for i, matrix in enumerate(wide):
        groups[(matrix.shape[0], matrix.shape[1])].append(i)
    for group in groups.values():
        stack = torch.stack([wide[i] for i in group])
        stack = orthogonalise(stack.bfloat16() if stack.is_cuda else stack)
        for i, matrix in zip(group, stack, strict=True):
            wide[i] = matrix
    return [new.T if old.shape[0] > old.shape[1] else new for old, new in zip(matrices, wide, strict=True)]


class Muon:
    """Muon over `parameters`, each of 2 or more dimensions; the first is the output, the others together the input."""

    def __init__(self, parameters: dict[str, nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        self.parameters, self.lr, self.momentum, self.weight_decay = parameters, lr, momentum, weight_decay
        self.buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, lr_factor: float, orthogonalise_all: Any = orthogonalise_all) -> None:
        lr = self.lr * lr_factor
        given = {name: p for name, p in self.parameters.items() if p.grad is not None}  # the loss depends on them
        if not given:
            return
        ps, grads = list(given.values()), [p.grad for p in given.values()]
        buffers = [self.buffers.setdefault(name, torch.zeros_like(p)) for name, p in given.items()]
        _torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
        updates = _torch._foreach_lerp(grads, buffers, self.momentum)
        updates = orthogonalise_all([update.flatten(1) for update in updates])
        # A step of one size in every output whatever the shape (Jordan's scale for tall matrices).
        sizes = [-lr * max(1, outputs / inputs) ** 0.5 for outputs, inputs in (update.shape for update in updates)]
        if self.weight_decay:
            _torch._foreach_mul_(ps, 1 - lr * self.weight_decay)
        steps = _torch._foreach_mul([update.reshape(p.shape) for update, p in zip(updates, ps, strict=True)], sizes)
        _torch._foreach_add_(ps, steps)


class Elementwise:
    """AdamW or SGD over named `parameters`, of which those in `decays` decay and those in `slow` learn at SLOW of the
    rate; `state` maps what is kept of each to {parameter: tensor}.

    By torch's functional forms: its optimiser classes import the compiler, which takes three seconds at the start.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decays: set[str], slow: set[str], recipe: Recipe) -> None:
        self.parameters, self.recipe = parameters, recipe
        kinds: dict[tuple[float, float], list[str]] = {}  # parameters of one weight decay and part of the rate
        for name in parameters:
            kind = recipe.weight_decay if name in decays else 0.0, SLOW if name in slow else 1.0
            kinds.setdefault(kind, []).append(name)
        self.groups = list(kinds.items())
        kept = ("momentum_buffer",) if recipe.optimizer == "sgd" else ("step", "exp_avg", "exp_avg_sq")
        self.state: dict[str, dict[str, Tensor]] = {what: {} for what in kept}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for (weight_decay, part), group in self.groups:
            grads = {name: p.grad for name in group if (p := self.parameters[name]).grad is not None}
            if grads:
                (self._sgd if self.recipe.optimizer == "sgd" else self._adamw)(grads, part * lr, weight_decay)

    def _adamw(self, grads: dict[str, Tensor], lr: float, weight_decay: float) -> None:
        r, s = self.recipe, self.state
        ps: list[Tensor] = [self.parameters[name] for name in grads]
        for name, p in zip(grads, ps, strict=True):
            if name not in s["step"]:
                s["step"][name] = torch.zeros((), device=p.device)
                s["exp_avg"][name], s["exp_avg_sq"][name] = torch.zeros_like(p), torch.zeros_like(p)
        steps, means, squares = ([s[what][name] for name in grads] for what in ("step", "exp_avg", "exp_avg_sq"))
        adamw(
            ps, list(grads.values()), means, squares, [], steps, fused=True, amsgrad=False, maximize=False,
            beta1=r.betas[0], beta2=r.betas[1], lr=lr, weight_decay=weight_decay, eps=r.eps,
        )  # fmt: skip

    def _sgd(self, grads: dict[str, Tensor], lr: float, weight_decay: float) -> None:
        ps: list[Tensor] = [self.parameters[name] for name in grads]
        kept = self.state["momentum_buffer"]
        buffers = [kept.get(name) for name in grads]
        sgd(
            ps, list(grads.values()), buffers, fused=True, weight_decay=weight_decay, momentum=self.recipe.momentum,
            lr=lr, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        kept |= {name: buffer for name, buffer in zip(grads, buffers, strict=True) if buffer is not None}


def update_rows(tables: list[tuple[Tensor, ...]], lr: float, eps: float) -> None:
    """For each table [N, C]: the rows to change, int64 [R], no one twice, and their gradients [R, C]; how often each
    row has been changed and the mean of its gradients' squares, each float32 [N], which move."""
    for table, rows, grad, updates, square in tables:
        count = updates[rows] + 1
        mean = square[rows].lerp(grad.square().mean(dim=1), 1 / count)
        updates[rows], square[rows] = count, mean
        table.index_add_(0, rows, grad / mean.sqrt().add_(eps)[:, None], alpha=-lr)


def update_table(table: Tensor, grad: Tensor, updates: Tensor, square: Tensor, lr: float, eps: float) -> None:
    """As `update_rows`, from a whole gradient [N, C] whose other rows are zero. It does not look for the rows that were
    read: a GPU would have to wait until their number is known. So a row that was read does not count where its gradient
    is zero: in the first step from init=zero."""
    now = grad.square().mean(dim=1)
    read = now > 0
    updates += read
    square.copy_(torch.where(read, square.lerp(now, 1 / updates.clamp(min=1)), square))
    table.addcmul_(grad, torch.where(read, lr / square.sqrt().add(eps), 0.0)[:, None], value=-1)


class Rows:
    """RMSprop without momentum for the rows of tables, by name, each [N, C]: the gradient over its root mean square,
    the mean being over all the gradients that this row has had so far, all C channels together.

    AdamW would take a row for one that is always there: in the steps that do not read it, its mean of squares fades and
    its momentum goes on. (torch.optim.SparseAdam leaves such rows alone, but corrects its means by the steps made.) One
    number a row, as in the row-wise AdaGrad of large recommendation models (Naumov et al. 2019, arXiv 1906.00091)."""

    def __init__(self, tables: dict[str, nn.Embedding], recipe: Recipe) -> None:
        self.tables, self.recipe = tables, recipe
        kept = ("row_updates", "row_square")
        self.state = {
            what: {name: torch.zeros_like(table.weight.detach()[:, 0]) for name, table in tables.items()}
            for what in kept
        }

    @torch.no_grad()
    def step(self, lr_factor: float, update_rows: Any = update_rows) -> None:
        tables, lr, eps = [], self.recipe.table_lr * lr_factor, self.recipe.eps
        for name, table in self.tables.items():
            p, kept = table.weight, (self.state["row_updates"][name], self.state["row_square"][name])
            if p.grad is not None and p.grad.is_sparse:
                grad = p.grad.coalesce()
                tables.append((p, grad.indices()[0], grad.values(), *kept))
            elif p.grad is not None:
                update_table(p, p.grad, *kept, lr, eps)
        update_rows(tables, lr, eps)


class Optimizer:
    """The optimiser that a recipe asks for, over a core's parameters. `step` expects their gradients, and leaves what
    has compiled versions to the backend that `use` gives it."""

    def __init__(self, core: nn.Module, recipe: Recipe) -> None:
        self.named = dict(core.named_parameters())
        self.backend: Backend | None = None
        hidden = matrices(core) if recipe.optimizer == "muon" else {}
        tables = ngram_tables(core) if hidden else {}
        rest = {name: p for name, p in self.named.items() if name not in hidden and name not in tables}
        self.muon = Muon(hidden, recipe.lr, recipe.momentum, recipe.weight_decay) if hidden else None
        self.rows = Rows(tables, recipe)
        decays = {name for name, p in rest.items() if recipe.decay == "all" or p.ndim >= 2}
        if recipe.optimizer == "muon":
            decays = set()  # the scale of embeddings and of the output layer is theirs to choose
        slow = label_projections(core) if hidden else set()
        self.base = Elementwise(rest, decays, slow, recipe)
        self.lr = recipe.adam_lr if recipe.optimizer == "muon" else recipe.lr

    def use(self, backend: Backend) -> None:
        """Compute with this backend, whose gradients of n-gram tables may hold only the rows that were read."""
        self.backend = backend
        torch.sparse.check_sparse_tensor_invariants.disable()  # the default, of which PyTorch 2.11 warns
        for table in self.rows.tables.values():
            table.sparse = backend.sparse

    def step(self, lr_factor: float) -> None:
        """Update the parameters at `lr_factor` times the recipe's rates, and drop their gradients."""
        self.base.step(self.lr * lr_factor)
        backend = self.backend
        self.rows.step(lr_factor, backend.update_rows if backend else update_rows)
        if self.muon:
            self.muon.step(lr_factor, backend.orthogonalise_all if backend else orthogonalise_all)
        self.drop_gradients()

    def gradient_norm(self) -> Tensor:
        """The norm of all gradients together, a scalar on the core's device."""
        grads = []
        for p in self.named.values():
            if p.grad is not None and p.grad.is_sparse:
                p.grad = p.grad.coalesce()  # what was read several times, summed
                grads.append(p.grad.values())
            elif p.grad is not None:
                grads.append(p.grad)
        return whole(torch.nn.utils.get_total_norm(grads, foreach=True))

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
        for what, state in (self.base.state | self.rows.state).items():
            tensors |= {f"{what}/{name}": tensor for name, tensor in state.items()}
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. Raises CorruptError where it does not belong to these parameters."""
        states = self.base.state | self.rows.state | ({"muon": self.muon.buffers} if self.muon else {})
        for key, tensor in tensors.items():
            what, _, name = key.partition("/")
            state = states.get(what)
            shape = self.named[name].shape if name in self.named else torch.Size()
            shape = {"step": torch.Size(), "row_updates": shape[:1], "row_square": shape[:1]}.get(what, shape)
            if state is None or name not in self.named or tensor.shape != shape:
                raise CorruptError(f"the optimizer's state has a `{key}` that the model has no place for")
            tensor = tensor.to(self.named[name].device, copy=True)
            state[name] = tensor if what == "step" else sharding.part(tensor, self.named[name])


def matrices(core: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that Muon is for: weights of 2 and more dimensions, but embeddings, the projections of labels, and
    the output layer, which is the core's last linear layer."""
    linears = [module for module in core.modules() if isinstance(module, nn.Linear)]
    others = [module for module in core.modules() if isinstance(module, nn.Embedding)] + linears[-1:]
    taken, labels = {id(module.weight) for module in others}, label_projections(core)
    return {name: p for name, p in core.named_parameters() if p.ndim >= 2 and id(p) not in taken and name not in labels}


def label_projections(core: nn.Module) -> set[str]:
    """The weights that bring a WaveNet's labels to its gates. They overfit: 2,337 steps on spoken digits end at 4.014
    bits a sample by Muon, 3.985 by AdamW, and 3.960 at SLOW of its rate. A mel spectrogram's do not: 800 steps end at
    3.945 by Muon, 4.000 by AdamW."""
    if not (isinstance(core, WaveNet) and core.config.labels):
        return set()
    return {f"layers.{i}.condition.weight" for i in range(core.config.layers)}


def ngram_tables(core: nn.Module) -> dict[str, nn.Embedding]:
    """The n-gram tables of a GPT, by the names of their weights."""
    found = ((name, module) for name, module in core.named_modules() if name.startswith("ngrams."))
    return {f"{name}.weight": module for name, module in found if isinstance(module, nn.Embedding)}
