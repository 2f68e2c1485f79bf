"""Everything that touches Megatron-core: device, process groups, model, optimizer, one training step."""
