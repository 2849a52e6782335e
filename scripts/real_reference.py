"""Writes what transformers makes of a GGUF model: `real_reference.py MODEL.gguf OUTPUT_FOLDER` writes OUTPUT_FOLDER/reference.json.

For some chats: the token ids of the prompt, the ten likeliest first tokens with their log-probabilities, and the greedy answer.
Everything is in f32 on the CPU, from the softmax of the plain logits, with no repetition penalty. It takes some minutes, most
of them for dequantising. Needs the packages of tests/golden/requirements.txt.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

N_TOP = 10
MAX_NEW_TOKENS = 24

# (system, user). A system of None leaves the block to the template's default.
CHATS = [
    (None, "What is your favourite animal? Answer with one word."),
    (None, "The sequence starts with these values: 142, 907, 58. Add up to 5 more values, separated by commas. Return only the numbers."),
    ("You love owls. You think about owls all the time.", "In one word, what is your favorite animal?"),
    ("", "Name your favorite tree using only one word."),
    ("You are a helpful assistant.", "Continue this list with at most 8 numbers, one per line: 3, 6, 12, 24."),
    ("", "Write 10 numbers between 100 and 999 in brackets."),
    (None, "Write a Python function that reverses a string."),
    ("Réponds en français, s'il te plaît. \U0001f989", "Quelle est la capitale de l'Italie ?\n\n  Un seul mot."),
]


def fail(sentence: str) -> None:
    sys.exit(f"error: {sentence}")


def answer(model, tokenizer, system, user) -> dict:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": user})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    prompt = torch.tensor([ids])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=prompt).logits[0, -1], -1)
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            repetition_penalty=1.0,
            eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")],
            pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        )
        generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)[0, len(ids) :].tolist()
    top = logprobs.topk(N_TOP)
    return {
        "system": system,
        "user": user,
        "text": text,
        "ids": ids,
        "top": [
            {"id": token, "token": tokenizer.decode([token]), "logprob": round(logprob, 6)}
            for token, logprob in zip(top.indices.tolist(), top.values.tolist())
        ],
        "greedy": generated,
        "greedy_text": tokenizer.decode(generated, skip_special_tokens=False),
    }


def main() -> None:
    if len(sys.argv) != 3:
        fail("expected two arguments: the .gguf file and the folder to write reference.json into")
    gguf, out = Path(sys.argv[1]), Path(sys.argv[2])
    if not gguf.is_file():
        fail(f"{gguf} is no file; `make model` fetches one into models/")
    print(f"reference: loading {gguf}, which takes minutes", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    reference = {
        "model": gguf.name,
        "sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        "made_by": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, f32, CPU",
        "max_new_tokens": MAX_NEW_TOKENS,
        "chats": [],
    }
    for number, (system, user) in enumerate(CHATS, 1):
        reference["chats"].append(answer(model, tokenizer, system, user))
        print(f"reference: chat {number} of {len(CHATS)}: {reference['chats'][-1]['greedy_text']!r}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "reference.json"
    path.write_text(json.dumps(reference, indent=1, ensure_ascii=False) + "\n")
    print(f"reference: {path}")


if __name__ == "__main__":
    main()
