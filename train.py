"""Train an IQE-CLIP adapter: `python train.py --config brain_fewshot`. Run with --help for every setting."""

import sys

from iqe_jax import cli

DESCRIPTION = """Train an IQE-CLIP adapter: few-shot on the target set's support images, zero-shot on the other sets.
CLIP stays frozen. A run that was stopped goes on where it was when the same command is given again."""


def main(argv: list[str]) -> None:
    """Train the run that `argv` describes."""
    launch, config = cli.parse(argv, program="train.py", description=DESCRIPTION)
    with cli.started(launch, "train.py"):
        from iqe_jax.experiment import dry_run, run_training

        (dry_run if launch.dry_run else run_training)(config)


if __name__ == "__main__":
    main(sys.argv[1:])
