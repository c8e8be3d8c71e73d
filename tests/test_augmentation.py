"""Views of images: the fast transforms draw and show what torchvision's do."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

import augmentation

BILINEAR = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": None}  # without a fill: black
SPIN = {"degrees": (-15, 20), "translate": (0.1, 0.1), "scale": (0.7, 1.2)}
SHEAR = {"degrees": 0, "shear": (30, 50)}


def picture(size: int) -> torch.Tensor:
    return torch.randint(256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def drawn(transform: v2.Transform, image: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return transform(image)


@pytest.mark.parametrize("size", [32, 97])
def test_a_shift_is_a_crop_of_the_padded_image(size):
    image, most = picture(size), size // 8
    crop = v2.RandomCrop(size, padding=most, padding_mode="reflect")
    for seed in range(100):
        assert torch.equal(drawn(augmentation.Shift(most), image, seed), drawn(crop, image, seed))


@pytest.mark.parametrize("size", [32, 97])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (augmentation.Affine(**SPIN), v2.RandomAffine(**SPIN, **BILINEAR)),
        (augmentation.Affine(**SHEAR), v2.RandomAffine(**SHEAR, **BILINEAR)),
        (augmentation.Perspective(0.5, p=1), v2.RandomPerspective(0.5, p=1, **BILINEAR)),
    ],
)
def test_a_warp_shows_what_torchvision_shows(ours, theirs, size):
    image = picture(size)
    differences = torch.stack(
        [drawn(ours, image, seed).int() - drawn(theirs, image, seed).int() for seed in range(50)]
    ).abs()
    assert differences.max() <= 1
    assert (differences > 0).float().mean() < 1e-3


def test_a_warp_by_hand():
    image = picture(8)
    right = np.array([[1.0, 0, -2], [0, 1, 0], [0, 0, 1]])  # a pixel shows what is two to its left
    assert torch.equal(augmentation.warp(image, right)[:, :, 2:], image[:, :, :-2])
    assert not augmentation.warp(image, right)[:, :, :2].any()
    assert torch.equal(augmentation.warp(image, np.diag([-1.0, -1, 1])), image.flip(1, 2))
    assert torch.equal(augmentation.warp(image, np.diag([3.0, 3, 3])), image)  # homogeneous: any multiple is the same


def test_the_number_of_threads_changes_no_pixel():
    image, transform = picture(96), augmentation.strong_view("transfer", 96, mirror=True)
    threads = torch.get_num_threads()
    try:
        views = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            views.append(torch.stack([drawn(transform, image, seed) for seed in range(50)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(views[0], views[1])
    assert torch.equal(views[0], views[2])
