"""Attention by flex_attention against the op: on a CPU its unfused form, which is the same math."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModelForCausalLM, GptOssConfig

import moe_compile
from moe_compile.kernels import flex_attention as kernels
from moe_compile.kernels.flex_attention import block_mask, flexible_attention, is_flexible
from moe_compile.ops import attention
from moe_compile.providers import flex_attention as provider
from moe_compile.providers.flex_attention import FlexAttentionProvider
from moe_compile.providers.torch import TorchProvider

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SCALE = 0.25
LENGTHS = [(1, 1), (7, 7), (128, 128), (130, 130), (300, 300), (5, 140), (140, 5)]
BANDS: list[dict[str, Any]] = [
    {"causal": True},
    {"window": 1},
    {"window": 3},
    {"window": 128},
    {"causal": True, "window": 200},
    {"window": 1000},
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex refuses gradients on a CPU, where Inductor has no kernel for them; its math has them."""
    torch.manual_seed(0)
    torch.compiler.reset()
    if not torch.cuda.is_available():
        monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    yield
    torch.compiler.reset()


def compiled() -> Callable[..., Any]:
    return torch.compile(flexible_attention, backend="aot_eager", fullgraph=True, dynamic=True)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().double().requires_grad_()


def leaves(queries: int, keys: int, sinks: bool = True, heads: int = 2) -> list[Tensor | None]:
    """query, key, value and the sinks."""
    query, key, value = leaf(2, 4, queries, 16), leaf(2, heads, keys, 16), leaf(2, heads, keys, 32)
    return [query, key, value, leaf(4) if sinks else None]


def run(
    fn: Callable[..., Any],
    tensors: list[Tensor | None],
    mask: Tensor | None,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    **options: Any,
) -> list[Tensor]:
    """Output and every gradient."""
    mine = [None if t is None else t.detach().to(device, dtype).requires_grad_() for t in tensors]
    if mask is not None:
        mask = mask.to(device)
        mask = mask.to(dtype) if mask.is_floating_point() else mask
    *heads, sinks = mine
    out = fn(*heads, mask, sinks, scale=SCALE, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=generator).bfloat16().to(out)
    given = [t for t in mine if t is not None]
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


def assert_equal(
    fn: Callable[..., Any], tensors: list[Tensor | None], mask: Tensor | None, **options: Any
) -> None:
    got, want = run(fn, tensors, mask, **options), run(attention, tensors, mask, **options)
    for g, w in zip(got, want, strict=True):
        # The gradient of the log-sum-exp is float32 whatever the dtype.
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def masks(batch: int, queries: int, keys: int) -> dict[str, Tensor]:
    """Masks with rows and blocks that nobody sees, and what no rule makes."""
    seen = torch.rand(batch, 1, queries, keys) > 0.3
    seen[:, :, : queries // 2, keys // 2 :] = False
    seen[0, 0, 0] = False
    low = torch.finfo(torch.bfloat16).min
    bias = torch.randn(batch, 1, queries, keys).bfloat16().float()
    return {
        "bool": seen,
        "low": torch.zeros(seen.shape).masked_fill(~seen, low),
        "infinite": torch.zeros(seen.shape).masked_fill(~seen, float("-inf")),
        "bias": bias.masked_fill(~seen, low),
    }


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("band", [{"causal": True}, {"window": 3}, {"causal": True, "window": 129}])
def test_bands_at_all_lengths(band: dict[str, Any], sinks: bool) -> None:
    backend = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(flexible_attention, backend=backend, fullgraph=True, dynamic=True)
    graphs: list[int] = []
    for length in (1, 7, 200, 300):  # one block is a case of its own
        assert_equal(fn, leaves(length, length, sinks), None, **band)
        graphs.append(backend.frame_count)
    assert graphs[-1] == graphs[-2]


@pytest.mark.parametrize(("queries", "keys", "heads"), [(5, 140, 1), (140, 5, 4)])
def test_other_lengths_and_numbers_of_heads(queries: int, keys: int, heads: int) -> None:
    assert_equal(compiled(), leaves(queries, keys, heads=heads), None, window=3)


def test_sinks_alone() -> None:
    assert_equal(compiled(), leaves(9, 12), None)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["bool", "low", "infinite", "bias"])
def test_masks_at_all_lengths(kind: str, batch: int) -> None:
    backend = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(flexible_attention, backend=backend, fullgraph=True, dynamic=True)
    graphs: list[int] = []
    for length in (200, 300):
        assert_equal(fn, leaves(length, length), masks(batch, length, length)[kind])
        graphs.append(backend.frame_count)
    assert graphs[-1] == graphs[-2]


def test_a_query_that_sees_nothing_without_a_sink() -> None:
    assert_equal(compiled(), leaves(140, 150, sinks=False), masks(2, 140, 150)["bool"])


def entries(count: Tensor, indices: Tensor) -> list[list[int]]:
    rows = zip(count.flatten().tolist(), indices.flatten(0, -2).tolist(), strict=True)
    return [row[:n] for n, row in rows]


def assert_same_blocks(got: Any, want: Any) -> None:
    assert got.shape == want.shape
    assert got.BLOCK_SIZE == want.BLOCK_SIZE
    for side in ("kv", "q", "full_kv", "full_q"):
        pair = [getattr(got, f"{side}_num_blocks"), getattr(got, f"{side}_indices")]
        other = [getattr(want, f"{side}_num_blocks"), getattr(want, f"{side}_indices")]
        assert entries(*pair) == entries(*other), side
        assert [(t.dtype, t.stride()) for t in pair] == [(t.dtype, t.stride()) for t in other]


@pytest.mark.parametrize("band", BANDS)
@pytest.mark.parametrize("lengths", [*LENGTHS, (513, 700)])
def test_the_blocks_of_a_band_are_torchs(lengths: tuple[int, int], band: dict[str, Any]) -> None:
    window = band.get("window")

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < (10**6 if window is None else window))

    want = create_block_mask(seen, None, None, *lengths, device="cpu")
    assert_same_blocks(block_mask(None, lengths, torch.device("cpu"), **band), want)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("lengths", [*LENGTHS, (513, 700)])
def test_the_blocks_of_a_mask_are_torchs(lengths: tuple[int, int], batch: int) -> None:
    mask = torch.rand(batch, 1, *lengths) > 0.5
    mask[:, :, :200, 128:] = True
    mask[:, :, 256:, :256] = False

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return mask[b, h, i, j]

    want = create_block_mask(seen, batch, 1, *lengths, device="cpu")
    assert_same_blocks(block_mask(mask, lengths, mask.device), want)


def test_blocks_that_a_float_mask_hides_are_skipped() -> None:
    mask = torch.zeros(1, 1, 256, 256).masked_fill(torch.ones(256, 256).triu(1).bool(), -3e38)
    blocks = block_mask(mask, (256, 256), mask.device)
    assert blocks is not None
    assert entries(blocks.kv_num_blocks, blocks.kv_indices) == [[0], [0, 1]]
    assert blocks.full_kv_num_blocks is None


def flexible(
    width: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    mask: Tensor | None = None,
    length: int = 6,
    causal: bool = False,
    window: int | None = None,
    dropout: float = 0.0,
) -> bool:
    query, key = (torch.zeros(2, h, length, width, dtype=dtype) for h in (4, 2))
    return is_flexible(query, key, key, mask, causal=causal, window=window, dropout=dropout)


def test_what_flex_takes() -> None:
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    assert flexible(causal=True)
    assert flexible(dtype=torch.float16, mask=mask)
    assert flexible(mask=mask[:1].bfloat16())
    assert not flexible(width=8)
    assert not flexible(width=96)
    assert not flexible(length=0)
    assert not flexible(dropout=0.1)
    assert not flexible(dtype=torch.float32)
    assert not flexible(mask=mask, causal=True)
    assert not flexible(mask=mask, window=3)
    assert not flexible(mask=mask[0])
    assert not flexible(mask=mask[:, :, :1])
    assert not flexible(mask=mask.expand(2, 4, 6, 6))
    assert not flexible(mask=mask.bfloat16().requires_grad_())


def test_autocast_gives_the_dtype() -> None:
    query = torch.zeros(2, 4, 6, 16)
    half = query.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_flexible(query, half, half, None, causal=True, window=None, dropout=0.0)
        out = compiled()(query, half, half, None, torch.zeros(4), scale=SCALE, causal=True)
    assert out.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_model_with_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of gpt-oss, whose mask is a tensor, compile to graphs with flex in them."""
    calls: list[Tensor | None] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, mask: Any, *rest: Any, **kw: Any) -> Tensor:
        calls.append(mask)
        return flexible_attention(query, key, value, mask, *rest, **kw)

    config = GptOssConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rows = [torch.randint(128, (2, length)) for length in (150,)]

    def losses() -> list[Tensor]:
        found: list[Tensor] = []
        for ids in rows:
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            sinks = model.get_parameter("model.layers.0.self_attn.sinks").grad
            assert sinks is not None
            found += [loss.detach(), sinks.float().clone()]
        return found

    want = losses()
    monkeypatch.setattr(provider, "is_fused", lambda query: torch.compiler.is_dynamo_compiling())
    monkeypatch.setattr(provider, "flexible_attention", spy)
    monkeypatch.setattr(FlexAttentionProvider, "supports", lambda *_: None)
    options = moe_compile.OptimizeConfig(
        compile={"backend": "aot_eager"}, autocast=False, providers={"attention": "flex_attention"}
    )
    moe_compile.optimize(model, config=options)
    got = losses()
    assert calls
    assert all(mask is not None for mask in calls)
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.005)


def test_a_cpu_keeps_sdpa() -> None:
    query = torch.zeros(2, 4, 6, 16)
    assert not kernels.is_fused(query)
    run_compiled = torch.compile(kernels.is_fused, backend="eager")
    assert not run_compiled(query)


@pytest.mark.gpu
@gpu
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["causal", "window", "bool", "low"])
def test_on_a_gpu(kind: str, sinks: bool) -> None:
    """As exact as SDPA, with one graph for all lengths, and nothing of its kernels."""
    if kind == "low" and not sinks:
        pytest.skip("left to the reference")
    implementation = TorchProvider().implementation(attention)
    flex = FlexAttentionProvider().implementation(attention)
    fn = torch.compile(flex, fullgraph=True, dynamic=True)
    band = {"causal": {"causal": True}, "window": {"window": 130}}.get(kind, {})
    if kind == "causal" and not sinks:
        pytest.skip("SDPA's own fused kernel")
    for length in (256, 40, 1000, 1):
        tensors, mask = leaves(length, length, sinks), masks(2, length, length).get(kind)
        own = run(implementation, tensors, mask, torch.bfloat16, "cuda", **band)
        want = run(attention, tensors, mask, torch.float64, "cuda", **band)
        with torch.profiler.profile() as profile:
            got = run(fn, tensors, mask, torch.bfloat16, "cuda", **band)
        assert not [e.key for e in profile.key_averages() if "efficient_attention" in e.key]
        for g, o, w in zip(got, own, want, strict=True):
            error, own_error = ((t.double() - w).norm() for t in (g, o))
            eps = torch.finfo(torch.bfloat16).eps
            # One key alone has all the weight: the gradients of query and key are zero.
            assert error <= max(2 * own_error, eps * w.norm(), 1e-6)
