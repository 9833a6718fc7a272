"""DeepEP V2's `ElasticBuffer` in plain torch over gloo, inside one machine, with its assertions.

`install()` makes it the module `deep_ep` of this process, one that has no `Buffer`. Signatures,
shapes and what is refused are those of the real library; FP8, the expanded layout and networks are
not there. Places in the buffer are drawn at random, so rows come in any order of a rank's tokens,
as they may from the real one. What it leaves unwritten is garbage here.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.deep_ep_emulator import EventOverlap, begun, check_fill, check_matrix, meet, padded

topk_idx_t = torch.int64
ALIGNMENT = 2 << 20
_GARBAGE = -77


def install() -> None:
    """Makes `import deep_ep` find this module."""
    sys.modules["deep_ep"] = sys.modules[__name__]


class EPHandle:
    def __init__(
        self,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: Tensor,
        psum_num_recv_tokens_per_expert: Tensor,
        num_unaligned_recv_tokens_per_expert: Tensor,
        recv_src_metadata: Tensor,
        dst_buffer_slot_idx: Tensor,
        token_metadata_at_forward: Tensor | None,
        channel_linked_list: Tensor | None,
    ) -> None:
        assert not do_expand, "not emulated"
        assert token_metadata_at_forward is None, "there is no network inside a machine"
        assert channel_linked_list is None, "there is no network inside a machine"
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.num_recv_tokens = num_recv_tokens
        self.num_expanded_tokens = num_expanded_tokens
        self.num_recv_tokens_per_expert_list = num_recv_tokens_per_expert_list
        self.psum_num_recv_tokens_per_scaleup_rank = psum_num_recv_tokens_per_scaleup_rank
        self.psum_num_recv_tokens_per_expert = psum_num_recv_tokens_per_expert
        self.num_unaligned_recv_tokens_per_expert = num_unaligned_recv_tokens_per_expert
        self.recv_src_metadata = recv_src_metadata
        self.dst_buffer_slot_idx = dst_buffer_slot_idx


class ElasticBuffer:
    device_type = "cpu"
    is_random = True
    unwritten = float("nan")

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        assert num_cpu_bytes == 0, "not emulated"
        assert not deterministic, "not emulated"
        assert allow_multiple_reduction, "not emulated"
        assert os.environ.get("EP_DISABLE_GIN", "0") != "0", "NCCL GIN is unavailable"
        if num_bytes is None:
            num_bytes = self.get_buffer_size_hint(
                group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
            )
        assert num_bytes > 0
        assert num_bytes % ALIGNMENT == 0
        self.group, self.rank_idx, self.num_ranks = group, group.rank(), group.size()
        self.num_bytes, self.num_max_tokens_per_rank = num_bytes, num_max_tokens_per_rank
        self.explicitly_destroy, self.available = explicitly_destroy, True
        meet(group, "made", num_bytes, allow_hybrid_mode)

    def destroy(self) -> None:
        assert self.explicitly_destroy
        meet(self.group, "destroyed")
        self.available = False

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        assert not use_fp8_dispatch, "not emulated"
        assert num_max_tokens_per_rank > 0
        assert hidden > 0
        size = _size(num_max_tokens_per_rank, hidden, num_topk or 32, group.size())
        return _aligned(size, ALIGNMENT)

    def get_theoretical_num_sms(self, num_experts: int | None, num_topk: int) -> int:
        assert num_experts is not None, "of a cached dispatch the library does not know them yet"
        assert num_experts % self.num_ranks == 0
        return 4

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: None = None,
        previous_event_before_epilogue: None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, EPHandle, EventOverlap]:
        check_fill()
        assert not do_expand, "not emulated"
        assert not do_zero_padding
        assert do_handle_copy, "not emulated"
        if num_sms == 0:
            num_sms = self.get_theoretical_num_sms(num_experts, 1)
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None, "not emulated"
            assert not do_cpu_sync, "Cannot do CPU sync with cached handle"
            self._check_rows(x, handle.topk_idx, handle.num_experts, handle.num_max_tokens_per_rank)
            read = x, handle.dst_buffer_slot_idx, handle.topk_idx
            sent = begun(async_with_compute_stream, *self._redispatch(x, handle), read=read)
            return *sent[:2], None, handle, sent[2]
        assert topk_idx is not None
        assert topk_weights is not None, "dispatch without weights is not emulated"
        assert num_experts is not None
        bound = num_max_tokens_per_rank or self.num_max_tokens_per_rank
        do_cpu_sync = do_cpu_sync is not False
        assert expert_alignment in (None, 1), "not emulated"
        self._check_rows(x, topk_idx, num_experts, bound)
        check_matrix(topk_weights, torch.float32)
        assert topk_weights.shape == topk_idx.shape
        notes = x.shape[1], topk_idx.shape[1], num_experts, bound, do_cpu_sync
        meet(self.group, "dispatch", *notes)
        slots = self._draw(topk_idx, num_experts, bound)
        counts, arrived = self._send(x, topk_idx, slots, num_experts)
        picks = self._send(topk_idx, topk_idx, slots, num_experts)[1]
        weights = self._send(topk_weights, topk_idx, slots, num_experts)[1]
        index = torch.arange(x.shape[0], dtype=torch.int32) + self.rank_idx * bound
        source = picks.new_full((len(picks), 2 + picks.shape[1]), _GARBAGE, dtype=torch.int32)
        source[:, 0] = self._send(index, topk_idx, slots, num_experts)[1]
        local, is_mine = self._localized(picks, num_experts)
        source[:, 1] = source[:, 0] // bound * picks.shape[1] + is_mine.int().argmax(1)
        per_expert = torch.bincount(local[is_mine], minlength=num_experts // self.num_ranks)
        ends = torch.cat((per_expert.new_zeros(1), per_expert)).cumsum(0, dtype=torch.int32)
        per_rank, listed = counts.cumsum(0, dtype=torch.int32), per_expert.tolist()
        if not do_cpu_sync:
            extra, listed = self._missing(per_rank, bound), []
            arrived, weights = (padded(t, extra, self.unwritten) for t in (arrived, weights))
            local, source = (padded(t, extra, _GARBAGE) for t in (local, source))
        total = int(per_expert.sum())
        results = arrived, local, weights, topk_idx.clone(), per_rank, ends, source, slots
        given = x, topk_idx, topk_weights
        shown = begun(async_with_compute_stream, *results, read=given)
        arrived, local, weights, kept, per_rank, ends, source, slots, event = shown
        made = EPHandle(
            False,
            num_experts,
            1,
            bound,
            num_sms,
            kept,
            len(arrived),
            total,
            listed,
            per_rank,
            ends[1:],
            per_expert.int(),
            source,
            slots,
            None,
            None,
        )
        return arrived, local, weights, made, event

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: None = None,
        previous_event_before_epilogue: None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        check_fill()
        assert bias is None, "not emulated"
        assert (num_sms or handle.num_sms) > 0
        tokens, picks = handle.topk_idx.shape
        self._check_width(x)
        self._check_handle(handle, tokens)
        assert x.shape[1] % 256 == 0, "Invalid hidden"
        assert x.shape[0] == handle.recv_src_metadata.shape[0]
        if topk_weights is not None:
            check_matrix(topk_weights, torch.float32)
            assert topk_weights.shape == (x.shape[0], picks)
        meet(self.group, "combine", x.shape[1], topk_weights is None)
        owners = handle.topk_idx // (handle.num_experts // self.num_ranks)
        back = self._bring(x.float(), handle)
        is_due = (owners[:, None] == torch.arange(self.num_ranks)[:, None]).any(-1)
        out = torch.where(is_due[..., None], back, 0.0).sum(1).to(x.dtype)
        if topk_weights is None:
            out, event = begun(async_with_compute_stream, out, read=(x, handle.recv_src_metadata))
            return out, None, event
        given = self._bring(topk_weights, handle)
        taken = given.gather(1, owners.clamp(min=0)[:, None]).squeeze(1)
        weights = torch.where(handle.topk_idx >= 0, taken, 0.0)
        return begun(async_with_compute_stream, out, weights, read=(x, topk_weights))

    def _redispatch(self, x: Tensor, handle: EPHandle) -> tuple[Tensor, Tensor]:
        assert handle.expert_alignment == 1
        self._check_handle(handle, x.shape[0])
        meet(self.group, "cached dispatch", x.shape[1], handle.num_max_tokens_per_rank)
        given = handle.topk_idx, handle.dst_buffer_slot_idx, handle.num_experts
        counts, rows = self._send(x, *given)
        assert torch.equal(counts.cumsum(0), handle.psum_num_recv_tokens_per_scaleup_rank)
        picks = self._localized(self._send(handle.topk_idx, *given)[1], handle.num_experts)[0]
        extra = handle.num_recv_tokens - rows.shape[0]
        assert extra in (0, self._missing(counts.cumsum(0), handle.num_max_tokens_per_rank))
        return padded(rows, extra, self.unwritten), padded(picks, extra, _GARBAGE)

    def _missing(self, per_rank: Tensor, bound: int) -> int:
        """The rows without a token where there are as many as could come."""
        return bound * self.num_ranks - int(per_rank[-1])

    def _draw(self, picks: Tensor, num_experts: int, bound: int) -> Tensor:
        """The place of each copy of a token, at the first of its picks that goes to a rank."""
        owners = picks // (num_experts // self.num_ranks)
        slots = torch.full_like(picks, -1, dtype=torch.int32)
        for rank in range(self.num_ranks):
            is_sent = (owners == rank) & (picks >= 0)
            tokens = is_sent.any(1).nonzero()[:, 0]
            drawn = torch.randperm(len(tokens)) if self.is_random else torch.arange(len(tokens))
            first = is_sent[tokens].int().argmax(1)
            slots[tokens, first] = (drawn + self.rank_idx * bound).int()
        return slots

    def _send(
        self, values: Tensor, picks: Tensor, slots: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor]:
        """The rows that each rank has for this one, by rank and place; and how many from each."""
        owners = picks // (num_experts // self.num_ranks)
        sent: list[Tensor] = []
        for rank in range(self.num_ranks):
            tokens, lanes = ((owners == rank) & (slots >= 0)).nonzero(as_tuple=True)
            sent.append(values[tokens[slots[tokens, lanes].argsort()]])
        return self._exchange(sent)

    def _exchange(self, sent: list[Tensor]) -> tuple[Tensor, Tensor]:
        counts = torch.tensor([len(part) for part in sent])
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        out = sent[0].new_empty(int(received.sum()), *sent[0].shape[1:])
        sizes = received.tolist(), counts.tolist()
        dist.all_to_all_single(out, torch.cat(sent), *sizes, group=self.group)
        return received, out

    def _bring(self, rows: Tensor, handle: EPHandle) -> Tensor:
        """What the ranks [R] give back for a token: [T, R, ...], and garbage where they do not."""
        bound, (tokens, picks) = handle.num_max_tokens_per_rank, handle.topk_idx.shape
        # It reads on the device how many rows came if it sees as many as could come.
        real = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        assert rows.shape[0] in (real, bound * self.num_ranks)
        rows, source = rows[:real], handle.recv_src_metadata[:real]
        token, rank = source[:, 0] % bound, source[:, 1] // picks
        homes = [(rank == r).nonzero()[:, 0] for r in range(self.num_ranks)]
        counts, back = self._exchange([rows[home] for home in homes])
        to = self._exchange([token[home] for home in homes])[1].long()
        by = torch.arange(self.num_ranks).repeat_interleave(counts)
        out = rows.new_full((tokens, self.num_ranks, rows.shape[1]), float("nan"))
        out[to, by] = back
        return out

    def _localized(self, picks: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        local = num_experts // self.num_ranks
        first = self.rank_idx * local
        is_mine = (picks >= first) & (picks < first + local)
        return torch.where(is_mine, picks - first, -1), is_mine

    def _check_width(self, x: Tensor) -> None:
        assert self.available, "the buffer is destroyed"
        check_matrix(x, torch.bfloat16)
        assert x.shape[1] * 2 % 32 == 0

    def _check_rows(self, x: Tensor, picks: Tensor, num_experts: int, bound: int) -> None:
        self._check_width(x)
        check_matrix(picks, topk_idx_t)
        assert picks.shape[0] == x.shape[0]
        assert picks.shape[1] <= 32, "Too many top-k selections"
        assert x.shape[0] <= bound
        assert num_experts % self.num_ranks == 0
        assert num_experts <= 2048
        assert num_experts // self.num_ranks <= 256
        assert _size(bound, x.shape[1], picks.shape[1], self.num_ranks) <= self.num_bytes
        assert bool(((picks >= -1) & (picks < num_experts)).all())
        ordered = picks.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        assert not bool(twice.any()), "the kernel traps"

    def _check_handle(self, handle: EPHandle, tokens: int) -> None:
        picks, local = handle.topk_idx.shape[1], handle.num_experts // self.num_ranks
        sizes = {
            "psum_num_recv_tokens_per_scaleup_rank": (self.num_ranks,),
            "psum_num_recv_tokens_per_expert": (local,),
            "num_unaligned_recv_tokens_per_expert": (local,),
            "recv_src_metadata": (handle.num_recv_tokens, 2 + picks),
            "dst_buffer_slot_idx": (tokens, picks),
        }
        for name, shape in sizes.items():
            tensor: Any = getattr(handle, name)
            assert tensor.dtype == torch.int32, name
            assert tensor.is_contiguous(), name
            assert tensor.shape == shape, name
        assert tokens <= handle.num_max_tokens_per_rank


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to


def _size(bound: int, hidden: int, picks: int, ranks: int) -> int:
    """A row with the picks, the weights, its number and a list; and one with picks and weights."""
    row = _aligned(hidden * 2, 32)
    there = ranks * bound * (row + _aligned(picks * 8 + (1 + picks) * 4, 32))
    back = min(ranks, picks) * bound * (row + _aligned(picks * 8, 32))
    return max(there, back)
