"""README's replication table, from the results as they were run: `python -m tests.replications.table`."""

from __future__ import annotations

import json

from .replicate import RESULTS, ROWS


def table() -> str:
    """One line a row; rows without a result say so, with the command that would fill them."""
    lines = ["| model | published | ours | run | command |", "|---|---|---|---|---|"]
    for name, row in ROWS.items():
        file = RESULTS / f"{name}.json"
        command = f"`{' '.join(['df train', *row.train])}`"
        if not file.exists():
            lines.append(f"| {row.model} | {row.published} | not run yet | | {command} |")
            continue
        result = json.loads(file.read_text())
        figures = [f"{result['parameters']:,} parameters"]
        figures += [f"{key.replace('_', ' ')} **{value:.4f}**" for key, value in result["ours"].items()]
        note = f"; {result['note']}" if result["note"] else ""
        run = f"{result['steps']:,} steps, {result['train_seconds']:.0f} s, {result['machine']}, {result['date']}{note}"
        lines.append(f"| {row.model} | {row.published} | {'; '.join(figures)} | {run} | {command} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
