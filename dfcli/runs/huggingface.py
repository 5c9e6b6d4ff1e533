"""Models made elsewhere: a Hugging Face folder as what a run is, and as a run.

    config.json                          the shape
    model.safetensors                    the weights, or several files and model.safetensors.index.json
    tokenizer.json                       the vocabulary, or vocab.json and merges.txt

The model is a GPT-2, or what `df runs export` writes of other GPTs (Apertus): `layouts.py`. Nothing that
could run code is opened: no pickle, no `modeling_*.py`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfcli.codecs import BPE, Chars, Codec
from dfcli.codecs.boundary import is_boundary
from dfcli.codecs.bpe import FILE as TOKENIZER
from dfcli.codecs.bpe import MAX_FILE
from dfcli.codecs.bytelevel import END_OF_TEXT, read_vocabulary
from dfcli.codecs.tokenizer_json import beginning
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.runs import layouts
from dfcli.runs import run as runs
from dfcli.runs.checkpoint import Checkpoint
from dfcli.runs.run import Run
from dfcli.system import limits
from dfcli.system.files import check_name, free_bytes, os_errors, read_bytes, remove_folder, strict_json

if TYPE_CHECKING:
    from torch import Tensor

    from dfcli.cores import GPTConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG = 16 << 20  # bytes of config.json and of an index; published ones have some KB
_HINT = "`df runs import` takes a GPT2LMHeadModel, or what `df runs export` writes"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt", "tf_model.h5")

BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # causal masks, which old files hold


def start(name_or_path: str) -> Run | Folder:
    """What a new training can start from: a run by its name or path, else a Hugging Face folder. Errors as of
    `Run.open` and `Folder`."""
    path = Path(name_or_path)
    try:
        return Run.open(name_or_path)
    except UsageError:
        with os_errors("read", path):
            if not path.is_dir():
                raise
    return Folder(path)


def import_folder(path: Path, name: str | None = None) -> Run:
    """A run of the data home with the folder's weights as its checkpoint of step 0.

    UsageError for a folder that is none, or a name that is taken; DfError where the model is not one that the GPT core
    can compute, or where memory or disk do not suffice; CorruptError for damaged files. Then nothing is left behind.
    """
    folder = Folder(path)
    name = check_name(name or re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name)[:80].strip("-.") or "imported", "run")
    runs.refuse_taken(name)
    config, home = folder.config, runs.runs_home()
    needed = 4 * config.parameters()
    if (free := free_bytes(home)) < needed:
        raise DfError(f"the run would take {needed / 1e9:.1f} GB, and {home} has {free / 1e9:.1f} GB free")
    model = folder.load("best").model
    run = Run.create(name, folder.info | {"parameters": config.parameters()}, folder.codec)
    try:
        with run.lock():
            run.save(0, model, {}, {"val_loss": None})
    except BaseException:
        remove_folder(run.path)
        raise
    return run


class Folder:
    """A Hugging Face folder, with the part of a run's interface that a training starts from. Raises as `import_folder`
    where config, tensors' names and shapes, or the vocabulary are not those of a GPT that the core can compute."""

    kind = "gpt"

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.name = self.path.name
        with os_errors("read", self.path):
            if not (self.path / CONFIG).exists():
                hint = "give a folder that has config.json, model.safetensors and tokenizer.json"
                raise UsageError(f"{self.path} is neither a run nor a Hugging Face folder: it has no {CONFIG}", hint)
        self._values = self._json(CONFIG)
        self._check_values()
        self._places = self._find_tensors()
        self.config = self._config()
        self._check_shapes()

    @property
    def info(self) -> dict[str, Any]:
        """What `run.json` would say of it."""
        begins = self._begins
        data = {  # a prompt is read as transformers reads it
            "name": "", "path": "", "fingerprint": "", "boundary": begins[0] if begins else None, "lines": False,
            "lead": max(1, len(begins)),
            "normalize": "none", "sources": [], "protocol": {},
        }  # fmt: skip
        core = {"name": "gpt", "config": asdict(self.config)}
        found = {"kind": "gpt", "preset": None, "core": core, "recipe": {}, "seed": 0, "init": None}
        return found | {"dataset": data, "imported": str(self.path)}

    @property
    def dataset(self) -> dict[str, Any]:
        """As `Run.dataset`: without a name, since the data it was trained on are not known."""
        return self.info["dataset"]

    @cached_property
    def _begins(self) -> list[int]:
        """The id that the tokenizer puts before a text, as often as it does; none where these are several."""
        if not self._has(TOKENIZER):
            return []
        found = beginning(read_vocabulary(self._inside(TOKENIZER), MAX_FILE, _HINT))
        alike = found and found.count(found[0]) == len(found)
        return found if alike and is_boundary(found[0], len(found), self.config.vocab_size) else []

    @cached_property
    def codec(self) -> Codec:
        """The vocabulary, with as many ids as the model has rows."""
        size = self.config.vocab_size
        if self._has(TOKENIZER):
            file = self._inside(TOKENIZER)
            codec = _characters(file) or BPE.open(file, size)
        elif self._has("vocab.json") and self._has("merges.txt"):
            codec = BPE(_joined(self._inside("vocab.json"), self._inside("merges.txt")), size)
        else:
            raise DfError(
                f"{self.path} has no vocabulary: neither tokenizer.json nor vocab.json and merges.txt",
                "put the tokenizer.json that the model was trained with into the folder",
            )
        if codec.vocab_size != size:
            raise DfError(f"the tokenizer.json of {self.path} has {codec.vocab_size:,} ids, and the model {size:,}")
        return codec

    def resolve(self, which: str | int) -> int:
        """As `Run.resolve`: its one checkpoint is that of step 0."""
        return 0

    def load(self, which: str | int = "best") -> Checkpoint:
        """The weights in float32, each on its own in memory. CorruptError where they are damaged or not finite."""
        from dfcli.runs import tensors

        needed, (free, _) = 4 * self.config.parameters(), limits.memory()
        if needed > free:
            raise DfError(f"the weights of {self.path} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        slots = {layouts.short(slot.name): slot for slot in layouts.slots(self.config)}
        model: dict[str, Tensor] = {}
        for file in sorted(set(self._places.values())):
            for name, tensor in tensors.each(file, self._places.keys()):
                slot = slots.get(layouts.short(name))
                if slot is not None and not slot.put(tensor, model):
                    what = "gains" if name.endswith("weight") else "an activation"
                    raise DfError(f"{name} of {self.path} holds {what} that the GPT core has not", _HINT)
        if not tensors.finite(model):
            raise CorruptError(f"{self.path} holds weights that are not finite", "fetch the folder again")
        if self.config.tied_head:
            model["head.weight"] = model["tokens.weight"]
        return Checkpoint(0, model, None, {"val_loss": None})

    # What the folder says -----------------------------------------------------------------------------------------

    def _check_values(self) -> None:
        """Refuse by name what the core does not compute."""
        kind = self._values.get("model_type", "gpt2")
        if not isinstance(kind, str) or kind not in layouts.TABLES:
            raise DfError(f"{self.path} holds a model of type {kind!a}", _HINT)
        for key, known in layouts.strangers(self._values):
            shown = json.dumps(self._values.get(key))[:60]
            raise DfError(f"{self.path / CONFIG} has {key} {shown}, which the GPT core has not", f"it has {known}")

    def _config(self) -> GPTConfig:
        try:
            return layouts.from_json(self._values, self._tied())
        except (ValueError, TypeError) as error:
            raise DfError(f"{self.path / CONFIG} describes a model that cannot be: {error}") from None

    def _tied(self) -> bool:
        """Whether the head is the token table: as transformers decides, by the config and by what is stored."""
        kind = self._values.get("model_type", "gpt2")
        if not self._values.get("tie_word_embeddings", kind == "gpt2"):
            return False
        table = next((name for name in self._places if layouts.short(name) == layouts.TABLES[kind]), None)
        if table is None or layouts.HEAD not in self._places:
            return True
        from dfcli.runs import tensors

        pair = [layouts.HEAD, table]
        head, tokens = (next(tensors.each(self._places[name], [name]))[1] for name in pair)
        return head.shape == tokens.shape and bool((head == tokens).all())

    def _find_tensors(self) -> dict[str, Path]:
        """The file of each tensor that is stored."""
        from dfcli.runs import tensors

        if self._has(WEIGHTS):
            files = [self._inside(WEIGHTS)]
        elif self._has(INDEX):
            places = self._json(INDEX).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise CorruptError(f"{self.path / INDEX} does not say which file holds which tensor")
            files = [self._inside(name) for name in sorted(set(places.values()))]
        else:
            raise self._without_weights()
        found: dict[str, Path] = {}
        for file in files:
            found |= dict.fromkeys(tensors.kinds(file), file)
        return found

    def _without_weights(self) -> DfError:
        pickled = next((name for name in PICKLED if self._has(name)), None)
        if pickled is None:
            return DfError(f"{self.path} has no {WEIGHTS}", "fetch the model again, in the safetensors format")
        path = str(self.path)
        return DfError(
            f"{self.path} has its weights in {pickled} alone, a format that can run code when it is opened",
            'make model.safetensors of it where transformers is installed: `python -c "from transformers import '
            f'AutoModelForCausalLM as M; M.from_pretrained({path!r}).save_pretrained({path!r})"`',
        )

    def _check_shapes(self) -> None:
        """Every tensor of the config, in its shape, and no other. Raises before memory is taken for any."""
        from dfcli.runs import tensors

        found = {}
        for file in set(self._places.values()):
            found |= {layouts.short(name): kind for name, kind in tensors.kinds(file).items()}
        if len(found) < len(self._places):
            raise CorruptError(f"{self.path} holds a tensor twice, with and without the prefix `transformer.`")
        wanted = {layouts.short(slot.name): slot.shape for slot in layouts.slots(self.config)}
        for name, shape in wanted.items():
            if name not in found:
                raise CorruptError(f"{self.path} lacks the tensor {name}", "fetch the folder again")
            dtype, stored = found[name]
            if stored != shape:
                raise CorruptError(f"{name} of {self.path} is {list(stored)} where {CONFIG} asks for {list(shape)}")
            if not dtype.is_floating_point:
                raise DfError(f"{name} of {self.path} is stored as {str(dtype).removeprefix('torch.')}", "use floats")
        ignored = {layouts.HEAD} if self.config.tied_head else set()
        others = sorted(name for name in found.keys() - wanted.keys() - ignored if not BUFFERS.fullmatch(name))
        if others:
            raise DfError(f"{self.path} holds {others[0]!a}, which the GPT core has not", _HINT)

    # Files --------------------------------------------------------------------------------------------------------

    def _has(self, name: str) -> bool:
        with os_errors("read", self.path):
            return os.path.lexists(self.path / name)

    def _inside(self, name: str) -> Path:
        """A file of the folder. DfError where its name or a link leads out of it; a link into the store of Hugging
        Face's cache, where such folders consist of links, is followed."""
        path = self.path / name
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise DfError(f"{self.path / INDEX} names {name!a}, which is not a file of the folder")
        with os_errors("read", path):
            real, folder = Path(os.path.realpath(path)), Path(os.path.realpath(self.path))
        allowed = [folder]
        if folder.parent.name == "snapshots":
            allowed.append(folder.parent.parent / "blobs")
        if real.parent not in allowed:
            raise DfError(f"{path} is a link that leaves the folder", "copy the file that is meant into the folder")
        return path

    def _json(self, name: str) -> dict[str, Any]:
        path = self._inside(name)
        try:
            return strict_json(read_bytes(path, MAX_CONFIG))
        except ValueError as error:
            raise CorruptError(f"{path} is damaged: {error}", "fetch the folder again") from None


def _characters(file: Path) -> Chars | None:
    """The alphabet of a tokenizer.json that has one token a character, as an export of such a run writes it."""
    try:
        model = strict_json(read_bytes(file, MAX_CONFIG)).get("model")
        if not isinstance(model, dict) or model.get("type") != "WordLevel":
            return None
        alphabet = "".join(sorted(model["vocab"]))
        if all(len(token) == 1 and model["vocab"][token] == i for i, token in enumerate(sorted(model["vocab"]))):
            return Chars(alphabet)
    except (DfError, ValueError, KeyError, TypeError):
        pass
    return None


def _joined(vocab: Path, merges: Path) -> bytes:
    """A tokenizer.json of GPT-2's two files. CorruptError where they do not fit together."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    try:
        ids = strict_json(read_bytes(vocab, MAX_CONFIG))
        lines = read_bytes(merges, MAX_CONFIG).decode("utf-8").splitlines()
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
        tokenizer = Tokenizer(models.BPE(ids, pairs))  # pyright: ignore[reportArgumentType]
    except Exception as error:  # the library raises nothing more specific
        message = error.message if isinstance(error, DfError) else str(error)
        raise CorruptError(f"{vocab} and {merges.name} are not GPT-2's vocabulary: {message}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if END_OF_TEXT in ids:
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer.to_str().encode("utf-8")
