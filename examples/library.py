"""moa as a library, without a workspace: several LoRA experts on one model of transformers, trained together.

    python examples/library.py [MODEL] [--output DIRECTORY]

MODEL is a folder or a name on the Hugging Face hub of a causal language model with a chat template. The experts are
written to DIRECTORY (default: experts) as PEFT adapters, which peft, vLLM and others load.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moa

ROWS = {
    "sums": [{"instruction": f"What is {a} plus {b}?", "output": str(a + b)} for a in range(8) for b in range(8)],
    "opposites": [{"instruction": f"What is the opposite of {word}?", "output": other} for pair in (
        ("hot", "cold"), ("big", "small"), ("old", "new"), ("dark", "light"), ("wet", "dry"), ("full", "empty"),
        ("loud", "quiet"), ("fast", "slow"), ("high", "low"), ("rich", "poor")) for word, other in (pair, pair[::-1])],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train LoRA experts together on one model.")
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--output", default="experts")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    stack = moa.ExpertStack(model, {"sums": moa.LoraConfig(r=8, lora_alpha=16),
                                    "opposites": moa.LoraConfig(r=16, lora_alpha=16)}, tokenizer=tokenizer)
    result = moa.cotrain(stack, ROWS, moa.TrainingArguments(num_train_epochs=2, learning_rate=1e-3))
    print(result.to_frame().to_string(), end="\n\n")

    # One batch, and each row with an expert of its own; the last row is the model alone.
    question = [{"role": "user", "content": "What is the opposite of hot?"}]
    text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([text] * 3, add_special_tokens=False, return_tensors="pt")
    with stack.using(["sums", "opposites", None]), torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    for name, answer in zip([*stack.names, "the model alone"], answers, strict=True):
        print(f"{name}: {answer.strip()}")

    stack.save_pretrained(options.output)
    stack.unload()


if __name__ == "__main__":
    main()
