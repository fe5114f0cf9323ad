"""`banquet models export --to mlflow` into the real MLflow, on SQLite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from core import estimator_file
from core.compiled import SklearnRunner
from core.manifest import BASELINE_FILE, MODEL_FILE, SKOPS_FILE, CompiledForm, GoldenRow
from core.model import LoadedModel
from core.registry import CHAMPION, ModelRegistry
from tests.support import packages

ROOT = Path(__file__).parents[2]
ROWS = [(1.0, 2), (None, 4), (0.5, None), (9.0, 0)]

# Runs in a process of its own: MLflow warns a lot, and here warnings are errors.
_EXPORT_AND_LOAD = """
import json, sys
import numpy as np
from click.testing import CliRunner
from cli.main import main

def export(*arguments):
    result = CliRunner().invoke(main, ["--json", "models", "export", *arguments, "--to", "mlflow"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)

exports = [export("churn"), export("churn/1"), export("churn/2")]
import mlflow
client = mlflow.MlflowClient()
matrix = np.array(json.loads(sys.argv[1]), dtype=np.float64)
version = client.get_model_version_by_alias("churn", "champion")
run = client.get_run(version.run_id)
model = mlflow.sklearn.load_model("models:/churn@champion")
pyfunc = mlflow.pyfunc.load_model("models:/churn@champion")
skops = client.get_model_version("churn", exports[2]["mlflow_version"])
print("RESULT" + json.dumps({
    "exports": exports,
    "versions": len(client.search_model_versions("name = 'churn'")),
    "runs": len(client.search_runs([run.info.experiment_id])),
    "champion": int(version.version),
    "tags": dict(version.tags),
    "metrics": run.data.metrics,
    "params": run.data.params,
    "features": pyfunc.metadata.metadata["features"],
    "shape": pyfunc.metadata.signature.inputs.inputs[0].shape,
    "probabilities": model.predict_proba(matrix).tolist(),
    "classes": np.asarray(pyfunc.predict(matrix)).tolist(),
    "from skops": mlflow.sklearn.load_model(f"models:/churn/{skops.version}").predict_proba(matrix).tolist(),
}))
"""


def test_a_version_in_mlflow_predicts_what_it_does_here(tmp_path: Path) -> None:
    """Exported twice it is there once, with metrics, origin, aliases and predictions; from both formats."""
    registry = ModelRegistry(str(tmp_path / "models"))
    matrix = np.array(ROWS, dtype=np.float64)
    estimator = make_pipeline(SimpleImputer(), LogisticRegression())
    estimator.fit(matrix, ["stays", "leaves", "stays", "leaves"])
    described: dict[str, Any] = {
        "task": "classification",
        "classes": tuple(estimator.classes_.tolist()),
        "metrics": {"log_loss": 0.5, "baselines": {"constant": {"log_loss": 0.7}}},
        "golden": (),
    }
    model = LoadedModel(packages.manifest(**described), SklearnRunner(estimator))
    found = model.predict(matrix)
    assert found.probabilities is not None
    golden = tuple(
        GoldenRow({"account__spend": spend, "account__visits": visits}, label, tuple(probabilities))
        for (spend, visits), label, probabilities in zip(
            ROWS, found.labels, found.probabilities.tolist(), strict=True
        )
    )
    for file in (MODEL_FILE, SKOPS_FILE):
        form = CompiledForm("sklearn", file, 0.0, True, 4)
        files = {file: estimator_file.dump(estimator, file), BASELINE_FILE: b"rows"}
        packages.register(registry, files, **described | {"golden": golden, "compiled": form})
    registry.promote("churn", 1)

    values = {name: [row.features[name] for row in golden] for name in model.manifest.feature_names}
    environment = {
        **os.environ,
        "BANQUET_REGISTRY_URL": registry.url,
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "BANQUET_SKOPS_TRUSTED": "numpy.dtype",
        "PYTHONPATH": str(ROOT),
    }
    rows = json.dumps(model.matrix(values, len(golden)).tolist())
    done = subprocess.run(
        [sys.executable, "-c", _EXPORT_AND_LOAD, rows],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.partition("RESULT")[2])

    first, again, second = result["exports"]
    assert (first["was_there"], first["aliases"], first["version"]) == (False, [CHAMPION], 1)
    assert again == first | {"was_there": True}
    assert (second["was_there"], second["aliases"]) == (False, [])
    assert (result["versions"], result["runs"], result["champion"]) == (2, 2, first["mlflow_version"])
    assert result["tags"]["banquet.version"] == "1"
    assert result["tags"]["banquet.manifest_sha256"] == registry.manifest_digest("churn", 1)
    assert result["metrics"] == {"log_loss": 0.5, "baselines/constant/log_loss": 0.7}
    assert result["params"]["feature_service"] == "churn_v1"
    assert result["features"] == ["account__spend", "account__visits"]
    assert result["shape"] == [-1, 2]
    expected = [list(row.probabilities or ()) for row in golden]
    assert np.allclose(result["probabilities"], expected, rtol=0, atol=1e-12)
    assert np.allclose(result["from skops"], expected, rtol=0, atol=1e-12)
    assert result["classes"] == [row.prediction for row in golden]
