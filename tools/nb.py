#!/usr/bin/env python3
"""Work on notebooks as text. `show` prints the cells; `apply` writes edited text back and keeps the ids of the cells it knows.

    python tools/nb.py show  nbs/core/10_config.ipynb > /tmp/config.txt
    python tools/nb.py apply nbs/core/10_config.ipynb   /tmp/config.txt     # also makes a new notebook
    python tools/nb.py export nbs/core/10_config.ipynb                      # that notebook alone -> tmlab/
    python tools/nb.py test   nbs/core/10_config.ipynb                      # run its cells, stop at the first error
    python tools/nb.py run    nbs/core/10_config.ipynb                      # run its cells and keep what they show

A cell begins with a line `# %%`, `# %% [markdown]`, then optionally `id=...` and `tags=a,b`. Everything up to the next such line
is its source, as it stands (markdown is not commented out). A cell without an id gets a new one; a cell left out is deleted;
a cell whose source did not change keeps its outputs.
"""
import re, sys
from pathlib import Path
import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

KERNEL = dict(display_name="python3", language="python", name="python3")
HEAD = re.compile(r"^# %%(?P<md> \[markdown\])?(?: id=(?P<id>\S+))?(?: tags=(?P<tags>\S+))?[ ]*$", re.M)

def show(nb):
    "The notebook as text, one marked block a cell."
    out = []
    for c in nb.cells:
        tags = c.metadata.get("tags")
        out.append("# %%" + (" [markdown]" if c.cell_type == "markdown" else "") + f" id={c.id}"
                   + (f" tags={','.join(tags)}" if tags else "") + "\n" + c.source.strip("\n") + "\n")
    return "\n".join(out)

def apply(nb, text):
    "Replace the cells of `nb` by those in `text`, keeping known ids and the outputs of unchanged cells."
    old, heads, cells = {c.id: c for c in nb.cells}, list(HEAD.finditer(text)), []
    if not heads or text[:heads[0].start()].strip(): raise SystemExit("the text does not begin with a `# %%` line")
    for h, nxt in zip(heads, heads[1:] + [None]):
        source = text[h.end() + 1:nxt.start() if nxt else None].strip("\n")
        kind = "markdown" if h["md"] else "code"
        known = old.get(h["id"])
        if h["id"] and not known: raise SystemExit(f"no cell with id {h['id']}")
        cell = (new_markdown_cell if h["md"] else new_code_cell)(source)
        if known is not None:
            cell.id = known.id
            if kind == known.cell_type == "code" and known.source == source: cell.outputs = known.outputs
        if h["tags"]: cell.metadata["tags"] = h["tags"].split(",")
        cells.append(cell)
    nb.cells = cells
    return nb

def main(verb, path, *rest):
    path = Path(path)
    if verb == "show": return print(show(nbformat.read(path, 4)))
    if verb == "apply":
        nb = nbformat.read(path, 4) if path.exists() else new_notebook(metadata=dict(kernelspec=KERNEL))
        apply(nb, Path(rest[0]).read_text())
        path.parent.mkdir(parents=True, exist_ok=True)
        return nbformat.write(nb, path)
    if verb == "export":
        from nbdev.export import nb_export
        return nb_export(path)
    if verb == "test":
        from nbdev.test import test_nb
        ok, secs = test_nb(path, do_print=True)
        print("ok" if ok else "FAILED", f"{secs:.1f} s")
        raise SystemExit(not ok)
    if verb == "run":
        from nbclient import NotebookClient
        from nbdev.clean import clean_nb
        from execnb.nbio import read_nb, write_nb
        nb = nbformat.read(path, 4)
        NotebookClient(nb, timeout=600, resources=dict(metadata=dict(path=str(path.parent)))).execute()
        nbformat.write(nb, path)
        cleaned = read_nb(path); clean_nb(cleaned, allowed_cell_metadata_keys={"tags"}); write_nb(cleaned, path)
        return
    raise SystemExit(__doc__)

if __name__ == "__main__": main(*sys.argv[1:]) if len(sys.argv) > 2 else sys.exit(__doc__)
