"""core.feast_protos leaves a Feast that is imported later as it would be without us."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str, cwd: Path = ROOT) -> str:
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_messages_load_without_feast_and_leave_no_trace_in_sys_modules() -> None:
    out = run(
        "from core.feast_protos import Value\n"
        "print(Value(int64_val=0).SerializeToString().hex())\n"
        "print([name for name in sys.modules if name.startswith('feast')])"
    )
    assert out.split() == ["2000", "[]"]


def test_feast_imported_later_shares_our_classes_and_can_apply(tmp_path: Path) -> None:
    (tmp_path / "feature_store.yaml").write_text(
        "project: p\nprovider: local\nregistry: registry.db\nonline_store: {type: sqlite, path: online.db}\n"
        "entity_key_serialization_version: 3\n"
    )
    out = run(
        "from core import feast_protos as ours\n"
        "import feast, feast.protos.feast.core.Registry_pb2, feast.protos.feast.types.Value_pb2\n"
        "assert feast.protos.feast.types.Value_pb2.Value is ours.Value\n"
        "assert feast.protos.feast.core.Registry_pb2.Registry is ours.Registry\n"
        "store = feast.FeatureStore('.')\n"
        "store.apply([feast.Entity(name='u', join_keys=['u'], value_type=feast.ValueType.INT64)])\n"
        "registry = ours.Registry.FromString(open('registry.db', 'rb').read())\n"
        "print([e.spec.name for e in registry.entities])",
        cwd=tmp_path,
    )
    assert "'u'" in out


def test_with_feast_already_imported_its_own_modules_are_used() -> None:
    out = run(
        "import feast\nfrom core import feast_protos as ours\n"
        "import feast.protos.feast.types.Value_pb2 as theirs\n"
        "print(ours.value_pb2 is theirs, feast.protos.feast.types.Value_pb2 is theirs)"
    )
    assert out.split() == ["True", "True"]
