"""Words of the sentences that people read."""

from __future__ import annotations

from collections.abc import Iterable


def counted(n: int, thing: str) -> str:
    """1, "line" -> "1 line"; 2000, "line" -> "2,000 lines"."""
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def span(ids: int, sample_rate: int = 0, unit: str = "id") -> str:
    """So many ids; of sound, which has a sample rate in Hz, so many samples and ms: "511 samples (32 ms)"."""
    if not sample_rate:
        return counted(ids, unit)
    return f"{counted(ids, 'sample')} ({1000 * ids / sample_rate:,.0f} ms)"


def size(n: float) -> str:
    """Bytes as a person reads them: 1536000 -> "1.5 MB" (powers of 1000)."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= limit:
            return f"{n / limit:.1f} {unit}"
    return f"{n:.0f} B"


NAMED = 12  # names of a list in a hint


def close(word: str, known: Iterable[str]) -> str:
    """The name that was probably meant by `word`, which is none of `known`; "" where none is like it. Case, `-` and `_`
    make no difference."""
    from difflib import get_close_matches

    plain = {name.casefold().replace("_", "-"): name for name in known}
    found = get_close_matches(word.casefold().replace("_", "-"), plain, 1)
    return plain[found[0]] if found else ""


def closest(word: str, known: Iterable[str], introduction: str = "there are") -> str:
    """The hint for a `word` that is none of `known`: the name that was probably meant, and the names there are."""
    names = list(known)
    meant = close(word, names)
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    listed = f"{introduction} {', '.join(names[:NAMED])}{more}" if names else ""
    return " ".join(part for part in (f"did you mean `{meant}`?" if meant else "", listed) if part)


def first_line(error: Exception) -> str:
    """The first line of what an error says, after its kind; compilers say many lines."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
