import io
import itertools
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from look import MIN_SHAPE_IOU, Sighting, largest_component, look, nearest_colour, oklab
from PIL import Image, ImageDraw, ImageFilter
from scenes import COLOURS, OFFSETS, PLACES, SHAPES, SIZE, SIZES, Request, Scene, draw, random_scene
from score import Tally, evaluation_requests, main, read_requests, score, tally

ATTRIBUTES = ("shape", "colour", "background", "size", "place")
Degrade = Callable[[Image.Image, np.random.Generator], Image.Image]


def add(picture: Image.Image, change: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.asarray(picture) + change, 0, 255).round().astype(np.uint8))


def as_drawn(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture


def blur(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(1.0, 1.5)))


def jpeg(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def noise(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return add(picture, rng.normal(0, 6, (SIZE, SIZE, 3)))


def tint(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return add(picture, rng.choice([-12, 12], 3))


def blotches(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Clouds of some 20 pixels, up to about 15 levels."""
    clouds = [Image.fromarray(rng.normal(0, 5, (6, 6)).astype(np.float32)).resize((SIZE, SIZE), 3) for _ in range(3)]
    return add(picture, np.stack([np.asarray(cloud) for cloud in clouds], -1))


def wobble(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Outlines off by up to about 1.5 pixels."""
    waves = [
        np.asarray(Image.fromarray(rng.normal(0, 0.6, (12, 12)).astype(np.float32)).resize((SIZE, SIZE), 3))
        for _ in "xy"
    ]
    row, column = np.mgrid[:SIZE, :SIZE]
    row = np.clip((row + waves[0]).round(), 0, SIZE - 1).astype(int)
    column = np.clip((column + waves[1]).round(), 0, SIZE - 1).astype(int)
    return Image.fromarray(np.asarray(picture)[row, column])


def all_at_once(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    for step in (blur, tint, blotches, noise, jpeg):
        picture = step(picture, rng)
    return picture


def seen_as_drawn(count: int, degrade: Degrade, seed: int) -> dict[str, np.ndarray]:
    """Which attributes of degraded drawings were seen right, (count,) for each."""
    rng = np.random.default_rng(seed)
    right = np.empty((count, len(ATTRIBUTES)), bool)
    for row in right:
        scene = random_scene(rng)
        sighting = look(degrade(draw(scene, rng), rng))
        row[:] = [getattr(scene, name) == getattr(sighting, name) for name in ATTRIBUTES]
    return dict(zip(ATTRIBUTES, right.T, strict=True))


def test_every_form_is_seen_as_drawn() -> None:
    names = list(COLOURS)
    for number, (shape, size, place) in enumerate(itertools.product(SHAPES, SIZES, PLACES)):
        scene = Scene(shape, names[number % 8], names[(number + 1 + number // 8 % 7) % 8], size, place)
        sighting = look(draw(scene))
        assert Scene(*(getattr(sighting, field.name) for field in fields(Scene))) == scene
        column, row = PLACES[place]
        assert sighting.radius == pytest.approx(SIZES[size], rel=0.04)
        expected = (SIZE / 2 + column * OFFSETS[size], SIZE / 2 + row * OFFSETS[size])
        assert sighting.centre == pytest.approx(expected, abs=1.0)
        assert sighting.shape_iou > 0.92
        assert sighting.shape_margin > 0.1
        assert sighting.stray == 0


def test_every_pair_of_colours_is_seen_as_drawn() -> None:
    for colour, background in itertools.permutations(COLOURS, 2):
        sighting = look(draw(Scene("star", colour, background, "small", "left")))
        assert (sighting.colour, sighting.background, sighting.shape) == (colour, background, "star")


def test_drawings_as_in_training_are_all_seen_right() -> None:
    right = seen_as_drawn(2000, as_drawn, seed=1)
    assert {name: int(values.sum()) for name, values in right.items()} == dict.fromkeys(ATTRIBUTES, 2000)


@pytest.mark.parametrize("degrade", [blur, jpeg, noise, tint, blotches, wobble, all_at_once])
def test_degraded_drawings_are_seen_right(degrade: Degrade) -> None:
    right = seen_as_drawn(300, degrade, seed=2)
    content = right["colour"] & right["background"] & right["shape"]
    assert content.mean() >= 0.99
    assert (right["size"] & right["place"]).mean() >= 0.97


@pytest.mark.parametrize("size", [64, 96, 200, 256, 512])
def test_other_sizes_are_scaled(size: int) -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        scene = random_scene(rng)
        sighting = look(draw(scene, rng, size=size))
        assert [getattr(sighting, name) for name in ATTRIBUTES] == [getattr(scene, name) for name in ATTRIBUTES]


@pytest.mark.parametrize("background", COLOURS)
@pytest.mark.parametrize("degrade", [as_drawn, all_at_once])
def test_a_blank_picture_shows_nothing(background: str, degrade: Degrade) -> None:
    picture = degrade(Image.new("RGB", (SIZE, SIZE), COLOURS[background]), np.random.default_rng(4))
    sighting = look(picture)
    assert replace(sighting, background_share=0.0) == Sighting(None, None, background, None, None)
    assert str(sighting) == f"nothing on a {background} background"


def test_specks_are_ignored() -> None:
    scene = Scene("triangle", "green", "white", "medium", "right")
    picture = draw(scene)
    pen = ImageDraw.Draw(picture)
    for x, y in ((10, 12), (30, 100), (20, 60)):
        pen.ellipse((x, y, x + 4, y + 4), fill=COLOURS["black"])
    sighting = look(picture)
    assert [getattr(sighting, name) for name in ATTRIBUTES] == [getattr(scene, name) for name in ATTRIBUTES]


@pytest.mark.parametrize("second", ["yellow", "red"])
@pytest.mark.parametrize(("first_size", "second_size"), list(itertools.product(SIZES, ["small", "medium"])))
def test_two_objects_are_no_clear_shape(second: str, first_size: str, second_size: str) -> None:
    one = draw(Scene("circle", "yellow", "blue", first_size, "top left"))
    two = draw(Scene("square", second, "blue", second_size, "bottom right"))
    background = np.array(COLOURS["blue"])
    pixels = np.where((np.asarray(two) != background).any(-1, keepdims=True), np.asarray(two), np.asarray(one))
    sighting = look(pixels)
    assert sighting.shape is None
    assert sighting.stray > 0.05
    assert sighting.shape_iou < look(one).shape_iou - 0.05
    request = Request("", shape="circle", colour=None, background=None, size=None, place=None)
    assert tally([request], [sighting]).shape == Tally(0, 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("half", ["left", "right", "top", "bottom"])
def test_half_a_shape_is_no_clear_shape(shape: str, half: str) -> None:
    if (shape, half) == ("triangle", "top"):
        pytest.skip("the upper half of a triangle is a triangle")
    pixels = np.array(draw(Scene(shape, "orange", "black", "medium", "center")))
    middle = SIZE // 2
    hidden = {
        "left": pixels[:, middle:],
        "right": pixels[:, :middle],
        "top": pixels[middle:],
        "bottom": pixels[:middle],
    }
    hidden[half][:] = COLOURS["black"]
    sighting = look(pixels)
    assert sighting.shape is None
    assert 0.3 < sighting.shape_iou < min(MIN_SHAPE_IOU.values())
    assert sighting.colour == "orange"


@pytest.mark.parametrize("corners", [4, 3], ids=["diamond", "triangle upside down"])
def test_other_shapes_are_no_clear_shape(corners: int) -> None:
    picture = Image.new("RGB", (512, 512), COLOURS["white"])
    ImageDraw.Draw(picture).regular_polygon((256, 256, 110), corners, rotation=180 // corners, fill=COLOURS["purple"])
    sighting = look(picture)
    assert sighting.shape is None
    assert sighting.colour == "purple"


def test_two_coloured_things_have_no_clear_colour() -> None:
    pixels = np.array(draw(Scene("square", "red", "blue", "large", "center")))
    red = (pixels == COLOURS["red"]).all(-1)
    red[: SIZE // 2] = False
    pixels[red] = COLOURS["yellow"]
    sighting = look(pixels)
    assert sighting.colour is None
    assert sighting.colour_share < 0.7


def test_a_half_of_another_colour_is_not_taken_for_background() -> None:
    pixels = np.array(draw(Scene("square", "red", "blue", "medium", "center")))
    blue = (pixels == COLOURS["blue"]).all(-1)
    blue[:, : SIZE // 2] = False
    pixels[blue] = COLOURS["green"]
    assert look(pixels).shape is None


def test_noise_shows_nothing_clear() -> None:
    sighting = look(np.random.default_rng(8).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    assert (sighting.shape, sighting.colour, sighting.background) == (None, None, None)


@st.composite
def pixel_arrays(draw_: st.DrawFn) -> np.ndarray:
    """Squares of 16 to 256: blocks of few colours, noise over them, or noise alone."""
    size = draw_(st.integers(16, 256))
    blocks = draw_(
        hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=8).map(lambda sides: (*sides, 3)))
    )
    repeats = (-(-size // blocks.shape[0]), -(-size // blocks.shape[1]), 1)
    pixels = np.kron(blocks, np.ones(repeats, np.uint8))[:size, :size].astype(float)
    strength = draw_(st.sampled_from([0, 0, 8, 60, 400]))
    pixels = pixels + np.random.default_rng(draw_(st.integers(0, 2**32))).normal(0, 1, pixels.shape) * strength
    levels: np.ndarray = np.clip(pixels, 0, 255).astype(np.uint8)
    return levels


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pixel_arrays())
def test_any_square_picture_can_be_looked_at(pixels: np.ndarray) -> None:
    sighting = look(pixels)
    assert 0 <= sighting.shape_iou <= 1.00001
    assert sighting.shape is None or sighting.shape_iou >= MIN_SHAPE_IOU[sighting.shape]
    assert (sighting.radius is None) == (sighting.size is None) == (sighting.place is None)
    assert look(Image.fromarray(pixels)) == sighting
    str(sighting)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((64, 32, 3), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 3)),
        np.zeros((64, 64, 4), np.uint8),
    ],
)
def test_other_arrays_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image: expected"):
        look(pixels)


def test_looking_is_quick() -> None:
    """7 to 17 ms on a shared machine; templates drawn anew for each picture, say, would take many times as long."""
    rng = np.random.default_rng(5)
    pictures = [all_at_once(draw(random_scene(rng), rng), rng) for _ in range(20)]
    best = np.full(len(pictures), np.inf)
    for _ in range(4):
        for index, picture in enumerate(pictures):
            start = time.process_time()  # not the clock: other work may be running
            look(picture)
            best[index] = min(best[index], time.process_time() - start)
    assert best.mean() < 0.06


def test_oklab_has_the_published_values() -> None:
    primaries = np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0]], np.uint8)
    # CSS Color 4's conversions of white, red, lime, blue and black.
    expected = [
        [1.0, 0.0, 0.0],
        [0.62796, 0.22486, 0.12585],
        [0.86644, -0.23389, 0.17950],
        [0.45201, -0.03246, -0.31153],
        [0.0, 0.0, 0.0],
    ]
    np.testing.assert_allclose(oklab(primaries), expected, atol=2e-4)


def test_colours_keep_their_name_when_off_by_20_levels() -> None:
    change = np.array(list(itertools.product((-20, 0, 20), repeat=3)))
    for index, levels in enumerate(COLOURS.values()):
        assert (nearest_colour(np.clip(change + levels, 0, 255).astype(np.uint8)) == index).all()


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_largest_component_is_that_of_a_flood_fill(mask: np.ndarray) -> None:
    found = largest_component(mask)
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    components = []
    while left:
        component, queue = set(), [left.pop()]
        while queue:
            row, column = queue.pop()
            component.add((row, column))
            beside = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= beside
            queue += beside
        components.append(component)
    chosen = {(int(row), int(column)) for row, column in np.argwhere(found)}
    assert len(chosen) == max(map(len, components), default=0)
    assert chosen in (components or [set()])


@pytest.mark.parametrize(("right", "total"), [(0, 10), (8, 10), (10, 10), (490, 500)])
def test_interval_is_where_the_normal_test_just_accepts(right: int, total: int) -> None:
    share, z = right / total, 1.959964
    low, high = Tally(right, total).interval()
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for bound in (low, high):
        assert (share - bound) ** 2 == pytest.approx(z**2 * bound * (1 - bound) / total, abs=1e-9)


def test_interval_has_the_published_value() -> None:
    assert Tally(8, 10).interval() == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert Tally(0, 0).interval() == (0.0, 1.0)
    assert math.isnan(Tally(0, 0).accuracy)


def test_score_counts_only_what_is_stated() -> None:
    right = Sighting("circle", "red", "blue", "small", "top", shape_iou=0.95)
    requests = [
        Request("all", "circle", "red", "blue", "small", "top"),
        Request("wrong shape", "star", "red", "blue", None, None),
        Request("wrong place", "circle", "red", "blue", "small", "left"),
        Request("colour only", None, "red", None, None, None),
        Request("nothing", None, None, None, None, None),
        Request("nothing seen", "circle", "red", "blue", "small", None),
    ]
    blank = Sighting(None, None, "blue", None, None)
    result = tally(requests, [right] * 5 + [blank])
    assert result.shape == Tally(2, 4)
    assert result.colour == Tally(4, 5)
    assert result.background == Tally(4, 4)
    assert result.size == Tally(2, 3)
    assert result.place == Tally(1, 2)
    assert result.content == Tally(3, 5)
    assert result.layout == Tally(1, 3)


def test_score_of_drawn_requests_is_full_and_of_shuffled_ones_is_not() -> None:
    rng = np.random.default_rng(6)
    scenes = [random_scene(rng) for _ in range(40)]
    requests = [Request("", scene.shape, scene.colour, scene.background, scene.size, scene.place) for scene in scenes]
    pictures = [draw(scene, rng) for scene in scenes]
    result = score(requests, pictures)
    assert {getattr(result, field.name) for field in fields(result)} == {Tally(40, 40)}
    shuffled = score(requests, [np.asarray(picture) for picture in pictures[1:] + pictures[:1]])
    assert shuffled.content.right <= 2
    assert 0 < shuffled.size.right < 30


def test_score_wants_one_picture_per_request() -> None:
    with pytest.raises(ValueError, match="expected one per request, got 0 for 1"):
        score([Request("", None, None, None, None, None)], [])


def test_evaluation_requests_state_the_content_and_differ() -> None:
    requests = evaluation_requests(500, seed=3)
    assert len(requests) == len({request.prompt for request in requests}) == 500
    for request in requests:
        assert None not in (request.colour, request.background, request.shape)
    for name in ("size", "place"):
        assert 0.15 < np.mean([getattr(request, name) is None for request in requests]) < 0.35
    assert requests == evaluation_requests(500, seed=3)
    assert evaluation_requests(20, seed=3) == requests[:20]
    assert {request.prompt for request in evaluation_requests(20, seed=4)} != {r.prompt for r in requests[:20]}
    assert evaluation_requests(0) == []
    with pytest.raises(ValueError, match="expected 0 or more, got -1, 0"):
        evaluation_requests(-1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw(Scene("circle", "red", "blue", "small", "top left")).save(tmp_path / "0000.png")
    draw(Scene("star", "white", "green", "large", "center")).save(tmp_path / "0001.png")
    requests = [
        {"prompt": "a red circle on blue", "shape": "circle", "colour": "red", "background": "blue"},
        {"prompt": "a small star", "shape": "star", "colour": None, "size": "small"},
    ]
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    return tmp_path


def test_command_says_what_it_sees(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "0001.png"), str(folder / "0000.png")]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "0001.png: large white star, green background, center (shape IoU 0.9" in first
    assert "0000.png: small red circle, blue background, top left (shape IoU 0.9" in second


def test_command_prints_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert [entry["shape"] for entry in seen] == ["circle", "star"]
    assert main([str(folder), "--json", "--requests", str(folder / "requests.json")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["pictures"] == seen
    assert printed["score"]["content"]["right"] == printed["score"]["content"]["total"] == 2
    assert printed["score"]["size"]["right"] == 0
    assert printed["score"]["place"] == {"right": 0, "total": 0, "accuracy": None, "interval": [0.0, 1.0]}


def test_command_scores_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--requests", str(folder / "requests.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["colour", "100.0%", "1/1"]
    assert [line.split()[0] for line in lines] == [
        "colour",
        "background",
        "shape",
        "place",
        "size",
        "content",
        "layout",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("{}", "expected a list of objects"),
        ('[{"colour": "pink"}]', "entry 0, colour: expected one of red, .* got 'pink'"),
        ('[{"color": "red"}]', "entry 0, color: expected prompt, shape"),
        ('[{"shape": ["star"]}]', "entry 0, shape: expected one of circle"),
        ("[]", "expected one per request, got 2 for 0"),
    ],
)
def test_command_refuses_bad_requests(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (folder / "requests.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), "--requests", str(folder / "requests.json")])
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_command_refuses_what_is_no_picture(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "empty").mkdir()
    (folder / "text.png").write_text("no picture")
    Image.new("RGB", (64, 32)).save(folder / "wide.png")
    for name, message in {
        "empty": "expected a folder with PNG files",
        "text.png": "cannot identify image file",
        "absent.png": "No such file",
        "wide.png": "wide.png: image: expected a square picture, got 64x32",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            main([str(folder / name)])
        assert message in capsys.readouterr().err


def test_requests_are_read_back(tmp_path: Path) -> None:
    requests = evaluation_requests(5)
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([vars(request) for request in requests]))
    assert read_requests(path) == requests
