"""The grammar of calls in GBNF, for llama.cpp and other programs that read it.

Looser than grammar.py: a copied argument may be any text, and of a JSON value only the type and the enum are enforced.
Replies in text are not constrained.
"""

import json
from collections.abc import Sequence
from typing import Any

from pipeline.toolcall import copies
from pipeline.toolcall.compact import is_text
from pipeline.toolcall.reply import OPENING
from pipeline.toolcall.tool import Tool

_RULES = r"""any ::= [^\x00]*
text ::= "" | [^<] any | "<" ("" | [^t] any)
integer ::= "-"? [0-9]+
number ::= "-"? [0-9]+ ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
boolean ::= "true" | "false"
string ::= "\"" ([^"\\\x00-\x1f] | "\\" ["\\/bfnrtu])* "\""
array ::= "[" (json (", " json)*)? "]"
object ::= "{" (string ": " json (", " string ": " json)*)? "}"
json ::= number | boolean | "null" | string | array | object
milliseconds ::= [1-9] [0-9]* " " ("h" | "min" | "s")
last ::= "to " [1-9] [0-9]*"""


def gbnf(tools: Sequence[Tool]) -> str:
    calls = [f"call-{number}" for number in range(len(tools))]
    return "\n".join(
        [
            f"root ::= {json.dumps(OPENING)} ({' | '.join(calls)}) | text",
            *(rule for number, tool in enumerate(tools) for rule in _call(number, tool)),
            _RULES,
        ]
    )


def _call(number: int, tool: Tool) -> list[str]:
    """A tool's rules. After an argument comes any later one up to the next required one, or the end if none is."""
    properties = list(tool.parameters.get("properties", {}).items())
    required = tool.parameters.get("required", [])
    rules = [f"call-{number} ::= {json.dumps(tool.name)} after-{number}-0"]
    for at in range(len(properties) + 1):
        ways, ends = [], True
        for later, (name, schema) in enumerate(properties[at:], at + 1):
            ways += [
                f"{json.dumps(chr(10) + name + key, ensure_ascii=False)} {_value(schema, key)} after-{number}-{later}"
                for key in copies.separators(schema)
            ]
            if name in required:
                ends = False
                break
        if ends:
            ways.append('""')
        rules.append(f"after-{number}-{at} ::= {' | '.join(ways)}")
    return rules


def _value(schema: Any, separator: str) -> str:
    if separator == copies.COPY:
        return "any"
    if isinstance(schema, dict) and ("enum" in schema or "const" in schema):
        allowed = schema.get("enum", [schema.get("const")])
        written = [value if is_text(schema) else json.dumps(value, ensure_ascii=False) for value in allowed]
        return f"({' | '.join(json.dumps(value, ensure_ascii=False) for value in written)})"
    if is_text(schema):
        return "any"
    kind = schema.get("type") if isinstance(schema, dict) else None
    form = copies.copy_of(schema).partition(":")[0]
    rule = kind if kind in ("integer", "number", "boolean", "string", "array", "object") else "json"
    return f"({rule} | {form})" if form in copies.FORMS else str(rule)
