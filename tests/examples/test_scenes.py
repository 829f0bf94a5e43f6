import itertools
import re
from collections import Counter

import numpy as np
import pytest
from scenes import (
    COLOURS,
    PLACES,
    SHAPE_WORDS,
    SHAPES,
    SIZE,
    SIZE_WORDS,
    SIZES,
    Request,
    Scene,
    draw,
    outline,
    random_prompt,
    random_scene,
)

EVERY_FORM = list(itertools.product(SHAPES, SIZES, PLACES))


def frame_ink(picture: np.ndarray, background: np.ndarray) -> list[int]:
    """How many pixels of each edge of the picture are not background."""
    other = (picture != background).any(-1)
    return [int(edge.sum()) for edge in (other[0], other[-1], other[:, 0], other[:, -1])]


def parse(prompt: str) -> Request:
    """Read a prompt back: an independent statement of what its words mean."""
    words = re.findall(r"[a-z-]+", prompt)
    shape_of = {word: shape for shape, names in SHAPE_WORDS.items() for word in names}
    size_of = {word: size for size, names in SIZE_WORDS.items() for word in names}
    nouns = [word for word in (*shape_of, "shape") if re.search(rf"\b{word}\b", prompt)]
    assert len(nouns) == 1, prompt
    before = prompt[: re.search(rf"\b{nouns[0]}\b", prompt).start()].split()  # type: ignore[union-attr]
    colour = before[-1] if before and before[-1] in COLOURS else None
    others = Counter(word for word in words if word in COLOURS) - Counter([colour] if colour else [])
    assert sum(others.values()) <= 1, prompt
    sizes = [word for word in words if word in size_of]
    assert len(sizes) <= 1, prompt
    row = [word for word in words if word in ("top", "bottom")]
    column = [word for word in words if word in ("left", "right")]
    middle = [word for word in words if word in ("center", "centre", "middle")]
    assert max(len(row), len(column), len(middle)) <= 1, prompt
    assert not (middle and (row or column)), prompt
    place = "center" if middle else " ".join(row + column)
    return Request(
        prompt=prompt,
        shape=shape_of.get(nouns[0]),
        colour=colour,
        background=next(iter(others), None),
        size=size_of[sizes[0]] if sizes else None,
        place=place or None,
    )


@pytest.mark.parametrize(("shape", "size", "place"), EVERY_FORM)
def test_every_shape_stays_inside_the_picture(shape: str, size: str, place: str) -> None:
    picture = np.asarray(draw(Scene(shape, "red", "blue", size, place), size=4 * SIZE))
    assert frame_ink(picture, np.array(COLOURS["blue"])) == [0, 0, 0, 0]


@pytest.mark.parametrize(("shape", "size", "place"), EVERY_FORM)
def test_jitter_costs_only_large_shapes_a_sliver_at_the_frame(shape: str, size: str, place: str) -> None:
    for seed in range(4):
        picture = np.asarray(draw(Scene(shape, "red", "blue", size, place), np.random.default_rng(seed)))
        background = np.median(picture.reshape(-1, 3)[[0, SIZE - 1, -SIZE, -1]], axis=0)
        # A large ring's rim passes the frame by up to 1.3 pixels, a chord of 21.
        assert max(frame_ink(picture, background)) <= (21 + 4 if size == "large" else 0)


@pytest.mark.parametrize("shape", ["square", "triangle", "star", "cross"])
def test_drawn_area_is_the_outline_s(shape: str) -> None:
    corners = np.array(outline(shape, SIZES["large"]))
    following = np.roll(corners, -1, axis=0)
    shoelace = abs(np.sum(corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0])) / 2
    picture = np.asarray(draw(Scene(shape, "white", "black", "large", "center")).convert("L"), float)
    area = ((picture - picture.min()) / (picture.max() - picture.min())).sum()
    assert area == pytest.approx(shoelace, rel=0.02)  # Pillow's polygons include their border of 1/4 pixel


def test_outline_names_the_shapes_it_knows() -> None:
    with pytest.raises(ValueError, match="square, triangle, star, cross, got 'circle'"):
        outline("circle", 10.0)


@pytest.mark.parametrize("size", [32, 64, 256])
def test_other_sizes_show_the_same_picture(size: int) -> None:
    scene = Scene("star", "yellow", "purple", "medium", "top left")
    factor = max(size, SIZE) // min(size, SIZE)
    small, large = sorted((draw(scene, size=size), draw(scene)), key=lambda picture: picture.width)
    assert small.size == (min(size, SIZE),) * 2
    difference = np.abs(np.asarray(large.reduce(factor), float) - np.asarray(small, float))
    assert difference.mean() < 1.0


def test_scenes_and_pictures_are_functions_of_the_seed() -> None:
    def everything(seed: int) -> list[tuple[Scene, Request, bytes]]:
        rng = np.random.default_rng(seed)
        found = []
        for _ in range(20):
            scene = random_scene(rng)
            found.append((scene, random_prompt(scene, rng), draw(scene, rng).tobytes()))
        return found

    assert everything(7) == everything(7)
    assert everything(7) != everything(8)


def test_scenes_are_drawn_uniformly_and_never_tone_on_tone() -> None:
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(4800)]
    assert all(scene.colour != scene.background for scene in scenes)
    for name, values in {
        "shape": SHAPES,
        "colour": COLOURS,
        "background": COLOURS,
        "size": SIZES,
        "place": PLACES,
    }.items():
        counts = Counter(getattr(scene, name) for scene in scenes)
        expected = len(scenes) / len(values)
        assert set(counts) == set(values)
        # Five standard deviations of a binomial count.
        assert max(abs(count - expected) for count in counts.values()) < 5 * np.sqrt(expected)


@pytest.mark.parametrize("omit", [0.0, 0.25, 1.0])
def test_a_prompt_says_what_its_request_states_and_nothing_else(omit: float) -> None:
    rng = np.random.default_rng(11)
    for _ in range(2000):
        scene = random_scene(rng)
        request = random_prompt(scene, rng, omit=omit)
        assert parse(request.prompt) == request
        stated = {name: getattr(request, name) for name in Scene.__dataclass_fields__}
        assert all(value in (None, getattr(scene, name)) for name, value in stated.items())
        if omit == 0:
            assert None not in stated.values()
        if omit == 1:
            assert request.size is None
            assert request.place is None


def test_attributes_are_left_out_as_often_as_asked() -> None:
    rng = np.random.default_rng(12)
    requests = [random_prompt(random_scene(rng), rng, omit=0.3) for _ in range(4000)]
    for name, expected in {"size": 0.3, "place": 0.3, "colour": 0.1, "background": 0.1, "shape": 0.1}.items():
        share = np.mean([getattr(request, name) is None for request in requests])
        assert share == pytest.approx(expected, abs=0.03)
