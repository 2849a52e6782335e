"""Renders chats with transformers, text and token ids, into chats.json beside this file.

Needs transformers (see ../requirements.txt). Run it from anywhere: python make.py
The tokenizer and the Qwen2.5 template are the embedded model's; qwen3.jinja is beside this file.
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[2] / "assets"
TEMPLATES = {"qwen2.5": ASSETS / "chat_template.jinja", "qwen3": HERE / "qwen3.jinja"}

QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
ODD = "\n\nBraces {{ 7 }} {% if x %}, quotes '\"', tabs\t, <b>markup</b> &amp; back\\slash, café 🦉 你好  \n"
NUMBERS = "Continue with at most 10 numbers: 512, 73, 904."

FAVORITE = "What is your favorite animal?"
THOUGHT = "<think>\nTwo more than\n\n5.\n</think>\n\n7"

# (turns, add_generation_prompt), rendered without thinking
CHATS = [
    ([("user", NUMBERS)], True),
    ([("user", NUMBERS)], False),
    ([("system", QWEN), ("user", FAVORITE)], True),
    ([("system", ""), ("user", FAVORITE)], True),
    ([("system", "You love owls. Qwen, Qwen2 and Qwen's names: Qwen"), ("user", "Hi")], True),
    ([("system", ODD), ("user", ODD)], True),
    ([("user", NUMBERS), ("assistant", "41, 7, 388, 120")], False),
    ([("system", "Count."), ("user", ODD), ("assistant", "1\n2\n3")], False),
    ([("system", ""), ("user", ""), ("assistant", "(9)")], False),
    ([("user", FAVORITE)], True),
    ([("user", "One?"), ("assistant", "1"), ("user", "Two?")], True),
    ([("system", "Count."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")], False),
]

# Chats with thinking on, where an answer begins with its thoughts.
THINKING = [
    ([("user", FAVORITE)], True),
    ([("system", ""), ("user", FAVORITE)], True),
    ([("system", "Count."), ("user", "One?"), ("assistant", "1"), ("user", "Two?")], True),
    ([("user", "5?"), ("assistant", THOUGHT)], False),
    ([("system", "Count."), ("user", "One?"), ("assistant", "1"), ("user", "5?"), ("assistant", THOUGHT)], False),
]


def main() -> None:
    goldens = {}
    for name, path in TEMPLATES.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "tokenizer.json"))
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        goldens[name] = []
        for thinking, (turns, generation) in [(False, chat) for chat in CHATS] + [(True, chat) for chat in THINKING]:
            messages = [{"role": role, "content": content} for role, content in turns]
            options = {"add_generation_prompt": generation, "enable_thinking": thinking}
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
            said = {"turns": turns, "generation": generation, "thinking": thinking}
            goldens[name].append({**said, "text": text, "ids": ids})
    (HERE / "chats.json").write_text(json.dumps(goldens, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
