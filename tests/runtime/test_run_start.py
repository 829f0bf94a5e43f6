"""The plan of a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from latentrt.runtime.errors import UsageError
from latentrt.runtime.noise_schedule import NoiseSchedule
from latentrt.runtime.opened_model import Model
from latentrt.runtime.request import Request
from latentrt.runtime.run_start import check_family, plan_request

CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def model_of(*, is_sdxl: bool) -> Model:
    schedules = SimpleNamespace(of=lambda _sampler: NoiseSchedule.from_config(CONFIG))
    model: Any = SimpleNamespace(
        facts=SimpleNamespace(is_sdxl=is_sdxl), schedules=schedules, default_sampler="EulerDiscreteScheduler"
    )
    return cast(Model, model)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "Euler", "schedule": "AYS"},
        {"sampler": "Euler", "schedule": "Align Your Steps"},
        {"sampler": "Euler Align Your Steps"},
        {"schedule": "ays"},
    ],
)
def test_align_your_steps_has_a_table_for_each_family(settings: dict[str, Any]) -> None:
    request = Request(prompt="a", steps=10, **settings)
    second = [plan_request(model_of(is_sdxl=xl), request).steps[1].sigma for xl in (False, True)]
    # The second level of each published table: 6.475 for Stable Diffusion 1.5, 6.315 for XL.
    assert second == [pytest.approx(6.475, rel=1e-3), pytest.approx(6.315, rel=1e-3)]


def test_options_reach_the_plan() -> None:
    request = Request(prompt="a", steps=4, sampler="Euler a", eta=0.25, sampler_options={"s_noise": 1.1})
    options = plan_request(model_of(is_sdxl=False), request).options
    assert (options["eta"], options["s_noise"]) == (0.25, 1.1)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"prompt_2": "b"}, "prompt_2"),
        ({"crop": (8, 0)}, "crop"),
        ({"target_size": (64, 64)}, "target_size"),
        ({"aesthetic_score": 5.0}, "aesthetic_score"),
        ({"image_guidance": 2.0}, "image_guidance"),
    ],
)
def test_a_setting_of_another_family_is_refused(settings: dict[str, Any], name: str) -> None:
    plain: Any = SimpleNamespace(is_sdxl=False, time_ids=0, is_editing=False)
    with pytest.raises(UsageError, match=rf"^{name}: expected .* but for .*, got"):
        check_family(Request(prompt="a", **settings), plain)
    refiner: Any = SimpleNamespace(is_sdxl=True, time_ids=5, is_editing=True)
    check_family(Request(prompt="a", **settings), refiner)
