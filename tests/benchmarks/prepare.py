"""How fast data is prepared: MB of text a second, audio over real time, and whether the memory stays flat.

    python -m tests.benchmarks.prepare --data shakespeare.txt [--audio fsdd/] [--bpe gpt2-bpe/] [--megabytes 200]

The text is repeated to `--megabytes` (for GPT-2's byte pairs a tenth of it), the recordings to `--audio-minutes`. Each
preparation runs in a process of its own, reading, writing and hashing included, but not Python's start. Memory is the
most that the process had of its own, without pages of files: flat means that it is no larger than for a quarter of the
data. Characters, bytes and lines take one core; byte pairs take all, beside them tiktoken alone on the same text, the
best of some rounds each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import common

ROUNDS = 4


def prepare(source: Path, options: dict[str, Any]) -> tuple[float, float]:
    """Seconds to prepare a source, and seconds of processors' time."""
    from dfcli.ingest.prepare import prepare

    began, busy = time.perf_counter(), time.process_time()
    prepare([str(source)], **options).close()
    return time.perf_counter() - began, time.process_time() - busy


def tiktoken_alone(text: Path, bpe: Path) -> float:
    """Seconds of the library over all cores, with its own loader and expression."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # it would copy the files
    ranks = data_gym_to_mergeable_bpe_ranks(str(bpe / "vocab.bpe"), str(bpe / "encoder.json"))
    merger = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    whole = text.read_text(encoding="utf-8")
    pieces = [whole[start : start + 2**16] for start in range(0, len(whole), 2**16)]
    began = time.perf_counter()
    merger.encode_ordinary_batch(pieces, num_threads=os.cpu_count() or 1)
    return time.perf_counter() - began


def recording(folder: Path, target: Path, seconds: float) -> float:
    """Write one long recording: those of `folder` one after the other, again and again. Gives its seconds."""
    import soundfile

    parts = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".wav", ".flac")]
    rate = soundfile.info(parts[0]).samplerate
    written = 0
    with soundfile.SoundFile(target, "w", rate, 1, "PCM_16") as file:
        while written < seconds * rate:
            for path in parts:
                samples, _ = soundfile.read(path, always_2d=True)
                file.write(samples[:, 0])
                written += len(samples)
                if written >= seconds * rate:
                    break
    return written / rate


def measure(large: Path, small: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds for the large source, and the memory for it and for its quarter."""
    _, before = common.in_child(prepare, small, options)
    (seconds, busy), after = common.in_child(prepare, large, options)
    return {
        "seconds": seconds,
        "processor_seconds": busy,
        "megabytes_of_memory": after / 1e6,
        "megabytes_for_a_quarter": before / 1e6,
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--data", required=True, type=Path, help="a text that is repeated")
    parser.add_argument("--audio", type=Path, help="a folder of recordings; the built-in melodies by default")
    parser.add_argument("--bpe", type=Path, help="folder of GPT-2's encoder.json and vocab.bpe")
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--audio-minutes", type=float, default=60.0)
    given = parser.parse_args(words)
    figures: dict[str, Any] = {"benchmark": "prepare"}
    with common.home() as home:
        size = int(given.megabytes * 1e6)
        text, quarter = (common.repeated(given.data, home / f"{n}.txt", n) for n in (size, size // 4))
        for name, options in {
            "chars": {"codec": "chars"},
            "bytes": {"codec": "bytes"},
            "lines": {"codec": "chars", "lines": True},
        }.items():
            found = measure(text, quarter, options)
            figures[name] = {
                "megabytes_per_second": text.stat().st_size / 1e6 / found["seconds"],
                "megabytes_per_processor_second": text.stat().st_size / 1e6 / found["processor_seconds"],
                **found,
            }
        if given.bpe:
            text, quarter = (common.repeated(given.data, home / f"bpe-{n}.txt", n) for n in (size // 10, size // 40))
            options = {"codec": "gpt2", "bpe": str(given.bpe)}
            found = measure(text, quarter, options)
            ours, alone = [], []  # in turns, and of each the best: on a shared machine one look says little
            for k in range(ROUNDS):
                ours.append(common.in_child(prepare, text, options | {"name": f"again-{k}"})[0][0])
                alone.append(common.in_child(tiktoken_alone, text, given.bpe)[0])
            figures["gpt2"] = {
                "megabytes_per_second": text.stat().st_size / 1e6 / min(ours),
                "tiktoken_megabytes_per_second": text.stat().st_size / 1e6 / min(alone),
                "over_tiktoken": min(alone) / min(ours),
                "all_seconds": ours,
                "all_tiktoken_seconds": alone,
                **found,
            }
        figures |= audio(given.audio, home, 60 * given.audio_minutes)
    common.report(figures)


def audio(folder: Path | None, home: Path, seconds: float) -> dict[str, Any]:
    """The figures of one long recording as it is and at twice its rate, and of the folder as it is."""
    import soundfile

    from dfcli.ingest.builtin import builtin_sources

    folder = folder or builtin_sources("audio")[0]
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".wav", ".flac")]
    all_seconds = sum(soundfile.info(path).duration for path in files)
    long, quarter = home / "long.wav", home / "quarter.wav"
    recording(folder, quarter, seconds / 4)
    length = recording(folder, long, seconds)
    rate = soundfile.info(long).samplerate
    figures = {}
    for name, options in {"audio": {}, "audio_resampled": {"sample_rate": 2 * rate}}.items():
        found = measure(long, quarter, options)
        figures[name] = {"times_real_time": length / found["seconds"], "sample_rate": rate, **options, **found}
    (took, _), _ = common.in_child(prepare, folder, {})
    figures["audio_folder"] = {"times_real_time": all_seconds / took, "recordings": len(files), "seconds": took}
    return figures


if __name__ == "__main__":
    main()
