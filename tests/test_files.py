"""Files are there whole or not at all: after errors, on full disks, after kill -9, and with two processes at once."""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from mm_core import files
from mm_core.errors import MagicMirrorError
from mm_core.files import PARTIAL, STALE_SECONDS, Numbered, atomic_folder, atomic_write, write_json

ROOT = Path(__file__).resolve().parents[1]
KILLS = 40  # of each writer
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and modes are POSIX's")


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another process that runs this code with the project on its path; sys.argv[1:] are the arguments."""
    head = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(PARTIAL)]


def test_a_numbered_file_takes_the_next_number(tmp_path: Path) -> None:
    """Whatever the suffix of those before, and in whatever case their name is written; other names do not count."""
    for name in ("anna_00003_.png", "Anna_00007.mp4", "annabel_00050_.mp4", "anna_x_.mp4", "00090_.mp4"):
        (tmp_path / name).touch()
    for wanted in ("anna_00008_.mp4", "anna_00009_.mp4"):
        target = Numbered(tmp_path, "anna", ".mp4")
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"clip")
        assert target.path.name == wanted and target.path.read_bytes() == b"clip"
    nameless = Numbered(tmp_path, "", ".mp4")
    with atomic_write(nameless):
        pass
    assert nameless.path.name == "00091_.mp4"


def test_a_number_that_is_taken_meanwhile(tmp_path: Path) -> None:
    """By another program, in the moment before the file gets its name: nothing is replaced."""
    target = Numbered(tmp_path, "anna", ".png", first=4)
    (tmp_path / "anna_00004_.png").write_bytes(b"another's")
    with atomic_write(target) as temporary:
        temporary.write_bytes(b"mine")
    assert target.path.name == "anna_00005_.png"
    assert (tmp_path / "anna_00004_.png").read_bytes() == b"another's"


@pytest.mark.parametrize("links", [True, False])
def test_two_processes_saving_one_name(tmp_path: Path, links: bool) -> None:
    """Each of their files is kept, with and without hard links in the file system."""
    if links and os.name == "nt":
        pytest.skip("Windows renames without replacing")
    code = """
        import os
        from pathlib import Path
        from mm_core.files import Numbered, atomic_write
        if sys.argv[3] == "False":
            def no_links(*_): raise OSError("no hard links here")
            os.link = no_links
        print("ready", flush=True)
        sys.stdin.readline()
        for index in range(40):
            with atomic_write(Numbered(Path(sys.argv[1]), "same", ".txt")) as temporary:
                temporary.write_text(f"{sys.argv[2]} {index}")
    """
    head = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), str(tmp_path)]
    both = [
        subprocess.Popen([*command, name, str(links)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("a", "b")
    ]
    for process in both:
        process.stdout.readline()
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(60) for process in both] == [0, 0]
    kept = sorted(path.read_text() for path in tmp_path.iterdir())
    assert kept == sorted(f"{name} {index}" for name in "ab" for index in range(40))


@POSIX
def test_every_file_has_the_usual_mode(tmp_path: Path) -> None:
    """Also where the library that writes replaces the temporary file by one of its own, which others cannot read."""
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "clip") as temporary:
        private = tmp_path / "private"
        private.touch(mode=0o600)
        os.replace(private, temporary)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "clip")}
    assert len(modes) == 1


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    """After a day; what another process may be writing to, and files of others, stay."""
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "a") as temporary:
        name = temporary.name
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    old, folder, fresh, foreign = (
        tmp_path / text for text in (name, name.replace(".a.", ".b."), name.replace(".a.", ".c."), ".x.partial")
    )
    for path in (old, fresh, foreign):
        path.touch()
    folder.mkdir()
    (folder / "half").touch()
    for path in (old, folder, foreign):
        os.utime(path, (time.time() - STALE_SECONDS - 60,) * 2)
    write_json(tmp_path / "new.json", {})
    assert {path.name for path in tmp_path.iterdir()} == {fresh.name, foreign.name, "new.json"}


def test_what_safetensors_left_is_swept(tmp_path: Path) -> None:
    """Its own temporary file, which a kill leaves beside ours: when weights are written there the next time."""
    left = tmp_path / ".tmpAbC123"
    left.touch()
    for name, days, kept in (("a.safetensors", 0, True), ("a.json", 2, True), ("a.safetensors", 2, False)):
        os.utime(left, (time.time() - days * 24 * 3600,) * 2)
        with atomic_write(tmp_path / name):
            pass
        assert left.exists() == kept


def test_two_processes_never_share_a_temporary_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers may have the same process id."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        assert first != second and first.parent == second.parent == tmp_path


def test_long_names(tmp_path: Path) -> None:
    """A name that just fits has a temporary one that fits, too."""
    write_json(tmp_path / ("ü" * 127), {})
    with pytest.raises(MagicMirrorError, match="Choose a shorter name"):
        write_json(tmp_path / ("a" * 300), {})
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "model") as temporary:
            (temporary / "weights").write_text(content)
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("third")
        raise ZeroDivisionError
    assert (tmp_path / "model" / "weights").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "delete files that are not needed"),
        (OSError(errno.EROFS, "Read-only file system"), "choose another folder"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "delete files"),
        (SafetensorError('serializing: IoError(Os { code: 28, kind: StorageFull, message: "x" })'), "delete files"),
    ],
)
def test_errors_of_the_disk_name_the_file_and_the_remedy(tmp_path: Path, error: Exception, says: str) -> None:
    with pytest.raises(MagicMirrorError) as raised, atomic_write(tmp_path / "clip.mp4"):
        raise error
    assert says in str(raised.value) and f"clip.mp4 in {tmp_path}" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_errors_of_other_files_are_not_taken_for_the_targets(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_write(tmp_path / "clip.mp4"):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/photo.png")


@POSIX
@pytest.mark.parametrize("writer", ["clip", "webp", "identity", "latent"])
def test_a_file_that_may_not_grow(tmp_path: Path, writer: str) -> None:
    """A real limit of the system in the middle of each writer: a message with the path, and nothing half-written."""
    process = start(
        f"""
        import resource, writers
        from pathlib import Path
        from mm_core.errors import MagicMirrorError
        write = writers.{writer}()
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            write(Path(sys.argv[1]))
        except MagicMirrorError as error:
            print(error)
        """,
        tmp_path,
    )
    message, errors = process.communicate(timeout=120)
    assert f"in {tmp_path}: File too large" in message, message + errors
    assert not list(tmp_path.iterdir())


@POSIX
@pytest.mark.parametrize("writer", ["clip", "identity", "latent", "json"])
def test_a_folder_that_cannot_be_written_to(tmp_path: Path, writer: str) -> None:
    locked, open_to_all = tmp_path / "locked", tmp_path / "open"
    locked.mkdir(mode=0o555)
    open_to_all.mkdir()
    process = start(
        f"""
        import os, writers
        from pathlib import Path
        from mm_core.errors import MagicMirrorError
        write = writers.{writer}()
        write(Path(sys.argv[2]))  # what is imported late is imported now
        if os.geteuid() == 0:
            os.chdir(sys.argv[1])
            os.seteuid(65534)
        try:
            write(Path(sys.argv[1]) if os.geteuid() != 65534 else Path("."))
        except MagicMirrorError as error:
            print(error)
        """,
        locked,
        open_to_all,
    )
    message, errors = process.communicate(timeout=120)
    assert "Permission denied. Let the user that runs this write there" in message, message + errors
    assert not list(locked.iterdir())


READERS: dict[str, Callable[[Path], object]] = {
    ".mp4": lambda path: _decoded(path),
    ".gif": lambda path: Image.open(path).load(),
    ".safetensors": load_file,
    ".latent": load_file,
    ".json": lambda path: json.loads(path.read_text()),
}


def _decoded(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@POSIX
@pytest.mark.parametrize("writer", ["clip", "picture", "identity", "latent", "weights", "json"])
def test_kill_9_leaves_nothing_half_under_a_final_name(tmp_path: Path, writer: str) -> None:
    """At random times, until there are halves and whole files; the process that comes after sweeps."""
    seed, folder = secrets.randbits(32), tmp_path / "folder"
    folder.mkdir()
    killer = start(
        f"""
        import os, random, signal, time, writers
        from pathlib import Path
        write, times = writers.{writer}(), random.Random({seed})
        for _ in range(2):  # the first one imports
            begun = time.monotonic()
            write(Path(sys.argv[2]))
            lasts = time.monotonic() - begun
        for count in range(10 * {KILLS}):
            kinds = {{name.startswith(".") for name in os.listdir(sys.argv[1])}}
            if count >= {KILLS} and kinds == {{True, False}}:
                break
            child = os.fork()
            if not child:
                while True:
                    write(Path(sys.argv[1]))
            time.sleep(times.uniform(0, 3 * lasts))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        """,
        folder,
        tmp_path,
    )
    _, errors = killer.communicate(timeout=300)
    assert killer.returncode == 0, errors
    whole = [path for path in folder.iterdir() if not path.name.startswith(".")]
    assert whole and unfinished(folder), f"seed {seed}: no kill in the middle, or no whole file"
    for path in whole:
        READERS[path.suffix](path)
    for left in folder.glob(".*"):
        os.utime(left, (0, 0))
    with atomic_write(folder / "next.safetensors"):
        pass
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_number_of_kept_characters_leaves_room_for_any_script() -> None:
    longest = files._unfinished(Path(), "\N{GRINNING FACE}" * 300)
    assert len(longest.name.encode()) <= 255
