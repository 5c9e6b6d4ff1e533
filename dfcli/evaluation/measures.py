"""How far a sound is from the one it imitates: spectral distances, and what they are worth.

LSD (dB): the mean over frames of the root mean square over frequencies of 10 log10(|X|^2 / |Y|^2).
Multi-resolution STFT: the spectral convergence, which is the norm of |Y| - |X| over that of |Y|, plus the mean distance
of the logarithms of magnitudes, averaged over three resolutions (kan-bayashi/ParallelWaveGAN, losses/stft_loss.py).
Both compare two sounds of one length, frame by frame.

Floors beside them: the mu-law round trip (what the codec alone costs), Griffin-Lim from the same mel spectrogram (what
needs no training), and two different recordings (what says nothing).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dfcli.codecs import MuLaw
from dfcli.data.mel import Mel

RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))  # fft, hop, window
LSD = (512, 128, 512)
QUIETEST = 1e-4  # of a magnitude: what the rounding to 16 bits has in a window of LSD
ROUNDS = 60  # of Griffin-Lim


class Distances(NamedTuple):
    """`log_spectral` in dB; `multi_resolution` without a unit."""

    log_spectral: float
    multi_resolution: float


def distances(real: np.ndarray, made: np.ndarray) -> Distances:
    """Between two sounds float32 [n] in [-1, 1]; what is longer is cut. Raises ValueError for none."""
    n = min(len(real), len(made))
    if not n:
        raise ValueError("an empty sound has no spectrum")
    x, y = (torch.from_numpy(np.array(sound[:n], np.float32)) for sound in (real, made))
    level = 20 * (_magnitudes(x, *LSD).log10() - _magnitudes(y, *LSD).log10())
    lsd = level.square().mean(0).sqrt().mean()
    parts = []
    for resolution in RESOLUTIONS:
        a, b = _magnitudes(x, *resolution), _magnitudes(y, *resolution)
        parts.append((a - b).norm() / a.norm() + (a.log() - b.log()).abs().mean())
    return Distances(float(lsd), float(torch.stack(parts).mean()))


def mean(found: Iterable[Distances]) -> Distances:
    """The mean over clips."""
    return Distances(*np.mean(list(found), axis=0).tolist())


def griffin_lim(mel: Mel, samples: np.ndarray, rounds: int = ROUNDS) -> np.ndarray:
    """Sound float32 [n] from the mel magnitudes of `samples` float32 [n] alone: the magnitudes of least squares that
    are not negative, then phases by Griffin and Lim 1984 with the momentum of Perraudin et al. 2013."""
    from torchaudio.transforms import GriffinLim

    fft, n = mel.fft, len(samples)
    padded = np.concatenate([np.zeros(mel.hop // 2, np.float32), samples])  # so that frames are centred on f hop
    frames = -(-len(padded) // mel.hop) + 1
    segments = np.zeros((frames, fft), np.float32)
    for f in range(frames):
        start = f * mel.hop - fft // 2
        found = padded[max(0, start) : max(0, start + fft)]
        segments[f, max(0, -start) : max(0, -start) + len(found)] = found
    magnitudes = _unmel(mel, mel.magnitudes(segments))
    inverse = GriffinLim(fft, n_iter=rounds, win_length=mel.window, hop_length=mel.hop, power=1.0, rand_init=False)
    made = inverse(magnitudes.T).numpy()[mel.hop // 2 :][:n]
    return np.pad(made, (0, n - len(made)))


def _unmel(mel: Mel, wanted: Tensor) -> Tensor:
    """Mel magnitudes [F, mels] -> magnitudes [F, fft / 2 + 1] >= 0 by multiplicative updates (Lee and Seung 2001)."""
    from torchaudio.functional import melscale_fbanks

    bank = melscale_fbanks(mel.fft // 2 + 1, mel.low, mel.high, mel.mels, mel.rate, norm="slaney", mel_scale="slaney")
    found = wanted @ bank.T + 1e-8
    target, square = wanted @ bank.T, bank @ bank.T
    for _ in range(100):
        found = found * target / (found @ square + 1e-12)
    return found


def _magnitudes(x: Tensor, fft: int, hop: int, window: int) -> Tensor:
    """[n] -> [fft / 2 + 1, frames], at least QUIETEST."""
    spectrum = torch.stft(
        x, fft, hop, window, torch.hann_window(window), center=True, pad_mode="constant", return_complex=True
    )
    return spectrum.abs().clamp_min(QUIETEST)


def floors(mel: Mel, codec: MuLaw, clips: Sequence[np.ndarray]) -> dict[str, Distances]:
    """The floors for clips given as ids [n]. What a clip was before the codec rounded it is drawn anew."""
    random = np.random.default_rng(0)
    real = [codec.decode(ids) for ids in clips]
    pairs = {
        "mu-law round trip": [(codec.dithered(ids, random), sound) for ids, sound in zip(clips, real, strict=True)],
        "Griffin-Lim": [(sound, griffin_lim(mel, sound)) for sound in real],
        "another recording": [(sound, real[i - 1]) for i, sound in enumerate(real)] if len(real) > 1 else [],
    }
    return {name: mean(distances(*pair) for pair in some) for name, some in pairs.items() if some}
