"""Decides which parsers there are, by name, and which of them a chat template shows. Names only: the command line lists
them, and loads nothing."""

from __future__ import annotations

HARMONY = "harmony"
ALIASES = {
    "deepseekv31": "deepseekv3",
    "glm47": "glm45",
    "glm5": "glm45",
    "hermes": "qwen25",
    "kimi_k25": "kimi_k2",
    "llama4_pythonic": "pythonic",
    "qwen2": "qwen25",
    "qwen3": "qwen25",
    "qwen35": "qwen3_coder",
}
SHAPES = ("deepseekv3", "deepseekv32", "deepseekv4", "glm45", "json", "kimi_k2", "llama3_json", "mistral", "pythonic")
SHAPES += ("qwen25", "qwen3_coder")
# Markers of reasoning, and whether answers begin inside of it.
THOUGHTS = {
    "kimi": ("◁think▷", "◁/think▷", False),
    **dict.fromkeys(("deepseek-r1", "qwen3-thinking", "qwen35-thinking"), ("<think>", "</think>", True)),
    **dict.fromkeys(
        ("deepseek-v3", "deepseek-v4", "glm45", "glm47", "glm5", "kimi_k25", "qwen3", "qwen35", "step3"),
        ("<think>", "</think>", False),
    ),
}
TOOL_PARSERS = ("none", *sorted((*SHAPES, *ALIASES, HARMONY)))
REASONING_PARSERS = ("none", *sorted((*THOUGHTS, HARMONY)))

# What a template shows of a parser; the first that is there counts, as some families share markers.
TOOLS_SHOWN = (
    ("DSML\N{FULLWIDTH VERTICAL LINE}tool_calls", "deepseekv4"),
    ("DSML\N{FULLWIDTH VERTICAL LINE}", "deepseekv32"),
    ("<\N{FULLWIDTH VERTICAL LINE}tool\u2581call\u2581begin", "deepseekv3"),
    ("<|tool_call_begin|>", "kimi_k2"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "qwen25"),
    ("[TOOL_CALLS]", "mistral"),
    ("<|channel|>", HARMONY),
    ('"parameters": dictionary of argument name and its value', "llama3_json"),  # Llama 4 has it, and <|python_start|>
    ("<|python_start|>", "pythonic"),
    ("[func_name1(params_name1=params_value1", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
)
THOUGHTS_SHOWN = (("◁think▷", "kimi"), ("<|channel|>", HARMONY), ("</think>", "qwen3"), ("<think>", "qwen3"))
