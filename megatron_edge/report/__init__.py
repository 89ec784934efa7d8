"""Report: what a run or a sweep brought, as pages that open without a network.

In: a run directory, or the directory of a sweep; what jobs wrote there is all that is read. Out: `report.html`, and for
a sweep `comparison.html`, `.png` and `.csv`. Called at the end of jobs and by launch/report.py. `facts.py` reads,
`verdict.py` says in words what follows, `weight_errors.py` measures what rounding did to each linear layer, `curves.py`
and `pictures.py` draw, `page.py` puts a run together and `comparison.py` with `sweep_page.py` a sweep.
"""
