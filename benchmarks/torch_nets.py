# ruff: noqa: D101, D102, D103 (classes and methods named as everywhere)
"""Plain PyTorch definitions of four nets, and a process that times their steps.

Run by `benchmarks.versus_pytorch` with the Python of its own environment; it
imports nothing of pfs_jax. The nets have the published names of weights, which
`pfs_jax.interop` reads, or, for MobileNetV2, our own.
"""

import argparse
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.BatchNorm2d):
  """BatchNorm, whose output gates multiply if it has any."""

  def __init__(self, channels, gated=False, scale=1.0):
    super().__init__(channels)
    nn.init.constant_(self.weight, scale)
    self.gates = nn.Parameter(torch.ones(channels)) if gated else None

  def forward(self, x):
    x = super().forward(x)
    return x if self.gates is None else x * self.gates[None, :, None, None]


class Unit(nn.Module):
  """Convolution without bias, and BatchNorm."""

  def __init__(self, inputs, outputs, kernel=3, stride=1, groups=1, **norm):
    super().__init__()
    self.conv = nn.Conv2d(
      inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
    )
    self.bn = Norm(outputs, **norm)

  def forward(self, x):
    return self.bn(self.conv(x))


class VGG(nn.Module):
  def __init__(self, gated, width=64):
    super().__init__()
    layers, inputs = [], 3
    for stage, depth in enumerate((2, 2, 3, 3, 3)):
      for _ in range(depth):
        outputs = width * min(2**stage, 8)
        layers.append(Unit(inputs, outputs, gated=gated, scale=0.5))
        inputs = outputs
      layers.append(nn.MaxPool2d(2) if stage < 4 else nn.Identity())
    self.feature = nn.ModuleList(layers)
    self.classifier = nn.Linear(inputs, 10)

  def forward(self, x):
    for layer in self.feature:
      x = F.relu(layer(x)) if isinstance(layer, Unit) else layer(x)
    return self.classifier(x.mean((2, 3)))


class Block(nn.Module):
  def __init__(self, inputs, outputs, stride, gated):
    super().__init__()
    self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    self.bn1 = Norm(outputs, gated)
    self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
    self.bn2 = Norm(outputs)
    self.shortcut = nn.Sequential()
    if stride > 1:
      projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
      self.shortcut = nn.Sequential(projection, Norm(outputs))

  def forward(self, x):
    y = F.relu(self.bn1(self.conv1(x)))
    return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
  def __init__(self, gated, depth, width=16):
    super().__init__()
    self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
    self.bn1 = Norm(width)
    inputs = width
    for stage in range(3):
      outputs = width * 2**stage
      blocks = []
      for block in range(depth):
        stride = 2 if stage and not block else 1
        blocks.append(Block(inputs, outputs, stride, gated))
        inputs = outputs
      setattr(self, f'layer{stage + 1}', nn.Sequential(*blocks))
    self.linear = nn.Linear(inputs, 10)

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    x = self.layer3(self.layer2(self.layer1(x)))
    return self.linear(x.mean((2, 3)))


class Inverted(nn.Module):
  def __init__(self, inputs, hidden, outputs, stride, expand, residual, gated):
    super().__init__()
    self.residual = residual
    self.expand = Unit(inputs, hidden, 1) if expand else None
    self.depthwise = Unit(hidden, hidden, 3, stride, hidden, gated=gated)
    self.project = Unit(hidden, outputs, 1)

  def forward(self, x):
    y = x if self.expand is None else F.relu6(self.expand(x))
    y = self.project(F.relu6(self.depthwise(y)))
    return x + y if self.residual else y


class MobileNetV2(nn.Module):
  STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
  )

  def __init__(self, gated):
    super().__init__()
    self.stem = Unit(3, 32, 3, 2)
    inputs, number = 32, 0
    for expansion, outputs, blocks, stride in self.STAGES:
      for i in range(blocks):
        block = Inverted(
          inputs,
          inputs * expansion,
          outputs,
          1 if i else stride,
          number > 0,
          i > 0,
          gated,
        )
        setattr(self, f'block{number}', block)
        inputs, number = outputs, number + 1
    self.blocks = number
    self.last = Unit(inputs, 1280, 1, gated=gated)
    self.classifier = nn.Linear(1280, 10)

  def forward(self, x):
    x = F.relu6(self.stem(x))
    for i in range(self.blocks):
      x = getattr(self, f'block{i}')(x)
    return self.classifier(F.relu6(self.last(x)).mean((2, 3)))


NETS = {
  'resnet20': (lambda gated: ResNet(gated, 3), 128, 32),
  'resnet56': (lambda gated: ResNet(gated, 9), 128, 32),
  'vgg16': (VGG, 64, 32),
  'mobilenet_v2': (MobileNetV2, 16, 96),
}


def stepper(name, mode, variant):
  """A function that makes one step on a fixed batch.

  Variants: 'published' (NCHW, every weight requires a gradient),
  'channels_last', 'frozen' (also only the gates require one), 'compiled' (as
  'frozen' in a search and 'channels_last' in training, by `torch.compile`).
  """
  build, batch, side = NETS[name]
  torch.manual_seed(0)
  net = build(mode == 'search').train()
  x, y = torch.randn(batch, 3, side, side), torch.arange(batch) % 10
  if variant != 'published':
    net = net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
  gates = [p for n, p in net.named_parameters() if n.endswith('gates')]
  if mode == 'search':
    if variant in ('frozen', 'compiled'):
      net.requires_grad_(False)
      for gate in gates:
        gate.requires_grad_(True)
    optimizer = torch.optim.Adam(gates, 0.01)
  else:
    optimizer = torch.optim.SGD(
      net.parameters(), 0.1, 0.9, weight_decay=1e-4, nesterov=True
    )
  call = torch.compile(net) if variant == 'compiled' else net

  def step():
    net.zero_grad()
    loss = F.cross_entropy(call(x), y)
    if gates:
      mean = torch.cat([g.abs() for g in gates]).mean()
      loss = loss + 0.5 * (mean - 0.5) ** 2
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      for gate in gates:
        gate.clamp_(0, 1)

  return step


def write_logits(name, path):
  """Weights, images and logits in evaluation mode, for the check."""
  build, _, side = NETS[name]
  torch.manual_seed(0)
  net = build(True).eval()
  with torch.no_grad():
    for key, value in net.state_dict().items():
      if key.endswith(('gates', 'running_var', 'bn.weight')):
        value.uniform_(0.5, 1.5)
      elif key.endswith(('running_mean', 'bias')):
        value.normal_(0, 0.1)
    x = torch.randn(2, 3, side, side)
    arrays = {f'w/{k}': v.numpy() for k, v in net.state_dict().items()}
    np.savez(path, x=x.numpy(), logits=net(x).numpy(), **arrays)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('name', choices=NETS)
  parser.add_argument('mode', choices=['search', 'train', 'logits'])
  parser.add_argument('variant')
  args = parser.parse_args()
  if args.mode == 'logits':
    write_logits(args.name, args.variant)
    return
  step = stepper(args.name, args.mode, args.variant)
  step()
  step()
  print('ready', flush=True)
  for _ in sys.stdin:
    start = time.perf_counter()
    step()
    print(time.perf_counter() - start, flush=True)


if __name__ == '__main__':
  main()
