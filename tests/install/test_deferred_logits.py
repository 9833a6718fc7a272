import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_compile.install.deferred_logits import Backwards, DeferredLogits, Head, Transform
from moe_compile.ops import linear_cross_entropy

V = 11


def counted(calls: list[int]) -> Callable[..., Tensor]:
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return linear_cross_entropy(*args, **kwargs)

    return loss


class Pair:
    """The same hidden states and weights twice: logits that are deferred, and real ones."""

    def __init__(self, backwards: Backwards | None = None) -> None:
        self.calls: list[int] = []
        torch.manual_seed(0)
        self.leaves = [t.requires_grad_() for t in (torch.randn(2, 5, 4), torch.randn(V, 4))]
        self.others = [t.detach().clone().requires_grad_() for t in self.leaves]
        x, weight = self.leaves
        own = counted(self.calls), Transform(), weight._version, backwards
        self.deferred: Any = DeferredLogits.defer(Head(x, weight, None, *own))
        self.real = F.linear(*self.others)

    def check(self, use: Callable[[Tensor], Tensor]) -> None:
        """Result and gradients of a use are those of the real logits'."""
        got, want = use(self.deferred), use(self.real)
        torch.testing.assert_close(got, want)
        got.sum().backward()
        want.sum().backward()
        for own, other in zip(self.leaves, self.others, strict=True):
            torch.testing.assert_close(own.grad, other.grad)


def labels(rows: int) -> Tensor:
    found = torch.arange(rows) % V
    return found.where(found != 3, -100)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "flattened": lambda z: F.cross_entropy(z.view(-1, V), labels(10)),
    "widened": lambda z: F.cross_entropy(z.float().view(-1, z.size(-1)), labels(10)),
    "shifted": lambda z: F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), labels(8)),
    "shifted otherwise": lambda z: F.cross_entropy(z[:, 1:].reshape(-1, V), labels(8)),
    "one row": lambda z: F.cross_entropy(z[0], labels(5)),
    "capped": lambda z: F.cross_entropy((torch.tanh(z / 3) * 3).view(-1, V), labels(10)),
    "scaled": lambda z: F.cross_entropy((0.5 * z).view(-1, V), labels(10), reduction="sum") / 7,
    "moved": lambda z: F.cross_entropy(z.to(torch.device("cpu")).view(-1, V), labels(10)),
    "module": lambda z: nn.CrossEntropyLoss()(z.view(-1, V), labels(10)),
    "ignored": lambda z: F.cross_entropy(z.view(-1, V), labels(10).clamp(0), ignore_index=2),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "smoothed": lambda z: F.cross_entropy(z.view(-1, V), labels(10), label_smoothing=0.1),
    "weighed": lambda z: F.cross_entropy(z.view(-1, V), labels(10), torch.rand(V).fill_(2)),
    "each": lambda z: F.cross_entropy(z.view(-1, V), labels(10), reduction="none"),
    "transposed": lambda z: F.cross_entropy(z.transpose(1, 2), labels(10).view(2, 5)),
    "soft labels": lambda z: F.cross_entropy(z.view(-1, V), torch.full((10, V), 1 / V)),
    "some words": lambda z: z[..., :4].logsumexp(-1),
    "one word": lambda z: z[..., 3].exp(),
    "new axis": lambda z: z[None] * 2,
    "other shape": lambda z: z.view(-1),
    "masked": lambda z: z[torch.tensor([True, False])].square(),
    "in place": lambda z: z.mul_(2) + 1,
    "in place, then used": lambda z: (z.mul_(2), z.view(-1, V).sum(0))[1],
    "log-softmax": lambda z: z.log_softmax(-1).gather(-1, torch.zeros(2, 5, 1).long()),
    "two of them": lambda z: z[:, 1:] - z[:, :-1],
    "second argument": lambda z: torch.ones(()) - z,
    "as an index": lambda z: torch.stack([z, z]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_needs_no_logits(name: str) -> None:
    pair = Pair()
    pair.check(LOSSES[name])
    assert pair.calls == [1]
    assert pair.deferred.computed is None


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_has_them(name: str) -> None:
    pair = Pair()
    pair.check(OTHERS[name])
    assert pair.calls == []


def test_what_is_asked_of_shape_and_kind_needs_none() -> None:
    pair = Pair()
    z, real = pair.deferred, pair.real
    for ask in (Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, len):
        assert ask(z) == ask(real)
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_leaf"):
        assert getattr(z, name) == getattr(real, name)
    assert isinstance(z, Tensor)
    assert pair.deferred.computed is None


class Doubled(torch.autograd.Function):
    """Code below torch functions, such as a kernel of another library."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


def test_a_function_of_autograd_has_their_gradient() -> None:
    Pair().check(Doubled.apply)


@pytest.mark.parametrize("name", ["flattened", "one word", "doubled"])
def test_hooks_see_the_gradient_and_may_change_it(name: str) -> None:
    uses = LOSSES | OTHERS | {"doubled": Doubled.apply}
    pair, seen = Pair(), dict[str, list[Tensor]]()

    def double(logits: Tensor, which: str) -> Any:
        seen[which] = []
        logits.register_hook(lambda grad: 5 * grad).remove()
        first = logits.register_hook(lambda grad: 2 * grad)
        logits.register_hook(seen[which].append)
        return first

    handles = double(pair.deferred, "deferred"), double(pair.real, "real")
    assert pair.deferred.computed is None
    pair.check(uses[name])
    torch.testing.assert_close(seen["deferred"], seen["real"])
    assert len(seen["real"]) == 1
    for handle in handles:
        handle.remove()


def test_a_hook_on_logits_that_are_there() -> None:
    pair, seen = Pair(), list[Tensor]()
    pair.deferred.sum()
    pair.deferred.register_hook(seen.append)
    pair.deferred.square().sum().backward()
    torch.testing.assert_close(seen, [2 * pair.real.detach()])


def test_looking_without_gradients_loses_none() -> None:
    pair = Pair()
    with torch.no_grad():
        torch.testing.assert_close(pair.deferred.argmax(-1), pair.real.argmax(-1))
    pair.check(torch.exp)


def test_a_loss_and_a_look_at_the_logits_add_up() -> None:
    Pair().check(lambda z: LOSSES["flattened"](z) + z.square().mean() + LOSSES["capped"](z))


def test_copies_are_plain() -> None:
    pair = Pair()
    assert type(pair.deferred.detach()) is Tensor
    assert type(copy.deepcopy(pair.deferred.detach())) is Tensor
    assert pair.deferred.tolist() == pair.real.tolist()


def test_weights_that_changed_are_an_error() -> None:
    pair = Pair()
    LOSSES["flattened"](pair.deferred).backward()
    pair.deferred.argmax(-1)
    pair = Pair()
    with torch.no_grad():
        pair.leaves[1] += 1
    with pytest.raises(RuntimeError, match="had changed; read them before"):
        pair.deferred.argmax(-1)


def test_weights_that_were_sharded_again_are_an_error() -> None:
    pair = Pair(Backwards())
    loss = LOSSES["flattened"](pair.deferred)
    pair.deferred.head.logits()
    loss.backward()
    with pytest.raises(RuntimeError, match="been sharded again; read them before"):
        pair.deferred.argmax(-1)


def test_a_change_that_a_view_would_see_is_an_error() -> None:
    z = Pair().deferred
    view = z[:, 1:]
    with pytest.raises(RuntimeError, match="changed by mul_ while a view of them is kept"):
        z.mul_(2)
    with pytest.raises(RuntimeError, match="changed by __setitem__ while"):
        z[0] = 0
    del view
    z.mul_(2)
    pair = Pair()
    doubled = pair.deferred * 2
    pair.deferred.add_(1)
    torch.testing.assert_close(doubled + 0, pair.real * 2)


def test_autocast_widens_the_loss() -> None:
    pair = Pair()
    x, weight = (t.bfloat16() for t in pair.leaves)
    head = Head(x, weight, None, linear_cross_entropy, Transform(), weight._version)
    with torch.autocast("cpu", torch.bfloat16):
        for z in (DeferredLogits.defer(head), F.linear(x, weight)):
            assert LOSSES["flattened"](z).dtype == torch.float32
    assert LOSSES["flattened"](DeferredLogits.defer(head)).dtype == torch.bfloat16
