"""The verb `generate`: a model's own responses to the prompts of data sets, by a pool of workers, as a data set."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from rayalign.config.config import Config
from rayalign.config.inference import InferenceConfig
from rayalign.config.inference_verbs import GenerateConfig
from rayalign.config.plugins import Plugin
from rayalign.data.rows import Sources
from rayalign.evaluation.groups import groups_of_datasets
from rayalign.evaluation.loaded_model import LoadedModel, load_model
from rayalign.evaluation.pool import PoolResult, run_pool
from rayalign.evaluation.prompts import PROMPT_FIELDS, prompt_columns, prompt_of
from rayalign.evaluation.start import (
    config_of,
    files_of_data,
    files_of_model,
    is_reward_model_here,
    model_of,
    on_cluster,
    pictures_of_rows,
    sources_of,
)
from rayalign.evaluation.work import Result, Work
from rayalign.formats.records import RecordError
from rayalign.models.source import ModelSource
from rayalign.policy.generation import Response, Sampling, sample_responses
from rayalign.storage import Store

logger = logging.getLogger(__name__)

RESPONSE_SCHEMA = pa.schema(
    [
        *PROMPT_FIELDS,
        ("sample", pa.int32()),
        ("response", pa.string()),
        ("num_tokens", pa.int32()),
        ("is_ended", pa.bool_()),
    ]
)
"""A response: its prompt, its number among those to the prompt, its text without the end token, and whether it ended by itself
or at --max_new_tokens."""


def run(flags: InferenceConfig, own: GenerateConfig, plugins: tuple[Plugin, ...] = ()) -> PoolResult:
    """Responds to the prompts that have no responses yet, and returns the folder of all of them; `plugins` read rows, too.

    Raises ValueError for what the user can fix, and RunFailed where the cluster failed.
    """
    config = config_of(flags, plugins)
    source, sources = model_of(config), sources_of(config)
    require_writer(source, config)
    sampling = Sampling(own.n, own.temperature, own.top_p, own.max_new_tokens, own.seed)
    settings = {
        "verb": "generate",
        "model": files_of_model(source),
        "data": files_of_data(sources),
        **pictures_of_rows(sources),
        "data_seed": flags.data_seed,
        "dtype": flags.dtype,
        "max_length": flags.max_length,
        "max_pixels": flags.max_pixels,
        "sampling": vars(sampling) | {"backend": own.backend},
    }
    with on_cluster(config, model=source) as config:
        if own.backend == "vllm":
            from rayalign.evaluation.vllm_backend import make_vllm_work  # here: vLLM is optional

            make_work = functools.partial(make_vllm_work, config, sources, sampling)
        else:
            make_work = functools.partial(make_generator, config, sources, sampling)
        return run_pool(
            groups_of_datasets(sources, seed=flags.data_seed),
            make_work,
            Store.at(str(config.run.output_dir)),
            schema=RESPONSE_SCHEMA,
            settings=settings,
            cluster=config.cluster,
            what="prompts",
            overwrite=flags.overwrite,
        )


def require_writer(source: ModelSource, config: Config) -> None:
    """Raises ValueError for a reward model in a folder of this machine; of others the actors find out."""
    if is_reward_model_here(source):
        raise _writes_nothing(config)


def _writes_nothing(config: Config) -> ValueError:
    named = config.model.adapter or config.model.model or config.model.model_type
    return ValueError(f"--model {named}: is a reward model, which scores responses and writes none.")


def make_generator(config: Config, sources: Sources, sampling: Sampling) -> Work:
    """What an actor does with records: it responds to their prompts. Raises ValueError for a model that can't respond."""
    model = load_model(config, sources, responses="chosen")
    if model.is_reward_model:
        raise _writes_nothing(config)
    return functools.partial(respond, model, sampling, config.optimizer.batch_size)


def respond(model: LoadedModel, sampling: Sampling, batch_size: int, rows: Sequence[Mapping[str, Any]]) -> list[Result]:
    """`sampling.n` lines of RESPONSE_SCHEMA for each row of `groups.FileRows`, or why there are none; prompts of about the
    same length are run together."""
    results: dict[int, Result] = {}
    prompts: dict[int, Any] = {}
    for i, row in enumerate(rows):
        try:
            record = prompt_of(row, model.sources, text_only=model.encoder.spec.family.text_only)
            prompts[i] = record, model.encode(record, row["folder"])
        except RecordError as error:
            results[i] = error
    order = sorted(prompts, key=lambda i: len(prompts[i][1].prompt_ids))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        drawn = sample_responses(model.policy, model.encoder.spec, [prompts[i][1] for i in some], sampling)
        for i, responses in zip(some, drawn, strict=True):
            columns = prompt_columns(prompts[i][0], rows[i], model.sources)
            results[i] = [columns | line(k, r, model.encoder.tokenizer) for k, r in enumerate(responses)]
    return [results[i] for i in range(len(rows))]


def line(sample: int, response: Response, tokenizer: Any) -> dict[str, Any]:
    """The columns of a response beside its prompt's."""
    return {
        "sample": sample,
        "response": tokenizer.decode(response.ids, skip_special_tokens=True).strip(),
        "num_tokens": len(response.ids),
        "is_ended": response.is_ended,
    }
