import pytest
from fake_workers import GIB

from latentrt.benchmarks.results_file import Memory, Vram
from latentrt.benchmarks.room import has_room

TOTAL = 100 * GIB  # of which 5 are kept free


def loaded(held: int, peak: int, *, vram: int | None = None) -> Memory:
    return Memory(rss_loaded=held * GIB, peak_rss=peak * GIB, vram=Vram(peak=None if vram is None else vram * GIB))


@pytest.mark.parametrize(
    ("free", "another", "room"),
    # The largest peak is 9, the largest rise from a loaded state 6.
    [(14, True, True), (13, True, False), (11, False, True), (10, False, False)],
)
def test_room_for_another_or_for_a_rise(free: int, another: bool, room: bool) -> None:
    both = [loaded(7, 9), loaded(1, 7)]
    assert has_room(both, another=another, ram=lambda: (free * GIB, TOTAL)) is room


@pytest.mark.parametrize(("free", "another", "room"), [(25, True, True), (24, True, False), (5, False, True)])
def test_room_on_the_gpu(free: int, another: bool, room: bool) -> None:
    plenty, vram = lambda: (TOTAL, TOTAL), lambda: (free * GIB, TOTAL)
    assert has_room([loaded(1, 2, vram=20)], another=another, ram=plenty, vram=vram) is room
    assert has_room([loaded(1, 2)], another=another, ram=plenty, vram=lambda: (0, TOTAL))  # it uses none


def test_room_where_nothing_is_known() -> None:
    def unknown() -> tuple[int, int]:
        raise OSError("this system does not say")

    assert has_room([loaded(1, 2, vram=20)], another=True, ram=unknown, vram=unknown)
