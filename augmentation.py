"""Augmentation: what a weak and a strong view of an image are. uint8 in, uint8 out, before any normalisation (the
network's first layer does that)."""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms import v2


def weak_view(size: int, *, mirror: bool) -> v2.Transform:
    """A shift by up to an eighth and, where a mirror image keeps its class, a flip (FixMatch, section 2.3)."""
    return v2.Compose([v2.RandomHorizontalFlip()] * mirror + [Shift(size // 8)])


def strong_view(augmentation: str, size: int, *, mirror: bool) -> v2.Transform:
    """The original project's augmentations (``transfer``), or the paper's RandAugment with Cutout (``randaugment``)."""
    if augmentation == "transfer":
        return v2.Compose(
            [v2.RandomHorizontalFlip()] * mirror
            + [
                v2.RandomApply([v2.ColorJitter(0.1, 0.1, 0.1, 0.1)], p=0.2),
                Affine((-15, 20), translate=(0.1, 0.1), scale=(0.7, 1.2)),
                v2.RandomApply([Affine(0, shear=(30, 50))], p=0.3),
                Perspective(0.5, p=0.3),
                v2.RandomGrayscale(p=0.1),
                v2.RandomApply([AdditiveNoise(0.1)], p=0.2),
            ]
        )
    return v2.Compose(
        [
            weak_view(size, mirror=mirror),
            v2.RandAugment(num_ops=2, magnitude=10, interpolation=v2.InterpolationMode.BILINEAR),
            v2.RandomErasing(p=1.0, scale=(0.02, 0.25), ratio=(1.0, 1.0), value=127),
        ]
    )


class AdditiveNoise(v2.Transform):
    """Gaussian noise of a standard deviation given as a fraction of full scale."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        noise = torch.randn(inpt.shape) * (255 * self.sigma)
        return (inpt + noise).round_().clamp_(0, 255).to(torch.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's transforms, the same draws and pixels in a third to a half of the time: with fresh views and a fast
# backbone they would take a fifth of a step


class Shift(v2.Transform):
    """A shift by up to ``most`` pixels each way that fills up with the image's reflection: ``v2.RandomCrop`` after
    padding, without making what is not shown."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def make_params(self, flat_inputs: list[torch.Tensor]) -> dict[str, int]:
        return {way: int(torch.randint(0, 2 * self.most + 1, ())) - self.most for way in ("up", "left")}

    def transform(self, inpt: torch.Tensor, params: dict[str, int]) -> torch.Tensor:
        return _shifted(_shifted(inpt, -2, params["up"]), -1, params["left"])


def _shifted(image: torch.Tensor, dim: int, by: int) -> torch.Tensor:
    """An image moved against ``dim`` by a number of pixels, which may be negative."""
    n = image.shape[dim]
    if by < 0:
        return torch.cat([image.narrow(dim, 1, -by).flip(dim), image.narrow(dim, 0, n + by)], dim)
    if by > 0:
        return torch.cat([image.narrow(dim, by, n - by), image.narrow(dim, n - 1 - by, by).flip(dim)], dim)
    return image


class Affine(v2.RandomAffine):
    """``v2.RandomAffine`` of square images, bilinear, black where there is nothing."""

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        angle, shear = math.radians(params["angle"]), math.radians(params["shear"][0])  # along x alone
        sine, cosine = math.sin(angle), math.cos(angle)
        there = np.eye(3)
        there[:2, :2] = params["scale"] * np.array([[cosine, -sine], [sine, cosine]]) @ [[1, -math.tan(shear)], [0, 1]]
        there[:2, 2] = params["translate"]
        return warp(inpt, np.linalg.inv(there))


class Perspective(v2.RandomPerspective):
    """``v2.RandomPerspective`` of square images, bilinear, black where there is nothing."""

    def transform(self, inpt: torch.Tensor, params: dict[str, Any]) -> torch.Tensor:
        to_corner, to_centre = np.eye(3), np.eye(3)
        to_corner[:2, 2] = inpt.shape[-1] / 2
        to_centre[:2, 2] = -inpt.shape[-1] / 2
        return warp(inpt, to_centre @ np.append(params["coefficients"], 1).reshape(3, 3) @ to_corner)


def warp(image: torch.Tensor, matrix: np.ndarray) -> torch.Tensor:
    """An image seen through a projective map, bilinear, black where there is nothing.

    Args:
        image: [C, S, S] uint8.
        matrix: [3, 3], from homogeneous coordinates of the result's pixels to those of the image's, both from the
            centre, in pixels.
    """
    size = image.shape[-1]
    at = torch.arange(size) - (size - 1) / 2
    scaled = np.diag([2 / size, 2 / size, 1]) @ matrix  # the image from -1 to 1
    x, y, w = (torch.add(a * at, (b * at + c)[:, None]) for a, b, c in scaled.tolist())
    grid = torch.stack([x / w, y / w], -1)
    strips = math.gcd(torch.get_num_threads(), size)  # images of a batch go to different threads, parts of one do not
    grid = grid.view(strips, size // strips, size, 2)
    seen = F.grid_sample(image.float().expand(strips, -1, -1, -1), grid, align_corners=False)
    return seen.round_().to(torch.uint8).transpose(0, 1).reshape(image.shape)
