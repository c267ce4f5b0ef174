"""What a process that Ray Tune starts for a trial does: the run of the trial's flags, in the trial's folder, on what the sweep
has prepared."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray.tune

from rayalign.cluster import set_ray_variables
from rayalign.config.config import Config
from rayalign.config.endings import RunFailed
from rayalign.data.prepare import RunData, cache_of, prepare_run
from rayalign.log_lines import speak_as
from rayalign.ray_errors import RAY_ERRORS, cause_in_words, user_error_in
from rayalign.ray_lines import quiet_logging
from rayalign.reference.precompute import with_reference
from rayalign.storage import Store
from rayalign.sweeps.handover import take_over
from rayalign.sweeps.in_place import InPlace, Member, fit_in_place, why_apart
from rayalign.sweeps.reports import EvaluationReports
from rayalign.sweeps.search_space import SearchSpace
from rayalign.sweeps.trials import FAILED_NOTE, TRIALS, short
from rayalign.training.driver import fit
from rayalign.training.lease import STALE_SECONDS, Lease, held
from rayalign.training.origin import check_origin
from rayalign.training.run_folder import open_run

logger = logging.getLogger(__name__)

MEMBER = "trial"
"""Where the settings of a population's trial have its name and flags."""


def run_trial(sampled: Mapping[str, Any], *, space: SearchSpace) -> None:
    """A trial; one that is started again resumes."""

    def train(config: Config, data: RunData, lease: Lease) -> None:
        if why_apart(space) is None:
            fit_in_place(config, data, InPlace(config, lease))
        else:
            fit(config, data, callbacks=[EvaluationReports()], lease=lease)

    _run(space, sampled["name"], sampled["flags"], train)


def run_member(sampled: Mapping[str, Any], *, space: SearchSpace) -> None:
    """A trial of a population, which may have got another one's flags, changed, and then goes on with the other's weights."""
    name, flags = ray.tune.get_context().get_trial_name(), sampled[MEMBER]["flags"]
    base = space.base
    # The population is compared at evaluations, and needs the weights of each.
    space = dataclasses.replace(space, base=base.replace({"save_steps": base.run.eval_steps}))
    checkpoint = ray.tune.get_checkpoint()

    def begin(config: Config) -> None:
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                take_over(config, folder, name=name, flags=flags)

    def train(config: Config, data: RunData, lease: Lease) -> None:
        fit_in_place(config, data, Member(config, lease, name))

    _run(space, name, flags, train, begin=begin)


def _run(
    space: SearchSpace,
    name: str,
    flags: Mapping[str, Any],
    train: Callable[[Config, RunData, Lease], None],
    *,
    begin: Callable[[Config], None] = lambda config: None,
) -> None:
    """Finds the prepared data in the cache and the reference's log-probabilities beside it and trains. What can't be mended is
    noted in the trial's folder; what is raised, Tune starts again."""
    quiet_logging()
    _speak_as_trial(name, in_place=why_apart(space) is None)
    set_ray_variables()
    folder = Store.at(str(space.base.run.output_dir)) / TRIALS / name
    (folder / FAILED_NOTE).delete()
    values = " ".join(f"{flag}={short(value)}" for flag, value in flags.items())
    logger.info("%s (%s)", "Goes on" if (folder / "checkpoints").list() else "Begins", values)
    try:
        # A trial that is started again may meet the processes of its last start while they end.
        with held(folder, patience=STALE_SECONDS) as lease:
            trial = trial_config(space, flags, folder)
            begin(trial)
            open_run(trial)
            data = prepare_run(trial)
            check_origin(trial, data)
            train(trial, with_reference(trial, data, several_runs=True), lease)
    except Exception as error:
        of_ray = isinstance(error, RAY_ERRORS)
        words = cause_in_words(error) if of_ray else str(error) or type(error).__name__
        (folder / FAILED_NOTE).write_json({"error": words})
        if not isinstance(error, (ValueError, FloatingPointError, RunFailed)) and user_error_in(error) is None:
            raise


def _speak_as_trial(name: str, *, in_place: bool) -> None:
    """Of a trial the log has its beginning and what goes wrong; the driver tells its evaluations and its end. What there is to
    say of records that all trials share, the driver has said."""
    speak_as(f"Trial {int(name.partition('_')[0])}")
    logging.getLogger("rayalign.sweeps").setLevel(logging.INFO)
    logging.getLogger("rayalign.data.prepare").setLevel(logging.ERROR if in_place else logging.NOTSET)


def trial_config(space: SearchSpace, flags: Mapping[str, Any], folder: Store) -> Config:
    """The run of a trial, in a folder of its own, on the sweep's prepared data; the same flags alone give the same model."""
    places = {"output_dir": folder.location, "cache_dir": cache_of(space.base).location}
    return space.config(flags).replace({**places, "overwrite": False, "resume": True, "eval_answers": 0})
