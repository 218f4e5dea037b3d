from itertools import islice

import numpy as np

from cq_edge.scenes import (
    COLOURS,
    KINDS,
    PATTERNS,
    Scene,
    Shape,
    attribute_queries,
    is_held_out,
    render,
    scenes,
    shape_map,
)

_FIRST = list(islice(scenes(3, held_out=False), 300))


def _plain(kind: str, colour: str = "red") -> Scene:
    shape = Shape(kind, colour, "large", 0.5, 0.5, 0.3)
    return Scene((shape,), "plain", "white", "{0} on {bg}", (0, 0))


def test_the_same_seed_gives_the_same_scenes_and_another_seed_others():
    again = list(islice(scenes(3, held_out=False), 300))
    others = list(islice(scenes(4, held_out=False), 300))
    assert again == _FIRST
    assert others != _FIRST


def test_no_caption_is_both_held_out_and_trained_on():
    held_out = {s.caption() for s in islice(scenes(3, held_out=True), 300)}
    assert all(is_held_out(caption) for caption in held_out)
    assert not any(is_held_out(scene.caption()) for scene in _FIRST)


def test_every_kind_colour_and_pattern_appears():
    shapes = [shape for scene in _FIRST for shape in scene.shapes]
    assert {s.kind for s in shapes} == set(KINDS)
    assert {s.colour for s in shapes} == set(COLOURS)
    assert {s.pattern for s in _FIRST} == set(PATTERNS)
    assert {len(s.shapes) for s in _FIRST} == {1, 2, 3}


def test_no_shape_has_the_colour_of_its_background():
    assert all(s.colour != scene.background for scene in _FIRST for s in scene.shapes)


def test_shapes_stay_apart_and_inside():
    for scene in _FIRST:
        for i, a in enumerate(scene.shapes):
            assert a.radius < a.x + 0.06 < 1.12 - a.radius
            for b in scene.shapes[i + 1 :]:
                assert np.hypot(a.x - b.x, a.y - b.y) > 0.8 * (a.radius + b.radius)


def test_a_caption_says_what_is_there():
    scene = Scene(
        (
            Shape("star", "red", "large", 0.5, 0.27, 0.2),
            Shape("ring", "blue", "small", 0.5, 0.73, 0.1),
        ),
        "striped",
        "yellow",
        "{0} above {1} on {bg}",
        (0, 0, 0),
    )
    assert scene.caption() == (
        "a large red star above a small blue ring on a yellow striped background"
    )


def test_articles_agree_with_orange():
    assert all("a orange" not in scene.caption() for scene in _FIRST)


def test_the_middle_of_a_shape_has_its_colour_and_the_corner_the_background():
    for kind in KINDS:
        picture = render(_plain(kind), 64)
        assert picture.shape == (64, 64, 3)
        assert tuple(picture[0, 0]) == COLOURS["white"]
        middle = picture[32, 44] if kind == "ring" else picture[32, 32]
        expected = (
            COLOURS["white"]
            if kind == "ring" and tuple(middle) != COLOURS["red"]
            else (COLOURS["red"])
        )
        assert tuple(middle) == expected


def test_edges_are_anti_aliased():
    greens = np.unique(render(_plain("circle"), 128)[..., 1])
    assert len(greens) > 10


def test_a_larger_picture_shows_the_same_scene():
    for scene in _FIRST[:20]:
        small, large = render(scene, 64).astype(float), render(scene, 256).astype(float)
        averaged = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(averaged - small).mean() < 4


def test_queries_differ_from_the_truth_in_exactly_one_word_group():
    for scene in _FIRST[:50]:
        for query in attribute_queries(scene):
            true, *others = query.captions
            assert true == scene.caption()
            assert len(set(query.captions)) == len(query.captions) >= 4
            if query.attribute in ("kind", "colour"):
                for other in others:
                    changed = [
                        (a, b) for a, b in zip(true.split(), other.split(), strict=True) if a != b
                    ]
                    words = {pair for pair in changed if pair not in (("a", "an"), ("an", "a"))}
                    assert len(words) == 1


def test_the_shape_map_names_the_shape_at_its_centre():
    for scene in _FIRST[:50]:
        covered = shape_map(scene, 64)
        for position, shape in enumerate(scene.shapes):
            assert covered[int(shape.y * 64), int(shape.x * 64)] == position
