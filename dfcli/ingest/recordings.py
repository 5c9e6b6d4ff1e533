"""Recordings to a dataset. Each is decoded once, into one file of ids that is dealt out afterwards, because only
decoding tells which of them can be used.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from dfcli.codecs import MuLaw
from dfcli.data.dataset import BLOCK
from dfcli.errors import DfError, UsageError
from dfcli.ingest.audio import Recording
from dfcli.ingest.build import Build, Made, Writers
from dfcli.ingest.containers import unusable
from dfcli.ingest.fidelity import Fidelity, FidelityMeter, summary
from dfcli.ingest.labels import untrained
from dfcli.ingest.metering import Report
from dfcli.ingest.sources import Source, list_some, nothing_usable
from dfcli.ingest.splits import TRAIN
from dfcli.system.events import Choice, Note, OnEvent
from dfcli.system.words import counted

MAX_RATE = 16_000  # Hz that are chosen without being asked for
CLIPPED = 0.001  # share of samples at full scale from which on a recording is reported
QUIET = 0.1  # peak of the loudest recording below which a usual level is recommended
OFF_CENTRE = 0.01  # mean level from which on a recording is reported, full scale being 1
ODD = {  # what recordings can be, as the facts of a dataset count them
    "silent": "silent",
    "beyond_scale": "louder than full scale, 1,{peak} and cut off there: `df data prepare` with `--normalize peak` "
    "keeps all",
    "clipped": f"clipped (over {CLIPPED:.1%} of the samples at full scale)",
    "off_centre": f"off-centre (mean level beyond {OFF_CENTRE:.0%} of full scale)",
    "incomplete": "not as its header says",
}


class Sound(NamedTuple):
    """A recording that was decoded: where its ids lie in the file of all ids."""

    source: Source
    start: int
    samples: int
    report: Report
    fidelity: Fidelity
    labels: tuple[int, ...]
    contents: bytes
    """The hash of its ids."""


class Recordings(Build):
    """A preparation of recordings."""

    kind = "audio"

    def _encode(self, folder: Path) -> Made:
        groups = [[found for source in group if (found := self._probe(source))] for group in self._groups]
        if not groups[TRAIN]:
            raise nothing_usable(self._skipped, self._options.purpose)
        labelling = self._options.labelling
        names, self._labels = (
            (None, {}) if labelling is None else labelling.number(source for group in groups for source, _ in group)
        )
        codec = self._audio_codec([recording.rate for group in groups for _, recording in group])
        seconds = sum((recording.frames or 0) / recording.rate for group in groups for _, recording in group)
        path = folder / "recordings.ids"
        self._begin()
        with path.open("w+b") as ids:
            sounds = [
                [sound for found in group if (sound := self._decode(*found, codec, ids, seconds))] for group in groups
            ]
            self._without_copies(sounds, lambda sound: sound.contents, lambda sound: sound.source)
            if not sounds[TRAIN]:
                raise nothing_usable(self._skipped, self._options.purpose)
            if all(sound.report.silent for sound in sounds[TRAIN]) and not self._options.whole:
                names = list_some([sound.source.name for sound in sounds[TRAIN]])
                raise DfError(f"there is only silence to learn from: {names}", "give recordings with sound in them")
            writers = self._open_writers(folder, codec.dtype)
            rule, in_split = self._write_recordings(codec, sounds, writers, ids)
        path.unlink()
        every = [sound for group in sounds for sound in group]
        fidelity = {split: summary(sound.fidelity for sound in found) for split, found in in_split.items()}
        trained = [sound.labels for sound in in_split.get("train", ())]
        if names is not None and trained and (missing := untrained(names, trained)):
            self._on_event(Note(f"no training recording has {list_some(missing)}"))
        rule = self._complete(rule, "recording")
        return Made(codec, codec.zero_level, rule, self._levels(every, codec), names, fidelity)

    def _probe(self, source: Source) -> tuple[Source, Recording] | None:
        try:
            return source, Recording(source.path or source.open)
        except DfError as error:
            self._refuse(source, error)
            return None

    def _refuse(self, source: Source, error: DfError) -> None:
        """Skip a recording that cannot be used; raises if the user named it."""
        if source.given:
            raise unusable(source.name, source.name if source.path else "", error) from None
        self._skip(source, error.message)

    def _audio_codec(self, found: list[int]) -> MuLaw:
        codec, wanted = self._options.codec, self._options.sample_rate
        if isinstance(codec, MuLaw):
            if wanted not in (None, codec.sample_rate):
                raise UsageError(f"the codec is one of {codec.sample_rate:,} Hz", "leave out `--sample-rate`")
            return codec
        if wanted is not None:
            return MuLaw(wanted, self._options.quantizer, self._options.mulaw_levels)
        counts = Counter(found)
        common = max(counts, key=lambda rate: (counts[rate], -rate))
        rate = min(common, MAX_RATE)
        if len(counts) == 1:
            have, rest = "all recordings have" if len(found) > 1 else "the recording has", ""
        else:
            have = f"{counts[common]:,} of {len(found):,} recordings {'has' if counts[common] == 1 else 'have'}"
            as_many = [f"{rate:,} Hz" for rate in sorted(counts) if counts[rate] == counts[common] and rate != common]
            rest = f", and as many have {list_some(as_many)}: the lower rate is taken" if as_many else ", the most"
        reason = f"{have} it{rest}"
        if rate < common:
            reason = f"the highest that is chosen here; {have} {common:,} Hz{rest}"
        self._on_event(Choice("sample rate", f"{rate:,} Hz", reason))
        return MuLaw(rate, self._options.quantizer, self._options.mulaw_levels)

    def _decode(
        self, source: Source, recording: Recording, codec: MuLaw, ids: IO[bytes], seconds: float
    ) -> Sound | None:
        """Append the ids of a recording to the file of all. None, and nothing appended, where it cannot be used."""
        start, meter, digest = ids.tell(), FidelityMeter(codec), hashlib.sha256()
        try:
            self._sha256[source] = source.sha256()
            for block in recording.stream(codec.sample_rate, self._options.normalize):
                encoded = codec.encode(block)
                meter.add(block, encoded)
                data = encoded.tobytes()
                digest.update(data)
                ids.write(data)
                self._progress("encoding", len(block) / codec.sample_rate, seconds, "seconds of audio")
            assert recording.report is not None
            samples = (ids.tell() - start) // codec.dtype.itemsize
            labels = self._labels.get(source, ())
            return Sound(source, start, samples, recording.report, meter.close(), labels, digest.digest())
        except DfError as error:
            ids.seek(start)
            ids.truncate()
            self._refuse(source, error)
            return None

    def _write_recordings(
        self, codec: MuLaw, sounds: list[list[Sound]], writers: list[Writers], ids: IO[bytes]
    ) -> tuple[str, dict[str, list[Sound]]]:
        """Each recording is a document; few are cut by position (see `_plan`). The rule, and the recordings that each
        split has (part of)."""
        in_split: dict[str, list[Sound]] = {}
        plan, rule = self._plan(sounds, lambda sound: sound.samples, writers, "recording")
        self._tell_held_out(plan, writers)
        for sound, portions in plan:
            ids.seek(sound.start)
            for destinations, size in portions:
                for writer in destinations:
                    writer.append(np.array([codec.zero_level]))
                for done in range(0, size, BLOCK):
                    count = min(BLOCK, size - done)
                    block = np.frombuffer(ids.read(count * codec.dtype.itemsize), codec.dtype)
                    for writer in destinations:
                        writer.append(block)
                for writer in destinations:
                    if writer.end_document(sound.labels):
                        in_split.setdefault(writer.name, []).append(sound)
        return rule, in_split

    def _levels(self, sounds: list[Sound], codec: MuLaw) -> dict[str, Any]:
        """What the recordings sound like; what is wrong with them is told."""
        plain = self._options.normalize == "none"
        odd = {
            "silent": [sound for sound in sounds if sound.report.silent],
            "beyond_scale": [sound for sound in sounds if sound.report.peak > 1 and plain],
            "clipped": [
                sound for sound in sounds if plain and sound.report.clipped > CLIPPED and sound.report.peak <= 1
            ],
            "off_centre": [
                sound for sound in sounds if abs(sound.report.offset) > OFF_CENTRE and not sound.report.silent
            ],
            "incomplete": [sound for sound in sounds if sound.report.notes],
        }
        peak = max(sound.report.peak for sound in sounds)
        for what, found in odd.items():
            if found:
                names = [sound.source.name for sound in found]
                if what == "incomplete":
                    names = [f"{sound.source.name} ({'; '.join(sound.report.notes)})" for sound in found]
                told = _odd(what, len(found), len(sounds), f" with samples of up to {peak:,.4g},")
                self._on_event(Note(f"{told}: {list_some(names)}"))
        if plain and peak < QUIET and len(odd["silent"]) < len(sounds):
            places = [sound.source.name for sound in sounds]
            place = shlex.quote(places[0] if len(places) == 1 else os.path.dirname(places[0]) or ".")
            quiet = f"the recordings are quiet: the loudest reaches {peak:.1%} of full scale, and samples will too"
            self._on_event(Note(f"{quiet}; `df data prepare {place} --normalize peak` raises each to full scale"))
        seconds = sum(sound.samples for sound in sounds) / codec.sample_rate
        return {"recordings": len(sounds), "seconds": seconds, **{what: len(found) for what, found in odd.items()}}


def note_odd(facts: dict[str, Any], on_event: OnEvent) -> None:
    """Tell again what is wrong with the recordings of a dataset, as its facts count it."""
    for what in ODD:
        if found := facts.get(what):
            on_event(Note(_odd(what, found, facts["recordings"])))


def _odd(what: str, found: int, of: int, peak: str = "") -> str:
    share = f"{found:,} of {counted(of, 'recording')} {'is' if found == 1 else 'are'}"
    return f"{share} {ODD[what].format(peak=peak)}"
