"""The end of a run: the adapter, plots, the report and the summary beside it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import KTAMXConfigError
from .checkpoints import SUMMARY
from .config.settings import TrainSettings
from .html_report import write_report
from .plots import plot_expert_load, plot_losses
from .progress import ShowProgress, last_metrics
from .together import experts_of_ranks, hosts_of, is_first, total


def finish(settings: TrainSettings, ready: Any, trainer: Any, progress: ShowProgress) -> dict[str, Any]:
    """Save the adapter, draw, and write the summary, which is returned.

    Args:
        settings: Of the run.
        ready: What the run had before its model was loaded, for the report.
        trainer: After the training.
        progress: Has counted tokens and seconds.

    Raises:
        KTAMXConfigError: The loss is not finite.
    """
    folder = Path(trainer.args.output_dir)
    trainer.save_model(str(folder))
    trainer.save_state()
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    evaluations = [row["eval_loss"] for row in history if "eval_loss" in row]
    if any(not math.isfinite(value) for value in [*losses, *evaluations]):
        raise KTAMXConfigError(
            f"The loss is not finite. Lower learning_rate. The log is in {folder}/trainer_state.json."
        )
    load, tokens = _expert_load(trainer), total(trainer.model, progress.counter.tokens)
    plots, first = [], is_first()
    if first and settings.run.plot_loss and (losses or evaluations):
        plots.append(plot_losses(history, folder / "loss.png", settings.run.model_name_or_path))
    if first and settings.run.plot_loss and load:
        plots.append(plot_expert_load(load, folder / "expert_load.png", settings.run.model_name_or_path))
    summary = {
        "config": settings.source,
        "settings": asdict(settings.run),
        "steps": trainer.state.global_step,
        "loss": losses[-1] if losses else None,
        "eval_loss": evaluations[-1] if evaluations else None,
        "metrics": last_metrics(history),
        "tokens": tokens,
        "seconds": round(progress.seconds, 2),
        "tokens_per_second": round(tokens / progress.seconds, 1) if progress.seconds else 0.0,
        "processes": trainer.args.world_size,
        "hosts": hosts_of(trainer.model),
        "experts_of_processes": experts_of_ranks(trainer.model),
        "adapter": str(folder),
        "plots": [str(path) for path in plots],
        "expert_load": load,
    }
    if not first:
        return summary
    if settings.run.plot_loss:
        summary["report"] = str(write_report(folder, settings, ready, trainer, summary))
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def _expert_load(trainer: Any) -> dict[int, list[float]]:
    """Layer -> each expert's share of the tokens, 1 being even; {} for an unpatched model."""
    from .. import KTMoECallback
    from ..experts.layer import kt_layers

    callback = next((c for c in trainer.callback_handler.callbacks if isinstance(c, KTMoECallback)), None)
    if callback is None:
        return {}
    callback.expert_load.collect(kt_layers(trainer.model))  # since the last log
    total = callback.expert_load.total
    return {layer: (c.double() / c.sum().clamp(min=1) * len(c)).tolist() for layer, c in total.items()}
