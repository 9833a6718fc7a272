"""When a module runs its own code again, as what was captured does not hold any more."""

import copy

import pytest
import torch
from torch import Tensor, nn

import moe_compile
from tests.pairs import check_close
from tests.test_optimize import HIDDEN, Listed, Stacked, X


class Asking(Stacked):
    """It asks for both sizes, and reads two numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.slope = 2.0, 0.5

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale * super().forward(x) + self.slope
        if x.shape[0] > 1:
            out = out * 3
        return out.square() if x.shape[1] > 3 else out


def rewritten(original: nn.Module) -> nn.Module:
    model = moe_compile.optimize(copy.deepcopy(original), example_inputs=(X,))
    (site,) = (site for site in moe_compile.report(model).sites if site.kind == "experts")
    assert site.status == "rewritten"
    return model


def check_same(model: nn.Module, original: nn.Module, x: Tensor) -> None:
    check_close({"out": model(x).detach()}, {"out": original(x).detach()})


def test_sizes_that_answer_otherwise() -> None:
    torch.manual_seed(0)
    original = Asking()
    model = rewritten(original)
    for sizes in ((2, 5), (3, 4), (2, 3), (1, 5), (1, 3)):
        check_same(model, original, torch.randn(*sizes, HIDDEN))


@pytest.mark.parametrize("name", ["scale", "slope"])
def test_an_attribute_that_changes(name: str) -> None:
    torch.manual_seed(0)
    original = Asking()
    model = rewritten(original)
    for module in (model, original):
        setattr(module, name, 7.0)
    check_same(model, original, X)


def test_hooks_of_every_module_that_is_not_called() -> None:
    torch.manual_seed(0)
    model = rewritten(Listed())
    for name, module in model.get_submodule("experts").named_modules():
        if name:
            called: list[str] = []
            handle = module.register_forward_hook(lambda *_, n=name, to=called: to.append(n))
            model(X)
            handle.remove()
            assert called == [name]
