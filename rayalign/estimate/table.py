"""The plan as text: aligned columns, one section for each question."""

import textwrap
from collections.abc import Iterator, Sequence

import numpy as np

from rayalign.estimate.advice import MOST_GPUS
from rayalign.estimate.architecture import ALIGNER, EMBEDDINGS, HEAD, VISION
from rayalign.estimate.estimate import Estimate
from rayalign.estimate.memory import FRAGMENTATION, GB, OVERHEAD_BYTES, Memory
from rayalign.estimate.shapes import Numbers
from rayalign.estimate.worker_memory import SPARE
from rayalign.models.parts import PART_NAMES, Part
from rayalign.policy.adapters import trainable_parts

UNITS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6))
NO_DIFFERENCE = "1.00 times"
PART_OF: dict[str, Part] = {VISION: "vit", ALIGNER: "aligner"}


def plan_text(found: Estimate) -> str:
    """The whole plan, lines of at most about 110 characters."""
    sections = (_model(found), _data(found), _work(found), _memory(found), _machines(found), _assumptions(found))
    return "\n".join("\n".join(section) + "\n" for section in sections)


def _model(found: Estimate) -> Iterator[str]:
    tuner, skeleton = found.config.tuner, found.skeleton
    yield f"Plan: {found.config.algorithm.name.upper()} of {found.name} ({found.origin})"
    yield ""
    rows = [["Parameters", "", ""]]
    for part, count in skeleton.sizes.items():
        rows.append([f"  {part}", _millions(count), _training_of(part, found) if count else "shares the embeddings' weights"])
    total = sum(skeleton.sizes.values())
    rows.append(["  total", _millions(total), ""])
    where = ", ".join(PART_NAMES[part] for part in trainable_parts(tuner))
    what = f"all weights of: {where}"
    if tuner.sft_type == "lora":
        what = f"LoRA of rank {tuner.lora_rank} on {' '.join(tuner.lora_target_modules)} of: {where}"
    rows.append(["  trained in this run", _millions(found.num_trainable), f"{found.num_trainable / total:.2%}; {what}"])
    for modules, count in found.adapters.items():
        rows.append([f"  LoRA {modules} would train", _millions(count), ""])
    yield from _aligned(rows)


def _training_of(part: str, found: Estimate) -> str:
    """What becomes of a part's weights."""
    tuner = found.config.tuner
    if PART_OF.get(part, "llm") not in trainable_parts(tuner):
        return "frozen"
    if part == HEAD and found.blueprint.needs.head == "value":
        return "frozen; a value head is trained beside it"
    if tuner.sft_type == "full":
        return "trained"
    return "frozen" if part in (EMBEDDINGS, HEAD) else "frozen, with adapters"


def _data(found: Estimate) -> Iterator[str]:
    data = found.data
    yield f"Tokens per pair ({data.total:,} pairs, {data.held_out:,} of them held out)"
    yield from textwrap.wrap(data.origin, 110, initial_indent="  ", subsequent_indent="  ")
    rows = [["", "mean", "median", "95 %", "most"]]
    for name, values in (
        ("prompt", data.prompt),
        ("  of it images", data.image_tokens),
        ("chosen", data.chosen),
        ("rejected", data.rejected),
        ("row [prompt | chosen | rejected]", data.rows),
    ):
        rows.append([f"  {name}", *(f"{value:,.0f}" for value in _quantiles(values))])
    images = sum(len(pair.images) for pair in data.pairs) / len(data.pairs)
    yield from _aligned(rows)
    yield f"  distinct images per pair: {images:.2f}"


def _work(found: Estimate) -> Iterator[str]:
    now, options = found.flops(), found.options
    recomputing = " (checkpointing)" if options.checkpointing else ""
    recomputing = recomputing if options.checkpointing in (0, 1) else f" ({_recomputed(found)})"
    unit, size = _unit_of(now.total)
    yield f"Work per pair in {unit} (mean)"
    parts = [
        ("vision tower and aligner", now.vision),
        ("language model, forward", now.forward),
        ("language model, forwards without a backward (reference, statistics)", now.others),
        ("output head", now.head),
        (f"recomputation{recomputing}", now.recomputation),
        ("language model, backward", now.backward),
    ]
    yield from _aligned(
        [*([f"  {name}", _number(flops / size), ""] for name, flops in parts), ["  all", _number(now.total / size), ""]]
    )
    yield "  without what saves work here:"
    without = [
        ("images once per pair, not per response and policy", {"images_once": False}),
        ("both responses behind one prompt", {"shared_prompt": False}),
        ("output head on the responses' positions only", {"responses_only": False}),
        ("the reference once, before the training", {"reference_known": False}),
    ]
    rows = [[f"    {name}", *_against(found.flops(**changed).total, now.total)] for name, changed in without]
    nothing_saved = found.flops(images_once=False, shared_prompt=False, responses_only=False, reference_known=False)
    rows.append(["    all of these", *_against(nothing_saved.total, now.total)])
    yield from _aligned([row for row in rows if row[2] != NO_DIFFERENCE])
    yield "  and otherwise:"
    switch = "without" if options.checkpointing else "with"
    rows = [
        [
            f"    {switch} gradient checkpointing",
            *_against(found.flops(checkpointing=not options.checkpointing).total, now.total),
        ]
    ]
    if found.blueprint.needs.reference and not options.reference_known:
        known = found.flops(reference_known=True)
        rows.append(["    with the reference once, before the training", *_against(known.total, now.total)])
    yield from _aligned(rows)
    if options.reference_known:
        yield f"  before the training, once per pair: the reference, {_number(found.reference_flops / size)}"


def _memory(found: Estimate) -> Iterator[str]:
    memory, batch = found.memory, found.batch
    shape = batch.shape()
    yield f"Memory per worker in GB, {shape.rows} x the longest row ({shape.tokens:,} tokens)"
    yield from _aligned([[f"  {name}", _gb(size)] for name, size in _memory_parts(found, memory)])
    switch = "without" if found.options.checkpointing else "with"
    yield from _aligned([[f"  total {switch} gradient checkpointing", _gb(found.memory_with_other_checkpointing.total)]])
    if found.config.model.gradient_checkpointing == "auto":
        yield f"  --gradient_checkpointing auto: {_recomputed(found)} run again; {SPARE:.0%} of a GPU's memory stay free"


def _recomputed(found: Estimate) -> str:
    return f"{found.recomputed} of {found.blueprint.num_layers} layers"


def _memory_parts(found: Estimate, memory: Memory) -> list[tuple[str, int]]:
    quantised = ", language model's linears in 4 bits" if found.config.tuner.quant_bits else ""
    return [
        (f"frozen weights ({str(found.blueprint.dtype).removeprefix('torch.')}{quantised})", memory.weights),
        ("trainable weights (float32)", memory.trainable),
        ("gradients", memory.gradients),
        (f"optimizer's moments{' (8 bits)' if found.config.optimizer.optim == 'adamw_8bit' else ''}", memory.moments),
        ("kept for the backward", memory.kept),
        ("working space (layer run again, logits, reference)", memory.working),
        ("images", memory.images),
        ("overhead (assumed)", memory.overhead),
        ("total", memory.total),
    ]


def _machines(found: Estimate) -> Iterator[str]:
    size, memory = f"{found.plan.gpu_memory_gb:g} GB", found.memory
    yield f"On GPUs of {size}, {found.plan.gpu_tflops:g} TFLOPS"
    per_worker = found.gpus_per_worker
    cluster = found.config.cluster
    of = f" of {cluster.fewest_workers}" if cluster.num_shards < cluster.fewest_workers else ""
    name = f"fsdp over {cluster.num_shards}{of} workers" if cluster.shards_models else "ddp"
    if per_worker == 1:
        yield f"  strategy: {name}, one GPU per worker ({_gb(memory.total)} of {found.plan.gpu_memory_gb:g} GB used)"
        longest = found.longest_row
        times = longest / found.batch.shape().tokens
        yield f"  longest row that fits: about {longest:,} tokens, {times:.1f} times the data's{_beyond(longest, found)}"
    else:
        yield f"  a worker needs {_gb(memory.total)} GB, more than one GPU has"
        if cluster.shards_models:
            needed = found.workers_needed
            enough = "no number of workers would do" if needed is None else f"{_wider(found)} {needed} would do"
            yield f"  strategy: {name}; {enough}"
        elif per_worker is None:
            yield f"  and more than {MOST_GPUS} GPUs of a worker have together"
        else:
            yield f"  strategy: device_map, {per_worker} GPUs per worker (--gpus_per_worker {per_worker}); they take turns"
        for flags, changed in found.remedies:
            yield f"  it would fit one GPU with {flags} ({_gb(changed.total)} GB)"
        longest = found.longest_row
        fits = f"rows of up to about {longest:,} tokens (--max_length)" if longest else "no row of any length"
        yield f"  what fits one GPU as it is: {fits}"
        yield f"  one GPU of {-(-memory.total // GB)} GB would do"
    if found.time is None:
        return
    schedule, time = found.schedule, found.time
    yield (
        f"  run: {schedule.steps:,} steps of {found.config.global_batch_size} pairs, {schedule.evaluated:,} pairs evaluated; "
        f"{found.run_flops / 1e15:,.3g} PFLOP"
    )
    cost = "" if time.cost is None else f"; {time.cost:,.2f} at {found.plan.price_per_hour:g} per GPU and hour"
    turns = "" if time.busy == time.gpus else f", {time.busy} at work at a time"
    yield f"  time: {_hours(time.hours)} on {time.gpus} GPU{'s' * (time.gpus > 1)}{turns}{cost}"


def _wider(found: Estimate) -> str:
    """The flag that says over how many workers a model is sharded."""
    return "--num_workers" if found.config.cluster.shard_group_size is None else "--shard_group_size"


def _beyond(longest: int, found: Estimate) -> str:
    """A warning where a model has no positions for a row that fits."""
    end = found.blueprint.config.get_text_config().max_position_embeddings
    return f"; the model's positions end at {end:,}" if longest > end else ""


def _assumptions(found: Estimate) -> Iterator[str]:
    yield "Assumed"
    yield f"  {found.plan.mfu:.0%} of the GPUs' peak is reached (--mfu), data and checkpoints never wait;"
    lost = f"{FRAGMENTATION:.0%} of the rest lost to fragments"
    yield f"  {OVERHEAD_BYTES / GB:g} GB for CUDA and its libraries, {lost}; a GB is 2^30 bytes; layers that are alike;"
    yield "  the memory of a micro-batch whose rows are all as long as the longest; no work for padding."


def _quantiles(values: Numbers) -> tuple[float, float, float, float]:
    return float(values.mean()), float(np.median(values)), float(np.percentile(values, 95)), float(values.max())


def _against(flops: float, now: float) -> tuple[str, str]:
    return _number(flops / _unit_of(now)[1]), f"{flops / now:.2f} times"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of columns: the first to the left, numbers to the right, words at the end to the left."""
    columns = len(rows[0])
    widths = [max(len(row[i]) for row in rows) for i in range(columns)]
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 or not _is_number(row, i) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _is_number(row: Sequence[str], column: int) -> bool:
    return column > 0 and (len(row) != 3 or column == 1)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _unit_of(flops: float) -> tuple[str, float]:
    """The unit that such figures read well in."""
    return next(((name, size) for name, size in UNITS if flops >= size), UNITS[-1])


def _number(value: float) -> str:
    return f"{value:,.2f}"


def _gb(size: float) -> str:
    return f"{size / GB:,.2f}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:,.1f} min"
