"""The ten corruptions of ImageNet-C-bar, five severities each, in batches and at any size.

After the code of Mintun, Kirillov and Xie (NeurIPS 2021), facebookresearch/augmentation-corruption
@ba4d5a5: imagenet_c_bar/corrupt.py with the severities of imagenet_c_bar.csv, also below 224 px,
where CIFAR-10-C-bar has others and other kinds. Lengths are shares of the side. Images of one
channel get the first channel of coloured noise. Places are float64: devices agree at edges.
One kind differs: Perlin noise draws each gradient, where the original hashes 256 of them.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from evaluators.corruption_kinds import Draws, Kinds, displace, smooth


def blue_noise_sample(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Blacken where noise whose amplitude rises with frequency is low. level: of 10."""
    noise = _noise(images_BCHW, 1, draws, rising=True)
    return images_BCHW * (noise > 0.3 * level - 2.5)


def brownish_noise(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Add noise whose amplitude falls with the square of the frequency."""
    noise = _noise(images_BCHW, images_BCHW.shape[1], draws, rising=False)
    return (images_BCHW + 6.4 / 255 * level * noise).float()


def caustic_refraction(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Look through water: caustics bend the light by their slope, and shade."""
    side = images_BCHW.shape[-1]
    water = smooth(_caustics(images_BCHW, draws).float(), 1, border="reflect")[:, None]
    framed = F.pad(water, (1, 1, 1, 1))
    up, down = framed[..., :-2, 1:-1], framed[..., 2:, 1:-1]
    left, right = framed[..., 1:-1, :-2], framed[..., 1:-1, 2:]
    slope = torch.stack((down - up, right - left), dim=-1)[:, 0]  # the normal's, rows first
    z = 1 / (1 + slope.square().sum(dim=-1, keepdim=True)).sqrt()
    # Refraction from the z axis into a medium of index 4, in the plane of the normal.
    bent = slope * z * ((1 - (1 - z**2) / 16).sqrt() - z / 4)
    bent = bent.masked_fill(z >= 0.999, 0) * (0.05 * level * side)
    light = 0.2 * level * (left - right + down - up)
    return displace(images_BCHW, bent.flip(-1), border="zeros") + light


def checkerboard_cutout(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Grey a share of the black fields of a turned checkerboard."""
    side, cells = images_BCHW.shape[-1], 40
    turn, size = draws.uniform(2).double().T[..., None, None]
    field = ((0.1 + 0.15 * size) * side).clamp(min=1)
    y, x = _places(images_BCHW)
    sine, cosine = (2 * math.pi * turn).sin(), (2 * math.pi * turn).cos()
    rows, columns = (cosine * y + sine * x) / field, (cosine * x - sine * y) / field
    is_black = rows.floor() % 2 == columns.floor() % 2
    # Truncated, as in the original: the fields on both sides of an axis go together.
    place = (rows.long() + cells // 2) * cells + columns.long() + cells // 2
    drawn = draws.uniform(cells**2).gather(1, place.flatten(1)).view_as(rows)
    return images_BCHW.masked_fill((is_black & (drawn < 0.1 * level))[:, None], 128 / 255)


def cocentric_sine_waves(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Add rings of a sawtooth, whose radius waves with the angle."""
    side = images_BCHW.shape[-1]
    right, down, waves, reach, width = draws.uniform(5).double().T[..., None, None]
    y, x = _places(images_BCHW)
    y, x = y - down * side, x - right * side
    radius = (x**2 + y**2).sqrt() + (torch.atan2(x, y) * 10 * waves).sin() * reach * side / 10
    ring: Tensor = (radius / (width * side / 10).clamp(min=1e-6)) % 1 - 0.5
    return (images_BCHW + 12.8 / 255 * level * ring[:, None]).float()


def inverse_sparkles(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Whiten all but a star near the middle, of a quarter of the side."""
    centre_B2 = draws.uniform(2, low=0.25, high=0.75)
    star = _star(images_BCHW, centre_B2, 0.25, draws, power=0.13 * level, least=-math.inf)
    return 1 + star * (images_BCHW - 1)


def perlin_noise(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Blend with turbulence: five octaves of gradient noise, the first of seven periods."""
    periods = 224 // 32
    points = 16 * periods + 1
    gradients = draws.uniform(points, points, 2, low=-1, high=1)
    gradients = gradients / gradients.norm(dim=-1, keepdim=True)
    turbulence = torch.zeros((), device=images_BCHW.device)
    for octave in (1, 2, 4, 8, 16):
        place = _places(images_BCHW)[1] * (periods * octave / images_BCHW.shape[-1])
        first = place.long()
        rest = (place - first).float()
        eased = rest**2 * (3 - 2 * rest)
        wave = torch.zeros((), device=images_BCHW.device)
        for down, right in product((0, 1), (0, 1)):
            rise_BHW2 = gradients[:, (first + down)[:, None], first + right]
            y, x = (rest - down)[:, None], rest - right
            share = (eased if down else 1 - eased)[:, None] * (eased if right else 1 - eased)
            wave = wave + share * (rise_BHW2[..., 0] * y + rise_BHW2[..., 1] * x)
        turbulence = turbulence + (1.5 * wave).abs() / octave
    noise_BHW = (0.5 + 0.5 * turbulence).clamp(max=1)
    return images_BCHW.lerp(noise_BHW[:, None].expand_as(images_BCHW), 0.05 * level)


def plasma_noise(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Blend with a plasma of sines, whose places are moved by sines of each other."""
    time, rounds, sharpness, scale = draws.uniform(4).double().T[..., None, None]
    time, sharpness = 6 * math.pi * time, 0.5 + 0.5 * sharpness
    size = (0.075 + 0.125 * scale) * images_BCHW.shape[-1]
    y, x = (place / size for place in _places(images_BCHW))
    for step in range(6):
        down = (y * 1.93**step + time / 1.15**step).cos() / (2.25 - sharpness) ** step
        right = (x * 1.93**step + time / 1.15**step).sin() / (2.25 - sharpness) ** step
        moves = step < (4 + 3 * rounds).floor()
        x, y = x + moves * (down - 0.3 * right), y + moves * (right + 0.3 * down)
    noise = torch.stack(((x - time).sin(), ((x + y + time.sin()) / 2).sin(), (y + time).sin()), 1)
    noise = noise[:, : images_BCHW.shape[1]].float()
    return images_BCHW.lerp(noise, 6.4 / 255 * level)


def single_frequency_greyscale(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Add a plane wave of grey."""
    larger, smaller, swap, phase = draws.uniform(4).double().T[..., None, None]
    larger = math.pi * (2 * larger - 1)
    smaller = larger * (2 * smaller - 1)
    y, x = _places(images_BCHW)
    right, down = torch.where(swap < 0.5, larger, smaller), torch.where(swap < 0.5, smaller, larger)
    wave: Tensor = (right * x + down * y + 2 * math.pi * phase).sin()
    return (images_BCHW + 19.6 / 255 * level * wave[:, None]).float()


def sparkles(images_BCHW: Tensor, level: float, draws: Draws) -> Tensor:
    """Lay five white stars over the image."""
    for _ in range(5):
        star = _star(images_BCHW, draws.uniform(2), 0.01 * level, draws, power=1, least=1)
        images_BCHW = images_BCHW + star * (1 - images_BCHW)
    return images_BCHW


def _places(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows (H, 1) and columns (W) of pixels."""
    line = torch.arange(images_BCHW.shape[-1], dtype=torch.float64, device=images_BCHW.device)
    return line[:, None], line


def _noise(images_BCHW: Tensor, channels: int, draws: Draws, *, rising: bool) -> Tensor:
    """Return noise of deviation 1 and random phases, its amplitude k or 1 / (k^2 + 1).

    The phases of half the spectrum come again, point-mirrored, in the other, as in the original.
    """
    side = images_BCHW.shape[-1]
    phases = 2 * math.pi * draws.uniform(channels, side, (side + 1) // 2).double()
    phases = torch.cat((phases, phases.flip(2, 3)), dim=3)[..., :side]
    y, x = _places(images_BCHW)
    k2 = (y - side / 2) ** 2 + (x - side / 2) ** 2
    amplitude = k2.sqrt() if rising else 1 / (k2 + 1)
    spectrum = torch.polar(amplitude.expand_as(phases).contiguous(), phases)
    noise: Tensor = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(2, 3))).real
    return noise / noise.std(dim=(2, 3), correction=0, keepdim=True)


def _caustics(images_BCHW: Tensor, draws: Draws) -> Tensor:
    """Return the pattern of light below waves (B, H, W), in [0, 1]."""
    time, size = draws.uniform(2).double().T[..., None, None]
    time, size = 0.5 + 1.5 * time, (0.75 + 0.5 * size) * images_BCHW.shape[-1]
    start = [(place / size) % 1 * 6.28318530718 - 250 for place in _places(images_BCHW)]
    (y, x), light = start, torch.ones((), device=images_BCHW.device)
    for step in range(1, 6):
        t = time * (1 - 3.5 / step)
        down, right = (t - y).cos() + (t + x).sin(), (t - x).sin() + (t + y).cos()
        y, x = start[0] + down, start[1] + right
        down, right = start[0] / (y + t).sin(), start[1] / (x + t).cos()
        light = light + 1 / (0.005 * (down**2 + right**2).sqrt())
    return (1.17 - (light / 5) ** 1.4).abs().pow(8).clamp(max=1)


def _star(
    images_BCHW: Tensor, centre_B2: Tensor, share: float, draws: Draws, power: float, least: float
) -> Tensor:
    """Return how bright (B, 1, H, W) a star is, whose 50 to 199 rays have lengths of their own.

    share: their mean length, as one of the side. least: in pixels.
    """
    side, (y, x) = images_BCHW.shape[-1], _places(images_BCHW)
    rays = draws.uniform(1, low=50, high=200).long()[..., None]
    lengths_BR = (share * side * (1 + 0.25 * draws.normal(200).double())).clamp(min=least)
    down, right = (centre_B2.double() * side).T[..., None, None]
    y, x = y - down, x - right
    turn = (torch.atan2(x, y) + math.pi) / (2 * math.pi) * rays
    ray = turn.long()
    rest = turn - ray
    this, following = (
        lengths_BR.gather(1, (places % rays).flatten(1)).view_as(turn) for places in (ray, ray + 1)
    )
    squared = (this + rest * (following - this)) ** 2
    nearness: Tensor = (squared / (y**2 + x**2 + 1e-4)) ** power
    return ((1 - (rest - 0.5) ** 2) * nearness).clamp(0, 1)[:, None].float()


C_BAR: Kinds = {
    "blue_noise_sample": (blue_noise_sample, (0.8, 1.6, 2.4, 4.0, 5.6)),
    "brownish_noise": (brownish_noise, (1, 2, 3, 4, 5)),
    "caustic_refraction": (caustic_refraction, (2.35, 3.2, 4.9, 6.6, 9.15)),
    "checkerboard_cutout": (checkerboard_cutout, (2, 3, 4, 5, 6)),
    "cocentric_sine_waves": (cocentric_sine_waves, (3, 5, 8, 9, 10)),
    "inverse_sparkles": (inverse_sparkles, (1, 2, 4, 9, 10)),
    "perlin_noise": (perlin_noise, (4.6, 5.2, 5.8, 7.6, 8.8)),
    "plasma_noise": (plasma_noise, (4.75, 7, 8.5, 9.25, 10)),
    "single_frequency_greyscale": (single_frequency_greyscale, (1, 1.5, 2, 4.5, 5)),
    "sparkles": (sparkles, (1, 2, 3, 5, 6)),
}
