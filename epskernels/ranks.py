"""The processes that torchrun started, this one among them: RANK, WORLD_SIZE and LOCAL_RANK of the environment.

They talk twice: at the beginning, so that all work on one list, and at the end, for the summary. gloo, or NCCL for GPUs.
"""

import datetime
import os

import torch
import torch.distributed as dist


class Ranks:
    """`rank` of `size`, and the `device` of this one; a context manager. A process alone needs no torch.distributed.

    device: "cuda" is the GPU number LOCAL_RANK. Raises ValueError for a numbered GPU that all would share.
    """

    def __init__(self, device="cpu"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device)
        if self.size > 1 and self.device.type == "cuda":
            if self.device.index is not None:
                raise ValueError(f"expected cuda, without a number, for {self.size} processes, got {device!r}")
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", self.rank)))

    def __enter__(self):
        if self.size > 1:
            on_gpu = self.device.type == "cuda"
            if on_gpu:
                torch.cuda.set_device(self.device)
            # Who is done first waits for the last one's work.
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(days=30))
        return self

    def __exit__(self, kind, *_):
        if self.size > 1 and kind is None:
            dist.destroy_process_group()

    def from_first(self, make):
        """make() of rank 0, on every rank; also its exception."""
        box = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def gather(self, value):
        """The values of all ranks, in order, on every rank."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values
