"""One training step of either stage, and the state that a checkpoint holds. No Ray here: usable in a notebook."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor, nn

from flam_core.config import Config, StageConfig
from flam_core.errors import DataError, SettingsError, TrainingFailed
from flam_core.learning.ema import WeightMean
from flam_core.learning.losses import beta_at, flam_loss, tokenizer_loss
from flam_core.learning.meters import tokenizer_meters
from flam_core.learning.recompute import recompute
from flam_core.learning.schedule import autocast_dtype, learning_rate
from flam_core.learning.state import TrainState
from flam_core.learning.trained import load_trained
from flam_core.model import Dynamics, Flam
from flam_core.model.latent_action import GaussianLatent, VQLatent
from flam_core.ranks import (
    Share,
    add_up,
    apart_by_kind,
    as_part,
    average_gradients,
    clip_norm,
    gathered,
    sharded,
    whole,
    without_sync,
)
from flam_core.saved_model import weights_from_bytes, weights_to_bytes

Wrap = Callable[[nn.Module], nn.Module]
_LIMBS = (0, 32, 64, 96)
_CONSUMED = 1 << 128


class Trainer:
    """Trains the tokenizer (stage 1), then FLAM on its frozen features (stage 2), one global step at a time.

    The state is `model`, the optimiser of the stage in hand, `step` (steps done, over both stages), the running mean of
    the weights if `config.weight_mean` asks for one, and what was consumed (`consumed`). Noise is a function of (seed,
    step, place in the global batch), so there is no generator to store, a resumed run draws what the unbroken one would
    have, and the loss does not depend on how a batch is shared out.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        share: Share | None = None,
        wrap: Wrap | None = None,
        tokenizer: bytes | None = None,
        compiled: bool = False,
        recomputed: bool = False,
        on_stage: Callable[[Literal["backward", "optimiser"]], None] = lambda _stage: None,
    ) -> None:
        """`wrap` makes a stage's module distributed (DDP, or `ranks.shard`); by default it stays as it is. `tokenizer`:
        the weights that `config.tokenizer_sha256` speaks of. `compiled`: by `torch.compile`. `recomputed`: keep no
        activations of blocks for the backward pass. `on_stage` is told what a step goes on to, after its forward pass.
        Raises DataError if the tokenizer is another."""
        torch.manual_seed(config.seed)
        self.config, self.device, self.share = config, device, share or Share()
        self.model = Flam(config.tokenizer, config.model).to(device)
        if config.tokenizer_sha256 is not None:
            if tokenizer is None or hashlib.sha256(tokenizer).hexdigest() != config.tokenizer_sha256:
                raise DataError(
                    f"the tokenizer is not the one of sha256 {config.tokenizer_sha256}", fix="Give the run's own."
                )
            weights_from_bytes(self.model.tokenizer, tokenizer)
        if recomputed:
            recompute(self.model)
        self.dtype = autocast_dtype(config.precision, device)
        self.step = 0
        self.consumed = 0
        """What this rank trained on: a sum over clips of a hash of (step, place in the global batch, id), so that the
        ranks' numbers add up to that of one rank alone."""
        self._wrap: Wrap = wrap or (lambda module: module)
        self._compiled = compiled
        # Compiled apart from the model, which evaluations ask for batches of other shapes.
        self.encode: Callable[[Tensor], Tensor] = torch.compile(self.model.encode) if compiled else self.model.encode
        self._on_stage = on_stage
        self._prepared_stage = -1
        self._module: nn.Module = self.model
        self._inner: nn.Module = self.model
        self._sharded = False
        self._optimizer: torch.optim.Optimizer | None = None
        self._mean: WeightMean | None = None
        self._main: list[nn.Parameter] = []
        self._of_prior: list[nn.Parameter] = []
        self._inferring: list[nn.Parameter] = []

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.config.tokenizer_stage.steps + self.config.flam_stage.steps

    @property
    def stage(self) -> int:
        """0 while the tokenizer is trained, then 1."""
        return int(self.step >= self.config.tokenizer_stage.steps)

    def train_step(
        self,
        frames_u8: Tensor,
        ids: list[str],
        true_actions: Tensor | None = None,
        places: list[int] | None = None,
    ) -> dict[str, Tensor]:
        """One optimiser step on this rank's uint8 frames [B, T, H, W, 3]; the meters, on the device.

        true_actions: float32 [B, T, N, S], which only a model of true actions needs. places: which of the clips that
        are the rank's these are, if some are left out. Raises TrainingFailed if the gradient is not finite (the weights
        are then those of before), SettingsError if true actions are not as the config says, ValueError if there is not
        an id for each clip, or if the rank has fewer.
        """
        wanted = self.config.model.true_actions
        if wanted is not None and (true_actions is None or tuple(true_actions.shape[2:]) != wanted[:2]):
            raise SettingsError(
                f"the clips have {'no true actions' if true_actions is None else tuple(true_actions.shape[2:])}, "
                f"model.true_actions says {wanted[:2]} (entities, numbers)",
                fix="Start a run of its own on these data: --variant true-actions reads what they hold.",
            )
        self._prepare(frames_u8)
        self._freeze_latent_if_due()
        assert self._optimizer is not None
        stage, local = self._stage_config()
        mine = self.share.places(stage.batch_clips)
        clips = list(mine)[: len(ids)] if places is None else [mine[place] for place in places]
        if not len(clips) == len(ids) == len(frames_u8):
            raise ValueError(f"{len(frames_u8)} clips, {len(ids)} ids, of which {len(clips)} are in the rank's part")
        rate = learning_rate(stage, local)
        for group in self._optimizer.param_groups:
            hold = group["held"] and local < self.config.slot_hold * stage.steps
            group["lr"] = 0.0 if hold else rate
        self.model.train()
        latent = self.model.dynamics.latent if self.stage == 1 else None
        if isinstance(latent, VQLatent):
            latent.quantising = local >= self._codes_wait()
        self._optimizer.zero_grad(set_to_none=True)
        meters = self._backward(frames_u8, true_actions, clips, latent)
        self._on_stage("optimiser")
        if self._sharded:
            average_gradients([*self._main, *self._of_prior])
        norm = clip_norm(self._main, stage.clip_norm)
        # On its own: its likelihood is of another size than the loss, and would set the pace for everything else.
        clip_norm(self._of_prior, stage.clip_norm)
        name = "tokenizer" if stage is self.config.tokenizer_stage else "flam"
        if not torch.isfinite(norm):
            raise TrainingFailed(
                f"the gradient is not finite at step {self.step} (loss {meters[f'{name}/loss'].item():.3g})",
                fix="Lower the learning_rate or the clip_norm of the stage.",
            )
        self._optimizer.step()
        self._start_codes_if_due()
        if isinstance(latent, VQLatent):
            latent.after_step()
        if self._mean is not None:
            self._mean.update()
        for place, name_of_clip in zip(clips, ids, strict=True):
            self.consumed = (self.consumed + _hash(self.step, place, name_of_clip)) % _CONSUMED
        self.step += 1
        return meters | {f"{name}/grad_norm": norm, f"{name}/lr": torch.tensor(rate)}

    def pass_over(self, frames_u8: Tensor) -> None:
        """Leave the step of these frames out: it counts, and no weight learns from it."""
        self._prepare(frames_u8)
        self._start_codes_if_due()
        self.step += 1

    def _latent_frozen(self) -> bool:
        """Whether latent actions are what they will be."""
        stage, local = self._stage_config()
        gaussian = self.stage == 1 and isinstance(self.model.dynamics.latent, GaussianLatent)
        return gaussian and local >= self.config.latent_freeze * stage.steps

    def _freeze_latent_if_due(self) -> None:
        """From here on no gradient goes through what infers latent actions, and the optimiser passes its weights over.

        DDP waits for the gradient of each weight that it was given, so it is set up anew without these; FSDP2 asks each
        weight as it comes.
        """
        if not self._latent_frozen() or not self._inferring[0].requires_grad:
            return
        for parameter in self._inferring:
            parameter.requires_grad_(False)
        if not self._sharded:
            self._module = self._ready(self._inner)

    def _codes_wait(self) -> float:
        """Steps of stage 2 in which the dynamics see latent actions that are not quantised yet."""
        return self.config.loss.codebook_warmup * self.config.flam_stage.steps

    def _start_codes_if_due(self) -> None:
        """Place a codebook's codes after the last step without it."""
        latent = self.model.dynamics.latent if self.stage == 1 else None
        local = self._stage_config()[1]
        if isinstance(latent, VQLatent) and local < self._codes_wait() <= local + 1:
            latent.start_codes(gathered(latent.seen()), self.config.seed)

    def _backward(
        self, frames_u8: Tensor, true_actions: Tensor | None, clips: list[int], latent: nn.Module | None
    ) -> dict[str, Tensor]:
        """Gradients of the global batch's loss, in parts if they are asked for; the meters over all of this rank's."""
        stage, local = self._stage_config()
        name = "tokenizer" if stage is self.config.tokenizer_stage else "flam"
        parts = [(part, len(clips[part])) for part in self.share.parts(len(clips))]
        if self._sharded:  # ranks go through such a model together: those with fewer clips once more, for nothing
            parts += [(slice(0, 1), 0)] * (self.share.rounds(stage.batch_clips) - len(parts))
        total: dict[str, Tensor] = {}
        for number, (part, counted) in enumerate(parts):
            torch.manual_seed(_hash(self.config.seed, self.step) >> 65)  # 63 bits
            if isinstance(latent, GaussianLatent):
                latent.places = torch.tensor(clips[part], device=self.device), stage.batch_clips
            if latent is not None:
                latent.train(counted > 0 and not self._latent_frozen())
            alone = without_sync(self._module) if number < len(parts) - 1 else nullcontext()
            with alone:
                loss, meters = self._loss(
                    frames_u8[part], local / stage.steps, None if true_actions is None else true_actions[part]
                )
                self._on_stage("backward")
                # Ranks take the mean of their gradients: weighted so, it is that of the whole batch's mean loss. A clip
                # that is left out weighs nothing.
                (loss * (counted * self.share.world / stage.batch_clips)).backward()
            apart = meters.get("flam/prior_nll", torch.zeros(()))  # what shares no gradient is no part of the loss
            meters[f"{name}/loss"] = loss.detach() - apart.to(loss.device)
            share = counted / len(clips)
            total = {key: total.get(key, 0.0) + share * value for key, value in meters.items()}
        if isinstance(latent, GaussianLatent):
            latent.places = None
        return total

    def over_ranks(self, meters: dict[str, Tensor], clips: int) -> dict[str, Tensor]:
        """Meters of this rank's clips to those of the whole batch. All ranks must call it."""
        if self.share.world == 1:
            return meters
        values = torch.stack([value.to(self.device, torch.float64) for value in meters.values()] + [torch.ones(())])
        values = add_up(values * clips)
        return dict(zip(meters, values[:-1] / values[-1], strict=True))

    def consumed_by_all(self) -> str:
        """Hex digest of all that the run's ranks trained on so far: a function of the sample order alone. All ranks
        must call it."""
        limbs = torch.tensor([self.consumed >> shift & 0xFFFFFFFF for shift in _LIMBS], device=self.device)
        total = sum(int(limb) << shift for limb, shift in zip(add_up(limbs), _LIMBS, strict=True))
        return f"{total % _CONSUMED:032x}"

    def _stage_config(self) -> tuple[StageConfig, int]:
        first = self.config.tokenizer_stage
        return (first, self.step) if self.stage == 0 else (self.config.flam_stage, self.step - first.steps)

    def _loss(
        self, frames_u8: Tensor, progress: float, true_actions: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            if self.stage == 0:
                frames = rearrange(frames_u8, "b t h w c -> (b t) c h w").float().div(255)
                with torch.no_grad():  # four frames tell whether patches get codes of their own
                    codes = self.model.tokenizer.codes(self.model.encode(frames_u8[:4, :1]))
                reconstruction, distance = self._module(frames)
                loss, meters = tokenizer_loss(reconstruction, frames, distance, self.config.tokenizer.commitment)
                return loss, meters | tokenizer_meters(frames, codes)
            with torch.no_grad():
                z = self.encode(frames_u8).float()
            beta = beta_at(self.config.loss, progress)
            return flam_loss(self._module, z, self.config.loss, beta, true_actions)

    def _prepare(self, frames_u8: Tensor) -> None:
        """Set up the module and optimiser of the stage that `step` is in, unless that is done."""
        if self._prepared_stage == self.stage:
            return
        if self.stage == 1:
            if self.step == self.config.tokenizer_stage.steps:
                if self._mean is not None:
                    self._mean.put_into(self.model.tokenizer)
                self._begin_flam(frames_u8)
            self.model.tokenizer.requires_grad_(False)
        inner = self.model.tokenizer if self.stage == 0 else self.model.dynamics
        self._module = self._ready(inner)
        self._mean = WeightMean(inner, self.config.weight_mean) if self.config.weight_mean else None
        stage = self._stage_config()[0]
        # The factorizer is a group of its own, since it may be held still at first.
        dynamics = self.model.dynamics
        held = list(dynamics.factorizer.parameters()) if self.stage == 1 and isinstance(dynamics, Dynamics) else []
        self._of_prior = list(dynamics.prior.parameters()) if self.stage == 1 and dynamics.prior is not None else []
        self._inferring = [*held, *dynamics.inverse.parameters()] if self.stage == 1 else []
        apart = {id(parameter) for parameter in self._of_prior}
        self._main = [parameter for parameter in inner.parameters() if id(parameter) not in apart]
        names = {id(parameter) for parameter in held}
        rest = [p for p in inner.parameters() if p.requires_grad and id(p) not in names]
        self._inner, self._sharded = inner, sharded(inner)
        groups = [
            {"params": part, "held": is_held}
            for weights, is_held in ((rest, False), (held, True))
            for part in apart_by_kind(weights)  # the optimiser takes no group of both kinds
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
            fused=True,  # one kernel for all weights: on a CPU a fourteenth of a tiny step
        )
        self._prepared_stage = self.stage

    def _ready(self, inner: nn.Module) -> nn.Module:
        """Distributed and compiled, as asked for."""
        module = self._wrap(inner)
        return torch.compile(module) if self._compiled else module  # pyright: ignore[reportReturnType]

    def _begin_flam(self, frames_u8: Tensor) -> None:
        """Standardise features, and place the slots if asked for, by the first global batch of stage 2.

        All ranks see the whole batch, so the outcome is the same on each, whatever their number.
        """
        tokenizer = self.model.tokenizer
        tokenizer.standardise(add_up(tokenizer.moments(frames_u8)))
        if isinstance(self.model.dynamics, Dynamics) and self.config.model.slot_start != "random":
            z = gathered(self.model.encode(frames_u8).contiguous())
            self.model.dynamics.factorizer.begin(z, self.config.seed)

    def state(self) -> TrainState | None:
        """What a checkpoint holds; None on other ranks than the first. All ranks must call it."""
        consumed = self.consumed_by_all()
        if self.share.rank and not self._sharded:
            return None
        weights = weights_to_bytes(self.model)
        of_optimizer = self._optimizer_state()
        mean = None if self._mean is None else self._mean.state()
        if self.share.rank:
            return None
        optimizer = io.BytesIO()
        torch.save(of_optimizer, optimizer)
        meta = {"step": self.step, "stage": self._prepared_stage, "consumed": consumed}
        if self._mean is not None:
            meta["mean_steps"] = self._mean.steps
        return TrainState(weights, optimizer.getvalue(), None if mean is None else safetensors.torch.save(mean), meta)

    def _optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """What the optimiser remembers of each weight, by its name, so that it does not depend on the ranks."""
        if self._optimizer is None:
            return {}
        return {
            name: {key: whole(value) for key, value in self._optimizer.state[weight].items()}
            for name, weight in self._inner.named_parameters()
            if weight in self._optimizer.state
        }

    def restore(self, state: TrainState) -> None:
        """Continue from what `state` returned. Only tensors and plain values are read; pickled code is refused."""
        meta = state.meta
        self.step, self.consumed = meta["step"], 0 if self.share.rank else int(meta["consumed"], 16)
        if meta["stage"] < self.stage or self.step == self.total_steps:  # that stage is done
            load_trained(self.model, state)
            return
        weights_from_bytes(self.model, state.model)
        self._prepare(torch.empty(0))
        assert self._optimizer is not None
        if self._mean is not None and state.mean is not None:
            self._mean.restore(safetensors.torch.load(state.mean), meta["mean_steps"])
        known = torch.load(io.BytesIO(state.optimizer), map_location=self.device, weights_only=True)
        weights = dict(self._inner.named_parameters())
        if odd := sorted(set(known) - set(weights)):
            raise DataError(
                f"the optimiser in the checkpoint knows of {odd[0]}, which the model has not",
                fix="It was written by another version of flam: go on with that, or start anew in another --storage.",
            )
        for name, values in known.items():
            self._optimizer.state[weights[name]] = {key: as_part(value, weights[name]) for key, value in values.items()}

    def model_in_use(self) -> Flam:
        """What the training so far gives, on the first rank: the model, or a copy of it with the mean of its weights.
        All ranks must call it."""
        if not self._sharded and (self._mean is None or self.share.rank):
            return self.model
        weights = weights_to_bytes(self.model)
        mean = {} if self._mean is None else self._mean.state()
        if self.share.rank:
            return self.model
        model = Flam(self.config.tokenizer, self.config.model).to(self.device)
        weights_from_bytes(model, weights)
        (model.tokenizer if self._prepared_stage == 0 else model.dynamics).load_state_dict(mean, strict=False)
        model.train(self.model.training)
        return model


def _hash(*values: int | str) -> int:
    """128 bits."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=16).digest(), "big")
