"""The factorizer: patch features of all frames to K slots a frame (flam-spec: the four parts)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flam_core.config import ModelConfig
from flam_core.model.attention import FeedForward, PositionCode, TemporalBlock
from flam_core.model.places import with_place
from flam_core.model.warm_start import SlowStart, moving_prototypes, slow_start


class Factorizer(nn.Module):
    """Slot attention with one learned start per slot, each iteration followed by causal attention over time.

    All frames go in parallel and each starts from the same learned slots. With `config.slot_time` "recurrent" frames go
    one after the other instead, and each starts from the slots of the one before.
    """

    def __init__(self, config: ModelConfig, feature_dim: int, grid: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.position = PositionCode(grid, width)
        # No norm here: features are standardised over the data set, so what is common (background) is small and what
        # is rare (entities) is large. A norm per patch would erase that and leave a small entity to drown.
        self.features = nn.Linear(feature_dim, width)
        self.inputs = FeedForward(width, 2 * width)
        self.initial = nn.Parameter(torch.randn(config.factors, width))
        self.slot_norm = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_value = nn.Linear(width, width, bias=False)
        self.by_kind = config.slot_start == "slow"
        if self.by_kind:  # what a slot looks for from the start on; the rest of queries and keys is learned beside it
            self.kind = nn.Linear(feature_dim, width, bias=False)
            self.looked_for = nn.Parameter(torch.zeros(config.factors, width))
            nn.init.zeros_(self.to_query.weight)
            nn.init.zeros_(self.to_key.weight)
        self.log_sharpness = nn.Parameter(torch.tensor(config.slot_sharpness).log())
        self.update = nn.GRUCell(width, width)
        self.mlp = FeedForward(width, 2 * width)
        over_time = config.iterations if config.slot_time == "attention" else 0
        self.temporal = nn.ModuleList(
            TemporalBlock(width, config.heads, config.temporal_window) for _ in range(over_time)
        )

    def forward(self, z_btpc: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [B, T, K, D] and the last iteration's masks [B, T, K, P] of features [B, T, P, C].

        A mask says how a patch is shared out: it sums to 1 over the slots.
        """
        return self.look(z_btpc)[:2]

    def look(self, z_btpc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `forward`, and the last iteration's weights [B, T, K, P]: what each slot reads; they sum to 1 over P."""
        b, t = z_btpc.shape[:2]
        x = self.features(z_btpc) + self.position()
        x = x + self.inputs(x)
        keys, values = self.to_key(x), self.to_value(x)
        if self.by_kind:
            keys = keys + self.kind(z_btpc)
        slots = self.initial.to(x.dtype).expand(b, t, -1, -1)
        if self.config.slot_time == "recurrent":
            return self._in_turn(slots[:, 0], keys, values)
        masks = weights = x
        for temporal in self.temporal:
            slots, masks, weights = self._iterate(slots, keys, values)
            slots = temporal(slots)
        return self._placed(slots, weights), masks, weights

    def _placed(self, slots: Tensor, weights: Tensor) -> Tensor:
        return with_place(slots, weights) if self.config.slot_place else slots

    def _in_turn(self, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        for t in range(keys.shape[1]):
            masks = weights = slots
            for _ in range(self.config.iterations):
                slots, masks, weights = self._iterate(slots, keys[:, t], values[:, t])
            found.append((slots, masks, weights))
        every_slots, every_masks, every_weights = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
        return self._placed(every_slots, every_weights), every_masks, every_weights

    def _iterate(self, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One iteration of slot attention on slots [..., K, D]: new slots, masks and weights, both [..., K, P]."""
        queries = self.to_query(self.slot_norm(slots))
        weights, masks = self._attend(queries + self.looked_for if self.by_kind else queries, keys)
        updates = weights.to(values.dtype) @ values
        slots = self.update(updates.flatten(0, -2), slots.flatten(0, -2).to(updates.dtype)).view_as(updates)
        return slots + self.mlp(slots), masks, weights

    @torch.no_grad()
    def start_from(self, prototypes: Tensor) -> None:
        """Set the learned start of slot i such that it attends to patches whose features are like prototype i, [K, C].

        `warm_start.moving_prototypes` finds such prototypes.
        """
        x = self.features(prototypes)
        keys = self.to_key(x + self.inputs(x))
        # What all have in common does not tell slots apart. The transposed query weights are the matched filter: of all
        # directions a slot could have, this one gives the largest logit for its key.
        starts = (keys - keys.mean(dim=0)) @ self.to_query.weight
        self.initial.copy_(starts / starts.std(dim=-1, keepdim=True))

    def begin(self, z_btpc: Tensor, seed: int) -> None:
        """Place the slots as `slot_start` says, by standardised features [B, T, P, C]."""
        if self.config.slot_start == "motion":
            self.start_from(moving_prototypes(z_btpc, self.config.factors, seed))
        elif self.config.slot_start == "slow":
            self.look_for(slow_start(z_btpc, self.config.factors, seed))

    @torch.no_grad()
    def look_for(self, start: SlowStart) -> None:
        """Let slot i attend to patches by how much of kind i is in them (`slot_start` "slow"). `warm_start.slow_start`
        finds the kinds."""
        slow = start.directions.shape[1]
        self.kind.weight.zero_()
        self.kind.weight[:slow] = start.directions.T
        self.looked_for.zero_()
        self.looked_for[:, :slow] = start.kinds * self.looked_for.shape[1] ** 0.5  # so that sharpness is the logit

    def _attend(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Weights over patches (sum 1 over P) and masks (sum 1 over K), both [..., K, P]."""
        scale = self.log_sharpness.exp() * queries.shape[-1] ** -0.5
        logits = (queries @ keys.transpose(-1, -2)).float() * scale
        masks = logits.softmax(dim=-2)
        weights = masks + 1e-8
        if self.config.slot_competition == "dual":
            weights = weights * logits.softmax(dim=-1)
        if self.config.slot_focus != 1:
            weights = (weights / weights.amax(dim=-1, keepdim=True)) ** self.config.slot_focus
        return weights / weights.sum(dim=-1, keepdim=True), masks
