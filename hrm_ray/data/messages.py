"""Chats: a column with a list of messages, written as one text with the speakers' names.

    System: Be brief.

    User: Hello?

    Assistant: Hello.

A message is {"role": ..., "content": ...}, as of OpenAI, or {"from": ..., "value": ...}, as of ShareGPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hrm_ray.data.rows import BadRow, Document, Row, TextColumns, kind_name
from hrm_ray.errors import Fault

_SPEAKERS = {
    "system": "System",
    "developer": "System",
    "user": "User",
    "human": "User",
    "assistant": "Assistant",
    "gpt": "Assistant",
    "tool": "Tool",
    "function": "Tool",
}
_ROLES = "The roles are system, user (human), assistant (gpt) and tool"


class MessagesColumn(TextColumns):
    """The column that holds the messages. In `pairs` the last message of the assistant is the response, and all before
    it the prompt; what follows it is left out."""

    def __init__(self, name: str, *, pairs: bool) -> None:
        super().__init__(name, None, None)
        self.pairs = pairs
        self._options = ("--messages-column",)

    def picked(self, values: Sequence[object], where: str, row: int, mark: int | None) -> Row:
        place = f"{where}, column `{self.names[0]}`"
        turns = _turns(values[0], place)
        if isinstance(turns, Fault):
            return BadRow(turns, where, row, mark)
        texts = [f"{speaker}: {content}" for speaker, content in turns]
        prompt = response = None
        if self.pairs:
            answers = [number for number, (speaker, _) in enumerate(turns) if speaker == "Assistant"]
            if not answers:
                hint = "Give chats with a message of the assistant, or leave out --lm-mask prefix"
                return BadRow(Fault(place, "no message is of the assistant", hint), where, row, mark)
            texts = texts[: answers[-1] + 1]
            response = f" {turns[answers[-1]][1]}"
            prompt = "\n\n".join(texts).removesuffix(response)
        text = "\n\n".join(texts)
        fault = self._no_text(text, 0, where)
        return Document(text, where, row, mark, prompt, response) if fault is None else BadRow(fault, where, row, mark)


def _turns(value: object, place: str) -> list[tuple[str, str]] | Fault:
    """Speaker and content of each message; the fault of the first that has none."""
    if not isinstance(value, list) or not value:
        what = "an empty list" if isinstance(value, list) else kind_name(value)
        return Fault(place, f"its value is {what}, not a list of messages", "Name another with --messages-column")
    turns = []
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping):
            return Fault(place, f"message {number} is {kind_name(message)}, not an object", "Correct the row")
        role = message.get("role", message.get("from"))
        speaker = _SPEAKERS.get(role) if isinstance(role, str) else None
        if speaker is None:
            shown = f"the unknown role `{role[:40]}`" if isinstance(role, str) else "no role"
            return Fault(place, f"message {number} has {shown}", _ROLES)
        content = _content(message.get("content", message.get("value")))
        if content is None:
            reason = f"message {number}, of the {role}, has no text as its content"
            return Fault(place, reason, "Give each message a content (or value) that is a string")
        turns.append((speaker, content))
    return turns


def _content(value: object) -> str | None:
    """The text of a message: a string, or parts {"type": "text", "text": ...}; None for anything else."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if found and len(found) == len(texts) else None
