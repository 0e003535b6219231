"""Convert a request to the view that a policy sees, and back.

Elsewhere: the view is `guard/view.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from argosy.errors import UsageError
from argosy.guard.view import Shown
from argosy.prompt.infill import Snippet
from argosy.serve.answer.request import ChatRequest, ModelRequest, TextRequest


def shown_of(request: ModelRequest, decode: Callable[[Sequence[int]], str]) -> Shown:
    """The view of everything that the model gets from a request. Names in `tool_choice` are those of its tools."""
    if isinstance(request, ChatRequest):
        return Shown(
            messages=request.messages, tools=request.tools, variables=request.variables, grammar=request.form,
            texts=[decode(request.begun_ids)] if request.begun_ids else (),
        )  # fmt: skip
    prompt = request.prompt if isinstance(request.prompt, str) else decode(request.prompt)
    after = () if request.suffix is None else (request.suffix,)
    others = (text for one in request.snippets or () for text in (one.file or "", one.text))
    return Shown(texts=[prompt, *after, *others], grammar=request.params.grammar)


def with_shown(request: ModelRequest, given: Shown, made: Shown) -> ModelRequest:
    """The request as changed by the policy.

    Raises:
        UsageError: its prompt is token ids and contains values to replace.
    """
    if isinstance(request, TextRequest):
        return _text_with_shown(request, given, made)
    return replace(
        request, messages=made.messages, tools=made.tools, variables=made.variables, form=made.grammar
    )


def _text_with_shown(request: TextRequest, given: Shown, made: Shown) -> TextRequest:
    prompt, *others = made.texts
    if not isinstance(request.prompt, str):
        if prompt != given.texts[0]:
            raise UsageError(
                "the policy of this server replaces values in the prompt, and this one is token ids",
                param="prompt", hint="send the prompt as text",
            )  # fmt: skip
        return replace(request, params=replace(request.params, grammar=made.grammar))
    suffix = None if request.suffix is None else others.pop(0)
    snippets = None
    if request.snippets is not None:
        snippets = [Snippet(text, file or None) for file, text in zip(others[::2], others[1::2], strict=True)]
    params = replace(request.params, grammar=made.grammar)
    return replace(request, prompt=prompt, suffix=suffix, snippets=snippets, params=params)
