"""What people look at: figures, tables, pages, widgets, and the files of adapted photographs.

Comes in: samples, predictions and results; or the tables that `runs.results` reads.
Goes out: matplotlib and plotly figures, Table 1 (CSV, LaTeX, Markdown), one HTML page that opens offline, and for a
photograph depth (PNG, NPY), points (PLY), a picture before/after and a record (`photo_files`), for a
scene one cloud, cameras and a page too (`scene_files`).

May import: every room. Decides no number: a change here does not make finished runs old.
Start reading at `tables.py`, or at `html.py` for what a notebook shows of a result.
"""
