"""What the headers of sound files say: where the samples lie, how they are stored, what is missing or left over.

Read here: WAV, RF64, BW64, RIFX and W64 (RIFF 1991, EBU 3306, Sony), AIFF and AIFF-C (Apple 1991), CAF (Apple 2005), AU
(Sun), all with PCM, floats, mu-law or A-law. FLAC, Ogg and MPEG audio are only looked through: for where the
stream begins and ends, and for further streams behind the first.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import struct
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from dfcli.errors import DfError
from dfcli.system.words import counted

EXTENSIONS = (
    ".wav", ".wave", ".w64", ".rf64", ".aif", ".aiff", ".aifc", ".caf", ".au", ".snd",
    ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2",
)  # fmt: skip
RIFF = (b"RIFF", b"RIFX", b"RF64", b"BW64")  # a wav file begins with one of these
RATES = (1, 1_000_000)  # Hz
MAX_CHANNELS = 64
MAX_CHUNKS = 10_000  # of a header
MAX_TAGS = 16
MAX_PARTS = 1000  # streams behind each other, or stretches between what is no sound
BLOCK = 1 << 20  # bytes read at once where a whole file is looked through

CONVERT = "convert it to wav or flac"  # `conversion` adds the command
# Sound and video that no decoder here reads: by name, and by the first bytes
FOREIGN = (
    ".3gp", ".aac", ".amr", ".ape", ".avi", ".flv", ".gsm", ".m4a", ".m4b", ".m4v", ".mka", ".mkv", ".mov", ".mp4",
    ".mpc", ".mpeg", ".mpg", ".ra", ".tta", ".webm", ".wma", ".wmv", ".wv",
)  # fmt: skip
FOREIGN_STARTS = (
    b"\x1a\x45\xdf\xa3", b"FLV\1", b"0&\xb2u\x8ef\xcf\x11", b"#!AMR", b"\0\0\1\xba", b"\xff\xf1", b"\xff\xf9",
)  # fmt: skip
CODES = {1: "integers of this width", 2: "Microsoft ADPCM", 0x11: "IMA ADPCM", 0x31: "GSM 6.10", 0x55: "MP3"}
SUBTYPES = {  # (code of WAV, bytes a sample): soundfile's name
    (1, 1): "PCM_U8", (1, 2): "PCM_16", (1, 3): "PCM_24", (1, 4): "PCM_32", (3, 4): "FLOAT", (3, 8): "DOUBLE",
    (6, 1): "ALAW", (7, 1): "ULAW",
}  # fmt: skip
AU_ENCODINGS = {1: ("ULAW", 1), 2: ("PCM_S8", 1), 3: ("PCM_16", 2), 4: ("PCM_24", 3), 5: ("PCM_32", 4),
                6: ("FLOAT", 4), 7: ("DOUBLE", 8), 27: ("ALAW", 1)}  # fmt: skip
AIFF_FLOATS = {b"fl32": "FLOAT", b"FL32": "FLOAT", b"fl64": "DOUBLE", b"FL64": "DOUBLE"}
AIFF_LAWS = {b"ulaw": "ULAW", b"ULAW": "ULAW", b"alaw": "ALAW", b"ALAW": "ALAW"}
UNKNOWN_SIZE = 0x7FFF0000  # what programs write as a length that they cannot know starts here
W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
W64_WAVE = bytes.fromhex("77617665f3acd3118cd100c04f8edb8a")
SWAPPED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
OGG_CODECS = (b"\x01vorbis", b"OpusHead", b"\x7fFLAC")
FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # a stream begins with a STREAMINFO of 34 bytes
TEXT = frozenset(b"\t\r\n" + bytes(range(32, 127)))  # what an error page or a Git LFS pointer has instead of sound
TAGS = (b"TAG", b"APETAGEX", b"ID3", b"LYRICS")  # behind MPEG frames: no sound, and none missing


class Part(NamedTuple):
    """What one decoder reads: `prefix`, then `spans` (start, size) of the file."""

    spans: tuple[tuple[int, int], ...]
    arguments: dict[str, Any] = {}  # noqa: RUF012 - for soundfile, where the samples are bare; never changed
    prefix: bytes = b""
    exact: bool = False  # whether the number of frames that the decoder finds is a promise
    low_24: bool = False  # 24 bits in the lower bytes of 32


class Found(NamedTuple):
    """A sound file: its parts, which follow each other in time, and what is missing or left over."""

    parts: list[Part]
    notes: list[str]


def sniff(head: bytes) -> bool:
    """Whether a file that begins with these (some thousand) bytes is sound, by what stands in it."""
    if head[:4] in RIFF:
        return head[8:12] == b"WAVE"
    if head[:4] == b"FORM":
        return head[8:12] in (b"AIFF", b"AIFC")
    if head[:3] == b"ID3":
        return len(head) >= 10 and head[3] < 16 and max(head[6:10]) < 128
    if head.startswith((b"fLaC", b"OggS", W64_RIFF, b"caff\0\1", b".snd\0\0")):
        return True
    start = len(head) - len(head.lstrip(b"\0"))
    if (frame := _mpeg_frame(head[start : start + 4])) is None:
        return False
    following = _mpeg_frame(head[start + frame.size : start + frame.size + 4])
    return following is not None and following.kind == frame.kind


def foreign(head: bytes, name: str) -> bool:
    """Whether a file of that name that begins with these bytes, which `sniff` does not know, is sound or video all the
    same."""
    if head[4:8] == b"ftyp" or head.startswith(FOREIGN_STARTS) or (head[:4] == b"RIFF" and head[8:12] == b"AVI "):
        return True
    return name.lower().endswith(FOREIGN)


def conversion(path: str) -> str:
    """The hint with the command that converts the file at `path`; "" stands for standard input."""
    stem, extension = os.path.splitext(path)
    if extension.lower() in (".pcm", ".raw"):  # bare samples: nothing in the file says what they are
        raw = ["ffmpeg", "-f", "s16le", "-ar", "16000", "-ac", "1", "-i", path, f"{stem}.flac"]
        return f"say what its samples are, for example 16 bits at 16,000 Hz: `{shlex.join(raw)}`"
    out = stem + ("-converted.flac" if extension == ".flac" else ".flac")
    return f"{CONVERT}: `{shlex.join(['ffmpeg', '-i', path, out]) if path else 'ffmpeg -i - -f wav -'}`"


def unusable(name: str, path: str, error: DfError) -> DfError:
    """The error for the file at `path` (see `conversion`), which is called `name`."""
    return DfError(f"{name} cannot be used: {error.message}", conversion(path) if error.hint == CONVERT else error.hint)


def identify(file: IO[bytes], size: int) -> Found:
    """What a file's first bytes say it is. DfError where that is nothing that is read here."""
    if not size:
        raise DfError("it is empty")
    start = _end_of_tags(file)
    head = _at(file, start, 16)
    if head[:4] in RIFF and head[8:12] == b"WAVE":
        return _wav(file, start, size)
    if head == W64_RIFF:
        return _w64(file, start, size)
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(file, start, size, head[8:12] == b"AIFC")
    if head[:4] == b"caff":
        return _caf(file, start, size)
    if head[:4] == b".snd":
        return _au(file, start, size)
    if head[:4] == b"fLaC":
        return _flac(file, start, size)
    if head[:4] == b"OggS":
        return _ogg(file, start, size)
    if (found := _mpeg(file, start, size)) is not None:
        return found
    if head[:4] in RIFF:
        raise DfError("it begins like a wav, and its header is cut off or of another kind", "fetch this one again")
    begin = _at(file, start, 400)
    if begin and not set(begin) - TEXT:
        line = begin.decode("ascii").strip().split("\n")[0][:60]
        raise DfError(f"it is text, not sound: it begins with {line!r}", "give a recording, or fetch this one again")
    raise DfError("it is not wav, FLAC, Ogg or MP3, and no other format that is read here", CONVERT)


# Bare samples --------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """How bare samples are stored."""

    subtype: str
    endian: str
    rate: int
    channels: int
    frame: int  # bytes
    bits: int = 0  # those that count, where they are fewer than are stored


def _bare(file: IO[bytes], layout: _Layout, start: int, length: int | None, size: int) -> Found:
    """The samples at `start`, `length` bytes of them (None: up to the end of the file), as far as they are there."""
    there = max(0, size - start)
    notes = []
    if length is not None and length > there:
        seconds = f"{there // layout.frame / layout.rate:,.1f} of {length // layout.frame / layout.rate:,.1f} seconds"
        notes.append(f"it is cut off: {seconds} are there")
    count = min(there, there if length is None else length)
    if count < layout.frame:
        raise DfError("it holds no sound: its header is followed by nothing")
    if layout.rate > RATES[1] or layout.channels > MAX_CHANNELS:  # more than soundfile's integers should see
        raise DfError(f"its header claims {counted(layout.channels, 'channel')} at {layout.rate:,} Hz")
    low_24 = False
    if layout.bits == 24 and layout.subtype == "PCM_32":
        some = _at(file, start, 1 << 16)
        top, bottom = (3, 0) if layout.endian == "LITTLE" else (0, 3)
        low_24 = not set(some[top : len(some) // 4 * 4 : 4]) - {0, 255} and any(some[bottom::4])
    arguments = {
        "format": "RAW", "samplerate": layout.rate, "channels": layout.channels, "subtype": layout.subtype,
        "endian": layout.endian,
    }  # fmt: skip
    return Found([Part(((start, count - count % layout.frame),), arguments, low_24=low_24)], notes)


def _layout(code: int, order: str, rate: int, channels: int, frame: int, bits: int, *, signed: bool = False) -> _Layout:
    """The layout of samples with a code as WAV has it. Raises DfError."""
    container = frame // channels if channels and code == 1 else (bits + 7) // 8
    if not channels or not rate or frame != channels * container or container < (bits + 7) // 8:
        raise DfError(
            f"its header contradicts itself: {counted(channels, 'channel')} of {counted(bits, 'bit')} "
            f"in frames of {counted(frame, 'byte')} at {rate:,} Hz"
        )
    subtype = SUBTYPES.get((code, container)) if bits else None
    if subtype is None:
        raise DfError(f"its encoding ({CODES.get(code, f'{bits}-bit format 0x{code:04X}')}) is not supported", CONVERT)
    if signed and subtype == "PCM_U8":
        subtype = "PCM_S8"
    return _Layout(subtype, "LITTLE" if order == "<" else "BIG", rate, channels, frame, bits)


def _wav_layout(chunk: bytes, order: str) -> _Layout:
    if len(chunk) < 16:
        raise DfError("its header is incomplete")
    code, channels, rate, _, frame, bits = struct.unpack(order + "HHIIHH", chunk[:16])
    if code == 0xFFFE and len(chunk) >= 26:  # extensible: the code stands in the first bytes of an identifier
        code = struct.unpack(order + "H", chunk[24:26])[0]
    if code not in (1, 3, 6, 7):
        raise DfError(f"its encoding ({CODES.get(code, f'{bits}-bit format 0x{code:04X}')}) is not supported", CONVERT)
    return _layout(code, order, rate, channels, frame, bits)


def _wav(file: IO[bytes], start: int, size: int) -> Found:
    """A wav file, and those that may stand behind it."""
    order = ">" if _at(file, start, 4) == b"RIFX" else "<"
    layout, long_size = None, None
    for name, place, length in _chunks(file, start + 12, size, order):
        if name == b"fmt ":
            layout = _wav_layout(_at(file, place, min(length, 40)), order)
        elif name == b"ds64":  # RF64: the sizes that need 64 bits
            sizes = _at(file, place, 16)
            long_size = struct.unpack("<Q", sizes[8:])[0] if len(sizes) == 16 else None
        elif name == b"data":
            if layout is None:
                raise DfError("its header does not say how the samples are stored")
            if length == 0xFFFFFFFF and long_size is not None:
                length = long_size
            elif length >= UNKNOWN_SIZE:  # written to a pipe: as much as there is
                return _bare(file, layout, place, None, size)
            return _with_rest(file, layout, place, length, size, order)
    raise DfError("it holds no sound: its header ends before the samples")


def _with_rest(file: IO[bytes], layout: _Layout, place: int, length: int, size: int, order: str) -> Found:
    """The samples of a wav file, and what stands behind them: other chunks, another wav file, or what is unknown."""
    end = place + length + length % 2
    behind = size - end
    if not length and behind > 0 and not _is_chunks(file, end, size, order):
        found = _bare(file, layout, place, None, size)  # the recorder stopped before it wrote the length
        return Found(found.parts, ["its header says that it holds nothing, and all that stands behind it was read"])
    found = _bare(file, layout, place, length, size)
    if behind >= 12 and (head := _at(file, end, 12))[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE":
        if len(found.parts) < MAX_PARTS:
            return _joined(found, _wav(file, end, size))
    elif behind > 1 and not _is_chunks(file, end, size, order):
        found.notes.append(f"{counted(behind, 'byte')} behind its sound were left out")
    return found


def _joined(first: Found, second: Found) -> Found:
    return Found(first.parts + second.parts, first.notes + second.notes)


def _is_chunks(file: IO[bytes], place: int, size: int, order: str) -> bool:
    """Whether nothing but chunks with printable names fills the file from here on."""
    end = place
    for name, start, length in _chunks(file, place, size, order):
        if not re.fullmatch(rb"[ -~]{4}", name):
            return False
        end = start + length
    return size - end <= 1


def _chunks(file: IO[bytes], place: int, size: int, order: str) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and length of the chunks from `place` on."""
    for _ in range(MAX_CHUNKS):
        head = _at(file, place, 8)
        if len(head) < 8 or place >= size:
            return
        length = struct.unpack(order + "I", head[4:])[0]
        yield head[:4], place + 8, length
        place += 8 + length + length % 2


def _w64(file: IO[bytes], start: int, size: int) -> Found:
    place, layout = start + 40, None
    if _at(file, start + 24, 16) != W64_WAVE:
        raise DfError("its header is incomplete")
    for _ in range(MAX_CHUNKS):
        head = _at(file, place, 24)
        if len(head) < 24:
            break
        length = struct.unpack("<Q", head[16:])[0]
        if head[:4] == b"fmt ":
            layout = _wav_layout(_at(file, place + 24, min(max(length, 24) - 24, 40)), "<")
        elif head[:4] == b"data":
            if layout is None:
                raise DfError("its header does not say how the samples are stored")
            return _bare(file, layout, place + 24, length - 24 if 24 < length < 1 << 62 else None, size)
        place += max(24, length + -length % 8)
    raise DfError("it holds no sound: its header ends before the samples")


def _aiff(file: IO[bytes], start: int, size: int, compressed: bool) -> Found:
    layout = None
    sound: tuple[int, int] | None = None
    for name, place, length in _chunks(file, start + 12, size, ">"):
        if name == b"COMM":
            layout = _aiff_layout(_at(file, place, 22), compressed)
        elif name == b"SSND":
            offset = struct.unpack(">I", _at(file, place, 4).ljust(4, b"\0"))[0]
            sound = place + 8 + offset, length - 8 - offset
    if layout is None or sound is None:
        raise DfError("it holds no sound: its header ends before the samples")
    return _bare(file, layout, sound[0], sound[1] if sound[1] > 0 else None, size)


def _aiff_layout(chunk: bytes, compressed: bool) -> _Layout:
    if len(chunk) < (22 if compressed else 18):
        raise DfError("its header is incomplete")
    channels, _, bits, exponent, mantissa = struct.unpack(">HIHHQ", chunk[:18])
    rate = round(math.ldexp(mantissa, min(exponent & 0x7FFF, 17_000) - 16383 - 63)) if exponent < 16383 + 40 else 0
    form = chunk[18:22] if compressed else b"NONE"
    order = "<" if form == b"sowt" else ">"
    if form in AIFF_FLOATS or form in AIFF_LAWS:
        subtype = AIFF_FLOATS.get(form) or AIFF_LAWS[form]
        width = {"FLOAT": 4, "DOUBLE": 8}.get(subtype, 1)
        if not channels or not rate:
            raise DfError(f"its header contradicts itself: {counted(channels, 'channel')} at {rate:,} Hz")
        return _Layout(subtype, "BIG", rate, channels, width * channels)
    if form not in (b"NONE", b"sowt", b"twos", b"raw ", b"in24", b"in32"):
        raise DfError(f"its encoding ({form.decode('latin-1')!a}) is not supported", CONVERT)
    return _layout(1, order, rate, channels, channels * ((bits + 7) // 8), bits, signed=form != b"raw ")


def _caf(file: IO[bytes], start: int, size: int) -> Found:
    place, layout = start + 8, None
    for _ in range(MAX_CHUNKS):
        head = _at(file, place, 12)
        if len(head) < 12:
            break
        name, length = struct.unpack(">4sq", head)
        place += 12
        if name == b"desc":
            layout = _caf_layout(_at(file, place, 32))
        elif name == b"data":
            if layout is None:
                raise DfError("its header does not say how the samples are stored")
            return _bare(file, layout, place + 4, length - 4 if length > 4 else None, size)  # -1: up to the end
        place += max(0, length)
    raise DfError("it holds no sound: its header ends before the samples")


def _caf_layout(chunk: bytes) -> _Layout:
    if len(chunk) < 32:
        raise DfError("its header is incomplete")
    rate, form, flags, frame, _, channels, bits = struct.unpack(">d4sIIIII", chunk)
    rate = round(rate) if 0 < rate < 1e9 else 0
    code = {b"lpcm": 3 if flags & 1 else 1, b"alaw": 6, b"ulaw": 7}.get(form)
    if code is None:
        raise DfError(f"its encoding ({form.decode('latin-1')!a}) is not supported", CONVERT)
    return _layout(code, "<" if flags & 2 else ">", rate, channels, frame, bits or 8, signed=True)


def _au(file: IO[bytes], start: int, size: int) -> Found:
    head = _at(file, start, 24)
    if len(head) < 24:
        raise DfError("its header is incomplete")
    offset, length, encoding, rate, channels = struct.unpack(">IIIII", head[4:])
    if encoding not in AU_ENCODINGS:
        raise DfError(f"its encoding (number {encoding}) is not supported", CONVERT)
    subtype, width = AU_ENCODINGS[encoding]
    if not channels or not rate or offset < 24:
        raise DfError(f"its header contradicts itself: {counted(channels, 'channel')} at {rate:,} Hz")
    layout = _Layout(subtype, "BIG", rate, channels, width * channels)
    return _bare(file, layout, start + offset, length if 0 < length < UNKNOWN_SIZE else None, size)


# Streams -------------------------------------------------------------------------------------------------------------


def _flac(file: IO[bytes], start: int, size: int) -> Found:
    """A FLAC stream, and those that stand behind it."""
    starts = [start]
    place, tail = start + 8, b""
    while data := _at(file, place, BLOCK):
        for match in FLAC_START.finditer(tail + data):
            starts.append(place - len(tail) + match.start())
        place += len(data)
        tail = (tail + data)[-7:]
    starts = starts[:MAX_PARTS]
    ends = [*starts[1:], size]
    return Found([Part(((a, b - a),), exact=True) for a, b in zip(starts, ends, strict=True)], [])


def _ogg(file: IO[bytes], start: int, size: int) -> Found:
    """The streams of an Ogg file that follow each other (RFC 3533). Each begins with pages that say so."""
    parts: list[Part] = []
    notes: list[str] = []
    place, begun, ended, beginning = start, start, True, False
    pages = damaged = 0
    while place < size:
        head = _at(file, place, 27 + 255)
        length = 27 + head[26] + sum(head[27 : 27 + head[26]]) if len(head) > 26 else 0
        if head[:4] != b"OggS" or place + length > size or not length:
            following = _find(file, b"OggS", place + 1) if head[:4] != b"OggS" else None
            if following is None:
                break
            notes.append(f"{counted(following - place, 'byte')} that are no Ogg page were left out")
            place = following
            continue
        if head[5] & 2 and not beginning:  # the first page of a stream
            if place > start:
                parts.append(Part(((begun, place - begun),), exact=True))
            begun = place
            known = _at(file, place + 27 + head[26], 8).startswith(OGG_CODECS)
            if not known and not parts and begun == start:
                raise DfError("its Ogg stream is neither Vorbis, Opus nor FLAC", CONVERT)
            if not known or len(parts) >= MAX_PARTS:
                return Found(parts, [*notes, f"{counted(size - begun, 'byte')} behind its sound were left out"])
        beginning, ended = bool(head[5] & 2), bool(head[5] & 4)
        pages, damaged = pages + 1, damaged + (not _ogg_sum_holds(_at(file, place, length)))
        place += length
    if place == start:
        raise DfError("its Ogg stream is neither Vorbis, Opus nor FLAC", CONVERT)
    parts.append(Part(((begun, place - begun),), exact=True))
    if damaged:
        notes.append(f"{damaged:,} of {counted(pages, 'Ogg page')} {'is' if damaged == 1 else 'are'} damaged")
    if not ended:
        notes.append("it is cut off: its last page is missing, and all that is there was read")
    elif place < size:
        notes.append(f"{counted(size - place, 'byte')} behind its sound were left out")
    return Found(parts, notes)


def _ogg_sum_holds(page: bytes) -> bool:
    """Whether a page's checksum is right (RFC 3533). It is the CRC-32 of zlib with bits in the other order, from 0."""
    swapped = (page[:22] + bytes(4) + page[26:]).translate(SWAPPED_BITS)
    found = zlib.crc32(swapped, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return found.to_bytes(4, "little").translate(SWAPPED_BITS) == page[25:21:-1]


class _Frame(NamedTuple):
    """What the header of a frame of MPEG audio says (ISO 11172-3, 13818-3)."""

    size: int  # bytes
    kind: tuple[int, int, int]  # version, layer, rate: the same for all frames of a stream
    side: int  # bytes before the place of a tag in a frame without sound


BIT_RATES = {  # kbit/s by version 1 or not, and layer
    (True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MPEG_RATES = (44_100, 48_000, 32_000)


def _mpeg_frame(head: bytes) -> _Frame | None:
    """The frame whose header these 4 bytes are, or None where they are none."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version, layer, number, rate = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3), head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or number in (0, 15) or rate == 3:
        return None
    first = version == 3
    hertz = MPEG_RATES[rate] // {3: 1, 2: 2, 0: 4}[version]
    bits, padding = 1000 * BIT_RATES[first, layer][number - 1], head[2] >> 1 & 1
    if layer == 1:
        size = (12 * bits // hertz + padding) * 4
    else:
        size = (144 if first or layer == 2 else 72) * bits // hertz + padding
    mono = head[3] >> 6 == 3
    return _Frame(size, (version, layer, rate), {True: (32, 17), False: (17, 9)}[first][mono])


def _mpeg(file: IO[bytes], start: int, size: int) -> Found | None:
    """A stream of MPEG audio, also behind zero bytes; None where there is none.

    libsndfile stops where the length that it guesses from the first frame ends. So all frames are counted here, and a
    tag that says their number is put before them.
    """
    reader = _Reader(file, size)
    first = _first_frame(reader, start)
    if first is None:
        return None
    place, head = first
    frame = _mpeg_frame(head)
    assert frame is not None
    tag = _tag(reader.read(place, frame.size), frame)
    spans: list[list[int]] = []
    junk = count = 0
    promised = tag[1] if tag else None
    begin = place + frame.size if tag else place
    place = begin
    while place < size and len(spans) < MAX_PARTS:
        found = _mpeg_frame(reader.read(place, 4))
        if found is not None and found.kind == frame.kind:
            if place + found.size > size:
                break  # the last frame is cut off
            if spans and spans[-1][0] + spans[-1][1] == place:
                spans[-1][1] += found.size
            else:
                spans.append([place, found.size])
            count += 1
            place += found.size
            continue
        following = _next_frame(reader, place + 1, frame)
        if following is None:
            break
        if not reader.read(place, 8).startswith(TAGS):
            junk += following - place
        place = following
    if not count:
        return None if not tag else Found([Part(((start, size - start),))], [])
    notes = [f"{counted(junk, 'byte')} between its frames are no sound and were left out"] if junk else []
    rest = size - place
    if promised is not None and count < promised:
        notes.append(f"it is cut off: {count:,} of {counted(promised, 'frame')} are there")
    elif rest and not reader.read(place, 8).startswith(TAGS):
        cut = _mpeg_frame(reader.read(place, 4))
        what = "its last frame is cut off" if cut is not None and place + cut.size > size else ""
        notes.append(what or f"{counted(rest, 'byte')} behind its sound were left out")
    prefix = _with_count(tag[0] if tag else None, head, frame, count, sum(length for _, length in spans))
    return Found([Part(tuple((a, b) for a, b in spans), prefix=prefix, exact=frame.kind[1] == 3)], notes)


class _Reader:
    """Reads small pieces of a file that follow each other."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size
        self._start, self._data = 0, b""

    def read(self, place: int, count: int) -> bytes:
        """Up to `count` bytes from `place` on."""
        inside = place - self._start
        if inside < 0 or inside + count > len(self._data):
            self._start, self._data = place, _at(self._file, place, max(BLOCK, count))
            inside = 0
        return self._data[inside : inside + count]


def _first_frame(reader: _Reader, place: int) -> tuple[int, bytes] | None:
    """The place and the header of the first frame that is followed by another or by the end: at `place`, behind zero
    bytes, or, so long as it is near, behind anything."""
    while (data := reader.read(place, BLOCK)) and not data.strip(b"\0"):
        place += len(data)
    place += len(data) - len(data.lstrip(b"\0"))
    data = reader.read(place, 1 << 16)
    for match in re.finditer(rb"\xff[\xe2-\xff]", data):
        near = place + match.start()
        head = reader.read(near, 4)
        frame = _mpeg_frame(head)
        if frame is None:
            continue
        rest = reader.read(near + frame.size, 4)
        following = _mpeg_frame(rest)
        if (following is not None and following.kind == frame.kind) or (not match.start() and not rest):
            return near, head
    return None


def _next_frame(reader: _Reader, place: int, frame: _Frame) -> int | None:
    """Where the next frame of the same stream begins that is followed by another one or by the end."""
    while data := reader.read(place, BLOCK):
        for match in re.finditer(rb"\xff[\xe2-\xff]", data):
            near = place + match.start()
            found = _mpeg_frame(reader.read(near, 4))
            if found is not None and found.kind == frame.kind:
                rest = reader.read(near + found.size, 4)
                following = _mpeg_frame(rest)
                if not rest or (following is not None and following.kind == frame.kind):
                    return near
        place += max(1, len(data) - 1)
        if len(data) < 2:
            break
    return None


def _tag(frame: bytes, about: _Frame) -> tuple[bytes, int | None] | None:
    """A first frame that holds no sound but a tag of Xing, LAME or Fraunhofer, and the number of frames that it states;
    None for a frame of sound."""
    if frame[36:40] == b"VBRI" and len(frame) >= 54:
        return frame, struct.unpack(">I", frame[50:54])[0]
    place = 4 + about.side
    if frame[place : place + 4] not in (b"Xing", b"Info") or len(frame) < place + 16:
        return None
    flags = struct.unpack(">I", frame[place + 4 : place + 8])[0]
    return frame, struct.unpack(">I", frame[place + 8 : place + 12])[0] if flags & 1 else None


def _with_count(tag: bytes | None, head: bytes, frame: _Frame, count: int, size: int) -> bytes:
    """A frame with a tag that states the true number of frames and bytes: the file's own tag, or a new one."""
    if frame.kind[1] != 3:
        return b""
    place = 4 + frame.side
    if tag is not None and tag[place : place + 4] in (b"Xing", b"Info"):
        made = bytearray(tag)
        flags = struct.unpack(">I", made[place + 4 : place + 8])[0]
        if flags & 3 == 3:
            made[place + 8 : place + 16] = struct.pack(">II", count, size + len(made))
            return bytes(made)
    header = bytearray(head)
    header[1] |= 1  # no checksum
    header[2] = (header[2] & 0x0D) | 0x90  # a bit rate at which the tag fits, no padding
    form = _mpeg_frame(bytes(header))
    assert form is not None
    made = bytearray(form.size)
    made[:4] = header
    made[place : place + 16] = b"Info" + struct.pack(">III", 3, count, size + form.size)
    return bytes(made)


def _end_of_tags(file: IO[bytes]) -> int:
    """Where the ID3v2 tags that may stand before any stream end."""
    start = 0
    for _ in range(MAX_TAGS):
        head = _at(file, start, 10)
        if len(head) < 10 or head[:3] != b"ID3":
            break
        length = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
        start += 10 + length + (10 if head[5] & 0x10 else 0)  # the flag announces a footer
    return start


def _find(file: IO[bytes], what: bytes, place: int) -> int | None:
    """The next place of some bytes."""
    tail = b""
    while data := _at(file, place, BLOCK):
        if (found := (tail + data).find(what)) >= 0:
            return place - len(tail) + found
        place += len(data)
        tail = (tail + data)[1 - len(what) :]
    return None


def _at(file: IO[bytes], place: int, count: int) -> bytes:
    file.seek(place)
    return file.read(count)
