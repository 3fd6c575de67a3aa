"""What pyproject.toml cannot say: the wheel also holds the notebooks, experiments and profiles, as `ttt_lib/notebooks`.

Stored outputs are left out there: the notebooks are executed again wherever they are used, and outputs are most of their
size. An editable install takes `notebooks/` of the checkout itself (`ttt_lib/runs/catalog.py`).
"""

import json
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCE = Path("notebooks")
PATTERNS = ("*.ipynb", "experiments/**/*.yaml", "profiles/*.yaml")


def without_outputs(text: str) -> str:
    """A notebook's text, its code cells as if they were never executed."""
    notebook = json.loads(text)
    notebook["metadata"].pop("widgets", None)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
            cell["metadata"].pop("execution", None)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


class BuildWithNotebooks(build_py):
    """`build_py` that also copies the notebooks' files."""

    def _notebook_files(self) -> list[Path]:
        return sorted({path for pattern in PATTERNS for path in SOURCE.glob(pattern)})

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in self._notebook_files():
            target = Path(self.build_lib, "ttt_lib", path)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8")
            target.write_text(without_outputs(text) if path.suffix == ".ipynb" else text, encoding="utf-8")

    def get_source_files(self) -> list[str]:
        """For a source distribution, from which a wheel can be built again."""
        return [*super().get_source_files(), *(path.as_posix() for path in self._notebook_files())]


setup(cmdclass={"build_py": BuildWithNotebooks})
