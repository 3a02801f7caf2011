"""Does the searched structure beat the plain ones? VGG16/16 at 30 %.

Searched from random weights, under each ranking of the same gates, against
uniform width, random gates and the searched counts shuffled within their
stages; all at the same MACs, trained for the same epochs (Scratch-E). `full` is
the reference network. RESULTS.md tells what came out.

About 2 minutes a cell on 2 cores.

configs/studies/common.py has the command.
"""

from configs.studies import common


def get_config(variant='full'):
  """The study, or its smoke variant."""
  return common.study(
    variant,
    'headline',
    arms=common.HEADLINE_ARMS,
    seeds=(0, 1, 2, 3, 4),
    baseline='uniform',
    smoke={
      'arms': ('searched', 'uniform', 'searched+cost1+structure'),
      'seeds': (0,),
    },
  )
