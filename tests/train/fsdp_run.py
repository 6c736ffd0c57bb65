"""`tiny_run` under FSDP2 on CPU processes, where accelerate would fall back to DDP: its state is set here, the rest is
as on GPUs. torchrun --nproc_per_node 2 -m tests.train.fsdp_run PICTURES OUTPUT --trainer '{"fsdp": "full_shard"}'
"""

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from tests.train import tiny_run


def main() -> None:
    """Keep the FSDP plugin that the first state was made with in every later one."""
    original, plugins = AcceleratorState.__init__, []

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugins.extend([fsdp_plugin] if fsdp_plugin else [])
        if plugins:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]

    AcceleratorState.__init__ = with_plugin
    tiny_run.main()


if __name__ == "__main__":
    main()
