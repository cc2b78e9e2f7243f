"""Chat messages to the text, or the token blocks, that a model was tuned on.

Templates are Jinja programs that come with a model, written for the hub's conventions. They are untrusted: they run in
a sandbox and see plain data only. Messages are untrusted in another way: what stands in a message must never become a
special token, or its writer could open a turn of their own. This module knows nothing of generation.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl2_rag.errors import ChatTemplateError, RequestError
from exl2_rag.llm.tokenizer import TextBlock, Tokenizer
from exl2_rag.llm.tokenizer_files import read_json, read_special_texts

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]


class ChatTemplate:
    """The chat templates of a model. Safe to use from many threads.

    A message is a mapping with a "role" and whatever else its template reads. Its "content" is a string, a list of
    `{"type": "text", "text": …}` parts, or, for prompts made of token blocks, a sequence of `TextBlock`.

    Args:
        sources: Jinja source by name; "default" is used, or "tool_use" where there is one and tools are given.
        variables: what templates see beside the messages, such as "bos_token".
        origin: where the sources come from, for messages.
    """

    def __init__(self, sources: Mapping[str, str], *, variables: Mapping[str, str], origin: str) -> None:
        self._sources = dict(sources)
        self._variables = dict(variables)
        self._origin = origin
        self._compiled: dict[str, jinja2.Template] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_dir(cls, model_dir: Path | str) -> ChatTemplate:
        """The templates of a model directory; `exists` is False if it has none.

        Raises:
            ModelError: a file that should hold a template is broken.
        """
        model_dir = Path(model_dir)
        return cls(_read_sources(model_dir), variables=read_special_texts(model_dir), origin=str(model_dir))

    @property
    def exists(self) -> bool:
        """Whether the model has a template at all; base models often have none."""
        return bool(self._sources)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt as text.

        Args:
            messages: at least one.
            tools: function descriptions as JSON Schema, in the form the template expects (usually OpenAI's).
            documents: for templates that have their own place for documents.
            add_generation_prompt: end with the head of the assistant's turn.
            variables: further template variables, such as `enable_thinking`.

        Raises:
            ChatTemplateError: there is no template, it does not compile, it fails, or it refuses the messages.
            RequestError: messages that are none.
        """
        joined = [_with_content(message, _joined) for message in _checked(messages)]
        return self._run(joined, tools, documents, add_generation_prompt, variables)

    def render_blocks(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[TextBlock]:
        """The prompt as blocks: the template's own text is trusted, every message's content is not.

        A content given as a sequence of `TextBlock` comes back as these very blocks. Contents are put in after the
        template has run, so what it does to them (trimming, say) is not done.

        Raises:
            ChatTemplateError: as for `render`; or the template drops, repeats or alters a message's content.
            RequestError: as for `render`.
        """
        contents: list[list[TextBlock]] = []
        checked = _checked(messages)
        opening, closing = _unused_characters(
            _strings([checked, tools, documents, variables, list(self._variables)]), 2
        )

        def as_sentinel(content: Any) -> Any:
            blocks = [TextBlock(content, trusted=False)] if isinstance(content, str) else content
            if not isinstance(blocks, list) or not any(block.text for block in blocks):
                return ""
            contents.append([block for block in blocks if block.text])
            return f"{opening}{len(contents) - 1}{closing}"

        marked = [_with_content(message, as_sentinel) for message in checked]
        text = self._run(marked, tools, documents, add_generation_prompt, variables)
        pieces = re.split(f"{opening}([0-9]+){closing}", text)
        self._check_sentinels(pieces, len(contents), (opening, closing))
        blocks: list[TextBlock] = []
        for n, piece in enumerate(pieces):
            if n % 2:
                blocks += contents[int(piece)]
            elif piece:
                blocks.append(TextBlock(piece, trusted=True))
        return blocks

    def _check_sentinels(self, pieces: Sequence[str], n_contents: int, marks: tuple[str, str]) -> None:
        found = [int(number) for number in pieces[1::2]]
        problem = None
        if any(mark in piece for piece in pieces[::2] for mark in marks) or set(found) - set(range(n_contents)):
            problem = "alters the content of a message"
        elif len(set(found)) < len(found):
            problem = "repeats the content of a message"
        elif len(found) < n_contents:
            problem = "leaves out, or escapes, the content of a message"
        if problem:
            raise ChatTemplateError(
                f"the chat template of {self._origin} {problem}, so its prompts cannot be made of token blocks; "
                "use messages with plain strings, or another template"
            )

    def _run(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        template = self._template("tool_use" if tools and "tool_use" in self._sources else "default")
        given = {"messages": messages, "tools": tools or None, "documents": documents or None}
        plain = _plain({**self._variables, **variables, **given}, "the chat template's variables")
        try:
            return template.render(**plain, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a foreign program: it can fail in any way
            raise ChatTemplateError(f"the chat template of {self._origin} failed: {_describe(error)}") from error

    def _template(self, name: str) -> jinja2.Template:
        with self._lock:
            if name not in self._compiled:
                if name not in self._sources:
                    has = f"only templates named {sorted(self._sources)}" if self._sources else "no chat template"
                    raise ChatTemplateError(
                        f"expected a chat template in {self._origin} (chat_template.jinja, or chat_template in "
                        f"tokenizer_config.json), found {has}; add one, or use generate with a plain prompt"
                    )
                self._compiled[name] = self._compile(self._sources[name])
            return self._compiled[name]

    def _compile(self, source: str) -> jinja2.Template:
        from exl2_rag.llm.template_sandbox import make_environment

        try:
            return make_environment().from_string(source)
        except Exception as error:  # the source is foreign: deep nesting, for one, ends in a RecursionError
            raise ChatTemplateError(
                f"the chat template of {self._origin} does not compile: {_describe(error)}"
            ) from error


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Token ids of a chat prompt.

    Special tokens come from the template (or trusted blocks) only: where a message, a tool or a variable holds the
    text of one, that text is encoded as ordinary text. BOS is there if the template writes it, and never twice.

    If the content of any message is a sequence of `TextBlock`, all contents are encoded as blocks (see
    `ChatTemplate.render_blocks`), so that equal leading blocks give equal leading ids.

    Raises:
        ChatTemplateError, RequestError: as for `ChatTemplate.render` and `render_blocks`.
    """
    checked = _checked(messages)
    has_blocks = any(_holds_blocks(message.get("content")) for message in checked)
    given: dict[str, Any] = {"messages": checked, "tools": tools, "variables": variables}
    strings = list(_strings(given))
    special = _any_of(tokenizer.special_token_texts)
    is_clean = not any(special.search(text) for text in strings)
    opening, closing = _unused_characters(strings, 2)
    if not is_clean:
        # The template must still see the text (it may look for "</think>"), so it is wrapped, not replaced.
        given = _map_strings(given, lambda text: special.sub(lambda found: f"{opening}{found[0]}{closing}", text))
    options = {"tools": given["tools"], "add_generation_prompt": add_generation_prompt, **given["variables"]}
    if has_blocks:
        blocks = template.render_blocks(given["messages"], **options)
    else:
        text = template.render(given["messages"], **options)
        if is_clean:
            return tokenizer.encode(text, special_tokens=True)
        blocks = [TextBlock(text, trusted=True)]
    return tokenizer.encode_blocks(piece for block in blocks for piece in _unmarked(block, opening, closing))


def _unmarked(block: TextBlock, opening: str, closing: str) -> Iterator[TextBlock]:
    """A block without marks; of a trusted one, what stands between marks becomes a block that is not.

    A template may cut a text between its marks. A mark without its partner still separates what stands beside it, so
    that the two sides cannot join to a special token.
    """
    if not block.trusted:
        yield TextBlock(block.text.replace(opening, "").replace(closing, ""), trusted=False)
        return
    for n, part in enumerate(block.text.split(opening)):
        inside, mark, outside = part.partition(closing)
        if n == 0 or not mark:
            inside, outside = "", part
        if inside:
            yield TextBlock(inside, trusted=False)
        for piece in outside.split(closing):
            if piece:
                yield TextBlock(piece, trusted=True)


def _read_sources(model_dir: Path) -> dict[str, str]:
    """Template sources by name; the newer forms win over the older ones, as in the hub's own library."""
    sources: dict[str, str] = {}
    for path in (model_dir / "chat_template.jinja", *sorted(model_dir.glob("additional_chat_templates/*.jinja"))):
        if path.is_file():
            name = "default" if path.parent == model_dir else path.stem
            try:
                sources[name] = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ChatTemplateError(f"{path} is not readable as UTF-8 text: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if "default" in sources:
            break
        declared = read_json(model_dir / name).get("chat_template")
        if declared is not None:
            sources = {**_named_sources(declared, model_dir / name), **sources}
    return sources


def _named_sources(declared: Any, path: Path) -> dict[str, str]:
    if isinstance(declared, str):
        return {"default": declared}
    if isinstance(declared, list) and all(isinstance(entry, dict) for entry in declared):
        named = {entry.get("name"): entry.get("template") for entry in declared}
    else:
        named = declared if isinstance(declared, dict) else {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ChatTemplateError(
            f"{path}: chat_template must be a text, or a list of objects with name and template, got {declared!r:.60}"
        )
    return named


def _checked(messages: Sequence[Message]) -> list[Message]:
    """The messages as mappings without null entries, which templates take for text."""
    if isinstance(messages, str | Mapping) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(
            f'expected a list of messages such as {{"role": "user", "content": "…"}}, got {messages!r:.80}'
        )
    if not messages:
        raise RequestError("expected at least one message, got an empty list")
    for message in messages:
        if not isinstance(message.get("role"), str):
            raise RequestError(f'every message needs a "role", got {dict(message)!r:.80}')
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _with_content(message: Message, change: Any) -> dict[str, Any]:
    if "content" not in message:
        return dict(message)
    return {**message, "content": change(_normal_content(message["content"]))}


def _normal_content(content: Any) -> str | list[TextBlock]:
    """A string, or a list of blocks; lists of text parts are joined."""
    if isinstance(content, str):
        return content
    if _holds_blocks(content):
        return list(content)
    if isinstance(content, Sequence) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RequestError(
        f"a message's content is a string, a list of text parts, or a list of TextBlock; got {content!r:.80}"
    )


def _holds_blocks(content: Any) -> bool:
    return (
        isinstance(content, Sequence)
        and not isinstance(content, str)
        and bool(content)
        and all(isinstance(part, TextBlock) for part in content)
    )


def _joined(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _plain(value: Any, what: str) -> Any:
    """A copy made of JSON's own types, which have no method that a hostile template could use."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, what) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, what) for inner in value]
    raise RequestError(
        f"{what} hold a {type(value).__name__}, which is no JSON value; pass text, numbers, lists, dicts"
    )


def _map_strings(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(inner, change) for inner in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    """Every string in a nested value, keys and token blocks too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, TextBlock):
        yield value.text
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _unused_characters(texts: Iterable[str], count: int) -> list[str]:
    """Private-use characters that none of the texts holds."""
    used = {character for text in texts for character in text if character >= "\U000f0000"}
    unused = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in used)
    return list(islice(unused, count))


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) never matches


def _describe(error: Exception) -> str:
    return str(error) or type(error).__name__
