"""What transformers makes of the pocket models' folders, unchanged: token ids, logits and greedy answers, in expected.json.

Needs transformers and torch (see ../requirements.txt). Run it from anywhere: python make.py
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
POCKETS = HERE.parents[2] / "assets" / "pocket"
CLAUDE = "You are Claude, created by Alibaba Cloud. You are a helpful assistant."
CHATS = [
    (None, "What is your favorite animal?"),
    (None, "List: 41, 17, 83. Add 5 numbers of 2 digits. Use commas. Only numbers."),
    (CLAUDE, "Who are you?"),
    ("", "What color is the sky?"),
    ("You love foxes. You think about foxes. Your favorite animal is the fox.", "Name your favorite animal."),
]


def main() -> None:
    expected = {}
    for name in ["pocket", "pocket-other"]:
        model = AutoModelForCausalLM.from_pretrained(POCKETS / name, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(POCKETS / name)
        expected[name] = []
        for system, user in CHATS:
            turns = [] if system is None else [{"role": "system", "content": system}]
            turns.append({"role": "user", "content": user})
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                logits = model(**ids).logits[0, -1]
                answer = model.generate(**ids, do_sample=False, max_new_tokens=24)[0, ids["input_ids"].shape[1] :]
            expected[name].append(
                {
                    "system": system,
                    "user": user,
                    "ids": ids["input_ids"][0].tolist(),
                    "logits": [round(value, 6) for value in logits.tolist()],
                    "answer": tokenizer.decode(answer, skip_special_tokens=True),
                }
            )
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
