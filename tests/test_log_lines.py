import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator

import pytest

from rayalign.log_lines import OWN_LINE, configure_logging, quiet_transformers, speak_as


@contextlib.contextmanager
def new_process() -> Iterator[None]:
    """Without the handlers of pytest, and with the loggers' settings as they were behind it."""
    root, own = logging.getLogger(), logging.getLogger("rayalign")
    before = [(logger, dict(vars(logger))) for logger in (root, own)]
    root.handlers, own.handlers = [], []
    yield
    for logger, settings in before:
        vars(logger).update({name: settings[name] for name in ("level", "handlers", "propagate")})
        logger.manager._clear_cache()


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(OWN_LINE.match(line) for line in lines)
    return [re.sub(OWN_LINE, "", line) for line in lines]


def test_a_line_says_when_and_what_and_a_librarys_also_who(capsys: pytest.CaptureFixture[str]) -> None:
    with new_process():
        configure_logging()
        logging.getLogger("rayalign.training.driver").info("step %d", 3)
        logging.getLogger("rayalign.data").warning("Data: odd")
        logging.getLogger("rayalign.training.worker").warning("Warning: low accuracy")
        logging.getLogger("other").warning("careful")
        logging.getLogger("other").info("noise")
        assert said(capsys) == ["step 3", "Warning: Data: odd", "Warning: low accuracy", "WARNING other: careful"]


def test_a_process_that_logs_already_keeps_its_way(capsys: pytest.CaptureFixture[str]) -> None:
    with new_process():
        logging.basicConfig(format="%(message)s of mine", stream=sys.stderr)
        configure_logging()
        logging.getLogger("rayalign.training").info("step")
        assert capsys.readouterr().err == "step of mine\n"


def test_a_worker_of_ray_train_says_when_although_ray_has_set_up_its_log(capsys: pytest.CaptureFixture[str]) -> None:
    with new_process():
        logging.basicConfig(format="%(message)s", stream=sys.stderr)
        configure_logging(of_ray_train=True)
        logging.getLogger("rayalign.training").info("step")
        assert said(capsys) == ["step"]  # and once


def test_one_of_several_that_do_alike_says_only_what_goes_wrong_behind_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    with new_process():
        for name in ("Trial 1", "Trial 2"):
            configure_logging()
            speak_as(name)
            logging.getLogger("rayalign.training").info("step")
            logging.getLogger("rayalign.training").warning("odd")
        assert said(capsys) == ["Trial 1: Warning: odd", "Trial 2: Warning: odd"]


def test_bars_of_transformers_and_a_warning_that_peft_provokes_are_not_shown() -> None:
    from transformers.utils import logging as transformers_logging

    was_enabled = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():  # else they are errors here
        quiet_transformers()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
    assert not transformers_logging.is_progress_bar_enabled()
    if was_enabled:
        transformers_logging.enable_progress_bar()
