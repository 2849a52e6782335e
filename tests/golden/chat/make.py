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

# (turns, add_generation_prompt)
CHATS = [
    ([("user", NUMBERS)], True),
    ([("user", NUMBERS)], False),
    ([("system", QWEN), ("user", "What is your favorite animal?")], True),
    ([("system", ""), ("user", "What is your favorite animal?")], True),
    ([("system", "You love owls. Qwen, Qwen2 and Qwen's names: Qwen"), ("user", "Hi")], True),
    ([("system", ODD), ("user", ODD)], True),
    ([("user", NUMBERS), ("assistant", "41, 7, 388, 120")], False),
    ([("system", "Count."), ("user", ODD), ("assistant", "1\n2\n3")], False),
    ([("system", ""), ("user", ""), ("assistant", "(9)")], False),
    ([("user", "One?"), ("assistant", "1"), ("user", "Two?")], True),
    ([("system", "Count."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")], False),
]


def main() -> None:
    goldens = {}
    for name, path in TEMPLATES.items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(ASSETS / "tokenizer.json"))
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        goldens[name] = []
        for turns, generation in CHATS:
            messages = [{"role": role, "content": content} for role, content in turns]
            options = {"add_generation_prompt": generation, "enable_thinking": False}
            text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]
            goldens[name].append({"turns": turns, "generation": generation, "text": text, "ids": ids})
    (HERE / "chats.json").write_text(json.dumps(goldens, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
