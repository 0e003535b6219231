"""A check for schemathesis: if data that the document allows is refused, then with a message of the list below.

JSON Schema cannot compare two places of a body, and knows neither the model nor the state of the server.
`docs/guides/serving.md`, "Fields of other servers", sums up these reasons.
"""

from __future__ import annotations

import json
import re

import schemathesis
from schemathesis.checks import CheckContext
from schemathesis.core.failures import Failure

REASONS = (
    # One part of the body refers to another.
    r"message \d+: tool_call_id '.*' matches no call in an earlier message",
    r"message \d+: a tool result, but no earlier call",
    r"tool_choice names '.*', which is not among the tools",
    r"tool_choice requires a tool call, and there are no tools",
    r"tool \d+: the name '.*' is used twice",
    r"message \d+: tool call \d+ has the id '.*' of an earlier call in this message",
    r"message \d+: reasoning_content and reasoning differ",
    r"an answer can have only one form",
    r"best_of must equal n",
    r"max_tokens can be 0 only with echo and logprobs",
    r"min_tokens must be at most max_tokens",
    r"ignore_eos cannot be used with a grammar",
    r"[a-z_]+ and [a-z_]+ are two names for one setting, and their values differ",
    r"[a-z_]+: expected (-1|0), because penalties count",
    r"the request has both tool_choice and its older version function_call",
    # Requirements on the last message.
    r"the last (message|item) ",
    r"every message is an empty one from the assistant",
    r"(continue_final_message|add_generation_prompt|continue_token_ids): the last message is",
    r"messages: final assistant content cannot end with trailing whitespace",
    r"the answer cannot be a tool call and have a form",
    r"continue_token_ids: an answer that goes on from tokens has neither tools nor a form",
    r"the answer continues the assistant's last message, so it cannot have a required form",
    # Limits of the served model, and of the responses in memory.
    r"This model's maximum context length is \d+ tokens",
    r"prompt is too long: \d+ tokens",
    r"input length and `min_tokens` exceed context limit",
    r"dimensions must be from 1 to \d+ with this model",
    r"this model cannot fill in a text",
    r"a suffix needs a prompt of text, found token ids",
    r"a prompt with a suffix cannot be echoed",
    r"log-probabilities of a prompt cannot be streamed",
    r"a prompt needs at least one token, and this one is empty",
    r"(token id|stop_token_ids names token|logit_bias names token) \d+",
    r".*: (this model reads text only|this server does not run Anthropic's tools), and this part has type",
    r"tools: .* would run at Anthropic",
    r"this model's chat template does not read the variable",
    r"Previous response with id '.*' not found",
    # Text in another language: JSON, expressions, grammars.
    r"(guided_json|structured_outputs\.json): (the text is not JSON|expected the JSON text of an object)",
    r"the (grammar|expression|schema) |line \d+ of the grammar",
)


class UnexplainedRefusal(Failure):
    """Allowed data was refused with a message that the list does not have."""


@schemathesis.check
def allowed_data_is_refused_with_a_listed_message(
    ctx: CheckContext, response: schemathesis.Response, case: schemathesis.Case
) -> None:
    meta = case.meta
    if response.status_code != 400 or meta is None or not meta.generation.mode.is_positive:
        return
    error = json.loads(response.content)["error"]
    message = error if isinstance(error, str) else error["message"]  # Ollama's errors are texts
    if not any(re.match(reason, message, re.DOTALL) for reason in REASONS):
        raise UnexplainedRefusal(operation=case.operation.label, title="Unexplained refusal", message=message)
