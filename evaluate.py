"""Score a test set with IQE-CLIP: `python evaluate.py --config brain_fewshot`. Run with --help for every setting."""

import sys

from iqe_jax import cli

DESCRIPTION = """Score the target's test set: image AUROC, and pixel AUROC where the set has masks. A few-shot config
whose adapter is not trained yet trains it first; a zero-shot one asks for train.py.

With --report the run gets report.html, a page that opens offline (phantoms get it unless --no-report is given), and
with --save-maps png16|npz all segmentations as files; both are short for settings below (--eval.…)."""

SHORT = {
    "--report": ("--eval.report", "True"),
    "--no-report": ("--eval.report", "False"),
    "--save-maps": ("--eval.save-maps",),
}


def main(argv: list[str]) -> None:
    """Evaluate the run that `argv` describes."""
    argv = [word for given in argv for word in SHORT.get(given, (given.replace("--save-maps=", "--eval.save-maps="),))]
    launch, config = cli.parse(argv, program="evaluate.py", description=DESCRIPTION)
    with cli.started(launch, "evaluate.py"):
        from iqe_jax.evaluation import run_evaluation
        from iqe_jax.experiment import dry_run

        if launch.dry_run:
            dry_run(config, scoring=True)
        else:
            run_evaluation(config)


if __name__ == "__main__":
    main(sys.argv[1:])
