"""A config and a workdir, and what several stages compute from them."""

import copy
import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from pfs_jax import (
  budgets,
  config,
  console,
  cpu,
  data,
  devices,
  errors,
  fields,
  latency,
  models,
  prune,
  runs,
  scores,
  storage,
  surgery,
  train,
  user_code,
)

# Folders of a workdir that belong to no budget.
FOLDERS = """search probe tournament train wide reference export report data
  shapes shared""".split()
# From so many pixels in a batch on, keeping freed memory makes steps faster.
_LARGE_BATCH = 2**16
# A width profile of a probe keeps at least this share of each uniform width.
TRUST = 0.5


class Job:
  """A config and a workdir, and what several stages compute from them.

  With large batches, the process keeps the memory that it frees (`cpu`).
  """

  def __init__(self, c: ml_collections.ConfigDict, workdir: pathlib.Path):
    config.validate(c)
    self.config, self.workdir = c, workdir
    self._reseeded: dict[int, Job] = {0: self}
    self._first = self._noted()
    self.spec = self._spec()
    batch = max(c.search.batch_size, c.train.batch_size)
    if batch * self.spec.image_size**2 >= _LARGE_BATCH:
      cpu.keep_freed_memory()
    self.network = self._network()
    self._code = self._checked_code()
    self.budgets = budgets.from_section(c.budget, self.network.reference_macs)

  def _spec(self) -> data.Spec:
    """The facts of the data; those noted in the workdir if they are gone."""
    path = self.workdir / 'data.json'
    try:
      return data.configured(self.config.data)
    except errors.UserError:
      if not (data.is_own(self.config.data) and path.exists()):
        raise
    return storage.read_json(path, data.Spec)

  def _network(self) -> models.Network:
    c, dtype = self.config.model, config.DTYPES[self.config.dtype]
    size = self.spec.image_size
    shape = (self.spec.num_classes, size, self.spec.channels)
    if c.factory:
      return surgery.network_from_factory(
        c.factory,
        *shape,
        dtype,
        residual=c.residual,
        leave=c.leave,
        call=c.call,
        norm=c.norm,
        conv=c.conv,
      )
    return models.network(
      c.name,
      *shape,
      base_width=c.base_width or None,
      width=c.width or None,
      multiplier=c.multiplier,
      dtype=dtype,
      gate_site=c.gate_site,
      counts=c.counts,
    )

  def _checked_code(self) -> dict[str, str]:
    """{'sha256': of the code of the user's own model}; {} for another one.

    Refuses code that has changed since the workdir was begun.
    """
    c = self.config.model
    if not c.factory:
      return {}
    names = ('factory', 'call', 'norm', 'conv')
    given = (user_code.imported(f'model.{n}', c[n]) for n in names if c[n])
    model = self.network.gated.model
    held = getattr(model, 'held', None)  # Of an NNX module.
    made = type(held.model if held else model)
    found = {'sha256': user_code.checksum(made, *given)}
    path = self.workdir / 'model.json'
    if path.exists() and storage.read_json(path, dict[str, str]) != found:
      raise errors.UserError(
        f'the code of {c.factory} is not that with which {self.workdir} was '
        'begun: give another --workdir, or undo the change.\nIf it changes no '
        f'result, delete {path}.'
      )
    return found

  def say_unused_fields(self) -> None:
    """Says which widths of the config a model of the user's own ignores."""
    model, names = self.config.model, []
    for name in ('base_width', 'width', 'counts', 'multiplier', 'gate_site'):
      if model[name] != fields.BY_NAME[f'model.{name}'].default:
        names.append(f'config.model.{name}')
    if model.factory and names and storage.is_first_process():
      console.note(f'not used with config.model.factory: {", ".join(names)}')

  @property
  def model_name(self) -> str:
    """The name in the registry, or the factory of the user's own model."""
    return self.config.model.factory or self.config.model.name

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    return (self.spec.image_size, self.spec.image_size, self.spec.channels)

  @functools.cached_property
  def data(self) -> Any:
    """The data set (see `data.open_set`), read at first use."""
    return data.open_set(self.config, self.workdir)

  @functools.cached_property
  def first_weights(self) -> Any:
    """The random variables of the searched network before any training."""
    key = config.key(self.config.seed, 'search weights')
    drawn = models.init(self.network.gated, key, self.image_shape)
    return self.network.table.awake(drawn)

  @property
  def ungated_weights(self) -> dict[str, Any]:
    """The first weights without the gates."""
    return {k: v for k, v in self.first_weights.items() if k != 'gates'}

  def reseeded(self, i: int) -> 'Job':
    """The same run with its i-th other seed; the run itself for i = 0.

    All share the network and the images.
    """
    if i not in self._reseeded:
      c = self.config.copy_and_resolve_references()
      c.seed = config.other_seed(c.seed, i)
      self._reseeded[i] = other = copy.copy(self)
      other.config, other.data = c, self.data.under(c)
      other.__dict__.pop('first_weights', None)
    return self._reseeded[i]

  def plan(self, total_steps: int, evaluate_steps: int) -> train.Plan:
    """The plan of a loop under this config."""
    return train.Plan(
      total_steps=total_steps,
      log_steps=self.config.log_steps,
      evaluate_steps=evaluate_steps,
      checkpoint_steps=self.config.checkpoint_steps,
      steps_per_call=devices.steps_per_call(self.config.steps_per_call),
    )

  # Cuts.

  @functools.cached_property
  def latency_model(self) -> latency.LatencyModel:
    """Milliseconds of a batch on this device, measured at first use."""
    cache = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return latency.LatencyModel(
      self.network.cost_model,
      self.config.budget.latency_batch,
      storage.expanded(cache) / 'pfs_jax' / 'latency.json',
      config.DTYPES[self.config.dtype],
    )

  def latency_of(self, budget: prune.Budget) -> latency.LatencyModel | None:
    """The latency model, measured only for a budget in milliseconds."""
    return None if budget.max_latency_ms is None else self.latency_model

  def cut(
    self, ranked: Mapping[str, Any], budget: prune.Budget
  ) -> prune.Structure:
    """The structure of the searched network that a budget allows."""
    model = self.network.cost_model
    return prune.cut(ranked, model, budget, self.latency_of(budget))

  def cut_plain(
    self, ranked: Mapping[str, Any], budget: prune.Budget | None = None
  ) -> prune.Structure:
    """`cut` by ranked scores, to a budget or by default to the first one."""
    plain = dataclasses.replace(budget or self.budgets[0], ranking='global')
    return self.cut(ranked, plain)

  def uniform(self, budget: prune.Budget | None = None) -> prune.Structure:
    """Uniform width at a budget, by default the first one."""
    return self.cut_plain(scores.equal(self.network.cost_model), budget)

  def widened(
    self,
    weights: Mapping[str, float],
    gates: Mapping[str, Any] | None = None,
    budget: prune.Budget | None = None,
  ) -> scores.Scores:
    """Scores of {layer: weight} that keep at least half of uniform widths.

    The gates are the order of the channels within a layer, if it is known. The
    uniform widths are those of the budget, or of the first one.
    """
    uniform = self.uniform(budget)
    least = (math.ceil(TRUST * count) for count in uniform.counts)
    guarded = dict(zip(uniform.layers, least, strict=True))
    order = gates or scores.equal(self.network.cost_model)
    return scores.profile_scores(weights, order, guarded)

  # Files.

  def folder(self, budget: str) -> pathlib.Path:
    """The folder with the files of one budget.

    The first budget that uses a workdir has its files in the workdir itself,
    where budget.txt holds its name; every other budget has a folder of its
    name. So the paths of a budget do not change later.
    """
    at_top = self._first in (None, budget)
    return self.workdir if at_top else self.workdir / budget

  def _noted(self) -> str | None:
    """The budget whose files are in the workdir itself; None in a new one."""
    path = self.workdir / 'budget.txt'
    return storage.read_text(path).strip() if path.exists() else None

  def note_budget(self, budget: str) -> None:
    """Gives the workdir itself to a budget, unless another one has it."""
    self._first = self._noted()  # Another process may have been first.
    if self._first is None:
      self._first = budget
      path = self.workdir / 'budget.txt'
      storage.write_text(path, f'{budget}\n', sealed=True)

  def budget_folders(self) -> dict[str, pathlib.Path]:
    """{budget: folder} of the structures and results in the workdir."""
    # A folder with one of these is an export, or another workdir.
    others = ('manifest.json', 'budget.txt')
    inside = [
      p
      for p in self.workdir.glob('*/')
      if p.name not in FOLDERS and not any((p / f).exists() for f in others)
    ]
    folders = {self._first or self.budgets[0].name: self.workdir}
    folders |= {p.name: p for p in sorted(inside)}
    files = ('structure.json', 'result.json')
    return {
      name: folder
      for name, folder in folders.items()
      if any((folder / file).exists() for file in files)
    }

  def note_config(self) -> None:
    """Writes config, versions and facts of the data into the workdir."""
    for name, content in (
      ('config', self.config.to_dict()),
      ('data', dataclasses.asdict(self.spec)),
      ('versions', runs.versions()),
      ('model', self._code),
    ):
      if content:
        storage.write_json(self.workdir / f'{name}.json', content, sealed=True)
