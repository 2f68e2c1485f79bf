"""Everything that touches Megatron-core: device, process groups, model, optimizer, one training step.

Importing this package puts the CPU in a GPU's place where there is none (`device.py`): it must happen before the
first import of Megatron, and every module here imports Megatron.
"""

from megatron_dppo.backend.device import install_stand_in

install_stand_in()
