"""Searches that learn nothing: the rules by which they are told."""

import math

import jax
import numpy as np
import pytest

from pfs_jax import errors, runs, stages, storage
from pfs_jax.stages import searching
from tests import small_run

MIXED = {'a': np.array([0.0, 0.3]), 'b': np.array([1.0])}
CHANCE = math.log(10)


@pytest.mark.parametrize('value', [0.0, 1.0])
def test_gates_that_are_all_at_one_end_are_refused(value):
  gates = {k: np.full_like(g, value) for k, g in MIXED.items()}
  with pytest.raises(errors.UserError, match=f'all 3 gates are {value:g}'):
    searching.check(gates, steps=1)
  searching.check(gates, steps=0)  # No step leaves them at 1.
  for others in (MIXED, {'a': np.full(3, 0.5)}):
    searching.check(others, steps=1)


@pytest.mark.parametrize(
  'changes, warning',
  [
    ({}, ''),
    ({'gates': {'a': np.full(3, 0.5)}}, 'All gates are 0.5'),
    ({'gates': {'a': np.array([0, 1, 1.0])}}, 'exactly 0 or 1'),
    ({'regulariser': 92 / 4}, ''),  # 23 < 10 ln 10 = 23.03.
    ({'regulariser': 93 / 4}, 'starts at 23.2, more than 10 times'),
    ({'regulariser': 93.0, 'losses': ()}, ''),  # Nothing was searched.
  ],
)
def test_warnings(changes, warning):
  plain = {'losses': (2.2, 1.9), 'gates': MIXED, 'regulariser': 0.125}
  found = searching.summarise(chance=CHANCE, **{**plain, **changes})
  assert len(found['warnings']) == bool(warning)
  assert warning in ''.join(found['warnings'])


@pytest.mark.parametrize(
  'losses, left',
  [((2.38, 2.31), False), ((2.3, 2.19), False), ((2.3, 2.18, 2.4), True)],
)
def test_chance_is_the_logarithm_of_the_classes(losses, left):
  found = searching.summarise(losses, MIXED, CHANCE, 0.125)
  assert found['lowest_ce'] == min(losses)
  assert found['left_chance'] is left  # 0.95 ln 10 = 2.187.


def test_the_result_tells_of_the_search(finished):
  result = storage.read_json(finished / 'result.json')
  assert set(result['search']) == {'lowest_ce', 'chance_ce', 'left_chance'}
  assert result['search']['chance_ce'] == math.log(10)
  assert result['warnings'] == []


def test_a_search_that_ranks_nothing_says_so(tmp_path, monkeypatch, capsys):
  """Gates that all stay at 1 are refused; all at 0.5 are warned of."""

  def search(value):
    def loop(state, *_, folder, **__):
      log = runs.MetricsLog(folder, 0)
      log.write(1, ce=2.0)
      log.close()
      return state.replace(gates=jax.tree.map(lambda g: value * g, state.gates))

    monkeypatch.setattr(searching.train, 'loop', loop)
    stages.execute('search', stages.Job(small_run.config(), tmp_path))
    return ' '.join(capsys.readouterr().out.split())

  with pytest.raises(errors.UserError, match='gates are 1'):
    search(1.0)
  assert not (tmp_path / 'search' / 'gates.npz').exists()
  assert 'warning: All gates are 0.5' in search(0.5)
