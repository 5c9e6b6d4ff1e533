from __future__ import annotations

import json
import math
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfcli.codecs import Bytes, MuLaw
from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.runs import Run, checkpoint, list_runs, newest, remove
from dfcli.runs.run import refuse_taken
from dfcli.system import files
from dfcli.system.events import Note
from tests.faults import failing
from tests.runs.small import CONFIG, make_run, same, save, tree, weights


def rewrite(path: Path, **changes: object) -> None:
    files.write_json(path, files.read_json(path) | changes)


# Creating and opening


def test_a_run_comes_back(home: Path):
    made = make_run("names-1", recipe={"lr": 1e-3}, dataset={"name": "names"})
    run = Run.open("names-1")
    assert run.path == home / "runs" / "names-1"
    assert run.name == "names-1"
    assert run.kind == "gpt"
    assert run.info == made.info
    assert run.info["format"] == 1
    assert run.info["recipe"] == {"lr": 1e-3}
    assert run.info["versions"].keys() >= {"python", "torch"}
    assert run.codec.to_json() == {**run.info["codec"]}
    assert run.codec.vocab_size == 3
    assert run.steps() == []
    assert run.metrics() == []
    assert run.size_bytes() == sum(path.stat().st_size for path in run.path.iterdir())


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "con", "x" * 200, "a\x1b[2J"])
def test_a_name_cannot_leave_the_data_home(home: Path, name: str):
    with pytest.raises(UsageError, match="cannot be the name of a run"):
        make_run(name)
    with pytest.raises(UsageError, match="cannot be the name of a run"):
        remove(name)
    assert not home.exists()


def test_a_taken_name_is_refused_in_any_case():
    run = make_run("Alice")
    before = tree(run.path)
    with pytest.raises(UsageError, match="a run `Alice` already") as error:
        make_run("Alice")
    assert error.value.hint == "choose another name"
    with pytest.raises(UsageError, match="a run `Alice` already") as error:
        refuse_taken("Alice", "continue it")  # what the caller can do
    assert error.value.hint == "continue it"
    with pytest.raises(UsageError, match="a run `Alice` already") as error:
        refuse_taken("alice", "continue it")
    assert error.value.hint == "choose another name"
    assert tree(run.path) == before


def test_a_run_is_opened_by_name_before_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run("r", seed=1)
    copy = tmp_path / "elsewhere" / "r"
    shutil.copytree(run.path, copy)
    rewrite(copy / "run.json", seed=2)
    monkeypatch.chdir(copy.parent)
    assert Run.open("r").info["seed"] == 1
    assert Run.open("./r").info["seed"] == 2
    assert Run.open(str(copy)).info["seed"] == 2
    assert Run.open(copy).path == copy


def test_a_copied_run_needs_no_data_home(tmp_path: Path, home: Path):
    run = make_run()
    save(run, 7, 1.5)
    run.log({"step": 7})
    copy = tmp_path / "copy"
    shutil.copytree(run.path, copy)
    shutil.rmtree(home)
    opened = Run.open(copy)
    assert opened.name == "copy"
    assert opened.metrics() == [{"step": 7}]
    core, saved = opened.build()
    assert saved.step == 7
    assert same(dict(core.state_dict()), weights(7))
    save(opened, 8, 1.4)
    assert opened.steps() == [7, 8]
    assert not home.exists()


@pytest.mark.parametrize("name", ["x", "./x", "../../etc", "x" * 5000, "a\0b", "~nobody/x", ""])
def test_no_such_run(name: str):
    make_run("alice")
    with pytest.raises(DfError) as error:
        Run.open(name)
    assert name[:200] in error.value.message or "name" in error.value.message


def test_no_such_run_tells_what_there_is():
    with pytest.raises(UsageError, match="no run `x`") as error:
        Run.open("x")
    assert "df train" in error.value.hint
    make_run("alice")
    with pytest.raises(UsageError, match="no run `x`") as error:
        Run.open("x")
    assert "alice" in error.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"core": None}, {"core": {"name": "gpt"}}, {"core": {"name": 1, "config": {}}}, {"kind": 1}, {"codec": []},
        {"format": 0}, {"dataset": "x"}, {"recipe": []},
    ],
)  # fmt: skip
def test_a_run_json_that_describes_no_run_is_damage(changes: dict[str, object]):
    run = make_run()
    rewrite(run.path / "run.json", **changes)
    with pytest.raises(CorruptError, match=r"run\.json"):
        Run.open("r")


DATA = {"name": "d", "path": "/d", "fingerprint": "", "normalize": "none", "boundary": 2, "lead": 1, "lines": False}


def test_what_it_says_of_its_data_is_checked_when_that_is_asked_for():
    assert make_run(dataset=DATA).dataset == DATA
    without: dict[str, object] = {}
    wrong: dict[str, object] = {"boundary": 3, "lead": 0, "lines": 1, "path": None}  # there are 3 ids
    for changed in (without, *(DATA | {key: value} for key, value in wrong.items())):
        rewrite(Run.open("r").path / "run.json", dataset=changed)
        with pytest.raises(CorruptError, match=r"run\.json.*describe the data"):
            assert Run.open("r").dataset


def test_a_codec_that_is_not_the_models_is_refused():
    run = make_run()
    save(run, 1)
    rewrite(run.path / "run.json", codec={"name": "chars", "alphabet": "ab"})
    with pytest.raises(CorruptError, match="codec does not fit"):
        Run.open("r").build()


def test_a_newer_run_is_refused():
    run = make_run()
    rewrite(run.path / "run.json", format=2)
    with pytest.raises(DfError, match="format 2") as error:
        Run.open("r")
    assert not isinstance(error.value, CorruptError)


# Checkpoints


def test_a_checkpoint_comes_back():
    run = make_run()
    model, optimizer = weights(1), {"a": torch.arange(3.0), "step": torch.tensor(5)}
    state = {"val_loss": 1.25, "seconds": 0.1 + 0.2, "nested": {"list": [1, None]}}
    path = run.save(500, model, optimizer, state)
    assert path == run.path / "step-00000500"
    assert sorted(os.listdir(path)) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    saved = Run.open("r").load(optimizer=True)
    assert saved.step == 500
    assert same(saved.model, model)
    assert saved.optimizer is not None
    assert same(saved.optimizer, optimizer)
    assert saved.state == state
    assert run.state(500) == state
    assert run.load().optimizer is None


def test_tied_weights_are_kept_once_and_tied_again():
    run = make_run()
    path = save(run, 1)
    raw = (path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert ("tokens.weight" in header) + ("head.weight" in header) == 1
    core, saved = run.build()
    state = dict(core.state_dict())
    assert saved.model.keys() == state.keys() >= {"tokens.weight", "head.weight"}
    assert state["tokens.weight"].data_ptr() == state["head.weight"].data_ptr()
    assert same(state, weights(1))
    save(run, 2)
    run.save(3, saved.model, {}, {})  # what was loaded can be saved again
    assert same(run.load(3).model, weights(1))
    copies = {name: tensor.clone() for name, tensor in weights(4).items()}  # as fetched from a GPU
    run.save(4, copies, {}, {})
    assert same(run.load(4).model, weights(4))


@pytest.mark.parametrize("core", ["gpt", "wavenet", "charwavenet"])
def test_every_core_is_rebuilt_without_touching_the_random_state(core: str):
    from dfcli import cores
    from dfcli.codecs import Chars

    config = {"wavenet": {"dilations": [1, 2], "cycles": 1, "residual": 4, "skip": 4, "head": 4}}.get(core, {})
    if core == "gpt":
        config = {"context": 4, "layers": 1, "heads": 1, "channels": 2, "position": "rotary", "tied_head": False}
    config = {"vocab_size": 3, **config}
    torch.manual_seed(3)
    module = cores.build(core, config)
    run = Run.create("r", {"kind": "x", "core": {"name": core, "config": config}}, Chars("abc"))
    run.save(1, module.state_dict(), {}, {})
    torch.manual_seed(5)
    before = torch.get_rng_state()
    built, _ = Run.open("r").build()
    assert torch.equal(torch.get_rng_state(), before)
    assert not built.training
    ids = torch.tensor([[0, 1, 2, 1]])
    assert torch.equal(built(ids), module.eval()(ids))


def test_reading_does_not_import_the_compiler():
    """That takes seconds, and torch is quick to ask for it (on the meta device, for one)."""
    run = make_run()
    save(run, 1)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dfcli.runs import Run, rebuild\n"
        "from tests.cores.variants import VARIANTS\n"
        "Run.open('r').build()\n"
        "for name, config in VARIANTS.values():\n"
        "    rebuild.Blueprint({'name': name, 'config': config}, Path('x')).layout\n"
        "assert not {'torch._dynamo', 'torch._inductor', 'sympy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_tensors_that_could_not_be_loaded_are_not_saved():
    run = make_run()
    half = {name: tensor.half() for name, tensor in weights(1).items()}
    with pytest.raises(ValueError, match="not those of the core"):
        run.save(1, half, {}, {})
    with pytest.raises(KeyError):
        run.save(1, {}, {}, {})
    with pytest.raises(ValueError, match="JSON"):
        run.save(1, weights(1), {}, {"val_loss": math.nan})
    assert run.steps() == []


def test_the_best_and_the_last_two_are_kept():
    run = make_run()
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}
    kept = []
    for step, loss in losses.items():
        save(run, step, loss)
        kept.append(run.steps())
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
    assert run.resolve("best") == 2
    assert run.resolve("last") == 5
    assert run.resolve(4) == run.resolve("4") == 4
    assert same(run.load().model, weights(2))
    assert same(run.load("last").model, weights(5))
    assert same(run.load(4).model, weights(4))
    save(run, 6, 0.5)
    assert run.steps() == [5, 6]


def test_without_validation_the_last_is_the_best():
    run = make_run()
    save(run, 1)
    save(run, 2)
    assert run.resolve("best") == 2
    assert run.steps() == [1, 2]


def test_of_equal_losses_the_later_is_the_best():
    run = make_run()
    for step in (1, 2, 3, 4):
        save(run, step, 1.0)
    assert run.resolve("best") == 4
    assert run.steps() == [3, 4]


def test_a_run_that_went_back_gives_up_the_later_steps():
    run = make_run()
    for step, loss in ((100, 3.0), (200, 2.0), (300, 1.0)):
        save(run, step, loss)
    assert run.steps() == [200, 300]
    save(run, 250, 1.5)
    assert run.steps() == [200, 250]
    assert run.resolve("best") == 250


def test_the_history_is_durable_before_the_checkpoint():
    run = make_run()
    run.log({"step": 1})
    with failing(0) as faults:
        save(run, 1)
    assert faults.calls[0] == f"open {run.path / 'metrics.jsonl'}"
    assert faults.calls[1].startswith("fsync")


def test_the_same_step_again_replaces_the_first():
    run = make_run()
    save(run, 1, 3.0)
    run.save(1, weights(9), {}, {"val_loss": 2.0})
    assert run.steps() == [1]
    assert run.state(1) == {"val_loss": 2.0}
    assert same(run.load(1).model, weights(9))


@pytest.mark.parametrize("which", ["worst", "3", 3, -1, "", "1.0", "step-00000001"])
def test_a_checkpoint_that_is_not_there(which: str | int):
    run = make_run()
    with pytest.raises(DfError):
        run.load(which)
    save(run, 1)
    with pytest.raises(UsageError, match="no checkpoint") as error:
        run.load(which)
    assert error.value.hint.endswith("1")


def test_a_run_without_checkpoints():
    run = make_run()
    with pytest.raises(DfError, match="no checkpoint yet") as error:
        run.load()
    assert "--resume" in error.value.hint


def test_other_things_in_the_folder_are_not_checkpoints():
    run = make_run()
    save(run, 1)
    for name in ("step-5", "step-000000002", "step-00000003.bak", ".tmp-step-00000004-1-00000000-00000000", "x"):
        (run.path / name).mkdir()
    (run.path / "step-00000009").write_bytes(b"a file")
    assert run.steps() == [1]
    assert run.load("last").step == 1


def test_steps_of_any_size():
    run = make_run()
    save(run, 99_999_999)
    save(run, 123_456_789_012)
    assert run.steps() == [99_999_999, 123_456_789_012]
    assert run.load("last").step == 123_456_789_012


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_modes_follow_the_umask():
    old = os.umask(0o022)
    try:
        run = make_run()
        path = save(run, 1)
        run.log({"step": 1})
    finally:
        os.umask(old)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in run.path.rglob("*") if file.is_file()}
    assert modes == {0o644}
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_the_library_reads_what_is_written():
    safetensors = pytest.importorskip("safetensors.torch")
    run = make_run()
    path = save(run, 1)
    assert same(safetensors.load_file(path / "optimizer.safetensors"), {"moment": torch.ones(3)})


# While a trainer works


def test_a_checkpoint_removed_after_it_was_chosen_is_chosen_anew(monkeypatch: pytest.MonkeyPatch):
    run = make_run()
    save(run, 1, 3.0)
    real = checkpoint.load
    calls = []

    def late(path: Path, step: int, *args: object, **options: object) -> object:
        calls.append(step)
        if step < 4:  # before it is opened the trainer has gone on
            save(run, step + 1, 3.0 - step)
            save(run, step + 2, 3.0 - step)
            shutil.rmtree(checkpoint.folder(path, step), ignore_errors=True)
        return real(path, step, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "load", late)
    saved = Run.open("r").load("best")
    assert calls == [1, 3, 5]
    assert saved.step == 5
    assert same(saved.model, weights(5))


def test_a_checkpoint_removed_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    run = make_run()
    for step in (1, 2):
        save(run, step, 1.0 * step)
    real = files.read_json

    def late(path: Path) -> dict:
        if path.parent.name == "step-00000001":
            shutil.rmtree(path.parent, ignore_errors=True)
        return real(path)

    monkeypatch.setattr(checkpoint, "read_json", late)
    assert run.load("best").step == 2


def test_a_checkpoint_replaced_while_it_is_read(monkeypatch: pytest.MonkeyPatch):
    run = make_run()
    save(run, 1, 1.0)
    real = checkpoint.read_state
    once = []

    def late(path: Path, step: int) -> dict:
        found = real(path, step)
        if not once:
            once.append(step)
            run.save(1, weights(9), {}, {"val_loss": 0.5})
        return found

    monkeypatch.setattr(checkpoint, "read_state", late)
    saved = run.load(1)
    assert saved.state == {"val_loss": 0.5}
    assert same(saved.model, weights(9))


@pytest.mark.skipif(os.name == "nt", reason="there the system refuses to remove what is open")
@pytest.mark.parametrize("moment", ["_read_header", "_bytes"])
def test_what_is_being_read_is_not_removed(monkeypatch: pytest.MonkeyPatch, moment: str):
    from dfcli.runs import tensors

    run = make_run()
    save(run, 1, 1.0)
    real = getattr(tensors, moment)
    tried = []

    def late(*args: object) -> object:
        tried.append(1)
        with pytest.raises(DfError, match="run `r` is in use"):
            remove("r")
        return real(*args)

    monkeypatch.setattr(tensors, moment, late)
    assert same(run.load(1, optimizer=True).model, weights(1))
    assert tried
    remove("r")  # once it is in memory
    assert list_runs() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_readers_in_other_processes_see_whole_checkpoints():
    """A reader as fast as it can beside a writer as fast as it can."""
    run = make_run()
    save(run, 1, 1.0)
    last = 15
    child = os.fork()
    if child == 0:
        status = 1
        try:
            step = 0
            while step < last:
                saved = Run.open("r").load("best", optimizer=True)
                assert saved.step >= step
                step = saved.step
                assert same(saved.model, weights(step))
                assert saved.optimizer is not None
                assert saved.optimizer["moment"][0] == step
            status = 0
        finally:
            os._exit(status)
    for step in range(2, last + 1):
        save(run, step, 1 / step)
    assert os.waitpid(child, 0)[1] == 0


# Listing and removal


def test_runs_are_listed_by_name_and_what_cannot_be_read_is_told(home: Path):
    assert list_runs() == []
    for name in ("b", "a", "c"):
        make_run(name)
    (home / "runs" / "a" / "run.json").write_bytes(b"{}")
    (home / "runs" / "stray").mkdir()
    (home / "runs" / "file").write_bytes(b"")
    events: list[object] = []
    assert [run.name for run in list_runs(events.append)] == ["b", "c"]
    texts = [event.text for event in events if isinstance(event, Note)]
    assert len(texts) == 2
    assert "`a`" in texts[0]
    assert "`stray`" in texts[1]


def test_the_newest_run_of_a_kind_is_the_one_created_last():
    for name, codec in (("z", Bytes()), ("y", MuLaw(8000)), ("x", Bytes()), ("unsaved", Bytes())):
        run = make_run(name, codec=codec)
        if name != "unsaved":
            save(run, 1)
    save(Run.open("z"), 2)
    assert newest().name == "x"
    assert newest("text").name == "x"
    assert newest("audio").name == "y"
    remove("y")
    with pytest.raises(UsageError, match="no run that makes sound"):
        newest("audio")


def test_removal():
    run = make_run("r")
    save(run, 1)
    make_run("s")
    remove("r")
    assert [run.name for run in list_runs()] == ["s"]
    assert sorted(os.listdir(run.path.parent)) == ["s"]
    with pytest.raises(UsageError, match="no run `r`"):
        remove("r")


def test_a_damaged_run_can_be_removed(home: Path):
    run = make_run("r")
    (run.path / "run.json").unlink()
    remove("r")
    assert os.listdir(home / "runs") == []


def test_listing_and_reading_import_no_torch(home: Path):
    run = make_run()
    save(run, 1, 1.5)
    run.log({"step": 1})
    code = (
        "import sys\n"
        "from dfcli.runs import Run, list_runs, newest, remove\n"
        "run, = list_runs(print)\n"
        "assert newest('text').name == run.name == 'r'\n"
        "assert run.state(run.resolve('best')) == {'val_loss': 1.5} and run.metrics() == [{'step': 1}]\n"
        "assert run.size_bytes() > 100\n"
        "remove('r')\n"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# Descriptions of cores that cannot be


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 10**9}, {"channels": 10**12}, {"vocab_size": -1}, {"layers": 1.5}, {"heads": "1"}, {"unknown": 1},
        {"position": None}, {"vocab_size": 10_000_000, "channels": 100_000}, {"layers": True}, {"dropout": []},
    ],
)  # fmt: skip
def test_absurd_configs_are_refused(changes: dict[str, object]):
    run = make_run()
    save(run, 1)
    core = run.info["core"]
    rewrite(run.path / "run.json", core={"name": "gpt", "config": core["config"] | changes})
    with pytest.raises(CorruptError, match=r"run\.json"):
        Run.open("r").load()


@pytest.mark.parametrize(
    "changes", [{"layers": 2}, {"channels": 4}, {"bias": False}, {"context": 5}, {"tied_head": False}]
)
def test_a_config_that_is_not_the_checkpoints_is_refused(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch):
    run = make_run()
    save(run, 1)
    rewrite(run.path / "run.json", core={"name": "gpt", "config": run.info["core"]["config"] | changes})

    def no_memory(*_: object, **__: object) -> None:
        pytest.fail("memory was taken before the header was compared")

    monkeypatch.setattr("dfcli.runs.tensors._bytes", no_memory)
    with pytest.raises(CorruptError, match=r"model\.safetensors.*where run\.json describes"):
        Run.open("r").load()


def test_a_config_far_beyond_its_checkpoint_is_refused_unbuilt(monkeypatch: pytest.MonkeyPatch):
    run = make_run()
    save(run, 1)
    huge = run.info["core"]["config"] | {"layers": 100, "channels": 2048}  # 5e9 parameters
    rewrite(run.path / "run.json", core={"name": "gpt", "config": huge})
    monkeypatch.setattr("dfcli.cores.build", lambda *_: pytest.fail("it was built"))
    with pytest.raises(CorruptError, match=r"model\.safetensors.* cannot hold the 50\d{8} parameters of run\.json"):
        Run.open("r").load()


def test_an_unknown_core_is_refused():
    run = make_run()
    save(run, 1)
    rewrite(run.path / "run.json", core={"name": "../x", "config": {}})
    with pytest.raises(CorruptError, match=r"run\.json"):
        Run.open("r").load()


def test_the_small_config_is_tied():
    assert CONFIG.tied_head
