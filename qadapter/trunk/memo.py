"""What a frozen trunk makes of texts, kept by token ids: for many adapters on one base."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor


class TrunkMemo:
    """What a frozen trunk makes of a text never changes: it is read once, whatever is on the head.

    Set as ``QAdapterModel.trunk_memo`` on all models of one base. Rows are kept apart and without
    their padding, so batches may be cut and padded on either side as they like. The row of another
    batch was computed beside other rows: as always in floating point, it may differ in last bits.
    A base that was moved to another device or dtype is read anew.

    Args:
        max_mb: of memory, in MiB; what was not asked for longest is dropped first.
    """

    def __init__(self, max_mb: int = 2048):
        self.max_bytes = max_mb << 20
        self.num_bytes = 0
        self._rows: OrderedDict[tuple[bool, tuple[int, ...]], Tensor] = OrderedDict()
        self._place: tuple[torch.device, torch.dtype | None] | None = None

    def __call__(
        self, trunk: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor,
        attention_mask: Tensor | None = None, *, dtype: torch.dtype | None = None,
        before_norm: bool = False,
    ) -> Tensor:
        """[B, T, D]; 0 at padding.

        Args:
            trunk: (input_ids [B, T], attention_mask [B, T]) → hidden states [B, T, D]; called with
                the rows that are not known, padded on the right.
            input_ids: [B, T].
            attention_mask: [B, T], 1 on one stretch of each row.
            dtype: of the trunk, which its hidden states have.
            before_norm: whether they are those that enter its final norm, which are others.
        """
        place = input_ids.device, dtype
        if place != self._place:
            self._rows.clear()
            self.num_bytes, self._place = 0, place
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        mask_BT = attention_mask.bool()
        pairs = zip(input_ids.cpu(), mask_BT.cpu(), strict=True)
        texts = [tuple(ids[mask].tolist()) for ids, mask in pairs]
        # Held here: a batch beyond the bound must not drop what it is about to use.
        rows = {text: self._rows.get((before_norm, text)) for text in texts}
        known = {text: hidden_TD for text, hidden_TD in rows.items() if hidden_TD is not None}
        missing = [text for text in dict.fromkeys(texts) if text not in known]
        if missing:
            known |= self._read(trunk, missing, input_ids)
        for text in dict.fromkeys(texts):
            self._keep((before_norm, text), known[text])
        first = known[texts[0]]
        hidden_BTD = first.new_zeros(*input_ids.shape, first.shape[-1])
        hidden_BTD[mask_BT] = torch.cat([known[text] for text in texts])
        return hidden_BTD

    def _read(
        self, trunk: Callable[[Tensor, Tensor], Tensor], texts: list[tuple[int, ...]], like: Tensor
    ) -> dict[tuple[int, ...], Tensor]:
        input_ids = torch.zeros(len(texts), max(map(len, texts)), dtype=like.dtype)
        attention_mask = torch.zeros_like(input_ids)
        for row, text in enumerate(texts):
            input_ids[row, : len(text)] = torch.tensor(text)
            attention_mask[row, : len(text)] = 1
        with torch.no_grad():
            hidden_BTD = trunk(input_ids.to(like.device), attention_mask.to(like.device))
        # A copy: a view would keep the whole batch alive.
        return {text: hidden_BTD[row, : len(text)].clone() for row, text in enumerate(texts)}

    def _keep(self, key: tuple[bool, tuple[int, ...]], hidden_TD: Tensor) -> None:
        if key in self._rows:
            self._rows.move_to_end(key)
            return
        self._rows[key] = hidden_TD
        self.num_bytes += hidden_TD.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._rows.popitem(last=False)[1].nbytes
