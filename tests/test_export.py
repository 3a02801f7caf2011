"""Exports answer as the network does, say what they are, or are not there."""

import dataclasses
import json
import pathlib
import re
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pfs_jax import (
  data,
  errors,
  export,
  models,
  predict,
  prune,
  stages,
  storage,
)
from pfs_jax.export import bundle, check, manifest
from pfs_jax.export import onnx as onnx_export
from pfs_jax.stages import exporting
from tests import small_run

# Name: (image size, channels, width). The widths are as small as they go.
FAMILIES = {
  'resnet20': (8, 1, 2),
  'vgg16': (16, 3, 2),
  'mobilenet_v1': (16, 3, 4),
  'mobilenet_v2': (16, 1, 4),
  'resnet50': (16, 3, 4),
}


def spec_of(size, channels, classes=10):
  return data.Spec(
    name='test',
    image_size=size,
    channels=channels,
    num_classes=classes,
    mean=(0.3, 0.4, 0.5)[:channels],
    std=(0.2, 0.3, 0.4)[:channels],
    flip=False,
    crop_padding=0,
    class_names=tuple(f'thing {i}' for i in range(classes)),
    train_examples=1,
    test_examples=1,
  )


def weights(module, shape):
  """Random variables; BatchNorm's statistics are far from 0 and 1."""
  random = np.random.default_rng(1)

  def draw(path, leaf):
    name = path[-1].key
    if name in ('scale', 'var'):
      return random.uniform(0.5, 2.0, leaf.shape).astype(np.float32)
    scale = 0.5
    if name == 'kernel':
      scale = np.sqrt(2 / np.prod(leaf.shape[:-1]))
      if leaf.shape[-2] == 1:  # Depthwise: on small maps one tap acts.
        scale = 1.0
    return random.normal(scale=scale, size=leaf.shape).astype(np.float32)

  images = jnp.zeros((1, *shape))
  made = jax.eval_shape(module.init, jax.random.key(0), images)
  return jax.tree_util.tree_map_with_path(draw, dict(made))


def pruned(network):
  """A structure with other counts in every layer."""
  model = network.cost_model
  counts = tuple(max(1, w - i % 3) for i, w in enumerate(model.widths))
  return prune.Structure(
    model.layers,
    counts,
    model.macs(counts),
    model.params(counts),
    model=network.description,
  )


def network_of(family):
  size, channels, width = FAMILIES[family]
  network = models.network(family, 10, size, channels, base_width=width)
  structure = pruned(network)
  module = network.narrow(structure.counts)
  variables = weights(module, (size, size, channels))
  return module, variables, structure, spec_of(size, channels)


def images_of(n, spec):
  shape = (n, spec.image_size, spec.image_size, spec.channels)
  random = np.random.default_rng(2)
  return random.normal(size=shape).astype(np.float32)


def here(folder, batches, factory):
  """As `bundle._in_fresh_process`, but in this process."""
  asked, answered = folder / 'x.npz', folder / 'y.npz'
  storage.write_arrays(asked, {str(i): x for i, x in enumerate(batches)})
  check.main(folder, asked, answered, factory)
  found = storage.read_arrays(answered)
  asked.unlink()
  answered.unlink()
  names = export.read_manifest(folder)['formats']
  return {n: [found[f'{n}/{i}'] for i in range(len(batches))] for n in names}


@pytest.fixture
def in_process(monkeypatch):
  """Saves compare in this process: a fresh one takes seconds to start."""
  monkeypatch.setattr(bundle, '_in_fresh_process', here)
  monkeypatch.setattr(bundle, 'BATCH_SIZES', (2,))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """(folder, manifest, structure): a ResNet-20 in all formats, for reading."""
  folder = tmp_path_factory.mktemp('saved') / 'export'
  network = network_of('resnet20')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bundle, '_in_fresh_process', here)
    patch.setattr(bundle, 'BATCH_SIZES', (2,))
    manifest = export.save(folder, *network)
  return folder, manifest, network[2]


# The formats.


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family_in_every_format(family, tmp_path):
  module, variables, structure, spec = network_of(family)
  (tmp_path / 'structure.json').write_text(structure.to_json())
  x = images_of(2, spec)
  expected = np.asarray(jax.jit(module.apply)(variables, x))
  largest = np.abs(expected).max()
  assert np.ptp(expected, axis=0).max() > 0.01 * largest  # It depends on x.
  for name, room in export.FORMATS.items():
    room.write(tmp_path, module, variables, x.shape[1:])
    read = room.read(tmp_path, x.shape[1:])
    # The suite compiles without optimisations, which round otherwise.
    tolerance = 5 * bundle.TOLERANCES[name] * largest
    np.testing.assert_allclose(read(x), expected, rtol=0, atol=tolerance)


def test_onnx_is_convolutions_without_batchnorm_or_transposes(saved):
  import onnx

  nodes = onnx.load(saved[0] / 'model.onnx').graph.node
  kinds = [node.op_type for node in nodes]
  assert kinds.count('Conv') == 21 and kinds.count('Relu') == 19
  assert kinds.count('Transpose') == 1 and kinds.count('Gemm') == 1
  assert set(kinds) <= {
    *('Transpose', 'Conv', 'Relu', 'Add', 'ReduceSum', 'Div', 'Gemm')
  }


@pytest.mark.parametrize('name', export.FORMATS)
def test_any_batch_size_and_no_other_shape(saved, name):
  classify = export.load(saved[0], name)
  for n in (1, 4):
    assert classify(np.zeros((n, 8, 8, 1), np.float32)).shape == (n, 10)
  for bad in (
    np.zeros((1, 8, 9, 1), np.float32),
    np.zeros((8, 8, 1), np.float32),
    np.zeros((0, 8, 8, 1), np.float32),
    np.zeros((1, 8, 8, 1), np.uint8),
  ):
    with pytest.raises(errors.UserError, match=r'float \[N, 8, 8, 1\]; got'):
      classify(bad)


# ONNX, operator by operator.


def conv(x, features=4, kernel=3, **kwargs):
  return nn.Conv(features, (kernel, kernel), **kwargs)(x)


def squeeze_and_excite(x):
  x = conv(x)
  s = nn.sigmoid(nn.Dense(4)(nn.relu(nn.Dense(2)(x.mean((1, 2))))))
  return x * s[:, None, None, :]


def in_floats(x):
  """Normalised by statistics of the image itself."""
  mean = x.mean((1, 2, 3), keepdims=True)
  return (x - mean) / jnp.sqrt(
    jnp.square(x - mean).mean((1, 2, 3), keepdims=True) + 1e-3
  )


def normed(**kwargs):
  return nn.BatchNorm(use_running_average=True, **kwargs)


OPERATORS = {
  'bias': lambda x: nn.relu(conv(x)),
  'stride and SAME': lambda x: conv(x, strides=2, padding='SAME'),
  'dilated': lambda x: conv(x, kernel_dilation=2),
  'grouped': lambda x: conv(x, 6, feature_group_count=3),
  'depthwise': lambda x: conv(x, 3, feature_group_count=3, use_bias=False),
  'batchnorm first': lambda x: conv(nn.relu(normed()(x))),
  'batchnorm twice': lambda x: normed()(normed()(conv(x))),
  'used before its norm': lambda x: (lambda y: y + normed()(y))(conv(x)),
  'factor wider than the convolution': lambda x: (
    conv(x, 1) * jnp.arange(3.0).reshape(1, 1, 1, 3)
  ),
  'term wider than the convolution': lambda x: (
    conv(x, 1) + jnp.arange(3.0).reshape(1, 1, 1, 3)
  ),
  'term by position': lambda x: (
    conv(x, 8) + jnp.arange(8.0)[None, :, None, None]
  ),
  'taken from a constant': lambda x: 1.0 - conv(x),
  'relu6': lambda x: nn.relu6(4 * x),
  'relu6, relu used too': lambda x: nn.relu6(4 * x) + nn.relu(4 * x),
  'limits': lambda x: jnp.clip(x, -0.5, 0.5) + jnp.minimum(nn.relu(x), -1.0),
  'maximum of two': lambda x: jnp.maximum(x, 0.3) + jnp.maximum(0.0, x),
  'leaky relu': lambda x: nn.leaky_relu(conv(x)),
  'swish, gelu, hard swish': lambda x: (
    nn.swish(x) + nn.gelu(x) + nn.hard_swish(x) + nn.elu(x)
  ),
  'max pool': lambda x: nn.max_pool(x, (3, 3), (2, 2), 'SAME'),
  'average pool': lambda x: nn.avg_pool(x, (3, 3), (2, 2), 'SAME'),
  'average of what is there': lambda x: nn.avg_pool(
    x, (3, 3), (2, 2), 'SAME', count_include_pad=False
  ),
  'mean, kept axes': lambda x: conv(x.mean((1, 2), keepdims=True), kernel=1),
  'maximum over places': lambda x: jnp.max(conv(x), (1, 2)),
  'flatten': lambda x: nn.Dense(5)(conv(x).reshape(x.shape[0], -1)),
  'dense on a map': lambda x: nn.Dense(5)(conv(x)),
  'concatenation': lambda x: conv(jnp.concatenate([x, conv(x)], -1)),
  'constant channels': lambda x: jnp.concatenate([x, jnp.ones_like(x)], -1),
  'pad and slice': lambda x: jnp.pad(
    jax.lax.slice(x, (0, 0, 1, 0), x.shape, (1, 2, 1, 1)),
    ((0, 0), (1, 0), (0, 0), (0, 2)),
  ),
  'axes moved': lambda x: conv(x.transpose(0, 2, 1, 3)),
  'channels first': lambda x: nn.max_pool(
    x.transpose(0, 3, 1, 2)[..., None], (1, 2, 2), (1, 2, 2)
  ).squeeze(-1),
  'squeeze and excite': squeeze_and_excite,
  'its own statistics': in_floats,
  'remat': lambda x: nn.remat(nn.Conv)(4, (3, 3))(x),
  'softmax': lambda x: nn.softmax(nn.Dense(5)(x.mean((1, 2)))),
}


class Around(nn.Module):
  """One operator, flattened to what counts as logits."""

  name_of: str

  @nn.compact
  def __call__(self, x):
    y = OPERATORS[self.name_of](x)
    return y.reshape(x.shape[0], -1)


@pytest.mark.parametrize('name', OPERATORS)
def test_onnx_operator(name, tmp_path):
  module = Around(name)
  variables = weights(module, (8, 8, 3))
  onnx_export.write(tmp_path, module, variables, (8, 8, 3))
  run = onnx_export.read(tmp_path, (8, 8, 3))
  for n in (1, 3):
    x = np.random.default_rng(n).normal(size=(n, 8, 8, 3)).astype(np.float32)
    expected = np.asarray(module.apply(variables, x))
    np.testing.assert_allclose(run(x), expected, rtol=1e-4, atol=1e-4)


REFUSED = {
  'conv_general_dilated.*transposed': lambda x: nn.ConvTranspose(
    4, (2, 2), (2, 2)
  )(x),
  'sort': lambda x: jnp.sort(x, 1),
  'cumsum': lambda x: jnp.cumsum(x, 1),
  'dot_general.*depends on the image': lambda x: x @ x,
  r'gather .*jax\.lax\.slice can': lambda x: x[:, ::2],
  'dim_as_value': lambda x: x - x.mean(),
  'convert_element_type.*bfloat16.*dtype=float32': lambda x: conv(
    x, dtype=jnp.bfloat16
  ),
}


@pytest.mark.parametrize('message', REFUSED)
def test_onnx_refuses_by_name(message, tmp_path, monkeypatch):
  monkeypatch.setitem(OPERATORS, 'refused', REFUSED[message])
  module = Around('refused')
  variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 8)))
  with pytest.raises(errors.UserError, match=f'the operator {message}'):
    onnx_export.write(tmp_path, module, variables, (8, 8, 8))
  assert not list(tmp_path.iterdir())


# The folder.


def test_the_manifest(saved):
  folder, manifest, structure = saved
  assert manifest == json.loads((folder / 'manifest.json').read_text())
  assert manifest['input'] == {
    'shape': ['N', 8, 8, 1],
    'dtype': 'float32',
    'layout': 'NHWC',
    'channels': 'grey',
    'range': [0.0, 1.0],
    'mean': [0.3],
    'std': [0.2],
    'centre_crop': 1.0,
  }
  assert manifest['class_names'] == [f'thing {i}' for i in range(10)]
  described = manifest['structure']
  assert described['macs'] == structure.macs
  assert described['params'] == structure.params
  assert list(described['counts'].values()) == list(structure.counts)
  assert manifest['formats']['stablehlo']['platforms'] == ['cpu', 'cuda', 'tpu']
  for name, entry in manifest['formats'].items():
    assert 0 <= entry['max_error'] <= entry['tolerance']
    assert entry['tolerance'] == (1e-4 if name == 'onnx' else 1e-5)
    assert entry['bytes'] == (folder / entry['file']).stat().st_size
  for package in ('jax', 'flax', 'onnx', 'onnxruntime', 'safetensors'):
    assert manifest['versions'][package]
  there = {path.name for path in folder.iterdir()}
  assert there == {'manifest.json', *manifest['files']}
  read = prune.Structure.from_json((folder / 'structure.json').read_text())
  assert read == structure


def test_the_platforms_are_in_the_file(saved):
  content = bytearray((saved[0] / 'model.stablehlo').read_bytes())
  assert jax.export.deserialize(content).platforms == ('cpu', 'cuda', 'tpu')


def shifted(write):
  """A writer of the network with one wrong bias."""

  def wrong(folder, module, variables, shape, facts):
    changed = jax.tree.map(np.array, variables)
    changed['params']['classifier']['bias'][3] += 0.5
    write(folder, module, changed, shape, facts)

  return wrong


@pytest.mark.parametrize('name', export.FORMATS)
def test_one_that_differs_leaves_nothing(
  name, tmp_path, in_process, monkeypatch
):
  network = network_of('resnet20')
  module = export.FORMATS[name]
  monkeypatch.setattr(module, 'write', shifted(module.write))
  with pytest.raises(errors.UserError, match=f'{name}: the logits read back'):
    export.save(tmp_path / 'e', *network, formats=(name,))
  assert not list(tmp_path.iterdir())


def test_nan_is_no_answer():
  assert not bundle._difference(np.ones((1, 2)), np.ones((1, 3))) < np.inf
  nan = bundle._difference(np.full((1, 2), np.nan), np.ones((1, 2)))
  with pytest.raises(errors.UserError, match='onnx: .* nan'):
    bundle._check_error('onnx', nan)


def test_what_replaces_what(tmp_path, in_process):
  network = network_of('resnet20')
  module, variables, structure, spec = network
  target, only = tmp_path / 'e', {'formats': ('safetensors',)}
  export.save(target, *network, **only)
  before = (target / 'model.safetensors').read_bytes()
  # The same structure, other weights.
  again = jax.tree.map(lambda x: x + 1, variables)
  export.save(target, module, again, structure, spec, **only)
  assert (target / 'model.safetensors').read_bytes() != before
  # Another structure.
  other = dataclasses.replace(structure, macs=structure.macs + 1)
  with pytest.raises(errors.UserError, match='of another structure'):
    export.save(target, module, variables, other, spec, **only)
  export.save(target, module, variables, other, spec, overwrite=True, **only)
  assert export.read_manifest(target)['structure']['macs'] == other.macs
  # Something else, even if asked.
  folder = tmp_path / 'mine'
  folder.mkdir()
  (folder / 'thesis.tex').write_text('')
  with pytest.raises(errors.UserError, match='holds no export'):
    export.save(folder, *network, overwrite=True, **only)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['e', 'mine']


def test_a_failure_keeps_the_former_export(tmp_path, in_process, monkeypatch):
  network, only = network_of('resnet20'), {'formats': ('safetensors',)}
  target = tmp_path / 'e'
  export.save(target, *network, **only)
  before = {p.name: p.read_bytes() for p in target.iterdir()}
  monkeypatch.setitem(bundle.TOLERANCES, 'safetensors', -1.0)
  with pytest.raises(errors.UserError, match='differ'):
    export.save(target, *network, **only)
  assert {p.name: p.read_bytes() for p in target.iterdir()} == before
  assert [p.name for p in tmp_path.iterdir()] == ['e']


def test_bad_arguments(tmp_path, in_process):
  module, variables, structure, spec = network_of('resnet20')
  ours = (module, variables, structure)
  for formats, message in (
    (('tflite',), 'must be some of stablehlo, safetensors, onnx'),
    ((), 'one or more'),
    (('onnx', 'onnx'), 'each once'),
  ):
    with pytest.raises(errors.UserError, match=message):
      export.save(tmp_path / 'e', *ours, spec, formats=formats)
  with pytest.raises(errors.UserError, match=r'logits \[N, 7\]; got \[2, 10\]'):
    export.save(tmp_path / 'e', *ours, spec_of(8, 1, 7))
  own = dataclasses.replace(structure, model={})
  with pytest.raises(errors.UserError, match='model.name is missing'):
    export.save(tmp_path / 'e', module, variables, own, spec)
  with pytest.raises(errors.UserError, match="factory given is 'nowhere:f'"):
    export.save(tmp_path / 'e', *ours, spec, factory='nowhere:f')
  variables['params']['classifier']['bias'][0] = np.nan
  with pytest.raises(errors.UserError, match='not finite'):
    export.save(tmp_path / 'e', *ours, spec)
  assert not list(tmp_path.iterdir())


def damage(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  'file, name',
  [
    ('model.stablehlo', 'stablehlo'),
    ('model.safetensors', 'safetensors'),
    ('model.onnx', 'onnx'),
    ('structure.json', 'safetensors'),
  ],
)
def test_damage_is_seen(saved, tmp_path, file, name, capsys):
  folder = shutil.copytree(saved[0], tmp_path / 'e')
  damage(folder / file)
  with pytest.raises(errors.UserError, match=f'{file} is damaged'):
    export.load(folder, name)
  png = tmp_path / 'x.png'
  Image.new('L', (8, 8)).save(png)
  with pytest.raises(SystemExit) as end:
    predict.main([str(folder), str(png), f'--format={name}'])
  assert end.value.code == 2
  assert len(capsys.readouterr().err.splitlines()) == 1
  (folder / file).unlink()
  with pytest.raises(errors.UserError, match=f'{file} does not exist'):
    export.load(folder, name)


@pytest.mark.parametrize(
  'change',
  [
    {'schema': 'other'},
    {'schema': []},
    {'formats': None},
    {'formats': {'onnx': 1}},
    {'input': {}},
    {'files': {'model.onnx': 5}},
    {'class_names': ['one']},
    {'output': {'shape': [1]}},
  ],
  ids=str,
)
def test_a_manifest_that_was_edited_wrongly(saved, tmp_path, change):
  changed = {**saved[1], **change}
  (tmp_path / 'manifest.json').write_text(json.dumps(changed))
  with pytest.raises(errors.UserError, match='manifest.json: '):
    export.read_manifest(tmp_path)


def reseal(folder, file):
  """Makes the manifest fit a file that was changed."""
  there = export.read_manifest(folder)
  there['files'][file] = storage.sha256((folder / file).read_bytes())
  (folder / 'manifest.json').write_text(json.dumps(there))


@pytest.mark.parametrize('name', export.FORMATS)
@pytest.mark.parametrize('kind', ['empty', 'text', 'cut', 'bits', 'other'])
def test_damage_with_its_checksum_is_one_line(
  saved, other_counts, tmp_path, name, kind
):
  folder = shutil.copytree(saved[0], tmp_path / 'e')
  file = export.FORMATS[name].FILE
  content = (folder / file).read_bytes()
  changed = {
    'empty': b'',
    'text': b'no network at all ' * 1000,
    'cut': content[: len(content) // 3],
    'bits': content[:200] + b'\xff' * 40 + content[240:],
    'other': (other_counts / file).read_bytes(),
  }
  (folder / file).write_bytes(changed[kind])
  reseal(folder, file)
  if (name, kind) in (('stablehlo', 'other'), ('onnx', 'other')):
    return  # A whole network, only another one.
  with pytest.raises(errors.UserError, match=re.escape(file)) as e:
    export.load(folder, name)(np.zeros((1, 8, 8, 1), np.float32))
  assert str(e.value).count('\n') == 0


@pytest.fixture(scope='module')
def other_counts(tmp_path_factory):
  """Files of the same network with other channel counts."""
  folder = tmp_path_factory.mktemp('other')
  network = models.network('resnet20', 10, 8, 1, base_width=2)
  module = network.narrow(network.cost_model.widths)
  for room in export.FORMATS.values():
    room.write(folder, module, weights(module, (8, 8, 1)), (8, 8, 1))
  return folder


def test_a_program_that_calls_out_is_refused(saved, tmp_path, monkeypatch):
  """A call out of StableHLO could run any code of this process."""
  folder = shutil.copytree(saved[0], tmp_path / 'e')

  @jax.jit
  def program(x):
    return jnp.linalg.qr(x.reshape(x.shape[0], 8, 8))[0][:, :, 0] @ jnp.ones(
      (8, 10)
    )

  exported = jax.export.export(program)(
    export.FORMATS['stablehlo'].images((8, 8, 1))
  )
  (folder / 'model.stablehlo').write_bytes(exported.serialize())
  reseal(folder, 'model.stablehlo')
  with pytest.raises(errors.UserError, match='calls .*: not allowed'):
    export.load(folder, 'stablehlo')


def test_the_files_say_what_they_are(saved):
  """ONNX and safetensors carry metadata; a model card lies beside them."""
  import onnx
  import safetensors

  folder, made, structure = saved
  model = onnx.load(folder / 'model.onnx')
  found = {p.key: p.value for p in model.metadata_props}
  with safetensors.safe_open(folder / 'model.safetensors', 'numpy') as file:
    assert file.metadata() == found
  assert json.loads(found['class_names']) == made['class_names']
  assert json.loads(found['mean']) == [0.3]
  assert json.loads(found['std']) == [0.2]
  assert prune.Structure.from_json(found['structure']) == structure
  card = (folder / 'README.md').read_text()
  for text in (
    f'{structure.macs:,}',
    '| 3 | thing 3 |',
    'float32 [N, 8, 8, 1]',
  ):
    assert text in card


def test_missing_formats(saved, tmp_path):
  folder = shutil.copytree(saved[0], tmp_path / 'e')
  manifest = export.read_manifest(folder)
  del manifest['formats']['stablehlo']
  (folder / 'manifest.json').write_text(json.dumps(manifest))
  assert export.load(folder).format == 'safetensors'
  with pytest.raises(errors.UserError, match='one of safetensors, onnx; got'):
    export.load(folder, 'stablehlo')


# A model of the user's own, in a process that is really fresh.


class Own(nn.Module):
  classes: int

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Conv(6, (3, 3))(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return nn.Dense(self.classes)(x.mean((1, 2)))


def own(num_classes):
  return Own(num_classes)


def test_own_model_in_a_fresh_process(tmp_path):
  from pfs_jax import surgery

  factory = f'{__name__}:own'
  network = surgery.network_from_factory(factory, 10, 8, 1)
  structure = pruned(network)
  module, spec = network.narrow(structure.counts), spec_of(8, 1)
  variables = weights(module, (8, 8, 1))
  folder = tmp_path / 'e'
  manifest = export.save(
    folder, module, variables, structure, spec, factory=factory
  )
  assert set(manifest['formats']) == set(export.FORMATS)
  assert manifest['structure']['model']['factory'] == factory
  x = images_of(2, spec)
  expected = np.asarray(module.apply(variables, x))
  found = export.load(folder, 'safetensors', factory)(x)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def poison(folder, factory, ran):
  """Makes a bundle, hashes and all, ask for a call of os.system."""
  path, manifest = folder / 'structure.json', export.read_manifest(folder)
  structure = json.loads(path.read_text())
  structure['model'] = {
    'factory': factory,
    'num_classes': f'touch {ran}',
    'image_size': 8,
    'channels': 1,
  }
  path.write_text(json.dumps(structure))
  manifest['files']['structure.json'] = storage.sha256(path.read_bytes())
  manifest['structure']['model'] = structure['model']
  manifest['build'] = 'pfs_jax.stages.exporting:build_from'
  (folder / 'manifest.json').write_text(json.dumps(manifest))


@pytest.mark.parametrize('factory', ['', 'tests.test_export:own'])
def test_a_bundle_runs_no_code_that_it_names(
  saved, tmp_path, capsys, monkeypatch, factory
):
  folder, ran = shutil.copytree(saved[0], tmp_path / 'e'), tmp_path / 'ran'
  poison(folder, 'os:system', ran)
  Image.new('L', (8, 8)).save(tmp_path / 'x.png')
  with pytest.raises(SystemExit) as end:
    predict.main(
      [
        *(str(folder), str(tmp_path / 'x.png')),
        *('--format=safetensors', f'--factory={factory}'),
      ]
    )
  assert not ran.exists() and end.value.code == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and "model.factory is 'os:system'" in error


def test_what_the_fresh_process_says_is_passed_on(tmp_path):
  with pytest.raises(errors.UserError, match='back: .*manifest.json does not'):
    bundle._in_fresh_process(tmp_path, [np.zeros((1, 8, 8, 1))], '')


# Predict.


@pytest.mark.parametrize(
  'args, message',
  [
    ([], 'required: directory, image'),
    (['E'], 'required: image'),
    (['/nowhere', 'P'], 'manifest.json does not exist'),
    (['E', '/nowhere.png'], '/nowhere.png cannot be read: No such file'),
    (['E', 'E/manifest.json'], 'cannot be read: it is no image'),
    (['E', 'E'], 'cannot be read: Is a directory'),
    (['E', 'P', '--format=tflite'], "got 'tflite'"),
    (['E', 'P', '--top=0'], '--top must be >= 1'),
    (['E', 'P', '--top=x'], 'invalid int'),
    (['E', 'P', '--fast'], 'unrecognized arguments: --fast'),
  ],
)
def test_predict_refuses_in_one_line(saved, tmp_path, capsys, args, message):
  png = tmp_path / 'p.png'
  Image.new('L', (8, 8)).save(png)
  names = {'E': str(saved[0]), 'P': str(png)}
  names['E/manifest.json'] = str(saved[0] / 'manifest.json')
  with pytest.raises(SystemExit) as end:
    predict.main([names.get(a, a) for a in args])
  shown = capsys.readouterr()
  assert end.value.code == 2 and not shown.out
  assert len(shown.err.splitlines()) == 1 and message in shown.err


def test_predict_is_the_softmax_of_the_normalised_image(
  saved, tmp_path, capsys
):
  pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
  paths = [str(tmp_path / f'{i}.png') for i in range(2)]
  for path, image in zip(paths, pixels, strict=True):
    Image.fromarray(image).save(path)
  predict.main([str(saved[0]), *paths, '--format=onnx', '--top=10'])
  lines = capsys.readouterr().out.splitlines()
  module, variables, _, _ = network_of('resnet20')
  x = (pixels[..., None] / 255 - 0.3) / 0.2
  logits = np.asarray(module.apply(variables, x.astype(np.float32)), float)
  shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  expected = [
    f'{path}: thing {i} {share[i]:.1%}'
    for path, share in zip(paths, shares, strict=True)
    for i in np.argsort(-share, kind='stable')
  ]
  assert lines == expected


def test_images_of_every_kind(tmp_path):
  """A ramp, saved in many ways, is read as the same ramp."""
  ramp = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))
  grey = Image.fromarray(ramp)
  deep = Image.fromarray(ramp.astype(np.uint16) * 257)
  cases = {
    'grey.png': grey,
    'rgb.png': grey.convert('RGB'),
    'rgba.png': grey.convert('RGBA'),
    'palette.png': grey.convert('P'),
    'deep.png': deep,
    'large.png': grey.resize((64, 64), Image.Resampling.NEAREST),
    'grey.bmp': grey,
    'no_suffix': grey,
  }
  for channels in (1, 3):
    expected = {'shape': ['N', 8, 8, channels], 'centre_crop': 1.0}
    wanted = np.repeat(ramp[..., None], channels, -1)
    for name, image in cases.items():
      image.save(tmp_path / name, 'BMP' if name == 'grey.bmp' else 'PNG')
      found = predict.read_image(str(tmp_path / name), expected).astype(int)
      # Bilinear, antialiased: a large image is smoothed at its steps.
      allowed = 8 if name == 'large.png' else 0
      assert np.abs(found - wanted).max() <= allowed, name
  inverted = predict.read_image(str(tmp_path / 'rgb.png'), expected, True)
  np.testing.assert_array_equal(inverted, 255 - wanted)


def test_large_images_are_cropped_as_in_evaluation(tmp_path):
  from pfs_jax.data import decoding

  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'x.png')
  expected = {'shape': ['N', 16, 16, 3], 'centre_crop': 224 / 256}
  found = predict.read_image(str(tmp_path / 'x.png'), expected)
  wanted = decoding.decode((tmp_path / 'x.png').read_bytes(), 16)
  np.testing.assert_array_equal(found, wanted)
  streamed = dataclasses.replace(spec_of(16, 3), in_memory=False)
  structure = network_of('resnet20')[2]
  for name in ('structure.json', 'README.md'):
    (tmp_path / name).write_text('')
  made = manifest.of(tmp_path, structure, streamed, ())
  assert made['input']['centre_crop'] == 224 / 256


# The digits.


def test_the_stage_gives_what_the_training_found(finished, monkeypatch):
  given = {}

  def save(folder, module, variables, structure, spec, **more):
    given.update(folder=folder, spec=spec, **more)
    return {'formats': {}}

  monkeypatch.setattr(export, 'save', save)
  result = storage.read_json(finished / 'result.json')
  result['class_names'] = [f'folder {i}' for i in range(10)]
  storage.write_json(finished / 'result.json', result, sealed=True)
  stages.export(stages.Job(small_run.config(), finished), finished / 'out')
  assert given['folder'] == finished / 'out'
  assert list(given['spec'].class_names) == result['class_names']
  share = f'{result["test_accuracy"]:.2%} of 297 images'
  assert given['measured']['test accuracy'] == share


def test_bfloat16_is_exported_in_float32():
  from configs import digits

  c = digits.get_config()
  c.dtype = 'bfloat16'
  job = stages.Job(c, pathlib.Path('unused'))
  counts = job.network.cost_model.widths
  assert job.network.narrow(counts).dtype == jnp.bfloat16
  assert exporting._float32(job).network.narrow(counts).dtype == jnp.float32


def test_export_before_training_is_refused(tmp_path):
  from configs import digits

  with pytest.raises(errors.UserError, match='structure.json does not exist'):
    stages.export(stages.Job(digits.get_config(), tmp_path))
