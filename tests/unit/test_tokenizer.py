"""The tokenizer: quantisation and features. And the starts of slots, which are made of features."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flam_core.config import ModelConfig, TokenizerConfig
from flam_core.errors import SettingsError
from flam_core.model import Flam, Tokenizer
from flam_core.model.fsq import FSQ
from flam_core.model.warm_start import moving_prototypes, slow_start

TOKENIZER = TokenizerConfig(frame_size=24, unshuffle=4, channels=(8,), feature_dim=6)
MODEL = ModelConfig(factors=3, width=16, heads=2, blocks=2, iterations=2, latent_width=12)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def model(tokenizer: TokenizerConfig = TOKENIZER) -> Flam:
    """In double precision, with standardised features, and with codes that small differences of features change."""
    flam = Flam(tokenizer, MODEL).double().eval()
    with torch.no_grad():
        flam.tokenizer.to_codes.weight *= 50
    flam.tokenizer.standardise(flam.tokenizer.moments(pictures(16)))
    return flam


def pictures(*shape: int, size: int = 24) -> Tensor:
    return torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8)


levels = st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple)


# Quantisation


def every_code(fsq: FSQ) -> Tensor:
    """Inputs [codes, L] of all codes: each level's digit through the inverse of `bound`."""
    digits = torch.cartesian_prod(*(torch.arange(n) - n // 2 for n in fsq.levels.tolist()))
    digits = digits.reshape(-1, len(fsq.levels)).double()
    half = (fsq.levels - 1) * (1 + 1e-3) / 2
    offset = torch.where(fsq.levels % 2 == 0, 0.5, 0.0)
    return ((digits + offset) / half).atanh() - (offset / half).atanh()


@given(levels)
def test_fsq_reaches_every_code_number_once(sizes: tuple[int, ...]) -> None:
    fsq = FSQ(sizes)
    found = fsq.indices(every_code(fsq))
    assert sorted(found.tolist()) == list(range(math.prod(sizes)))
    assert len(fsq(every_code(fsq)).unique(dim=0)) == math.prod(sizes)


@given(levels, st.floats(0.1, 1e6))
def test_fsq_stays_in_bounds_whatever_comes(sizes: tuple[int, ...], scale: float) -> None:
    fsq, x = FSQ(sizes), torch.randn(500, len(sizes)) * scale
    quantised, numbers = fsq(x), fsq.indices(x)
    assert quantised.abs().max() <= 1
    assert 0 <= numbers.min() <= numbers.max() < math.prod(sizes)
    for dimension, size in enumerate(sizes):
        assert len(quantised[:, dimension].unique()) <= size


@given(levels)
def test_fsq_numbers_and_vectors_tell_the_same_codes_apart(sizes: tuple[int, ...]) -> None:
    fsq, x = FSQ(sizes), torch.randn(200, len(sizes)) * 2
    pairs = torch.cat([fsq.indices(x)[:, None].float(), fsq(x)], dim=-1).unique(dim=0)
    assert len(pairs) == len(fsq.indices(x).unique()) == len(fsq(x).unique(dim=0))


def test_quantising_what_was_quantised_changes_nothing() -> None:
    fsq = FSQ((4, 5, 2, 8))
    x = torch.randn(300, 4, dtype=torch.float64) * 2
    preimages = every_code(fsq)
    of_number = preimages[fsq.indices(preimages).argsort()]
    assert torch.equal(fsq(of_number[fsq.indices(x)]), fsq(x))


def test_rounding_passes_the_gradient_of_the_bound_straight_through() -> None:
    fsq = FSQ((4, 5, 2, 8))
    x = torch.randn(50, 4, requires_grad=True)
    (through_rounding,) = torch.autograd.grad(fsq(x).sum(), x)
    (without,) = torch.autograd.grad((fsq.bound(x) / (fsq.levels // 2)).sum(), x)
    assert torch.allclose(through_rounding, without)
    assert (through_rounding > 0).all()


@given(levels)
def test_the_distance_from_levels_is_zero_at_codes_and_leads_to_them(sizes: tuple[int, ...]) -> None:
    fsq = FSQ(sizes)
    assert fsq.distance(every_code(fsq)).max() < 1e-9
    x = (torch.randn(100, len(sizes)) * 2).requires_grad_()
    before, codes = fsq.distance(x), fsq.indices(x)
    assert before.max() <= 0.25 + 1e-6
    before.sum().backward()
    assert x.grad is not None
    nearer = x.detach() - 1e-3 * x.grad
    assert fsq.distance(nearer).sum() <= before.sum()
    assert torch.equal(fsq.indices(nearer), codes)


# The tokenizer


@pytest.mark.parametrize(
    "config",
    [
        TOKENIZER,
        TokenizerConfig(frame_size=16, unshuffle=1, channels=(4, 6), feature_dim=5, fsq_levels=(3, 4)),
        TokenizerConfig(frame_size=24, unshuffle=2, channels=(4, 4), feature_dim=3, fsq_levels=(2,)),
    ],
)
def test_tokenizer_shapes_follow_the_config(config: TokenizerConfig) -> None:
    tokenizer = Tokenizer(config)
    frames = pictures(2, 3, size=config.frame_size)
    z = tokenizer.encode(frames)
    assert z.shape == (2, 3, config.patches, config.feature_dim)
    assert tokenizer.decode(z).shape == frames.shape
    assert tokenizer.codes(z).shape == (2, 3, config.patches)
    assert tokenizer.codes(z).max() < config.codes
    flat = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    reconstruction, distance = tokenizer(flat)
    assert reconstruction.shape == flat.shape
    assert 0 <= distance <= 0.25


@pytest.mark.parametrize("whitening", [None, 0.01])
def test_encode_then_decode_is_what_stage_1_trains(whitening: float | None) -> None:
    tokenizer = model(replace(TOKENIZER, whitening=whitening)).tokenizer
    frames = pictures(4)
    trained = tokenizer(frames.permute(0, 3, 1, 2).double() / 255)[0].permute(0, 2, 3, 1)
    assert torch.allclose(tokenizer.decode(tokenizer.encode(frames)), trained, atol=1e-6)


def test_on_a_chessboard_every_other_patch_is_drawn_unquantised_while_training_and_all_are_quantised_later() -> None:
    tokenizer = model(replace(TOKENIZER, chessboard=True)).tokenizer
    given = torch.randn(2, 3, 3, len(TOKENIZER.fsq_levels), dtype=torch.float64)
    seen: list[Tensor] = []
    tokenizer.decoder.register_forward_pre_hook(lambda _module, codes: seen.append(codes[0].movedim(1, -1)))
    tokenizer._to_quantise = lambda _features: given
    tokenizer(torch.rand(2, 3, 24, 24, dtype=torch.float64))
    left_alone = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    bounded = tokenizer.fsq.bound(given.float()) / (tokenizer.fsq.levels // 2)
    assert torch.equal(seen[0], torch.where(left_alone[..., None], bounded, tokenizer.fsq(given)).double())
    assert (seen[0] != tokenizer.fsq(given)).any(dim=-1).equal(left_alone.expand(2, 3, 3))
    tokenizer.decode(torch.randn(2, 9, TOKENIZER.feature_dim, dtype=torch.float64))
    assert torch.equal(seen[1], tokenizer.fsq(given).double())


def test_a_patch_does_not_depend_on_the_other_frames() -> None:
    tokenizer, frames = model().tokenizer, pictures(2, 3)
    assert torch.allclose(tokenizer.encode(frames)[1, 2], tokenizer.encode(frames[1, 2]), atol=1e-12)


def test_moments_of_parts_add_up() -> None:
    tokenizer, frames = Tokenizer(TOKENIZER), pictures(10)
    parts = tokenizer.moments(frames[:3]) + tokenizer.moments(frames[3:])
    assert torch.allclose(parts, tokenizer.moments(frames), rtol=1e-6)


@pytest.mark.parametrize("whitening", [None, 0.01])
def test_standardised_features_have_mean_0_and_on_average_variance_1(whitening: float | None) -> None:
    tokenizer = Tokenizer(replace(TOKENIZER, whitening=whitening)).double()
    frames = pictures(20)
    for _ in range(2):  # moments are those of the raw features, so it does not matter what was set before
        tokenizer.standardise(tokenizer.moments(frames))
        z = tokenizer.encode(frames).flatten(0, -2)
        assert torch.allclose(z.mean(dim=0), torch.zeros(6, dtype=torch.float64), atol=1e-6)
        assert z.var(dim=0, correction=0).mean().item() == pytest.approx(1, abs=1e-4)


def test_without_whitening_channels_keep_their_relative_scale_and_with_it_they_come_closer() -> None:
    frames, spreads = pictures(20), []
    for whitening in (None, 0.1, 1e-6):
        torch.manual_seed(0)
        tokenizer = Tokenizer(replace(TOKENIZER, whitening=whitening)).double()
        raw = tokenizer.encode(frames).flatten(0, -2)
        tokenizer.standardise(tokenizer.moments(frames))
        z = tokenizer.encode(frames).flatten(0, -2)
        if whitening is None:
            assert torch.allclose(z.std(dim=0) / raw.std(dim=0), (z.std(dim=0) / raw.std(dim=0)).mean())
        variances = torch.linalg.eigvalsh(z.T.cov())[1:]  # normalised features sum to 0: one direction says nothing
        spreads.append((variances.max() / variances.min()).item())
    assert spreads[0] > spreads[1] > spreads[2] >= 1


def test_decoded_frames_are_clamped_to_0_and_1() -> None:
    flam = model()
    with torch.no_grad():
        for weight in flam.tokenizer.decoder.parameters():
            weight *= 10
    z = flam.encode(pictures(1, 2))
    raw, shown = flam.tokenizer.decode(z), flam.decode(z)
    assert raw.min() < 0 < 1 < raw.max()
    assert torch.equal(shown, raw.clamp(0, 1))


@pytest.mark.parametrize("encoder", ["impala", "patches"])
@pytest.mark.parametrize("sizes", [{"channels": (8,), "unshuffle": 4}, {"channels": (4, 8), "unshuffle": 2}])
def test_only_the_paper_s_encoder_tells_a_patch_of_its_neighbours(encoder, sizes) -> None:
    config = replace(TOKENIZER, encoder=encoder, **sizes)
    tokenizer, frames = Tokenizer(config).double(), pictures(1)
    other = frames.clone()
    other[:, 8:16, 8:16] = 255 - other[:, 8:16, 8:16]  # patch 4 of the 3 x 3
    changed = (tokenizer.encode(frames) != tokenizer.encode(other)).any(dim=-1)[0]
    assert changed[4]
    assert changed.sum() == (1 if encoder == "patches" else 9)


def test_commitment_keeps_codes_off_the_borders_of_levels() -> None:
    frames = pictures(8).permute(0, 3, 1, 2).float() / 255

    def trained(commitment: float) -> float:
        torch.manual_seed(3)
        tokenizer = Tokenizer(replace(TOKENIZER, commitment=commitment))
        optimizer = torch.optim.Adam(tokenizer.parameters(), 1e-2)
        distance = torch.zeros(())
        for _ in range(40):
            reconstruction, distance = tokenizer(frames)
            loss = (reconstruction - frames).pow(2).mean() + tokenizer.config.commitment * distance
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return distance.item()

    assert trained(1.0) < 0.5 * trained(0.0)


def test_reading_what_was_drawn_teaches_the_encoder_alone() -> None:
    frames = pictures(4).double().movedim(-1, 1) / 255

    def gradients(reread: bool) -> dict[str, Tensor | None]:
        tokenizer = model(replace(TOKENIZER, reread=reread, commitment=0.1)).tokenizer
        torch.manual_seed(3)
        for weight in tokenizer.parameters():
            torch.nn.init.normal_(weight)
        tokenizer(frames)[1].backward()
        return {name: weight.grad for name, weight in tokenizer.named_parameters()}

    with_it, without = gradients(reread=True), gradients(reread=False)
    for name, gradient in with_it.items():
        if name.startswith("decoder."):
            assert gradient is None
        elif not name.endswith("bias"):
            other = without[name]
            assert gradient is not None
            assert other is not None
            assert not torch.allclose(gradient, other), name


def test_what_is_read_again_costs_nothing_near_its_level() -> None:
    tokenizer = model(replace(TOKENIZER, reread=True, commitment=0.1)).tokenizer
    frames = torch.rand(2, 3, 24, 24, dtype=torch.float64)
    first, distances = torch.zeros(2, 3, 3, len(TOKENIZER.fsq_levels), dtype=torch.float64), []
    for offset in (0.0, 0.2, 3.0):
        answers = iter([first, first + offset])
        tokenizer._to_quantise = lambda _features, answers=answers: next(answers)
        distances.append(tokenizer(frames)[1].item())
    assert distances[0] == distances[1] < distances[2]


def test_commitment_is_not_negative() -> None:
    with pytest.raises(SettingsError, match=r"tokenizer.commitment = -1"):
        TokenizerConfig(commitment=-1)


def test_rereading_that_nothing_weighs_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"tokenizer.reread with tokenizer.commitment 0"):
        TokenizerConfig(reread=True)


# Starts of slots


def moving(things: Tensor, *, clips: int = 12, frames: int = 5, patches: int = 16, noise: float = 0.0) -> Tensor:
    """Features [clips, frames, patches, C]: in each frame every thing on another patch, on still ground."""
    ground = torch.full((things.shape[1],), -0.1)
    z = ground.expand(clips, frames, patches, -1).clone()
    for clip in range(clips):
        for t in range(frames):
            z[clip, t, torch.randperm(patches)[: len(things)]] = things
    return z + noise * torch.randn_like(z)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_each_thing_that_moves_gets_a_start(noise: float) -> None:
    things = 4 * torch.eye(6)[:4]
    starts = moving_prototypes(moving(things, noise=noise), 4, seed=0)
    nearest = torch.cdist(things, starts).min(dim=1)
    assert sorted(nearest.indices.tolist()) == [0, 1, 2, 3]
    assert nearest.values.max() < 0.5


def test_things_that_differ_in_brightness_alone_get_starts_of_their_own() -> None:
    things = torch.tensor([[8.0, 0, 0], [4.0, 0, 0], [0, 6.0, 0]])
    starts = moving_prototypes(moving(things, noise=0.1), 3, seed=0)
    assert sorted(torch.cdist(things, starts).argmin(dim=1).tolist()) == [0, 1, 2]


def test_starts_to_spare_are_unlike_the_others() -> None:
    """As patches that are all alike leave clusters empty: nothing may be missing, and no thing may get two starts."""
    things = 4 * torch.eye(6)[:3]
    starts = moving_prototypes(moving(things), 5, seed=0)
    assert starts.shape == (5, 6)
    assert starts.isfinite().all()
    assert (torch.cdist(things, starts) < 0.5).sum(dim=1).tolist() == [1, 1, 1]


def test_starts_are_found_where_nothing_moves() -> None:
    starts = moving_prototypes(torch.randn(2, 1, 9, 4).expand(-1, 5, -1, -1), 3, seed=0)
    assert starts.isfinite().all()
    assert len(starts.unique(dim=0)) == 3


def drifting(kinds: Tensor, looks: Tensor, *, clips: int = 12, frames: int = 5, side: int = 12) -> Tensor:
    """Features [clips, frames, side * side, C]: of each kind a thing that drifts by fractions of a patch.

    A patch shows as much of a kind as lies in it, and beside that, four times as strong, how the thing lies in it.
    """
    at = 2 + (side - 5) * torch.rand(clips, len(kinds), 2)
    speed = 0.6 * torch.rand(clips, len(kinds), 2) - 0.3
    z = torch.zeros(clips, frames, side, side, kinds.shape[1])
    for clip, t, kind in itertools.product(range(clips), range(frames), range(len(kinds))):
        place = at[clip, kind] + t * speed[clip, kind]
        corner, part = place.floor().long(), place - place.floor()
        for down, right in itertools.product((0, 1), (0, 1)):
            share = (part[0] if down else 1 - part[0]) * (part[1] if right else 1 - part[1])
            lies = 4 * share * torch.sin(6.3 * torch.tensor([part[0], part[1], part[0] + part[1]]) + down + 2 * right)
            z[clip, t, corner[0] + down, corner[1] + right] += share * kinds[kind] + lies @ looks
    return z.flatten(2, 3)


def test_things_that_move_by_less_than_a_patch_are_told_apart_by_what_lasts() -> None:
    base = torch.linalg.qr(torch.randn(8, 8)).Q
    kinds, looks = base[:3], base[3:6]
    z = drifting(kinds, looks)
    start = slow_start(z, 3, seed=0)
    assert start.kinds.norm(dim=-1).allclose(torch.ones(3))
    shown = torch.nn.functional.normalize(kinds @ start.directions, dim=-1) @ start.kinds.T
    assert sorted(shown.argmax(dim=1).tolist()) == [0, 1, 2]  # each thing has a slot of its own
    assert shown.amax(dim=1).min() > 0.95
    lengths = {name: (rows @ start.directions).norm(dim=-1) for name, rows in (("kinds", kinds), ("looks", looks))}
    assert lengths["looks"].max() < 0.2 * lengths["kinds"].min()
    apart = moving_prototypes(z, 3, seed=0)  # which sees how things lie
    seen = torch.nn.functional.normalize(apart, dim=-1) @ kinds.T
    assert seen.amax(dim=1).max() < 0.8


def test_a_slow_start_is_found_where_nothing_moves_and_of_few_channels() -> None:
    for z in (torch.randn(2, 1, 9, 4).expand(-1, 5, -1, -1), torch.randn(2, 5, 9, 1), torch.zeros(2, 5, 9, 4)):
        start = slow_start(z, 3, seed=0)
        assert start.directions.isfinite().all()
        assert start.kinds.shape == (3, start.directions.shape[1])
        assert start.kinds.isfinite().all()
