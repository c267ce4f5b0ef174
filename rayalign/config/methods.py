"""Training methods that other tools name in --rlhf_type, and what to use here instead; `aliases` knows these tools' flags."""

from collections.abc import Mapping

from rayalign.config.flags import Section, flags_of

ONLINE = "ppo grpo rloo gspo dapo dr_grpo cispo reinforce reinforce++ remax online_dpo nash_md xpo"
"""Methods that train on responses that the model writes during the run."""

DISTILLING = "gkd minillm"


def advice_for_method(name: str, algorithms: Mapping[str, type[Section]]) -> str | None:
    """What a method is that is none of `algorithms`, and what to use; None for a name that no tool has."""
    word = name.lower().replace("-", "_")
    choices = ", ".join(algorithms)
    if word in ONLINE.split():
        return (
            "an online method: the model writes responses during the run, and a reward scores them. rayalign trains on "
            f"the responses of a data set and has {choices}."
        )
    if word in DISTILLING.split():
        return f"a method that distils a teacher model. rayalign trains on the responses of a data set and has {choices}."
    owners = [
        other
        for other, section in algorithms.items()
        if any(flag.name == "loss_type" and word in flag.choices for flag in flags_of(section))
    ]
    return f"a loss of {owners[0]}. Pass --rlhf_type {owners[0]} --loss_type {word}." if owners else None
