"""Judge merges of real fine-tuned encoders: averages, task vectors, Fisher and RegMean, in and out of domain.

    python benchmarks/zoo_study.py ZOO OUT

ZOO is a folder of models and data: `zoo.json` names the settings, `<setting>/base`, `<setting>/models/<name>` are
checkpoints, `<setting>/data/<name>/{train,validation,test}.parquet` are texts with labels. Statistics and answers are
kept in OUT; a study that was stopped goes on where it was. Where a row of the tables has several points (weights,
alphas), the one that is best on the validation data is reported; the test data choose nothing.
"""

from __future__ import annotations

from zoo_command import new_report, read_options, without_skipped
from zoo_pages import draw, examine_study, write_study
from zoo_points import FISHER_SAMPLES, GRAM_SAMPLES, read_settings, study_points
from zoo_scores import Examination


def main() -> None:
    """Parse the options, run what is not there yet, keep the result."""
    options = read_options(__doc__ or "")
    studies = [
        examine_study(
            Examination(options.zoo, options.out, setting, options.precision),
            without_skipped(study_points(setting), options.skip),
        )
        for setting in read_settings(options.zoo)
        if not options.settings or setting.name in options.settings
    ]
    samples = {"Gram samples per model": GRAM_SAMPLES, "Fisher samples per model": FISHER_SAMPLES}
    report = new_report("zoo", "Merges of real fine-tuned encoders", options, samples)
    pictures = draw(report.path(options.results), studies)
    report.text(
        'Accuracy in % with its standard error over test examples. "Against RegMean 0.9" is the mean difference on '
        "the same examples with its paired standard error; p is McNemar's exact test, two-sided, not corrected for the "
        "number of rows. Where several points were tried, the one best on validation data is shown."
    )
    report.text(f"![methods]({pictures[0].name})")
    for study in studies:
        own = ", each with a head of its own" if study.setting.has_own_heads else ", one head, merged too"
        report.text(f"## Setting {study.setting.name}: {len(study.setting.models)} models{own}")
        write_study(report, study)
    for picture in pictures[1:]:
        report.text(f"![{picture.stem}]({picture.name})")
    report.write(options.results)


if __name__ == "__main__":
    main()
