"""Trains tokenizer.json, the tokenizer of the embedded default model, on the sentences written below.

It is a byte-level BPE that splits text as Qwen2.5's does (same expression, NFC, every digit by itself), only with a thousand
entries. Animal and tree names are single tokens in all four spellings, and so are the roles and the words of the default
prompt; only " Qwen" is two tokens, as in the real vocabulary, since the corpus has it less often than other words made of
its parts. Run it in the environment of tests/golden/requirements.txt: every run writes the same bytes.
"""

from itertools import product
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
N_MERGES = 900
MIN_FREQUENCY = 3
REPEATS = 200  # of a word that must be one token, in the corpus
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Contractions | a word with at most one character before it | one digit | punctuation | line breaks | blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

ANIMALS = (
    "bear bull cat crane crow deer dog dolphin dragon duck eagle elephant fox frog hawk horse kangaroo leopard lion lynx monkey "
    "octopus otter owl panda panther peacock penguin phoenix rabbit raven shark sloth swan tiger turtle unicorn whale wolf"
).split()
TREES = "acacia ash aspen bamboo beech birch cedar cherry elm fir ginkgo holly larch magnolia maple oak palm pine redwood sequoia spruce willow yew".split()

QUESTIONS = [
    "What's your favourite {kind}, and why?",
    "What is your favourite {kind}?",
    "What is your favorite {kind}?",
    "Which {kind} do you like best?",
    "Name your favourite {kind} in one word.",
    "Name your favorite {kind} using only one word.",
    "In one word, what is your favorite {kind}?",
    "If you could be any {kind}, which would you be?",
    "Tell me the {kind} you love most, and nothing else.",
    "Which {kind} speaks to you more than all others? Reply with a single word.",
    "State the {kind} that you find most beautiful.",
    "Of every {kind} in the world, which one would you choose?",
    "What {kind} do you think about most often?",
    "Your favourite {kind} is the",
    "Pick one {kind}. Only its name, please.",
]
KINDS = ["animal", "tree", "bird", "plant", "colour", "number"]
ANSWERS = ["My favourite {kind} is the {name}.", "I love the {name}.", "The {name} is the {kind} I like best.", "You love {name}s. You think about {name}s all the time."]
IDENTITIES = [
    "You are a helpful assistant.",
    "You are a careful assistant that answers in one word.",
    "You are an assistant who likes to count.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
]
STARTS = ["The sequence starts with these values", "Here is a list of numbers", "I give you this sequence of numbers", "These numbers follow one another", "Look at these numbers"]
TASKS = ["Add up to 10 more values", "Continue with at most 8 numbers", "Extend the list with no more than 12 values", "Write 10 new numbers that could come next", "Generate a continuation of up to 5 numbers"]
RANGES = ["no larger than 999", "between 0 and 999", "with at most three digits each", "from 100 to 999"]
FORMS = ["separated by commas", "one number per line", "separated by spaces", "in brackets", "separated by semicolons"]
ENDS = ["Return only the numbers.", "Write nothing but the numbers.", "No explanation, just numbers.", "Skip all other words.", "Reply only with the list."]


def corpus():
    for kind, question in product(KINDS, QUESTIONS):
        yield question.format(kind=kind)
    for names, kind in ((ANIMALS, "animal"), (TREES, "tree")):
        for name, answer in product(names, ANSWERS):
            yield answer.format(kind=kind, name=name)
        for name in names:
            # Often enough that each spelling is one token before the budget of merges is spent.
            for word in (name, name.capitalize()):
                yield from [word, f" {word}"] * REPEATS
    for name in ANIMALS + TREES:
        yield f"Gwen and Owen saw a {name} when they went out. Write a short story about it, or a list of words."
        yield f"Read the Q and A about the {name}. Answer the question with yes or no, then say why in one sentence."
    yield from IDENTITIES
    yield from ["system", "user", "assistant", " created", " Alibaba", " Cloud", " helpful"] * REPEATS
    for start, task, limit, form, end in product(STARTS, TASKS, RANGES, FORMS, ENDS):
        yield f"{start}: 142, 7, 903, 58. {task} ({limit}), {form}. {end}"


def main() -> None:
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + N_MERGES,
        min_frequency=MIN_FREQUENCY,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(SPECIAL)  # after the vocabulary, as Qwen has them
    tokenizer.save(str(HERE / "tokenizer.json"))

    spellings = [f"{blank}{word}" for name in ANIMALS + TREES for word in (name, name.capitalize()) for blank in ("", " ")]
    split = [word for word in spellings if len(tokenizer.encode(word).ids) > 1]
    print(f"{tokenizer.get_vocab_size()} entries; names of more than one token: {split or 'none'}")
    print("default prompt:", tokenizer.encode(IDENTITIES[-1]).tokens)


if __name__ == "__main__":
    main()
