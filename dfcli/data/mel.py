"""Log-mel spectrograms, computed from sound as the model hears it: through its codec.

Settings follow the sample rate. For 22,050 Hz they are those of r9y9/wavenet_vocoder (LJSpeech), for 24,000 Hz those of
kan-bayashi/ParallelWaveGAN, for 16,000 Hz the hop and window of NVIDIA's Tacotron 2; other rates keep their times: a
hop of 12.5 ms and a window of four hops. Values are log10 of mel magnitudes (Slaney's filters, as librosa's), at least
1e-5, then shifted and scaled by the mean and deviation that each channel has in the training split.

Frame f stands for samples [f hop, (f + 1) hop), and its window is centred on their middle. Outside of its recording a
window sees silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOOR = 1e-5  # of a magnitude; full scale is 1
FRAMES_AT_ONCE = 4096
STATISTICS_FRAMES = 20_000  # spread evenly over the training split

PUBLISHED = {  # rate: fft, hop, window, mels, low, high
    8000: (512, 100, 400, 40, 60, 3800),
    16_000: (1024, 200, 800, 80, 125, 7600),
    22_050: (1024, 256, 1024, 80, 125, 7600),
    24_000: (2048, 300, 1200, 80, 80, 7600),
}


@dataclass(frozen=True)
class Mel:
    """A spectrogram's settings, in samples and Hz, and each channel's statistics. Raises ValueError where these values
    cannot be."""

    rate: int
    fft: int
    hop: int
    window: int
    mels: int
    low: float
    high: float
    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mean", "deviation"):  # JSON gives lists
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        whole = (self.rate, self.fft, self.hop, self.window, self.mels)
        if not all(type(value) is int and 1 <= value <= 1 << 20 for value in whole) or self.window > self.fft:
            raise ValueError("the mel spectrogram's sizes cannot be")
        if not 0 <= self.low < self.high <= self.rate / 2 or self.mels > 1000:
            raise ValueError("the mel spectrogram's frequencies cannot be")
        if {len(self.mean), len(self.deviation)} - {0, self.mels} or not all(value > 0 for value in self.deviation):
            raise ValueError("the mel spectrogram's statistics do not fit its channels")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def magnitudes(self, segments: np.ndarray) -> Tensor:
        """float32 [F, fft], a frame's samples each -> mel magnitudes float32 [F, mels]."""
        return self._transform(torch.from_numpy(segments))[..., 0]

    def frames(self, segments: np.ndarray) -> Tensor:
        """float32 [F, fft] -> the frames that a model is told, float32 [F, mels]."""
        found = self.magnitudes(segments).clamp_min(FLOOR).log10()
        if self.mean:
            found = (found - torch.tensor(self.mean)) / torch.tensor(self.deviation)
        return found

    def places(self, frames: np.ndarray) -> np.ndarray:
        """Which samples the windows of `frames` int64 [F] see: int64 [F, fft], also before 0 and behind the end."""
        first = frames * self.hop + self.hop // 2 - self.fft // 2
        return first[:, None] + np.arange(self.fft)

    def blocks(self, samples: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The frames of a sound float32 [n] in blocks: their numbers [F] and their segments [F, fft]."""
        count = -(-len(samples) // self.hop)
        for start in range(0, count, FRAMES_AT_ONCE):
            numbers = np.arange(start, min(count, start + FRAMES_AT_ONCE))
            places = self.places(numbers)
            inside = (places >= 0) & (places < len(samples))
            yield numbers, np.where(inside, samples[np.clip(places, 0, len(samples) - 1)], np.float32(0))

    def of(self, samples: np.ndarray) -> Tensor:
        """A sound float32 [n] -> the frames that a model is told, float32 [ceil(n / hop), mels]."""
        blocks = [self.frames(segments) for _, segments in self.blocks(samples)]
        return torch.cat(blocks) if blocks else torch.zeros(0, self.mels)

    @cached_property
    def _transform(self) -> torch.nn.Module:
        from torchaudio.transforms import MelSpectrogram  # takes a second, and most datasets have no spectrogram

        return MelSpectrogram(
            self.rate, n_fft=self.fft, win_length=self.window, hop_length=self.fft, f_min=self.low, f_max=self.high,
            n_mels=self.mels, power=1.0, center=False, norm="slaney", mel_scale="slaney",
        )  # fmt: skip


def settings(rate: int) -> Mel:
    """The spectrogram for sound of `rate` Hz, without statistics."""
    if rate in PUBLISHED:
        return Mel(rate, *PUBLISHED[rate])
    hop = max(1, round(rate / 80))
    high = min(7600.0, 0.475 * rate)
    fft = 1 << (4 * hop - 1).bit_length()
    mels = max(1, min(40 if rate < 12_000 else 80, fft // 8))
    return Mel(rate, fft, hop, 4 * hop, mels, min(125.0, high / 60), high)
