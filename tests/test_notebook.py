"""The notebook in docs/ runs from its first cell to its last, with a smaller model and fewer steps than it shows."""

import os
import re
import shutil
import warnings
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.usefixtures("quick_compile")
ROOT = Path(__file__).parents[1]
SMALLER = "--train.steps 2 --model.image-size 48 --model.iqm-layers 1 --eval.heatmaps 0"


def text_of(output):
    """What a cell's output says, printed or shown, without its colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", output.get("text", "") or output.get("data", {}).get("text/plain", ""))


def test_the_notebook_runs_to_its_end(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Jupyter is made of
        from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "docs" / "own_images.ipynb", as_version=4)
    settings = [cell for cell in notebook.cells if 'SETTINGS = ""' in cell.source]
    assert len(settings) == 1
    settings[0].source = settings[0].source.replace('SETTINGS = ""', f'SETTINGS = "{SMALLER}"')
    # In a copy of a checkout, as it writes beside the scripts.
    (tmp_path / "docs").mkdir()
    for script in ("evaluate.py", "predict.py"):
        shutil.copy(ROOT / script, tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "docs")}})
        client.execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    said = [" ".join(map(text_of, cell.outputs)) for cell in code]
    assert "Calibration on 20 normal and 20 anomalous valid images" in said[0]
    assert "image of 1 frame, 128×128: raw score" in said[2]
    (picture,) = [output for output in code[3].outputs if "image/png" in output.get("data", {})]
    assert len(picture.data["image/png"]) > 1000
    assert "16 frames of 16 files in results" in said[4]
    assert said[4].count("new_scans/test_") == 16
    assert "26 frames of 2 files in medical_results" in said[5]
    assert "same geometry: True" in said[5]
    assert "Secondary Capture Image Storage" in said[5]
    assert len(list((tmp_path / "results" / "heatmaps").iterdir())) == 16
