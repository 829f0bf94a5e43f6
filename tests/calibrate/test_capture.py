from __future__ import annotations

import dataclasses
import errno
import itertools
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linked_bundles import edit_graph, linked
from numpy.typing import NDArray

from latentrt.calibrate import capture as module
from latentrt.calibrate.calls import Call
from latentrt.calibrate.capture import CaptureOptions, capture, capture_inputs, stratified
from latentrt.calibrate.capture_file import CAPTURE, Capture, open_capture
from latentrt.calibrate.source import Source, open_source
from latentrt.export.networks import libraries_quiet
from latentrt.runtime import Pipeline
from latentrt.runtime.errors import ArtifactError, CalibrationError, UsageError
from latentrt.runtime.manifest import write_atomic
from latentrt.runtime.model_facts import read_facts

PROMPTS = ("a small red circle on a blue background", "a green star", "a big white square over black")
OPTIONS = CaptureOptions(prompts=PROMPTS, steps=4, timesteps=3, sampler="ddim", seed=7)


@pytest.fixture(scope="module")
def source(shapes_bundle: Path) -> Source:
    return open_source(shapes_bundle)


@pytest.fixture(scope="module")
def finished(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """Shared: its folder must not be changed."""
    return capture(source, OPTIONS, tmp_path_factory.mktemp("capture") / "finished")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def floats(call: Call, name: str) -> NDArray[np.float32]:
    return call.feeds[name].astype(np.float32)


def diffusers_calls(pipe: Any, **settings: Any) -> list[dict[str, Any]]:
    """What diffusers' pipeline gives its U-Net."""
    calls: list[dict[str, Any]] = []

    def look(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        sample, timestep = args
        rows = len(sample)
        call = {
            "sample": sample,
            "timestep": timestep.expand(rows),
            "encoder_hidden_states": given["encoder_hidden_states"],
        }
        calls.append(
            {
                name: value.detach().float().numpy()
                for name, value in {**call, **(given["added_cond_kwargs"] or {})}.items()
            }
        )

    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        pipe(output_type="latent", **settings)
    finally:
        hook.remove()
    return calls


def assert_same_calls(ours: list[Call], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for call, other in zip(ours, theirs, strict=True):
        assert call.feeds.keys() == other.keys()
        assert call.timestep == other["timestep"][0]
        for name, values in other.items():
            np.testing.assert_allclose(floats(call, name), values, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "calls"), [("ddim", "DDIMScheduler", 5), ("heun", "HeunDiscreteScheduler", 9)]
)
def test_calls_are_those_of_diffusers(
    sampler: str, scheduler: str, calls: int, source: Source, shapes_checkpoint: Path, tmp_path: Path
) -> None:
    options = CaptureOptions(
        prompts=PROMPTS[:2], steps=5, timesteps=50, sampler=sampler, guidance=3.5, negative_prompt="a star", seed=11
    )
    captured = capture(source, options, tmp_path)
    with libraries_quiet():
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(shapes_checkpoint, safety_checker=None).to(
            torch.float32
        )
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, clip_sample=False)
        pipe.set_progress_bar_config(disable=True)
        for index, prompt in enumerate(options.prompts):
            theirs = diffusers_calls(
                pipe,
                prompt=prompt,
                negative_prompt=options.negative_prompt,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                generator=torch.Generator().manual_seed(options.seed + index),
            )
            ours = [call for call in captured.calls() if call.prompt == index]
            assert len(ours) == calls
            assert {(call.rows, call.negatives, call.guidance) for call in ours} == {(2, 1, 3.5)}
            assert_same_calls(ours, theirs)


def test_calls_of_sdxl(
    family_bundle: Callable[[str], Path], family_sources: Callable[[str], Any], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"width": 32, "height": 16}
    options = CaptureOptions(prompts=("a red cat",), steps=2, sampler="ddim", **settings)
    captured = capture(open_source(family_bundle("sdxl_base")), options, tmp_path)
    with libraries_quiet():
        pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(family_sources("sdxl_base").path).to(torch.float32)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        theirs = diffusers_calls(
            pipe, prompt="a red cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **settings
        )
    assert {*theirs[0]} == {"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"}
    assert_same_calls(list(captured.calls()), theirs)


def test_without_guidance_there_is_one_row(source: Source, tmp_path: Path) -> None:
    captured = capture(source, dataclasses.replace(OPTIONS, prompts=PROMPTS[:1], guidance=1.0), tmp_path)
    assert {(call.rows, call.negatives) for call in captured.calls()} == {(1, 0)}


def test_some_calls_are_kept_of_every_prompt(finished: Capture, source: Source, tmp_path: Path) -> None:
    every = capture(source, dataclasses.replace(OPTIONS, timesteps=50), tmp_path)
    kept = list(finished.calls())
    assert Counter(call.prompt for call in kept) == {0: 3, 1: 3, 2: 3}
    assert (finished.count, finished.rows) == (9, 18)
    for index in range(3):
        all_calls = {call.timestep: call for call in every.calls() if call.prompt == index}
        own = [call for call in kept if call.prompt == index]
        times = [call.timestep for call in own]
        assert times == sorted(times, reverse=True)
        assert (times[0], times[-1]) == (max(all_calls), min(all_calls))
        for call in own:
            for name, values in call.feeds.items():
                np.testing.assert_array_equal(values, all_calls[call.timestep].feeds[name])


@given(count=st.integers(1, 200), wanted=st.integers(2, 60), seed=st.integers(0, 99))
def test_stratified(count: int, wanted: int, seed: int) -> None:
    positions = stratified(count, wanted, np.random.default_rng(seed))
    assert positions == sorted({*positions})
    assert len(positions) == min(count, wanted)
    assert (positions[0], positions[-1]) == (0, count - 1)
    # Between the ends, the gap that is left out is never longer than two parts.
    part = (count - 2) / max(wanted - 2, 1)
    assert max(np.diff(positions), default=0) <= 2 * part + 2 or wanted == 2


def test_all_positions_are_reached() -> None:
    drawn = Counter(p for seed in range(400) for p in stratified(20, 5, np.random.default_rng(seed))[1:-1])
    assert {*drawn} == {*range(1, 19)}
    assert max(drawn.values()) < 2 * min(drawn.values())


def test_an_interrupted_capture_goes_on(finished: Capture, source: Source, tmp_path: Path) -> None:
    def interrupt(message: str, share: float) -> None:
        assert (message, share) == ("captured prompt 1 of 3", 1 / 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(source, OPTIONS, tmp_path, on_progress=interrupt)
    with pytest.raises(ArtifactError, match=r"expected 3 captured prompts, got 1: .* goes on from there"):
        open_capture(tmp_path)
    lines: list[str] = []
    capture(source, OPTIONS, tmp_path, on_progress=lambda message, share: lines.append(message))
    assert lines == ["captured prompt 2 of 3", "captured prompt 3 of 3"]
    assert contents(tmp_path) == contents(finished.folder)
    assert open_capture(tmp_path, capture_inputs(source, OPTIONS)).key == finished.key


def test_a_finished_capture_is_not_drawn_again(finished: Capture, source: Source) -> None:
    before = contents(finished.folder)
    again = capture(source, OPTIONS, finished.folder, on_progress=lambda *_: pytest.fail("drawn again"))
    assert (again.key, again.files) == (finished.key, finished.files)
    assert contents(finished.folder) == before
    assert again.bytes == sum(len(data) for name, data in before.items() if name != CAPTURE)


@pytest.mark.parametrize("damage", ["byte", "cut", "missing"])
def test_a_damaged_file_is_named_and_drawn_again(
    damage: str, finished: Capture, source: Source, tmp_path: Path
) -> None:
    for name, data in contents(finished.folder).items():
        (tmp_path / name).write_bytes(data)
    file = tmp_path / "prompt-00001.safetensors"
    written = bytearray(file.read_bytes())
    written[-5] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(written if damage == "byte" else written[:-4])
    with pytest.raises(ArtifactError, match=r"prompt-00001\.safetensors: expected"):
        open_capture(tmp_path)
    with pytest.raises(ArtifactError, match=r"prompt-00001\.safetensors"):
        list(dataclasses.replace(finished, folder=tmp_path).calls())
    lines: list[str] = []
    capture(source, OPTIONS, tmp_path, on_progress=lambda message, share: lines.append(message))
    assert lines == ["captured prompt 2 of 3"]
    assert contents(tmp_path) == contents(finished.folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1, "inputs": {}, "files": [{"prompt": "../a"}]}'])
def test_a_damaged_list_is_named(text: str, source: Source, tmp_path: Path) -> None:
    (tmp_path / CAPTURE).write_text(text)
    said = r"capture\.json: expected the list of a capture"
    with pytest.raises(ArtifactError, match=said):
        open_capture(tmp_path)
    with pytest.raises(ArtifactError, match=said):
        capture(source, OPTIONS, tmp_path)


def test_no_capture_and_one_of_a_newer_version(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"found none\. Capture first"):
        open_capture(tmp_path)
    (tmp_path / CAPTURE).write_text('{"version": 99}')
    with pytest.raises(ArtifactError, match="newer latentrt"):
        open_capture(tmp_path)


def test_other_options_replace_a_capture(source: Source, tmp_path: Path) -> None:
    capture(source, OPTIONS, tmp_path)
    fewer = dataclasses.replace(OPTIONS, prompts=PROMPTS[:1], seed=8)
    with pytest.raises(CalibrationError, match=r"options\.prompts, options\.seed differ"):
        open_capture(tmp_path, capture_inputs(source, fewer))
    captured = capture(source, fewer, tmp_path)
    assert {*contents(tmp_path)} == {CAPTURE, "prompt-00000.safetensors"}
    assert open_capture(tmp_path).prompts == captured.prompts == PROMPTS[:1]


def test_a_bundle_whose_graph_changed_after_the_capture(finished: Capture, shapes_bundle: Path, tmp_path: Path) -> None:
    copy = linked(shapes_bundle, tmp_path / "changed.bundle")

    def note(model: onnx.ModelProto) -> None:
        model.metadata_props.add(key="note", value="changed")

    edit_graph(copy, note)
    with pytest.raises(CalibrationError, match=r"source\.graph\.unet/model\.onnx differ"):
        open_capture(finished.folder, capture_inputs(open_source(copy), OPTIONS))


def test_two_captures_at_once(finished: Capture, source: Source, tmp_path: Path) -> None:
    lines: list[str] = []
    threads = [
        threading.Thread(
            target=capture, args=(source, OPTIONS, tmp_path), kwargs={"on_progress": lambda line, _: lines.append(line)}
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines == [f"captured prompt {number} of 3" for number in (1, 2, 3)]
    assert contents(tmp_path) == contents(finished.folder)


def test_a_consumer_has_to_take_every_call(finished: Capture) -> None:
    for _ in range(2):
        with finished.consumed() as calls:
            assert sum(1 for _ in calls) == finished.count
    with pytest.raises(CalibrationError, match="expected all 9 captured calls to be consumed, got 4"):
        take(finished, 4)
    with pytest.raises(ZeroDivisionError):  # its own error is the one that is seen
        take(finished, 4, divisor=0)


def take(captured: Capture, count: int, *, divisor: int = 1) -> None:
    with captured.consumed() as calls:
        assert len(list(itertools.islice(calls, count))) / divisor


def test_a_row_is_stored_once(finished: Capture) -> None:
    # 3 latents (4, 16, 16) and 2 texts (77, 64), each once.
    floats = 3 * 4 * 16 * 16 + 2 * 77 * 64 + 3
    assert all(4 * floats < file.size < 4 * floats + 4096 for file in finished.files)


def test_prompts_of_several_chunks(source: Source, tmp_path: Path) -> None:
    long = ", ".join([PROMPTS[0]] * 12)
    captured = capture(source, dataclasses.replace(OPTIONS, prompts=(PROMPTS[1], long), steps=2), tmp_path)
    shapes = {call.prompt: call.feeds["encoder_hidden_states"].shape for call in captured.calls()}
    assert shapes == {0: (2, 77, 64), 1: (2, 154, 64)}
    (note,) = captured.notes
    assert note.startswith("1 of 2 prompts, the first of them number 2, take more than 75 tokens")


def test_latents_of_the_decoder(shapes_bundle: Path, tmp_path: Path) -> None:
    captured = capture(open_source(shapes_bundle, component="vae_decoder"), OPTIONS, tmp_path)
    calls = list(captured.calls())
    assert [(call.prompt, call.timestep, call.negatives) for call in calls] == [(0, 0.0, 0), (1, 0.0, 0), (2, 0.0, 0)]
    with Pipeline.load(shapes_bundle, precision="fp32", backend="onnxruntime") as pipe:
        for index, call in enumerate(calls):
            latents = pipe(PROMPTS[index], steps=4, sampler="ddim", seed=7 + index, decode=False).latents
            np.testing.assert_allclose(
                floats(call, "latent_sample"), latents / pipe.model.facts.scaling_factor, atol=1e-4
            )


def test_what_is_not_finite_is_named(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = module._Watch.__call__

    def damaged(self: Any, component: str, feeds: Any, answer: Any) -> None:
        if component == "unet" and len(self.feeds) == 2:
            answer = {name: np.full_like(values, np.nan) for name, values in answer.items()}
        watch(self, component, feeds, answer)

    monkeypatch.setattr(module._Watch, "__call__", damaged)
    with pytest.raises(
        CalibrationError, match=r"unet: .* in out_sample at timestep \d+ of prompt 1, 'a small red circle"
    ):
        capture(source, OPTIONS, tmp_path)
    assert not contents(tmp_path)


def test_a_full_disk(finished: Capture, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        if path.name == "prompt-00001.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomic(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("latentrt.calibrate.captured_prompt.write_atomic", full)
        with pytest.raises(OSError, match=r"No space left on device: .*prompt-00001\.safetensors"):
            capture(source, OPTIONS, tmp_path)
    assert {*contents(tmp_path)} == {CAPTURE, "prompt-00000.safetensors"}
    capture(source, OPTIONS, tmp_path)
    assert contents(tmp_path) == contents(finished.folder)


def test_too_small_a_disk_is_said_before(
    finished: Capture, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    least = finished.bytes
    for free, enough in ((least - 1, False), (2 * least, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if enough:
            capture(source, OPTIONS, tmp_path)
        else:
            with pytest.raises(UsageError, match="of free disk for the captured calls"):
                capture(source, OPTIONS, tmp_path)
            assert not contents(tmp_path)


def test_models_that_need_a_picture(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = dataclasses.replace(read_facts(source.bundle), unet_channels=9)
    monkeypatch.setattr("latentrt.runtime.pipeline.read_facts", lambda bundle: facts)
    with pytest.raises(
        CalibrationError, match=r"draws from text alone, got one that also takes a picture \(9 channels\)"
    ):
        capture(source, OPTIONS, tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompts": ()}, "at least one, got none"),
        ({"prompts": ("a cat", "a dog AND a cat")}, "prompt 2: expected one prompt"),
        ({"timesteps": 1}, "timesteps: expected 2 or more"),
    ],
)
def test_options_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CaptureOptions(**{"prompts": PROMPTS, **settings})
