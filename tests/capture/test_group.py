import itertools

import pytest
import torch
from torch import Tensor, nn

import moe_compile
from moe_compile import OptimizeConfig
from moe_compile.capture.group import Group, group
from moe_compile.capture.probe import probe
from moe_compile.capture.shadow import cast_shadow
from moe_compile.capture.untouched import OfKind
from tests.families import build
from tests.pairs import check_close, make_pair


class Layer(nn.Module):
    """A norm whose result is scaled by a plain attribute."""

    def __init__(self, index: int, scale: float, limit: int | None = None) -> None:
        super().__init__()
        self.layer_idx = index
        self.scale = scale
        self.limit = limit
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = self.weight * y.to(x.dtype)
        if self.limit is not None and x.shape[1] > self.limit:
            y = -y
        return x + y * self.scale


class Model(nn.Module):
    def __init__(self, scales: list[float], limit: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, scale, limit) for i, scale in enumerate(scales))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Curious(nn.Module):
    """A layer that may ask how many numbers are not zero before it calls its child."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.inner = Layer(0, 1.0)
        self.asked = nn.Linear(1, 1) if asks else None

    def forward(self, x: Tensor) -> Tensor:
        if self.asked is not None and x.flatten().nonzero().shape[0] // 2 < 2:
            return x - self.inner(x)
        return x + self.inner(x)


def random(length: int = 6, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(length))


def groups(model: nn.Module, *example: Tensor) -> list[Group]:
    shadow = cast_shadow(model)
    return group(shadow, probe(shadow, example or None).calls)


def names(model: nn.Module) -> list[list[str]]:
    return [found.names for found in groups(model, random())]


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach()} | named


def test_layers_that_differ_in_their_index_alone_share_a_group() -> None:
    assert names(Model([1.0, 1.0, 1.0])) == [["layers.0", "layers.1", "layers.2"]]


def test_layers_that_differ_in_an_attribute_do_not() -> None:
    found = names(Model([1.0, 2.0, 1.0, 2.0]))
    assert found == [["layers.0", "layers.2"], ["layers.1", "layers.3"]]


def test_the_attribute_is_honoured() -> None:
    models = make_pair(Model([1.0, 2.0, 1.0]), example_inputs=(random(),))
    check_close(run(models.optimized, random()), run(models.original, random()))
    assert [s.status for s in moe_compile.report(models.optimized).sites] == ["rewritten"] * 2


def test_an_attribute_changed_afterwards_is_honoured() -> None:
    models = make_pair(Model([1.0, 1.0]), example_inputs=(random(),))
    for model in (models.optimized, models.original):
        model.layers[1].scale = 3.0
    check_close(run(models.optimized, random()), run(models.original, random()))


def test_captures_do_not_grow_with_depth() -> None:
    shallow, deep = (
        groups(build("mixtral", torch.bfloat16, num_hidden_layers=depth)) for depth in (2, 6)
    )
    assert [g.capture is not None for g in shallow] == [g.capture is not None for g in deep]
    layers = [len(g.names) for g in deep if "layers" in g.names[0]]
    assert layers == [6]


@pytest.mark.parametrize("example", [6, 12])
def test_a_question_about_sizes_is_asked_again(example: int) -> None:
    models = make_pair(Model([1.0, 1.0], limit=8), example_inputs=(random(example),))
    for length, batch in itertools.product((1, 7, 8, 9, 15), (1, 3)):
        x = random(length, batch)
        check_close(run(models.optimized, x), run(models.original, x))


class Numbered(nn.Module):
    """A layer that hands its number on, where nothing looks at it, or something does."""

    def __init__(self, index: int, *, looks: bool) -> None:
        super().__init__()
        self.layer_idx, self.looks = index, looks
        self.inner = Keyed()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x, self.layer_idx, {} if self.looks else None)


class Keyed(nn.Module):
    """A norm that may keep what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor, index: int, kept: dict[int, Tensor] | None) -> Tensor:
        wide = x.float()
        y = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6))
        if kept is not None:
            kept[index] = y
        return y


class Numbers(nn.Module):
    def __init__(self, *, looks: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Numbered(i, looks=looks) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_number_that_is_only_handed_on_does_not_matter() -> None:
    (found,) = groups(Numbers(looks=False), random())
    assert found.names == [f"layers.{i}" for i in range(4)]
    assert found.reads["", "layer_idx"] == OfKind(int)


class Windowed(nn.Module):
    """A layer whose code asks whether it has a window, and then does not look at it."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window, self.inner = window, Keyed()

    def forward(self, x: Tensor) -> Tensor:
        if self.has_window():
            x = x.flip(1)
        return x + self.inner(x, 0, None)

    def has_window(self) -> bool:
        return self.window is not None


class Typed(Windowed):
    """One whose code asks for the type of its window."""

    def has_window(self) -> bool:
        return isinstance(self.window, int)


class Windows(nn.Module):
    def __init__(self, *windows: int | None, kind: type[Windowed] = Windowed) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(kind, windows))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("windows", [*itertools.permutations((None, 3, 4))])
def test_nothing_stands_for_none(windows: tuple[int | None, ...]) -> None:
    named = sorted(found.names for found in groups(Windows(*windows), random()))
    without = [f"layers.{windows.index(None)}"]
    others = [f"layers.{i}" for i, window in enumerate(windows) if window is not None]
    assert named == sorted([without, others])
    pair = make_pair(Windows(*windows), OptimizeConfig(verify="off"), example_inputs=(random(),))
    check_close(run(pair.optimized, random()), run(pair.original, random()))


def test_a_number_whose_type_is_asked_for_does() -> None:
    model = Windows(3, 4, kind=Typed)
    assert [found.names for found in groups(model, random())] == [["layers.0"], ["layers.1"]]
    pair = make_pair(model, OptimizeConfig(verify="off"), example_inputs=(random(),))
    check_close(run(pair.optimized, random()), run(pair.original, random()))


def test_a_number_that_is_a_key_does() -> None:
    assert [found.names for found in groups(Numbers(looks=True), random())] == [
        [f"layers.{i}"] for i in range(4)
    ]


def test_the_number_that_is_handed_on_is_the_layers_own() -> None:
    models = make_pair(Numbers(looks=False), example_inputs=(random(),))
    seen: list[int] = []
    for layer in models.optimized.layers:
        layer.inner.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    check_close(run(models.optimized, random()), run(models.original, random()))
    assert seen == [0, 1, 2, 3]


def test_a_child_that_a_layers_code_does_not_get_to_is_called_as_its_twin() -> None:
    model = Model([])
    model.layers = nn.ModuleList(Curious(asks) for asks in (True, False, True))
    found = groups(model, random())
    parts = ["layers.0.inner", "layers.2.inner"]
    assert [g.names for g in found if g.is_part] == [parts]
    models = make_pair(model, example_inputs=(random(),))
    norms = [site for site in moe_compile.report(models.optimized).sites if site.kind == "rms_norm"]
    assert sum(site.layers for site in norms if site.status == "rewritten") == 3
    check_close(run(models.optimized, random(9)), run(models.original, random(9)))
