"""Residency policies: who is open when, and that the pictures do not depend on it."""

from __future__ import annotations

import json
import shutil
import threading
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from latentrt.runtime import Hires, Pipeline, Result, component_opening, residency
from latentrt.runtime.backends import open_session
from latentrt.runtime.bundle import open_bundle
from latentrt.runtime.cli import main
from latentrt.runtime.components import Components
from latentrt.runtime.errors import ArtifactError, BackendError, UsageError
from latentrt.runtime.machine import Gpu, Machine
from latentrt.runtime.residency import SwappedSession, choose_residency, held, weight_bytes
from latentrt.runtime.specs import Array, ModelSpec, Session

PROMPT = "a small red circle on a blue background"


class Counted:
    """What is open, by name: every opening, and the most at a time."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.now: list[str] = []
        self.most = 0
        self._lock = threading.Lock()

    def watch(self, name: str, session: Session) -> Session:
        """Note an opening, and the closing to come."""
        with self._lock:
            self.opened.append(name)
            self.now.append(name)
            self.most = max(self.most, len(self.now))
        plain = session.close

        def close() -> None:
            with self._lock:
                self.now.remove(name)
            plain()

        session.close = close  # type: ignore[method-assign]
        return session


class Network:
    """A network that answers with its input, until it is closed."""

    backend = "fake"
    spec = ModelSpec("net", (), ())

    def __init__(self) -> None:
        self.is_closed = False

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        assert not self.is_closed
        return dict(feeds)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Of the sessions of all components."""
    count = Counted()

    def opened(bundle: Any, component: str, precision: str, **options: Any) -> Session:
        return count.watch(component, open_session(bundle, component, precision, **options))

    monkeypatch.setattr(component_opening, "open_session", opened)
    return count


@pytest.fixture
def swapped() -> Iterator[tuple[SwappedSession, Counted]]:
    count = Counted()
    yield SwappedSession("net", lambda: count.watch("net", Network())), count
    assert not count.now


def test_it_opens_when_it_runs_and_goes_with_the_last_that_holds_it(swapped: tuple[SwappedSession, Counted]) -> None:
    session, count = swapped
    with held(session):
        assert not session.is_open
        session({})
        with held(session, session):
            session({})
        assert session.is_open
    assert not session.is_open
    assert count.opened == ["net"]
    session({})
    assert not session.is_open, "outside a stage it is there for the call"
    assert count.opened == ["net", "net"]


def test_what_it_is_remains_known(swapped: tuple[SwappedSession, Counted]) -> None:
    session, count = swapped
    assert session.spec.name == "net"
    assert session.backend == "fake"
    assert count.opened == ["net"]
    assert not session.is_open


def test_it_goes_when_its_stage_fails(swapped: tuple[SwappedSession, Counted]) -> None:
    session, _ = swapped

    def stage() -> None:
        with held(session):
            session({})
            raise RuntimeError("stage")

    with pytest.raises(RuntimeError, match="stage"):
        stage()
    assert not session.is_open


def test_an_opening_that_failed_is_tried_again() -> None:
    attempts: list[int] = []

    def opens() -> Session:
        attempts.append(1)
        if len(attempts) == 1:
            raise ArtifactError("damaged")
        return Network()

    session = SwappedSession("net", opens)
    with pytest.raises(ArtifactError, match="damaged"):
        session({})
    assert session({"x": np.zeros(1)})["x"] == 0


def test_nobody_loses_it_to_another_request(swapped: tuple[SwappedSession, Counted]) -> None:
    """`Network` refuses to run closed."""
    session, _ = swapped

    def request(_: int) -> None:
        for _ in range(50):
            with held(session):
                session({})
                session({})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(request, range(4)))


def test_closed_for_good(swapped: tuple[SwappedSession, Counted]) -> None:
    session, _ = swapped
    with held(session):
        session({})
        session.close()
        with pytest.raises(BackendError, match="net: expected an open session, got one that was closed"):
            session({})


REQUESTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": PROMPT, "negative_prompt": "green"},
    "batch": {"prompt": [PROMPT, "a large [green:yellow:0.5] square"], "batch": 2},
    "unguided": {"prompt": PROMPT, "guidance": 1.0},
    "image": {"prompt": PROMPT, "image": np.full((64, 64, 3), 128, np.uint8), "strength": 0.6},
    "hires": {"prompt": PROMPT, "hires": Hires(scale=1.5, steps=2)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of a megabyte, whose networks open in no time."""
    path = tmp_path_factory.mktemp("tiny") / "sd"
    with zipfile.ZipFile(Path(__file__).parents[1] / "fixtures" / "optimum" / "sd.zip") as archive:
        archive.extractall(path)
    return path


@pytest.fixture(scope="module")
def resident(folder: Path) -> dict[str, Result]:
    """What is drawn when all networks stay."""
    pipe = Pipeline.load(folder, backend="onnxruntime")
    return {name: pipe(**settings(name)) for name in REQUESTS}


def settings(name: str) -> dict[str, Any]:
    return {"steps": 3, "seed": 5, "width": 64, "height": 64, **REQUESTS[name]}


@pytest.mark.parametrize("name", REQUESTS)
def test_swapped_networks_draw_the_same_one_at_a_time(
    folder: Path, resident: dict[str, Result], counted: Counted, name: str
) -> None:
    with Pipeline.load(folder, backend="onnxruntime", residency="swap") as pipe:
        assert counted.opened == [], "not even when the bundle is opened"
        found = pipe(**settings(name))
        assert_array_equal(found.latents, resident[name].latents)
        assert_array_equal(found.images, resident[name].images)
        assert counted.most == 1
        assert not counted.now
        # A stage opens its network once, whatever the number of steps and pictures; a second pass has one more.
        times = {part: counted.opened.count(part) for part in counted.opened}
        assert times.pop("unet") == (2 if name == "hires" else 1)
        assert set(times.values()) == {1}
    assert pipe.backend == "onnxruntime CPU"


def test_the_trained_checkpoint_too(shapes_bundle: Path, counted: Counted) -> None:
    request: dict[str, Any] = {"prompt": PROMPT, "steps": 2, "seed": 3}
    with Pipeline.load(shapes_bundle, backend="onnxruntime") as pipe:
        wanted = pipe(**request)
    assert counted.most == 3
    counted.most = 0
    found = Pipeline.load(shapes_bundle, backend="onnxruntime", residency="swap")(**request)
    assert_array_equal(found.images, wanted.images)
    assert counted.most == 1


def test_all_opens_each_network_once(folder: Path, counted: Counted) -> None:
    with Pipeline.load(folder, backend="onnxruntime") as pipe:
        for seed in range(2):
            pipe(PROMPT, steps=1, seed=seed, width=64, height=64)
        assert len(counted.opened) == len(set(counted.opened)) == counted.most == len(counted.now)
    assert not counted.now
    with pytest.raises(BackendError, match="expected an open session, got one that was closed"):
        pipe(PROMPT, steps=1)


def test_a_run_that_is_cancelled_leaves_nothing_open(folder: Path, counted: Counted) -> None:
    pipe = Pipeline.load(folder, backend="onnxruntime", residency="swap")
    run = pipe.stream(PROMPT, steps=4, width=64, height=64)
    next(run)
    assert counted.now == ["unet"]
    run.close()
    assert not counted.now


def test_requests_in_flight_do_not_take_networks_from_each_other(
    folder: Path, resident: dict[str, Result], counted: Counted
) -> None:
    pipe = Pipeline.load(folder, backend="onnxruntime", residency="swap")
    names = ["text", "unguided", "image", "text"]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: pipe(**settings(name)), names))
    for name, result in zip(names, found, strict=True):
        assert_array_equal(result.latents, resident[name].latents)
    assert not counted.now


def test_a_damaged_file_is_named_before_anything_is_drawn(shapes_bundle: Path, tmp_path: Path) -> None:
    """Though it would be read only after the last step."""
    bundle = Path(shutil.copytree(shapes_bundle, tmp_path / "shapes.bundle"))
    with (bundle / "vae_decoder" / "model.onnx").open("r+b") as file:
        file.seek(-64, 2)
        file.write(b"\0" * 64)
    with pytest.raises(ArtifactError, match=r"vae_decoder.model\.onnx"):
        Pipeline.load(bundle, precision="fp32", backend="onnxruntime", residency="swap")


def test_policies_that_cannot_be_are_refused(shapes_bundle: Path) -> None:
    with pytest.raises(UsageError, match="residency: expected one of all, swap, stream, auto, got 'some'"):
        Components.open(shapes_bundle, None, backend="onnxruntime", verify=False, residency="some")
    with pytest.raises(UsageError, match=r"residency stream: expected --backend tensorrt, got onnxruntime.*swap"):
        Components.open(shapes_bundle, None, backend="onnxruntime", verify=False, residency="stream")


@pytest.mark.parametrize(("share", "policy"), [(1.4, "swap"), (1.6, "all")])
def test_auto_swaps_where_a_gpu_is_too_small(
    shapes_bundle: Path, monkeypatch: pytest.MonkeyPatch, share: float, policy: str
) -> None:
    bundle = open_bundle(shapes_bundle)
    weights = weight_bytes(bundle, "fp32")
    assert weights == sum(
        file.stat().st_size
        for name in ("text_encoder", "unet", "vae_decoder")
        for file in (shapes_bundle / name).glob("model.onnx*")
    )
    gpu = Gpu("small", "sm89", int(weights * share))
    monkeypatch.setattr(residency, "probe_machine", lambda: Machine(gpus=(gpu,)))
    monkeypatch.setattr(residency, "provider_of", lambda backend: {"cuda": "cuda"}.get(backend, "cpu"))
    assert choose_residency("auto", bundle, "fp32", backend="cuda") == policy
    assert choose_residency("auto", bundle, "fp32", backend="onnxruntime") == "all"
    monkeypatch.setattr(residency, "probe_machine", lambda: Machine(why_no_gpu="none"))
    assert choose_residency("auto", bundle, "fp32", backend="tensorrt") == "all"


def test_the_command_says_what_it_did(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(folder), PROMPT, "-o", str(tmp_path / "out.png"), "--steps", "1"]
    assert main([*words, "--width", "64", "--height", "64", "--residency", "swap", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["residency"] == "swap"
    assert report["vram"].keys() == {"peak_bytes", "of", "reason"}
    assert (report["vram"]["peak_bytes"] is None) == isinstance(report["vram"]["reason"], str)
    assert main([*words, "--residency", "stream", "--backend", "onnxruntime"]) == 2
