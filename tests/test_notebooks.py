from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from waiting import PATIENT

from rasteret_dask.demo.world import World

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]


def execute(notebook: Any, folder: Path) -> None:
    """Run a notebook in a folder."""
    NotebookClient(notebook, **PATIENT, resources={"metadata": {"path": str(folder)}}).execute()


def test_the_first_picture_of_a_notebook_is_shown(
    small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matplotlib tells IPython how to show figures when its backend is loaded, which ``import`` does not do."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's profile
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    cell = f"import rasteret_dask as rd\nrd.build_from_stac({str(small_world.sentinel2)!r}, name='s2').plot()"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])  # type: ignore[no-untyped-call]
    execute(notebook, tmp_path)
    assert ["image/png" in output.get("data", {}) for output in notebook.cells[0].outputs] == [True]


def test_there_are_notebooks() -> None:
    assert [path.name for path in NOTEBOOKS][:1] == ["01_first_steps.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]


@pytest.mark.parametrize(
    "path",
    [NOTEBOOKS[0], *(pytest.param(p, marks=pytest.mark.slow) for p in NOTEBOOKS[1:])],
    ids=lambda path: path.stem,
)
def test_runs_without_a_warning(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))  # nobody's profile
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    notebook = read(path)
    execute(notebook, tmp_path)
    said = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
        and output.name == "stderr"
        # Dask's words about a machine that is busy
        and not re.search(r" - distributed\.(core|nanny|utils_perf) - ", output.text)
    ]
    assert not said
