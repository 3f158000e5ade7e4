"""Traffic seen from above (package `highway-env`): cars at a roundabout, drawn as coloured boxes on marked lanes.

The package gives the roads, the drivers and the drawing. Its environments are not stepped: they control one car and
follow it with the camera, whereas here all cars drive themselves, their number stays the same and the camera stands
still, so that the road is drawn once an episode.
"""

from __future__ import annotations

import colorsys
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from flam_core.errors import EnvironmentFault, SettingsError
from flam_core.worlds.base import Episode

MAX_CARS = 16
_SIDES = ("s", "e", "n", "w")  # of the roundabout, in the order in which cars pass them
_RADIUS = 20.0  # metres, of the ring's only lane
_STRAIGHT = 54.0  # metres from the middle; the approach roads are straight further out and cars come in there
_MARGIN = 6.0  # metres beyond the view at which cars come and go: their whole length is out of sight
_GAP = 14.0  # metres that must be free around the place where a car comes in
_YIELD_FROM, _YIELD_TO = 18.0, 4.0  # metres before the ring between which a car may still stop
_UPSTREAM, _DOWNSTREAM = np.deg2rad(75), np.deg2rad(15)  # the part of the ring that must be free for a car to enter
_OVERSAMPLE = 4  # the package draws without anti-aliasing and in whole pixels


@dataclass(frozen=True)
class DrivingWorld:
    """Cars that enter a roundabout, give way to those on it and leave on another side.

    Policy: each car drives itself (the package's IDM, with a route drawn at random) towards a wanted speed that is
    random with persistence: with probability 1 - `persistence` a frame it is drawn anew from `speeds`, so cars brake
    and speed up visibly. Cars that touch do not crash: a wreck would block the ring for ever.

    `actions` [T, N, 2] are the acceleration in m/s^2 and the steering angle in radians (positive turns clockwise in the
    frame), each the mean over the simulated time between two frames; `positions` the centre of a car. Both are NaN for
    an empty slot; while a car is not in view its position is NaN and its action is known. A car keeps its slot, and
    with it its colour, until it has left; then the slot is empty for a frame at least. No rewards.
    """

    entities: int = 6
    """Cars, each in a slot with a colour of its own."""
    frame_size: int = 128
    """Height and width of a frame in pixels, averaged down from a drawing four times as large."""
    view: float = 64.0
    """Metres along each side of the frame."""
    speeds: tuple[float, float] = (4.0, 10.0)
    """Range of wanted speeds in m/s."""
    persistence: float = 0.95
    """Probability that a car keeps its wanted speed for another frame."""
    warm_up: float = 10.0
    """Seconds of traffic before the first frame, so that cars are everywhere."""
    substeps: int = 3
    """Steps of the simulator between two frames."""
    fps: float = 5.0
    name: str = "driving"
    licence: str = "MIT"

    def __post_init__(self) -> None:
        if not 1 <= self.entities <= MAX_CARS:
            raise SettingsError(f"driving: entities = {self.entities}", fix=f"Choose 1 to {MAX_CARS} cars.")
        if self.frame_size < 32:
            raise SettingsError(f"driving: frame_size = {self.frame_size}", fix="Choose at least 32 pixels.")
        if not 48.0 <= self.view <= 160.0:
            raise SettingsError(
                f"driving: view = {self.view} m", fix="Choose 48, which just holds the ring, to 160, where roads end."
            )
        if not 0.0 < self.speeds[0] <= self.speeds[1]:
            raise SettingsError(f"driving: speeds = {self.speeds}", fix="Give the lower, then the upper speed in m/s.")
        if not 0.0 <= self.persistence <= 1.0:
            raise SettingsError(f"driving: persistence = {self.persistence}", fix="It is a probability: choose 0 to 1.")
        if self.warm_up < 0 or self.substeps < 1 or self.fps <= 0:
            raise SettingsError(
                f"driving: warm_up = {self.warm_up}, substeps = {self.substeps}, fps = {self.fps}",
                fix="Choose a warm_up of at least 0, substeps of at least 1 and a positive fps.",
            )

    def episodes(self, count: int, frames: int, seed: int) -> Iterator[Episode]:
        """Yield `count` episodes of exactly `frames` frames. Episode e depends on (seed, e) only."""
        for e in range(count):
            yield self._record(_Traffic(self, np.random.default_rng((seed, e))), frames)

    def _record(self, traffic: _Traffic, frames: int) -> Episode:
        """Let the traffic run and take a picture at each frame."""
        pictures = np.empty((frames, self.frame_size, self.frame_size, 3), dtype=np.uint8)
        actions = np.full((frames, self.entities, 2), np.nan, dtype=np.float32)
        positions = np.full((frames, self.entities, 2), np.nan, dtype=np.float32)
        for _ in range(round(self.warm_up * self.fps)):
            traffic.advance()
        for t in range(frames):
            pictures[t] = traffic.picture()
            positions[t] = traffic.positions()
            actions[t] = traffic.advance()
        return Episode(pictures, actions, positions)


class _Traffic:
    """The roads of a roundabout and the cars on them."""

    def __init__(self, world: DrivingWorld, rng: np.random.Generator) -> None:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # it would greet on standard output
        try:
            self._pygame = import_module("pygame")
            roundabouts = import_module("highway_env.envs.roundabout_env")
            roads = import_module("highway_env.road.road")
            road_drawing = import_module("highway_env.road.graphics")
            self._car_class = import_module("highway_env.vehicle.behavior").IDMVehicle
            self._draw_car = import_module("highway_env.vehicle.graphics").VehicleGraphics.display
        except ImportError as error:
            raise EnvironmentFault(
                f"driving: the simulator is not installed ({error})", fix="Run: pip install 'flam[worlds]'"
            ) from error
        self.world, self.rng = world, rng
        plan = roundabouts.RoundaboutGenericEnv(config={"roundabout_lanes": 1, "roundabout_radius": _RADIUS})
        self.road: Any = roads.Road(network=plan.road.network, np_random=rng, neighbour_vehicles_connected_lanes=True)
        self.cars: list[Any] = [None] * world.entities
        self.wanted = np.zeros(world.entities)  # m/s
        self.colours = [
            tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / world.entities, 0.85 if i % 2 == 0 else 0.55, 1.0))
            for i in range(world.entities)
        ]
        # Surfaces of their own, never a display: with SDL's dummy display the package's viewer leaves frames black.
        large = (world.frame_size * _OVERSAMPLE,) * 2
        self.surface: Any = road_drawing.WorldSurface(large, 0, self._pygame.Surface(large, depth=24))
        self.surface.scaling = large[0] / world.view
        self.surface.centering_position = [0.5, 0.5]
        self.surface.move_display_window_to(np.zeros(2))
        road_drawing.RoadGraphics.display(self.road, self.surface)
        self.empty_road = self.surface.copy()

    def advance(self) -> np.ndarray:
        """Go on to the next frame; the actions float32 [N, 2] that led there."""
        world = self.world
        taken = np.zeros((world.entities, 2), dtype=np.float32)
        empty = [i for i, car in enumerate(self.cars) if car is None]
        taken[empty] = np.nan
        drawn = self.rng.random(world.entities) >= world.persistence
        self.wanted[drawn] = self.rng.uniform(*world.speeds, size=int(drawn.sum()))
        for _ in range(world.substeps):
            ring = np.array([_angle(car) for car in self.road.vehicles if _on_ring(car)])
            for car, wanted in zip(self.cars, self.wanted, strict=True):
                if car is not None:
                    car.target_speed = 0.0 if self._must_wait(car, ring) else float(wanted)
            self.road.act()
            self.road.step(1.0 / (world.fps * world.substeps))
            for i, car in enumerate(self.cars):
                if car is not None:
                    taken[i] += np.array([car.action["acceleration"], car.action["steering"]]) / world.substeps
        for i, car in enumerate(self.cars):
            if car is not None and np.abs(car.position).max() > world.view / 2 + _MARGIN and _outward(car):
                self.cars[i] = None
        for i in empty:  # not those that left just now: their slots stay empty for a frame
            self.cars[i] = self._enter(i)
        self.road.vehicles = [car for car in self.cars if car is not None]
        return taken

    def _must_wait(self, car: Any, ring: np.ndarray) -> bool:
        """Whether a car before the ring has to give way to one at these angles [cars on the ring]."""
        if not car.lane_index[0].endswith("es"):  # the last lane before the ring
            return False
        entry = car.lane.position(car.lane.length, 0.0)
        if not _YIELD_TO < np.linalg.norm(car.position - entry) < _YIELD_FROM:
            return False
        ahead = ring - np.arctan2(entry[1], entry[0])  # cars go round towards smaller angles
        return bool(((ahead + _DOWNSTREAM) % (2 * np.pi) < _UPSTREAM + _DOWNSTREAM).any())

    def _enter(self, slot: int) -> Any:
        """A new car out of view on a random side, or None while there is no room for it."""
        world = self.world
        side, turn, speed = int(self.rng.integers(4)), int(self.rng.integers(1, 4)), self.rng.uniform(*world.speeds)
        entry = (f"{_SIDES[side]}er", f"{_SIDES[side]}es", 0)
        lane = self.road.network.get_lane(entry)
        start = float(np.abs(lane.position(0.0, 0.0)).max()) - max(world.view / 2 + _MARGIN, _STRAIGHT)
        place = lane.position(start, 0.0)
        if any(car is not None and np.linalg.norm(car.position - place) < _GAP for car in self.cars):
            return None
        car = self._car_class.make_on_lane(self.road, entry, start, speed)
        car.plan_route_to(f"{_SIDES[(side + turn) % 4]}xr")
        car.enable_lane_change = car.check_collisions = False
        car.color, self.wanted[slot] = self.colours[slot], speed
        return car

    def positions(self) -> np.ndarray:
        """Centres float32 [N, 2] of the cars in view, as shares of the frame."""
        places = np.full((self.world.entities, 2), np.nan, dtype=np.float32)
        for i, car in enumerate(self.cars):
            if car is not None:
                places[i] = car.position / self.world.view + 0.5
        places[~((places >= 0) & (places <= 1)).all(axis=-1)] = np.nan
        return places

    def picture(self) -> np.ndarray:
        """The frame uint8 [H, W, 3]."""
        self.surface.blit(self.empty_road, (0, 0))
        for car in self.road.vehicles:
            self._draw_car(car, self.surface, offscreen=True)
        small = self._pygame.transform.smoothscale(self.surface, (self.world.frame_size,) * 2)
        return self._pygame.surfarray.array3d(small).swapaxes(0, 1)


def _on_ring(car: Any) -> bool:
    """Whether a car is on the ring: its nodes have names of two letters, those of the roads before it of three."""
    return len(car.lane_index[0]) == 2 and len(car.lane_index[1]) == 2


def _angle(car: Any) -> float:
    """The direction from the middle to a car, in radians, clockwise in the frame."""
    return float(np.arctan2(car.position[1], car.position[0]))


def _outward(car: Any) -> bool:
    """Whether a car drives away from the middle."""
    return float(car.position @ car.direction) > 0
