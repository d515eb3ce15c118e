"""The fingerprint of a network's tensors."""

from __future__ import annotations

import numpy as np
import torch

from ddpm.dropins.fingerprint import fingerprint


def test_the_fingerprint_of_every_element():
    tensors = {"a": torch.randn(3, 4, 5)[:, ::2], "b": torch.zeros(7, dtype=torch.float16), "c": torch.zeros(0)}
    before = fingerprint(tensors)
    assert before == fingerprint({name: t.clone() for name, t in tensors.items()})
    for name in ("a", "b"):
        for index in np.ndindex(*tensors[name].shape):
            changed = {n: t.clone() for n, t in tensors.items()}
            changed[name][index] += 2**-20
            assert fingerprint(changed) != before


def test_a_fingerprint_of_exchanged_elements():
    """Their sum is the same; float32 values that were float16 once end in zeros, and these rows are 2^19 apart."""
    values = torch.randn(4, 2**19).half().float()
    before = fingerprint({"a": values})
    for rows in ([1, 0, 2, 3], [2, 1, 0, 3], [3, 1, 2, 0], [0, 2, 1, 3]):
        assert fingerprint({"a": values[rows]}) != before
    assert fingerprint({"a": values.view(-1, 2).flip(1).view(4, -1)}) != before


def test_a_fingerprint_knows_names_shapes_and_dtypes():
    zeros = torch.zeros(4)
    others = (
        {"b": zeros},
        {"a": zeros[:3]},
        {"a": zeros.view(2, 2)},
        {"a": zeros.half()},
        {"a": zeros, "b": zeros},
        {},
    )
    assert all(fingerprint(other) != fingerprint({"a": zeros}) for other in others)
