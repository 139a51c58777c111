"""The correction at a hole's edge: what it removes, and what it leaves alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.editing.seams import LIMIT, agree


def keep_mask(height: int, width: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    mask = torch.ones(1, 1, height, width)
    mask[:, :, box[0] : box[1], box[2] : box[3]] = 0
    return mask


@st.composite
def holes(draw: st.DrawFn) -> torch.Tensor:
    height, width = draw(st.integers(4, 70)), draw(st.integers(4, 70))
    top, left = draw(st.integers(0, height - 2)), draw(st.integers(1, width - 2))  # something is left to the left
    return keep_mask(height, width, (top, draw(st.integers(top + 1, height)), left, draw(st.integers(left + 1, width))))


@settings(max_examples=40, deadline=None)
@given(holes(), st.integers(0, 1000))
def test_a_constant_cast_is_removed_whatever_the_hole(mask: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, *mask.shape[2:], generator=generator)
    cast = torch.tensor([0.15, -0.1, 0.05]).view(1, 3, 1, 1)
    corrected = agree(image + cast, image, mask)
    hole = (mask == 0).expand_as(image)
    torch.testing.assert_close(corrected[hole], image[hole], atol=1e-5, rtol=0)


def test_a_cast_that_changes_slowly_is_mostly_removed() -> None:
    mask = keep_mask(64, 64, (16, 48, 20, 52))
    image = torch.zeros(1, 3, 64, 64)
    cast = torch.linspace(-0.2, 0.2, 64).expand_as(image)
    left = agree(image + cast, image, mask)[(mask == 0).expand_as(image)]
    assert left.abs().mean() < 0.2 * cast[(mask == 0).expand_as(image)].abs().mean()


def test_what_is_painted_keeps_its_detail() -> None:
    """Only the surroundings decide: detail in the hole neither counts nor is touched."""
    mask = keep_mask(32, 32, (8, 24, 8, 24))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    painted = image.clone()
    painted[:, :, 10:20, 10:20] = 1.0
    assert torch.equal(agree(painted, image, mask), painted)


def test_what_reaches_over_the_edge_is_no_cast() -> None:
    """Painted over the edge, in colours that no decoder mistakes: corrected by the limit at most."""
    mask, image = keep_mask(32, 32, (8, 24, 8, 24)), torch.zeros(1, 3, 32, 32)
    painted = image + 1.0
    torch.testing.assert_close(
        agree(painted, image, mask)[(mask == 0).expand_as(image)], torch.tensor(1 - LIMIT).expand(3 * 256)
    )


def test_a_hole_without_surroundings_is_left_alone() -> None:
    painted = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(agree(painted, torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)), painted)
