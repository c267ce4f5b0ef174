"""The environment that a job brings along: Ray takes it, what it names is there, and the command that it shows is a run."""

import os
from typing import Any

import pytest
from ray._private.runtime_env.uv import _expand_env_vars
from ray.runtime_env import RuntimeEnv

from tests.deploy.files import DEPLOY, REPOSITORY, config_of, locked_version, rayalign_commands, read_yaml

FILE = "deploy/runtime_env.yaml"


@pytest.fixture
def env() -> dict[str, Any]:
    read: dict[str, Any] = read_yaml(FILE)
    return read


def test_ray_takes_the_environment_and_would_refuse_an_unknown_option(env: dict[str, Any]) -> None:
    taken = RuntimeEnv(**env)
    assert taken.has_uv()
    with pytest.raises(ValueError, match="can only have these fields"):
        RuntimeEnv(uv={**env["uv"], "constraint": "x"})


def test_the_working_directory_is_installed_at_the_locked_versions(env: dict[str, Any]) -> None:
    there = {"RAY_RUNTIME_ENV_CREATE_WORKING_DIR": str(REPOSITORY)}
    assert [_expand_env_vars(package, there) for package in env["uv"]["packages"]] == [f"{REPOSITORY}[tune,qlora]"]
    option, lock = (_expand_env_vars(word, there) for word in env["uv"]["uv_pip_install_options"])
    assert option == "--constraint"
    assert os.path.samefile(lock, REPOSITORY / "requirements.lock")


def test_the_head_of_the_file_names_the_locked_ray_and_shows_a_run() -> None:
    text = (DEPLOY / "runtime_env.yaml").read_text()
    assert f"rayproject/ray:{locked_version('ray')}-py311-gpu" in text
    (words,) = rayalign_commands(text)
    assert config_of(words).cluster.num_workers == 4
    assert f"--runtime-env {FILE}" in text
