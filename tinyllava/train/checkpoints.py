"""What a stage puts into its checkpoints. checkpoint/saving.py writes the files."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tinyllava import checkpoint
from tinyllava.model.modules import find_untrained_parts
from tinyllava.model.vlm import VLM
from tinyllava.train.record import RunRecord
from tinyllava.train.start import WeightFiles


class CheckpointWriter:
    """Writes whole checkpoints of one stage. The files of parts that are not trained are links to earlier files."""

    def __init__(self, vlm: VLM, stage: str, record: RunRecord, start_files: WeightFiles) -> None:
        """start_files: the files of the weights that the stage started from (see `train.start`)."""
        self.vlm, self.stage, self.record = vlm, stage, record
        self.untrained = find_untrained_parts(vlm.model)
        weights = vlm.model.named_parameters()
        self.dtypes = {name: weight.stored_dtype for name, weight in weights if hasattr(weight, "stored_dtype")}
        self.files = {part: files for part, files in start_files.items() if part in self.untrained}

    def write(
        self, directory: Path, name: Path, step: int, skipped: int, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a checkpoint into `directory`, which will be renamed to `name`.

        skipped: number of samples whose images could not be read. state: the weights, if gathered from shards.
        """
        run = {**self.record.describe_stage(self.stage, step), "skipped_in_training": skipped}
        state = dict(state or self.vlm.model.state_dict())
        state |= {name: state[name].to(dtype) for name, dtype in self.dtypes.items()}
        written = checkpoint.save(self.vlm, directory, run, state, self.files, name)
        self.files |= {part: [name / file.name for file in written[part]] for part in self.untrained}
