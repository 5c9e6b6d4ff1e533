from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfcli.errors import CorruptError, DfError, UsageError
from dfcli.system import files
from tests.faults import count, dies, failing, until_it_passes

ERRORS = [errno.ENOSPC, errno.EIO]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Names and places


def test_the_data_home_is_the_environment_s_or_the_system_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DFCLI_HOME", str(tmp_path / "x"))
    assert files.data_home() == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFCLI_HOME", "relative")
    assert files.data_home() == tmp_path / "relative"
    monkeypatch.delenv("DFCLI_HOME")
    assert files.data_home().is_absolute()
    assert "dfcli" in files.data_home().parts
    pwd = pytest.importorskip("pwd")  # a user without a home folder, as with `docker run -u 12345`
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    with pytest.raises(UsageError, match="no home folder") as error:
        files.data_home()
    assert "DFCLI_HOME" in error.value.hint


def test_a_data_home_that_is_no_folder_or_is_locked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = tmp_path / "home"
    monkeypatch.setenv("DFCLI_HOME", str(place))
    place.touch()
    with pytest.raises(UsageError, match="home is not a folder"):
        files.data_home()
    place.unlink()
    place.mkdir()
    looked = os.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        if place in Path(path).parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return looked(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(DfError, match=r"could not read .*home: Permission denied"):
        files.data_home()


@pytest.mark.parametrize("name", ["a", "run-1", "names_v2.txt", "A.b-C_d", "x" * 100, "0", "_", "com10", "console"])
def test_safe_names_are_kept(name: str):
    assert files.check_name(name, "run") == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".x", "-x", "a/b", "a\\b", "../x", "a b", "ü", "a\n", "a\x1b[2J", "a\0", "x" * 101, "x.",
     "con", "NUL", "nul.txt", "Com1", "lpt9.a.b", "aux", "C:", "a:b", "~", "$HOME", "*"],
)  # fmt: skip
def test_other_names_are_refused(name: str):
    with pytest.raises(UsageError, match="cannot be the name of a run") as error:
        files.check_name(name, "run")
    assert "letters" in error.value.hint
    assert "\x1b" not in error.value.message


def test_names_that_differ_in_case_are_the_same(tmp_path: Path):
    (tmp_path / "Alice").mkdir()
    assert files.same_name(tmp_path, "alice") == "Alice"
    assert files.same_name(tmp_path, "Alice") == "Alice"
    assert files.same_name(tmp_path, "bob") is None
    assert files.same_name(tmp_path / "absent", "bob") is None


def test_free_bytes_of_a_place_to_be(tmp_path: Path):
    assert files.free_bytes(tmp_path / "not" / "yet") > 0


# JSON


def test_json_comes_back(tmp_path: Path):
    obj = {"a": 1, "b": [1.5, None, "ü\x1b\ud800", True], "c": {"checksum": "mine"}, "d": 1e300, "e": 0.1 + 0.2}
    files.write_json(tmp_path / "sub" / "x.json", obj)
    assert files.read_json(tmp_path / "sub" / "x.json") == obj
    assert (tmp_path / "sub" / "x.json").read_bytes().isascii()
    assert set(json.loads((tmp_path / "sub" / "x.json").read_text())) == {*obj, "checksum"}


def test_json_without_keys(tmp_path: Path):
    files.write_json(tmp_path / "x", {})
    assert files.read_json(tmp_path / "x") == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_nan(tmp_path: Path, value: float):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x", {"loss": value})
    assert names(tmp_path) == []


def test_every_changed_byte_is_seen(tmp_path: Path):
    path = tmp_path / "x.json"
    files.write_json(path, {"loss": 1e-5, "text": "a b"})
    good = path.read_bytes()
    with open(path, "rb+", buffering=0) as file:  # in place: rewriting makes some file systems wait for the disk
        for place in range(len(good)):
            for change in (0x01, 0x20, 0x80, 0xFF, 0):  # 0x20 turns e into E, which JSON reads alike
                file.seek(place)
                file.write(bytes([good[place] ^ change]))
                if change:
                    with pytest.raises(CorruptError, match=r"x\.json"):
                        files.read_json(path)
    assert files.read_json(path)["loss"] == 1e-5


def test_every_truncation_and_addition_is_seen(tmp_path: Path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": list(range(5))})
    good = path.read_bytes()
    for data in [good[:n] for n in range(len(good))] + [good + b" ", good + b"\n", b" " + good, good + good]:
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=r"x\.json"):
            files.read_json(path)


def sealed(text: str) -> bytes:
    """A file whose checksum is right, whatever its contents."""
    import hashlib

    head = text.encode()
    return head + b'"checksum": "%s"\n}\n' % hashlib.sha256(head).hexdigest().encode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2, ', "twice"),
        ('{"a": {"b": 1, "b": 1}, ', "twice"),
        ('{"a": NaN, ', "NaN"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + ", ", "nested"),
        ('{"a": 1' + "0" * 10_000 + ", ", "digits"),
        ('{"a": nothing, ', "Expecting"),
    ],
)
def test_hostile_json_with_a_right_checksum_is_refused(tmp_path: Path, text: str, reason: str):
    (tmp_path / "x.json").write_bytes(sealed(text))
    with pytest.raises(CorruptError, match=reason):
        files.read_json(tmp_path / "x.json")


def test_huge_json_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    files.write_json(tmp_path / "x.json", {"a": "b" * 100})
    with pytest.raises(CorruptError, match="larger"):
        files.read_json(tmp_path / "x.json")


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_a_sentence(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    with pytest.raises(CorruptError, match=r"any\.json"):
        files.read_json(path)


def test_a_missing_file_and_what_is_no_file_are_named(tmp_path: Path):
    reasons = {tmp_path / "absent": "is missing", tmp_path: "not a regular file"}
    if os.name != "nt":  # to read these would not end
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "zeros").symlink_to("/dev/zero")
        reasons |= {tmp_path / "fifo": "not a regular file", tmp_path / "zeros": "not a regular file"}
    for path, reason in reasons.items():
        with pytest.raises(CorruptError, match=f"{path} .*{reason}"):
            files.read_json(path)


@pytest.mark.parametrize("version", [None, 0, -1, True, "1", 1.0])
def test_what_is_no_format_is_damage(version: object):
    with pytest.raises(CorruptError, match="format"):
        files.check_format({"format": version}, 3, Path("x"))


def test_a_newer_format_is_refused_and_an_older_one_passed_on():
    assert files.check_format({"format": 1}, 3, Path("x")) == 1
    with pytest.raises(DfError, match="format 4; this dfcli reads formats up to 3") as error:
        files.check_format({"format": 4}, 3, Path("x"))
    assert not isinstance(error.value, CorruptError)
    assert "newer dfcli" in error.value.hint


# Folders


def test_a_folder_appears_whole(tmp_path: Path):
    final = tmp_path / "deep" / "x"
    with files.building(final) as folder:
        assert folder.parent == final.parent
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"1")
        assert not final.exists()
    assert tree(final) == {"sub/a": b"1"}
    assert names(final.parent) == ["x"]


def test_an_error_inside_leaves_nothing(tmp_path: Path):
    def build(error: BaseException) -> None:
        with files.building(tmp_path / "x") as folder:
            (folder / "a").write_bytes(b"1")
            raise error

    for error in (RuntimeError("own"), KeyboardInterrupt(), DfError("own")):
        with pytest.raises(type(error)):
            build(error)
        assert names(tmp_path) == []


def test_an_existing_folder_is_refused_unless_it_is_to_be_replaced(tmp_path: Path):
    with files.building(tmp_path / "x") as folder:
        (folder / "a").write_bytes(b"1")
    with pytest.raises(UsageError, match="exists already"), files.building(tmp_path / "x"):
        pytest.fail("the block must not be entered")
    with pytest.raises(RuntimeError), files.building(tmp_path / "x", replace=True) as folder:
        raise RuntimeError
    assert tree(tmp_path) == {"x/a": b"1"}
    with files.building(tmp_path / "x", replace=True) as folder:
        (folder / "b").write_bytes(b"2")
    assert tree(tmp_path) == {"x/b": b"2"}
    assert names(tmp_path) == ["x"]


def test_a_folder_that_another_process_made_meanwhile_is_kept(tmp_path: Path):
    def build() -> None:
        with files.building(tmp_path / "x") as folder:
            (folder / "mine").write_bytes(b"1")
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "theirs").write_bytes(b"2")

    with pytest.raises(DfError, match="x"):
        build()
    assert tree(tmp_path) == {"x/theirs": b"2"}


@pytest.mark.skipif(os.name == "nt", reason="POSIX modes")
def test_modes_follow_the_umask(tmp_path: Path):
    old = os.umask(0o027)
    try:
        files.write_json(tmp_path / "a", {})
        with files.building(tmp_path / "b"):
            pass
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o750


def test_everything_is_flushed_before_it_appears(tmp_path: Path):
    """The order that makes it durable: contents, their folder, the rename, the parent."""

    def build() -> None:
        with files.building(tmp_path / "x") as folder:
            (folder / "a").write_bytes(b"1")

    with failing(0) as faults:
        build()
    calls = [call.split()[0] for call in faults.calls]
    at = calls.index("replace")
    assert calls[:at] == ["mkdir", "open", "write", "open", "fsync"] + ["fsync"] * (os.name != "nt")
    assert calls[at + 1 :] == ["fsync"] * (os.name != "nt") + ["unlink"]


def test_removal(tmp_path: Path):
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "a").write_bytes(b"1")
    files.remove_folder(tmp_path / "x")
    assert names(tmp_path) == []
    with pytest.raises(DfError, match="could not remove"):
        files.remove_folder(tmp_path / "x")


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"1")
    (tmp_path / "x").mkdir()
    try:
        (tmp_path / "link").symlink_to(tmp_path / "real")
        (tmp_path / "x" / "inner").symlink_to(tmp_path / "real")
    except OSError:
        pytest.skip("no links on this system")
    files.remove_folder(tmp_path / "link")
    files.remove_folder(tmp_path / "x")
    assert tree(tmp_path) == {"real/a": b"1"}
    assert names(tmp_path) == ["real"]


# Debris


def debris(kind: str = "tmp", name: str = "x", pid: int | None = None, host: str | None = None) -> str:
    return f".{kind}-{name}-{pid or os.getpid()}-{host or files._host()}-0123abcd"


def finished_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_debris_of_dead_processes_is_cleaned(tmp_path: Path):
    dead = finished_pid()
    (tmp_path / debris(pid=dead)).mkdir()
    (tmp_path / debris(pid=dead) / "a").write_bytes(b"1")
    (tmp_path / debris(name="some-file.txt", pid=dead)).write_bytes(b"1")
    (tmp_path / debris(name="same-pid-as-ours")).mkdir()  # a container gives out the same ids again
    (tmp_path / debris(name="old", pid=dead, host="00000000")).mkdir()
    os.utime(tmp_path / debris(name="old", pid=dead, host="00000000"), (1, 1))
    kept = ["ours", ".tmp-", ".tmp-x", ".tmp-x-1-2-3", ".hidden"]
    for name in kept:
        (tmp_path / name).mkdir()
    files.clean_debris(tmp_path)
    left = names(tmp_path)
    if files.os.name != "nt":  # the time of the last change cannot be set back, so that one is young
        left.remove(debris(name="old", pid=dead, host="00000000"))
    assert left == sorted(kept)


def test_debris_of_another_machine_is_cleaned_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / debris(host="00000000")).mkdir()
    files.clean_debris(tmp_path)
    assert names(tmp_path) == [debris(host="00000000")]
    later = time.time() + 25 * 3600
    monkeypatch.setattr(files.time, "time", lambda: later)
    files.clean_debris(tmp_path)
    assert names(tmp_path) == []


def test_what_the_living_work_on_is_left(tmp_path: Path):
    with files.building(tmp_path / "x") as folder:
        files.clean_debris(tmp_path)
        assert folder.is_dir()
    parent = os.getppid()
    (tmp_path / debris(pid=parent)).mkdir()
    files.clean_debris(tmp_path)
    assert names(tmp_path) == [debris(pid=parent), "x"]


def test_a_process_that_began_later_with_the_same_id_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import psutil

    (tmp_path / debris(pid=os.getppid())).mkdir()
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: time.time() + 60)
    files.clean_debris(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("pid", [-1, 10**30])
def test_ids_that_no_process_has(pid: int):
    assert not files.process_lives(pid, time.time())


def test_what_was_moved_away_comes_back_if_nothing_took_its_place(tmp_path: Path):
    dead = finished_pid()
    for name in ("lost", "replaced"):
        (tmp_path / debris("old", name, dead)).mkdir()
        (tmp_path / debris("old", name, dead) / "a").write_bytes(b"old")
    (tmp_path / "replaced").mkdir()
    (tmp_path / "replaced" / "a").write_bytes(b"new")
    files.clean_debris(tmp_path)
    assert tree(tmp_path) == {"lost/a": b"old", "replaced/a": b"new"}
    assert names(tmp_path) == ["lost", "replaced"]


def test_cleaning_nothing(tmp_path: Path):
    files.clean_debris(tmp_path / "absent")


def test_a_rename_that_windows_refuses_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, refusals = os.replace, [1, 1]

    def replace(source: Path, target: Path) -> None:
        if refusals:
            raise PermissionError(refusals.pop())
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(files, "PATIENCE", (0.0, 0.0))
    files.write_atomic(tmp_path / "x", b"1")
    assert tree(tmp_path) == {"x": b"1"}
    refusals[:] = [1, 1, 1]
    with pytest.raises(DfError, match="could not write"):
        files.write_atomic(tmp_path / "x", b"2")
    assert tree(tmp_path) == {"x": b"1"}


def test_a_long_name_leaves_room_for_the_rest(tmp_path: Path):
    files.write_atomic(tmp_path / ("n" * 250), b"1")
    with files.building(tmp_path / ("m" * 100), replace=True):
        pass
    with files.building(tmp_path / ("m" * 100), replace=True):
        pass
    assert names(tmp_path) == ["m" * 100, "n" * 250]


# Faults: after each, what was there is there, whole, and the message names the place


def make_old(home: Path) -> None:
    home.mkdir()
    (home / "file").write_bytes(b"old")
    (home / "folder").mkdir()
    (home / "folder" / "a").write_bytes(b"old")


OLD = {"file": b"old", "folder/a": b"old"}


def build(final: Path, replace: bool = False) -> None:
    with files.building(final, replace=replace) as folder:
        (folder / "sub").mkdir()
        for name in ("a", "sub/b"):
            (folder / name).write_bytes(b"new" * 1000)


ACTIONS: list[tuple[str, Callable[[Path], None], dict[str, bytes], str]] = [
    ("write", lambda home: files.write_atomic(home / "file", b"new" * 1000), OLD | {"file": b"new" * 1000}, "file"),
    (
        "build",
        lambda home: build(home / "deep" / "new"),
        OLD | {"deep/new/a": b"new" * 1000, "deep/new/sub/b": b"new" * 1000},
        "deep/new",
    ),
    (
        "replace",
        lambda home: build(home / "folder", replace=True),
        {"file": b"old", "folder/a": b"new" * 1000, "folder/sub/b": b"new" * 1000},
        "folder",
    ),
    ("remove", lambda home: files.remove_folder(home / "folder"), {"file": b"old"}, "folder"),
]
BY_NAME = pytest.mark.parametrize(("action", "new", "place"), [pytest.param(*rest, id=name) for name, *rest in ACTIONS])


@BY_NAME
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("error", ERRORS)
def test_every_call_can_fail(
    tmp_path: Path,
    action: Callable[[Path], None],
    new: dict[str, bytes],
    place: str,
    error: int,
    lasting: bool,
):
    def attempt(n: int) -> bool:
        home = tmp_path / str(n)
        make_old(home)
        raised = None
        with failing(n, error, lasting=lasting) as faults:
            try:
                action(home)
            except DfError as caught:
                raised = caught
        if raised is None:
            # Only what is done after the fact may fail unheard: deleting what was already moved away.
            files.clean_debris(home)
            assert tree(home) == new
            assert not faults.fired or faults.calls[n - 1].split()[0] in ("unlink", "rmdir")
        else:
            assert str(home / place) in raised.message
            assert os.strerror(error) in raised.message
            assert raised.hint
            # Right away, before anything is cleaned; a file that was replaced but not made sure is the new one.
            visible = {name: data for name, data in tree(home).items() if not name.startswith(".")}
            assert visible == OLD or (visible == new and place == "file")
            files.clean_debris(home)
            assert tree(home) == visible
        assert not [name for name in names(home) if name.startswith(".")]
        return faults.fired

    make_old(tmp_path / "whole")
    calls = count(lambda: action(tmp_path / "whole"))
    assert until_it_passes(attempt) >= calls >= 3


@BY_NAME
def test_the_process_can_die_at_every_call(
    tmp_path: Path, action: Callable[[Path], None], new: dict[str, bytes], place: str
):
    def attempt(n: int) -> bool:
        home = tmp_path / str(n)
        make_old(home)
        died = dies(n, lambda: action(home))
        files.clean_debris(home)
        files.clean_debris(home / "deep")
        assert tree(home) in (OLD, new)
        assert died or tree(home) == new
        return died

    assert until_it_passes(attempt) >= 3


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a plain user")
def test_a_folder_without_rights(tmp_path: Path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(DfError, match="Permission denied") as error:
            files.write_atomic(tmp_path / "x", b"1")
    finally:
        tmp_path.chmod(0o700)
    assert "permissions" in error.value.hint


def test_a_hint_names_the_data_home_only_for_files_in_it(home: Path, tmp_path: Path):
    for place, own in ((home / "runs" / "r", True), (tmp_path / "out.wav", False)):
        with pytest.raises(DfError) as error, files.os_errors("write", place):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        assert ("DFCLI_HOME" in error.value.hint) == own
        assert "check the permissions" in error.value.hint


def test_what_a_disk_cannot_read_back_is_damage():
    with pytest.raises(CorruptError, match="could not read x: "), files.os_errors("read", Path("x")):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_hosts_are_told_apart(monkeypatch: pytest.MonkeyPatch):
    here = files._host()
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert files._host() != here


@pytest.mark.skipif(os.name == "nt", reason="there the system refuses to remove what is open")
def test_what_is_held_is_not_had_alone(tmp_path: Path):
    def take() -> None:
        with files.alone([tmp_path / "a", tmp_path / "b"], DfError("taken")):
            assert files.hold(tmp_path / "a") is None

    for name in "ab":
        (tmp_path / name).touch()
    first, second = files.hold(tmp_path / "a"), files.hold(tmp_path / "a")
    assert first
    assert second
    first.close()
    with pytest.raises(DfError, match="taken"):
        take()
    second.close()
    take()
    code = (
        "import sys\nfrom pathlib import Path\nfrom dfcli.system import files\n"
        "held = files.hold(Path(sys.argv[1]))\nprint(1, flush=True)\ninput()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "b")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert child.stdout
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(DfError, match="taken"):
        take()
    child.kill()
    child.communicate()
    take()
    assert files.hold(tmp_path / "missing") is None
