"""A conversation on a terminal: what is typed, the commands, and answers as they are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..adapters import load_adapter
from ..errors import KTAMXConfigError, KTAMXError
from ..system.files import write_json
from ..system.text import printable
from .generation import Answerer, Message
from .opening import Choice, check
from .questions import is_text

HELP = """\
/reset            forget the conversation
/system TEXT      set the system prompt (nothing takes it away), and begin anew
/think on|off     let the model think before it answers, where its chat template can
/base             the base model answers
/adapter [PATH]   the adapter answers; with PATH another one, of the same base
/both             both answer, beside each other; the adapter's answer goes on in the conversation
/save FILE        write the conversation to a new JSON file
/help             show this
/quit             leave, as Ctrl-D does; Ctrl-C stops an answer"""


@dataclass
class Chat:
    """A conversation.

    Attributes:
        answerer: The model.
        console: What is shown.
        read: Gives the next line; raises EOFError at the end.
        system: The system prompt, "" for none.
        who: `adapter`, `base` or `both`: whose answers are shown.
        history: The messages so far, without the system prompt.
    """

    answerer: Answerer
    console: Console
    read: Callable[[str], str] = input
    system: str = ""
    who: str = "adapter"
    history: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.answerer.opened.adapter is None:
            self.who = "base"

    def run(self) -> None:
        """Talk until the user leaves."""
        commands = self._commands()
        while True:
            try:
                line = self.read("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self.console.print("\n(/quit or Ctrl-D leaves)")
                continue
            if not is_text(line):
                self._say("That line is not UTF-8 text.")
                continue
            name, _, rest = line.partition(" ")
            if name == "/quit":
                return
            try:
                if name.startswith("/"):
                    action = commands.get(name)
                    self._say(f"{name} is no command; /help lists them.") if action is None else action(rest.strip())
                elif line:
                    self.ask(line)
            except KeyboardInterrupt:
                self._say("(stopped)")
            except (KTAMXError, OSError) as error:
                self._say(str(error))

    def ask(self, question: str) -> None:
        """Put a question, show the answer, and keep both; a stopped answer is kept as far as it came."""
        asked = [*self.history, {"role": "user", "content": question}]
        self.answerer.inputs(self._with_system(asked))  # what is wrong with it is said before an answer begins
        answer = self._both(asked) if self.who == "both" else self._streamed(asked)
        if answer:
            self.history = [*asked, {"role": "assistant", "content": answer}]

    @property
    def messages(self) -> list[Message]:
        """The conversation with its system prompt."""
        return self._with_system(self.history)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def _streamed(self, asked: list[Message]) -> str:
        pieces = self.answerer.stream(self._with_system(asked), adapter=self.who == "adapter")
        answer = ""
        try:
            self.console.print(f"[dim]{self.who}:[/dim] ", end="")
            for piece in pieces:
                answer += piece
                self.console.out(printable(piece), end="", highlight=False)
                self.console.file.flush()
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]
            self.console.print(" [dim](stopped)[/dim]", end="")
        self.console.print()
        return answer.strip()

    def _both(self, asked: list[Message]) -> str:
        """Both answers beside each other, once they are whole."""
        answers: list[str] = []
        try:
            for adapter in (False, True):
                with self.console.status("the adapter answers" if adapter else "the base model answers"):
                    answers.append("".join(self.answerer.stream(self._with_system(asked), adapter)).strip())
        except KeyboardInterrupt:
            self._say("stopped")
            return ""
        table = Table("base model", "adapter", expand=True, show_lines=True)
        table.add_row(*(escape(printable(answer)) for answer in answers))
        self.console.print(table)
        return answers[1]

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "/help": lambda _: self.console.print(HELP, markup=False, highlight=False),
            "/reset": lambda _: self._reset(),
            "/system": self._set_system,
            "/think": self._think,
            "/base": lambda _: self._answer_by("base"),
            "/adapter": self._adapter,
            "/both": lambda _: self._answer_by("both"),
            "/save": self._save,
        }

    def _reset(self) -> None:
        self.history = []
        self._say("A new conversation.")

    def _set_system(self, text: str) -> None:
        self.system = text
        self._reset()

    def _think(self, text: str) -> None:
        if text not in ("on", "off"):
            raise KTAMXConfigError("/think on or /think off")
        if "enable_thinking" not in str(self.answerer.opened.tokenizer.chat_template):
            raise KTAMXConfigError("This model's chat template knows no thinking.")
        self.answerer.thinking = text == "on"
        self._say(f"Thinking is {text}.")

    def _answer_by(self, who: str) -> None:
        if who != "base" and self.answerer.opened.adapter is None:
            raise KTAMXConfigError("There is no adapter: /adapter PATH loads one.")
        self.who = who
        self._say({"base": "The base model answers.", "adapter": "The adapter answers.", "both": "Both answer."}[who])

    def _adapter(self, path: str) -> None:
        if path:
            self._load(Path(path).expanduser())
        self._answer_by("adapter")

    def _load(self, path: Path) -> None:
        """Put another adapter of the same base on the model; the one before stays loaded if it cannot be had."""
        opened = self.answerer.opened
        check(Choice(adapter=path, base=opened.base, chat=False))
        name = f"chat-{len(getattr(opened.model, 'peft_config', {}))}"
        model = load_adapter(opened.model, path, name=name, trainable=False)
        model.set_adapter(name)
        self.answerer.opened = type(opened)(model.eval(), opened.tokenizer, path, opened.base)

    def _save(self, path: str) -> None:
        if not path:
            raise KTAMXConfigError("/save FILE")
        file = Path(path).expanduser()
        if file.exists():
            raise KTAMXConfigError(f"{file} exists already: name a new file.")
        write_json(file, self.messages)
        self._say(f"Written: {file}")

    def _say(self, text: str) -> None:
        self.console.print(f"[dim]{escape(printable(text))}[/dim]", highlight=False)
