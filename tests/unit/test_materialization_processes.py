"""Telling a process that is gone from one that lives, and cleaning up after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from materialization.processes import has_died, scratch_folder, this_process


def test_this_process_lives_and_an_ended_one_has_died() -> None:
    assert not has_died(this_process())
    code = (
        "import json; from materialization.processes import this_process; print(json.dumps(this_process()))"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert has_died(json.loads(out.stdout))


def test_a_number_that_another_process_has_now_is_not_mistaken_for_the_old_one() -> None:
    assert has_died({**this_process(), "started": "1"})


def test_nothing_is_said_of_processes_elsewhere() -> None:
    assert not has_died({**this_process(), "host": "elsewhere", "pid": 1})
    assert not has_died({**this_process(), "namespace": "pid:[1]", "started": "1"})


def test_without_start_times_the_number_decides() -> None:
    assert not has_died({**this_process(), "started": None})
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert has_died({**this_process(), "pid": child.pid, "started": None})


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    dead, alive, other = (tmp_path / name for name in ("banquet-dead", "banquet-alive", "banquet-other"))
    for folder, owner in ((dead, {**this_process(), "started": "1"}), (alive, this_process()), (other, None)):
        folder.mkdir()
        (folder / "spilled").write_text("rows")
        if owner is not None:
            (folder / "owner.json").write_text(json.dumps(owner))
    with scratch_folder(tmp_path) as own:
        assert own.is_dir()
        assert not dead.exists()
        assert alive.exists()
        assert other.exists()
    assert not own.exists()
