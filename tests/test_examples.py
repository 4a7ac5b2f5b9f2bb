"""The examples run, on the small world, and keep what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE_S

import rasteret_dask as rd

pytest.importorskip("torch", reason="needs the extra torch")

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_dask_workers_train_one_model_from_one_stream(
    s2: rd.Collection, aef: rd.Collection, tmp_path: Path
) -> None:
    optical = s2.harmonize(bands=["red", "nir"], time="1MS", mask="clouds")
    chips = rd.join(optical=optical, embeddings=aef.harmonize(units="embedding")).chips(32, cell_km=0.64)
    chips = chips.sample(61)  # one more than two ranks can share
    plan = tmp_path / "train.plan"
    chips.save_plan(plan)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train_ddp.py"), str(plan), "--epochs", "2", "--batch-size", "8"],
        capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["process"] != second["process"]
    assert first["batches"] == second["batches"] == 2 * 4  # 30 chips a rank and epoch, by 8
    assert first["chips"] == second["chips"] == 2 * 30
    assert first["weights"] == second["weights"]
    assert first["last_loss"] < first["first_loss"]
