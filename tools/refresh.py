"""Execute notebooks in place, skipping `#| slow` and `#| cuda` cells, then clean them.

    python tools/refresh.py nbs/21_data.dedup.ipynb ...     (no argument: every notebook)
    python tools/refresh.py --record nbs/00_start.ipynb     (also records how long the chapters ran: chapter_times.py)
    python tools/refresh.py --slow nbs/45_mip.ipynb         (`#| slow` cells, too: the recorded experiments, hours)

A skipped cell keeps the outputs it has. An error stops the run and the notebook stays as it was.
"""

import os
import re
import resource
import sys
import time
from pathlib import Path

import chapter_times
import nbformat
from colab import CELL_METADATA
from nbclient import NotebookClient
from nbdev.clean import clean_nb

NEVER = ("cuda", r"eval:\s*false")  # directives of cells that are not executed
LIMIT = 600  # seconds of a cell; a slow one has none


class SkippingClient(NotebookClient):
    "A notebook client that passes over the cells with one of some directives."

    skipped = ()

    async def async_execute_cell(self, cell, cell_index, **kw):
        if cell.cell_type == "code" and re.search(rf"^#\|\s*({'|'.join(self.skipped)})\b", cell.source, re.M):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kw)


def refresh(path, slow=False):
    "Execute the notebook at `path` and write it back clean."
    nb = nbformat.read(path, 4)
    resources = {"metadata": {"path": str(Path(path).parent)}}
    client = SkippingClient(nb, timeout=None if slow else LIMIT, kernel_name="python3", resources=resources)
    client.skipped = NEVER if slow else (*NEVER, "slow")
    client.execute()
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    clean_nb(nb, allowed_cell_metadata_keys=CELL_METADATA)
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
    nbformat.write(nb, path)


def processor_seconds():
    "Processor time of all ended processes that this one started: kernels, and what they started."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    root = Path(__file__).resolve().parent.parent
    named, record = [p for p in sys.argv[1:] if p not in ("--record", "--slow")], "--record" in sys.argv
    for p in named or sorted(map(str, (root / "nbs").glob("*.ipynb"))):
        start, used = time.time(), processor_seconds()
        refresh(p, slow="--slow" in sys.argv)
        used = processor_seconds() - used
        print(f"{p}: {time.time() - start:.0f} s, processor {used:.0f} s")
        if record:
            chapter_times.renew({Path(p).stem: used})
