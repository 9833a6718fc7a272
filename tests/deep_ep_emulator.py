"""DeepEP V1's `Buffer` in plain torch over gloo, inside one machine, with its assertions.

`install()` makes it the module `deep_ep` of this process. Signatures, shapes, the order of rows and
what is refused are those of the real library; FP8 and the low-latency kernels are not there.
Every call meets the other ranks and compares notes: where the real one would hang, it fails.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Handle = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def install() -> None:
    """Makes `import deep_ep` find this module."""
    sys.modules["deep_ep"] = sys.modules[__name__]


@dataclass(frozen=True)
class Config:
    num_sms: int
    num_max_nvl_chunked_send_tokens: int
    num_max_nvl_chunked_recv_tokens: int
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 128

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Room for 128 picks and 128 scales a token, aligned to 128 bytes."""
        slots = self.num_sms // 2 * num_ranks * self.num_max_nvl_chunked_recv_tokens
        size = self.num_sms // 2 * num_ranks * 5 * 4 + slots * (hidden_bytes + 8 + 128 * 16)
        return (size + 127) // 128 * 128


class EventOverlap:
    """Of an asynchronous call: until it is waited for, its results are garbage.

    What it reads must be as it was until then.
    """

    def __init__(
        self,
        pending: list[tuple[Tensor, Tensor]] | None = None,
        read: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        self.pending, self.read = pending, read or []

    def current_stream_wait(self) -> None:
        assert self.pending is not None, "the call was not asynchronous"
        for now, then in self.read:
            assert torch.equal(now.nan_to_num(-7.0), then.nan_to_num(-7.0)), "what is sent changed"
        for shown, real in self.pending:
            shown.copy_(real)


def begun(is_async: bool, *results: Tensor, read: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """The results and the event of a call that reads some tensors."""
    if not is_async:
        return *results, EventOverlap()
    shown = [torch.full_like(t, float("nan") if t.is_floating_point() else -77) for t in results]
    pending = list(zip(shown, results, strict=True))
    return *shown, EventOverlap(pending, [(t, t.clone()) for t in read])


class Buffer:
    num_sms: int = 20
    device_type = "cpu"
    unwritten = float("nan")

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
    ) -> None:
        assert group.size() in (2, 4, 8), "intranode kernels are made for 2, 4 and 8 ranks"
        assert num_rdma_bytes == 0, "there is no RDMA inside a machine"
        assert not low_latency_mode, "not emulated"
        assert num_nvl_bytes % 128 == 0
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.explicitly_destroy = explicitly_destroy
        self.available = True
        self._meet("made", num_nvl_bytes)

    def destroy(self) -> None:
        assert self.explicitly_destroy, "`explicitly_destroy` flag must be set"
        self._meet("destroyed")
        self.available = False

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        assert new_num_sms % 2 == 0, "The SM count must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms, {2: 24, 4: 6, 8: 6}[num_ranks], 256)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config(Buffer.num_sms, {2: 10, 4: 9, 8: 4}[num_ranks], 256)

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        _check_streams(previous_event, async_finish, allocate_on_comm_stream)
        check_matrix(topk_idx, torch.int64)
        assert num_experts > 0
        assert num_experts % self.group_size == 0
        assert bool(((topk_idx >= -1) & (topk_idx < num_experts)).all())
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        owner = torch.where(topk_idx >= 0, topk_idx // (num_experts // self.group_size), -1)
        ranks = torch.arange(self.group_size)
        is_token_in_rank = (owner[:, :, None] == ranks).any(1).contiguous()
        per_rank = is_token_in_rank.sum(0, dtype=torch.int32)
        return per_rank, None, per_expert, is_token_in_rank, EventOverlap()

    def dispatch(
        self,
        x: Tensor,
        handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        check_fill()
        _check_streams(previous_event, async_finish, allocate_on_comm_stream)
        config = config or self.get_dispatch_config(self.group_size)
        self._check_rows(x, config, 0 if topk_idx is None else topk_idx.shape[1])
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            sent, event = begun(
                async_finish, self._redispatch(x, handle, config), read=(x, *handle)
            )
            return sent, None, None, None, None, event
        assert num_tokens_per_rank is not None
        assert is_token_in_rank is not None
        assert num_tokens_per_expert is not None
        assert topk_idx is not None, "dispatch without picks is not emulated"
        assert topk_weights is not None
        self._check_layout(x, num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert)
        check_matrix(topk_idx, torch.int64)
        check_matrix(topk_weights, torch.float32)
        assert topk_idx.shape == topk_weights.shape
        assert topk_idx.shape[0] == x.shape[0]
        assert topk_idx.shape[1] <= 32
        experts = num_tokens_per_expert.shape[0]
        self._meet("dispatch", x.shape[1], topk_idx.shape[1], experts, num_worst_tokens)
        handle = self._handle(is_token_in_rank, num_tokens_per_rank, config)
        rows, picks, weights = (
            self._send(t, handle) for t in (x, topk_idx, topk_weights.contiguous())
        )
        first, local = self.rank * (experts // self.group_size), experts // self.group_size
        is_here = (picks >= first) & (picks < first + local)
        picks = torch.where(is_here, picks - first, -1)
        weights = torch.where(is_here, weights, 0.0)
        counts = [int((picks == expert).sum()) for expert in range(local)]
        counts = [-(-count // expert_alignment) * expert_alignment for count in counts]
        if num_worst_tokens > 0:
            # What lies behind the real rows is whatever the memory held, but for the picks.
            extra = num_worst_tokens - rows.shape[0]
            assert extra >= 0, "more rows than the worst case"
            rows, weights = (padded(t, extra, self.unwritten) for t in (rows, weights))
            picks, counts = padded(picks, extra, -1), []
            handle = (*handle[:3], padded(handle[3], extra, 1 << 30), *handle[4:])
        *handle_before, is_sent, heads = handle
        given = x, topk_idx, topk_weights
        shown = begun(async_finish, rows, picks, weights, *handle_before, heads, read=given)
        rows, picks, weights, *handle_before, heads, event = shown
        return rows, picks, weights, counts, (*handle_before, is_sent, heads), event

    def combine(
        self,
        x: Tensor,
        handle: Handle,
        topk_weights: Tensor | None = None,
        bias: None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        check_fill()
        _check_streams(previous_event, async_finish, allocate_on_comm_stream)
        assert bias is None, "not emulated"
        config = config or self.get_combine_config(self.group_size)
        self._check_rows(x, config, 0 if topk_weights is None else topk_weights.shape[1])
        rank_prefix, _, channel_prefix, source, _, heads = handle
        self._check_prefixes(rank_prefix, channel_prefix, config)
        check_matrix(heads, torch.int32)
        assert heads.shape[1] == self.group_size
        assert source.dtype == torch.int32
        assert source.shape == (x.shape[0],)
        if topk_weights is not None:
            check_matrix(topk_weights, torch.float32)
            assert topk_weights.shape[0] == x.shape[0]
            assert topk_weights.shape[1] <= 32
        self._meet("combine", x.shape[1], None if topk_weights is None else topk_weights.shape[1])
        out = self._sum(x, handle).to(x.dtype)
        weights = None if topk_weights is None else self._sum(topk_weights, handle)
        heads.masked_fill_(heads < 0, -(1 << 25) - 1)  # it does write into its handle
        if weights is None:
            out, event = begun(async_finish, out, read=(x, *handle))
            return out, None, event
        assert topk_weights is not None
        return begun(async_finish, out, weights, read=(x, topk_weights, *handle))

    def _redispatch(self, x: Tensor, handle: Handle, config: Config) -> Tensor:
        rank_prefix, channel_prefix, _, source, is_token_in_rank, _ = handle
        self._check_prefixes(rank_prefix, channel_prefix, config)
        assert is_token_in_rank.dtype == torch.bool
        assert is_token_in_rank.shape == (x.shape[0], self.group_size)
        self._meet("cached dispatch", x.shape[1])
        rows = self._send(x, handle)
        return padded(rows, source.shape[0] - rows.shape[0], self.unwritten)

    def _handle(self, is_sent: Tensor, per_rank: Tensor, config: Config) -> Handle:
        """Prefix sums are inclusive, those of received channels exclusive."""
        channels, tokens = config.num_sms // 2, is_sent.shape[0]
        width = max(-(-tokens // channels), 1)
        counts = [torch.empty_like(per_rank) for _ in range(self.group_size)]
        dist.all_gather(counts, per_rank, group=self.group)
        rank_prefix = torch.stack(counts).cumsum(0, dtype=torch.int32)
        parts = padded(is_sent.int(), channels * width - tokens, 0)
        parts = parts.view(channels, width, self.group_size)
        channel_prefix = parts.sum(1).cumsum(0, dtype=torch.int32).T.contiguous()
        starts = torch.cat((torch.zeros(self.group_size, 1).int(), channel_prefix[:, :-1]), 1)
        received = torch.empty_like(starts)
        dist.all_to_all_single(received, starts.contiguous(), group=self.group)
        slots = (parts.cumsum(1) - 1).reshape(-1, self.group_size)[:tokens]
        heads = torch.where(is_sent, slots, -1).int().contiguous()
        index = torch.arange(tokens, dtype=torch.int32)
        partial: Any = (rank_prefix, channel_prefix, received, None, is_sent, heads)
        source = self._send(index, partial)
        return rank_prefix, channel_prefix, received, source, is_sent, heads

    def _received(self, rank_prefix: Tensor) -> list[int]:
        """The rows that come from each rank."""
        column = rank_prefix[:, self.rank]
        return column.diff(prepend=column.new_zeros(1)).tolist()

    def _send(self, values: Tensor, handle: Handle) -> Tensor:
        """The rows that other ranks have for this one: by rank, and in the order of tokens."""
        is_sent = handle[4]
        sent = values[is_sent.T.nonzero()[:, 1]]
        received = self._received(handle[0])
        out = values.new_empty(sum(received), *values.shape[1:])
        counts = is_sent.sum(0).tolist()
        dist.all_to_all_single(out, sent.contiguous(), received, counts, group=self.group)
        return out

    def _sum(self, rows: Tensor, handle: Handle) -> Tensor:
        """The sums of the rows that come back for each token, in float32."""
        rank_prefix, _, _, source, _, heads = handle
        outgoing, incoming = self._received(rank_prefix), (heads >= 0).sum(0).tolist()
        rows, source = rows[: sum(outgoing)], source[: sum(outgoing)]
        back, tokens = (
            rows.new_empty(sum(incoming), *rows.shape[1:]),
            source.new_empty(sum(incoming)),
        )
        for theirs, mine in ((back, rows), (tokens, source)):
            dist.all_to_all_single(theirs, mine.contiguous(), incoming, outgoing, group=self.group)
        assert torch.equal(tokens, (heads >= 0).T.nonzero()[:, 1].int())
        out = torch.zeros(heads.shape[0], rows.shape[1])
        return out.index_add_(0, tokens.long(), back.float())

    def _meet(self, *notes: object) -> None:
        meet(self.group, *notes)

    def _check_rows(self, x: Tensor, config: Config, picks: int) -> None:
        assert self.available, "the buffer is destroyed"
        check_matrix(x, torch.bfloat16)
        hidden = x.shape[1]
        assert hidden * 2 % 16 == 0
        assert hidden % 16 == 0, "the kernel traps"
        assert hidden + 8 <= 8192, "the kernel traps"
        assert x.data_ptr() % 16 == 0, "the kernel traps"
        assert config.num_sms % 2 == 0
        channels = config.num_sms // 2 * self.group_size
        slots = channels * config.num_max_nvl_chunked_recv_tokens
        size = self.group_size**2 * 4 + channels * 16 + slots * (hidden * 2 + 4 + picks * 12)
        assert size <= self.num_nvl_bytes, "the buffer is too small"

    def _check_layout(
        self, x: Tensor, per_rank: Tensor, is_token_in_rank: Tensor, per_expert: Tensor
    ) -> None:
        for counts in (per_rank, per_expert):
            assert counts.dtype == torch.int32
            assert counts.dim() == 1
            assert counts.is_contiguous()
        assert per_rank.shape[0] == self.group_size
        assert per_expert.shape[0] % self.group_size == 0
        assert per_expert.shape[0] // self.group_size <= 128
        check_matrix(is_token_in_rank, torch.bool)
        assert is_token_in_rank.shape == (x.shape[0], self.group_size)

    def _check_prefixes(self, ranks: Tensor, channels: Tensor, config: Config) -> None:
        check_matrix(ranks, torch.int32)
        check_matrix(channels, torch.int32)
        assert ranks.shape == (self.group_size, self.group_size)
        assert channels.shape == (self.group_size, config.num_sms // 2)


def meet(group: dist.ProcessGroup, *notes: object) -> None:
    """Waits for the other ranks, which must be making the same call."""
    every: list[Any] = [None] * group.size()
    dist.all_gather_object(every, notes, group=group)
    assert every == [notes] * group.size(), f"ranks make different calls: {every}"


def check_matrix(t: Tensor, dtype: torch.dtype) -> None:
    assert t.dim() == 2
    assert t.is_contiguous()
    assert t.dtype == dtype


def _check_streams(event: EventOverlap | None, async_finish: bool, on_comm_stream: bool) -> None:
    assert not on_comm_stream or (event is not None and async_finish)


def check_fill() -> None:
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert not (torch.are_deterministic_algorithms_enabled() and fills)


def padded(t: Tensor, extra: int, value: float) -> Tensor:
    return torch.cat((t, t.new_full((extra, *t.shape[1:]), value)))
