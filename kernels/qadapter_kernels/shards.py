"""A head whose rows lie on the ranks of a group: what each finds in its own, and what they find
together.

Every rank runs the same kernels on its rows W_r as one process does on W. With u and b the logits
of all rows, its share of the policy's and of the base's probability is a number a state,

    s = exp(lse_r(u) − lse(u)),    π̃ = s·softmax(u_r) on its rows,

so that P′ = s·P′_r + (s − 1)·onehot(action) there (the one-hot on the action's own rank alone), and
the gradient's two parts are sums over ranks:

    ∂h_a = c_a·logit_scale·Σ_r (own·((g + v) + v·(s − 1))·W_r[action] + v·s·G′_r),  G′_r = P′_r W_r.

Forward two all-reduces of a few numbers a state, backward one of [N, D] in float32.
Shapes: N states, D hidden size, V_r rows of W on this rank, K streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .reference import MASKED_ROW, NO_ACTION, log_of_total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .linear import Head


class Collectives(NamedTuple):
    """Bytes a process hands to each of ``linear_soft_value``'s all-reduces."""

    maximum: int
    sum: int
    gradient: int
    """Float32 [N, D]; the backward pass's."""

    @classmethod
    def of(
        cls, num_rows: int, hidden_size: int, cached_base: bool = True, statistics: bool = False
    ) -> Collectives:
        """``cached_base``: lse(b) is given."""
        sums = 1 if cached_base else 2
        numbers = sums + 2 + 1 + 3 * statistics  # and the actions' logits, and who holds them
        return cls(
            4 * (sums * num_rows + 1), 4 * (numbers * num_rows + 1), 4 * num_rows * hidden_size
        )

    def seconds(self, ranks: int, bandwidth: float, latency: float) -> float:
        """All three, one after the other, as rings: an estimate.

        Args:
            bandwidth: bytes a second that a rank sends, and at once receives (nccl-tests' busbw).
            latency: seconds of an all-reduce of nothing.
        """
        sent = 2 * (ranks - 1) / ranks * sum(self)
        return sent / bandwidth + len(self) * latency if ranks > 1 else 0.0


class Merged(NamedTuple):
    """What all rows of the head give N states; the same numbers on every rank."""

    action_logits: Tensor
    """Of each stream [K, N]; 0 where there is no action."""
    logsumexps: Tensor
    """[L, N], in the order they were given in."""
    log_shares: Tensor
    """log s of this rank in the first of them [N], −inf where its rows have no support."""
    statistics: Tensor
    """[3, N], or [0] where there are none."""


class Shard(NamedTuple):
    """One rank's rows of a head. ``merge``, ``action_logits`` and ``sum`` are collective."""

    group: ProcessGroup
    start: int
    """Token id of the first row."""
    size: int
    """V_r, may be 0."""

    @classmethod
    def of(cls, group_name: str, start: int, weight: Tensor) -> Shard | None:
        """None without a group. Groups go by their names, which ``torch.compile`` can carry."""
        if not group_name:
            return None
        from torch.distributed import distributed_c10d

        # Private to torch, whose own traceable collectives name groups so.
        group = distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
        return cls(group, start, weight.shape[0])

    def own(self, actions_N: Tensor) -> Tensor:
        """The action's row of W_r; -1 where it is another rank's; masked rows stay masked."""
        local_N = actions_N - self.start
        here_N = (actions_N >= 0) & (local_N >= 0) & (local_N < self.size)
        local_N = torch.where(here_N, local_N, NO_ACTION)
        return torch.where(actions_N == MASKED_ROW, MASKED_ROW, local_N)

    def head(self, head: Head) -> Head:
        """The rank's own; without rows it is one token that is excluded."""
        if self.size:
            return head
        weight = self.rows(head.weight)
        return head._replace(weight=weight, bias=weight.new_full((1,), -torch.inf))

    def rows(self, weight: Tensor) -> Tensor:
        return weight if self.size else weight.new_zeros(1, weight.shape[1])

    def merge(
        self, actions_N: Tensor, logits_KN: Tensor, lse_LN: Tensor, statistics: Tensor
    ) -> Merged:
        """Two collectives: MAX of the log-sum-exps, then one SUM of everything else.

        Args:
            actions_N: of the whole vocabulary.
            logits_KN: this rank's logits of the actions; what stands where it has none is not read.
            lse_LN: log-sum-exps over its rows: of u; of u and b where there are statistics.
            statistics: ``PolicyStatistics`` over its rows alone [3, N], or empty.

        Raises:
            ValueError: on a CPU, an action that no rank holds, or shards that overlap or leave a
                gap. On other devices, where asking would make the host wait, rows are NaN.
        """
        end = lse_LN.new_full((1,), self.start + self.size)
        peak = torch.cat([lse_LN.reshape(-1), end])
        self._reduce(peak, "MAX")
        peak_LN, end = peak[:-1].view_as(lse_LN), peak[-1]
        peak_LN = torch.where(peak_LN.isinf(), 0.0, peak_LN)
        above_LN = lse_LN - peak_LN
        parts = [above_LN.exp()]
        if statistics.numel():
            parts.append(_weighed(statistics, above_LN))
        parts += [self._at_actions(actions_N, logits_KN), lse_LN.new_full((1, 1), self.size)]
        flat = torch.cat([x.reshape(-1) for x in parts])
        self._reduce(flat, "SUM")
        *parts, size = (x.view_as(y) for x, y in zip(
            flat.split([x.numel() for x in parts]), parts, strict=True
        ))
        valid_N = self._check(actions_N, parts[-1][-1], (end, size[0, 0]))
        total_LN, logits_KN = parts[0], parts[-1][:-1]
        log_total_LN = log_of_total(total_LN)
        if statistics.numel():
            statistics = _unweighed(parts[1], total_LN, log_total_LN)
            statistics = torch.where(actions_N == MASKED_ROW, 0.0, statistics)
        log_shares_N = above_LN[0] - log_total_LN[0]
        return Merged(
            torch.where(valid_N, logits_KN, torch.nan),
            torch.where(valid_N, log_total_LN + peak_LN, torch.nan),
            torch.where(above_LN[0] == -torch.inf, -torch.inf, log_shares_N),
            statistics,
        )

    def action_logits(self, actions_N: Tensor, logits_KN: Tensor) -> Tensor:
        """``merge`` for the logits of the actions alone: one SUM."""
        parts = self._at_actions(actions_N, logits_KN)
        self._reduce(parts, "SUM")
        return torch.where(self._check(actions_N, parts[-1]), parts[:-1], torch.nan)

    def sum(self, x: Tensor) -> Tensor:
        """In place."""
        self._reduce(x, "SUM")
        return x

    def _reduce(self, x: Tensor, operation: str) -> None:
        from torch import distributed

        distributed.all_reduce(x, getattr(distributed.ReduceOp, operation), group=self.group)

    def _at_actions(self, actions_N: Tensor, logits_KN: Tensor) -> Tensor:
        """[K + 1, N]: the logits, and whether they are this rank's."""
        here_N = self.own(actions_N) >= 0
        return torch.cat([torch.where(here_N, logits_KN, 0.0), here_N[None].to(logits_KN.dtype)])

    def _check(
        self, actions_N: Tensor, holders_N: Tensor, sizes: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Rows [N] whose action one rank holds, of shards that make one vocabulary."""
        valid_N = (actions_N < 0) | (holders_N == 1)
        if sizes is not None:
            valid_N = valid_N & (sizes[0] == sizes[1])
        if actions_N.device.type != "cpu" or bool(valid_N.all()):
            return valid_N
        if sizes is not None and sizes[0] != sizes[1]:
            raise ValueError(
                f"the ranks' rows do not make one vocabulary: {int(sizes[1])} rows, the last ends "
                f"at {int(sizes[0])} (this rank's: {self.start} to {self.start + self.size}; "
                "look at vocab_start)"
            )
        wrong = int(actions_N[~valid_N][0])
        raise ValueError(f"actions holds {wrong}, outside the vocabulary of all ranks' rows")


def _weighed(statistics_3N: Tensor, above_2N: Tensor) -> Tensor:
    """Each rank's terms of the statistics, in weights exp(lse_r − max): they add up."""
    entropy_N, kl_policy_N, kl_base_N = statistics_3N
    gap_N = above_2N[0] - above_2N[1]
    terms = ((0, entropy_N, -above_2N[0]), (0, kl_policy_N, gap_N), (1, kl_base_N, -gap_N))
    weight_2N = above_2N.exp()
    return torch.stack([
        torch.where(weight_2N[which] == 0, 0.0, weight_2N[which] * (own_N + shift_N))
        for which, own_N, shift_N in terms
    ])


def _unweighed(sums_3N: Tensor, total_2N: Tensor, log_total_2N: Tensor) -> Tensor:
    none_2N = total_2N == 0  # a stream without support
    total_2N = torch.where(none_2N, 1.0, total_2N)
    log_2N = torch.where(none_2N, 0.0, log_total_2N)
    gap_N = log_2N[0] - log_2N[1]
    shifts = ((0, log_2N[0]), (0, -gap_N), (1, gap_N))
    return torch.stack([
        torch.where(none_2N[which], 0.0, sum_N / total_2N[which] + shift_N)
        for sum_N, (which, shift_N) in zip(sums_3N, shifts, strict=True)
    ])
