"""Captioned scenes of coloured shapes: the demo model's endless training and test data.

A `Scene` is drawn from a seeded generator, says what it shows (`caption`), renders itself
(`render`), and knows the captions that differ from it in exactly one attribute
(`attribute_queries`), by which a scorer's or a generator's attribute accuracy is measured.
Shapes are drawn from signed distance functions and so are anti-aliased at any size.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 36),
    "orange": (245, 132, 20),
    "yellow": (246, 218, 32),
    "green": (28, 150, 62),
    "blue": (34, 84, 214),
    "purple": (132, 44, 168),
    "white": (248, 248, 248),
    "black": (18, 18, 20),
}
KINDS = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = {"small": 0.13, "medium": 0.17, "large": 0.22}  # outer radius ÷ picture side
PATTERNS = ("plain", "gradient", "striped", "checked")

_SIZE_WORDS = {"small": ("small", "little"), "medium": ("", "medium"), "large": ("large", "big")}
_PATTERN_PHRASES = {
    "plain": ("a plain {c} background", "a {c} background"),
    "gradient": ("a {c} gradient background", "a {c} gradient"),
    "striped": ("a {c} striped background", "a background of {c} stripes"),
    "checked": ("a {c} checked background", "a {c} checkerboard"),
}
_PLACES = {
    "in the centre": (0.5, 0.5),
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "in the top left corner": (0.27, 0.27),
    "in the top right corner": (0.73, 0.27),
    "in the bottom left corner": (0.27, 0.73),
    "in the bottom right corner": (0.73, 0.73),
}
Plane = NDArray[np.float32]
_SHAPE_COUNT_ODDS = (0.5, 0.38, 0.12)  # of scenes with one, two, three shapes


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape: what the caption says of it, and where it really is.

    `x`, `y` are the centre and `radius` the outer radius, all as fractions of the picture's
    side; `angle` is in radians.
    """

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclass(frozen=True, slots=True)
class Scene:
    """One to three shapes on a background, and the wording of its caption.

    `template` holds the fields {0}, {1}, {2} for the shapes and {bg} for the background;
    `wording` picks synonyms: one number per phrase (background first), so that a changed
    attribute changes that word of the caption and no other.
    """

    shapes: tuple[Shape, ...]
    pattern: str
    background: str
    template: str
    wording: tuple[int, ...]
    stripe_angle: float = 0.0
    period: float = 0.16

    def caption(self) -> str:
        """Returns the English caption, e.g. "a large red star above a small blue ring on a
        yellow striped background"."""
        phrases = _PATTERN_PHRASES[self.pattern]
        background = phrases[self.wording[0] % len(phrases)].format(c=self.background)
        background = background.replace("a orange", "an orange")
        nouns = []
        for shape, pick in zip(self.shapes, self.wording[1:], strict=True):
            sizes = _SIZE_WORDS[shape.size]
            words = [w for w in (sizes[pick % len(sizes)], shape.colour, shape.kind) if w]
            nouns.append(("an " if words[0][0] in "aeiou" else "a ") + " ".join(words))
        return self.template.format(*nouns, bg=background)


@dataclass(frozen=True, slots=True)
class AttributeQuery:
    """A true caption among captions that differ in one attribute; `captions[0]` is true."""

    attribute: str
    captions: tuple[str, ...]


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene: shapes never overlap, nor share the background's colour or a look."""
    count = 1 + int(rng.choice(3, p=_SHAPE_COUNT_ODDS))
    background = _pick(rng, COLOURS)
    template, centres = _layout(rng, count)
    shapes: list[Shape] = []
    for x, y in centres:
        kind, colour = _fresh_look(rng, background, shapes)
        sizes = list(SIZES) if count < 3 else ["small"]  # three large ones do not fit
        size = _pick(rng, sizes)
        jitter = rng.uniform(-0.025, 0.025, 2)
        radius = SIZES[size] * rng.uniform(0.93, 1.07)
        # squares and crosses tilt little, so that a square never looks like a diamond
        angle = rng.uniform(-0.2, 0.2)
        shapes.append(Shape(kind, colour, size, x + jitter[0], y + jitter[1], radius, angle))
    return Scene(
        shapes=tuple(shapes),
        pattern=_pick(rng, PATTERNS),
        background=background,
        template=template,
        wording=tuple(int(w) for w in rng.integers(0, 2, 1 + count)),
        stripe_angle=float(rng.choice([0.0, np.pi / 2, np.pi / 4, -np.pi / 4])),
        period=float(rng.uniform(0.2, 0.3)),
    )


def is_held_out(caption: str) -> bool:
    """Returns whether a caption belongs to the sixteenth that no training ever sees."""
    return zlib.crc32(caption.encode()) % 16 == 0


def scenes(seed: int, *, held_out: bool) -> Iterator[Scene]:
    """Yields the endless scenes of a seed; one seed always gives the same ones.

    Args:
        seed: Of the generator; 0 or more.
        held_out: Whether to give scenes for evaluation, or those for training; no caption
            is ever in both.
    """
    rng = np.random.default_rng(seed)
    while True:
        scene = sample_scene(rng)
        if is_held_out(scene.caption()) == held_out:
            yield scene


def attribute_queries(scene: Scene) -> list[AttributeQuery]:
    """Returns one query per attribute the caption states: each shape's colour and kind, and
    the background's colour and pattern, each against every other value it could have had."""
    queries = []
    for position, shape in enumerate(scene.shapes):
        taken = {scene.background}
        for attribute, values in (("colour", COLOURS), ("kind", KINDS)):
            true = getattr(shape, attribute)
            others = [v for v in values if v != true and not (attribute == "colour" and v in taken)]
            variants = [_with_shape(scene, position, **{attribute: v}) for v in others]
            queries.append(_query(attribute, scene, variants))
    colours = {s.colour for s in scene.shapes} | {scene.background}
    queries.append(
        _query(
            "background colour",
            scene,
            [replace(scene, background=c) for c in COLOURS if c not in colours],
        )
    )
    queries.append(
        _query(
            "background pattern",
            scene,
            [replace(scene, pattern=p) for p in PATTERNS if p != scene.pattern],
        )
    )
    return queries


def render(scene: Scene, side_px: int = 128) -> NDArray[np.uint8]:
    """Draws a scene, anti-aliased.

    Returns:
        (side_px, side_px, 3) uint8 RGB.
    """
    x, y = _pixel_centres(side_px)
    picture = _background(scene, x, y, side_px)
    for shape in scene.shapes:
        colour = np.array(COLOURS[shape.colour], np.float32)
        picture += _cover(shape, x, y, side_px)[..., None] * (colour - picture)
    return (picture + 0.5).astype(np.uint8)


def cover_map(scene: Scene, side_px: int) -> Plane:
    """Returns (side_px, side_px) float32: how much of each pixel shapes cover, in [0, 1]."""
    x, y = _pixel_centres(side_px)
    cover: Plane = np.max([_cover(shape, x, y, side_px) for shape in scene.shapes], axis=0)
    return cover


def shape_map(scene: Scene, side: int) -> NDArray[np.int8]:
    """Returns (side, side) int8: which shape covers each cell's centre, -1 where none does."""
    x, y = _pixel_centres(side)
    covered = np.full((side, side), -1, np.int8)
    for position, shape in enumerate(scene.shapes):
        covered[np.hypot(x - shape.x, y - shape.y) < shape.radius] = position
    return covered


def _pixel_centres(side_px: int) -> tuple[Plane, Plane]:
    """Returns x and y, each (side_px, side_px) float32, as fractions of the side."""
    centre = (np.arange(side_px) + 0.5) / side_px
    x, y = np.meshgrid(centre, centre)
    return x.astype(np.float32), y.astype(np.float32)


def _cover(shape: Shape, x: Plane, y: Plane, side_px: int) -> Plane:
    """Returns how much of each pixel a shape covers, in [0, 1]."""
    dx, dy = x - np.float32(shape.x), y - np.float32(shape.y)
    cos, sin = np.float32(np.cos(shape.angle)), np.float32(np.sin(shape.angle))
    u = ((cos * dx + sin * dy) / shape.radius).astype(np.float32)
    v = ((cos * dy - sin * dx) / shape.radius).astype(np.float32)
    distance = _DISTANCES[shape.kind](u, v) * np.float32(shape.radius * side_px)
    cover: Plane = np.clip(0.5 - distance, 0.0, 1.0)
    return cover


def _pick(rng: np.random.Generator, values: Iterable[str]) -> str:
    names = list(values)
    return names[int(rng.integers(len(names)))]


def _layout(rng: np.random.Generator, count: int) -> tuple[str, list[tuple[float, float]]]:
    """Returns a caption template and a centre per shape, in the template's order."""
    frame = ("{s} on {bg}", "{bg} with {s}", "{s}, {bg}", "a picture of {s} on {bg}")[
        int(rng.choice(4, p=[0.55, 0.2, 0.1, 0.15]))
    ]
    if count == 1:
        place = _pick(rng, _PLACES)
        said = rng.random() < 0.6
        return frame.replace("{s}", "{0} " + place if said else "{0}"), [_PLACES[place]]
    across = rng.random() < 0.5
    if count == 2:
        words = ("to the left of", "to the right of") if across else ("above", "below")
        reverse = int(rng.random() < 0.5)
        spots = [(0.27, 0.5), (0.73, 0.5)] if across else [(0.5, 0.27), (0.5, 0.73)]
        sentence = "{0} " + words[reverse] + " {1}"
        return frame.replace("{s}", sentence), spots[::-1] if reverse else spots
    line = [(0.19, 0.5), (0.5, 0.5), (0.81, 0.5)]
    way = "from left to right"
    if not across:
        line, way = [(py, px) for px, py in line], "from top to bottom"
    if rng.random() < 0.5:
        return frame.replace("{s}", "{0}, {1} and {2} " + way), line
    between = "{0} between {1} on the left and {2} on the right"
    if not across:
        between = "{0} between {1} at the top and {2} at the bottom"
    return frame.replace("{s}", between), [line[1], line[0], line[2]]


def _fresh_look(rng: np.random.Generator, background: str, shapes: list[Shape]) -> tuple[str, str]:
    while True:
        kind, colour = _pick(rng, KINDS), _pick(rng, COLOURS)
        if colour != background and all((kind, colour) != (s.kind, s.colour) for s in shapes):
            return kind, colour


def _with_shape(scene: Scene, position: int, **changes: str) -> Scene:
    shapes = list(scene.shapes)
    shapes[position] = replace(shapes[position], **changes)  # type: ignore[arg-type]
    return replace(scene, shapes=tuple(shapes))


def _query(attribute: str, scene: Scene, variants: list[Scene]) -> AttributeQuery:
    return AttributeQuery(attribute, (scene.caption(), *(v.caption() for v in variants)))


def _background(
    scene: Scene, x: NDArray[np.float32], y: NDArray[np.float32], side_px: int
) -> NDArray[np.float32]:
    """Returns the (side, side, 3) float32 background in 0…255: two tones of one pastel."""
    colour = np.array(COLOURS[scene.background], np.float32)
    light = colour + (255 - colour) * 0.45
    dark = colour * 0.92
    if scene.background in ("white", "black"):
        light, dark = colour, np.abs(colour - 62)
    along = x * np.float32(np.cos(scene.stripe_angle)) + y * np.float32(np.sin(scene.stripe_angle))
    if scene.pattern == "plain":
        blend = np.zeros_like(x)
    elif scene.pattern == "gradient":
        low, high = along.min(), along.max()
        blend = (along - low) / (high - low)
    elif scene.pattern == "striped":
        blend = _wave(along, scene.period, side_px)
    else:
        a, b = _wave(x, scene.period, side_px), _wave(y, scene.period, side_px)
        blend = a + b - 2 * a * b
    return (light + blend[..., None] * (dark - light)).astype(np.float32)


def _wave(along: NDArray[np.float32], period: float, side_px: int) -> NDArray[np.float32]:
    """Returns an anti-aliased square wave in [0, 1] of a period in picture sides."""
    phase = np.abs((along / np.float32(period)) % 1.0 - 0.5) - 0.25
    wave: NDArray[np.float32] = np.clip(0.5 + phase * np.float32(period * side_px), 0.0, 1.0)
    return wave


def _circle(u: Plane, v: Plane) -> Plane:
    return np.hypot(u, v) - np.float32(0.92)


def _square(u: Plane, v: Plane) -> Plane:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.8)


def _triangle(u: Plane, v: Plane) -> Plane:
    slope = np.float32(np.sqrt(0.75))
    return np.maximum(slope * np.abs(u) - 0.5 * v, v) - np.float32(0.5)


def _star(u: Plane, v: Plane) -> Plane:
    """Five points: the distance to the edge line of the nearest point's half."""
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + fifth / 2) % fifth - fifth / 2)
    radius = np.hypot(u, v)
    tip, dent = 1.08, 0.45
    # the line from the tip (angle 0) to the dent (angle fifth / 2)
    edge_x, edge_y = dent * np.cos(fifth / 2) - tip, dent * np.sin(fifth / 2)
    length = np.hypot(edge_x, edge_y)
    away = (radius * np.cos(angle) - tip) * edge_y - radius * np.sin(angle) * edge_x
    return np.asarray(away / length, np.float32)


def _ring(u: Plane, v: Plane) -> Plane:
    return np.abs(np.hypot(u, v) - np.float32(0.7)) - np.float32(0.24)


def _cross(u: Plane, v: Plane) -> Plane:
    a, b = np.abs(u), np.abs(v)
    upright = np.maximum(a - np.float32(0.28), b - np.float32(0.95))
    return np.minimum(upright, np.maximum(b - np.float32(0.28), a - np.float32(0.95)))


_DISTANCES: dict[str, Callable[[Plane, Plane], Plane]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
