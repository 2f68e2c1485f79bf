"""The devices that the planner knows, as numbers with their sources."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dppo.config import ClusterConfig

GIB = 1 << 30
# Bytes a second of a node that writes files, and of one that reads them; of a shared file system, assumed.
FILE_BANDWIDTH = {"shm": 4e9, "disk": 1e9}
CPU_FLOPS_A_CORE = 57e9  # float32 matrix products, measured: benchmarks/trainer.md (115e9 on two cores)


@dataclass(frozen=True)
class Device:
    """One GPU, or a rank's share of a CPU machine. Bandwidths are bytes a second, in one direction."""

    name: str
    memory_bytes: int
    overhead_bytes: int  # of it that no tensor gets: driver context, communication buffers, fragments
    peak_flops: float  # dense, bfloat16
    achieved_share: float  # of the peak in a layer's matrix products, communication left out
    memory_bandwidth: float
    node_bandwidth: float  # to another device of the node
    network_bandwidth: float  # to a device of another node

    @property
    def is_gpu(self) -> bool:
        """Whether Transformer Engine and NCCL can be there."""
        return self.name != "cpu"

    @property
    def flops(self) -> float:
        """Floating-point operations a second in a layer's matrix products."""
        return self.peak_flops * self.achieved_share


# Memory: what nvidia-smi reports. Peaks, HBM and NVLink: NVIDIA's data sheets of H100 SXM, H200 SXM and HGX B200,
# without sparsity; NVLink's number counts both directions. Network: one 400 Gb/s adapter a GPU (DGX H100, H200, B200).
# Achieved: Megatron-core reports 240 TFLOP/s for Qwen3-30B-A3B and 302 for 235B on H100s, communication included.
GPUS = {
    "h100": Device("h100", 81559 << 20, 5 * GIB, 989.4e12, 0.40, 3.35e12, 450e9, 50e9),
    "h200": Device("h200", 143771 << 20, 6 * GIB, 989.4e12, 0.42, 4.8e12, 450e9, 50e9),
    "b200": Device("b200", 183359 << 20, 7 * GIB, 2250e12, 0.38, 7.7e12, 900e9, 50e9),
}


def device_of(cluster: ClusterConfig, processes_per_node: int) -> Device:
    """The device that `cluster.device` names; "auto": what this machine has.

    `processes_per_node`: ranks and engine workers that share a machine without GPUs. Raises ValueError for a GPU of
    this machine that the table does not have.
    """
    name = _own_device() if cluster.device == "auto" else cluster.device
    return GPUS[name] if name in GPUS else _cpu(processes_per_node)


def _own_device() -> str:
    import torch

    if not torch.cuda.device_count():
        return "cpu"
    found = torch.cuda.get_device_name()
    for name in GPUS:
        if name in found.lower():
            return name
    raise ValueError(f"cluster.device: got auto on a machine with {found}, expected one of cpu, {', '.join(GPUS)}")


def _cpu(processes: int) -> Device:
    """This machine's memory and cores, shared evenly; sockets of one machine for a network."""
    import psutil

    cores, share = psutil.cpu_count() or 1, max(processes, 1)
    return Device(
        "cpu",
        psutil.virtual_memory().total // share,
        GIB // 2,  # of a process that has imported torch and Megatron
        CPU_FLOPS_A_CORE * cores / share,
        1.0,
        20e9 / share,
        1e9,
        1e9,
    )
