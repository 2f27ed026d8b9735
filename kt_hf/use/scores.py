"""Scores of answers against references."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from ..errors import KTAMXNotAvailableError

Score = dict[str, float]
_ROUGE = ("rouge1", "rouge2", "rougeL")


def check_rouge() -> None:
    """Refuse ROUGE where its library is missing.

    Raises:
        KTAMXNotAvailableError: With the command that installs it.
    """
    if importlib.util.find_spec("rouge_score") is None:
        raise KTAMXNotAvailableError(
            "--rouge needs the package rouge-score, which is not installed: pip install rouge-score"
        )


def score(answers: Sequence[str], references: Sequence[str], rouge: bool) -> Score:
    """Score answers, the mean of all.

    Args:
        answers: Of the model.
        references: The right ones, as many.
        rouge: Whether to compute ROUGE (F1, with stemming), by the package rouge-score.

    Returns:
        `exact_match`, the share of answers that equal their reference but for white space; with `rouge` also
        `rouge1`, `rouge2` and `rougeL`.
    """
    pairs = list(zip(answers, references, strict=True))
    same = [" ".join(answer.split()) == " ".join(reference.split()) for answer, reference in pairs]
    result = {"exact_match": sum(same) / len(pairs)}
    if rouge:
        check_rouge()
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(_ROUGE), use_stemmer=True)
        rows = [scorer.score(reference, answer) for answer, reference in pairs]
        result |= {name: sum(float(row[name].fmeasure) for row in rows) / len(rows) for name in _ROUGE}
    return result
