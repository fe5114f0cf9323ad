"""What one writes by the usual tutorial: FastAPI, Feast's SDK, a DataFrame, scikit-learn.

BENCH_REPO is the Feast repository, BENCH_MODEL the folder of the registered model that Banquet serves too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
from fastapi import FastAPI
from feast import FeatureStore
from pydantic import BaseModel

repo, folder = Path(os.environ["BENCH_REPO"]), Path(os.environ["BENCH_MODEL"])
store = FeatureStore(repo_path=str(repo), fs_yaml_file=repo / "stock.yaml")
service = store.get_feature_service("users")
model = joblib.load(folder / "model.joblib")
manifest = json.loads((folder / "manifest.json").read_text())
columns = [feature["name"] for feature in manifest["schema"]["features"]]
codes = {
    name: {text: float(code) for code, text in enumerate(texts)}
    for name, texts in manifest["vocabulary"].items()
}
app = FastAPI()


class Request(BaseModel):
    """The entities to predict for."""

    entities: list[dict[str, int]]


@app.get("/health")
def health() -> dict[str, str]:
    """Whether the server is up."""
    return {"status": "ok"}


@app.post("/predict")
def predict(request: Request) -> dict[str, Any]:
    """Read the features, predict, answer."""
    features = store.get_online_features(
        features=service, entity_rows=request.entities, full_feature_names=True
    ).to_dict()
    for name, known in codes.items():
        features[name] = [known.get(value) for value in features[name]]
    frame = pd.DataFrame(features)[columns].astype(float).to_numpy()
    labels, probabilities = model.predict(frame), model.predict_proba(frame)
    return {
        "predictions": [
            {"entity": entity, "prediction": int(label), "confidence": float(row.max())}
            for entity, label, row in zip(request.entities, labels, probabilities, strict=True)
        ]
    }
