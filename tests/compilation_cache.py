"""One compilation cache for the workers, the programs that they start and the next run.

XLA's work is most of the suite's time, and two workers compile many of the same small
programs. JAX keeps compiled programs in a folder, but writes them in place: a process
that reads an entry while another one writes it, or after a killed process has written
half of it, gets a warning, and our tests turn warnings into errors.

So each process has a folder of its own. What it has compiled is published from there
between two test files by hard links, which appear whole or not at all, under names that
end with a checksum; what others have published is linked in. An entry whose checksum is
wrong is thrown away, and so are the folders of processes that no longer exist.
"""

import hashlib
import os
import pathlib
import platform
import shutil
import tempfile
import zlib

import jaxlib.version

ROOT = pathlib.Path(__file__).parents[1] / ".compilation_cache"
LIMIT = 2 << 30
"""Bytes; beyond it the oldest entries go."""
OWN = "process-"


def folder_of_this_machine() -> pathlib.Path:
    """What one processor compiles another one may not run."""
    lines = pathlib.Path("/proc/cpuinfo")
    known = lines.read_text().split("\n\n")[0].splitlines() if lines.exists() else []
    kind = [x for x in known if x.startswith(("model name", "flags", "Features"))]
    text = "\n".join([platform.machine(), platform.processor(), *kind])
    processor = hashlib.sha256(text.encode()).hexdigest()[:12]
    return ROOT / f"jaxlib-{jaxlib.version.__version__}-{processor}"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def tidy(shared: pathlib.Path, limit: int = LIMIT) -> None:
    """Removes what killed processes left, and the oldest entries over the limit."""
    entries = []
    shared.mkdir(parents=True, exist_ok=True)
    for entry in os.scandir(shared):
        if not entry.is_dir():
            entries.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        elif not is_running(int(entry.name.removeprefix(OWN).split("-")[0])):
            shutil.rmtree(entry.path, ignore_errors=True)
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= limit:
            break
        pathlib.Path(path).unlink(missing_ok=True)
        total -= size


class Cache:
    """A process' own folder, and the one that it shares with the others.

    Args:
      shared: the folder of all processes.
    """

    def __init__(self, shared: pathlib.Path):
        self.shared = shared
        shared.mkdir(parents=True, exist_ok=True)
        self.own = pathlib.Path(tempfile.mkdtemp("", f"{OWN}{os.getpid()}-", shared))
        self.seen: set[str] = set()
        self.times: dict[pathlib.Path, int] = {}
        self.exchange()

    def exchange(self) -> None:
        """Publishes what is new here, and links in what is new there."""
        for entry in self.changed(self.own):
            if entry.name.endswith("-cache") and entry.name not in self.seen:
                self.seen.add(entry.name)
                checksum = zlib.crc32(pathlib.Path(entry.path).read_bytes())
                self.link(entry.path, f"{self.shared}/{entry.name}.{checksum:08x}")
        own = f"{self.own}/"  # paths as objects are half of the time of thousands
        for entry in self.changed(self.shared):
            name, _, checksum = entry.name.rpartition(".")
            if name in self.seen or entry.is_dir():
                continue
            try:
                with open(entry.path, "rb", buffering=0) as file:
                    content = file.read()
            except FileNotFoundError:
                continue  # another process has thrown it away
            if f"{zlib.crc32(content):08x}" == checksum:
                self.seen.add(name)
                self.link(entry.path, own + name)
            else:
                pathlib.Path(entry.path).unlink(missing_ok=True)

    def changed(self, folder: pathlib.Path) -> list[os.DirEntry[str]]:
        """All entries, or none where the folder is as it was: it has thousands.

        What is written within one tick of its clock after this look is seen when the
        folder changes again.
        """
        time = folder.stat().st_mtime_ns
        if time == self.times.get(folder):
            return []
        self.times[folder] = time
        return list(os.scandir(folder))

    def link(self, source: str, target: str) -> None:
        """The same file under another name; a copy where a disk has no hard links."""
        try:
            os.link(source, target)
        except FileExistsError:
            pass
        except OSError:
            aside = self.own / "aside"
            shutil.copyfile(source, aside)
            aside.replace(target)

    def close(self) -> None:
        self.times.clear()
        self.exchange()
        shutil.rmtree(self.own, ignore_errors=True)
