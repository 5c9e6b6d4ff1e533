"""Recordings as blocks of mono float32 samples at any rate, in memory that does not grow with their length.

What a file is, is read from its first bytes, never from its name. libsndfile then sees only what its robust decoders
are for: FLAC, Ogg (Vorbis, Opus, FLAC) and MP3, from the first byte of the stream on, and the bare samples of a wav
file, whose header is read here. So the decoders that are known to crash (ADPCM, GSM, ...; libsndfile runs some of
them while it opens a file) cannot be reached.

Messages of errors are reasons without the file's name: callers put it in front.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from dfcli.errors import DfError
from dfcli.system.words import counted

EXTENSIONS = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3")
NORMALIZE = ("none", "peak", "minmax")

RATES = (100, 384_000)  # Hz
MAX_CHANNELS = 64
MAX_SAMPLE = 1e6  # beyond it a float file holds no sound, and sums of it could overflow
MAX_EXPANSION = 200  # frames per byte: far above speech at 6 kbit/s (64), far below what a bomb needs
ALWAYS_ALLOWED = 60  # seconds that any file may expand to
MAX_CHUNKS = 10_000  # of a wav header
MAX_TAGS = 16
BLOCK = 1 << 18  # samples read or made at once
SILENCE = 2 / (1 << 15)  # a recording that moves less than this is silent: one step of 16 bits up or down

CONVERT = "convert it to wav or flac, for example with `ffmpeg -i IN OUT.flac`"
WAV_CODES = {1: "integers of this width", 2: "Microsoft ADPCM", 0x11: "IMA ADPCM", 0x31: "GSM 6.10", 0x55: "MP3"}
WAV_SUBTYPES = {  # (code, bytes a sample): soundfile's name
    (1, 1): "PCM_U8",
    (1, 2): "PCM_16",
    (1, 3): "PCM_24",
    (1, 4): "PCM_32",
    (3, 4): "FLOAT",
    (3, 8): "DOUBLE",
    (6, 1): "ALAW",
    (7, 1): "ULAW",
}
UNKNOWN_SIZE = 0x7FFF0000  # what programs write as a length that they cannot know starts here
UNKNOWN_LENGTH = (1 << 63) - 1  # libsndfile's word for it
OGG_CODECS = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC")
SUBTYPES = {
    "FLAC": {"PCM_S8", "PCM_16", "PCM_24"},
    "OGG": {"VORBIS", "OPUS", "PCM_S8", "PCM_16", "PCM_24"},
    "MP3": {"MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III"},
}
# The highest level of each encoding that is not 16 bits or more; mu-law's and A-law's end at 32,124 and 32,256
FULL_SCALE = {"PCM_U8": 127 / 128, "PCM_S8": 127 / 128, "ULAW": 0.98, "ALAW": 0.98}


@dataclass(frozen=True)
class Report:
    """What a recording sounded like, known when its stream has ended. Levels are those of the file, full scale 1."""

    frames: int
    """Samples delivered, at the wanted rate."""
    peak: float
    """Largest magnitude in any channel."""
    clipped: float
    """Fraction of the file's samples that are at full scale or beyond."""
    offset: float
    """Mean of the mono mix; 0 for a recording that is centred."""
    silent: bool
    """Whether the mono mix moves by less than one step of 16 bits up or down."""


class Recording:
    """One audio file of 1 to 64 channels and 100 Hz to 384 kHz. Opening reads its header only.

    `rate` in Hz, `channels`, and `frames` per channel as the header has them (an estimate for some MP3 files). `report`
    is None until a stream of it has ended.

    Raises DfError with the reason if the file is not a regular, readable file of wav, FLAC, Ogg or MP3 with something
    in it, or claims an absurd size.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.report: Report | None = None
        self.gain, self.shift = 1.0, 0.0  # by which the last stream was normalised
        with _decoder(self.path) as decoder:
            self.rate, self.channels, self.frames = decoder.rate, decoder.channels, decoder.frames

    def stream(self, rate: int | None = None, normalize: str = "none") -> Iterator[np.ndarray]:
        """Yields float32 blocks [n] of the mono mix, resampled to `rate` Hz (None: as it is).

        `normalize`: "none"; "peak", the largest magnitude becomes 1 (silent recordings stay as they are); "minmax",
        the lowest sample becomes -1 and the highest 1, as the audio experiments of Goel et al. 2022 have it. The last
        two read the file twice.

        Raises DfError in the midst of it if the file turns out to be cut off, undecodable, or to hold what is no sound
        (NaN, infinity, magnitudes beyond 1e6). What was yielded until then is to be discarded.
        """
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize must be one of {NORMALIZE}, not {normalize!r}")
        gain, shift = 1.0, 0.0
        if normalize != "none":
            low, high = math.inf, -math.inf
            for block in self._resampled(rate):
                low, high = min(low, float(block.min())), max(high, float(block.max()))
            if normalize == "minmax":
                gain = 2 / (high - low + 1e-6)
                shift = -1 - low * gain
            elif self.report and not self.report.silent:
                gain = 1 / max(high, -low)
        self.gain, self.shift = gain, shift
        for block in self._resampled(rate):
            yield block if normalize == "none" else block * np.float32(gain) + np.float32(shift)

    def _resampled(self, rate: int | None) -> Iterator[np.ndarray]:
        self.report = None
        meter = _Meter()
        delivered = 0
        with _decoder(self.path) as decoder:
            rate = rate or decoder.rate
            resampler = Resampler(decoder.rate, rate)
            frames = max(1, min(BLOCK, BLOCK * decoder.rate // rate) // decoder.channels)
            for block in decoder.blocks(frames):
                mono = meter.add(block, decoder.full_scale)
                samples = resampler.feed(mono)
                delivered += len(samples)
                if len(samples):
                    yield samples
        samples = resampler.finish()
        if len(samples):
            yield samples
        self.report = meter.report(delivered + len(samples))


class _Meter:
    """Levels of a recording, gathered block by block."""

    def __init__(self) -> None:
        self.frames = self.samples = self.clipped = 0
        self.peak = self.sum = 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, block: np.ndarray, full_scale: float) -> np.ndarray:
        """Takes float32 [n, channels] into account and returns its mono mix [n]. DfError for what is no sound."""
        magnitude = np.abs(block)
        peak = float(magnitude.max())
        if not peak <= MAX_SAMPLE:  # also for NaN
            what = "a sample that is not a number" if math.isnan(peak) else f"a sample of magnitude {peak:.3g}"
            raise DfError(f"it holds {what}", "samples lie between -1 and 1; export the recording again")
        channels = block.shape[1]  # a product is ten times as fast as numpy's mean over so short an axis
        mono = block[:, 0].copy() if channels == 1 else block @ np.full(channels, 1 / channels, np.float32)
        self.peak = max(self.peak, peak)
        self.clipped += int(np.count_nonzero(magnitude >= full_scale))
        self.samples += block.size
        self.frames += len(block)
        self.sum += float(mono.sum(dtype=np.float64))
        self.low, self.high = min(self.low, float(mono.min())), max(self.high, float(mono.max()))
        return mono

    def report(self, delivered: int) -> Report:
        if not self.frames:
            raise DfError("it holds no sound: its header is followed by nothing")
        return Report(
            frames=delivered,
            peak=self.peak,
            clipped=self.clipped / self.samples,
            offset=self.sum / self.frames,
            silent=self.high - self.low < SILENCE,
        )


# Resampling ---------------------------------------------------------------------------------------------------------

ZEROS = 6  # zero crossings of the sinc on either side
ROLLOFF = 0.99  # of the lower Nyquist frequency
GROUP = 32  # outputs made by one matrix


class Resampler:
    """Resamples a mono signal that comes in blocks, from `source` to `target` Hz, with flat memory.

    The filter is torchaudio.functional.resample's default, a sinc with a Hann window (Smith, "Digital Audio Resampling
    Home Page"), and so is the result, to float32 precision, wherever the blocks were cut. Outputs are made in groups by
    small matrices, so that even 44,099 to 16,000 Hz takes megabytes where a dense kernel would take gigabytes.
    """

    def __init__(self, source: int, target: int) -> None:
        divisor = math.gcd(source, target)
        repeat = max(1, GROUP // (target // divisor))
        self._inputs = source // divisor * repeat  # a period: so many inputs ...
        self._outputs = target // divisor * repeat  # ... make so many outputs, and then the filter is the same again
        self._same = source == target
        self._width = 0 if self._same else _width(self._inputs, self._outputs)
        self._pending = np.zeros(self._width, np.float32)  # inputs from `width` before the next period on
        self._received = self._sent = 0

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """float32 [n] -> the outputs [m] that are now certain; m may be 0."""
        if self._same:
            return samples
        self._received += len(samples)
        return self._advance(samples)

    def finish(self) -> np.ndarray:
        """The outputs [m] that were held back; what lies behind the end counts as silence."""
        if self._same:
            return np.zeros(0, np.float32)
        missing = -(-self._received * self._outputs // self._inputs) - self._sent
        periods = -(-missing // self._outputs)
        needed = periods * self._inputs + 2 * self._width
        return self._advance(np.zeros(max(0, needed - len(self._pending)), np.float32))[:missing]

    def _advance(self, samples: np.ndarray) -> np.ndarray:
        pending = np.concatenate([self._pending, samples])
        periods = max(0, (len(pending) - 2 * self._width) // self._inputs)
        made = np.empty((periods, self._outputs), np.float32)
        for start, first, matrix in _matrices(self._inputs, self._outputs) if periods else ():
            span, count = matrix.shape
            windows = np.lib.stride_tricks.sliding_window_view(pending, span)[start :: self._inputs][:periods]
            made[:, first : first + count] = np.ascontiguousarray(windows) @ matrix
        self._pending = pending[periods * self._inputs :]
        self._sent += made.size
        return made.ravel()


def _width(inputs: int, outputs: int) -> int:
    """Inputs that the filter reaches to either side."""
    return math.ceil(ZEROS * inputs / (min(inputs, outputs) * ROLLOFF))


@lru_cache(maxsize=4)  # a folder's files have few rates; one entry is below 70 MB at any rate
def _matrices(inputs: int, outputs: int) -> list[tuple[int, int, np.ndarray]]:
    """For each group of outputs of a period: where its inputs start, its first output, float32 [inputs, outputs]."""
    width = _width(inputs, outputs)
    scale = min(inputs, outputs) * ROLLOFF / inputs  # zero crossings per input
    groups = []
    for first in range(0, outputs, GROUP):
        numbers = np.arange(first, min(first + GROUP, outputs), dtype=np.int64)
        centres = numbers * inputs / outputs
        start = int(numbers[0] * inputs // outputs)
        end = int(numbers[-1] * inputs // outputs) + 2 * width + 1
        t = (np.arange(start - width, end - width)[:, None] - centres[None]) * scale
        window = np.where(np.abs(t) < ZEROS, np.cos(t * np.pi / ZEROS / 2) ** 2, 0)
        groups.append((start, first, (np.sinc(t) * window * scale).astype(np.float32)))
    return groups


# Files --------------------------------------------------------------------------------------------------------------


class _Window:
    """A part of a file as libsndfile sees it. Read errors end it early and are kept in `error`."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._place = file, start, size, 0
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int) -> bytes:
        try:
            self._file.seek(self._start + self._place)
            data = self._file.read(max(0, min(size, self._size - self._place)))
        except OSError as error:
            self.error = error
            return b""
        self._place += len(data)
        return data


class _Source(NamedTuple):
    """Where the sound of a file lies, and what soundfile is told about it."""

    start: int
    size: int
    container: str
    arguments: dict[str, Any]


class _Decoder:
    """An open recording; `frames` per channel as its header says, None where it does not."""

    def __init__(self, file: Any, window: _Window, size: int) -> None:
        self._file, self._window = file, window
        self.rate, self.channels = int(file.samplerate), int(file.channels)
        self.frames = int(file.frames) if 0 < file.frames < UNKNOWN_LENGTH else None
        self.full_scale = FULL_SCALE.get(file.subtype, 32767 / 32768)
        self._most = max(MAX_EXPANSION * size, ALWAYS_ALLOWED * self.rate)
        if not RATES[0] <= self.rate <= RATES[1]:
            raise DfError(f"its sample rate of {self.rate} Hz is not between {RATES[0]} and {RATES[1]:,} Hz")
        if self.channels > MAX_CHANNELS:
            raise DfError(f"it has {self.channels:,} channels, more than {MAX_CHANNELS}")
        if self.frames and self.frames > self._most:
            raise DfError(f"it claims to hold {self.frames:,} frames in {size:,} bytes", CONVERT)

    def blocks(self, frames: int) -> Iterator[np.ndarray]:
        """Yields float32 [n, channels] with 0 < n <= frames; the next one overwrites it."""
        import soundfile

        buffer = np.empty((frames, self.channels), np.float32)
        total = 0
        while True:
            try:
                block = self._file.read(out=buffer)
            except soundfile.SoundFileError as error:
                raise _failure(self._window.error or error) from None
            if self._window.error:
                raise _failure(self._window.error)
            if not len(block):
                break
            total += len(block)
            if total > self._most:
                raise DfError(f"it unfolds to more than {MAX_EXPANSION} frames per byte", CONVERT)
            yield block
        if self.frames and total < self.frames and self._file.format == "FLAC":  # MP3 lengths are estimates
            raise DfError(f"it is cut off after {total:,} of {self.frames:,} frames")


@contextmanager
def _decoder(path: Path) -> Iterator[_Decoder]:
    import soundfile

    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        source = _identify(file, size)
        window = _Window(file, source.start, source.size)
        try:
            sound = soundfile.SoundFile(cast(Any, window), **source.arguments)
        except soundfile.SoundFileError as error:
            raise _failure(window.error or error) from None
        with sound:
            if source.container != "RAW" and sound.subtype not in SUBTYPES.get(sound.format, ()):
                raise DfError(f"its encoding ({sound.subtype}) is not supported", CONVERT)
            yield _Decoder(sound, window, size)


def _open(path: Path) -> IO[bytes]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # asked first: opening a pipe would wait for its writer
            raise DfError("it is not a regular file")
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise _failure(error) from None


def _failure(error: Exception) -> DfError:
    if isinstance(error, (OSError, ValueError)):
        return DfError(f"it cannot be read: {getattr(error, 'strerror', None) or error}")
    return DfError(f"it cannot be decoded: {str(getattr(error, 'error_string', error)).rstrip('. ')}", CONVERT)


def _identify(file: IO[bytes], size: int) -> _Source:
    """What the first bytes of a file say it is. DfError where that is nothing that is read here."""
    start = _end_of_tags(file)
    file.seek(start)
    head = file.read(12)
    if not size:
        raise DfError("it is empty")
    if head[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and head[8:] == b"WAVE":
        return _identify_wav(file, start, size, ">" if head[:4] == b"RIFX" else "<")
    if head[:4] == b"fLaC":
        return _Source(start, size - start, "FLAC", {})
    if head[:4] == b"OggS":
        file.seek(start)
        page = file.read(27 + 255 + 8)
        if len(page) > 26 and page[27 + page[26] :].startswith(OGG_CODECS):
            return _Source(start, size - start, "OGG", {})
        raise DfError("its Ogg stream is neither Vorbis, Opus nor FLAC", CONVERT)
    if _is_mpeg_frame(head):
        return _Source(start, size - start, "MP3", {})
    raise DfError("it is not wav, FLAC, Ogg or MP3", CONVERT)


def _end_of_tags(file: IO[bytes]) -> int:
    """Where the ID3v2 tags that may stand before any stream end."""
    start = 0
    for _ in range(MAX_TAGS):
        file.seek(start)
        head = file.read(10)
        if len(head) < 10 or head[:3] != b"ID3":
            break
        length = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        start += 10 + length + (10 if head[5] & 0x10 else 0)  # the flag announces a footer
    return start


def _is_mpeg_frame(head: bytes) -> bool:
    """Whether a header of MPEG audio stands here: 11 ones, then no reserved version, layer, bit rate or rate."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return False
    version, layer, bit_rate, rate = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4, head[2] >> 2 & 3
    return version != 1 and layer != 0 and bit_rate != 15 and rate != 3


def _identify_wav(file: IO[bytes], start: int, size: int, order: str) -> _Source:
    """Reads the chunks of a wav header up to the samples. `order`: "<" or ">" (RIFX)."""
    place, layout, long_size = start + 12, None, None
    for _ in range(MAX_CHUNKS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            break
        length = struct.unpack(order + "I", head[4:])[0]
        place += 8
        if head[:4] == b"fmt ":
            layout = _wav_layout(file.read(min(length, 40)), order)
        elif head[:4] == b"ds64":  # RF64: the sizes that need 64 bits
            sizes = file.read(16)
            long_size = struct.unpack("<Q", sizes[8:])[0] if len(sizes) == 16 else None
        elif head[:4] == b"data":
            if layout is None:
                raise DfError("its wav header does not say how the samples are stored")
            if length == 0xFFFFFFFF and long_size is not None:
                length = long_size
            there = size - place
            if length >= UNKNOWN_SIZE and long_size is None:  # written to a pipe: as much as there is
                length = there
            if length > there:
                raise DfError(f"it is cut off after {there:,} of {length:,} bytes of sound")
            if length < layout[1]:
                raise DfError("it holds no sound: its header is followed by nothing")
            return _Source(place, length, "RAW", {"format": "RAW", **layout[0]})
        place += length + length % 2
    raise DfError("it holds no sound: its wav header ends before the samples")


def _wav_layout(chunk: bytes, order: str) -> tuple[dict[str, Any], int]:
    """What soundfile must know of raw samples, from a format chunk, and the bytes of one frame."""
    if len(chunk) < 16:
        raise DfError("its wav header is incomplete")
    code, channels, rate, _, frame, bits = struct.unpack(order + "HHIIHH", chunk[:16])
    if code == 0xFFFE and len(chunk) >= 26:  # extensible: the code stands in the first bytes of an identifier
        code = struct.unpack(order + "H", chunk[24:26])[0]
    subtype = WAV_SUBTYPES.get((code, (bits + 7) // 8))
    if subtype is None:
        what = WAV_CODES.get(code, f"{bits}-bit format 0x{code:04X}")
        raise DfError(f"its encoding ({what}) is not supported", CONVERT)
    if not channels or not rate or frame != channels * ((bits + 7) // 8):
        raise DfError(
            f"its wav header contradicts itself: {counted(channels, 'channel')} of {counted(bits, 'bit')} "
            f"in frames of {counted(frame, 'byte')}"
        )
    if rate > RATES[1] or channels > MAX_CHANNELS:  # more than soundfile's integers or buffers should see
        raise DfError(f"its header claims {counted(channels, 'channel')} at {rate:,} Hz")
    endian = "LITTLE" if order == "<" else "BIG"
    return {"samplerate": rate, "channels": channels, "subtype": subtype, "endian": endian}, frame
