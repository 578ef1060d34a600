"""The fifteen corruptions of ImageNet-C, five severities each, in batches and at any size.

After the published description (Hendrycks and Dietterich, ICLR 2019) with its constants, which
are for 224 px. Size rule: what is a length (radius, blur width, reach of a shuffle, displacement)
is multiplied by side / 224, and by 32 / 224 below 32 px, the side of the smallest published set
of the kind (CIFAR-10-C), since shorter lengths vanish below a pixel; of the side of a block
(pixelate) or flake (snow) the excess over one pixel is; strengths stay.

Pixels are cut off to 8 bits, as the published code does; the stored ImageNet-C was compressed as
JPEG of quality 85 after that, an option here. Two kinds differ further. Frost: the original
pastes photographs; here the crystals are generated, a pane for each of the six photographs of the
package imagecorruptions with its mean colour and spread (the original draws from five of them).
Elastic: a displacement field alone, as in that package, whose severities rise; the original's two
lowest add an affine warp and are harder than its third.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from trainables.train.exactness import seed_of

PUBLISHED_SIDE = 224
SHORTEST_SIDE = 32


class Draws:
    """Random numbers for a batch, each image's from a stream of its own."""

    def __init__(self, keys: Sequence[str], device: torch.device) -> None:
        self._generators = [torch.Generator().manual_seed(seed_of(key)) for key in keys]
        self._device = device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return (B, *shape) numbers from [low, high)."""
        rows = [torch.empty(shape).uniform_(low, high, generator=g) for g in self._generators]
        return torch.stack(rows).to(self._device)

    def normal(self, *shape: int) -> Tensor:
        """Return (B, *shape) standard normal numbers."""
        rows = [torch.empty(shape).normal_(generator=g) for g in self._generators]
        return torch.stack(rows).to(self._device)

    def poisson(self, rates_BCHW: Tensor) -> Tensor:
        """Return a count for each rate."""
        pairs = zip(rates_BCHW.cpu(), self._generators, strict=True)
        return torch.stack([torch.poisson(r, generator=g) for r, g in pairs]).to(self._device)


Kinds = dict[str, tuple[Callable[[Tensor, Any, Draws], Tensor], tuple[Any, ...]]]


def corrupt(
    images_BCHW: Tensor,
    ids: Sequence[str],
    *,
    kind: str,
    severity: int,
    jpeg: int = 0,
    kinds: Kinds | None = None,
) -> Tensor:
    """Corrupt float32 images in [0, 1], RGB or grey; a result follows from image and id alone.

    Oblong ones are made square by repeating their border, and cut again. Returns multiples of
    1/255. jpeg: the quality at which they are then stored, 0: they are not. kinds: IMAGENET_C.
    """
    apply, constants = (kinds or IMAGENET_C)[kind]
    draws = Draws([f"{image_id}/{kind}/{severity}" for image_id in ids], images_BCHW.device)
    height, width = images_BCHW.shape[2:]
    side = max(height, width)
    square = F.pad(images_BCHW, (0, side - width, 0, side - height), mode="replicate")
    corrupted = apply(square.contiguous(), constants[severity - 1], draws)
    cut_off = _cut_off(corrupted[..., :height, :width].clamp_(0, 1))
    return jpeg_compression(cut_off, jpeg, draws) if jpeg else cut_off


def gaussian_noise(images_BCHW: Tensor, std: float, draws: Draws) -> Tensor:
    """Add normal noise."""
    return images_BCHW + std * draws.normal(*images_BCHW.shape[1:])


def shot_noise(images_BCHW: Tensor, photons: float, draws: Draws) -> Tensor:
    """Count photons, `photons` of them for white."""
    return draws.poisson(images_BCHW * photons) / photons


def impulse_noise(images_BCHW: Tensor, share: float, draws: Draws) -> Tensor:
    """Set a share of the values to 0 or 1, evenly."""
    drawn = draws.uniform(*images_BCHW.shape[1:])
    return images_BCHW.masked_fill(drawn < share, 1).masked_fill(drawn < share / 2, 0)


def defocus_blur(images_BCHW: Tensor, constant: tuple[float, float], draws: Draws) -> Tensor:
    """Average over a disc whose edge is softened. constant: radius, softening."""
    disc = _disc(*constant, _length_ratio(images_BCHW))
    return _correlate(images_BCHW, disc.to(images_BCHW.device), border="reflect")


def glass_blur(images_BCHW: Tensor, constant: tuple[float, int, int], draws: Draws) -> Tensor:
    """Shuffle pixels locally between two Gaussian blurs. constant: sigma, reach, rounds."""
    sigma, reach, rounds = constant
    ratio, side = _length_ratio(images_BCHW), images_BCHW.shape[-1]
    blurred = _cut_off(smooth(images_BCHW, sigma * ratio))
    # The published loop leaves a frame of reach + 1 pixels as it is: here it shrinks by the ratio.
    margin = max(0, round((reach + 1) * (1 - ratio)))
    offsets = _shuffle(side + 2 * margin, reach, rounds, draws)
    inner = offsets[:, margin : margin + side, margin : margin + side]
    return smooth(displace(blurred, inner * ratio, border="border"), sigma * ratio)


def motion_blur(images_BCHW: Tensor, constant: tuple[int, float], draws: Draws) -> Tensor:
    """Smear along a direction within 45 degrees of the horizontal. constant: radius, sigma."""
    return smear(images_BCHW, *constant, draws.uniform(low=-45, high=45))


def zoom_blur(images_BCHW: Tensor, constant: tuple[float, int], draws: Draws) -> Tensor:
    """Average the image with itself enlarged by ever more. constant: step, number of factors."""
    step, count = constant
    total = images_BCHW.clone()
    for index in range(count):
        total += _zoom(images_BCHW, 1 + step * index)
    return total / (count + 1)


def snow(images_BCHW: Tensor, constant: tuple[float, ...], draws: Draws) -> Tensor:
    """Whiten the image and let flakes fall.

    constant: the flakes' mean, spread, size, threshold, smear radius and sigma; the image's share.
    """
    mean, spread, size, threshold, radius, sigma, share = constant
    noise = mean + spread * draws.normal(1, *images_BCHW.shape[2:])
    flakes = _zoom(noise, 1 + (size - 1) * _length_ratio(images_BCHW))
    flakes = flakes.masked_fill(flakes < threshold, 0).clamp(0, 1)
    flakes = smear(flakes, int(radius), sigma, draws.uniform(low=-135, high=-45))
    luma = images_BCHW.new_tensor([0.299, 0.587, 0.114])  # of ITU-R BT.601
    grey = torch.einsum("bchw,c->bhw", images_BCHW, luma)[:, None]
    whitened = images_BCHW.maximum(grey * 1.5 + 0.5)
    return share * images_BCHW + (1 - share) * whitened + flakes + flakes.rot90(2, (2, 3))


def frost(images_BCHW: Tensor, constant: tuple[float, float], draws: Draws) -> Tensor:
    """Lay a piece of a generated pane of frost over the image. constant: both weights."""
    side = images_BCHW.shape[-1]
    panes = _frost_panes(round(FROST_SIDE * max(_length_ratio(images_BCHW), side / FROST_SIDE)))
    choice, down, right = draws.uniform(3).T.cpu()
    choice, room = (choice * len(panes)).int(), panes.shape[-1] - side
    corners = zip(choice, (down * room).int(), (right * room).int(), strict=True)
    pieces = torch.stack([panes[k, :, y : y + side, x : x + side] for k, y, x in corners])
    if images_BCHW.shape[1] == 1:
        pieces = pieces.mean(dim=1, keepdim=True)
    return constant[0] * images_BCHW + constant[1] * pieces.to(images_BCHW.device)


def fog(images_BCHW: Tensor, constant: tuple[float, float], draws: Draws) -> Tensor:
    """Add a plasma fractal and dim to the old maximum. constant: amount, decay per octave."""
    amount, decay = constant
    side = images_BCHW.shape[-1]
    haze = _plasma(side, decay, draws)[:, None, :side, :side]
    brightest = images_BCHW.amax(dim=(1, 2, 3), keepdim=True)
    return (images_BCHW + amount * haze) * brightest / (brightest + amount)


def brightness(images_BCHW: Tensor, amount: float, draws: Draws) -> Tensor:
    """Raise the value of HSV, the largest channel, at the same hue and saturation."""
    value = images_BCHW.amax(dim=1, keepdim=True)
    raised = (value + amount).clamp(max=1)
    return torch.where(value > 0, images_BCHW * (raised / value.clamp(min=1e-6)), raised)


def contrast(images_BCHW: Tensor, factor: float, draws: Draws) -> Tensor:
    """Pull every channel towards its mean."""
    return images_BCHW.mean(dim=(2, 3), keepdim=True).lerp(images_BCHW, factor)


def elastic_transform(images_BCHW: Tensor, alpha: float, draws: Draws) -> Tensor:
    """Displace by a smooth random field, as strong as the published one is at 224 px.

    Published: uniform within 0.005 of the side, Gaussian of 0.01 of the side, times alpha. The
    Gaussian is at least a pixel wide, or the field would not be smooth.
    """
    ratio = _length_ratio(images_BCHW)
    published = 0.01 * PUBLISHED_SIDE
    sigma = max(published * ratio, 1.0)
    drawn = draws.uniform(2, *images_BCHW.shape[2:], low=-1, high=1)
    field = smooth(drawn, sigma, truncate=3, border="reflect")
    gain = (_taps(published, 3) ** 2).sum() / (_taps(sigma, 3) ** 2).sum()
    reach = alpha * 0.005 * PUBLISHED_SIDE * ratio * float(gain)
    return displace(images_BCHW, reach * field.permute(0, 2, 3, 1), border="reflection")


def pixelate(images_BCHW: Tensor, share: float, draws: Draws) -> Tensor:
    """Average over square blocks, `share` as many along each side as there are pixels."""
    excess = PUBLISHED_SIDE / int(PUBLISHED_SIDE * share) - 1
    place = torch.arange(images_BCHW.shape[-1]) + 0.5
    block = (place / (1 + excess * _length_ratio(images_BCHW))).long().to(images_BCHW.device)
    together = F.one_hot(block).T.float()
    rows = together / together.sum(dim=1, keepdim=True)
    means = (rows @ images_BCHW @ rows.T * 255).round() / 255
    return means.index_select(2, block).index_select(3, block)


def jpeg_compression(images_BCHW: Tensor, quality: int, draws: Draws) -> Tensor:
    """Write and read again as JPEG."""
    quantised = (images_BCHW * 255).round().byte().permute(0, 2, 3, 1)
    decoded = []
    for pixels in quantised.contiguous().cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels.squeeze()).save(buffer, "JPEG", quality=quality)
        decoded.append(np.asarray(Image.open(buffer)).reshape(pixels.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).to(images_BCHW) / 255


def smear(images_BCHW: Tensor, radius: int, sigma: float, degrees_B: Tensor) -> Tensor:
    """Average along half a Gaussian of 2 radius + 1 steps, each image in its own direction."""
    ratio = _length_ratio(images_BCHW)
    finer = math.ceil(ratio)
    steps = torch.arange((2 * radius + 1) * finer) / finer
    weights = torch.exp(-(steps**2) / (2 * sigma**2))
    angles = degrees_B.cpu().deg2rad()[:, None]
    rows = torch.ceil(steps * ratio * angles.sin() - 0.5).long()
    columns = torch.ceil(steps * ratio * angles.cos() - 0.5).long()
    reach = math.ceil((2 * radius + 1) * ratio)
    kernels = torch.zeros(len(angles), 2 * reach + 1, 2 * reach + 1)
    image = torch.arange(len(angles))[:, None].expand_as(rows)
    share = (weights / weights.sum()).expand(rows.shape)
    kernels.index_put_((image, rows + reach, columns + reach), share, accumulate=True)
    return _correlate(images_BCHW, kernels.to(images_BCHW.device)[:, None], border="replicate")


def _length_ratio(images_BCHW: Tensor) -> float:
    return max(images_BCHW.shape[-1], SHORTEST_SIDE) / PUBLISHED_SIDE


def _cut_off(images_BCHW: Tensor) -> Tensor:
    """Drop what is below 1/255, but not for a float that lies just under its integer."""
    return (images_BCHW * 255).add_(0.01).floor_().div_(255)


def _correlate(images_BCHW: Tensor, kernels: Tensor, *, border: str) -> Tensor:
    """Correlate with kernels (.., k, k), k odd, through the Fourier transform."""
    side, reach = images_BCHW.shape[-1], kernels.shape[-1] // 2
    padded = F.pad(images_BCHW, (reach,) * 4, mode=border)
    size = padded.shape[2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernels, s=size).conj()
    whole: Tensor = torch.fft.irfft2(spectrum, s=size)
    return whole[..., :side, :side]


@cache
def _disc(radius: float, softening: float, ratio: float) -> Tensor:
    """Return a softened disc in the published window, whose edge reflects what crosses it.

    Below a ratio of 1 the image under the disc is interpolated linearly, for radii below a pixel.
    """
    finer = 1 if ratio >= 1 else 9
    reach = math.ceil(max(radius, 8) * ratio)
    side = 2 * reach + 1
    position = (torch.arange(side * finer) - (side * finer - 1) / 2) / finer
    inside = (position[:, None] ** 2 + position**2) <= (radius * ratio) ** 2
    nearness = (1 - (position - torch.arange(-reach, reach + 1)[:, None]).abs()).clamp(min=0)
    disc = nearness @ inside.float() @ nearness.T
    width = 1 if radius <= 8 else 2
    taps = torch.exp(-(torch.arange(-width, width + 1) ** 2) / (2 * (softening * ratio) ** 2))
    taps = taps / taps.sum()
    padded = F.pad((disc / disc.sum())[None, None], (width,) * 4, mode="reflect")
    return F.conv2d(padded, taps.outer(taps)[None, None])[0, 0]


def _shuffle(side: int, reach: int, rounds: int, draws: Draws) -> Tensor:
    """Return the offsets (B, side, side, 2), x and y, at which pixels find their shuffled value.

    In each round pixels copy, from the last to the first, the present value of a pixel at an
    offset from {-reach .. reach - 1}, as the published loop does (its swap is of two views of one
    array, and so copies). A value copied earlier in the round is found by following pointers.
    """
    # To int32 first: PyTorch's way from float to int64 takes eight times as long on a CPU.
    drawn = (draws.uniform(rounds, 2, side**2) * 2 * reach).int().long() - reach
    place = torch.arange(side**2, device=drawn.device)
    row, column = place // side, place % side
    inside = (row > reach) & (row <= side - reach) & (column > reach) & (column <= side - reach)
    origin = place.expand(len(drawn), -1)
    for dx, dy in drawn.permute(1, 2, 0, 3):
        other = torch.where(inside, place + dy * side + dx, place)
        pointer = torch.where((other > place) & inside[other], other, place)
        while not torch.equal(followed := pointer.gather(1, pointer), pointer):
            pointer = followed
        origin = origin.gather(1, other.gather(1, pointer))
    offsets = torch.stack((origin % side - column, origin // side - row), dim=-1)
    return offsets.view(-1, side, side, 2)


def displace(images_BCHW: Tensor, offsets_BHW2: Tensor, *, border: str) -> Tensor:
    """Read each pixel at its place plus an offset (x, y) in pixels. border: of grid_sample."""
    line = torch.arange(images_BCHW.shape[-1])
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).to(offsets_BHW2)
    grid = (2 * (places + offsets_BHW2) + 1) / len(line) - 1
    return F.grid_sample(images_BCHW, grid, padding_mode=border, align_corners=False)


def _zoom(images_BCHW: Tensor, factor: float) -> Tensor:
    """Enlarge the middle of the images to their full size."""
    side = images_BCHW.shape[-1]
    crop = math.ceil(side / factor)
    first, size = (side - crop) // 2, round(crop * factor)
    middle = images_BCHW[..., first : first + crop, first : first + crop]
    large = F.interpolate(middle, size=(size, size), mode="bilinear", align_corners=True)
    first = (size - side) // 2
    return large[..., first : first + side, first : first + side]


def smooth(
    images_BCHW: Tensor, sigma: float, *, truncate: float = 4, border: str = "nearest"
) -> Tensor:
    """Blur by a Gaussian. border: nearest or reflect."""
    side = images_BCHW.shape[-1]
    rows = _gaussian_rows(side, sigma, truncate, border).to(images_BCHW.device)
    return rows @ images_BCHW @ rows.T


@cache
def _taps(sigma: float, truncate: float) -> Tensor:
    reach = int(truncate * sigma + 0.5)
    taps = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return taps / taps.sum()


@cache
def _gaussian_rows(side: int, sigma: float, truncate: float, border: str) -> Tensor:
    """Return the blur of a row of `side` pixels as a matrix, its border treatment included."""
    taps = _taps(sigma, truncate)
    reach = len(taps) // 2
    source = torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)
    if border == "reflect":
        source = torch.where(source < 0, -1 - source, source)
        source = torch.where(source >= side, 2 * side - 1 - source, source)
    source = source.clamp(0, side - 1)
    return torch.zeros(side, side).scatter_add_(1, source, taps.expand(side, -1))


def _plasma(side: int, decay: float, draws: Draws) -> Tensor:
    """Return fractals (B, n, n) in [0, 1] by the diamond-square algorithm, n = 2^k >= side."""
    n = 1 << (side - 1).bit_length()
    noise = draws.uniform(n * n, low=-1, high=1)
    plasma = noise.new_zeros(len(noise), n, n)
    step, amplitude, used = n, 1.0, 0
    while step >= 2:
        half, count = step // 2, n // step
        kicks = noise[:, used : used + 3 * count**2].view(-1, 3, count, count) * amplitude
        corner = plasma[:, ::step, ::step]
        below, right = corner.roll(-1, 1), corner.roll(-1, 2)
        centre = (corner + below + right + below.roll(-1, 2)) / 4 + kicks[:, 0]
        top = (corner + right + centre + centre.roll(1, 1)) / 4 + kicks[:, 1]
        left = (corner + below + centre + centre.roll(1, 2)) / 4 + kicks[:, 2]
        plasma[:, half::step, half::step] = centre
        plasma[:, ::step, half::step] = top
        plasma[:, half::step, ::step] = left
        step, amplitude, used = half, amplitude / decay**2, used + 3 * count**2
    plasma -= plasma.amin(dim=(1, 2), keepdim=True)
    return plasma / plasma.amax(dim=(1, 2), keepdim=True)


FROST_SIDE = 448  # of a pane, for images of 224 px
FROST_SEEDS = 50
FROST_ANGLES = 8
# Mean (R, G, B) and spread of each of the package imagecorruptions' photographs, over pieces of
# 224 px drawn as it draws them. The second and third show the same.
FROST_MEANS = (
    *((0.306, 0.582, 0.645), (0.775, 0.792, 0.828), (0.775, 0.792, 0.828)),
    *((0.565, 0.623, 0.673), (0.396, 0.441, 0.487), (0.273, 0.352, 0.382)),
)
FROST_SPREADS = (0.071, 0.082, 0.082, 0.106, 0.144, 0.150)


@cache
def _frost_panes(side: int) -> Tensor:
    """Return panes of frost (n, 3, side, side), reduced or enlarged from those drawn."""
    panes = F.interpolate(_drawn_panes(), size=side, mode="bilinear", antialias=True)
    spread, mean = panes.std(dim=(2, 3), keepdim=True), panes.mean(dim=(2, 3), keepdim=True)
    panes = (panes - mean) / spread * torch.tensor(FROST_SPREADS).view(-1, 1, 1, 1)
    return (panes + torch.tensor(FROST_MEANS)[..., None, None]).clamp(0, 1)


@cache
def _drawn_panes() -> Tensor:
    """Return grey panes: facets around random seeds, each with needles in its own direction."""
    generator = torch.Generator().manual_seed(0)
    place = torch.cartesian_prod(torch.arange(FROST_SIDE), torch.arange(FROST_SIDE)).float()
    panes = []
    for _ in FROST_MEANS:
        seeds = torch.rand(FROST_SEEDS, 2, generator=generator) * FROST_SIDE
        distance = torch.cdist(place, seeds)
        first, nearest = distance.min(dim=1)
        second = distance.scatter_(1, nearest[:, None], torch.inf).amin(dim=1)
        facet = torch.randint(FROST_ANGLES, (FROST_SEEDS,), generator=generator)[nearest]
        needles = torch.stack([_needles(k / FROST_ANGLES, generator) for k in range(FROST_ANGLES)])
        chosen = needles.flatten(1).gather(0, facet[None])[0]
        panes.append(chosen + 1.5 * torch.exp((first - second) / 6))
    return torch.stack(panes).view(-1, 1, FROST_SIDE, FROST_SIDE)


def _needles(turn: float, generator: torch.Generator) -> Tensor:
    """Return noise drawn out along a direction, its crests bright; `turn` in half circles."""
    noise = torch.randn(FROST_SIDE, FROST_SIDE, generator=generator)
    down, right = torch.fft.fftfreq(FROST_SIDE)[:, None], torch.fft.rfftfreq(FROST_SIDE)
    sine, cosine = math.sin(math.pi * turn), math.cos(math.pi * turn)
    across, along = down * cosine - right * sine, down * sine + right * cosine
    passed = torch.exp(-((along / 0.01) ** 2) - (across / 0.12) ** 2)
    drawn_out: Tensor = torch.fft.irfft2(torch.fft.rfft2(noise) * passed, s=noise.shape)
    return 1 - (drawn_out / drawn_out.std()).abs()


IMAGENET_C: Kinds = {
    "gaussian_noise": (gaussian_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, (60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (zoom_blur, ((0.01, 12), (0.01, 16), (0.02, 11), (0.02, 13), (0.03, 11))),
    "snow": (
        snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (elastic_transform, (12.5, 16.25, 21.25, 25, 30)),
    "pixelate": (pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg_compression, (25, 18, 15, 10, 7)),
}
