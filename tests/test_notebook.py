"""examples/tour.ipynb: it is stored with its outputs, and runs from top to bottom."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from assignment.handout import BY_HAND, EXERCISES
from benchmarks import thoughts

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "tour.ipynb"
SOLUTION = """
def my_advantages(rewards, eps=1e-4):
    centred = rewards - rewards[..., :1]
    centred = centred - centred.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + eps)
"""
# Inserted into the notebook: its trainings are processes, which evaluate as little as the tests do.
SHORT = """
popen = subprocess.Popen
program = "import sys, samr1_mini as s; s.EVAL_SAMPLES = 4; s.main(sys.argv[1:])"
subprocess.Popen = lambda line, **files: popen([line[0], "-c", program, *line[2:]], **files)
"""


def printed(cell) -> str:
    return "".join(one["text"] for one in cell.outputs if one.get("name") == "stdout")


def test_the_notebook_is_stored_as_it_ran():
    text = NOTEBOOK.read_text()
    assert len(text) < 1_000_000
    assert f"has {len(EXERCISES) + len(BY_HAND)} exercises" in text
    stored = json.loads(text)
    assert stored["metadata"]["kernelspec"]["name"] == "python3"
    cells = [cell for cell in stored["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) == 9
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}  # no error
    assert {output.get("name") for output in outputs} == {"stdout", None}  # no warning
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 8
    said = "".join(part for output in outputs for part in output.get("text", ""))
    assert not re.search(r"(^|[\s'\"(])/\w+/", said)  # no path of the machine that ran it


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    variables = {"TOUR_STEPS": 1, "TOUR_RUNS": tmp_path / "runs", "IPYTHONDIR": tmp_path}
    for name, value in (variables | {"OMP_NUM_THREADS": 1}).items():
        monkeypatch.setenv(name, str(value))
    before = sorted(NOTEBOOK.parent.glob("*.*"))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (check,) = (cell for cell in cells if cell.source.startswith("def check"))
    (edit,) = (cell for cell in cells if cell.source.startswith("case = "))
    python = nbformat.v4.new_code_cell("print(sys.executable)")
    right = nbformat.v4.new_code_cell(f"{SOLUTION}\ncheck(my_advantages)")
    notebook.cells.insert(notebook.cells.index(cells[1]), nbformat.v4.new_code_cell(SHORT))
    notebook.cells += [python, right]
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    assert printed(python).strip() == sys.executable
    assert "Not yet" in printed(check) and printed(right).startswith("Right")

    shown = [one["data"] for cell in cells for one in cell.outputs if "data" in one]
    pictures = [base64.b64decode(data["image/png"]) for data in shown if "image/png" in data]
    assert len(pictures) == 8
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("L"))
        assert pixels.size > 9000 and pixels.std() > 10
    own, edited = (line.partition(":")[2].strip() for line in printed(edit).strip().split("\n"))
    case = next(one for one in thoughts.find_cases(20) if not one.shared)
    forced = case.start("other")
    assert own.startswith("<think>") and edited.startswith(forced)
    for run in ("mask", "box"):
        assert (tmp_path / "runs" / run / "adapter" / "adapter_model.safetensors").is_file()
    assert sorted(NOTEBOOK.parent.glob("*.*")) == before  # it writes nothing beside itself
