"""Philox words are the published ones, bit for bit; normals are normal, a function of (seed, element, draw) alone."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from ddpm.kernels import backend
from ddpm.kernels.backend import tl
from ddpm.kernels.philox import (
    PURPOSE_IMG2IMG,
    PURPOSE_INITIAL,
    PURPOSE_KNOWN_REGION,
    PURPOSE_STEP,
    philox_normal,
    philox_normal_ref,
    philox_words4,
    philox_words_ref,
)

# Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    ((0x0,) * 4, (0x0, 0x0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SEEDS = [0, 1, 2**32, 2**53 + 1, 2**63 - 1, -(2**63), -1]
INT64 = torch.int64


@backend.jit
def words_kernel(words_ptr, seed_ptr, counter_ptr, QUADS: tl.constexpr):
    """Words of counters (c0 + i, c1, c2, c3), i = 0 .. QUADS - 1. words: int64 [4, QUADS]; counter: int64 [4]."""
    i = tl.arange(0, QUADS)
    c0 = tl.load(counter_ptr).to(tl.uint32) + i.to(tl.uint32)
    c1, c2, c3 = tl.load(counter_ptr + 1), tl.load(counter_ptr + 2), tl.load(counter_ptr + 3)
    w0, w1, w2, w3 = philox_words4(tl.load(seed_ptr), c0, c1, c2.to(tl.uint32), c3.to(tl.uint32))
    tl.store(words_ptr + i, w0.to(tl.int64))
    tl.store(words_ptr + QUADS + i, w1.to(tl.int64))
    tl.store(words_ptr + 2 * QUADS + i, w2.to(tl.int64))
    tl.store(words_ptr + 3 * QUADS + i, w3.to(tl.int64))


def kernel_words(seed: int, counter: tuple[int, ...], quads: int, device: str) -> torch.Tensor:
    """int64 [4, quads]."""
    words = torch.full((4, quads), -1, dtype=INT64, device=device)
    seed_tensor, counter_tensor = (torch.tensor(v, dtype=INT64, device=device) for v in ([seed], counter))
    words_kernel[(1,)](words, seed_tensor, counter_tensor, QUADS=quads, enable_fp_fusion=False)
    return words.cpu()


def signed(low: int, high: int) -> int:
    """The int64 with these two words."""
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_reference_gives_the_published_words(counter, key, words):
    seed = torch.tensor([signed(*key)])
    assert tuple(int(w) for w in philox_words_ref(seed, torch.tensor([counter[0]]), *counter[1:])) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_kernel_gives_the_published_words(counter, key, words, device):
    assert tuple(kernel_words(signed(*key), counter, 1, device)[:, 0].tolist()) == words


@pytest.mark.parametrize("seed", SEEDS)
def test_kernel_and_reference_have_the_same_words(seed, device):
    counter = (12345, 2**31 + 7, PURPOSE_STEP, 0)
    quads = torch.arange(counter[0], counter[0] + 64)
    expected = torch.cat(philox_words_ref(torch.tensor([seed]), quads, *counter[1:]))
    assert torch.equal(kernel_words(seed, counter, 64, device), expected)


def test_the_normals_of_known_words():
    """The first four of seed 0, by hand from the published words of counter 0 and key 0."""
    u0, u1, u2, u3 = ((w + 0.5) / 2**32 for w in KNOWN_ANSWERS[0][2])
    expected = [
        f(2 * math.pi * angle) * math.sqrt(-2 * math.log(radius))
        for radius, angle in ((u0, u1), (u2, u3))
        for f in (math.cos, math.sin)
    ]
    z = philox_normal_ref(torch.tensor([0]), 4, 0, PURPOSE_INITIAL)[0]
    assert z.tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("shape", [(3, 5, 5), (3, 32, 32), (1, 1, 1), (2, 1, 3)])
def test_kernel_and_reference_agree(shape, device):
    seeds = torch.tensor(SEEDS, device=device)
    draw = torch.tensor([999], device=device)
    z = philox_normal(seeds, shape, draw, PURPOSE_STEP)
    reference = philox_normal_ref(seeds, math.prod(shape), draw, PURPOSE_STEP).view(len(SEEDS), *shape)
    assert z.shape == reference.shape
    assert z.is_contiguous()
    assert (z - reference).abs().max() <= 1e-6


@pytest.mark.parametrize("elements", [75, 3072])
def test_the_reference_gives_an_image_the_same_bits_in_any_batch(elements):
    seeds = torch.arange(16) * 7919
    alone = torch.cat([philox_normal_ref(s[None], elements, 3, PURPOSE_STEP) for s in seeds])
    assert torch.equal(philox_normal_ref(seeds, elements, 3, PURPOSE_STEP), alone)
    assert torch.equal(philox_normal_ref(seeds[5:8], elements, 3, PURPOSE_STEP), alone[5:8])


def test_the_kernel_gives_an_image_the_same_bits_in_any_batch(device):
    seeds = torch.arange(5, device=device) * 7919
    together = philox_normal(seeds, (3, 5, 5), 3, PURPOSE_STEP)
    alone = torch.cat([philox_normal(s[None], (3, 5, 5), 3, PURPOSE_STEP) for s in seeds])
    assert torch.equal(together, alone)
    assert torch.equal(together, philox_normal(seeds, (3, 5, 5), 3, PURPOSE_STEP))


def test_a_larger_image_begins_like_a_smaller_one():
    seeds = torch.tensor([4])
    long, short = (philox_normal_ref(seeds, n, 0, PURPOSE_INITIAL) for n in (3072, 75))
    assert torch.equal(long[:, :75], short)


@pytest.mark.parametrize("seeds", [range(16), [2**40 * i for i in range(16)], [-i - 1 for i in range(16)]])
def test_draws_are_standard_normal(seeds):
    z = philox_normal_ref(torch.tensor(list(seeds)), 16384, 5, PURPOSE_STEP).double().flatten()
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed once in a thousand draws.
    cdf = torch.special.ndtr(z.sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).abs().max(), (cdf - steps[1:]).abs().max())
    assert distance < 1.95 / math.sqrt(n)


def test_draws_are_independent():
    n = 65536
    z = {}
    for seed in (0, 1, 2**32):
        for draw in (0, 1):
            for purpose in (PURPOSE_INITIAL, PURPOSE_STEP, PURPOSE_KNOWN_REGION, PURPOSE_IMG2IMG):
                z[seed, draw, purpose] = philox_normal_ref(torch.tensor([seed]), n, draw, purpose)[0]
    correlation = torch.corrcoef(torch.stack(list(z.values())))
    correlation.fill_diagonal_(0)
    # 276 pairs: five standard deviations.
    assert correlation.abs().max() < 5 / math.sqrt(n)
    first = z[0, 0, PURPOSE_INITIAL]
    for lag in (1, 2, 3, 4, 5, 32, 1024):
        assert abs((first[lag:] * first[:-lag]).mean()) < 4 / math.sqrt(n)
    # Neighbours share a radius, so their squares would betray a mistake in the pairing.
    squares = first**2 - 1
    for lag in (1, 2, 3):
        assert abs((squares[lag:] * squares[:-lag]).mean() / 2) < 4 / math.sqrt(n)


def test_the_draw_is_an_int_or_a_tensor():
    seeds = torch.tensor([1, 2])
    for draw in (0, 1, 2**31):
        by_tensor = philox_normal_ref(seeds, 75, torch.tensor([draw]), PURPOSE_STEP)
        assert torch.equal(philox_normal_ref(seeds, 75, draw, PURPOSE_STEP), by_tensor)


def test_no_images(device):
    assert philox_normal(torch.zeros(0, dtype=INT64, device=device), (3, 5, 5), 0, 0).shape == (0, 3, 5, 5)


def test_what_it_refuses():
    with pytest.raises(ValueError, match="seeds must be int64"):
        philox_normal(torch.zeros(2), (3, 4, 4), 0, PURPOSE_INITIAL)
    with pytest.raises(ValueError, match="draw must be"):
        philox_normal(torch.zeros(2, dtype=INT64), (3, 4, 4), torch.zeros(2, dtype=INT64), PURPOSE_INITIAL)


def test_it_compiles_as_one_graph_of_the_operator(device):
    def draw(seeds, counter):
        return philox_normal(seeds, (3, 5, 5), counter, PURPOSE_STEP) * 2

    seeds, counter = torch.tensor([3, -4], device=device), torch.tensor([2], device=device)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seeds, counter), draw(seeds, counter))


@pytest.mark.skipif(backend.INTERPRET, reason="the reference's process")
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_reference_compiles_to_the_same_bits():
    seeds = torch.tensor([0, -1, 2**62, 12345])
    compiled = torch.compile(philox_normal_ref, fullgraph=True, dynamic=False)
    for draw in (0, 7):
        counter = torch.tensor([draw])
        expected = philox_normal_ref(seeds, 75, counter, PURPOSE_STEP)
        assert torch.equal(compiled(seeds, 75, counter, PURPOSE_STEP), expected)


def test_the_operator_is_well_registered(device):
    seeds, draw = torch.tensor([3, -4], device=device), torch.tensor([2], device=device)
    torch.library.opcheck(torch.ops.ddpm.philox_normal, (seeds, 3, 5, 5, draw, PURPOSE_STEP))
