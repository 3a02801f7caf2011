"""Studies: many runs, one table (`python main.py --mode=study`).

`arms` says how structures are got, `plan` which cells a study has, `products`
what cells share, `cells` does one, `engine` all, `results` keeps the records.
"""

from pfs_jax.studies import tournament
from pfs_jax.studies.engine import asked, run
from pfs_jax.studies.plan import default

__all__ = ['asked', 'default', 'run', 'tournament']
