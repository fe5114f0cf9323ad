"""The demo repository on its real data, for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# In a process of its own, so that its peak memory is the build's.
_BUILD = """
import json, resource, sys, time
from pathlib import Path
from demo import sources

repo = Path(sys.argv[1])
lines = []
started = time.monotonic()
summary = sources.build(repo, progress=lines.append)
usage = resource.getrusage(resource.RUSAGE_SELF)
# On Linux it starts with the peak of who started this process.
own = Path("/proc/self/status")
peak = own.read_text().partition("VmHWM:")[2].split()[0] if own.exists() else usage.ru_maxrss
measured = {
    "seconds": time.monotonic() - started,
    "peak_bytes": int(peak) * (1 if sys.platform == "darwin" else 1024),
    "imported_pandas": "pandas" in sys.modules,
    "rows": summary.rows,
    "weeks_shifted": summary.weeks_shifted,
    "last_day": summary.last_day.isoformat(),
    "progress": lines,
}
repo.joinpath("build.json").write_text(json.dumps(measured))
"""


def build(path: Path) -> Path:
    """Copy the definitions to ``path`` and build today's data beside them."""
    shutil.copytree(ROOT / "feature_repo", path, ignore=shutil.ignore_patterns("data", "__pycache__"))
    subprocess.run([sys.executable, "-c", _BUILD, str(path)], check=True, cwd=ROOT)
    return path


def copy(source: Path, target: Path, connection_string: str) -> Path:
    """A repository of its own on the same data, with its online store at ``connection_string``."""
    shutil.copytree(source, target, copy_function=os.link)
    config = target / "feature_store.yaml"
    text = config.read_text(encoding="utf-8")
    config.unlink()  # a link: writing through it would change the source's
    config.write_text(text.replace("127.0.0.1:6379", connection_string), encoding="utf-8")
    return target
