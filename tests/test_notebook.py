"""The notebooks run, and are kept with the outputs of a run."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "examples"
PRINTED = {
    "fastai_digits": "largest difference: 0.0\n",
    "lightning_notebook": "applied 19.9%, planned 19.9%\n",
}
SHOWN = {
    "fastai_digits": {
        "plot_sched(": "plot",
        "lr_find()": "plot",
        "print(": "stdout",
        "learn.fit_": "table",
        "fine_tune(5": "table",
    },
    "lightning_notebook": {"\nplot_plan(": "plot", "logs.plot(": "plot", "print(": "stdout"},
}
"""What cells with such a call show, by notebook."""

every_notebook = pytest.mark.parametrize("name", SHOWN)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def kinds(cell):
    """What a code cell shows: tables, plots, values and printed text, in any order."""
    found = set()
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            found.add(output.name)
        elif "image/png" in data:
            found.add("plot")
        elif "<table" in data.get("text/html", ""):
            found.add("table")
        elif output.output_type == "execute_result":
            found.add("value")
    return found - {"stderr"}  # warnings of other packages


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook in a fresh kernel of this Python, without the user's settings."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))

    def execute(notebook):
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=120,
            resources={"metadata": {"path": str(tmp_path)}},
        )
        manager = client.create_kernel_manager()
        manager.kernel_spec.argv[0] = sys.executable
        client.execute()
        return notebook

    return execute


@pytest.mark.slow
@every_notebook
def test_it_runs_and_shows_what_is_kept(name, execute):
    kept, executed = read(name), execute(read(name))
    for before, after in zip(kept.cells, executed.cells, strict=True):
        if before.cell_type == "code":
            assert kinds(before) == kinds(after), before.source
    printed = "".join(o.text for c in executed.cells for o in c.get("outputs", []) if "text" in o)
    assert PRINTED[name] in printed


@every_notebook
def test_each_cell_that_shows_something_has_its_output(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for call, kind in SHOWN[name].items():
        cells = [cell for cell in code if call in cell.source]
        assert cells, call
        assert all(kind in kinds(cell) for cell in cells), call


@every_notebook
def test_the_file_is_small_and_carries_nothing_of_the_machine(name):
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < 300_000
    assert not re.search(r"stderr|Warning|Traceback|/home/|/root/|/tmp/|\.py:\d", text)
    assert all(not cell.metadata for cell in read(name).cells)
