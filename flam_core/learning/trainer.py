"""One training step of either stage, and the state that a checkpoint holds. No Ray here: usable in a notebook."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from flam_core.config import Config, StageConfig
from flam_core.errors import DataError, SettingsError, TrainingFailed
from flam_core.learning.losses import beta_at, flam_loss, tokenizer_loss
from flam_core.learning.meters import tokenizer_meters
from flam_core.learning.schedule import autocast_dtype, learning_rate
from flam_core.model import Dynamics, Flam
from flam_core.model.latent_action import VQLatent
from flam_core.model.warm_start import moving_prototypes
from flam_core.saved_model import weights_from_bytes, weights_to_bytes

Wrap = Callable[[nn.Module], nn.Module]


class Trainer:
    """Trains the tokenizer (stage 1), then FLAM on its frozen features (stage 2), one global step at a time.

    The state is `model`, the optimiser of the stage in hand, `step` (steps done, over both stages) and `digest` (a
    rolling hash of the ids of all windows that this rank consumed; a checkpoint keeps rank 0's). Noise is a function of
    (seed, step, rank), so there is no generator to store, and a resumed run draws what the unbroken one would have.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        rank: int = 0,
        wrap: Wrap | None = None,
        tokenizer: bytes | None = None,
    ) -> None:
        """`wrap` makes a stage's module distributed (DDP); by default it stays as it is. `tokenizer`: the weights that
        `config.tokenizer_sha256` speaks of. Raises DataError if they are others."""
        torch.manual_seed(config.seed)
        self.config, self.device, self.rank = config, device, rank
        self.model = Flam(config.tokenizer, config.model).to(device)
        if config.tokenizer_sha256 is not None:
            if tokenizer is None or hashlib.sha256(tokenizer).hexdigest() != config.tokenizer_sha256:
                raise DataError(
                    f"the tokenizer is not the one of sha256 {config.tokenizer_sha256}", fix="Give the run's own."
                )
            weights_from_bytes(self.model.tokenizer, tokenizer)
        self.dtype = autocast_dtype(config.precision, device)
        self.step = 0
        self.digest = hashlib.sha256(b"flam").hexdigest()
        self._wrap: Wrap = wrap or (lambda module: module)
        self._prepared_stage = -1
        self._module: nn.Module = self.model
        self._optimizer: torch.optim.Optimizer | None = None
        self._main: list[nn.Parameter] = []
        self._of_prior: list[nn.Parameter] = []

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        return self.config.tokenizer_stage.steps + self.config.flam_stage.steps

    @property
    def stage(self) -> int:
        """0 while the tokenizer is trained, then 1."""
        return int(self.step >= self.config.tokenizer_stage.steps)

    def train_step(self, frames_u8: Tensor, ids: list[str], true_actions: Tensor | None = None) -> dict[str, Tensor]:
        """One optimiser step on this rank's uint8 frames [B, T, H, W, 3]; the meters, on the device.

        true_actions: float32 [B, T, N, S], which only a model of true actions needs. Raises TrainingFailed if the
        gradient is not finite, SettingsError if true actions are not as the config says.
        """
        wanted = self.config.model.true_actions
        if wanted is not None and (true_actions is None or tuple(true_actions.shape[2:]) != wanted[:2]):
            raise SettingsError(
                f"the clips have {'no true actions' if true_actions is None else tuple(true_actions.shape[2:])}, "
                f"model.true_actions says {wanted[:2]} (entities, numbers)",
                fix="Start a run of its own on these data: --variant true-actions reads what they hold.",
            )
        self._prepare(frames_u8)
        assert self._optimizer is not None
        stage, local = self._stage_config()
        self.digest = hashlib.sha256((self.digest + "".join(ids)).encode()).hexdigest()
        torch.manual_seed(_mix(self.config.seed, self.step, self.rank))
        rate = learning_rate(stage, local)
        for index, group in enumerate(self._optimizer.param_groups):
            hold = index == 1 and local < self.config.slot_hold * stage.steps
            group["lr"] = 0.0 if hold else rate
        self.model.train()
        latent = self.model.dynamics.latent if self.stage == 1 else None
        waits = self.config.loss.codebook_warmup * stage.steps  # of a codebook, for the dynamics
        if isinstance(latent, VQLatent):
            latent.quantising = local >= waits
        loss, meters = self._loss(frames_u8, local / stage.steps, true_actions)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._main, stage.clip_norm)
        # On its own: its likelihood is of another size than the loss, and would set the pace for everything else.
        nn.utils.clip_grad_norm_(self._of_prior, stage.clip_norm)
        if not torch.isfinite(norm):
            raise TrainingFailed(
                f"the gradient is not finite at step {self.step} (loss {loss.item():.3g})",
                fix="Lower the learning_rate or the clip_norm of the stage.",
            )
        self._optimizer.step()
        if isinstance(latent, VQLatent):
            if local < waits <= local + 1:
                latent.start_codes(self._of_all_ranks(latent.seen()), self.config.seed)
            latent.after_step()
        self.step += 1
        name = "tokenizer" if stage is self.config.tokenizer_stage else "flam"
        apart = meters.get("flam/prior_nll", torch.zeros(()))  # what shares no gradient with the rest is no part of it
        return meters | {
            f"{name}/loss": loss.detach() - apart.to(loss.device),
            f"{name}/grad_norm": norm,
            f"{name}/lr": torch.tensor(rate),
        }

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
                z = self.model.encode(frames_u8).float()
            beta = beta_at(self.config.loss, progress)
            return flam_loss(self._module, z, self.config.loss, beta, true_actions)

    def _prepare(self, frames_u8: Tensor) -> None:
        """Set up the module and optimiser of the stage that `step` is in, unless that is done."""
        if self._prepared_stage == self.stage:
            return
        if self.stage == 1:
            if self.step == self.config.tokenizer_stage.steps:
                self._begin_flam(frames_u8)
            self.model.tokenizer.requires_grad_(False)
        inner = self.model.tokenizer if self.stage == 0 else self.model.dynamics
        self._module = self._wrap(inner)
        stage = self._stage_config()[0]
        # The factorizer is a group of its own, since it may be held still at first.
        dynamics = self.model.dynamics
        held = list(dynamics.factorizer.parameters()) if self.stage == 1 and isinstance(dynamics, Dynamics) else []
        self._of_prior = list(dynamics.prior.parameters()) if self.stage == 1 and dynamics.prior is not None else []
        apart = {id(parameter) for parameter in self._of_prior}
        self._main = [parameter for parameter in inner.parameters() if id(parameter) not in apart]
        names = {id(parameter) for parameter in held}
        rest = [p for p in inner.parameters() if p.requires_grad and id(p) not in names]
        self._optimizer = torch.optim.AdamW(
            [{"params": rest}, *([{"params": held}] if held else [])],
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
            fused=self.device.type == "cuda",
        )
        self._prepared_stage = self.stage

    def _begin_flam(self, frames_u8: Tensor) -> None:
        """Standardise features, and place the slots if asked for, by the first global batch of stage 2.

        All ranks see the whole batch, so the outcome is the same on each, whatever their number.
        """
        tokenizer = self.model.tokenizer
        moments = tokenizer.moments(frames_u8)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(moments)
        tokenizer.standardise(moments)
        if isinstance(self.model.dynamics, Dynamics) and self.config.model.slot_start == "motion":
            z = self._of_all_ranks(self.model.encode(frames_u8).contiguous())
            prototypes = moving_prototypes(z, self.config.model.factors, self.config.seed)
            self.model.dynamics.factorizer.start_from(prototypes)

    @staticmethod
    def _of_all_ranks(rows: Tensor) -> Tensor:
        return _gathered(rows) if dist.is_available() and dist.is_initialized() else rows

    def state(self) -> dict[str, bytes | dict[str, Any]]:
        """What a checkpoint holds: `model` and `optimizer` as bytes, `meta` as plain JSON values."""
        optimizer = io.BytesIO()
        torch.save(self._optimizer.state_dict() if self._optimizer else {}, optimizer)
        meta = {"step": self.step, "stage": self._prepared_stage, "digest": self.digest}
        return {"model": weights_to_bytes(self.model), "optimizer": optimizer.getvalue(), "meta": meta}

    def restore(self, model: bytes, optimizer: bytes, meta: dict[str, Any]) -> None:
        """Continue from what `state` returned. Only tensors and plain values are read; pickled code is refused."""
        weights_from_bytes(self.model, model)
        self.step, self.digest = meta["step"], meta["digest"]
        if meta["stage"] == self.stage and self.step < self.total_steps:
            self._prepare(torch.empty(0))
            assert self._optimizer is not None
            self._optimizer.load_state_dict(
                torch.load(io.BytesIO(optimizer), map_location=self.device, weights_only=True)
            )


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, in order; ranks may have different numbers of them (a broken clip is left out)."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(count) for count in counts]
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _mix(*values: int) -> int:
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
