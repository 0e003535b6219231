"""The schemas that libraries send for the first structured-output example of their own documentation.

Each is what the library makes of the example's class, written out, with the question that the example asks.
"""

from __future__ import annotations

from typing import Any


def _object(title: str, required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    """An object as pydantic writes it; every property is required unless said otherwise."""
    named = {name: {"title": name.title(), **schema} for name, schema in properties.items()}
    needed = list(properties) if required is None else required
    return {"properties": named, "required": needed, "title": title, "type": "object"}


_TEXT, _WHOLE, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}

LIBRARY_SCHEMAS: dict[str, tuple[str, dict[str, Any]]] = {
    # ollama/ollama-python, examples/structured-outputs.py: FriendList.model_json_schema()
    "ollama-python": (
        "I have two friends. The first is Ollama 22 years old busy saving the world, and the second is Alonso 23 years "
        "old and wants to hang out. Return a list of friends in JSON format",
        {
            "$defs": {"FriendInfo": _object("FriendInfo", name=_TEXT, age=_WHOLE, is_available=_FLAG)},
            **_object("FriendList", friends={"items": {"$ref": "#/$defs/FriendInfo"}, "type": "array"}),
        },
    ),
    # LangChain, "How to return structured data from a model": Joke
    "langchain": (
        "Tell me a joke about cats",
        {
            "description": "Joke to tell user.",
            **_object(
                "Joke",
                ["setup", "punchline"],
                setup={"description": "The setup of the joke", **_TEXT},
                punchline={"description": "The punchline to the joke", **_TEXT},
                rating={
                    "anyOf": [{"type": "integer"}, {"type": "null"}], "default": None,
                    "description": "How funny the joke is, from 1 to 10",
                },
            ),
        },
    ),
    # python.useinstructor.com, "Getting started": UserInfo, in Mode.JSON_SCHEMA
    "instructor": ("John Doe is 30 years old.", _object("UserInfo", name=_TEXT, age=_WHOLE)),
    # pydantic.dev/docs/ai, "Native output": NativeOutput([Fruit, Vehicle]), for a model without strict schemas
    "pydantic-ai": (
        "What is a Ford Explorer?",
        {
            "type": "object",
            "properties": {
                "result": {
                    "anyOf": [
                        {
                            "type": "object",
                            "properties": {
                                "kind": {"type": "string", "const": name},
                                "data": {"$ref": f"#/$defs/{name}"},
                            },
                            "required": ["kind", "data"],
                        }
                        for name in ("Fruit", "Vehicle")
                    ]
                }
            },
            "required": ["result"],
            "$defs": {
                "Fruit": _object("Fruit", name=_TEXT, color=_TEXT),
                "Vehicle": _object("Vehicle", name=_TEXT, wheels=_WHOLE),
            },
        },
    ),
    # vLLM, examples/online_serving/structured_outputs: CarDescription
    "vllm": (
        "Generate a JSON with the brand, model and car_type of the most iconic car from the 90's",
        {
            "$defs": {
                "CarType": {
                    "enum": ["SUV", "Truck", "Sedan", "Coupe"], "title": "CarType", "type": "string",
                }
            },
            **_object("CarDescription", brand=_TEXT, model=_TEXT, car_type={"$ref": "#/$defs/CarType"}),
        },
    ),
}  # fmt: skip
