"""`df data`: prepare, list, show, fetch and remove datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dfcli.cli import output
from dfcli.cli.figures import count, size
from dfcli.cli.layout import Command, Group
from dfcli.cli.options import Json, Yes, confirmed, mention_stdin, with_options
from dfcli.errors import UsageError
from dfcli.ingest.request import Request
from dfcli.system.files import check_name
from dfcli.system.words import counted

if TYPE_CHECKING:
    from dfcli.data.dataset import Dataset

app = typer.Typer(cls=Group, no_args_is_help=True, help="Prepare, list, show, fetch and remove data.")

MEASURED = 500_000  # tokens that `df data show` measures an encoding on


@app.command(cls=Command)
@with_options(Request)
def prepare(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="Files and folders; `-` is standard input.")],
    **options: Any,
) -> None:
    """Turn text or audio into a dataset of token ids, ready to train on.

    `df train --data` does this by itself. Prepare the data first to name the
    dataset or to choose its options.

    Examples:
      df data prepare shakespeare.txt
      df data prepare names.txt --lines --name names
      df data prepare corpus.jsonl.gz --field text
      df data prepare book.txt --codec bpe --vocab-size 4096
      df data prepare recordings/ --sample-rate 8000 --label folder
      cat *.md | df data prepare - --name notes --codec bytes
    """
    from dfcli.ingest.prepare import prepare

    request = Request(**options)
    mention_stdin(sources)
    with output.Listener() as listener, prepare(sources, **request.arguments, on_event=listener) as dataset:
        listener.close()
        splits = ", ".join(f"{split.name} {count(split.tokens_count)}" for split in dataset.splits.values())
        output.say(f"dataset {dataset.name}: {splits} tokens")
        kind = "gpt" if dataset.kind == "text" else "wavenet"
        output.say(f"next: df train {kind} --data {dataset.name}", style="bold")


@app.command("list", cls=Command)
def list_(json: Json = False) -> None:
    """List all prepared datasets, with their size and the runs that need them.

    Examples:
      df data list
    """
    from dfcli.data.dataset import list_datasets
    from dfcli.ingest.reuse import users_of
    from dfcli.ingest.sources import list_some

    with output.Listener() as listener:
        datasets = list_datasets(listener)
    runs = users_of(datasets)
    if json:
        output.write_json({"datasets": [_facts(dataset) | {"runs": runs[dataset.name]} for dataset in datasets]})
        return
    if not datasets:
        output.say("there are no datasets yet; `df data prepare` makes one, and so does `df train`")
        return
    rows = [
        (
            dataset.name,
            dataset.kind,
            dataset.info["codec"]["name"],
            *(count(dataset.splits[s].tokens_count) if s in dataset.splits else "-" for s in ("train", "val")),
            count(_given(dataset)),
            size(_size(dataset)),
            list_some(runs[dataset.name]) or "-",
        )
        for dataset in datasets
    ]
    right = ("TRAIN", "VAL", "DOCUMENTS", "SIZE")
    output.table(("NAME", "KIND", "CODEC", "TRAIN", "VAL", "DOCUMENTS", "SIZE", "RUNS"), rows, right)
    if unused := sum(not users for users in runs.values()):
        output.say(f"{counted(unused, 'dataset')} without a run; `df data remove --unused` removes them")


def _facts(dataset: Dataset) -> dict[str, Any]:
    """The facts of a dataset for `--json`."""
    return {
        "dataset": dataset.name,
        "path": str(dataset.path),
        "kind": dataset.kind,
        "codec": dataset.info["codec"]["name"],
        "vocab_size": dataset.vocab_size,
        "tokens": {name: split.tokens_count for name, split in dataset.splits.items()},
        "documents": _given(dataset),
        "created": dataset.info["created"],
        "size_bytes": _size(dataset),
    }


def _size(dataset: Dataset) -> int:
    return sum(file.stat().st_size for file in dataset.path.iterdir() if file.is_file())


def _given(dataset: Dataset) -> int:
    """The documents that it was made of: not twice one that is cut into splits, or that two splits share."""
    facts = dataset.info["facts"]
    return facts.get("documents") or facts.get("lines") or facts.get("recordings") or dataset.info["sources"]["count"]


@app.command(cls=Command)
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A dataset's name or folder.")], json: Json = False
) -> None:
    """Show a dataset: its codec, its splits and the files that were left out.

    Examples:
      df data show names
    """
    from dfcli.data.dataset import Dataset
    from dfcli.ingest.reuse import recorded
    from dfcli.ingest.sources import list_some

    with Dataset.open(name) as dataset:
        if json:
            output.write_json(_facts(dataset) | {"info": dataset.info})
            return
        items: list[tuple[str, object]] = [
            ("dataset", dataset.name),
            ("path", dataset.path),
            ("kind", dataset.kind),
            ("codec", f"{dataset.info['codec']['name']}, {counted(dataset.vocab_size, 'id')}"),
            ("sources", list_some([source[1] for source in recorded(dataset)])),
            ("documents", _documents(dataset)),
            ("boundary", _boundary(dataset)),
            *(_names(label, names) for label, names in dataset.labels.items()),
        ]
        items += [
            (name, f"{count(split.tokens_count)} tokens, documents: {count(split.documents)}{_fidelity(dataset, name)}")
            for name, split in dataset.splits.items()
        ]
        info = dataset.info
        left_out = info["skipped"]["count"]
        skipped = [f"{file['name']} ({file['reason']})" for file in info["skipped"]["files"]]
        items += [
            ("split", info["split_rule"]),
            ("found", ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in info["facts"].items())),
            ("skipped", f"{count(left_out)}{': ' if skipped else ''}{list_some(skipped, left_out)}"),
            ("created", info["created"]),
        ]
        output.pairs(items + _tokens(dataset))


def _documents(dataset: Dataset) -> str:
    """What a document of the dataset is."""
    options = dataset.info["options"]
    if options.get("separator") is not None:
        return f"the parts between {options['separator']!r}"
    if options.get("field") is not None:
        return f"the field {options['field']!r} of each record"
    return "one a line" if dataset.lines else "one a source"


def _tokens(dataset: Dataset) -> list[tuple[str, object]]:
    """How much text a token of a byte-pair encoding holds, beside GPT-2's where its files are at hand."""
    from dfcli.codecs import BPE, GPT2, TextCodec
    from dfcli.ingest.download import corpus_path

    codec = dataset.codec
    if not isinstance(codec, BPE | GPT2):
        return []
    split = dataset.splits.get("val") or next(iter(dataset.splits.values()))
    ids = split.read(0, min(split.tokens_count, MEASURED))
    text = codec.decode(ids)
    folder = corpus_path("gpt2-bpe")
    codecs: dict[str, TextCodec] = {codec.name: codec}
    if folder is not None:
        codecs["gpt2"] = GPT2(folder)
    figures = (f"{name} {len(text.encode()) / len(each.encode(text)):.3f}" for name, each in codecs.items())
    items: list[tuple[str, object]] = [("bytes a token", f"{', '.join(figures)} ({split.name} split)")]
    if isinstance(codec, BPE):
        items.append(("longest tokens", " ".join(map(repr, codec.longest(20)))))
    return items


def _names(label: str, names: list[str]) -> tuple[str, str]:
    from dfcli.ingest.sources import list_some

    return f"label {label}", f"{counted(len(names), 'name')}: {list_some(names)}"


def _fidelity(dataset: Dataset, split: str) -> str:
    """What the codec's noise is, and what FLAC needs, as far as the dataset says."""
    found = dataset.info.get("fidelity", {}).get(split)
    if found is None:
        return ""
    noise = "" if found["snr"] is None else f"; signal to quantisation noise {found['snr']:.1f} dB"
    return f"{noise}; FLAC {found['flac_bits_per_sample']:.2f} bits a sample"


def _boundary(dataset: Dataset) -> str:
    if dataset.boundary is None:
        return "none"
    return f"id {dataset.boundary}, before each document{' and after the last of a split' if dataset.lines else ''}"


@app.command(cls=Command)
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help="shakespeare, names or gpt2-bpe.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Also write the plain file here.")
    ] = None,
) -> None:
    """Fetch a public corpus or vocabulary, checked against its known hash.

    Afterwards its name works as `--data`: tiny shakespeare (1.1 MB), makemore's
    names (0.2 MB). gpt2-bpe is the vocabulary of `--codec gpt2`.

    Examples:
      df data get shakespeare -o shakespeare.txt
      df train gpt --data shakespeare.txt
    """
    from dfcli.ingest.download import get

    with output.Listener() as listener:
        path = get(name, out=out, on_event=listener)
    output.write(f"{path}\n")


@app.command(cls=Command)
def remove(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="The datasets' names.")] = None,
    unused: Annotated[
        bool, typer.Option("--unused", metavar="", help="Remove every dataset that no run was trained on.")
    ] = False,
    yes: Yes = False,
) -> None:
    """Remove prepared datasets. Their sources are not touched.

    Examples:
      df data remove names
      df data remove --unused
    """
    from dfcli.data.dataset import Dataset, folder_of, remove_dataset
    from dfcli.ingest.reuse import unused_datasets
    from dfcli.ingest.sources import list_some
    from dfcli.runs import list_runs

    if bool(names) == unused:
        raise UsageError("give either names of datasets or `--unused`", "`df data list` shows what is prepared")
    names = names or unused_datasets()
    if not names:
        output.say("there is no dataset without a run")
        return
    for name in names if len(names) > 1 else ():  # nothing is removed where one of the names is wrong
        check_name(name, "dataset")
        Dataset.open(name).close()
    needs: dict[str, str] = {}
    for name in names:
        folder_of(name)
        trained = [f"`{run.name}`" for run in list_runs() if run.info.get("dataset", {}).get("name") == name]
        needs[name] = f", which `df eval` needs for {list_some(trained)}" if trained else ""
    listed = ", ".join(f"the dataset `{name}`{need}" for name, need in needs.items())
    if not confirmed(f"remove {listed}", yes):
        output.say("nothing was removed")
        raise typer.Exit(1)
    for name, need in needs.items():
        remove_dataset(name)
        output.say(f"removed the dataset `{name}`{need}")
