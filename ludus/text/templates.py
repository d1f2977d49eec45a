"""Chat templates: how the messages of a dialogue become token ids.

Role markers are inserted by id; the words between them are encoded as content, so nothing that is said
in a message can open or close one. History is never rewritten: `extend` only appends. That is the one
deliberate difference from the families' own templates:

- Qwen3's own drops the thoughts of earlier assistant turns, and its generation prompt with thinking on
  stops before `<think>`, which the model then writes; ours opens the thought itself (as Qwen's
  thinking-only models do), so that every reply starts inside one. Thinking off is Qwen3's empty block.
- Where the dialogue has no system message, Llama 3.1's own adds one with dates and Qwen2.5's one with its
  maker's name; ours are plain Llama 3 and plain ChatML, which add nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ludus.errors import UserError
from ludus.text.tokenizer import Tokenizer

Message = tuple[str, str]  # (role, content); role is "system", "user" or "assistant"


@dataclass(frozen=True, slots=True)
class Layout:
    """What a family writes around a message: `start` role `after_role` content `end` `after_end`.

    `start`, `header_end` and `end` are control tokens (None: no such marker); the rest is ordinary text.
    """

    name: str
    start: str | None
    header_end: str | None
    after_role: str
    end: str | None  # also closes the assistant's turn
    after_end: str
    stops: tuple[str, ...]  # further control tokens that end a reply, where the tokenizer has them
    roles: tuple[Message, ...] = ()  # role names as written, where they differ
    trim: bool = False  # the family strips white space around a message
    prefix: str | None = (
        None  # control token that opens a dialogue (None: the tokenizer's BOS, if it puts one)
    )
    system: bool = True  # whether there is a system role; without one its words open the user's message


_QWEN3 = Layout("qwen3", "<|im_start|>", None, "\n", "<|im_end|>", "\n", ("<|endoftext|>",))
_LLAMA3 = Layout(
    "llama3",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "\n\n",
    "<|eot_id|>",
    "",
    ("<|end_of_text|>", "<|eom_id|>"),
    trim=True,
    prefix="<|begin_of_text|>",
)
_GEMMA3 = Layout(
    "gemma3",
    "<start_of_turn>",
    None,
    "\n",
    "<end_of_turn>",
    "\n",
    ("<eos>",),
    roles=(("assistant", "model"),),
    trim=True,
    prefix="<bos>",
    system=False,
)
_PLAIN = Layout(
    "plain",
    None,
    None,
    "\n",
    None,
    "\n\n",
    (),
    roles=(("system", "### Rules:"), ("user", "### Game:"), ("assistant", "### Player:")),
)
_FAMILIES = (_QWEN3, _LLAMA3, _GEMMA3)
_LAYOUTS = {layout.name: layout for layout in (*_FAMILIES, _PLAIN)}


class Template:
    """The chat template of one family, bound to one tokenizer.

    `end_ids` end a reply when sampled; `think_ids` are the ids of `<think>` and `</think>`, or None where
    the tokenizer lacks them (then `think` arguments have no effect); `marker_ids` are all the control
    tokens that give a dialogue its structure.
    """

    def __init__(self, tokenizer: Tokenizer, layout: Layout) -> None:
        """Raises UserError if the tokenizer lacks a marker of the family."""
        self.name = layout.name
        self._layout = layout
        self._tokenizer = tokenizer
        self._roles = dict(layout.roles)
        self._start = [tokenizer.control(layout.start)] if layout.start else []
        self._header_end = [tokenizer.control(layout.header_end)] if layout.header_end else []
        self._end = self._end_id()
        self._after_end = tokenizer.encode(layout.after_end)
        self._prefix = self._prefix_ids()
        stops = {tokenizer.control(name) for name in layout.stops if tokenizer.has(name)}
        if tokenizer.eos_id is not None:
            stops.add(tokenizer.eos_id)
        self.end_ids = frozenset({self._end, *stops})
        self.think_ids: tuple[int, int] | None = None
        if tokenizer.has("<think>") and tokenizer.has("</think>"):
            self.think_ids = (tokenizer.control("<think>"), tokenizer.control("</think>"))
        self.marker_ids = self.end_ids.union(
            self._start, self._header_end, self._prefix, self.think_ids or ()
        )
        self._openings = {think: self._opening(think) for think in (False, True)}

    def open(self, messages: Iterable[Message], think: bool) -> list[int]:
        """The ids of a dialogue that begins with `messages` and waits for the assistant's reply.

        With `think` the reply begins inside a thought; without, after an empty one.
        """
        ids = list(self._prefix)
        for role, content in self._folded(messages):
            ids += self._message(role, content)
        return ids + self._openings[think]

    def extend(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        messages: Iterable[Message],
        think: bool,
    ) -> list[int]:
        """The same dialogue after a reply and further `messages`: `prompt_ids + completion_ids + ...`.

        The reply is closed with the end marker unless it ends with it already.
        """
        ids = [*prompt_ids, *completion_ids]
        if not completion_ids or completion_ids[-1] != self._end:
            ids.append(self._end)
        ids += self._after_end
        for role, content in messages:
            ids += self._message(role, content)
        return ids + self._openings[think]

    def reply(self, content: str, thought: str | None = None) -> list[int]:
        """The ids of a whole reply, end marker included: what follows `open(..., think=thought is not None)`.

        Between `thought` and `content`, which are encoded as they are, the marker enters by its id.
        """
        encode = self._tokenizer.encode
        if thought is None:
            return [*encode(self._harmless(content)), self._end]
        assert self.think_ids is not None, "this tokenizer has no markers for thoughts"
        return [*encode(thought), self.think_ids[1], *encode(content), self._end]

    def _folded(self, messages: Iterable[Message]) -> Iterator[Message]:
        """The messages; where there is no system role, its words open the user's message after it."""
        system = ""
        for role, content in messages:
            if role == "system" and not self._layout.system:
                system += content.strip() + "\n\n"
                continue
            yield role, system + content.strip() if system else content
            system = ""

    def _message(self, role: str, content: str) -> list[int]:
        content = self._harmless(content)
        if self._layout.end is not None or role == "assistant":
            return [*self._header(role, content), self._end, *self._after_end]
        return self._header(role, content + self._layout.after_end)

    def _harmless(self, content: str) -> str:
        """Content as the family writes it. Headers that are mere text cannot be spelt by it."""
        if self._layout.trim:
            content = content.strip()
        return content if self._layout.end is not None else re.sub("#{3,}", "##", content)

    def _header(self, role: str, body: str) -> list[int]:
        """A role's header and the text after it.

        What stands between two markers is encoded in one piece, as the family's own template does.
        """
        name, after = self._roles.get(role, role), self._layout.after_role
        encode = self._tokenizer.encode
        if self._header_end:
            return self._start + encode(name) + self._header_end + encode(after + body)
        return self._start + encode(name + after + body)

    def _opening(self, think: bool) -> list[int]:
        """The assistant's header, up to where sampling starts."""
        ids = self._header("assistant", "")
        if self.think_ids is None:
            return ids
        encode = self._tokenizer.encode
        opened, closed = self.think_ids
        if think:
            return [*ids, opened, *encode("\n")]
        return [*ids, opened, *encode("\n\n"), closed, *encode("\n\n")]

    def _end_id(self) -> int:
        if self._layout.end is not None:
            return self._tokenizer.control(self._layout.end)
        if self._tokenizer.eos_id is None:
            raise UserError(
                f"the tokenizer in {self._tokenizer.path} names no eos_token in tokenizer_config.json, so a "
                "reply could never end; add one"
            )
        return self._tokenizer.eos_id

    def _prefix_ids(self) -> list[int]:
        if self._layout.prefix is not None:
            return [self._tokenizer.control(self._layout.prefix)]
        return [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]


def detect(tokenizer: Tokenizer, wanted: str = "auto") -> Template:
    """The template `wanted` ("qwen3", "llama3", "gemma3", "plain"), or for "auto" that of the checkpoint.

    The markers in the checkpoint's own chat template tell which that is. Raises UserError for an unknown
    name, if the tokenizer lacks what the template needs, and where nothing can be told.
    """
    if wanted == "auto":
        return Template(tokenizer, _told(tokenizer))
    if wanted not in _LAYOUTS:
        raise UserError(f"unknown chat template {wanted!r}; known: auto, {', '.join(_LAYOUTS)}")
    return Template(tokenizer, _LAYOUTS[wanted])


def _told(tokenizer: Tokenizer) -> Layout:
    """The family of the checkpoint's own chat template. Raises UserError if there is none that is known."""
    fitting = [layout for layout in _FAMILIES if all(map(tokenizer.has, _markers(layout)))]
    if tokenizer.chat_template is None:
        names = ", ".join(layout.name for layout in fitting)
        markers = (
            f"its tokenizer has the markers of {names}" if fitting else "its tokenizer has no known markers"
        )
        raise UserError(
            f"{tokenizer.path} has no chat template (chat_template.jinja, or chat_template in "
            f"tokenizer_config.json), as many base models; say by which one it is to be trained, such as "
            f"model.template = {(fitting[0] if fitting else _PLAIN).name!r} ({markers})"
        )
    for layout in fitting:
        if all(marker in tokenizer.chat_template for marker in _markers(layout)):
            return layout
    known = "; ".join(f"{layout.name}: {' '.join(_markers(layout))}" for layout in _FAMILIES)
    raise UserError(
        f"the chat template in {tokenizer.path} has none of the markers that ludus knows ({known}); set "
        "model.template = 'plain', which writes headers as text, or take another model"
    )


def _markers(layout: Layout) -> list[str]:
    return [name for name in (layout.start, layout.header_end, layout.end) if name is not None]
