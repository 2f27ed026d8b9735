"""`report.html` of a run: all that it should show, on one page, with nothing from elsewhere."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from kt_hf.train.plots import curves_svg, expert_load_svg
from tests.support.tiny import save_model
from tests.support.train_runs import Runs, runs_in
from tests.train.test_next_steps import printed, scored


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("run")
    rows = [{"instruction": f"{i} <b> & \x1b[31m{i}?", "output": f"It is {2 * i}."} for i in range(6)]
    made = runs_in(folder, save_model(folder / "model"), rows, val_size=2, eval_steps=1, eval_strategy="steps",
                   plot_loss=True)  # fmt: skip
    made.again()
    return made


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_has_everything_and_is_alone(runs: Runs) -> None:
    page = (runs.out / "report.html").read_text(encoding="utf-8")
    for words in ("training loss", "evaluation loss", "Learning rate and speed", "estimated before the run",
                  "computed by", "before", "after", "held out", "learning_rate", "lora_rank",
                  "kt-hf chat"):  # fmt: skip
        assert words in page, words
    reader = Reader()
    reader.feed(page)
    assert reader.tags.count("svg") == 5
    assert all(link.startswith(("#", "data:")) for link in reader.links)
    assert not {"script", "link", "img", "b"} & set(reader.tags)
    assert "\x1b" not in page
    assert "&lt;b&gt;" in page


def test_the_run_says_how_to_talk_with_the_model(runs: Runs) -> None:
    assert "report.html" in runs.printed
    command = re.search(r"kt-hf chat (\S+)", runs.printed)
    assert command is not None
    assert command[1] == str(runs.out)
    _, names = scored("\n".join(printed(runs.printed, "Load it, and ask it something:")))
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]


def test_plots_leave_out_what_is_not_there() -> None:
    assert curves_svg({"a": [], "b": []}, "x") == ""
    assert curves_svg({"a": [(1, 2.0)], "b": []}, "x").startswith("<svg")
    assert expert_load_svg({0: [1.0, 1.0], 2: [2.0]}).count("<svg") == 1
