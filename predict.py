"""Score your own scans with a trained run: `python predict.py --run RUN scans/ --out results`; --help tells all."""

import sys
from typing import Annotated

import tyro

from iqe_jax import cli
from iqe_jax.prediction import Options, run_prediction

DESCRIPTION = """Score scans with a run of train.py or evaluate.py: PNG, JPEG, TIFF, BMP, DICOM and NIfTI.

Writes into --out: scores.csv and scores.jsonl with raw score, probability and decision of each frame, heatmaps/ with a
picture of each, maps/ with a NIfTI map of each volume. The same command goes on where a stopped one was. Files that
cannot be used are listed in failures.jsonl and make the exit status 3. Nothing is sent anywhere. No medical device."""


def main(argv: list[str]) -> None:
    """Predict what `argv` describes."""
    command_line = Annotated[Options, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]
    options = tyro.cli(command_line, args=argv, prog="predict.py", description=DESCRIPTION)
    with cli.started(cli.Launch(), "predict.py"):
        status = run_prediction(options)
    raise SystemExit(status)


if __name__ == "__main__":
    main(sys.argv[1:])
