"""Does a search pay where MACs and parameters are both limited? VGG16/16.

The paper's structures have fewer parameters than uniform width at equal MACs.
Here both have a ceiling: `full` is 30 % of the MACs and 112,000 parameters,
`tenth` is 10 % and 27,000. The tilt uses both without a search. `again` is
`tenth` with ten fresh seeds and without uniform width. RESULTS.md has the plans
and what came out.

Variants: `full`, `tenth`, `again` and `smoke`.

configs/studies/common.py has the command.
"""

from configs.studies import common

# Share of the MACs, ceiling on the parameters, and the weakest tilt, in steps
# of 0.5, that uses at least 97 % of both.
CEILINGS = {
  'full': (0.3, 112_000, -1.5),
  'tenth': (0.1, 27_000, -2.0),
  'again': (0.1, 27_000, -2.0),
}


def get_config(variant='full'):
  """The study under one pair of ceilings, or its smoke variant."""
  base = common.fashion()
  keep, params, tilt = CEILINGS.get(variant, CEILINGS['full'])
  base.budget.keep = (keep,)
  base.budget.max_params = params
  arms, seeds = ('uniform', 'searched', f'tilt{tilt:g}'), range(100, 105)
  if variant == 'again':
    arms, seeds = ('tilt-2', 'searched'), range(105, 115)
  suffix = {'tenth': '_tenth', 'again': '_again'}.get(variant, '')
  return common.study(
    variant,
    f'two_ceilings{suffix}',
    known=CEILINGS,
    base=base,
    arms=arms,
    seeds=tuple(seeds),
    baseline=arms[0],
    smoke={'arms': ('uniform', 'tilt-1.5'), 'seeds': (0,)},
  )
