"""Quiet libraries: what they print is for programmers, the terminal is the user's."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Leave the terminal to the run: no progress bars and advice of the libraries; their errors still show.

    And no usage statistics: a run that needs no network uses none.
    """
    import logging
    import warnings

    import datasets
    import huggingface_hub.constants
    import transformers

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT takes the experts' LoRA layers, which wait for their adapter, for an adapter of an earlier call.
    warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT for a second time")
    logging.getLogger("kt_hf.placement.assembly").setLevel(
        logging.ERROR
    )  # the run itself says which backend was picked, and why
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it: advice on an operator that is not used
    # PEFT looks for the base model's vocabulary on the hub.
    warnings.filterwarnings("ignore", message="Could not find a config file in builtin:")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
