"""Settings of the networks: the tokenizer, and the parts that act on its features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from flam_core.errors import SettingsError


@dataclass(frozen=True)
class TokenizerConfig:
    """Single frames to a grid of features and back (flam-spec: stage 1)."""

    frame_size: int = 128
    """Height and width of a frame in pixels."""
    unshuffle: int = 1
    """Pixels are first folded into channels in blocks of this side: 2 quarters the cost of the first convolutions."""
    channels: tuple[int, ...] = (64, 128, 256, 256)
    """Width of each IMPALA stage. A stage halves the frame, so the stride is unshuffle * 2 ** len(channels)."""
    encoder: Literal["impala", "patches"] = "impala"
    """What a patch's feature tells of. "impala": of what lies around it, too, since convolutions and pooling overlap
    (the paper). "patches": of the patch alone, so that a thing that moves changes the features of the patches it leaves
    and enters and of no others, and the dynamics have so much less to predict (docs/devlog.md)."""
    feature_dim: int = 128
    """Channels of a patch feature z."""
    fsq_levels: tuple[int, ...] = (4, 4, 4, 4, 4)
    """Levels of each quantised dimension; their product is the number of codes."""
    commitment: float = 0.0
    """Weight of the mean squared distance of what is quantised from its levels. A patch that lies on the border of two
    levels becomes another by the slightest error, and a rollout loses it; from the middle of a level, errors are undone
    by quantising (evaluation.rollout frames)."""
    reread: bool = False
    """The commitment also holds what is read of a drawn frame to the levels that it was drawn from. A frame that is
    drawn and read again and again otherwise loses things that stand still."""
    chessboard: bool = False
    """While stage 1 trains, draw every other patch, as on a chessboard, from what it was before it was quantised. Kinds
    of patches that share a code by chance otherwise stay so, since nothing that is drawn tells them apart
    (docs/devlog.md)."""
    whitening: float | None = None
    """Bring all directions of feature space to like variance, with this share of the mean variance as a floor. Without
    it (None, the paper's form) the brightest entity dominates loss and attention, and the others do not bind."""

    def __post_init__(self) -> None:
        for name in ("frame_size", "unshuffle", "feature_dim"):
            if getattr(self, name) < 1:
                raise SettingsError(f"tokenizer.{name} = {getattr(self, name)}", fix="It must be at least 1.")
        if not self.channels or min(self.channels) < 1:
            raise SettingsError(f"tokenizer.channels = {self.channels}", fix="Give one positive width a stage.")
        if self.frame_size % self.stride:
            raise SettingsError(
                f"tokenizer.frame_size {self.frame_size} is not a multiple of the stride {self.stride}",
                fix="Choose another frame size, or fewer tokenizer.channels (each halves the frame).",
            )
        if self.commitment < 0:
            raise SettingsError(f"tokenizer.commitment = {self.commitment}", fix="It must not be negative.")
        if self.reread and self.commitment == 0:
            raise SettingsError(
                "tokenizer.reread with tokenizer.commitment 0, which weighs it: it would do nothing",
                fix="Set a commitment, such as 0.003.",
            )
        if self.whitening is not None and self.whitening <= 0:
            raise SettingsError(f"tokenizer.whitening = {self.whitening}", fix="Use a share above 0, such as 0.01.")
        if not self.fsq_levels or min(self.fsq_levels) < 2:
            raise SettingsError(f"tokenizer.fsq_levels = {self.fsq_levels}", fix="Each needs at least 2 levels.")

    @property
    def stride(self) -> int:
        """Pixels of a patch's side."""
        return self.unshuffle * 2 ** len(self.channels)

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.frame_size // self.stride

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.grid**2

    @property
    def codes(self) -> int:
        """Size of the implied codebook."""
        return math.prod(self.fsq_levels)


@dataclass(frozen=True)
class ModelConfig:
    """The four parts of FLAM (flam-spec: stage 2)."""

    state: Literal["slots", "patches"] = "slots"
    """What the dynamics work on. "slots": FLAM. "patches": the grid of features itself, under `factors` latent actions
    that are read from the whole frame and act on all of it: a monolithic model with one, grouped latents with more."""
    factors: int = 4
    """K: slots, each with its own latent action."""
    width: int = 256
    """Channels of a slot."""
    heads: int = 8
    """Attention heads."""
    blocks: int = 2
    """Blocks of the inverse dynamics, the forward dynamics and the aggregator."""
    iterations: int = 3
    """Slot-attention iterations, each followed by causal temporal attention."""
    slot_competition: Literal["slots", "dual"] = "slots"
    """Over what a patch's attention is normalised. "slots": the paper's softmax over slots. "dual": that, times a
    softmax over patches, so that a small entity stands out although nothing else claims the background."""
    slot_start: Literal["random", "motion", "slow"] = "random"
    """Where slots begin. "random": anywhere (the paper). "motion": one on each kind of moving patch. "slow": likewise,
    where kinds are told apart by what stays the same of a thing as it moves, and a slot keeps looking for its kind
    beside what it learns to look for: for things that move by less than a patch."""
    slot_focus: float = 1.0
    """Power that a slot's weights over patches are raised to. 1 is the paper's; from 2 on, a slot reads one compact
    thing, so that one slot cannot carry all entities."""
    slot_sharpness: float = 1.0
    """Initial factor on the slot-attention logits (it is learned). At 1 every slot starts by looking at everything
    alike; at 8 slots differ from the first step, which is what lets small entities bind."""
    aggregator_query: Literal["patch", "place"] = "patch"
    """What a patch asks the predicted slots with. "patch": what it shows and where it is (the paper). "place": only
    where it is. What it shows leads it to the entity that leaves, past another that comes in the same step."""
    aggregator_sharpness: float = 1.0
    """Initial standard deviation of the aggregator's attention logits. A patch must find the slot that moves onto it
    by matching positions; from 1 that takes several times as long as from 3 (docs/devlog.md)."""
    temporal_window: int = 10
    """Frames of the past that temporal attention sees. Time is relative, so rollouts may be longer than training."""
    slot_time: Literal["attention", "recurrent"] = "attention"
    """How a slot keeps its entity over time. "attention": causal attention over its own past, all frames at once (the
    paper). "recurrent": none; slots start from the previous frame's (the paper's ablation)."""
    slot_training: Literal["joint", "apart"] = "joint"
    """What trains the factorizer. "joint": everything (the paper). "apart": loss.bridge alone, and the dynamics take
    slots as they are, as in models with a pre-trained, frozen slot encoder (PlaySlot)."""
    coupling: Literal["factored", "own", "global"] = "factored"
    """What an action may know and do. "factored": from all current slots and the slot's own next value; moves its own
    slot (the paper). "own": from the slot's own two values alone (PlaySlot). "global": from all next slots, and
    moves all (the paper's Global-Coupled ablation)."""
    latent: Literal["gaussian", "vq", "none", "true"] = "gaussian"
    """Latent actions: continuous (reparameterised Gaussian), discrete (one codebook shared by all slots), none at all
    (SlotFormer), or the data set's true actions instead (a plain world model)."""
    true_actions: tuple[int, int, int] | None = None
    """Of latent "true": entities, numbers of an entity's action, and kinds of a discrete action (0: the numbers are
    values)."""
    slot_place: bool = False
    """The first two numbers of a slot are the centre of what it reads, and the inverse dynamics are given how far that
    moves. Of a thing that moves by a fraction of a patch, that is else a small difference of large numbers, which takes
    long to find. False: slots say where they are as they like (the paper)."""
    motion_readout: bool = False
    """A linear map, trained with `loss.motion`, reads off latent actions how far their slots move. Without it (the
    paper) a latent action may mean something else at each place."""
    latent_width: int = 256
    """Total width of the latent actions, shared out evenly: latent_width / factors a slot."""
    initial_log_variance: float = -5.0
    """Of the posterior. From 0 the noise drowns the mean and the KL collapses (docs/devlog.md)."""
    log_variance_gain: float = 1.0
    """How much faster than other outputs the posterior's log-variance learns. Adam moves a weight by about the learning
    rate a step, whatever the gradient: in a few thousand steps a log-variance hardly leaves where it starts, and beta
    does next to nothing (docs/devlog.md)."""
    codebook: int = 16
    """Codes of the VQ latent action."""
    commitment: float = 0.25
    """Weight of the VQ commitment loss."""
    codebook_decay: float | None = None
    """Codes follow the mean of what falls to them at this rate, such as 0.99 (van den Oord et al. 2017, appendix A.1).
    None: they are trained by gradient."""
    codebook_revival: float = 0.0
    """A code whose running share of all transitions is below this share of an even split moves to a transition of the
    batch; 0 leaves dead codes dead."""
    codebook_centring: bool = False
    """Count what is quantised from its running mean, slot by slot. Without, every slot may keep to one code, which says
    which slot it is, and then nothing is learnt of what it does."""
    prior_components: int = 8
    """Of the learned prior over a slot's next latent action given the slots so far: a mixture of so many Gaussians. A
    discrete latent has one number a code instead."""

    def __post_init__(self) -> None:
        for name in ("factors", "width", "heads", "blocks", "iterations", "temporal_window", "latent_width"):
            if getattr(self, name) < 1:
                raise SettingsError(f"model.{name} = {getattr(self, name)}", fix="It must be at least 1.")
        for name in ("slot_focus", "slot_sharpness", "aggregator_sharpness"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"model.{name} = {getattr(self, name)}", fix="It must be above 0.")
        if self.width % self.heads:
            raise SettingsError(
                f"model.width {self.width} is not divisible by model.heads {self.heads}", fix="Change one of them."
            )
        if self.latent_width % self.factors:
            near = [k for k in range(1, self.latent_width + 1) if self.latent_width % k == 0]
            near = sorted(near, key=lambda k: abs(k - self.factors))[:2]
            raise SettingsError(
                f"model.latent_width {self.latent_width} is not divisible by model.factors {self.factors}",
                fix=f"Choose factors {' or '.join(map(str, sorted(near)))}, or a latent_width that is a multiple of "
                f"{self.factors}.",
            )
        if self.latent == "vq" and self.codebook < 2:
            raise SettingsError(f"model.codebook = {self.codebook}", fix="A codebook needs at least 2 codes.")
        if self.state == "patches" and (self.coupling != "factored" or self.slot_time != "attention"):
            raise SettingsError(
                "model.coupling and model.slot_time are about slots, and model.state is patches",
                fix="Leave them at their defaults, or use model.state slots.",
            )
        if self.motion_readout and (self.state == "patches" or self.latent == "none"):
            raise SettingsError(
                f"model.motion_readout with model.state {self.state} and model.latent {self.latent}",
                fix="It is about slots with latent actions: turn it off.",
            )
        if self.slot_place and (self.state == "patches" or self.width < 3):
            raise SettingsError(
                f"model.slot_place with model.state {self.state} and model.width {self.width}",
                fix="It is about slots, of which two numbers are the place: turn it off, or give wider slots.",
            )
        if (self.latent == "true") != (self.true_actions is not None):
            raise SettingsError(
                f"model.latent is {self.latent} and model.true_actions {self.true_actions}",
                fix="Give true_actions (entities, numbers, kinds) with latent true, and only then.",
            )
        if self.latent == "none" and self.state == "patches":
            raise SettingsError(
                "model.latent none with model.state patches", fix="Without actions, use --model.state slots."
            )
        if self.latent == "true" and (self.state != "patches" or self.factors != 1):
            raise SettingsError(
                f"model.latent true with model.state {self.state} and {self.factors} factors",
                fix="A world model of true actions has one action for all: --model.state patches --model.factors 1.",
            )
        if self.true_actions is not None and (min(self.true_actions[:2]) < 1 or self.true_actions[2] < 0):
            raise SettingsError(
                f"model.true_actions = {self.true_actions}", fix="Give entities >= 1, numbers >= 1 and kinds >= 0."
            )
        if self.log_variance_gain <= 0:
            raise SettingsError(f"model.log_variance_gain = {self.log_variance_gain}", fix="It must be above 0.")
        if self.codebook_decay is not None and not 0 < self.codebook_decay < 1:
            raise SettingsError(f"model.codebook_decay = {self.codebook_decay}", fix="It must lie between 0 and 1.")
        if not 0 <= self.codebook_revival < 1:
            raise SettingsError(f"model.codebook_revival = {self.codebook_revival}", fix="It is a share: 0 to 1.")
        if self.prior_components < 1:
            raise SettingsError(f"model.prior_components = {self.prior_components}", fix="It must be at least 1.")
        if self.latent == "vq" and self.action_dim < 2:
            raise SettingsError(
                f"model.latent_width {self.latent_width} leaves each of {self.factors} slots one number, and codes of "
                "unit length need two",
                fix=f"Use a latent_width of {2 * self.factors} or more.",
            )

    @property
    def action_dim(self) -> int:
        """Width of one slot's latent action."""
        return self.latent_width // self.factors
