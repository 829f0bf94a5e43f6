from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.runtime.errors import UsageError
from latentrt.runtime.infotext import Setting, format_infotext, parse_infotext

SETTINGS: dict[str, Setting] = {
    "Steps": 20,
    "Sampler": "Euler a",
    "CFG scale": 7.0,
    "Seed": 42,
    "Size": "512x512",
    "Model": "shapes",
}
LINE = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 42, Size: 512x512, Model: shapes"
AS_TEXT = {key: str(value) for key, value in SETTINGS.items()} | {"CFG scale": "7"}

text = st.text(st.characters(exclude_categories=["Cs"]))
prompts = st.lists(
    text.map(lambda line: line.replace("\n", " ").strip()).filter(lambda line: not line.startswith("Negative prompt:"))
).map(lambda lines: "\n".join(lines).strip("\n"))
names = st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_ \-/]*[A-Za-z0-9_]\Z")
values = st.one_of(
    text, st.integers(), st.sampled_from(['"', '""', '"a', 'a"', '"a" b', "a,b", "a: b", "\\", "\n", " "])
)


def test_the_form_of_the_web_ui() -> None:
    assert (
        format_infotext("a castle\non a hill", "fog", SETTINGS) == f"a castle\non a hill\nNegative prompt: fog\n{LINE}"
    )
    assert format_infotext("a castle", "", SETTINGS) == f"a castle\n{LINE}"
    assert format_infotext("", "", SETTINGS) == LINE
    assert format_infotext("a castle", "", {}) == "a castle"


def test_settings_are_in_the_order_of_the_web_ui() -> None:
    given_order = [
        "Version",
        "RNG",
        "Backend",
        "Clip skip",
        "Denoising strength",
        "Model",
        "Model hash",
        "Steps",
        "Eta",
    ]
    wanted = ["Steps", "Model hash", "Model", "Denoising strength", "Clip skip", "RNG", "Backend", "Eta", "Version"]
    assert list(parse_infotext(format_infotext("", "", dict.fromkeys(given_order, "1"))).settings) == wanted


def test_numbers_read_as_people_write_them_and_none_is_left_out() -> None:
    line = format_infotext("", "", {"CFG scale": 7.5, "Eta": 1.0, "Seed": 2**63, "VAE": None, "Steps": 1e-7})
    assert line == f"Steps: 1e-07, CFG scale: 7.5, Seed: {2**63}, Eta: 1"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("v1, pruned", '"v1, pruned"'),
        ("a: b", '"a: b"'),
        ("a\nb", '"a\\nb"'),
        ('"quoted"', '"\\"quoted\\""'),
        ('in "quotes"', 'in "quotes"'),
        ("", '""'),
        (" blanks ", '" blanks "'),
        ("日本, é", '"日本, é"'),
        ("C:\\models", '"C:\\\\models"'),
    ],
)
def test_values_are_quoted_where_they_would_read_differently(value: str, written: str) -> None:
    line = format_infotext("a", "", {"Steps": 1, "Model": value, "Seed": 2})
    assert line == f"a\nSteps: 1, Seed: 2, Model: {written}"
    assert parse_infotext(line).settings["Model"] == value


@given(prompts, prompts, st.dictionaries(names, values, min_size=3))
def test_round_trip(prompt: str, negative: str, settings: dict[str, Setting]) -> None:
    parsed = parse_infotext(format_infotext(prompt, negative, settings))
    assert parsed.prompt == prompt
    assert parsed.negative == negative
    assert parsed.settings == {key: str(value) for key, value in settings.items()}


def test_prompts_that_look_like_the_rest() -> None:
    prompt = "a sign that says Negative prompt: none\nSteps: 3, Sampler: none, Seed: 1\n, Steps: 4, Size: 1x1, A1: b"
    parsed = parse_infotext(format_infotext(prompt, prompt, SETTINGS))
    assert parsed == (prompt, prompt, AS_TEXT)


def test_a_line_that_begins_with_negative_prompt_is_one() -> None:
    """The web UI reads it so too; nothing is lost, but it changes sides."""
    parsed = parse_infotext(format_infotext("a\nNegative prompt: b\nc", "d\nNegative prompt: e", SETTINGS))
    assert parsed == ("a", "b\nc\nd\ne", AS_TEXT)


def test_texts_of_other_programs() -> None:
    parsed = parse_infotext(
        "girl, ((eyes))\r\nby <lora:x:0.8>\r\n\r\nNegative prompt:\r\nugly, [blurry]\r\n"
        "Steps: 28,Sampler: DPM++ 2M Karras,  CFG scale:7, Seed: 965400086, Size: 512x768, Model hash: 45dee52b, "
        'Lora hashes: "x: 1a2b, y: 3c4d", Hires prompt: "a \\"b\\"\\nc", Broken: "a, Empty: , Version: v1.9.4\r\n'
    )
    assert parsed.prompt == "girl, ((eyes))\nby <lora:x:0.8>\n"
    assert parsed.negative == "ugly, [blurry]"
    assert parsed.settings == {
        "Steps": "28",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "7",
        "Seed": "965400086",
        "Size": "512x768",
        "Model hash": "45dee52b",
        "Lora hashes": "x: 1a2b, y: 3c4d",
        "Hires prompt": 'a "b"\nc',
        "Broken": '"a',
        "Version": "v1.9.4",
    }


@pytest.mark.parametrize("odd", ["", "\n\n", "a castle", "{}", "Steps: 1, Seed: 2", ":,:,:,:", '"', "a: b, c: d, e: f"])
def test_what_has_no_settings_is_a_prompt(odd: str) -> None:
    assert parse_infotext(odd) == (odd.strip(), "", {})


@given(st.text())
def test_parsing_never_raises(odd: str) -> None:
    parse_infotext(odd)


@pytest.mark.parametrize("odd", ["a" * 10**6, "ab: " * 10**5, 'ab:"x,' * 10**5, "ab:" + "\t" * 10**6, '"\\"' * 10**5])
def test_parsing_takes_linear_time(odd: str) -> None:
    started = time.perf_counter()
    parse_infotext(odd)
    # Linear takes under a second on one core; quadratic took hours.
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("name", ["", "a", "CFG: scale", "a,b", " Steps", "a\nb", "-ab"])
def test_a_name_that_would_not_be_read_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="setting: expected a name"):
        format_infotext("a", "", {name: 1})
