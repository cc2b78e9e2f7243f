"""What a continuation must obey, enforced while it is decoded.

A constraint is made once, checked against a tokenizer with `validate`, and compiled into a fresh matcher for every
request. The grammar engine behind all of them is llguidance; nothing outside this folder knows that.
"""

from exl2_rag.llm.constraint.base import Constraint, ConstraintMatcher
from exl2_rag.llm.constraint.json_schema import JsonSchema
from exl2_rag.llm.constraint.quotes import AnswerWithQuotes
from exl2_rag.llm.constraint.text_forms import Choice, Lark, Regex

__all__ = ["AnswerWithQuotes", "Choice", "Constraint", "ConstraintMatcher", "JsonSchema", "Lark", "Regex"]
