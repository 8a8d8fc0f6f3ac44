"""Runs the code cells of a notebook in order, as Jupyter does but without it.

    python tests/notebooks/run_notebook.py notebooks/NAME.ipynb [--write]

With `--write` the printed text and the pictures of every cell are stored in the notebook.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")


def pictures():
    """PNGs of the open figures, which are closed."""
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums():
        buffer = io.BytesIO()
        plt.figure(number).savefig(buffer, format="png", dpi=80, bbox_inches="tight")
        found.append(base64.b64encode(buffer.getvalue()).decode("ascii"))
    plt.close("all")
    return found


def run_cell(source, namespace):
    """Executes one cell; returns its outputs as a notebook stores them."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
    outputs = []
    text = printed.getvalue() + (f"{value!r}\n" if value is not None else "")
    if text:
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    for png in pictures():
        outputs.append({"output_type": "display_data", "data": {"image/png": png}, "metadata": {}})
    return outputs


def main(path, write):
    path = path.resolve()
    notebook = json.loads(path.read_text(encoding="utf-8"))
    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent))
    namespace = {"__name__": "__main__"}
    count = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            outputs = run_cell("".join(cell["source"]), namespace)
            if write:
                cell["outputs"], cell["execution_count"] = outputs, count
    if write:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path.name}: {count} cells")


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--write" in sys.argv[2:])
