"""Models: the registry of families, and the networks that the stages use.

One file for each family (`vgg`, `resnet`, `mobilenet`). `registry` builds by
name and states the channel groups; `networks` combines a module with its
groups, costs and narrower networks.
"""

from pfs_jax.models import networks, registry

Network = networks.Network
build_from = networks.build_from
network = networks.network
structure_from_list = networks.structure_from_list

GATE_SITES = registry.GATE_SITES
build = registry.build
cost_model = registry.cost_model
gate_sizes = registry.gate_sizes
gates_by_layer = registry.gates_by_layer
init = registry.init
slice_variables = registry.slice_variables
table = registry.table
