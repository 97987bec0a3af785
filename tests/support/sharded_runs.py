"""Run under `accelerate launch`: each configuration file (JSON) up to its half, and from the checkpoint to its end."""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from pliant.processes import end_process
from pliant.training import parse_config, trainer


def main(files: list[str]) -> None:
    made: list[trainer.Trainer] = []

    class Watched(trainer.Trainer):
        def run(self) -> trainer.TrainResult:
            made.append(self)
            return super().run()

    trainer.Trainer = Watched  # type: ignore[misc]
    for file in files:
        tree = json.loads(Path(file).read_text())
        trainer.train(parse_config({**tree, "steps": tree["steps"] // 2}), quiet=True)
        result = trainer.train(parse_config({**tree, "resume": "latest"}), quiet=True)
        state = made[-1].state
        moments = state.optimizer.state_dict()["state"][0]
        assert all(isinstance(t, DTensor) for t in (*state.parameters.values(), *state.ema.averages.values()))
        assert isinstance(moments["exp_avg"], DTensor)
        held = sum(p.to_local().numel() for p in state.parameters.values() if isinstance(p, DTensor))
        every = sum(p.numel() for p in state.parameters.values())
        assert all(not isinstance(p, DTensor) for p in result.denoiser.network.parameters())
        if torch.distributed.get_rank() == 0:
            Path(result.model_folder, "shards.json").write_text(json.dumps({"held": held, "all": every}))


if __name__ == "__main__":
    main(sys.argv[1:])
    end_process()
