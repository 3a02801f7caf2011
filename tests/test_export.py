"""Exports answer as the network does, say what they are, or are not there."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
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
  surgery,
)
from pfs_jax.export import bundle, check, manifest
from pfs_jax.export import onnx as onnx_export
from pfs_jax.export import weights as weights_room
from tests import own_models, small_run

# Name: (image size, channels, width). The widths are as small as they go.
FAMILIES = {
  'resnet8': (8, 1, 2),
  'vgg16': (16, 3, 2),
  'mobilenet_v1': (16, 3, 4),
  'mobilenet_v2': (16, 1, 4),
  'resnet50': (16, 3, 4),
}


def spec_of(size, channels, classes=10):
  return dataclasses.replace(
    data.spec('digits'),
    image_size=size,
    channels=channels,
    num_classes=classes,
    mean=(0.3, 0.4, 0.5)[:channels],
    std=(0.2, 0.3, 0.4)[:channels],
    class_names=tuple(f'thing {i}' for i in range(classes)),
  )


def pruned(network, every=3):
  """A structure with other counts in every layer."""
  widths = network.cost_model.widths
  counts = tuple(max(1, w - i % every) for i, w in enumerate(widths))
  return models.structure_from_list(network, counts)


def network_of(family, every=3):
  size, channels, width = FAMILIES.get(family, (8, 1, 2))
  network = models.network(family, 10, size, channels, base_width=width)
  structure = pruned(network, every)
  module = network.narrow(structure.counts)
  spec = spec_of(size, channels)
  variables = own_models.drawn(module, images_of(1, spec))
  return module, variables, structure, spec


def images_of(n, spec):
  shape = (n, spec.image_size, spec.image_size, spec.channels)
  random = np.random.default_rng(2)
  return random.normal(size=shape).astype(np.float32)


def here(program, **_):
  """As a fresh process, in this one: a fresh one takes seconds to start."""
  check.main(*program[3:])
  return subprocess.CompletedProcess(program, 0)


@pytest.fixture(autouse=True, scope='module')
def in_process():
  """Saves compare in this process, where no test says otherwise."""
  with pytest.MonkeyPatch.context() as patch:
    replaced = {**vars(subprocess), 'run': here}
    patch.setattr(bundle, 'subprocess', types.SimpleNamespace(**replaced))
    patch.setattr(bundle, 'BATCH_SIZES', (2,))
    yield


@pytest.fixture(scope='module')
def network():
  return network_of('resnet8')


@pytest.fixture(scope='module')
def saved(network, tmp_path_factory):
  """(folder, manifest, structure): a ResNet-8 in all formats, for reading."""
  folder = tmp_path_factory.mktemp('saved') / 'export'
  return folder, export.save(folder, *network), network[2]


@pytest.fixture
def copied(saved, tmp_path):
  return shutil.copytree(saved[0], tmp_path / 'e')


# The formats.


@pytest.mark.parametrize('family', FAMILIES)
def test_every_family(family, tmp_path, shallow_mobilenets):
  module, variables, structure, spec = network_of(family)
  x = images_of(2, spec)
  expected = np.asarray(jax.jit(module.apply)(variables, x))
  largest = np.abs(expected).max()
  assert np.ptp(expected, axis=0).max() > 0.01 * largest  # It depends on x.
  assert weights_room.build(structure) == module  # Safetensors' reader.
  onnx_export.write(tmp_path, module, variables, x.shape[1:])
  run, _ = onnx_export.read(tmp_path, x.shape[1:])
  # The suite compiles without optimisations, which round otherwise.
  np.testing.assert_allclose(run(x), expected, rtol=0, atol=5e-4 * largest)
  if family == 'resnet8':  # Neither BatchNorm nor more than one Transpose.
    nodes = onnx.load(tmp_path / 'model.onnx').graph.node
    assert collections.Counter(node.op_type for node in nodes) == {
      **{'Conv': 9, 'Relu': 7, 'Add': 3, 'Gemm': 1, 'Transpose': 1},
      **{'ReduceSum': 1, 'Div': 1},
    }


@pytest.mark.parametrize('name', export.FORMATS)
def test_any_batch_size_and_no_other_shape(saved, name, refused):
  classify = export.load(saved[0], name)
  for n in (1, 4):
    assert classify(np.zeros((n, 8, 8, 1), np.float32)).shape == (n, 10)
  for bad in (
    np.zeros((1, 8, 9, 1), np.float32),
    np.zeros((8, 8, 1), np.float32),
    np.zeros((0, 8, 8, 1), np.float32),
    np.zeros((1, 8, 8, 1), np.uint8),
  ):
    refused(r'float \[N, 8, 8, 1\]; got', classify, bad)
  with pytest.raises(errors.UserError, match='takes other images than .9, 9'):
    export.FORMATS[name].read(saved[0], (9, 9, 1))


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
  variance = jnp.square(x - mean).mean((1, 2, 3), keepdims=True)
  return (x - mean) / jnp.sqrt(variance + 1e-3)


def normed(**kwargs):
  return nn.BatchNorm(use_running_average=True, **kwargs)


THREE = np.arange(3, dtype=np.float32).reshape(1, 1, 1, 3)
OPERATORS = {
  'bias': lambda x: nn.relu(conv(x)),
  'stride and SAME': lambda x: conv(x, strides=2, padding='SAME'),
  'dilated': lambda x: conv(x, kernel_dilation=2),
  'grouped': lambda x: conv(x, 6, feature_group_count=3),
  'depthwise': lambda x: conv(x, 3, feature_group_count=3, use_bias=False),
  'batchnorm first': lambda x: conv(nn.relu(normed()(x))),
  'batchnorm twice': lambda x: normed()(normed()(conv(x))),
  'used before its norm': lambda x: (lambda y: y + normed()(y))(conv(x)),
  'factor wider than the convolution': lambda x: conv(x, 1) * THREE,
  'term wider than the convolution': lambda x: conv(x, 1) + THREE,
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
    nn.swish(x) + nn.gelu(x) + nn.gelu(x, False) + nn.hard_swish(x) + nn.elu(x)
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
  'stack': lambda x: jnp.stack([conv(x, 3), jnp.ones_like(x), x], -2),
  'unstack': lambda x: conv(jnp.unstack(x, axis=1)[3][:, None]),
  'tile': lambda x: jnp.tile(conv(x, 2), (1, 2, 1, 3)),
  'softplus, mish': lambda x: nn.softplus(9 * x) + jax.nn.mish(conv(x, 3)),
  'is finite': lambda x: jnp.where(jnp.isfinite(jnp.log(x)), x, 5.0),
  'split': lambda x: (lambda a, b: jnp.concatenate([b, a, nn.glu(b)], -1))(
    *jnp.split(conv(x, 5), [1], -1)
  ),
  'split by rows': lambda x: sum(
    i * part for i, part in enumerate(jnp.split(x, 4, 1))
  ),
  'sign': lambda x: jnp.sign(nn.relu(x)) + 3 * jnp.sign(conv(x, 3)),
  'not equal': lambda x: jnp.where(
    (nn.relu(x) != 0) != (conv(x, 3) > 0), x, jnp.where(jnp.isnan(x), 5.0, 7.0)
  ),
  'reversed': lambda x: (
    jnp.flip(x, (0, 2)) + 3 * jnp.flip(conv(x, 3), -1) + jax.lax.rev(x, ())
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
  x = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
  variables = own_models.drawn(module, x)
  onnx_export.write(tmp_path, module, variables, (8, 8, 3))
  run, _ = onnx_export.read(tmp_path, (8, 8, 3))
  expected = jax.jit(module.apply)(variables, x)
  for n in (1, 3) if name != 'reversed' else (3,):  # That of the batch, too.
    np.testing.assert_allclose(run(x[:n]), expected[:n], rtol=1e-4, atol=1e-4)


REFUSED = {
  'conv_general_dilated.*transposed': lambda x: nn.ConvTranspose(
    4, (2, 2), (2, 2)
  )(x),
  'sort': lambda x: jnp.sort(x, 1),
  'cumsum': lambda x: jnp.cumsum(x, 1),
  'dot_general.*depends on the image': lambda x: x @ x,
  r'gather .*jax\.lax\.slice can': lambda x: x[:, ::2],
  'split.*along the batch': lambda x: jnp.split(x, 1)[0],
  'dim_as_value': lambda x: x - x.mean(),
  'convert_element_type.*bfloat16.*dtype=float32': lambda x: conv(
    x, dtype=jnp.bfloat16
  ),
}


@pytest.mark.parametrize('message', REFUSED)
def test_onnx_refuses_by_name(message, tmp_path, monkeypatch):
  monkeypatch.setitem(OPERATORS, 'refused', REFUSED[message])
  module = Around('refused')
  variables = own_models.drawn(module, jnp.zeros((1, 8, 8, 8)))
  with pytest.raises(errors.UserError, match=f'the operator {message}'):
    onnx_export.write(tmp_path, module, variables, (8, 8, 8))
  assert not list(tmp_path.iterdir())


# The folder.

FILES = {room.FILE: name for name, room in export.FORMATS.items()}
INPUT = {
  'shape': ['N', 8, 8, 1],
  'dtype': 'float32',
  'layout': 'NHWC',
  'channels': 'grey',
  'range': [0.0, 1.0],
  'mean': [0.3],
  'std': [0.2],
  'centre_crop': 1.0,
}


def test_the_manifest(saved):
  folder, manifest, structure = saved
  assert manifest == json.loads((folder / 'manifest.json').read_text())
  assert manifest['input'] == INPUT
  assert manifest['class_names'] == [f'thing {i}' for i in range(10)]
  described = manifest['structure']
  assert described['macs'] == structure.macs
  assert described['params'] == structure.params
  assert list(described['counts'].values()) == list(structure.counts)
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


def test_the_files_say_what_they_are(saved):
  """ONNX and safetensors carry metadata; a model card lies beside them."""
  import safetensors

  folder, made, structure = saved
  model = onnx.load(folder / 'model.onnx')
  found = {p.key: p.value for p in model.metadata_props}
  with safetensors.safe_open(folder / 'model.safetensors', 'numpy') as file:
    assert file.metadata() == found
  assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
  assert json.loads(found['class_names']) == made['class_names']
  assert [json.loads(found[k]) for k in ('mean', 'std')] == [[0.3], [0.2]]
  assert prune.Structure.from_json(found['structure']) == structure
  content = bytearray((folder / 'model.stablehlo').read_bytes())
  program = jax.export.deserialize(content)
  assert program.platforms == ('cpu', 'cuda', 'tpu')
  assert program.fun_name == found['network']
  assert made['formats']['stablehlo']['platforms'] == ['cpu', 'cuda', 'tpu']
  card = (folder / 'README.md').read_text()
  for text in (
    f'{structure.macs:,}',
    '| 3 | thing 3 |',
    'float32 [N, 8, 8, 1]',
  ):
    assert text in card


def content_of(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize('name', export.FORMATS)
def test_one_that_differs_leaves_the_former(network, copied, monkeypatch, name):
  """One wrong bias is seen; nothing is left of the new export."""
  room, before = export.FORMATS[name], content_of(copied)
  write = room.write

  def shifted(folder, module, variables, *more):
    changed = jax.tree.map(np.array, variables)
    changed['params']['classifier']['bias'][3] += 0.5
    write(folder, module, changed, *more)

  monkeypatch.setattr(room, 'write', shifted)
  with pytest.raises(errors.UserError, match=f'{name}: the logits read back'):
    export.save(copied, *network, formats=(name,))
  assert content_of(copied) == before
  assert [p.name for p in copied.parent.iterdir()] == ['e']


def test_nan_is_no_answer(saved):
  for found in (np.full((1, 2), np.nan), np.ones((1, 3))):
    with pytest.raises(errors.UserError, match='onnx: .* (nan|inf) of'):
      bundle._error('onnx', [found], [np.ones((1, 2))])
  nan = export.Exported('onnx', saved[1], lambda x: np.full((1, 10), np.nan))
  with pytest.raises(errors.UserError, match='not finite'):
    predict.probabilities(nan, [np.zeros((8, 8, 1), np.uint8)])


def test_what_replaces_what(network, copied):
  module, variables, structure, spec = network
  before = (copied / 'model.safetensors').read_bytes()
  only = {'formats': ('safetensors',)}
  # The same structure, other weights.
  again = jax.tree.map(lambda x: x + 1, variables)
  export.save(copied, module, again, structure, spec, **only)
  assert (copied / 'model.safetensors').read_bytes() != before
  # Another structure.
  other = dataclasses.replace(structure, macs=structure.macs + 1)
  with pytest.raises(errors.UserError, match='of another structure'):
    export.save(copied, module, variables, other, spec, **only)
  export.save(copied, module, variables, other, spec, overwrite=True, **only)
  assert export.read_manifest(copied)['structure']['macs'] == other.macs
  # Something else, even if asked.
  folder = copied.parent / 'mine'
  folder.mkdir()
  (folder / 'thesis.tex').write_text('')
  with pytest.raises(errors.UserError, match='exists and holds thesis.tex'):
    export.save(folder, *network, overwrite=True, **only)
  (copied / 'engine.plan').write_text('')  # The user's own, beside an export.
  with pytest.raises(errors.UserError, match='exists and holds engine.plan'):
    export.save(copied, *network, overwrite=True, **only)
  assert sorted(p.name for p in copied.parent.iterdir()) == ['e', 'mine']


def test_bad_arguments(network, tmp_path, refused):
  names = ('module', 'variables', 'structure', 'spec')
  good = dict(zip(names, network, strict=True))
  unnamed = dataclasses.replace(good['structure'], model={})
  nan = jax.tree.map(lambda x: x * np.nan, good['variables'])
  two = types.SimpleNamespace(apply=lambda variables, x: (x, x[:, 0]))
  fixed = types.SimpleNamespace(apply=lambda _, x: np.eye(len(x), 10) * x.sum())
  formats = 'must be some of stablehlo, safetensors, onnx'
  for name, value, message in (
    ('formats', ('tflite',), formats),
    ('formats', (), formats),
    ('spec', spec_of(8, 1, 7), r'logits \[N, 7\]; got \(2, 10\)'),
    ('module', two, 'got several outputs for 2'),
    ('module', fixed, 'the model as stablehlo cannot be used'),
    ('structure', unnamed, 'model.name is missing'),
    ('factory', 'nowhere:f', "factory given is 'nowhere:f'"),
    ('variables', nan, 'not finite'),
  ):
    refused(message, export.save, tmp_path / 'e', **good | {name: value})
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('file', [*FILES, 'structure.json'])
def test_a_changed_or_missing_file_is_named(copied, file, refused):
  name = FILES.get(file, 'safetensors')
  content = bytearray((copied / file).read_bytes())
  content[len(content) // 2] ^= 1
  (copied / file).write_bytes(content)
  refused(f'{file} is damaged', export.load, copied, name)
  (copied / file).unlink()
  refused(f'{file} does not exist', export.load, copied, name)


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
    {'class_names': ['\x1b[31m'] * 10},
    {'input': INPUT | {'std': [0.0]}},
    {'input': INPUT | {'mean': [1e300]}},
    {'input': INPUT | {'shape': ['N', 2**20, 2**20, 1]}},
    {'output': {'shape': [1]}},
  ],
  ids=str,
)
def test_a_manifest_that_was_edited_wrongly(saved, tmp_path, change, refused):
  changed = {**saved[1], **change}
  (tmp_path / 'manifest.json').write_text(json.dumps(changed))
  refused('manifest.json: ', export.read_manifest, tmp_path)


def reseal(folder, file, **changed):
  """Makes the manifest fit a file that was changed."""
  there = export.read_manifest(folder) | changed
  there['files'][file] = storage.sha256((folder / file).read_bytes())
  (folder / 'manifest.json').write_text(json.dumps(there))


@pytest.fixture(scope='module')
def other_counts(tmp_path_factory):
  """An export of the same network with other channel counts."""
  folder = tmp_path_factory.mktemp('other') / 'e'
  export.save(folder, *network_of('resnet8', every=2))
  return folder


@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize('kind', ['empty', 'text', 'cut', 'bits'])
def test_damage_with_its_checksum_is_one_line(copied, file, kind):
  content = (copied / file).read_bytes()
  changed = {
    'empty': b'',
    'text': b'no network at all ' * 1000,
    'cut': content[: len(content) // 3],
    'bits': content[:200] + b'\xff' * 40 + content[240:],
  }
  (copied / file).write_bytes(changed[kind])
  reseal(copied, file)
  with pytest.raises(errors.UserError, match=re.escape(file)) as e:
    export.load(copied, FILES[file])(np.zeros((1, 8, 8, 1), np.float32))
  assert str(e.value).count('\n') == 0


@pytest.mark.parametrize('file', FILES)
def test_a_network_of_other_counts_is_one_line(
  copied, other_counts, file, refused
):
  """A whole file of another export, checksum and all."""
  given = (export.load, copied, FILES[file])
  shutil.copy(other_counts / file, copied)
  reseal(copied, file)
  assert '\n' not in str(refused(re.escape(file), *given))
  shutil.copy(other_counts / 'structure.json', copied)
  reseal(copied, 'structure.json')
  wrong = 'structure.json is not of the structure in manifest.json'
  assert '\n' not in str(refused(wrong, *given))
  theirs = export.read_manifest(other_counts)['structure']
  reseal(copied, file, structure=theirs)
  assert export.load(copied, FILES[file]).manifest['structure'] == theirs


def test_a_program_that_calls_out_is_refused(copied, refused):
  """A call out of StableHLO could run any code of this process."""

  @jax.jit
  def program(x):
    q, _ = jnp.linalg.qr(x.reshape(x.shape[0], 8, 8))
    return q[:, :, 0] @ jnp.ones((8, 10))

  images = export.FORMATS['stablehlo'].images((8, 8, 1))
  exported = jax.export.export(program)(images)
  (copied / 'model.stablehlo').write_bytes(exported.serialize())
  reseal(copied, 'model.stablehlo')
  refused('calls .*: not allowed', export.load, copied, 'stablehlo')


def test_weights_in_another_file_are_refused(copied, monkeypatch, refused):
  """onnxruntime would read them, even from the working directory."""
  monkeypatch.chdir(copied)
  model = onnx.load(copied / 'model.onnx')
  for tensor in model.graph.initializer:
    onnx.external_data_helper.set_external_data(tensor, 'weights')
  onnx.save(model, copied / 'model.onnx')
  reseal(copied, 'model.onnx')
  refused('refers to other files', export.load, copied, 'onnx')


def test_missing_formats(copied, monkeypatch, refused):
  monkeypatch.setenv('HOME', str(copied.parent))
  manifest = export.read_manifest(copied)
  del manifest['formats']['stablehlo']
  (copied / 'manifest.json').write_text(json.dumps(manifest))
  assert export.load(f'~/{copied.name}').format == 'safetensors'
  refused('one of safetensors, onnx; got', export.load, copied, 'stablehlo')


# A model of the user's own, in a process that is really fresh.

OWN = 'tests.test_tournament:Tiny'


@pytest.mark.slow
def test_own_model_in_a_fresh_process(tmp_path, monkeypatch):
  monkeypatch.setattr(bundle, 'subprocess', subprocess)
  network = surgery.network_from_factory(OWN, 10, 8, 1)
  structure = pruned(network)
  module, spec = network.narrow(structure.counts), spec_of(8, 1)
  variables = own_models.drawn(module, images_of(1, spec))
  folder = tmp_path / 'e'
  made = export.save(folder, module, variables, structure, spec, factory=OWN)
  assert set(made['formats']) == set(export.FORMATS)
  assert made['structure']['model']['factory'] == OWN
  x = images_of(2, spec)
  expected = np.asarray(module.apply(variables, x))
  found = export.load(folder, 'safetensors', OWN)(x)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def poison(folder, factory, ran):
  """Makes a bundle, hashes and all, ask for a call of os.system."""
  path = folder / 'structure.json'
  model = {'factory': factory, 'num_classes': f'touch {ran}'}
  model |= {'image_size': 8, 'channels': 1}
  path.write_text(json.dumps(json.loads(path.read_text()) | {'model': model}))
  described = export.read_manifest(folder)['structure'] | {'model': model}
  code = 'pfs_jax.stages.exporting:build_from'
  reseal(folder, 'structure.json', structure=described, build=code)


@pytest.mark.parametrize('factory', ['', OWN])
def test_a_bundle_runs_no_code_that_it_names(copied, tmp_path, capsys, factory):
  ran = tmp_path / 'ran'
  poison(copied, 'os:system', ran)
  Image.new('L', (8, 8)).save(tmp_path / 'x.png')
  options = ['--format=safetensors', f'--factory={factory}']
  with pytest.raises(SystemExit) as end:
    predict.main([str(copied), str(tmp_path / 'x.png'), *options])
  assert not ran.exists() and end.value.code == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and "model.factory is 'os:system'" in error


def test_what_the_fresh_process_says_is_said(network, tmp_path, monkeypatch):
  said = subprocess.CompletedProcess('', 2, stderr='a warning\nerror: no room.')
  monkeypatch.setattr(bundle.subprocess, 'run', lambda *_, **__: said)
  with pytest.raises(errors.UserError, match='cannot be read back: no room.'):
    export.save(tmp_path / 'e', *network, formats=('onnx',))
  assert not list(tmp_path.iterdir())


def test_a_fresh_process_that_hangs_is_one_line(network, tmp_path, monkeypatch):
  def run(*_, **__):
    raise subprocess.TimeoutExpired('python', 1)

  monkeypatch.setattr(bundle.subprocess, 'run', run)
  with pytest.raises(errors.UserError, match='cannot be read back within'):
    export.save(tmp_path / 'e', *network, formats=('onnx',))


def test_an_interrupted_replacement_leaves_the_former(
  network, copied, monkeypatch
):
  before, replace = content_of(copied), os.replace

  def fail(source, target):
    if pathlib.Path(source).name == 'new':
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(bundle.os, 'replace', fail)
  with pytest.raises(KeyboardInterrupt):
    export.save(copied, *network, formats=('onnx',))
  assert content_of(copied) == before


# Predict.


@pytest.mark.parametrize(
  'args, message',
  [
    ([], 'required: directory, image'),
    (['E'], 'required: image'),
    (['/nowhere', 'P'], 'manifest.json does not exist'),
    (['E', '/nowhere.png'], '/nowhere.png does not exist'),
    (['E', 'E/manifest.json'], 'cannot be read: its format is unknown'),
    (['E', 'E'], 'cannot be read: it is not a file'),
    (['E', '/dev/zero'], 'cannot be read: it is not a file'),
    (['E', 'S'], 'cannot be read: its format is unknown'),
    (['D', 'P'], 'model.stablehlo is damaged'),
    (['E', 'P', '--format=tflite'], "got 'tflite'"),
    (['E', 'P', '--top=0'], '--top must be >= 1'),
    (['E', 'P', '--top=x'], 'invalid int'),
    (['E', 'P', '--fast'], 'unrecognized arguments: --fast'),
  ],
)
def test_predict_refuses_in_one_line(saved, copied, capsys, args, message):
  """E is an export, D a damaged one, P a picture, S one for Ghostscript."""
  (copied / 'model.stablehlo').write_bytes(b'')
  places = {'E': saved[0], 'D': copied, 'P': copied.parent / 'p.png'}
  places['E/manifest.json'] = saved[0] / 'manifest.json'
  places['S'] = copied.parent / 's.png'
  Image.new('L', (8, 8)).save(places['P'])
  Image.new('L', (8, 8)).save(places['S'], 'EPS')
  with pytest.raises(SystemExit) as end:
    predict.main([str(places.get(a, a)) for a in args])
  shown = capsys.readouterr()
  assert end.value.code == 2 and not shown.out
  assert len(shown.err.splitlines()) == 1 and message in shown.err


def test_predict_is_a_softmax(network, saved, tmp_path, capsys):
  pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
  paths = [str(tmp_path / f'{i}\udcff.png') for i in range(2)]  # Not UTF-8.
  for path, image in zip(paths, pixels, strict=True):
    alpha = bytes(range(256))  # Pillow would warn.
    Image.fromarray(image).convert('P').save(path, transparency=alpha)
  predict.main([str(saved[0]), *paths, '--format=onnx', '--top=10'])
  lines = capsys.readouterr().out.splitlines()
  module, variables, _, _ = network
  x = ((pixels[..., None] / 255 - 0.3) / 0.2).astype(np.float32)
  logits = np.asarray(jax.jit(module.apply)(variables, x), float)
  shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  expected = [
    f'{path}: thing {i} {share[i]:.1%}'.replace('\udcff', r'\udcff')
    for path, share in zip(paths, shares, strict=True)
    for i in np.argsort(-share, kind='stable')
  ]
  assert lines == expected


def test_images_of_other_kinds(tmp_path):
  """A ramp, saved in many ways; test_imagenet_data.py has those in colour."""
  ramp = np.tile(np.arange(0, 256, 32, dtype=np.uint8), (8, 1))
  grey, path = Image.fromarray(ramp), tmp_path / 'no_suffix'
  deep = Image.fromarray(ramp.astype(np.uint16) * 257)
  for channels in (1, 3):
    expected = {'shape': ['N', 8, 8, channels], 'centre_crop': 1.0}
    wanted = np.repeat(ramp[..., None], channels, -1)
    for image, kind in (
      *((grey, 'PNG'), (deep, 'PNG')),
      *((grey, 'BMP'), (grey.convert('RGB'), 'PNG')),
    ):
      image.save(path, kind)
      found = predict.read_image(str(path), expected)
      np.testing.assert_array_equal(found, wanted)
  inverted = predict.read_image(str(path), expected, True)
  np.testing.assert_array_equal(inverted, 255 - wanted)
  for pixels in (np.float32(ramp / 255), ramp.astype(np.int32)):
    Image.fromarray(pixels).save(path, 'TIFF')
    with pytest.raises(errors.UserError, match='its pixels have 32 bits'):
      predict.read_image(str(path), expected)


def test_predict_takes_many_images_in_parts(saved, tmp_path, capsys):
  Image.new('L', (8, 8)).save(tmp_path / 'p.png')
  (tmp_path / 'bad.png').touch()
  paths = [str(tmp_path / 'p.png')] * 64 + [str(tmp_path / 'bad.png')]
  with pytest.raises(SystemExit):
    predict.main([str(saved[0]), *paths])
  assert len(capsys.readouterr().out.splitlines()) == 64


def test_large_images_are_cropped_as_in_evaluation(tmp_path):
  from pfs_jax.data import decoding

  pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / 'x.png')
  expected = {'shape': ['N', 16, 16, 3], 'centre_crop': 224 / 256}
  found = predict.read_image(str(tmp_path / 'x.png'), expected)
  wanted = decoding.decode((tmp_path / 'x.png').read_bytes(), 16)
  np.testing.assert_array_equal(found, wanted)
  streamed = dataclasses.replace(spec_of(16, 3), in_memory=False)
  structure = prune.Structure(('a',), (1,), 1, 1)
  for name in ('structure.json', 'README.md'):
    (tmp_path / name).write_text('')
  made = manifest.of(tmp_path, structure, streamed, ())
  assert made['input']['centre_crop'] == 224 / 256


# The digits.


def test_the_stage_gives_what_the_training_found(finished, monkeypatch):
  """The export computes in float32, whatever the dtype of the training."""
  given = {}

  def save(folder, module, variables, structure, spec, **more):
    given.update(folder=folder, module=module, spec=spec, **more)
    return {'formats': {}}

  monkeypatch.setattr(export, 'save', save)
  identity = storage.read_json(finished / 'train' / 'config.json')
  identity['config.dtype'] = 'bfloat16'
  storage.write_json(finished / 'train' / 'config.json', identity)
  result = storage.read_json(finished / 'result.json')
  result |= {'class_names': [f'folder {i}' for i in range(10)], 'mean': [0.25]}
  storage.write_json(finished / 'result.json', result, sealed=True)
  job = stages.Job(small_run.config(dtype='bfloat16'), finished)
  counts = job.network.cost_model.widths
  assert job.network.narrow(counts).dtype == jnp.bfloat16
  stages.execute('export', job, finished / 'out', ['onnx'])
  assert given['formats'] == ['onnx']
  assert given['module'].dtype == jnp.float32
  assert given['folder'] == finished / 'out'
  assert list(given['spec'].class_names) == result['class_names']
  assert given['spec'].mean == (0.25,) and given['spec'].std == job.spec.std
  share = f'{result["test_accuracy"]:.2%} of 297 images'
  assert given['measured']['test accuracy'] == share


def test_a_model_whose_config_names_code_has_no_safetensors(capsys):
  model = small_run.config().model
  assert stages.exporting._possible(model) == list(export.FORMATS)
  model.call = 'my_module:call'
  possible = stages.exporting._possible(model)
  assert possible == ['stablehlo', 'onnx']
  assert 'does not accept config.model.call' in capsys.readouterr().err


def test_export_before_training_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match='structure.json does not exist'):
    stages.export(stages.Job(small_run.config(), tmp_path))
