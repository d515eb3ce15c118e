"""The timesteps of a chain: diffusers' spacings exactly, the other families' by their documented values."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.timesteps import DIFFUSERS_SPACINGS, SPACINGS, check_timesteps, respaced_timesteps, spaced_timesteps
from tests.originals import guided_diffusion as original


def chain(steps: int, spacing: str = "leading", total: int = 1000, offset: int = 0) -> list[int]:
    return spaced_timesteps(total, steps, spacing, offset)


@pytest.mark.parametrize("spacing", DIFFUSERS_SPACINGS)
@pytest.mark.parametrize("total", [1000, 100, 77])
def test_timesteps_equal_diffusers_for_every_number_of_steps(spacing, total):
    scheduler = DDPMScheduler(num_train_timesteps=total, timestep_spacing=spacing)
    for steps in range(1, total + 1):
        scheduler.set_timesteps(steps)
        ours, theirs = chain(steps, spacing, total), scheduler.timesteps.tolist()
        # Floating point makes some of diffusers' "trailing" chains one step too long, with a last timestep of -1.
        assert theirs == ours or (spacing == "trailing" and theirs == [*ours, -1]), steps
        assert len(ours) == steps
        assert min(ours) >= 0, steps
        assert max(ours) < total, steps


def test_diffusers_timestep_of_minus_one_is_left_out():
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert scheduler.timesteps.tolist() == [*chain(61, "trailing"), -1]


@pytest.mark.parametrize("offset", [1, 3])
def test_steps_offset_equals_diffusers(offset):
    scheduler = DDPMScheduler(steps_offset=offset)
    for steps in (1, 7, 50, 250, 400):
        scheduler.set_timesteps(steps)
        assert chain(steps, offset=offset) == scheduler.timesteps.tolist()


def test_an_offset_past_the_last_timestep_is_refused():
    """diffusers raises IndexError in the middle of it."""
    with pytest.raises(ValueError, match=r"steps_offset=1 starts at timestep 1000, past the last trained one, 999"):
        chain(1000, offset=1)


@pytest.mark.parametrize("steps", [0, -1, 1001, True, 2.0, "10"])
def test_a_number_of_steps_out_of_range_is_refused(steps):
    with pytest.raises(ValueError, match="steps must be an integer from 1 to 1000"):
        chain(steps)


def test_a_spacing_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="spacing 'karras' is not one of leading, linspace, trailing, sections"):
        chain(10, "karras")


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_descends_within_the_schedule(spacing):
    for steps in (1, 2, 10, 50, 1000):
        timesteps = chain(steps, spacing)
        assert all(later < earlier or spacing == "quad" for earlier, later in pairwise(timesteps)), steps
        assert all(later <= earlier for earlier, later in pairwise(timesteps)), steps
        assert 0 <= timesteps[-1] <= timesteps[0] < 1000


def test_sections_are_rounded_as_guided_diffusion_does():
    ascending = respaced_timesteps(1000, "250")[::-1]
    assert ascending[:4] == [0, 4, 8, 12]
    assert ascending[-3:] == [991, 995, 999]
    assert chain(250, "sections") == ascending[::-1]


def test_respacing_equals_the_original_for_every_count():
    """The independent implementation; "21" is one of 278 counts where a product would round otherwise than a sum."""
    for count in range(1, 1001):
        assert respaced_timesteps(1000, str(count))[::-1] == original.space_timesteps(1000, str(count))
    assert 499 in respaced_timesteps(1000, "21")
    for text in ("10,5", "7,0,3,2", "1,1,1", "300,20"):
        assert respaced_timesteps(1000, text)[::-1] == original.space_timesteps(1000, text)


def test_respacing_strings():
    assert respaced_timesteps(1000, "ddim25") == list(range(960, -1, -40))
    assert respaced_timesteps(10, "") == list(range(9, -1, -1))
    assert respaced_timesteps(10, "2,3") == [9, 7, 5, 4, 0]  # the first half's ends; the second's, and its middle
    assert respaced_timesteps(11, "1, 1") == [6, 0]  # the first section has 6


@pytest.mark.parametrize(
    ("respacing", "sentence"),
    [
        ("fast", "steps 'fast' is no respacing string; write for example '250', '10,10,10' or 'ddim50'"),
        ("10,,5", "is no respacing string"),
        ("-5", "is no respacing string"),
        ("ddim", "is no respacing string"),
        ("1001", "steps must be an integer from 1 to 1000"),
        ("600,10", "a section of 500 of the 1000 timesteps cannot give 600 steps"),
        ("0,0", "must give at least one step"),
        ("ddim300", "no integer stride takes 300 of 1000 timesteps"),
        (",".join("1" * 1001), "has 1001 sections for 1000 timesteps"),
    ],
)
def test_bad_respacing_strings_are_refused(respacing, sentence):
    with pytest.raises(ValueError, match=sentence):
        respaced_timesteps(1000, respacing)


def test_the_spacings_of_song_et_al():
    assert chain(10, "uniform") == list(range(900, -1, -100))
    assert len(chain(300, "uniform")) == 334  # as range(0, 1000, 1000 // 300) has it
    assert chain(5, "quad") == [800, 450, 200, 50, 0]


def test_the_spacing_of_lucidrains():
    assert chain(5, "trailing_floor") == [999, 799, 599, 399, 199]
    assert chain(1000, "trailing_floor") == list(range(999, -1, -1))


@pytest.mark.parametrize(
    ("timesteps", "sentence"),
    [
        ([], "non-empty sequence of integers"),
        ([5, 2.5, 1], "non-empty sequence of integers"),
        ([1, 5], "strictly descending"),
        ([5, 5, 1], "strictly descending"),
        ([1000, 5], r"lie in 0 \.\. 999; got 1000 \.\. 5"),
        ([5, -1], r"lie in 0 \.\. 999; got 5 \.\. -1"),
    ],
)
def test_bad_custom_timesteps_are_refused(timesteps, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_timesteps(timesteps, 1000)


def test_custom_timesteps_of_any_integer_type():
    assert check_timesteps(torch.tensor([999, 3]), 1000) == [999, 3]
    assert check_timesteps((5,), 1000) == [5]
