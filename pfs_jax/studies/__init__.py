"""Studies: many runs, one table (`python main.py --mode=study`).

`arms` defines how structures are chosen and trained, `plan` lists the cells of
a study, `products` makes what cells share, `cells` does one cell, `engine` does
all of them, and `results` keeps the records.
"""

from pfs_jax.studies import tournament
from pfs_jax.studies.engine import asked, run
from pfs_jax.studies.plan import default

__all__ = ['asked', 'default', 'run', 'tournament']
